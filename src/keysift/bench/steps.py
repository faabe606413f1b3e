"""How fast a whole model decodes: greedy steps of a batch over long contexts, dense and by methods, in one loop.

Contexts are filled with noise instead of being read from a prompt: a step takes as long over these as over a text, as
long as the method's budget does not depend on what it finds. On a GPU every step is a replay of one CUDA graph.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keysift.bench.layers import Shape
from keysift.bench.prefill import failure
from keysift.cache import Store
from keysift.hf import attach
from keysift.hf.paged import PagedCache, StepGraph
from keysift.hf.parallel import ranks_here
from keysift.methods import dense, describe
from keysift.offload import free_device_bytes
from keysift.slots import Slots, check_page
from keysift.types import Ctx, check_seed

DENSE = dense.Method()
WARMUP = 3
CHECKED = 4  # steps that a graph must give the tokens of eager ones for
SPARE_BYTES = 4 << 30  # left free for what a step computes, and for what CUDA graphs keep of it


@dataclass(frozen=True)
class Setup:
    """What is measured, apart from shapes and methods.

    Attributes:
        steps: timed steps, of which the median counts.
        page: rows a page of the cache.
        seed: of the noise, and of methods that draw.
    """

    steps: int = 30
    page: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: choose 1 or more")
        check_page(self.page)


@dataclass
class Row:
    """One shape and method. What was not measured is None, and ``reason`` says why.

    Attributes:
        batch, context: sequences, and tokens of each before the first step.
        status: "ok", "wrong" (a graph's tokens are not those of eager steps), "out of memory" or "failed".
        step_ms: median time of a step, all of it.
        tokens_per_s: of the whole batch.
        speedup: over the dense row of the same shape.
        side_share: memory of side data, as a share of that of keys and values.
        peak_gib: memory at most, weights included; None on a CPU.
    """

    batch: int
    context: int
    method: str
    status: str = "ok"
    reason: str | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None
    side_share: float | None = None
    peak_gib: float | None = None


def measure(
    model: Any, setup: Setup, shapes: Sequence[Shape], methods: Sequence[Any], start: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of every shape, the dense one first; what fails is a row with its reason, and the others go on.

    A batch of 0 stands for the largest whose keys, values and side data fit, with the method that needs most.
    """
    runs = [DENSE, *(m for m in methods if m != DENSE)]
    for shape in shapes:
        baseline: Row | None = None
        if not shape.batch:
            shape = Shape(most_sequences(model, setup, shape.context, runs), shape.context)
        for method in runs:
            row = Row(*shape, describe(method))
            start(f"{shape}, {row.method}")
            try:
                if not shape.batch:
                    raise torch.OutOfMemoryError("not even one sequence fits")
                _fill(row, model, setup, method)
                baseline = row if method == DENSE else baseline
                if baseline is not None and baseline.step_ms and row.step_ms:
                    row.speedup = baseline.step_ms / row.step_ms
            except Exception as error:  # kernels fail in many ways, and one row must not end the others
                row.status, row.reason = failure(error)
            let_go(model.device)
            yield row


def let_go(device: torch.device) -> None:
    """Have the memory of caches that nobody has any more back."""
    gc.collect()  # slots and their stores know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def most_sequences(model: Any, setup: Setup, context: int, methods: Sequence[Any]) -> int:
    """Sequences of a context that the memory of a GPU has room for; 1 on a CPU."""
    if model.device.type != "cuda":
        return 1
    free = free_device_bytes(model.device) - SPARE_BYTES
    one = PagedCache(model, Slots(1, setup.page, 1, 2, model.device))
    pages = -(-rows_needed(setup, context) // setup.page)
    kept = sum(x[0].numel() * x.element_size() for store in one.stores for x in (store.k, store.v) if x is not None)
    return int(max(0, free) // (pages * kept * (1 + max(_side_share(method, one.stores[0]) for method in methods))))


def _side_share(method: Any, store: Any) -> float:
    k, v = store.k, store.v
    sides = method.sides(k.shape[3], k.dtype).values()
    entries = sum(torch.Size(s.shape).numel() * s.dtype.itemsize * -(-k.shape[1] // s.unit) for s in sides)
    return float(entries) * k.shape[2] / sum(x[0].numel() * x.element_size() for x in (k, v))


def rows_needed(setup: Setup, context: int) -> int:
    return context + WARMUP + setup.steps + 2 * CHECKED


def _fill(row: Row, model: Any, setup: Setup, method: Any) -> None:
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    with attach(model, decode=method, seed=setup.seed), torch.inference_mode():
        cache = filled(model, setup, row.batch, row.context, method)
        row.side_share = _side_share(method, cache.stores[0])
        graph = StepGraph(model, cache, rows_needed(setup, row.context))
        if on_gpu and not _as_eager(graph):
            row.status, row.reason = "wrong", "a replayed step gives other tokens than an eager one"
            return
        times = [timed_ms(graph.step, on_gpu) for _ in range(WARMUP + setup.steps)][WARMUP:]
    row.step_ms = statistics.median(times)
    row.tokens_per_s = row.batch * 1e3 / row.step_ms
    if on_gpu:
        row.peak_gib = torch.cuda.max_memory_allocated(model.device) / 2**30


def filled(model: Any, setup: Setup, batch: int, context: int, method: Any) -> PagedCache:
    """A cache whose slots hold ``context`` rows of noise, with the method's side data."""
    pages = -(-rows_needed(setup, context) // setup.page)
    slots = Slots(batch, setup.page, pages, batch * pages + 1, model.device)
    cache = PagedCache(model, slots)
    fill(model, slots, cache.stores, context, rows_needed(setup, context), method, setup.seed)
    return cache


def fill(model: Any, slots: Slots, stores: Sequence[Store], context: int, rows: int, method: Any, seed: int) -> None:
    """Have all slots hold ``context`` rows of noise, with the method's side data, and room for ``rows``."""
    noise = torch.Generator(model.device).manual_seed(seed)
    for slot in range(len(slots)):
        slots.reserve(slot, rows)
    slots.append(context)
    for slot in range(len(slots)):
        slots.end_prompt(slot)
    heads = model.config.get_text_config(decoder=True).num_attention_heads // ranks_here()
    for layer, store in enumerate(stores):
        assert store.k is not None and store.v is not None
        store.k.normal_(generator=noise)
        store.v.normal_(generator=noise)
        if layer not in method.dense_layers and method != DENSE:
            tail = len(slots), max(1, method.tail), heads, store.k.shape[3]
            q = torch.randn(tail, generator=noise, device=model.device).to(model.dtype)
            store.begin(method, q, Ctx(layer, store.k.shape[3] ** -0.5, slots.positions, seed))


def _as_eager(graph: StepGraph) -> bool:
    """Whether replays give the tokens that eager steps give from the same state, which is left as it was."""
    slots, first, found = graph.cache.slots, graph.ids.clone(), []
    lengths = list(slots.lengths)
    for step in (graph.step, graph.eager_step):
        graph.ids.copy_(first)
        tokens = []
        for _ in range(CHECKED):
            step()
            tokens.append(graph.ids.clone())
        found.append(torch.cat(tokens, 1))
        for slot, length in enumerate(lengths):
            slots.truncate(slot, length)
    graph.ids.copy_(first)
    return bool(torch.equal(*found))


def timed_ms(step: Callable[[], None], on_gpu: bool) -> float:
    if not on_gpu:
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    step()
    marks[1].record()
    marks[1].synchronize()
    return float(marks[0].elapsed_time(marks[1]))
