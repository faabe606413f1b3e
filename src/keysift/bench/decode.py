"""How long one layer's attention takes in a decode step: methods beside dense attention of the same run.

A speed counts only for a right result: the output is first compared with fp32 attention over the method's own
selection, and the replay of a CUDA graph, bit by bit, with the step outside of one. Caches of one shape take turns, so
many that what a round reads, side data included, does not stay in the L2 cache.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn.attention import SDPBackend, sdpa_kernel

from keysift.bench.layers import Inputs, Layers, NoGraph, Setup, Shape, captured, exact_attention
from keysift.bench.prefill import DENSE, TOLERANCE, failure, median_ms
from keysift.meter import Meter
from keysift.methods import describe
from keysift.ops.heads import group
from keysift.types import KV, Decode, Law, Selection

L2_BYTES = 60 << 20  # the largest
ROUND_BYTES = 4 * L2_BYTES  # what a round over all caches reads at least
CACHES, CPU_CACHES = (8, 128), (2, 4)  # at least and at most; what the layers of a step share is paid once a round
FILLED = 0.8  # of the free memory that caches may take
OURS = "dense (ours)"
FORCED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass
class Row:
    """One shape and method. What was not measured is None, and ``reason`` says why.

    Attributes:
        method: its SPEC; "dense" is the baseline, torch's attention; "dense (ours)" is ours, over pages.
        kernel: of the baseline: "cudnn", "flash" or "sdpa" (as torch chooses), whichever is fastest.
        status: "ok", "dense" (the method reads all), "wrong", "no graph" (a step waits for the device and has no
            speed), "out of memory" or "failed".
        relative_error: of the worst head, against fp32 attention over the method's own selection.
        kept_share: distinct rows that the heads of a group read, sinks and window included, as a share of the cache.
        keys_per_head: keys that a query head reads.
        side_share: bytes of side data as a share of those of keys and values.
        bytes_read: by a step: rows, once for each list that holds them, and what is scanned to choose them.
        caches: that took turns.
        hash_us: writing the new row, and bringing the side data up to date.
        select_us, attend_us, merge_us: choosing, attention, merging its parts. ``merge_us`` is None where the merge
            could not be told from the attention.
        total_us: a step, measured whole.
        speedup: the dense row's total over this one's.
        tb_s: 1e12 bytes that are read a second, over the whole step.
        error_median, error_mean: |o - dense| / |dense| of a head's output, dense in fp32; over heads, sequences, steps
            and draws.
        within_epsilon: share of them within the method's ``epsilon``, where it promises one.
        peak_mib: memory that a step takes at most beyond the cache; None on a CPU.
    """

    batch: int
    context: int
    method: str
    kernel: str | None = None
    status: str = "ok"
    reason: str | None = None
    relative_error: float | None = None
    kept_share: float | None = None
    keys_per_head: float | None = None
    side_share: float | None = None
    bytes_read: float | None = None
    caches: int | None = None
    hash_us: float | None = None
    select_us: float | None = None
    attend_us: float | None = None
    merge_us: float | None = None
    total_us: float | None = None
    speedup: float | None = None
    tb_s: float | None = None
    error_median: float | None = None
    error_mean: float | None = None
    within_epsilon: float | None = None
    peak_mib: float | None = None


class WrongResult(Exception):
    """What was computed is not what it should be."""


# ---- what is asked for --------------------------------------------------------------------------------------------


def swept(methods: Sequence[Any], shares: Sequence[float]) -> list[Any]:
    """Each method that has ``keep`` once for each share, the others as they are.

    Raises:
        ValueError: none has it, or a method does not take the share.
    """
    out = []
    for method in methods:
        names = {f.name for f in dataclasses.fields(method)}
        other = {"budget": None} if "budget" in names else {}
        out += [dataclasses.replace(method, keep=x, **other) for x in shares] if "keep" in names else [method]
    if not any(hasattr(method, "keep") for method in methods):
        raise ValueError(f"--keep: {', '.join(map(describe, methods))} has no option keep; add --methods quest")
    return list(dict.fromkeys(out))


def check_shapes(shapes: Sequence[Shape], methods: Sequence[Decode]) -> None:
    """Raise ValueError for the first shape that is none, or that leaves a method nothing to choose from."""
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"--shapes {shape}: batch and context must be 1 or more")
        for method in methods:
            if method != DENSE and shape.context <= (always := method.sinks + method.window):
                raise ValueError(
                    f"--shapes {shape}: {describe(method)} always reads the first {method.sinks} and the last"
                    f" {method.window} keys; choose a context above {always}"
                )


# ---- measuring ----------------------------------------------------------------------------------------------------


def measure(
    setup: Setup, shapes: Sequence[Shape], methods: Sequence[Any], start: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of every shape, the dense ones first; what fails is a row with its reason, and the others go on.

    Args:
        setup: heads, device and so on.
        shapes: batches and contexts.
        methods: method objects for decode.
        start: called with what begins, in words.
    """
    chosen = [DENSE, *(m for m in methods if m != DENSE)]
    for shape in shapes:
        with torch.cuda.device(setup.device) if setup.on_gpu else nullcontext():
            yield from _measure_shape(setup, shape, chosen, start)


