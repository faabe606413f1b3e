"""vLLM with our attention beside vLLM alone: requests that arrive together, their first tokens, and tokens a second.

Each server is a process of its own, one after the other, that reads the same prompts in the same chunks. With random
weights the search of a prefill method runs on the model's own queries and keys, and attention gets the lists of a
structured prompt of the same shape, found before the clock starts, as in ``bench.first_token``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from keysift.attention import list_ranges
from keysift.bench.first_token import ROPE_THETA, SHAPES
from keysift.bench.generate import Shape
from keysift.bench.inputs import structured_qkv
from keysift.bench.prefill import failure
from keysift.functional import NO_LAYER
from keysift.methods import dense, describe, parse
from keysift.types import KV, BlockMask, Ctx, check_seed
from keysift.vllm_plugin.options import SECTION, Options

STOCK = "vLLM alone"
ERRORS = 2000  # characters of what a server said last, if it fails
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Setup:
    """What servers have in common.

    Attributes:
        shape: name of a shape of random weights in ``SHAPES``, or None.
        model: folder of a model, or None.
        dtype: of weights, keys and values.
        chunk: tokens that a step of the server reads at most.
        memory: share of the GPU's memory, or on a CPU GiB of keys and values.
        seed: of prompts and of methods that draw.
        eager: without compilation and CUDA graphs.
    """

    shape: str | None
    model: str | None
    dtype: str = "bfloat16"
    chunk: int = 16384
    memory: float = 0.9
    seed: int = 0
    eager: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.chunk < 16:
            raise ValueError(f"chunk={self.chunk}: choose 16 or more")


@dataclass
class Row:
    """One load on one server. What was not measured is None, and ``reason`` says why.

    Attributes:
        requests, prompt, new: requests that arrive together, tokens of each prompt and of each answer.
        method: "vLLM alone", or the methods.
        masks: where the prefill method's lists come from: "own" queries and keys, or "structured" ones.
        status: "ok" or "failed".
        first_token_s, last_first_token_s: from the arrival to the first token of a request, on average and at most.
        step_ms: a step when all requests have their first token and none has ended, on average.
        tokens_per_s: in such steps.
        total_tokens_per_s: tokens of all answers over the time from the arrival to the last.
        earlier, faster, more: how many times vLLM alone takes so long to the average first token, and for a step, and
            how many times more tokens a second there are in all.
        start_s: until the server was ready.
    """

    requests: int
    prompt: int
    new: int
    method: str
    masks: str = "own"
    status: str = "ok"
    reason: str | None = None
    first_token_s: float | None = None
    last_first_token_s: float | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    earlier: float | None = None
    faster: float | None = None
    more: float | None = None
    start_s: float | None = None

    @property
    def shape(self) -> str:
        """The load, as one writes it."""
        return f"{self.requests}x{self.prompt}x{self.new}"


def measure(
    setup: Setup, loads: Sequence[Shape], servers: Sequence[Options], start: Callable[[str], None]
) -> Iterator[Row]:
    """Rows of vLLM alone and of each of the servers, all loads on one before the next.

    Args:
        setup: what they have in common.
        loads: requests x tokens of a prompt x tokens of an answer.
        servers: methods, beside vLLM alone.
        start: called with what begins, in words.
    """
    alone: dict[Shape, Row] = {}
    for options in (None, *servers):
        name = STOCK if options is None else f"prefill={describe(options.prefill)};decode={describe(options.decode)}"
        start(name)
        for load, row in zip(loads, _of_server(setup, loads, options, name), strict=True):
            base = alone.setdefault(load, row)
            if base.status == row.status == "ok":
                row.earlier, row.faster = (
                    _ratio(base.first_token_s, row.first_token_s),
                    _ratio(base.step_ms, row.step_ms),
                )
                row.more = _ratio(row.total_tokens_per_s, base.total_tokens_per_s)
            yield row


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _of_server(setup: Setup, loads: Sequence[Shape], options: Options | None, name: str) -> Iterator[Row]:
    """Rows of one server, which a process of its own measures."""
    methods = None if options is None else (describe(options.prefill), describe(options.decode), options.seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        job = {"setup": asdict(setup), "loads": loads, "methods": methods, "folder": folder, "out": str(out)}
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "keysift.bench.serve", json.dumps(job)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
        rows = [Row(**json.loads(line)) for line in out.read_text().splitlines()] if out.exists() else []
    for load, row in zip(loads, rows, strict=False):
        yield row if row.method == name else _failed(load, name, f"another server answered: {row.method}")
    for load in loads[len(rows) :]:
        yield _failed(load, name, done.stdout[-ERRORS:].strip() or f"the server ended with code {done.returncode}")


def _failed(load: Shape, name: str, reason: str) -> Row:
    return Row(*load, name, status="failed", reason=reason)


# ---- in the server's process --------------------------------------------------------------------------------------


class StructuredPrompt:
    """A prefill method that does all the work of another, and reads what that finds in a structured prompt."""

    def __init__(
        self, inner: Any, tokens: int, chunk: int, heads: tuple[int, int, int], device: Any, seed: int
    ) -> None:
        """Search a prompt of ``tokens`` tokens in chunks; ``heads`` are query heads, KV heads and head dim."""
        q, k, v = structured_qkv(tokens, *heads, seed=seed, device=device)
        masks: list[BlockMask] = []
        for lo in range(0, tokens, chunk):
            hi = min(lo + chunk, tokens)
            kv = KV.of(k[:, :hi], v[:, :hi])
            plan = inner.plan(q[:, lo:hi], kv, Ctx(NO_LAYER, heads[2] ** -0.5, kv.length - 1, seed))
            for blocks in list_ranges(range(lo, hi), inner.block, heads[0]):
                masks.append(
                    _all_blocks(blocks, inner.block, heads[0], device) if plan is None else inner.mask(plan, blocks)
                )
        self.inner, self.tokens = inner, tokens
        self.counts = [
            torch.cat(counts, 2) for counts in zip(*((m.partial_count, m.full_count) for m in masks), strict=True)
        ]
        self.lists = [
            _one_width(lists) for lists in zip(*((m.partial_index, m.full_index) for m in masks), strict=True)
        ]

    @property
    def block(self) -> int:
        return int(self.inner.block)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(self.inner.dense_layers)

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Any:
        return self.inner.plan(q_BTHD, kv, ctx)

    def mask(self, plan: Any, blocks: range) -> BlockMask:
        self.inner.mask(plan, blocks)
        (partial_count, full_count), (partial, full) = (
            [x[:, :, blocks.start : blocks.stop].contiguous() for x in kind] for kind in (self.counts, self.lists)
        )
        return BlockMask(partial_count, partial, full_count, full, self.block, blocks.start)

    def density(self) -> float:
        """Share of the blocks on and before the diagonal that are read."""
        blocks = self.counts[0].shape[2]
        return float(sum(x.double().sum() for x in self.counts)) / (self.counts[0].shape[1] * blocks * (blocks + 1) / 2)


def _one_width(lists: Sequence[Tensor]) -> Tensor:
    most = max(x.shape[3] for x in lists)
    return torch.cat([pad(x, (0, most - x.shape[3])) for x in lists], 2)


def _all_blocks(blocks: range, block: int, heads: int, device: Any) -> BlockMask:
    column, row = torch.arange(blocks.stop, device=device), torch.arange(blocks.start, blocks.stop, device=device)
    return BlockMask.of((column <= row[:, None]).expand(1, heads, -1, -1), block, blocks.start)


class Engine:
    """vLLM in this process."""

    def __init__(self, setup: Setup, loads: Sequence[Shape], methods: Sequence[Any] | None, folder: Path) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

        began = time.perf_counter()
        longest = max(load.prefix + load.generated for load in loads) + WARM_UP_TOKENS
        if setup.shape is not None:
            (folder / "config.json").write_text(json.dumps(_config(setup, longest)))
        options: dict[str, Any] = (
            {"load_format": "dummy", "skip_tokenizer_init": True} if setup.shape is not None else {}
        )
        if methods is not None:
            prefill, decode, seed = methods
            section = {"prefill": prefill, "decode": decode, "seed": seed}
            options |= {"attention_backend": "CUSTOM", "additional_config": {SECTION: section}}
        if torch.cuda.is_available():
            options["gpu_memory_utilization"] = setup.memory
        else:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(setup.memory)))
        self.llm = LLM(
            model=str(folder) if setup.model is None else setup.model,
            dtype=setup.dtype,
            max_model_len=longest,
            max_num_batched_tokens=setup.chunk,
            max_num_seqs=max(load.batch for load in loads),
            enable_prefix_caching=False,
            enforce_eager=setup.eager,
            seed=setup.seed,
            **options,
        )
        self.params, self.start_s = SamplingParams, time.perf_counter() - began
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def run(self, load: Shape, seed: int) -> dict[str, float]:
        """Serve requests that arrive together; times as ``Row`` has them."""
        engine, (requests, prompt, new) = self.llm.llm_engine, load
        random = torch.Generator().manual_seed(seed)
        params = self.params(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = torch.randint(self.vocabulary, (requests, prompt), generator=random).tolist()
        began = time.perf_counter()
        for i, ids in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": ids}, params)
        counts: dict[str, int] = {}
        first: dict[str, float] = {}
        marks: list[tuple[float, int, bool]] = []  # after each step: when, tokens so far, whether all are at work
        while engine.has_unfinished_requests():
            ended = False
            for out in engine.step():
                counts[out.request_id] = len(out.outputs[0].token_ids)
                first.setdefault(out.request_id, time.perf_counter() - began)
                ended = ended or out.finished
            busy = len(first) == requests and not ended
            marks.append((time.perf_counter() - began, sum(counts.values()), busy))
        assert all(counts[str(i)] == new for i in range(requests)), "a request has lost tokens"
        full = [(at, tokens) for at, tokens, busy in marks if busy][1:]  # the step that gave the last first token aside
        times = {
            "first_token_s": sum(first.values()) / requests,
            "last_first_token_s": max(first.values()),
            "total_tokens_per_s": requests * new / marks[-1][0],
        }
        if len(full) > 1 and full[-1][1] > full[0][1]:
            seconds, tokens = full[-1][0] - full[0][0], full[-1][1] - full[0][1]
            times |= {"tokens_per_s": tokens / seconds, "step_ms": seconds / (tokens / requests) * 1e3}
        return times

    def let_go(self, load: Shape) -> None:
        """End what is left of a load's requests."""
        self.llm.llm_engine.abort_request([str(i) for i in range(load.batch)])

    def read_structured(self, prefill: Any, tokens: int, setup: Setup) -> None:
        """Have all layers read what ``prefill`` finds in a structured prompt of so many tokens."""
        config = SHAPES[str(setup.shape)]
        heads = (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        structured = StructuredPrompt(prefill, tokens, setup.chunk, heads, device, setup.seed)

        def install(worker: Any) -> None:
            for layer in worker.vllm_config.compilation_config.static_forward_context.values():
                layer.impl.attention(layer).prefill = structured

        self.llm.collective_rpc(install)


def _config(setup: Setup, longest: int) -> dict[str, Any]:
    """Of a decoder of the shape, as a model's folder has it."""
    return SHAPES[str(setup.shape)] | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": longest,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": setup.dtype,
    }


def serve_here(job: dict[str, Any]) -> None:
    """Measure one server in this process, a line of JSON a row; its name is that of its methods."""
    setup, loads, methods = Setup(**job["setup"]), [Shape(*load) for load in job["loads"]], job["methods"]
    name = STOCK if methods is None else f"prefill={methods[0]};decode={methods[1]}"
    prefill = dense.Method() if methods is None else parse(methods[0], "prefill")
    structured = setup.shape is not None and prefill != dense.Method()
    engine = Engine(setup, loads, methods, Path(job["folder"]))
    with Path(job["out"]).open("a") as file:
        for load in loads:
            row = Row(*load, name, "structured" if structured else "own", start_s=engine.start_s)
            try:
                if structured:
                    engine.read_structured(prefill, load.prefix, setup)
                engine.run(load._replace(generated=WARM_UP_TOKENS), setup.seed + 1)
                for key, value in engine.run(load, setup.seed).items():
                    setattr(row, key, value)
            except Exception as error:  # kernels fail in many ways, and one row must not end the others
                row.status, row.reason = failure(error)
                engine.let_go(load)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


if __name__ == "__main__":
    serve_here(json.loads(sys.argv[1]))
