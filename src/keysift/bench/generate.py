"""How fast the engine generates: batches of long contexts, dense and by methods, beside the time to read it all once.

Contexts are prompts that the engine reads, or noise written straight into its slots, over which a step takes as long.
MagicDec's units (arXiv:2408.11049): batch x prefix x generated tokens, and milliseconds a token and sequence.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from keysift.bench import steps
from keysift.bench.prefill import failure
from keysift.bench.steps import DENSE, WARMUP, let_go, timed_ms
from keysift.engine import LLM
from keysift.hf.parallel import least
from keysift.methods import describe
from keysift.offload import free_device_bytes
from keysift.requests import Delta, RequestOutput
from keysift.sampling import SamplingParams
from keysift.slots import check_page
from keysift.types import check_seed

CHUNK = 16384  # tokens of a prompt that are read at a time: what is computed of them fits beside a full cache
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
COPIES = 7


class Shape(NamedTuple):
    """Sequences, tokens of each one's context, and tokens that each then gets."""

    batch: int
    prefix: int
    generated: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prefix}x{self.generated}"


@dataclass(frozen=True)
class Setup:
    """What is measured, apart from shapes and decode methods.

    Attributes:
        prefill: method that prompts are read by.
        read: whether contexts are prompts that are read; otherwise they are noise.
        page: rows a page of the cache.
        seed: of noise, random prompts, and of methods that draw.
        outputs: whether rows keep what their first sequence got.
        tensor_parallel: processes that share the model, which torchrun has started.
        copy_gb_s: what ``copy_gb_s`` found; None leaves the floor out.
    """

    prefill: Any = DENSE
    read: bool = False
    page: int = 128
    seed: int = 0
    outputs: bool = False
    tensor_parallel: int = 1
    copy_gb_s: float | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_page(self.page)


@dataclass(frozen=True)
class Subject:
    """A model, and what it reads.

    Attributes:
        tokenizer: None for random weights.
        text: token ids that prompts are pieces of; None for random tokens.
    """

    model: Any
    tokenizer: Any = None
    text: Sequence[int] | None = None

    def prompts(self, batch: int, tokens: int, seed: int) -> list[list[int]]:
        """One prompt a sequence: consecutive pieces of the text, each with the token that texts begin with if the
        tokenizer puts one there, or random tokens.

        Raises:
            ValueError: the text is too short.
        """
        if self.text is None:
            draw, known = torch.Generator().manual_seed(seed), self.model.get_input_embeddings().num_embeddings
            drawn: list[list[int]] = torch.randint(known, (batch, tokens), generator=draw).tolist()
            return drawn
        if len(self.text) < batch * tokens:
            raise ValueError(
                f"the text has {len(self.text):,} tokens, and {batch} x {tokens:,} = {batch * tokens:,} are needed:"
                " take a longer text, or fewer or shorter prompts"
            )
        pieces = [list(self.text[i * tokens : (i + 1) * tokens]) for i in range(batch)]
        if self.text[0] == getattr(self.tokenizer, "bos_token_id", None):
            for piece in pieces:
                piece[0] = self.text[0]
        return pieces


@dataclass
class Row:
    """One shape and method. What was not measured is None, and ``reason`` says why.

    Attributes:
        batch, prefix, generated: sequences, tokens of each one's context, and timed steps.
        status: "ok", "out of memory" or "failed".
        reason: also where steps could not be compiled or captured, and are slower for it.
        ttft_s: from handing over all prompts to a sequence's first token, mean over sequences; None for noise.
        step_ms: median time of a step of the whole batch: of a step of the engine, sampling included, where prompts
            were read, otherwise of the model's step alone.
        ms_per_token: of that for each sequence.
        tokens_per_s: of the whole batch.
        dense_floor_ms: time to read weights and, whatever the method, all keys and values once, at the speed of a copy.
        dense_floor_share: of the step's time; a sparse method may come to more than 1.
        speedup: over the dense row of the same shape.
        kept_fraction: share of the cached keys that counted steps read, mean over sequences.
        peak_gib: memory at most, weights included; None on a CPU.
        output: of the first sequence, if asked for: text, or token ids for random weights.
    """

    batch: int
    prefix: int
    generated: int
    method: str
    status: str = "ok"
    reason: str | None = None
    ttft_s: float | None = None
    step_ms: float | None = None
    ms_per_token: float | None = None
    tokens_per_s: float | None = None
    dense_floor_ms: float | None = None
    dense_floor_share: float | None = None
    speedup: float | None = None
    kept_fraction: float | None = None
    peak_gib: float | None = None
    output: str | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.prefix, self.generated)


