"""The kernels for the query-aware heads of ``keysift.ops.flex_seed``: pooling, and a threshold on shares of attention.

Which heads are query-aware only the device knows: every launch covers all heads, and programs of the others end at
once. Pooled scores are computed anew, tile by tile, whenever they are needed. The threshold is searched over the bits
of floats, whose order is that of the numbers where these are not negative.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.flex_seed import PooledRows

SLOTS = 16  # 15 thresholds are tried at a time
STEPS = (1 << 24, 1 << 20, 1 << 16, 1 << 12, 1 << 8, 1 << 4)  # from 32 octaves to 16 units in the last place
LOWEST = 0x3F800001 - 16 * STEPS[0]  # bits of the lowest threshold, 2**-32; the highest lie above 1


def query_aware(q: Tensor, pooled_k: Tensor, aware: Tensor, gamma: float, block: int, scale: float) -> PooledRows:
    """Choose by pooled scores, in the heads that ``aware`` flags."""
    batch, blocks, kv_heads, dim = pooled_k.shape
    heads, options = q.shape[2], _options(dim)
    tiles = triton.cdiv(blocks, options["TILE"])
    flags, scale = aware.view(torch.uint8), scale * math.log2(math.e)
    pooled_q = pooled(q, block, flags)
    lse = torch.empty(batch, heads, blocks, dtype=torch.float32, device=q.device)
    threshold = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    low = torch.empty(len(STEPS), batch * heads, dtype=torch.int32, device=q.device)
    above = torch.empty(len(STEPS), batch * heads, tiles, SLOTS, dtype=torch.float32, device=q.device)
    common, shape = (flags, pooled_q, pooled_k, lse), (scale, blocks, heads, kv_heads)
    _pooled_lse[(tiles, batch * heads)](*common, *shape, **options)
    budget = gamma * blocks
    for i, step in enumerate(STEPS):
        before = max(0, i - 1)
        _sum_above[(tiles, batch * heads)](
            *(*common, low[before], above[before], low[i], above[i], *shape, budget, step),
            **{"FIRST": i == 0, "LOWEST": LOWEST, "SLOTS": SLOTS, **options},
        )
    _settle[(batch * heads,)](flags, low[-1], above[-1], threshold, budget, STEPS[-1], tiles, SLOTS=SLOTS)
    return PooledRows(pooled_q, pooled_k, lse, threshold, scale)


def pooled(x: Tensor, block: int, flags: Tensor | None = None) -> Tensor:
    """Mean of each block, fp32 ``[B, C, H, D]``; of flagged heads only, if there are flags."""
    batch, tokens, heads, dim = x.shape
    out = torch.empty(batch, -(-tokens // block), heads, dim, dtype=torch.float32, device=x.device)
    _mean[(out.shape[1], batch * heads)](
        *(x, out, out if flags is None else flags, *x.stride(), tokens, heads),
        **{"FLAGGED": flags is not None, "DIM": dim, "HEAD_DIM": triton.next_power_of_2(dim), "BLOCK": block},
    )
    return out


def _options(dim: int) -> dict[str, Any]:
    size = max(16, triton.next_power_of_2(dim))
    # three products of TF32 are as good as one of fp32 for a threshold, but take shared memory for high and low parts
    tile, precision = (64, "tf32x3") if size <= 128 else (32, "ieee")
    return {"DIM": dim, "HEAD_DIM": size, "TILE": tile, "PRECISION": precision, "num_stages": 1}


def chosen_blocks(vertical: Tensor, slash: Tensor, aware: Tensor, rows: PooledRows, blocks: range) -> Tensor:
    """The blocks of the query blocks at positions ``blocks``, bool ``[B, H, len(blocks), C]``."""
    batch, heads, columns = vertical.shape
    kv_heads, dim = rows.k.shape[2:]
    active = torch.empty(batch, heads, len(blocks), columns, dtype=torch.bool, device=vertical.device)
    options = _options(dim)
    grid = (triton.cdiv(len(blocks), options["TILE"]), triton.cdiv(columns, options["TILE"]), batch * heads)
    with torch.cuda.device_of(vertical):
        _mark[grid](
            *(x.contiguous().view(torch.uint8) for x in (vertical, slash, aware)),
            *(rows.q, rows.k, rows.lse, rows.threshold, active.view(torch.uint8)),
            *(rows.scale, columns, heads, kv_heads, blocks.start, len(blocks)),
            **options,
        )
    return active


@triton.jit
def _mean(
    x_ptr, out_ptr, flag_ptr, stride_b, stride_n, stride_h, stride_d, tokens, heads,
    FLAGGED: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if FLAGGED:  # noqa: SIM102  # a condition of the compiler's, then one of the device's
        if tl.load(flag_ptr + index) == 0:
            return
    batch, head = index // heads, index % heads
    row, d = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    x_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + block * BLOCK * stride_n
    inside = (block * BLOCK + row < tokens)[:, None] & (d < DIM)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0)
    mean = tl.sum(x.to(tl.float32), 0) / tl.minimum(tokens - block * BLOCK, BLOCK)
    out = ((batch * tl.num_programs(0) + block) * heads + head) * DIM + d
    tl.store(out_ptr + out, mean, mask=d < DIM)


@triton.jit
def _scores(
    q, k_ptr, start, row, blocks, stride, scale,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of rows ``row`` on TILE pooled keys, in log2 units; -inf after the diagonal."""
    column, d = start + tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    inside = (column < blocks)[:, None] & (d < DIM)[None, :]
    k = tl.load(k_ptr + column[:, None] * stride + d[None, :], mask=inside, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where((column[None, :] <= row[:, None]) & (column < blocks)[None, :], score, float("-inf"))


@triton.jit
def _head_rows(
    q_ptr, k_ptr, head, row, blocks, heads, kv_heads, DIM: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Pooled queries ``row`` of a head, and where its pooled keys begin."""
    batch, own, d = (head // heads).to(tl.int64), head % heads, tl.arange(0, HEAD_DIM)
    at = (batch * blocks + row)[:, None] * heads * DIM + own * DIM + d[None, :]
    q = tl.load(q_ptr + at, mask=(row < blocks)[:, None] & (d < DIM)[None, :], other=0.0)
    return q, k_ptr + (batch * blocks * kv_heads + own // (heads // kv_heads)) * DIM


@triton.jit
def _pooled_lse(
    flag_ptr, q_ptr, k_ptr, lse_ptr, scale, blocks, heads, kv_heads,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log2 of the sum of weights of TILE rows of pooled scores."""
    first, head = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE, tl.program_id(1)
    if tl.load(flag_ptr + head) == 0:
        return
    row = first + tl.arange(0, TILE)
    q, k_ptr = _head_rows(q_ptr, k_ptr, head, row, blocks, heads, kv_heads, DIM, HEAD_DIM)
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, first + TILE, TILE):
        score = _scores(q, k_ptr, start, row, blocks, kv_heads * DIM, scale, DIM, HEAD_DIM, TILE, PRECISION)
        higher = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        top = higher
    tl.store(lse_ptr + head.to(tl.int64) * blocks + row, top + tl.log2(total), mask=row < blocks)


@triton.jit
def _narrow(low_ptr, above_ptr, head, tiles, budget, step, SLOTS: tl.constexpr):
    """Bits of the highest threshold tried above which there is more than the budget."""
    slot = tl.arange(0, SLOTS)
    above = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, tiles, 32):
        tile = start + tl.arange(0, 32)
        at = (head.to(tl.int64) * tiles + tile)[:, None] * SLOTS + slot[None, :]
        above += tl.sum(tl.load(above_ptr + at, mask=(tile < tiles)[:, None], other=0.0), 0)
    over = ((above > budget) & (slot < SLOTS - 1)).to(tl.int32)
    return tl.load(low_ptr + head) + step * tl.sum(over, 0)


