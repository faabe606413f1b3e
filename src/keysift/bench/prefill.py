"""How long prefill attention takes, by length, method and backend, beside dense attention of the same run.

A speed counts only for a right result: the output is first compared with the fp32 reference under the same block mask,
and with a second run. Search and attention are timed apart, and together through ``attention.prefill``, the path that
models take. In chunked prefill a prompt's queries come a chunk at a time, each with all keys up to its last.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keysift import attention
from keysift.attention import list_ranges
from keysift.bench.inputs import structured_qkv
from keysift.functional import BACKENDS, NO_LAYER
from keysift.meter import Meter
from keysift.methods import dense, describe
from keysift.ops import block_sparse_cpu, fa4
from keysift.ops.block_sparse import Backend, block_sparse_attention, block_sparse_attention_reference
from keysift.ops.coverage import block_mass
from keysift.ops.dense import dense_attention, triton_kernels
from keysift.types import KV, BlockMask, Ctx, Prefill, check_seed, one_of

INPUTS = ("structured", "random")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # |out - reference| / |reference|
MASS_BLOCKS = 16  # query blocks whose covered mass is measured
DENSE = dense.Method()
GPU_SECONDS, CPU_SECONDS = 0.5, 1.0  # so long a part is repeated, unless a number is asked for
Lists = list[BlockMask] | None  # the block lists of a chunk; None where the method reads it densely


@dataclass(frozen=True)
class Setup:
    """What is measured, apart from lengths, methods and backends.

    Attributes:
        heads, kv_heads, dim, batch, dtype, device: of the tensors.
        seed: of the inputs, and of methods that draw.
        inputs: "structured" (see ``bench.inputs``) or "random": normal noise.
        chunk: tokens a chunk of queries; None reads the prompt whole.
        repeats, warmup: runs of each part; None lets them take half a second (on a CPU a second).
        check_rows: query blocks that are compared with the reference, all heads of each; blocks that a chunk or the
            prompt fills only in part come on top, as many at most.
    """

    heads: int
    kv_heads: int
    dim: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    inputs: str = "structured"
    chunk: int | None = None
    repeats: int | None = None
    warmup: int | None = None
    check_rows: int = 8

    def __post_init__(self) -> None:
        one_of("inputs", self.inputs, INPUTS)
        check_seed(self.seed)
        for name in ("heads", "kv_heads", "dim", "batch", "chunk", "repeats", "check_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: choose 1 or more")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: choose 0 or more")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} are not divisible by kv_heads={self.kv_heads}")
        if self.inputs == "structured" and (self.dim % 2 or self.dim < 32):
            raise ValueError(f"dim={self.dim}: structured inputs need an even dim of 32 or more; or --inputs random")
        if self.dtype not in TOLERANCE:
            raise ValueError(f"dtype={self.dtype}: choose float32, bfloat16 or float16")

    @property
    def scale(self) -> float:
        return self.dim**-0.5


@dataclass
class Row:
    """One length, method and backend. What was not measured is None, and ``reason`` says why.

    Attributes:
        method: its SPEC; "dense" is the baseline.
        backend: as asked for.
        kernel: what runs: "fa4", "triton", "cpu" or "sdpa".
        status: "ok", "dense" (the method answers that it reads all), "wrong", "out of memory" or "failed".
        relative_error: of the worst query block and head against the fp32 reference.
        search_ms, attention_ms, total_ms: medians; ``total_ms`` is measured too, and no sum of the others.
        density: share of the causal (query, key) pairs that are read.
        mass_covered, mass_covered_worst_head: attention mass on them, over a sample of query blocks.
        tflops: 1e12 operations a second on the pairs that are read, of the attention alone.
        tflops_of_dense: the same as a share of the dense row's.
        speedup: the dense row's total time over this one's.
        peak_mib: memory that a call takes at most beyond its inputs, its output included; None on a CPU.
    """

    length: int
    method: str
    backend: str
    kernel: str | None = None
    status: str = "ok"
    reason: str | None = None
    relative_error: float | None = None
    search_ms: float | None = None
    attention_ms: float | None = None
    total_ms: float | None = None
    density: float | None = None
    mass_covered: float | None = None
    mass_covered_worst_head: float | None = None
    tflops: float | None = None
    tflops_of_dense: float | None = None
    speedup: float | None = None
    peak_mib: float | None = None


class Chunk(NamedTuple):
    """Queries at ``positions``, and all keys up to the last of them."""

    q: Tensor
    kv: KV
    ctx: Ctx
    positions: range

    def blocks(self, block: int) -> range:
        return range(self.positions.start // block, -(-self.positions.stop // block))


@dataclass
class Work:
    """One method and backend on one prompt, in the parts that are timed."""

    chunks: list[Chunk]
    method: Prefill
    backend: Backend

    def search(self) -> list[Lists]:
        """The block lists of every chunk."""
        found: list[Lists] = []
        for chunk in self.chunks:
            plan = self.method.plan(chunk.q, chunk.kv, chunk.ctx)
            ranges = list_ranges(chunk.positions, self.method.block, math.prod(chunk.q.shape[::2]))
            found.append(None if plan is None else [self.method.mask(plan, r) for r in ranges])
        return found

    def discard_search(self) -> None:
        """The search as a prompt does it, whose lists live for so many blocks at a time."""
        for chunk in self.chunks:
            plan = self.method.plan(chunk.q, chunk.kv, chunk.ctx)
            if plan is not None:
                for blocks in list_ranges(chunk.positions, self.method.block, math.prod(chunk.q.shape[::2])):
                    self.method.mask(plan, blocks)

    def attention(self, lists: list[Lists]) -> Iterator[Tensor]:
        """The output of every chunk over its lists, ``[B, T, H, Dv]``."""
        for chunk, masks in zip(self.chunks, lists, strict=True):
            if masks is None:
                yield dense_attention(chunk.q, chunk.kv, chunk.ctx.scale)
            else:
                parts = [
                    block_sparse_attention(chunk.q, chunk.kv, m, chunk.ctx.scale, backend=self.backend)[0]
                    for m in masks
                ]
                yield parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def total(self) -> Iterator[Tensor]:
        """The output of every chunk, search included."""
        for chunk in self.chunks:
            yield attention.prefill(chunk.q, chunk.kv, self.method, chunk.ctx, Meter(), backend=self.backend)[0]


# ---- what is asked for --------------------------------------------------------------------------------------------


def check_backends(setup: Setup, methods: Sequence[Any], backends: Sequence[str]) -> None:
    """Raise ValueError for the first method that a backend cannot serve on this device."""
    q, k = (
        torch.empty(1, 1, n, setup.dim, dtype=setup.dtype, device=setup.device) for n in (setup.heads, setup.kv_heads)
    )
    for backend in backends:
        one_of("backends", backend, BACKENDS)
        for method in methods:
            if lacks := _lacks(backend, q, KV.of(k, k), method.block, setup.scale):
                raise ValueError(f"backends={backend}: {describe(method)} needs {lacks}")


def _lacks(backend: str, q: Tensor, kv: KV, block: int, scale: float) -> str | None:
    """What keeps a backend from block-sparse attention like this, in words that follow "needs"."""
    if backend == "fa4":
        return fa4.unsupported(q, kv.k, kv.v, scale, block)
    if backend == "triton":
        kernels = triton_kernels()
        return kernels.unsupported(q, kv, block, scale) if kernels else "the package triton; pip install triton"
    return block_sparse_cpu.unsupported(q, kv, block, scale) if backend == "cpu" else None


def _kernel(chunk: Chunk, method: Any, backend: str) -> str:
    """What "auto" means here, for the largest chunk."""
    q, kv, scale = chunk.q, chunk.kv, chunk.ctx.scale
    if backend != "auto" and method != DENSE:
        return backend
    if not q.is_cuda:
        return "sdpa" if method == DENSE or _lacks("cpu", q, kv, method.block, scale) else "cpu"
    if method == DENSE:
        if fa4.unsupported(q, kv.k, kv.v, scale) is None:
            return "fa4"
        in_part = 1 < q.shape[1] < kv.k.shape[1]
        return "triton" if in_part and _lacks("triton", q, kv, method.block, scale) is None else "sdpa"
    return next((b for b in ("fa4", "triton") if _lacks(b, q, kv, method.block, scale) is None), "sdpa")


# ---- measuring ----------------------------------------------------------------------------------------------------


def measure(
    setup: Setup, lengths: Sequence[int], methods: Sequence[Any], backends: Sequence[str], start: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of every length, the dense one first; what fails is a row with its reason, and the others go on.

    Args:
        setup: shapes, device and so on.
        lengths: prompts in tokens.
        methods: method objects for prefill.
        backends: of the block-sparse attention, each measured with every method.
        start: called with what begins, in words.
    """
    runs = [(DENSE, "auto"), *itertools.product((m for m in methods if m != DENSE), backends)]
    for length in lengths:
        with torch.cuda.device(setup.device) if setup.device.type == "cuda" else nullcontext():
            yield from _measure_length(setup, length, runs, start)


