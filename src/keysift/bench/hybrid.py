"""How fast a model decodes when its keys and values are in host memory, beside what the GPU alone could do.

As ``bench.steps``: contexts are noise, filled in through the path that a prompt takes, and a step takes as long over
them as over a text. The GPU's memory can be capped, to stand for a smaller one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keysift.bench import steps
from keysift.bench.layers import Shape
from keysift.bench.prefill import failure
from keysift.cache import rows_with_room
from keysift.hf import HybridSteps, KVCache, attach
from keysift.hf.cache import OffloadedLayer, adopt
from keysift.hf.hybrid import EAGER_STEPS, Span
from keysift.hf.paged import kv_shape
from keysift.methods import describe
from keysift.offload import SELECT_DEVICES, HostMemory, HostTier, free_bytes
from keysift.types import Ctx, check_seed, one_of

CHECKED = 3  # steps in graphs that must give the tokens of eager ones
TRACED = 4  # steps of the trace
HOST_SHARE = 0.85  # of the free host memory is filled where the batch is as large as fits
PROBE_BYTES = 512 << 20  # copied to the GPU to see how fast that is
PROBES = 5


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        method: decode method, whose rows are on the host.
        context: tokens of each sequence before the first step.
        batch: sequences; 0 for as many as the host's memory holds.
        steps: timed steps.
        batches: parts of the batch that are in flight at once.
        gpu_memory, host_memory: bytes that may be used; None for what there is.
        select_device: see ``keysift.attach``.
        seed: of the noise, and of methods that draw.
    """

    method: Any
    context: int
    batch: int = 0
    steps: int = 20
    batches: int = 2
    gpu_memory: int | None = None
    host_memory: int | None = None
    select_device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        one_of("select_device", self.select_device, SELECT_DEVICES)
        for name, least in (("context", 1), ("batch", 0), ("steps", 1), ("batches", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more")

    @property
    def room(self) -> int:
        """Steps that a cache must have room for."""
        return EAGER_STEPS + CHECKED + self.steps + TRACED


@dataclass
class Row:
    """One way to decode. What was not measured is None, and ``reason`` says why.

    Attributes:
        method: the method over host memory; "dense" on the GPU alone; or dense with layers brought over one by one.
        status: "ok", "wrong" (steps in graphs give other tokens than eager ones), "out of memory" or "failed".
        selects_on: where the method's side data were.
        step_ms: mean time of a step of the whole batch.
        tokens_per_s: of the whole batch.
        host_gib, gpu_gib: keys, values and side data on the host, and the GPU's memory at most, weights included.
        fill_s: time to make side data and to copy all rows to the host.
        gpu_busy, cpu_busy: share of the traced time in which the side was at work.
    """

    batch: int
    context: int
    method: str
    status: str = "ok"
    reason: str | None = None
    selects_on: str | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    host_gib: float | None = None
    gpu_gib: float | None = None
    fill_s: float | None = None
    gpu_busy: float | None = None
    cpu_busy: float | None = None


@dataclass
class Traced:
    """Where the spans of the measured method are left, for a picture."""

    spans: list[Span] = field(default_factory=list)


def measure(model: Any, setup: Setup, traced: Traced, start: Callable[[str], None]) -> Iterator[Row]:
    """The rows: the method over host memory, dense on the GPU alone, and dense with layers brought over one by one."""
    with _capped(model.device, setup.gpu_memory):
        batch = setup.batch or most_sequences(model, setup)
        row = Row(batch, setup.context, f"{describe(setup.method)} over host memory")
        start(f"{batch}x{setup.context} {row.method}")
        try:
            if not batch:
                raise MemoryError("not even one sequence fits into the host's memory")
            _measure_hybrid(row, model, setup, traced)
        except Exception as error:  # it fails in many ways, and one row must not end the others
            row.status, row.reason = failure(error)
        steps.let_go(model.device)
        yield row
        if model.device.type == "cuda":
            yield from _dense(model, setup, start)
            yield _layer_by_layer(model, setup, max(1, batch))


def most_sequences(model: Any, setup: Setup) -> int:
    """Sequences whose rows and side data the host's memory holds."""
    free = HOST_SHARE * free_bytes() if setup.host_memory is None else setup.host_memory
    config = model.config.get_text_config(decoder=True)
    layers = sum(i not in setup.method.dense_layers for i in range(config.num_hidden_layers))
    kv_heads, dim = kv_shape(config)
    row = 2 * dim * model.dtype.itemsize
    row += sum(side.token_bytes for side in setup.method.sides(dim, model.dtype).values())
    rows = max(rows_with_room(0, setup.context), setup.context + setup.room)
    return int(free // (layers * rows * kv_heads * row))


@contextmanager
def _capped(device: torch.device, limit: int | None) -> Iterator[None]:
    """Let torch take no more of a GPU's memory than a smaller one would have.

    Raises:
        ValueError: the GPU has less, or what it holds already is more.
    """
    if device.type != "cuda" or limit is None:
        yield
        return
    total, held = torch.cuda.mem_get_info(device)[1], torch.cuda.memory_allocated(device)
    if not held < limit <= total:
        raise ValueError(
            f"gpu_memory of {limit / 2**30:.1f} GiB: the GPU has {total / 2**30:.1f}, and the model takes"
            f" {held / 2**30:.1f}"
        )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# ---- over host memory -----------------------------------------------------------------------------------------------


def _measure_hybrid(row: Row, model: Any, setup: Setup, traced: Traced) -> None:
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    memory = HostMemory(setup.host_memory)
    limit, select = memory.limit, setup.select_device
    link = attach(model, decode=setup.method, seed=setup.seed, kv_device="cpu", host_memory=limit, select_device=select)
    with link, torch.inference_mode():
        begin = time.perf_counter()
        batches = filled(model, setup, row.batch, memory)
        row.fill_s = time.perf_counter() - begin
        row.selects_on, row.host_gib = _where(batches)
        run = HybridSteps(model, batches, setup.room)
        if not _as_eager(run):
            row.status, row.reason = "wrong", "steps in graphs give other tokens than eager steps"
            return
        begin = time.perf_counter()
        run.run(setup.steps)
        row.step_ms = (time.perf_counter() - begin) * 1e3 / setup.steps
        if on_gpu:
            traced.spans = run.traced(TRACED)
            row.gpu_busy, row.cpu_busy = busy(traced.spans)
    row.tokens_per_s = row.batch * 1e3 / row.step_ms
    if on_gpu:
        row.gpu_gib = torch.cuda.max_memory_allocated(model.device) / 2**30


def filled(model: Any, setup: Setup, batch: int, memory: HostMemory) -> list[tuple[KVCache, Tensor]]:
    """Caches of noise for the parts of a batch, and tokens to begin with; the model is attached."""
    config = model.config.get_text_config(decoder=True)
    kv_heads, dim = kv_shape(config)
    noise = torch.Generator(model.device).manual_seed(setup.seed)
    parts = [batch // setup.batches + (i < batch % setup.batches) for i in range(setup.batches)]
    made = []
    for part in filter(None, parts):
        cache = KVCache(model.config)
        adopt(cache, HostTier(setup.method, memory, setup.select_device))
        layers: list[Any] = cache.layers  # ours, by now
        for i, layer in enumerate(layers):
            size = part, kv_heads, setup.context, dim
            k, v = (
                torch.empty(size, dtype=model.dtype, device=model.device).normal_(generator=noise) for _ in range(2)
            )
            layer.update(k, v)
            del k, v  # its copy goes to the host
            tail = 1, config.num_attention_heads, dim
            q = torch.randn(part, *tail, generator=noise, device=model.device).to(model.dtype)
            ctx = Ctx(i, dim**-0.5, torch.full((part,), setup.context - 1, device=model.device), setup.seed)
            if isinstance(layer, OffloadedLayer):
                layer.offloaded.end_prefill(q, ctx)
            else:
                layer.store.end_prefill(q, 0)
        for layer in layers:
            if isinstance(layer, OffloadedLayer):
                layer.offloaded.copier.wait()
        steps.let_go(model.device)
        made.append((cache, torch.zeros(part, 1, dtype=torch.int64, device=model.device)))
    return made


def _where(batches: Sequence[tuple[KVCache, Tensor]]) -> tuple[str | None, float]:
    """Where side data are, and what the host holds in GiB."""
    stores = [x.offloaded for cache, _ in batches for x in cache.layers if isinstance(x, OffloadedLayer)]
    sizes = [
        x.nbytes for store in stores for x in (store.host.k, store.host.v, *store.host._index.values()) if x is not None
    ]
    on_device = {store.side is not None for store in stores}
    where = {frozenset([True]): "gpu", frozenset([False]): "cpu"}.get(frozenset(on_device), "gpu and cpu")
    return (where if stores else None), sum(sizes) / 2**30


def _as_eager(run: HybridSteps) -> bool:
    """Whether steps in graphs give the tokens that eager ones give from the same state."""
    count = EAGER_STEPS + CHECKED
    run.run(count, graphs=False)
    eager = [tokens.clone() for tokens in run.tokens]
    run.take_back(count)
    run.run(count)
    return all(torch.equal(a, b) for a, b in zip(eager, run.tokens, strict=True))


def busy(spans: Sequence[Span]) -> tuple[float, float]:
    """Share of the time from the first span to the end of the last in which the GPU was at work, and the CPU."""
    wall = max(span.end for span in spans) - min(span.start for span in spans)
    shares = []
    for device in ("gpu", "cpu"):
        total, until = 0.0, float("-inf")
        for span in sorted((s for s in spans if s.device == device), key=lambda s: s.start):
            total += max(0.0, span.end - max(span.start, until))
            until = max(until, span.end)
        shares.append(total / wall)
    return shares[0], shares[1]


# ---- beside it ------------------------------------------------------------------------------------------------------


def _dense(model: Any, setup: Setup, start: Callable[[str], None]) -> Iterator[Row]:
    """Dense decode on the GPU, of as many sequences as fit beside the weights."""
    shapes = [Shape(0, setup.context)]
    for found in steps.measure(model, steps.Setup(steps=setup.steps, seed=setup.seed), shapes, [], start):
        yield Row(
            found.batch,
            found.context,
            "dense on the GPU",
            found.status,
            found.reason,
            step_ms=found.step_ms,
            tokens_per_s=found.tokens_per_s,
            gpu_gib=found.peak_gib,
        )


def _layer_by_layer(model: Any, setup: Setup, batch: int) -> Row:
    """The time to bring all keys and values to the GPU once, at the speed measured here: the least that a step takes
    where layers are brought over one by one."""
    config = model.config.get_text_config(decoder=True)
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=model.device)
    times = []
    for _ in range(PROBES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        there.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    rate = PROBE_BYTES / min(times)  # bytes a ms
    kv_heads, dim = kv_shape(config)
    kept = config.num_hidden_layers * kv_heads * 2 * dim * model.dtype.itemsize
    row = Row(batch, setup.context, f"dense, layer by layer over {rate / 1e6:.0f} GB/s")
    row.step_ms = batch * setup.context * kept / rate
    row.tokens_per_s = batch * 1e3 / row.step_ms
    row.host_gib = batch * setup.context * kept / 2**30
    return row