def _measure_shape(setup: Setup, shape: Shape, methods: Sequence[Any], start: Callable[[str], None]) -> Iterator[Row]:
    inputs: Inputs | None = None
    baseline: Row | None = None
    for method in (None, *methods):
        row = Row(*shape, "dense" if method is None else OURS if method == DENSE else describe(method))
        start(f"{shape}, {row.method}")
        try:
            if setup.on_gpu:
                torch.cuda.empty_cache()  # the buffers of the method before had other sizes
            inputs = inputs or Inputs.make(setup, shape, max(1, *(m.tail for m in methods)))
            if method is None:
                _fill_baseline(row, setup, inputs)
            else:
                with closing(Layers(setup, inputs, method)) as layers:
                    _fill(row, setup, layers)
        except WrongResult as error:
            row.status, row.reason = "wrong", str(error)
        except NoGraph as error:
            row.status, row.reason = "no graph", str(error)
        except Exception as error:  # kernels fail in many ways, and one row must not end the others
            row.status, row.reason = failure(error)
        baseline = baseline or row
        if row.total_us and row.bytes_read:
            row.tb_s = row.bytes_read / row.total_us / 1e6
            row.speedup = baseline.total_us / row.total_us if baseline.total_us else None
        yield row


def _fill(row: Row, setup: Setup, layers: Layers) -> None:
    """Check, then measure."""
    sides = layers.method.sides(setup.dim, setup.dtype).values()
    row.side_share = sum(side.token_bytes for side in sides) / setup.row_bytes
    if layers.method != DENSE:
        selection, middle = layers.selection(), layers.stores[0].middle(layers.method)
        if selection is None:
            row.status, row.reason = "dense", "the method reads all keys"
        else:  # kernels may refuse what is no selection, or read wildly
            for b, (lo, hi) in enumerate(zip(middle.start.tolist(), middle.end.tolist(), strict=True)):
                for s, count in enumerate(selection.count[b].tolist()):
                    _check_rows(selection.rows[b, s, :count].long(), lo, hi)
    row.bytes_read = _examine(row, setup, layers)
    row.peak_mib = _peak_mib(layers.step, setup)
    layers.rewind()
    held = layers.inputs.k.numel() * 2 * setup.dtype.itemsize * (1 + row.side_share)
    for _ in range(1, caches_for(setup, row.bytes_read, held)):
        try:
            layers.add()
        except torch.OutOfMemoryError:  # fewer have to do
            break
    row.caches = len(layers.stores)
    if setup.on_gpu and row.caches * row.bytes_read < L2_BYTES:
        row.reason = f"{row.caches} caches take turns: part of what they read may have come from the L2 cache"
    _time(row, setup, layers)