@triton.jit(do_not_specialize=["step"])
def _sum_above(
    flag_ptr, q_ptr, k_ptr, lse_ptr, before_low_ptr, before_above_ptr, low_ptr, above_ptr,
    scale, blocks, heads, kv_heads, budget, step,
    FIRST: tl.constexpr, LOWEST: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of the shares of TILE rows that reach each of SLOTS - 1 thresholds, ``step`` apart."""
    index, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    if tl.load(flag_ptr + head) == 0:
        return
    if FIRST:
        low = tl.full((), LOWEST, tl.int32)
    else:
        low = _narrow(before_low_ptr, before_above_ptr, head, tl.num_programs(0), budget, step * SLOTS, SLOTS)
    tl.store(low_ptr + head, low, mask=index == 0)
    row, slot = index * TILE + tl.arange(0, TILE), tl.arange(0, SLOTS)
    q, k_ptr = _head_rows(q_ptr, k_ptr, head, row, blocks, heads, kv_heads, DIM, HEAD_DIM)
    lse = tl.load(lse_ptr + head.to(tl.int64) * blocks + row, mask=row < blocks, other=float("inf"))
    above = tl.zeros((TILE, SLOTS), tl.float32)
    for start in range(0, index * TILE + TILE, TILE):
        score = _scores(q, k_ptr, start, row, blocks, kv_heads * DIM, scale, DIM, HEAD_DIM, TILE, PRECISION)
        share = tl.where(score == float("-inf"), 0.0, tl.exp2(score - lse[:, None]))
        bits = share.to(tl.int32, bitcast=True)
        for i in tl.static_range(SLOTS - 1):
            by_row = tl.sum(tl.where(bits >= low + (i + 1) * step, share, 0.0), 1)
            above += tl.where(slot[None, :] == i, by_row[:, None], 0.0)
    at = (head.to(tl.int64) * tl.num_programs(0) + index) * SLOTS + slot
    tl.store(above_ptr + at, tl.sum(above, 0))


@triton.jit
def _settle(flag_ptr, low_ptr, above_ptr, threshold_ptr, budget, step, tiles, SLOTS: tl.constexpr):
    """The lowest threshold above which there is no more than the budget."""
    head = tl.program_id(0)
    if tl.load(flag_ptr + head) == 0:
        return
    bits = _narrow(low_ptr, above_ptr, head, tiles, budget, step, SLOTS) + step
    tl.store(threshold_ptr + head, bits.to(tl.float32, bitcast=True))


@triton.jit
def _mark(
    vertical_ptr, slash_ptr, flag_ptr, q_ptr, k_ptr, lse_ptr, threshold_ptr, active_ptr,
    scale, blocks, heads, kv_heads, first, count,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of TILE rows and TILE columns: chosen columns, chosen diagonals, and shares that reach the threshold."""
    index, start, head = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE, tl.program_id(2)
    at = head.to(tl.int64) * blocks
    row, column = first + index, start + tl.arange(0, TILE)
    behind = row[:, None] - column[None, :]
    causal = (behind >= 0) & (row < blocks)[:, None] & (column < blocks)[None, :]
    vertical = tl.load(vertical_ptr + at + column, mask=column < blocks, other=0)
    slash = tl.load(slash_ptr + at + behind, mask=causal, other=0)
    active = causal & ((vertical[None, :] | slash) != 0)
    if (tl.load(flag_ptr + head) != 0) & (start <= first + tl.program_id(0) * TILE + TILE - 1):
        q, k_ptr = _head_rows(q_ptr, k_ptr, head, row, blocks, heads, kv_heads, DIM, HEAD_DIM)
        lse = tl.load(lse_ptr + at + row, mask=row < blocks, other=float("inf"))
        score = _scores(q, k_ptr, start, row, blocks, kv_heads * DIM, scale, DIM, HEAD_DIM, TILE, PRECISION)
        active = active | (causal & (tl.exp2(score - lse[:, None]) >= tl.load(threshold_ptr + head)))
    out = (head.to(tl.int64) * count + index)[:, None] * blocks + column[None, :]
    tl.store(active_ptr + out, active.to(tl.uint8), mask=(index < count)[:, None] & (column < blocks)[None, :])
