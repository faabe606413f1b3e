"""Time to the first token of a Hugging Face decoder: dense prefill beside a method's, prompts read in chunks.

Random weights attend to everything alike, which no prompt makes a trained model do. So with them the search runs on the
model's own queries and keys, and is timed, but the lists that attention gets are those of structured inputs of the same
shape (``bench.inputs``), found before the clock starts.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from keysift.attention import list_ranges
from keysift.bench.inputs import structured_qkv
from keysift.bench.prefill import DENSE, failure
from keysift.functional import NO_LAYER
from keysift.hf import Attachment, KVCache, attach
from keysift.hf.attach import NAME, attention_function
from keysift.methods import describe
from keysift.types import KV, BlockMask, Ctx, check_seed, one_of

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "llama-1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "codellama-13b": {
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "head_dim": 128,
        "vocab_size": 32016,
    },
    "codellama-34b": {
        "num_hidden_layers": 48,
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
    },
}
ROPE_THETA = 500_000.0
WARMUP_CHUNKS = 2  # of a prompt that are read before the clock starts: kernels compile


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        method: method object for prefill, beside dense.
        chunk: tokens of a prompt that are read at a time.
        seed: of structured inputs, and of methods that draw.
        repeats: runs, of which the median counts.
        skip_dense_above: longer prompts are not read densely.
        all_logits: keep the logits of every token, not of the last alone.
    """

    method: Any
    chunk: int = 16384
    seed: int = 0
    repeats: int = 1
    skip_dense_above: int | None = None
    all_logits: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("chunk", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more")


class Subject(NamedTuple):
    """A model and its prompts.

    Attributes:
        model: on its device, in eval mode.
        prompt: token ids ``[1, length]`` of a prompt of some length, on the model's device.
        random: whether the weights are random; attention then gets the lists of structured inputs.
    """

    model: Any
    prompt: Callable[[int], Tensor]
    random: bool


@dataclass
class Row:
    """One length, dense or with the method. What was not measured is None, and ``reason`` says why.

    Attributes:
        masks: where the block lists came from: "own" queries and keys, or "structured" inputs.
        status: "ok", "skipped", "out of memory" or "failed".
        ttft_s: from handing over the prompt to the first token.
        attention_s, attention_share: of it in attention, search included.
        density: share of the causal (query, key) pairs that were read.
        speedup: the dense row's ttft over this one's.
        peak_mib: memory at most beyond the weights (and beyond the lists of structured inputs); None on a CPU.
        same_first_token: whether it is dense prefill's; None with random weights, where it would mean nothing.
    """

    length: int
    method: str
    masks: str = "own"
    status: str = "ok"
    reason: str | None = None
    ttft_s: float | None = None
    attention_s: float | None = None
    attention_share: float | None = None
    density: float | None = None
    speedup: float | None = None
    peak_mib: float | None = None
    same_first_token: bool | None = None


class Planned(NamedTuple):
    """A plan for the queries and keys at hand, and the lists to read instead of its own, by first and last block."""

    real: Any
    masks: dict[tuple[int, int], BlockMask]


@dataclass(frozen=True)
class StructuredMasks:
    """A prefill method that does all the work of ``inner``, and returns the lists of structured inputs.

    Attributes:
        inner: the method.
        masks: by number of queries and of keys, what ``prepare`` found; None where the method reads all.
    """

    inner: Any
    masks: dict[tuple[int, int], dict[tuple[int, int], BlockMask] | None] = field(default_factory=dict, compare=False)

    @property
    def paper(self) -> str:
        return self.inner.paper

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return self.inner.dense_layers

    def prepare(
        self, tokens: int, chunk: int, config: Any, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        """Search in a structured prompt of ``tokens`` tokens, shaped as ``config`` says, for each of its chunks."""
        heads, dim = config.num_attention_heads, config.head_dim
        q, k, v = structured_qkv(tokens, heads, config.num_key_value_heads, dim, seed=seed, device=device, dtype=dtype)
        self.masks.clear()
        for lo in range(0, tokens, chunk):
            hi = min(lo + chunk, tokens)
            kv = KV.of(k[:, :hi], v[:, :hi])
            plan = self.inner.plan(q[:, lo:hi], kv, Ctx(NO_LAYER, dim**-0.5, kv.length - 1, seed))
            ranges = list_ranges(range(lo, hi), self.block, heads)
            found = None if plan is None else {(r.start, r.stop): self.inner.mask(plan, r) for r in ranges}
            self.masks[hi - lo, hi] = found

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Planned | None:
        real = self.inner.plan(q_BTHD, kv, ctx)
        start, end = kv.known_spans()[0]
        instead = self.masks[q_BTHD.shape[1], end - start]
        return None if real is None or instead is None else Planned(real, instead)

    def mask(self, plan: Planned, blocks: range) -> BlockMask:
        self.inner.mask(plan.real, blocks)
        return plan.masks[blocks.start, blocks.stop]


# ---- models -------------------------------------------------------------------------------------------------------


def random_model(shape: str, longest: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Subject:
    """A decoder of a known shape with random weights, made on the device.

    Args:
        shape: a name in ``SHAPES``.
        longest: tokens that it has to take.
        device, dtype: of the weights.
        seed: of weights and prompts.
    """
    one_of("shape", shape, SHAPES)
    config = transformers.LlamaConfig(
        **SHAPES[shape],
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=longest + 1,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def prompt(length: int) -> Tensor:
        random = torch.Generator(device).manual_seed(seed)
        return torch.randint(config.vocab_size, (1, length), generator=random, device=device)

    return Subject(model, prompt, random=True)


def check_logits_fit(tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError if the logits of all ``tokens`` tokens would not fit into what memory the device has free."""
    gib, free = tokens * vocab * dtype.itemsize / 2**30, _free_bytes(device) / 2**30
    if gib > free:
        room = f"{device} has {free:.3g} GiB free"
        raise ValueError(f"all logits of {tokens} tokens take {gib:.3g} GiB and {room}: pass logits_to_keep=1")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- measuring ----------------------------------------------------------------------------------------------------


def measure(subject: Subject, setup: Setup, lengths: Sequence[int], start: Callable[[str], None]) -> Iterator[Row]:
    """Two rows a length, dense and the method's; what fails is a row with its reason, and the others go on.

    Args:
        subject: model and prompts.
        setup: method, chunk and so on.
        lengths: prompts in tokens.
        start: called with what begins, in words.

    Raises:
        ValueError: all logits are asked for and would not fit, or the model is not supported.
    """
    model, device = subject.model, subject.model.device
    if setup.all_logits:
        for length in lengths:
            check_logits_fit(length, model.config.get_text_config().vocab_size, model.dtype, device)
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    methods = [DENSE] if setup.method == DENSE else [DENSE, setup.method]
    with here, attach(model, seed=setup.seed) as link:
        for length in lengths:
            rows: list[Row] = []
            tokens: list[int | None] = []
            for method in methods:
                row = Row(length, describe(method), "structured" if subject.random and method != DENSE else "own")
                start(f"{length:,} tokens, {row.method}")
                tokens.append(_fill(row, subject, setup, link, method))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                rows.append(row)
                if rows[0].ttft_s and row.ttft_s:
                    row.speedup = rows[0].ttft_s / row.ttft_s
                    row.same_first_token = None if subject.random else tokens[0] == tokens[-1]
                    if row.same_first_token is False:
                        row.reason = "another first token than dense prefill's"
                yield row


def _fill(row: Row, subject: Subject, setup: Setup, link: Attachment, method: Any) -> int | None:
    """Measure one row; the first token."""
    if method == DENSE and setup.skip_dense_above is not None and row.length > setup.skip_dense_above:
        row.status, row.reason = "skipped", f"not measured above {setup.skip_dense_above:,} tokens, as asked for"
        return None
    try:
        return _measure(row, subject, setup, link, method)
    except Exception as error:  # kernels fail in many ways, and one row must not end the others
        row.status, row.reason = failure(error)
        return None


def _measure(row: Row, subject: Subject, setup: Setup, link: Attachment, method: Any) -> int:
    model = subject.model
    config, device = model.config.get_text_config(), model.device
    link.prefill = method
    if row.masks == "structured":
        link.prefill = StructuredMasks(method)
        link.prefill.prepare(row.length, setup.chunk, config, device, model.dtype, setup.seed)
    ids = subject.prompt(row.length)
    warmup = row.length if row.length <= WARMUP_CHUNKS * setup.chunk else WARMUP_CHUNKS * setup.chunk
    first_token(model, link, ids[:, :warmup], setup.chunk)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    runs = []
    for _ in range(setup.repeats):
        link.reset_stats()
        runs.append(first_token(model, link, ids, setup.chunk, setup.all_logits))
    if device.type == "cuda":
        row.peak_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    row.ttft_s = statistics.median(run.seconds for run in runs)
    row.attention_s = statistics.median(run.attention_s for run in runs)
    row.attention_share = row.attention_s / row.ttft_s
    row.density = link.stats.prefill_density
    return runs[0].token


class Run(NamedTuple):
    token: int
    seconds: float
    attention_s: float


def first_token(model: Any, link: Attachment, ids: Tensor, chunk: int, all_logits: bool = False) -> Run:
    """Read the prompt ``ids`` (``[1, T]``) in chunks into a new cache, and take the likeliest next token."""
    kept = []
    cache = KVCache(config=model.config)
    _wait(model.device)
    began = time.perf_counter()
    with link.reading("sparse"), torch.inference_mode(), _attention_clock(model.device) as elapsed:
        for part in ids.split(chunk, 1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=0 if all_logits else 1)
            kept.append(out.logits)
            del kept[: 0 if all_logits else -1]
    last = kept[-1][0, -1]
    token = int(last.argmax())
    seconds = time.perf_counter() - began
    if not bool(torch.isfinite(last).all()):
        raise ValueError("the logits hold NaN or inf")
    return Run(token, seconds, elapsed())


@contextmanager
def _attention_clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Within it, calls of our attention function are timed; what it gives sums them up, in seconds."""
    marks: list[tuple[Any, Any]] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _mark(device)
        out = attention_function(*args, **kwargs)
        marks.append((start, _mark(device)))
        return out

    def elapsed() -> float:
        _wait(device)
        if device.type == "cuda":
            return sum(a.elapsed_time(b) for a, b in marks) / 1e3
        return sum(b - a for a, b in marks)

    transformers.AttentionInterface.register(NAME, timed)
    try:
        yield elapsed
    finally:
        transformers.AttentionInterface.register(NAME, attention_function)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settings_of(setup: Setup) -> dict[str, Any]:
    """As JSON takes it."""
    return {**{f.name: getattr(setup, f.name) for f in dataclasses.fields(setup)}, "method": describe(setup.method)}