def caches_for(setup: Setup, bytes_read: float, bytes_held: float) -> int:
    """How many caches take turns: until a round reads more than an L2 cache holds, as far as memory allows."""
    least, most = CACHES if setup.on_gpu else CPU_CACHES
    wanted = min(most, max(least, -(-ROUND_BYTES // max(1, int(bytes_read)))))
    if setup.on_gpu:
        unused = torch.cuda.memory_reserved(setup.device) - torch.cuda.memory_allocated(setup.device)
        free = torch.cuda.mem_get_info(setup.device)[0] + unused
        wanted = min(wanted, 1 + int(FILLED * free / bytes_held))
    return wanted


def _peak_mib(work: Callable[[], Any], setup: Setup) -> float | None:
    if not setup.on_gpu:
        return None
    device = setup.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


# ---- times --------------------------------------------------------------------------------------------------------


def _time(row: Row, setup: Setup, layers: Layers) -> None:
    """A step, and its parts as differences of steps that end earlier."""
    pool = torch.cuda.graph_pool_handle() if setup.on_gpu else None  # as one model's layers share it
    whole = layers.recorded(pool=pool)
    _check_repeats(layers, whole)

    def us(once: Callable[[], Any]) -> float:
        layers.rewind()
        return 1e3 * median_ms(once, setup.device, setup.repeats, None) / len(layers.stores)

    total = us(whole)
    if row.status != "dense" and layers.method != DENSE:
        row.hash_us = us(layers.recorded("hash", pool))
        selected = us(layers.recorded("select", pool))
        row.select_us = max(0.0, selected - row.hash_us)
        layers.rewind()
        merge = _merge_us(whole, setup)
        row.merge_us = None if merge is None else merge / len(layers.stores)
        row.attend_us = max(0.0, total - selected - (row.merge_us or 0.0))
    row.total_us = total


def _check_repeats(layers: Layers, once: Callable[[], list[Tensor]]) -> None:
    """Raise WrongResult unless recorded steps give what steps give, also when the caches have grown."""
    with layers.flatter():
        layers.rewind()
        with layers.as_recorded():
            expected = [layers.step() for _ in range(3)]
        layers.rewind()
        for outputs in expected:
            if not all(map(torch.equal, outputs, once())):
                graph = "a CUDA graph replays another output" if layers.setup.on_gpu else "another output"
                raise WrongResult(f"{graph} than the first time")


def _merge_us(once: Callable[[], Any], setup: Setup) -> float | None:
    """Time of the kernels that merge parts of attention; None where kernels cannot be timed."""
    if not setup.on_gpu:
        return None
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # as torch does for graphs of its own: with a teardown they crash
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            once()
            torch.cuda.synchronize(setup.device)
        kernels = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
    except RuntimeError:
        return None
    return merging_us([(e.time_range.start, e.time_range.end, e.name) for e in kernels]) if kernels else None


def merging_us(kernels: Sequence[tuple[float, float, str]]) -> float:
    """Time in which nothing but merges ran, of kernels by start, end and name: one may be placed before the last ends,
    and wait for it."""
    total, busy = 0.0, -math.inf
    for start, end, name in sorted(kernels):
        if "merge" in name.lower() and "sort" not in name.lower():
            total += max(0.0, end - max(start, busy))
        busy = max(busy, end)
    return total


# ---- the baseline -------------------------------------------------------------------------------------------------


def _fill_baseline(row: Row, setup: Setup, inputs: Inputs) -> None:
    """torch's attention over keys and values ``[B, K, S, D]``, by the fastest of the kernels that take the case."""
    q, (k, v) = inputs.prompt_q[:, -1], inputs.prompt_kv
    exact = exact_attention(q, k, v, setup.scale)
    row.bytes_read = float(2 * k.numel() * setup.dtype.itemsize)
    row.kept_share, row.keys_per_head, row.side_share = 1.0, float(inputs.context), 0.0
    caches = [_head_major(k, v) for _ in range(caches_for(setup, row.bytes_read, row.bytes_read))]
    row.caches = len(caches)
    refusals: list[Exception] = []
    for name in (*FORCED, "sdpa") if setup.on_gpu else ("sdpa",):
        try:
            error = head_error(_sdpa(name, q, *caches[0], setup.scale), exact)
            _raise_if_wrong(float(error.amax()), setup)
            us = _sdpa_us(name, q, caches, setup)
        except (RuntimeError, WrongResult) as refusal:
            if isinstance(refusal, torch.OutOfMemoryError):
                raise
            refusals.append(refusal.with_traceback(None))  # which would keep the caches alive
            continue
        if row.total_us is None or us < row.total_us:
            row.kernel, row.total_us, row.relative_error = name, us, float(error.amax())
            row.error_median, row.error_mean = float(error.median()), float(error.mean())
    if row.total_us is None:
        raise refusals.pop()
    row.peak_mib = _peak_mib(lambda: _sdpa(row.kernel, q, *caches[0], setup.scale), setup)


def _head_major(k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (k_BSKD, v_BSKD))
    return k, v


def _sdpa(kernel: str | None, q_BHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> Tensor:
    if kernel in FORCED:
        with sdpa_kernel(FORCED[kernel]):
            q = q_BHD[:, :, None]
            return F.scaled_dot_product_attention(q, k_BKSD, v_BKSD, scale=scale, enable_gqa=True)[:, :, 0]
    q = group(q_BHD, k_BKSD.shape[1], 1)  # heads of a group as query rows, so that keys are read once
    return F.scaled_dot_product_attention(q, k_BKSD, v_BKSD, scale=scale).flatten(1, 2)


def _sdpa_us(kernel: str, q: Tensor, caches: list[tuple[Tensor, Tensor]], setup: Setup) -> float:
    def once() -> list[Tensor]:
        return [_sdpa(kernel, q, k, v, setup.scale) for k, v in caches]

    run = captured(once) if setup.on_gpu else once
    return 1e3 * median_ms(run, setup.device, setup.repeats, None) / len(caches)


# ---- is it right, and what does it read ---------------------------------------------------------------------------


def head_error(out_BHD: Tensor, exact_BHD: Tensor) -> Tensor:
    """Relative error of each head's output, ``[..., H]``."""
    return (out_BHD.float() - exact_BHD).norm(dim=-1) / exact_BHD.norm(dim=-1).clamp(min=1e-30)


def _raise_if_wrong(error: float, setup: Setup) -> None:
    most = TOLERANCE[setup.dtype]
    if not error <= most:  # which NaN is not either
        raise WrongResult(f"relative error {error:.2g} against the fp32 reference, above {most:g}")


def _examine(row: Row, setup: Setup, layers: Layers) -> float:
    """Compare with the references, and note what a step reads; the bytes of it.

    Raises:
        WrongResult: the output is not that of the method's selection, or this is not one.
    """
    with layers.flatter():
        (out,) = layers.step()
        _read(layers, 0, out, row)
    layers.rewind()
    meter, readings, errors, first = Meter(), list[Reading](), list[Tensor](), None
    for draw in range(1 if layers.method == DENSE else setup.draws):
        if draw:
            layers.begin((setup.seed + draw) % 2**63)
        outs = []
        for i in range(setup.steps):
            outs += layers.step(i, meter=None if draw else meter)
            if not draw:
                readings.append(_read(layers, i, outs[-1], row))
        layers.rewind()
        out = torch.stack(outs)
        if first is not None and torch.equal(out, first):
            break  # nothing is drawn
        first = out if first is None else first
        errors.append(head_error(out, layers.inputs.exact))
    if layers.seed != setup.seed:
        layers.begin(setup.seed)
    row.kept_share, row.keys_per_head = (sum(x) / len(readings) for x in list(zip(*readings, strict=True))[1:])
    all_errors = torch.stack(errors)
    row.error_median, row.error_mean = float(all_errors.median()), float(all_errors.mean())
    if (epsilon := getattr(layers.method, "epsilon", None)) is not None:
        row.within_epsilon = float((all_errors <= epsilon).float().mean())
    per_sequence = meter.stats().bytes_per_step
    assert per_sequence is not None
    return per_sequence * row.batch


class Reading(NamedTuple):
    """What a step should give, and read."""

    out: Tensor  # fp32 [B, H, Dv]
    kept_share: float
    keys_per_head: float


def _read(layers: Layers, i: int, out_BHD: Tensor, row: Row) -> Reading:
    """What the step that was just done, with the query of step ``i``, should have given, and read.

    Raises:
        WrongResult: it gave another output.
    """
    store, method, q = layers.stores[0], layers.method, layers.inputs.query(i)
    kv, middle, selection = store.view(), store.middle(method), layers.selection(i)
    if selection is None:  # no row is left out
        middle = kv.between(kv.end, kv.end)
        selection = Selection.of(torch.zeros(len(q), kv.k.shape[2], 1, dtype=torch.bool, device=q.device))
    reading = over_selection(q, kv, middle, selection, layers.setup.scale)
    error = float(head_error(out_BHD, reading.out).amax())
    _raise_if_wrong(error, layers.setup)
    row.relative_error = max(row.relative_error or 0.0, error)
    return reading


def _check_rows(rows: Tensor, lo: int, hi: int) -> None:
    if len(rows) and (len(rows.unique()) < len(rows) or rows.amin() < lo or rows.amax() >= hi):
        raise WrongResult("a selection has a row twice, or one outside of the middle")


def over_selection(q_BHD: Tensor, kv: KV, middle: KV, selection: Selection, scale: float) -> Reading:
    """fp32 attention over a selection and the rows outside of the middle, one list at a time.

    Raises:
        WrongResult: the selection has a row twice, or one that is not in the middle.
    """
    batch, heads = q_BHD.shape[:2]
    lists, kv_heads = selection.rows.shape[1], kv.k.shape[2]
    sharing, counts = heads // lists, selection.count.tolist()
    out = torch.zeros(batch, heads, kv.v.shape[3], device=q_BHD.device)
    kept = keys = 0.0
    spans = zip(kv.start.tolist(), kv.end.tolist(), middle.start.tolist(), middle.end.tolist(), strict=True)
    for b, (start, end, lo, hi) in enumerate(spans):
        row = torch.arange(start, end, device=q_BHD.device)
        outside = row[(row < lo) | (row >= hi)]
        for kv_head in range(kv_heads):
            distinct = [outside]
            for s in range(kv_head * lists // kv_heads, (kv_head + 1) * lists // kv_heads):
                rows = selection.rows[b, s, : counts[b][s]].long()
                _check_rows(rows, lo, hi)
                which = slice(s * sharing, (s + 1) * sharing)
                q, (k, v) = q_BHD[b, which].float(), _rows(kv, b, kv_head, torch.cat([outside, rows]))
                z = q @ k.T * scale
                z[:, len(outside) :] += _log_w(selection, b, s, kv_head, q, k[len(outside) :])
                out[b, which] = z.softmax(-1) @ v
                distinct.append(rows)
                keys += sharing * z.shape[1]
            kept += len(torch.cat(distinct).unique()) / (end - start)
    return Reading(out, kept / (batch * kv_heads), keys / (batch * heads))


def _rows(kv: KV, b: int, kv_head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows of a sequence, fp32."""
    assert kv.table is not None
    page, slot = kv.table[b, rows // kv.k.shape[1]].long(), rows % kv.k.shape[1]
    return kv.k[page, slot, kv_head].float(), kv.v[page, slot, kv_head].float()


def _log_w(selection: Selection, b: int, s: int, kv_head: int, q_GD: Tensor, k_RD: Tensor) -> Tensor | float:
    """Log weights of the rows of a list."""
    if selection.log_w is None:
        return 0.0
    if isinstance(selection.log_w, Tensor):
        return selection.log_w[b, s, : len(k_RD)]
    law = Law(selection.log_w.mean[b : b + 1, kv_head : kv_head + 1], selection.log_w.table)
    return law.log_w(q_GD[None], k_RD[None, None].expand(1, len(q_GD), -1, -1))[0]
