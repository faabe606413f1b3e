"""The kernels behind ``keysift.ops.flex_seed``.

The attention of the last block is computed twice, tile by tile, and never stored: once for each row's sum of weights,
once for its sums by column and by offset. In the second pass the rows of the block are taken ROWS at a time, each time
with the keys moved on by ROWS, so that tiles add up along the diagonals and only one tile a window has to be sheared.
Sums over tiles go through a workspace in a fixed order: results are the same on every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.flex_seed import PooledRows
from keysift.ops.flex_seed_rows_triton import pooled, query_aware

SPLIT_TILES = (8, 128)  # bounds on the key tiles of one program in the first pass ...
SPLITS = 32  # ... which has about so many splits in between


class Tiles(NamedTuple):
    """Shapes that fit a Hopper's registers and shared memory; they never change what is computed.

    Attributes:
        heads, rows: heads of a group and rows of each that a tile holds; ``rows`` divides the block.
        weighed, profiled: keys of a tile in the first and the second pass; at least ``rows`` in the second.
        warps, stages: warps of a program, and tiles in flight.
    """

    heads: int
    rows: int
    weighed: int
    profiled: int
    warps: int
    stages: int

    @classmethod
    def of(cls, block: int, group: int, dim: int, dtype: torch.dtype) -> Tiles:
        size = 32 if dtype == torch.float32 else 128 if dim <= 128 else 64
        heads = min(triton.next_power_of_2(group), size // 16)
        rows = min(block, size // heads)
        return cls(heads, rows, min(size, 64), size, 8 if size * heads * rows >= 128 * 128 else 4, 2)


def search(
    q: Tensor, k: Tensor, gamma: float, tau: float, least: int, most: int, block: int
) -> tuple[Tensor, Tensor, Tensor, PooledRows | None]:
    """The fields of a ``SeedPlan``; arguments as in ``flex_search_seed``."""
    batch, keys, kv_heads, dim = k.shape
    heads, blocks, scale = q.shape[2], -(-keys // block), dim**-0.5
    tiles = Tiles.of(block, heads // kv_heads, dim, q.dtype)
    if not q.is_cuda:
        q, k = q.float(), k.float()  # Triton's interpreter takes the bits of bfloat16 for integers
    with torch.cuda.device_of(q):
        pooled_k = estimate = None
        if tau > 0:
            pooled_k, last = pooled(k, block), pooled(q[:, -block:], block)
            estimate = (pooled_k, last, q.new_empty(batch * heads, blocks, dtype=torch.float32))
        by_token, by_block = _profiles(q, k, block, tiles, scale, estimate)
        chosen = torch.empty(2, batch, heads, blocks, dtype=torch.bool, device=q.device)
        aware = torch.zeros(batch, heads, dtype=torch.bool, device=q.device)
        _choose[(batch * heads, 2)](
            by_token,
            by_block,
            by_block if estimate is None else estimate[2],
            *(chosen.view(torch.uint8), aware.view(torch.uint8)),
            *(gamma, tau, least, most, keys, blocks),
            TEST=estimate is not None,
            TOKENS=min(4096, triton.next_power_of_2(keys)),
            BLOCKS=min(4096, triton.next_power_of_2(blocks)),
            num_warps=8,
        )
        rows = None if pooled_k is None else query_aware(q, pooled_k, aware, gamma, block, scale)
    return chosen[0], chosen[1], aware, rows


def _profiles(
    q: Tensor, k: Tensor, block: int, tiles: Tiles, scale: float, estimate: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Attention of the last block by column and by offset: of tokens ``[B * H, 2, N]``, of blocks ``[B * H, 2, C]``.

    ``estimate`` is pooled keys, the last block's mean query, and where to put their scores, ``[B * H, C]``.
    """
    batch, keys, kv_heads, dim = k.shape
    heads, rows, blocks = q.shape[2], min(block, keys), -(-keys // block)
    group, head_dim = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    chunks, head_tiles = block // tiles.rows, -(-group // tiles.heads)
    lo, hi = SPLIT_TILES
    span = min(hi, max(lo, triton.next_power_of_2(triton.cdiv(keys, tiles.weighed * SPLITS))))
    splits, windows = triton.cdiv(keys, span * tiles.weighed), triton.cdiv(keys - rows + block, tiles.profiled)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    common = {
        **{"GROUP": group, "DIM": dim, "HEAD_DIM": head_dim, "HEADS": tiles.heads, "ROWS": tiles.rows},
        **{"CHUNKS": chunks, "num_warps": tiles.warps, "num_stages": tiles.stages},
    }
    shape = (scale * math.log2(math.e), keys, rows, kv_heads)
    tops, sums, lse = (
        empty(batch * heads, splits, block),
        empty(batch * heads, splits, block),
        empty(batch, heads, block),
    )
    _weigh[(chunks * head_tiles, splits, batch * kv_heads)](
        q, k, tops, sums, *q.stride(), *k.stride(), *shape, splits, SPAN=span, KEYS=tiles.weighed, **common
    )
    _combine[(batch * heads,)](tops, sums, lse, splits, rows, BLOCK=block)
    columns, offsets = empty(batch * heads, chunks, keys), empty(batch * heads, keys)
    spill = empty(batch * heads, windows, tiles.rows)
    _profile[(windows, head_tiles, batch * kv_heads)](
        q, k, lse, columns, offsets, spill, *q.stride(), *k.stride(), *shape, KEYS=tiles.profiled, **common
    )
    by_token, by_block = empty(batch * heads, 2, keys), empty(batch * heads, 2, blocks)
    together = max(1, 512 // block)
    unused = (lse, lse, lse)
    _finish[(triton.cdiv(blocks, together), batch * heads)](
        *(columns, offsets, spill, by_token, by_block, *(unused if estimate is None else estimate)),
        *(scale, keys, rows, blocks, windows, heads, kv_heads),
        **{"TEST": estimate is not None, "DIM": dim, "HEAD_DIM": head_dim, "ROWS": tiles.rows, "KEYS": tiles.profiled},
        **{"CHUNKS": chunks, "BLOCK": block, "TOGETHER": together},
    )
    return by_token, by_block


@triton.jit
def _query_tile(
    q_ptr, chunk, head, rows, stride_n, stride_h, stride_d,
    GROUP: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows ``chunk * ROWS ..`` of HEADS heads from the group's ``head``, ``[HEADS * ROWS, HEAD_DIM]``."""
    column = tl.arange(0, HEADS * ROWS)
    g, row, d = head + column // ROWS, chunk * ROWS + column % ROWS, tl.arange(0, HEAD_DIM)
    at = row.to(tl.int64) * stride_n + g.to(tl.int64) * stride_h
    inside = (g < GROUP) & (row < rows)
    return tl.load(q_ptr + at[:, None] + d[None, :] * stride_d, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _key_tile(k_ptr, start, keys, stride_n, stride_d, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr):
    key, d = tl.arange(0, KEYS), tl.arange(0, HEAD_DIM)
    inside = (start + key >= 0) & (start + key < keys)
    at = key[:, None] * stride_n + d[None, :] * stride_d
    base = k_ptr + tl.cast(start, tl.int64) * stride_n
    return tl.load(base + at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _weigh(
    q_ptr, k_ptr, top_ptr, sum_ptr,
    q_stride_b, q_stride_n, q_stride_h, q_stride_d, k_stride_b, k_stride_n, k_stride_h, k_stride_d,
    scale, keys, rows, kv_heads, splits,
    SPAN: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Largest score (log2 units) and sum of weights of ROWS rows of HEADS heads, over SPAN tiles of keys."""
    chunk, head, split = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS * HEADS, tl.program_id(1)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    q_ptr += batch * q_stride_b + tl.cast(keys - rows, tl.int64) * q_stride_n + kv_head * GROUP * q_stride_h
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    q = _query_tile(q_ptr, chunk, head, rows, q_stride_n, q_stride_h, q_stride_d, GROUP, DIM, HEAD_DIM, HEADS, ROWS)
    column = tl.arange(0, HEADS * ROWS)
    row = chunk * ROWS + column % ROWS
    start = split * SPAN * KEYS
    stop = tl.minimum(start + SPAN * KEYS, tl.minimum(keys, keys - rows + (chunk + 1) * ROWS))
    seen_by_all = keys - rows + chunk * ROWS + 1  # keys before this one
    whole = tl.minimum(start + tl.maximum(seen_by_all - start, 0) // KEYS * KEYS, stop)
    top = tl.full((HEADS * ROWS,), -1e30, tl.float32)
    total = tl.zeros((HEADS * ROWS,), tl.float32)
    for at in range(start, whole, KEYS):
        k = _key_tile(k_ptr, at, keys, k_stride_n, k_stride_d, DIM, HEAD_DIM, KEYS)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        higher = tl.maximum(top, tl.max(score, 1) * scale)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score * scale - higher[:, None]), 1)
        top = higher
    for at in range(whole, stop, KEYS):
        k = _key_tile(k_ptr, at, keys, k_stride_n, k_stride_d, DIM, HEAD_DIM, KEYS)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (at + tl.arange(0, KEYS))[None, :] <= (keys - rows + row)[:, None]
        score = tl.where(seen & (at + tl.arange(0, KEYS) < keys)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        top = higher
    g = head + column // ROWS
    out = (((batch * kv_heads + kv_head) * GROUP + g) * splits + split) * (CHUNKS * ROWS) + row
    tl.store(top_ptr + out, top, mask=g < GROUP)
    tl.store(sum_ptr + out, total, mask=g < GROUP)


@triton.jit
def _combine(top_ptr, sum_ptr, lse_ptr, splits, rows, BLOCK: tl.constexpr):
    """Log2 of each row's sum of weights over all splits; inf for rows that do not exist, whose weights are then 0."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, 32):
        split = start + tl.arange(0, 32)
        at = (head * splits + split)[:, None] * BLOCK + row[None, :]
        tops = tl.load(top_ptr + at, mask=(split < splits)[:, None], other=-1e30)
        sums = tl.load(sum_ptr + at, mask=(split < splits)[:, None], other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        total = total * tl.exp2(top - higher) + tl.sum(sums * tl.exp2(tops - higher[None, :]), 0)
        top = higher
    lse = tl.where(row < rows, top + tl.log2(total), float("inf"))
    tl.store(lse_ptr + head * BLOCK + row, lse)


@triton.jit
def _profile(
    q_ptr, k_ptr, lse_ptr, column_ptr, offset_ptr, spill_ptr,
    q_stride_b, q_stride_n, q_stride_h, q_stride_d, k_stride_b, k_stride_n, k_stride_h, k_stride_d,
    scale, keys, rows, kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Weights of the last rows on one window of diagonals (key minus row), summed by column and by diagonal.

    A tile of keys j and rows i holds diagonals from ROWS - 1 before the window's first, which go to ``spill``.
    """
    window, head = tl.program_id(0), tl.program_id(1) * HEADS
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    q_ptr += batch * q_stride_b + tl.cast(keys - rows, tl.int64) * q_stride_n + kv_head * GROUP * q_stride_h
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    first_head = (batch * kv_heads + kv_head) * GROUP + head
    first = window * KEYS - (CHUNKS - 1) * ROWS
    j, column = tl.arange(0, KEYS), tl.arange(0, HEADS * ROWS)
    i, g = column % ROWS, tl.arange(0, HEADS)
    total = tl.zeros((KEYS, HEADS * ROWS), tl.float32)
    for chunk in range(0, CHUNKS):
        start = first + chunk * ROWS
        k = _key_tile(k_ptr, start, keys, k_stride_n, k_stride_d, DIM, HEAD_DIM, KEYS)
        q = _query_tile(q_ptr, chunk, head, rows, q_stride_n, q_stride_h, q_stride_d, GROUP, DIM, HEAD_DIM, HEADS, ROWS)
        lse = tl.load(
            lse_ptr + (first_head + column // ROWS) * (CHUNKS * ROWS) + chunk * ROWS + i,
            mask=head + column // ROWS < GROUP,
            other=float("inf"),
        )
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        last = tl.where(start + j >= 0, keys - rows - first, -KEYS)
        seen = j[:, None] - i[None, :] <= last[:, None]
        weight = tl.exp2(tl.where(seen, score - lse[None, :], float("-inf")))
        by_column = tl.sum(tl.reshape(weight, (KEYS, HEADS, ROWS)), 2)
        out = ((first_head + g) * CHUNKS + chunk)[None, :] * keys + (start + j)[:, None]
        stored = ((start + j >= 0) & (start + j < keys))[:, None] & (head + g < GROUP)[None, :]
        tl.store(column_ptr + out, by_column, mask=stored)
        total += weight
    diagonal = i[:, None] + j[None, :]  # column of the entry of row i on diagonal j; beyond the tile: on j - KEYS
    sheared = tl.gather(tl.trans(total), diagonal % KEYS, 1)
    here = tl.sum(tl.reshape(tl.where(diagonal < KEYS, sheared, 0.0), (HEADS, ROWS, KEYS)), 1)
    before = tl.sum(tl.reshape(tl.where(diagonal < KEYS, 0.0, sheared), (HEADS, ROWS, KEYS)), 1)
    offset = keys - rows - first - j
    stored = ((offset >= 0) & (offset < keys))[None, :] & (head + g < GROUP)[:, None]
    tl.store(offset_ptr + (first_head + g)[:, None] * keys + offset[None, :], here, mask=stored)
    out = ((first_head + g) * tl.num_programs(0) + window)[:, None] * ROWS + (j - (KEYS - ROWS))[None, :]
    tl.store(spill_ptr + out, before, mask=(j >= KEYS - ROWS)[None, :] & (head + g < GROUP)[:, None])


@triton.jit
def _finish(
    column_ptr, offset_ptr, spill_ptr, token_ptr, block_ptr, pooled_k_ptr, last_q_ptr, estimate_ptr,
    scale, keys, rows, blocks, windows, heads, kv_heads,
    TEST: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Means over the rows by token and sums by block; offsets are blocked from the farthest, as the authors do."""
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = token < keys
    by_column = tl.zeros((TOGETHER, BLOCK), tl.float32)
    for chunk in range(0, CHUNKS):
        seen = inside & (token < keys - rows + (chunk + 1) * ROWS)
        by_column += tl.load(column_ptr + (head * CHUNKS + chunk) * keys + token, mask=seen, other=0.0)
    by_column /= rows
    tl.store(token_ptr + head * 2 * keys + token, by_column, mask=inside)
    tl.store(block_ptr + head * 2 * blocks + block, tl.sum(by_column, 1), mask=block < blocks)

    offset = keys - 1 - token
    behind = keys - rows - offset + (CHUNKS - 1) * ROWS  # of the first window's first diagonal
    by_offset = tl.load(offset_ptr + head * keys + offset, mask=inside & (behind >= 0), other=0.0)
    window, short = (behind + KEYS) // KEYS, KEYS - (behind + KEYS) % KEYS  # the next window spills from `short` before
    at = (head * windows + window) * ROWS + ROWS - short
    by_offset += tl.load(spill_ptr + at, mask=inside & (short < ROWS) & (window < windows), other=0.0)
    by_offset /= rows
    tl.store(token_ptr + (head * 2 + 1) * keys + token, by_offset, mask=inside)
    tl.store(block_ptr + (head * 2 + 2) * blocks - 1 - block, tl.sum(by_offset, 1), mask=block < blocks)

    if TEST:
        d = tl.arange(0, HEAD_DIM)
        batch, kv_head = head // heads, head % heads // (heads // kv_heads)
        k_at = ((batch * blocks + block) * kv_heads + kv_head)[:, None] * DIM + d[None, :]
        k = tl.load(pooled_k_ptr + k_at, mask=(block < blocks)[:, None] & (d < DIM)[None, :], other=0.0)
        q = tl.load(last_q_ptr + head * DIM + d, mask=d < DIM, other=0.0)
        tl.store(estimate_ptr + head * blocks + block, tl.sum(k * q[None, :], 1) * scale, mask=block < blocks)


@triton.jit
def _choose(
    token_ptr, block_ptr, estimate_ptr, chosen_ptr, aware_ptr, gamma, tau, least, most, keys, blocks,
    TEST: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The best blocks of one head, of its columns or of its offsets."""
    head, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token_ptr += (head * 2 + kind) * keys
    mass_ptr = block_ptr + (head * 2 + kind) * blocks
    chosen_ptr += (kind * tl.num_programs(0).to(tl.int64) + head) * blocks
    rank = _tokens_within(token_ptr, keys, gamma, TOKENS) + 1
    count = tl.minimum(tl.maximum(rank // 128 + 1, least), most)
    if TEST:
        distance = _pattern_distance(estimate_ptr + head * blocks, block_ptr + head * 2 * blocks, blocks, BLOCKS)
        aware = distance < tau
        count = tl.where(aware, least, count)
        tl.store(aware_ptr + head, aware.to(tl.uint8), mask=kind == 0)
    count = tl.minimum(count, blocks)

    threshold = tl.full((), 0, tl.int32)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        reached = tl.zeros((BLOCKS,), tl.int32)
        for start in range(0, blocks, BLOCKS):
            reached += (_mass_bits(mass_ptr, start, blocks, BLOCKS) >= threshold + bit).to(tl.int32)
        threshold = tl.where(tl.sum(reached, 0) >= count, threshold + bit, threshold)
        bit = bit >> 1
    reached = tl.zeros((BLOCKS,), tl.int32)
    for start in range(0, blocks, BLOCKS):
        reached += (_mass_bits(mass_ptr, start, blocks, BLOCKS) > threshold).to(tl.int32)
    ties = count - tl.sum(reached, 0)  # the first so many of those that equal the threshold
    for start in range(0, blocks, BLOCKS):
        bits = _mass_bits(mass_ptr, start, blocks, BLOCKS)
        equal = (bits == threshold).to(tl.int32)
        chosen = (bits > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties))
        at = start + tl.arange(0, BLOCKS)
        tl.store(chosen_ptr + at, chosen.to(tl.uint8), mask=at < blocks)
        ties -= tl.sum(equal, 0)


@triton.jit
def _mass_bits(mass_ptr, start, blocks, BLOCKS: tl.constexpr):
    """Bits of block masses, which order as they do; block 0 comes before all, what is no block after all."""
    at = start + tl.arange(0, BLOCKS)
    mass = tl.load(mass_ptr + at, mask=at < blocks, other=0.0)
    bits = tl.where(at == 0, 0x7F800000, mass.to(tl.int32, bitcast=True))
    return tl.where(at < blocks, bits, -1)


@triton.jit
def _tokens_within(x_ptr, keys, gamma, TOKENS: tl.constexpr):
    """How many of the prefix sums of x, sorted from the largest, do not exceed gamma."""
    low = tl.full((), -1, tl.int32)
    step = tl.full((), 1 << 28, tl.int32)
    for _ in range(15):
        sum_1 = tl.zeros((TOKENS,), tl.float32)
        sum_2 = tl.zeros((TOKENS,), tl.float32)
        sum_3 = tl.zeros((TOKENS,), tl.float32)
        for start in range(0, keys, TOKENS):
            at = start + tl.arange(0, TOKENS)
            x = tl.load(x_ptr + at, mask=at < keys, other=0.0)
            bits = x.to(tl.int32, bitcast=True)
            sum_1 += tl.where(bits >= low + step, x, 0.0)
            sum_2 += tl.where(bits >= low + 2 * step, x, 0.0)
            sum_3 += tl.where(bits >= low + 3 * step, x, 0.0)
        over = (tl.sum(sum_1, 0) > gamma).to(tl.int32) + (tl.sum(sum_2, 0) > gamma).to(tl.int32)
        low += step * (over + (tl.sum(sum_3, 0) > gamma).to(tl.int32))
        step = step >> 2
    total = tl.zeros((TOKENS,), tl.float32)
    count = tl.zeros((TOKENS,), tl.int32)
    for start in range(0, keys, TOKENS):
        at = start + tl.arange(0, TOKENS)
        x = tl.load(x_ptr + at, mask=at < keys, other=0.0)
        taken = (x.to(tl.int32, bitcast=True) > low) & (at < keys)
        total += tl.where(taken, x, 0.0)
        count += taken.to(tl.int32)
    next_lower = tl.maximum(low, 0).to(tl.float32, bitcast=True)  # the sum crosses gamma among entries of this value
    ties = tl.where(low > 0, (gamma - tl.sum(total, 0)) / tl.maximum(next_lower, 1e-37), 0.0)
    return tl.sum(count, 0) + tl.minimum(ties, keys * 1.0).to(tl.int32)


@triton.jit
def _pattern_distance(estimate_ptr, mass_ptr, blocks, BLOCKS: tl.constexpr):
    """Jensen-Shannon distance of the softmax of estimates from the masses; NaN where one of them underflows to 0."""
    top = tl.full((BLOCKS,), float("-inf"), tl.float32)
    for start in range(0, blocks, BLOCKS):
        at = start + tl.arange(0, BLOCKS)
        top = tl.maximum(top, tl.load(estimate_ptr + at, mask=at < blocks, other=float("-inf")))
    best = tl.max(top, 0)
    total = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, blocks, BLOCKS):
        at = start + tl.arange(0, BLOCKS)
        total += tl.exp(tl.load(estimate_ptr + at, mask=at < blocks, other=float("-inf")) - best)
    norm = tl.sum(total, 0)
    divergence = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, blocks, BLOCKS):
        at = start + tl.arange(0, BLOCKS)
        p = tl.exp(tl.load(estimate_ptr + at, mask=at < blocks, other=0.0) - best) / norm
        q = tl.load(mass_ptr + at, mask=at < blocks, other=0.0)
        middle = (p + q) / 2
        divergence += tl.where(at < blocks, p * tl.log(p / middle) + q * tl.log(q / middle), 0.0)
    return tl.sqrt(tl.sum(divergence, 0) / 2)