class Timed(NamedTuple):
    """What a run gave: times of steps in ms, the first sequence's tokens, and figures of each sequence."""

    times: list[float]
    tokens: list[int]
    kept: list[float | None]
    ttft: list[float]


def measure(
    subject: Subject, setup: Setup, shapes: Sequence[Shape], methods: Sequence[Any], start: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of every shape, the dense one first; what fails is a row with its reason, and the others go on.

    A batch of 0 stands for the largest whose keys, values and side data fit, with the method that needs most.
    """
    runs = [DENSE, *(m for m in methods if m != DENSE)]
    for shape in shapes:
        dense_ms: float | None = None
        if not shape.batch:
            shape = shape._replace(batch=most_sequences(subject.model, setup, shape, runs))
        for method in runs:
            row = Row(*shape, describe(method))
            start(f"{shape}, {row.method}")
            try:
                if not shape.batch:
                    raise torch.OutOfMemoryError("not even one sequence fits")
                _measure(row, subject, setup, method)
                dense_ms = row.step_ms if method == DENSE else dense_ms
                if dense_ms and row.step_ms:
                    row.speedup = dense_ms / row.step_ms
            except Exception as error:  # kernels fail in many ways, and one row must not end the others
                row.status, row.reason = failure(error)
            let_go(subject.model.device)
            yield row


def rows_needed(shape: Shape, read: bool) -> int:
    """Rows that the longest sequence of a batch comes to, those of untimed steps included."""
    if not read:
        return shape.prefix + 1 + WARMUP + shape.generated
    return shape.prefix + _new_tokens(shape, 0)


def _new_tokens(shape: Shape, i: int) -> int:
    """Tokens that sequence ``i`` of prompts that are read has to get, so that all end at once: the step that reads
    the end of the last prompt gives two, and earlier ones get one a step while later prompts are read."""
    return shape.generated + 2 + -(-shape.prefix // CHUNK) * (max(1, shape.batch) - 1 - i)


def most_sequences(model: Any, setup: Setup, shape: Shape, methods: Sequence[Any]) -> int:
    """Sequences of a shape that the memory of a GPU has room for; 1 on a CPU."""

    def most(new: int) -> int:
        return least(steps.most_sequences(model, steps.Setup(new, setup.page, setup.seed), shape.prefix, methods))

    batch = most(shape.generated)
    if not setup.read or batch < 2:
        return batch
    return most(_new_tokens(shape._replace(batch=batch), 0))  # the more sequences, the longer the first one gets


# ---- a row ----------------------------------------------------------------------------------------------------------


def _measure(row: Row, subject: Subject, setup: Setup, method: Any) -> None:
    device = subject.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _engine(row.shape, subject, setup, method) as llm:
        timed = _read(row.shape, llm, subject, setup) if setup.read else _noise(row.shape, llm, method, setup)
        row_bytes = sum(shape.row_bytes for shape in llm.served.shapes)
        if device.type == "cuda" and not (llm.served.graphed and llm.served.compiled):
            row.reason = "a step could not be compiled or captured, and is slower: the log says why"
    row.step_ms = statistics.median(timed.times)
    row.ms_per_token, row.tokens_per_s = row.step_ms / row.batch, row.batch * 1e3 / row.step_ms
    if setup.copy_gb_s is not None:
        row.dense_floor_ms = dense_floor_ms(subject.model, row_bytes, row.shape, setup.copy_gb_s)
        row.dense_floor_share = row.dense_floor_ms / row.step_ms
    row.ttft_s = statistics.mean(timed.ttft) if timed.ttft else None
    known = [kept for kept in timed.kept if kept is not None]
    row.kept_fraction = statistics.mean(known) if known else None
    if device.type == "cuda":
        row.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
    if setup.outputs:
        row.output = str(timed.tokens) if subject.tokenizer is None else subject.tokenizer.decode(timed.tokens)


def _engine(shape: Shape, subject: Subject, setup: Setup, method: Any) -> LLM:
    """An engine with room for all sequences of a shape at once.

    Raises:
        OutOfMemoryError: it has not; says for how many.
    """
    device, rows = subject.model.device, rows_needed(shape, setup.read)
    try:
        llm = LLM(
            subject.model,
            prefill=setup.prefill,
            decode=method,
            tokenizer=subject.tokenizer,
            max_batch=shape.batch,
            max_length=rows,
            kv_memory=max(0, free_device_bytes(device)) if device.type == "cuda" else None,
            page=setup.page,
            tensor_parallel=setup.tensor_parallel,
            prefill_chunk=CHUNK if setup.read else None,
            seed=setup.seed,
        )
    except ValueError as error:
        if str(error).startswith(f"max_length={rows}:"):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
    fit = (llm.slots.pages - 1) // -(-rows // setup.page)
    if fit < shape.batch:
        llm.close()
        raise torch.OutOfMemoryError(f"{fit} of {shape.batch} sequences of {rows:,} tokens fit")
    return llm


def _noise(shape: Shape, llm: LLM, method: Any, setup: Setup) -> Timed:
    """Steps over contexts of noise."""
    served, on_gpu, times, tokens = llm.served, llm.model.device.type == "cuda", [], []
    rows = rows_needed(shape, read=False)
    steps.fill(llm.model, llm.slots, served.stores, shape.prefix, rows, method, setup.seed)
    for slot in range(shape.batch):
        served.meter.begin(slot)
        served.activate(slot, 0)
    served.step(metered=True)
    for _ in range(WARMUP + shape.generated):
        times.append(timed_ms(lambda: served.step(metered=not on_gpu), on_gpu))
        tokens.append(served.ids[0, 0].clone())
    kept = [served.meter.totals(slot).stats().kept_fraction for slot in range(shape.batch)]
    return Timed(times[WARMUP:], torch.stack(tokens[WARMUP:]).tolist(), kept, [])


def _read(shape: Shape, llm: LLM, subject: Subject, setup: Setup) -> Timed:
    """Prompts read one after another, and the engine's steps once all are.

    The first prompt is read before, and a few tokens generated, untimed: kernels are compiled, the step is captured.
    On a GPU few steps are counted, and the first of all is: where none of the timed ones is, it stands for them.
    """
    prompts = subject.prompts(shape.batch, shape.prefix, setup.seed)
    first = llm.generate([prompts[0]], SamplingParams(max_new_tokens=WARMUP, ignore_eos=True))[0]
    begun: set[int] = set()

    def note(delta: Delta) -> None:
        begun.add(delta.index)

    for i, prompt in enumerate(prompts):
        llm.submit(prompt, SamplingParams(max_new_tokens=_new_tokens(shape, i), ignore_eos=True), note)
    done: list[RequestOutput] = []
    times = []
    while llm.unfinished:
        all_read = len(begun) == shape.batch
        ms = timed_ms(lambda: done.extend(llm.step()), llm.model.device.type == "cuda")
        if all_read:
            times.append(ms)
    done.sort(key=lambda out: out.index)
    kept = [out.stats.kept_fraction for out in done]
    ttft = [out.stats.ttft_s for out in done if out.stats.ttft_s is not None]
    return Timed(times, done[0].token_ids, kept if any(kept) else [first.stats.kept_fraction], ttft)


# ---- what a step could take at least --------------------------------------------------------------------------------


def copy_gb_s(device: torch.device) -> float:
    """At how many GB/s (1e9 bytes, read and written) a device copies a large tensor; the median of several times."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    to = torch.empty_like(source)

    def copy() -> None:
        to.copy_(source)

    times = [timed_ms(copy, device.type == "cuda") for _ in range(1 + COPIES)][1:]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def weight_bytes(model: Any) -> int:
    """Bytes of all weights that a step reads: a table of embeddings, if it serves nothing else, is not among them."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    total = sum(x.nbytes for x in model.parameters())
    return total if head is not None and head.weight is table else total - table.nbytes


def dense_floor_ms(model: Any, row_bytes: int, shape: Shape, rate_gb_s: float) -> float:
    """Time to read a model's weights once, and keys and values (``row_bytes`` a token) of contexts as long as they are
    on average over the generation."""
    context = shape.prefix + shape.generated / 2
    return (weight_bytes(model) + shape.batch * context * row_bytes) / rate_gb_s / 1e6
