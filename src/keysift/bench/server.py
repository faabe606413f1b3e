"""A server that ``bench.serve`` measures, in its own process: vLLM, requests, and what a structured prompt has read."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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
from keysift.bench.serve import WARM_UP_TOKENS, Row, Setup, longest
from keysift.eval import ruler
from keysift.eval.data import Data
from keysift.functional import NO_LAYER
from keysift.methods import dense, parse
from keysift.types import KV, BlockMask, Ctx
from keysift.vllm_plugin.options import SECTION


class StructuredPrompt:
    """A prefill method that does all the work of another, and reads what that finds in a structured prompt."""

    def __init__(
        self, inner: Any, tokens: int, chunk: int, heads: tuple[int, int, int], device: Any, seed: int
    ) -> None:
        """Search a prompt of ``tokens`` tokens in chunks of whole blocks, about ``chunk`` tokens each; ``heads`` are
        query heads, KV heads and head dim."""
        chunk = max(inner.block, chunk // inner.block * inner.block)
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
        self.inner = inner
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
        length = longest(loads)
        if setup.shape is not None:
            (folder / "config.json").write_text(json.dumps(_config(setup, length)))
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
            model=setup.model_name or str(folder),
            dtype=setup.dtype,
            max_model_len=length,
            max_num_batched_tokens=setup.chunk,
            max_num_seqs=max(load.batch for load in loads),
            enable_prefix_caching=False,
            enforce_eager=setup.eager,
            seed=setup.seed,
            **options,
        )
        self.params, self.start_s = SamplingParams, time.perf_counter() - began
        self.asked: set[str] = set()  # requests that were ever
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def run(self, load: Shape, seed: int, rate: float | None = None) -> dict[str, float]:
        """Serve requests that arrive together or at a rate; times as ``Row`` has them."""
        engine, (requests, prompt, new) = self.llm.llm_engine, load
        random = torch.Generator().manual_seed(seed)
        params = self.params(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = torch.randint(self.vocabulary, (requests, prompt), generator=random).tolist()
        arrivals = arrival_times(requests, rate, random)
        counts: dict[int, int] = {}
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        marks: list[tuple[float, int, bool]] = []  # after each step: when, tokens so far, whether all are at work
        arrived, began = 0, time.perf_counter()
        while arrived < requests or engine.has_unfinished_requests():
            while arrived < requests and arrivals[arrived] <= time.perf_counter() - began:
                self._ask(arrived, prompts[arrived], params)
                arrived += 1
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, arrivals[arrived] - (time.perf_counter() - began)))
                continue
            for out in engine.step():
                number, now = int(out.request_id), time.perf_counter() - began
                counts[number] = len(out.outputs[0].token_ids)
                first.setdefault(number, now)
                if out.finished:
                    last[number] = now
            marks.append((time.perf_counter() - began, sum(counts.values()), len(first) == requests and not last))
        assert all(counts[i] == new for i in range(requests)), "a request has lost tokens"
        waits = sorted(first[i] - arrivals[i] for i in range(requests))
        times = {
            "first_token_s": statistics.mean(waits),
            "first_token_90_s": waits[-(-9 * requests // 10) - 1],
            "last_first_token_s": waits[-1],
            "total_tokens_per_s": requests * new / marks[-1][0],
        }
        if new > 1:
            times["token_ms"] = statistics.mean(last[i] - first[i] for i in range(requests)) / (new - 1) * 1e3
        full = [(at, tokens) for at, tokens, busy in marks if busy][1:]  # the step that gave the last first token aside
        if len(full) > 1 and full[-1][1] > full[0][1]:
            seconds, tokens = full[-1][0] - full[0][0], full[-1][1] - full[0][1]
            times |= {"tokens_per_s": tokens / seconds, "step_ms": seconds / (tokens / requests) * 1e3}
        return times

    def right(self, samples: int, length: int, seed: int) -> float:
        """The share of answers that is right, to so many samples of each task of RULER's that needs no file."""
        tokenizer = self.llm.get_tokenizer()
        made = [
            ruler.make_sample(task, length, index, tokenizer, Data(), seed=seed)
            for task in ruler.OFFLINE
            for index in range(samples)
        ]
        for number, sample in enumerate(made):
            params = self.params(temperature=0.0, max_tokens=sample.new_tokens)
            self._ask(number, list(sample.ids), params)
        texts: dict[int, str] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            texts |= {int(out.request_id): out.outputs[0].text for out in self.llm.llm_engine.step()}
        return statistics.mean(ruler.grade(s.task, texts[i], s.outputs) for i, s in enumerate(made))

    def _ask(self, number: int, ids: list[int], params: Any) -> None:
        self.llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        self.asked.add(str(number))

    def let_go(self) -> None:
        """End what is left of the requests."""
        self.llm.llm_engine.abort_request(list(self.asked))

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


def arrival_times(requests: int, rate: float | None, random: torch.Generator) -> list[float]:
    """When requests arrive, in seconds after the first: at a rate, independently of each other (Poisson), or together.

    The same draws serve all rates.
    """
    if rate is None:
        return [0.0] * requests
    gaps = -(1 - torch.rand(requests, dtype=torch.float64, generator=random)).log() / rate
    return [0.0, *gaps.cumsum(0)[:-1].tolist()]


def _config(setup: Setup, length: int) -> dict[str, Any]:
    """Of a decoder of the shape, as a model's folder has it."""
    return SHAPES[str(setup.shape)] | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": length,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": setup.dtype,
    }


def serve_here(job: dict[str, Any]) -> None:
    """Measure one server in this process, a line of JSON a row."""
    setup, loads, methods = Setup(**job["setup"]), [Shape(*load) for load in job["loads"]], job["methods"]
    prefill = dense.Method() if methods is None else parse(methods[0], "prefill")
    structured = prefill if setup.shape is not None and prefill != dense.Method() else None
    out = Path(job["out"])
    engine = Engine(setup, loads, methods, out.parent)
    with out.open("a") as file:
        for load in loads:
            for row in _of_load(engine, load, setup, job["name"], structured):
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()


def _of_load(engine: Engine, load: Shape, setup: Setup, name: str, structured: Any) -> Iterator[Row]:
    """A row a rate; ``structured`` is the method that finds what to read in a structured prompt, or None."""
    masks = "own" if structured is None else "structured"
    rows = [Row(*load, name, rate, masks, start_s=engine.start_s) for rate in setup.rates]
    with _failing(rows, engine):
        if structured is not None:
            # a request that vLLM has put off reads what was answered again, as a part of its prompt
            engine.read_structured(structured, longest([load]), setup)
        engine.run(load._replace(generated=WARM_UP_TOKENS), setup.seed + 1)
        if setup.samples:
            right = engine.right(setup.samples, load.prefix, setup.seed)
            for row in rows:
                row.right = right
    for row in rows:
        if row.status == "ok":
            with _failing([row], engine):
                for key, value in engine.run(load, setup.seed, row.rate).items():
                    setattr(row, key, value)
        yield row


@contextmanager
def _failing(rows: Sequence[Row], engine: Engine) -> Iterator[None]:
    """What fails within is these rows' failure: kernels fail in many ways, and one row must not end the others."""
    try:
        yield
    except Exception as error:
        for row in rows:
            row.status, row.reason = failure(error)
        engine.let_go()


if __name__ == "__main__":
    serve_here(json.loads(sys.argv[1]))