def _measure_length(setup: Setup, length: int, runs: Sequence[Any], start: Callable[[str], None]) -> Iterator[Row]:
    chunks: list[Chunk] = []
    baseline = None
    for method, backend in runs:
        row = Row(length, describe(method), backend)
        start(f"{length:,} tokens, {row.method}, {backend}")
        try:
            chunks = chunks or prompt(setup, length)
            row.kernel = _kernel(chunks[-1], method, backend)
            _fill(row, setup, Work(chunks, method, backend), baseline)
        except Exception as error:  # kernels fail in many ways, and one row must not end the others
            row.status, row.reason = failure(error)
        if setup.device.type == "cuda" and row.status == "out of memory":
            torch.cuda.empty_cache()
        baseline = baseline or row
        yield row


def failure(error: Exception) -> tuple[str, str]:
    """A row's status and reason for what was raised."""
    text = next(iter(str(error).strip().splitlines()), "").partition(". ")[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory", text
    return "failed", f"{type(error).__name__}: {text}"


def prompt(setup: Setup, length: int) -> list[Chunk]:
    """Inputs of ``length`` tokens, in chunks."""
    device, dtype = setup.device, setup.dtype
    if setup.inputs == "structured":
        q, k, v = structured_qkv(
            length,
            setup.heads,
            setup.kv_heads,
            setup.dim,
            batch=setup.batch,
            seed=setup.seed,
            device=device,
            dtype=dtype,
        )
    else:
        random = torch.Generator(device).manual_seed(setup.seed)
        q, k, v = (
            torch.randn(setup.batch, length, n, setup.dim, generator=random, dtype=dtype, device=device)
            for n in (setup.heads, setup.kv_heads, setup.kv_heads)
        )
    chunks, step = [], setup.chunk or length
    for lo in range(0, length, step):
        hi = min(lo + step, length)
        kv = KV.of(k[:, :hi], v[:, :hi])
        chunks.append(Chunk(q[:, lo:hi], kv, Ctx(NO_LAYER, setup.scale, kv.length - 1, setup.seed), range(lo, hi)))
    return chunks


def _fill(row: Row, setup: Setup, work: Work, baseline: Row | None) -> None:
    """Check, then measure."""
    lists = work.search()
    if work.method != DENSE and (read_all := sum(masks is None for masks in lists)):
        chunks = f"{read_all} of {len(lists)} chunks" if len(lists) > 1 else "the prompt"
        row.reason = f"the method reads {chunks} densely"
        row.status = "dense" if read_all == len(lists) else "ok"
        if row.status == "dense":
            row.kernel = _kernel(work.chunks[-1], DENSE, "auto")
    row.relative_error, wrong = _check(work, lists, setup)
    if wrong:
        row.status, row.reason = "wrong", wrong
        return
    row.density, pairs = _pairs_read(work, lists)
    device = setup.device
    row.attention_ms = median_ms(lambda: _exhaust(work.attention(lists)), device, setup.repeats, setup.warmup)
    row.tflops = 2 * (work.chunks[0].q.shape[-1] + work.chunks[0].kv.v.shape[-1]) * pairs / row.attention_ms / 1e9
    if work.method == DENSE:
        row.mass_covered = row.mass_covered_worst_head = 1.0
    else:
        row.search_ms = median_ms(work.discard_search, device, setup.repeats, setup.warmup)
        try:
            row.mass_covered, row.mass_covered_worst_head = _mass_covered(work, lists)
        except torch.OutOfMemoryError:
            row.reason = "; ".join(filter(None, [row.reason, "no memory to measure the mass covered"]))
    lists.clear()
    row.total_ms = median_ms(lambda: _exhaust(work.total()), device, setup.repeats, setup.warmup)
    row.peak_mib = _peak_mib(lambda: _exhaust(work.total()), device)
    dense_row = row if work.method == DENSE else baseline
    if dense_row and dense_row.tflops and dense_row.total_ms:
        row.tflops_of_dense, row.speedup = row.tflops / dense_row.tflops, dense_row.total_ms / row.total_ms


def _exhaust(outputs: Iterator[Tensor]) -> None:
    for _ in outputs:
        pass


def median_ms(work: Callable[[], Any], device: torch.device, repeats: int | None, warmup: int | None) -> float:
    """Median time of ``work`` in ms: between CUDA events, which include waiting for the host, or by the CPU's clock."""
    on_gpu = device.type == "cuda"
    once = max(1e-3, _times_ms(work, device, 1)[0])
    budget = 1e3 * (GPU_SECONDS if on_gpu else CPU_SECONDS) / once
    if warmup is None:
        warmup = min(50, int(budget / 5)) if on_gpu else 0
    if warmup:
        _times_ms(work, device, warmup)
    if repeats is None:
        repeats = int(min(200, max(5, budget)) if on_gpu else min(20, max(3, budget)))
    return statistics.median(_times_ms(work, device, repeats))


def _times_ms(work: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    if device.type == "cuda":
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize(device)
        for start, end in marks:
            start.record()
            work()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in marks]
    times = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def _peak_mib(work: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


# ---- is it right, and what does it read ---------------------------------------------------------------------------


def _check(work: Work, lists: list[Lists], setup: Setup) -> tuple[float | None, str | None]:
    """The worst relative error against the fp32 reference, and what is wrong with the output, or None."""
    sample = _check_sample(work, setup.check_rows)
    worst = torch.zeros((), device=setup.device)
    results = zip(work.attention(lists), work.total(), strict=True)
    for number, (out, again) in enumerate(results):
        if not bool(torch.isfinite(out).all()):
            return None, "the output holds NaN or inf"
        if not torch.equal(out, again):
            return None, "two runs give different outputs"
        for block in sample.get(number, ()):
            worst = torch.maximum(worst, _error(work.chunks[number], _mask_of(work, lists, number, block), out))
    error, most = float(worst), TOLERANCE[setup.dtype]
    wrong = f"relative error {error:.2g} against the fp32 reference, above {most:g}"
    return error, None if error <= most else wrong


def _check_sample(work: Work, count: int) -> dict[int, list[int]]:
    """Query blocks to compare, by chunk: first, last, some between, and of those in part filled as many."""
    block = work.method.block
    every = [(c, i) for c, chunk in enumerate(work.chunks) for i in chunk.blocks(block)]
    partial = [
        (c, i)
        for c, i in every
        if i * block < work.chunks[c].positions.start or (i + 1) * block > work.chunks[c].positions.stop
    ]
    chosen: dict[int, list[int]] = {}
    for c, i in sorted({*_spread(every, count), *_spread(partial, count)}):
        chosen.setdefault(c, []).append(i)
    return chosen


def _spread(items: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """About ``count`` of the items, the first and the last among them."""
    last = len(items) - 1
    return [items[i * last // max(1, count - 1)] for i in range(max(2, count))] if 2 < count <= last else items[:count]


def _mask_of(work: Work, found: list[Lists], number: int, block: int) -> BlockMask:
    """The mask of one query block; of a chunk that is read densely, all blocks."""
    chunk, masks = work.chunks[number], found[number]
    if masks is None:
        everything = torch.ones(*chunk.q.shape[::2], 1, block + 1, dtype=torch.bool, device=chunk.q.device)
        return BlockMask.of(everything, work.method.block, block)
    mask = next(m for m in masks if m.first <= block < m.first + m.full_count.shape[2])
    lists = (x[:, :, block - mask.first : block - mask.first + 1] for x in mask[:4])
    return BlockMask._make((*lists, mask.block, block))


def _error(chunk: Chunk, mask: BlockMask, out_BTHD: Tensor) -> Tensor:
    """Relative error of one query block, that of its worst head."""
    first = chunk.positions.start
    rows = slice(max(mask.rows().start, first) - first, min(mask.rows().stop, chunk.positions.stop) - first)
    reference = block_sparse_attention_reference(chunk.q, chunk.kv, mask, chunk.ctx.scale).out
    difference, norm = ((x**2).sum((1, 3)).sqrt() for x in (out_BTHD[:, rows].float() - reference, reference))
    return (difference / norm.clamp(min=1e-30)).amax()


def _pairs_read(work: Work, lists: list[Lists]) -> tuple[float, float]:
    """Density, and the pairs of all heads that are read."""
    meter = Meter()
    for chunk, masks in zip(work.chunks, lists, strict=True):
        batch, heads = chunk.q.shape[0], chunk.q.shape[2]
        if masks is None:
            meter.add_dense(chunk.positions, heads, batch)
        for mask in masks or ():
            rows = mask.rows()
            seen = range(max(rows.start, chunk.positions.start), min(rows.stop, chunk.positions.stop))
            meter.add_mask(mask, seen, heads, batch)
    density = meter.stats().density
    assert density is not None
    return density, density * meter.pairs


def _mass_covered(work: Work, lists: list[Lists]) -> tuple[float, float]:
    """Attention mass on the blocks that are read, over some query blocks: the mean over heads, and the worst head's."""
    block = work.method.block
    every = [(c, i) for c, chunk in enumerate(work.chunks) for i in chunk.blocks(block)]
    number = min(MASS_BLOCKS, len(every))
    covered = []
    for c, i in (every[(2 * n + 1) * len(every) // (2 * number)] for n in range(number)):
        chunk = work.chunks[c]
        mass = block_mass(chunk.q, chunk.kv, chunk.ctx.scale, block, [i])[:, :, 0]
        covered.append((mass * _mask_of(work, lists, c, i).active(mass.shape[-1])[:, :, 0]).sum(-1))
    by_head = torch.stack(covered).mean(0)
    return float(by_head.mean()), float(by_head.amin())


# ---- from which length on sparse pays -----------------------------------------------------------------------------


def crossover_tokens(speedups: dict[int, float]) -> int | None:
    """The prompt length from which on sparse is faster: between the last loss and the next length, on log scales.

    Args:
        speedups: dense time over sparse time, by prompt length.

    Returns:
        Tokens; the shortest length if it wins everywhere, None if it loses at the longest.
    """
    lengths = sorted(speedups)
    lost = [n for n in lengths if speedups[n] < 1]
    if not lost:
        return lengths[0]
    if lost[-1] == lengths[-1]:
        return None
    low, high = lost[-1], lengths[lengths.index(lost[-1]) + 1]
    loss, win = math.log(speedups[low]), math.log(speedups[high])
    return round(low * (high / low) ** (loss / (loss - win)))
