"""Attention of one new token over selected rows, and of a few new tokens over all rows, as split-KV Triton kernels.

A program reads a share of the rows of one sequence once for all query heads (and tokens) that attend to them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.chain_triton import wait_for_previous
from keysift.ops.paging_triton import row_offsets
from keysift.ops.split_merge_triton import (
    Config,
    finish,
    fold,
    leave_nothing,
    load_queries,
    load_rows,
    nothing,
    prepare,
    splits_of,
    widened,
)
from keysift.types import KV, Law, Partial, Selection

NO_WEIGHT, GIVEN_WEIGHT, LAW_WEIGHT = 0, 1, 2
ROWS_OF_SPLIT = tl.constexpr(256)  # less is not worth merging, once all multiprocessors have something to do
TILE_ROWS = 128  # pairs of a token and a head that share one reading of the keys


def gather_config(heads: int, dim: int, v_dim: int, wide: bool, by_law: bool) -> Config:
    """For the ``heads`` that share rows.

    Tiles so small that a short list still makes many; row numbers, their pages and the rows are loaded one turn ahead
    of each other. A law's norms need registers, as ``wide`` (fp32) operands do, and smaller tiles leave room for more
    programs, which hide each other's waits. For one head, whose products waste most of a tile, many rows are loaded at
    once instead.
    """
    if wide and by_law:
        return Config(16, 8, 3)
    if by_law and heads == 1 and max(dim, v_dim) <= 128:
        return Config(128, 4, 1)
    return Config(32 if wide or by_law or max(dim, v_dim) > 128 else 64, 4, 4)


def short_config(rows: int, dim: int, v_dim: int, wide: bool, page: int) -> Config:
    """For ``rows`` query rows a tile; where pages are smaller than tiles, page numbers are loads ahead of rows."""
    block_n = 32 if wide or max(dim, v_dim) > 128 else 64
    return Config(block_n, 8 if rows > 64 else 4, 5 if page % block_n else 3)


def gather(
    q_BHD: Tensor,
    kv: KV,
    selection: Selection,
    scale: float,
    middle: KV | None = None,
    dtype: torch.dtype = torch.float32,
    splits: int | None = None,
    config: Config | None = None,
    outside: int | None = None,
) -> Partial:
    """``gather_attention`` on the device."""
    batch, _, dim = q_BHD.shape
    slots, width = selection.rows.shape[1:]
    config = config or gather_config(
        q_BHD.shape[1] // slots, dim, kv.v.shape[-1], widened(q_BHD, kv), isinstance(selection.log_w, Law)
    )
    full = splits
    if splits is None:
        known = width + (0 if middle is None or outside is None else min(outside, kv.bound))
        most = width + kv.bound if middle is not None and outside is None else known
        tiles = -(-most // config.block_n)
        splits = splits_of(q_BHD, batch * slots, tiles, 4)
        full = splits_of(q_BHD, batch * slots, tiles, 1)  # a program for each multiprocessor
        splits = min(splits, max(full, most // ROWS_OF_SPLIT.value))
        full = max(full, known // ROWS_OF_SPLIT.value)  # used however few rows there are
    run = prepare(q_BHD[:, None], kv, slots, splits, config, dtype)
    rows, count, log_w = selection.rows, selection.count, selection.log_w
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    weights, mean, entries, kind = rows, rows, 0, NO_WEIGHT  # unread where there are none
    if isinstance(log_w, Tensor):
        weights, kind = log_w if log_w.stride(-1) == 1 else log_w.contiguous(), GIVEN_WEIGHT
    elif log_w is not None:
        weights, mean, entries, kind = log_w.table.contiguous(), log_w.mean.contiguous(), len(log_w.table), LAW_WEIGHT
    if batch:
        with torch.cuda.device_of(q_BHD):  # a kernel starts on the current device
            _gather[(splits, slots, batch)](
                run.q,
                run.k,
                run.v,
                (run.q.stride(0), 0, run.q.stride(2)),
                run.k.stride()[:3],
                run.v.stride()[:3],
                kv.start.contiguous(),
                kv.length.contiguous(),
                (middle or kv).start.contiguous(),
                (middle or kv).length.contiguous(),
                kv.table if kv.table is not None else rows,
                kv.table.stride(0) if kv.table is not None else 0,
                rows,
                rows.stride()[:2],
                count,
                count.stride(),
                weights,
                weights.stride()[:2] if kind == GIVEN_WEIGHT else (0, 0),
                mean,
                entries,
                run.result,
                scale * math.log2(math.e),
                width,
                full,
                OUTSIDE=middle is not None,
                WEIGHT=kind,
                INTERPRET=triton.knobs.runtime.interpret,
                **run.constants,
            )
    return run.merge()


@triton.jit
def _held(tile, INTERPRET: tl.constexpr):
    """``tile`` in registers: norms are taken there, so that shared memory can have the layout that the dot wants."""
    if not INTERPRET:
        if tile.dtype.primitive_bitwidth == 16:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, is_pure=True, pack=2)
        else:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, is_pure=True, pack=1)
    return tile


@triton.jit
def _around(start, length, middle_start, middle_length, b, OUTSIDE: tl.constexpr):
    """First row of the view, how many rows are before the middle, the first behind it, and how many are outside."""
    first = 0
    before = 0
    behind = 0
    outside = 0
    if OUTSIDE:
        first = tl.load(start + b).to(tl.int32)
        in_view = tl.load(length + b).to(tl.int32)
        from_middle = tl.load(middle_start + b).to(tl.int32)
        in_middle = tl.load(middle_length + b).to(tl.int32)
        before = from_middle - first  # wherever an empty middle is, rows before and behind it follow each other
        behind = from_middle + in_middle
        outside = in_view - in_middle
    return first, before, behind, outside


@triton.jit
def _about(q, mean, D: tl.constexpr, D_PAD: tl.constexpr):
    """What a law needs: the mean, q.mean, 1 / |q|, and below which |k - mean|^2 is but rounding."""
    d = tl.arange(0, D_PAD)
    mean = tl.load(mean + d, mask=d < D, other=0.0).to(tl.float32)
    q = q.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-8)
    return mean, tl.sum(q * mean[None, :], 1), 1.0 / norm, 1e-10 * tl.sum(mean * mean) + 1e-37


@triton.jit
def _reciprocal_norm(k, mean, least):
    """1 / |k - mean| of each row of keys; 0 for a key that is the mean, to which the rounding of q.k must not give an
    angle."""
    centred = k.to(tl.float32) - mean[None, :]  # first: |k|^2 - 2 k.mean + |mean|^2 would cancel
    square = tl.sum(centred * centred, 1)
    return tl.where(square > least, tl.rsqrt(tl.maximum(square, least)), 0.0)


@triton.jit
def _entry(table, at, INTERPRET: tl.constexpr):
    """Entries of a table, for which the pipeline must not put off what depends on them: they are in the cache."""
    if INTERPRET:
        x = tl.load(table + at)
    else:
        address = (table + at).to(tl.int64)
        x = tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [address], tl.float32, True, 1)
    return x


@triton.jit
def _log_weight(cosine, table, entries, INTERPRET: tl.constexpr):
    """Log weights by the cosine of the angle between query and centred key: linear between entries."""
    half = (entries - 1) * 0.5
    at = tl.minimum(tl.maximum(cosine * half + half, 0.0), 2 * half)
    left = tl.minimum(at.to(tl.int32), entries - 2)
    low = _entry(table, left, INTERPRET)
    return low + (_entry(table, left + 1, INTERPRET) - low) * (at - left.to(tl.float32))


@triton.jit
def _law(dots, per_norm, q_mean, per_q_norm, table, entries, ROWS: tl.constexpr, INTERPRET: tl.constexpr):
    """Log weights ``[M, N]``, or ``[1, N]`` of the one query row."""
    if ROWS == 1:  # the others are 0, and the reciprocals of their norms large
        cosine = (tl.sum(dots, 0) - tl.sum(q_mean)) * (tl.min(per_q_norm) * per_norm)
        log_w = _log_weight(cosine, table, entries, INTERPRET)[None, :]
    else:
        cosine = (dots - q_mean[:, None]) * per_q_norm[:, None] * per_norm[None, :]
        log_w = _log_weight(cosine, table, entries, INTERPRET)
    return log_w


@triton.jit(do_not_specialize=["entries", "width", "full"])
def _gather(
    q_ptr, k, v, q_strides, k_strides, v_strides, start, length, middle_start, middle_length, table, table_stride,
    rows, rows_strides, count, count_strides, weights, weights_strides, mean_ptr, entries, result, scale_log2, width,
    full, OUTSIDE: tl.constexpr, WEIGHT: tl.constexpr, T: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    SHARED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M_PAD: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, ALIKE: tl.constexpr, ALONE: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    INTERPRET: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A share of the list [rows before the middle | rows after it | selected rows] of one head of one sequence."""
    wait_for_previous(CHAINED)
    log2_e: tl.constexpr = 1.4426950408889634
    split = tl.program_id(0)
    slot = tl.program_id(1)
    b = tl.program_id(2)
    first, before, behind, outside = _around(start, length, middle_start, middle_length, b, OUTSIDE)
    in_use = tl.load(count + b * count_strides[0] + slot * count_strides[1])
    total = outside + tl.minimum(in_use.to(tl.int32), width)
    tiles = tl.cdiv(total, BLOCK_N)
    used = tl.minimum(tl.num_programs(0), tl.maximum(full, total // ROWS_OF_SPLIT))
    used = tl.maximum(1, tl.minimum(tiles, used))
    if split < used:
        q = load_queries(q_ptr, q_strides, b, slot, G, ROWS, D, M_PAD, D_PAD, WIDEN)
        kv_head = (slot // SHARED).to(tl.int64)
        k_base = k + kv_head * k_strides[2]
        v_base = v + kv_head * v_strides[2]
        listed = rows + b.to(tl.int64) * rows_strides[0] + slot * rows_strides[1]
        given = weights + b.to(tl.int64) * weights_strides[0] + slot * weights_strides[1]
        if WEIGHT == 2:
            mean, q_mean, per_q_norm, least = _about(q, mean_ptr + (b * (H // G // SHARED) + kv_head) * D, D, D_PAD)
        state = nothing(M_PAD, DV_PAD, BLOCK_N)
        for tile in tl.range(tiles * split // used, tiles * (split + 1) // used, num_stages=STAGES):
            at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            seen = at < total
            selected = seen & (at >= outside)
            row = tl.load(listed + (at - outside), mask=selected, other=0).to(tl.int32)
            if OUTSIDE:
                row = tl.where(selected, row, tl.where(at < before, first + at, behind + at - before))
            offsets = row_offsets(row, seen, b, table, table_stride, k_strides[0], k_strides[1], PAGE)
            tile_k = load_rows(k_base, offsets, seen, D, D_PAD, WIDEN)
            if WEIGHT == 2:
                tile_k = _held(tile_k, INTERPRET)
            if not ALIKE:
                offsets = row_offsets(row, seen, b, table, table_stride, v_strides[0], v_strides[1], PAGE)
            tile_v = load_rows(v_base, offsets, seen, DV, DV_PAD, WIDEN)
            dots = tl.dot(q, tile_k.T, input_precision=PRECISION)
            score = dots * scale_log2
            if WEIGHT == 1:
                log_w = tl.load(given + (at - outside), mask=selected, other=0.0)
                score += log_w[None, :] * log2_e
            if WEIGHT == 2:
                per_norm = _reciprocal_norm(tile_k, mean, least)
                log_w = _law(dots, per_norm, q_mean, per_q_norm, weights, entries, ROWS, INTERPRET)
                score += tl.where(selected[None, :], log_w * log2_e, 0.0)
            state = fold(state, tl.where(seen[None, :], score, float("-inf")), tile_v, PRECISION)
        finish(state, result, split, b, slot, T, H, G, ROWS, DV, M_PAD, DV_PAD, ALONE)
    else:
        leave_nothing(result, split, b, slot, ROWS, M_PAD)


def short(
    q_BTHD: Tensor,
    kv: KV,
    scale: float,
    dtype: torch.dtype = torch.float32,
    splits: int | None = None,
    config: Config | None = None,
) -> Partial:
    """``short_attention`` on the device."""
    batch, tokens, heads, dim = q_BTHD.shape
    slots = kv.k.shape[2]
    if tokens > (together := max(1, TILE_ROWS * slots // heads)):
        parts = []
        for lo in range(0, tokens, together):
            hi = min(lo + together, tokens)
            seen = kv.between(kv.start, kv.end - (tokens - hi))
            parts.append(short(q_BTHD[:, lo:hi], seen, scale, dtype, splits, config))
        return Partial(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))
    page = 0 if kv.table is None else kv.k.shape[1]
    config = config or short_config(tokens * heads // slots, dim, kv.v.shape[-1], widened(q_BTHD, kv), page)
    if splits is None:
        # a few thousand rows at most, so that the longest sequence of a ragged batch is not left alone in the end
        splits = splits_of(q_BTHD, batch * slots, -(-kv.bound // config.block_n), 2, kv.bound // 8192)
    run = prepare(q_BTHD, kv, slots, splits, config, dtype)
    if batch and tokens:
        with torch.cuda.device_of(q_BTHD):
            _short[(splits, slots, batch)](
                run.q,
                run.k,
                run.v,
                run.q.stride()[:3],
                run.k.stride()[:3],
                run.v.stride()[:3],
                kv.start.contiguous(),
                kv.length.contiguous(),
                kv.table if kv.table is not None else kv.start,
                kv.table.stride(0) if kv.table is not None else 0,
                run.result,
                scale * math.log2(math.e),
                TILE_IN_PAGE=page > 0 and page % config.block_n == 0,
                **run.constants,
            )
    return run.merge()


@triton.jit
def _short(
    q_ptr, k, v, q_strides, k_strides, v_strides, start, length, table, table_stride, result, scale_log2,
    TILE_IN_PAGE: tl.constexpr, T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M_PAD: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, PAGE: tl.constexpr, ALIKE: tl.constexpr, ALONE: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A share of the rows of one KV head of one sequence; tiles begin at multiples of BLOCK_N, as pages do."""
    wait_for_previous(CHAINED)
    split = tl.program_id(0)
    slot = tl.program_id(1)
    b = tl.program_id(2)
    first = tl.load(start + b).to(tl.int32)
    end = first + tl.load(length + b).to(tl.int32)
    first_tile = first // BLOCK_N
    tiles = tl.where(end > first, tl.cdiv(end, BLOCK_N) - first_tile, 0)
    used = tl.maximum(1, tl.minimum(tiles, tl.num_programs(0)))
    if split < used:
        q = load_queries(q_ptr, q_strides, b, slot, G, ROWS, D, M_PAD, D_PAD, WIDEN)
        k_base = k + slot.to(tl.int64) * k_strides[2]
        v_base = v + slot.to(tl.int64) * v_strides[2]
        pages = table + b.to(tl.int64) * table_stride
        position = end - T + tl.arange(0, M_PAD) // G
        offs_n = tl.arange(0, BLOCK_N)
        lo = first_tile + tiles * split // used
        hi = first_tile + tiles * (split + 1) // used
        if TILE_IN_PAGE:
            page = tl.load(pages + lo * BLOCK_N // PAGE, mask=lo < hi, other=0)
        state = nothing(M_PAD, DV_PAD, BLOCK_N)
        for tile in tl.range(lo, hi, num_stages=STAGES):
            row = tile * BLOCK_N + offs_n
            seen = (row >= first) & (row < end)
            if TILE_IN_PAGE:  # the next tile's page is read a turn ahead of its keys
                inside = (tile * BLOCK_N % PAGE + offs_n).to(tl.int64)
                offsets = page.to(tl.int64) * k_strides[0] + inside * k_strides[1]
                v_offsets = page.to(tl.int64) * v_strides[0] + inside * v_strides[1]
                page = tl.load(pages + (tile + 1) * BLOCK_N // PAGE, mask=tile + 1 < hi, other=0)
            else:
                offsets = row_offsets(row, seen, b, table, table_stride, k_strides[0], k_strides[1], PAGE)
                v_offsets = offsets
                if not ALIKE:
                    v_offsets = row_offsets(row, seen, b, table, table_stride, v_strides[0], v_strides[1], PAGE)
            tile_k = load_rows(k_base, offsets, seen, D, D_PAD, WIDEN)
            tile_v = load_rows(v_base, v_offsets, seen, DV, DV_PAD, WIDEN)
            score = tl.dot(q, tile_k.T, input_precision=PRECISION) * scale_log2
            if ((tile + 1) * BLOCK_N > end - T) | (tile * BLOCK_N < first):
                causal = (row[None, :] <= position[:, None]) & (row >= first)[None, :]
                score = tl.where(causal, score, float("-inf"))
            state = fold(state, score, tile_v, PRECISION)
        finish(state, result, split, b, slot, T, H, G, ROWS, DV, M_PAD, DV_PAD, ALONE)
    else:
        leave_nothing(result, split, b, slot, ROWS, M_PAD)
