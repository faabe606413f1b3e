"""Triton kernels of our search for key blocks; ``flex_search`` says what they compute.

Seven launches and no word to the host: masses of tiles of keys for the sampled rows, their mean by strip, the largest
of the last rows; and twice, for the octave of the threshold and within it: held-out coverage at every step, and the
step.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops import flex_search
from keysift.ops.descriptors import tma_takes, token_tiles
from keysift.ops.flex_search import Sampling
from keysift.types import KV

KEY_TILE = 128  # keys that are loaded at a time
KEY_TILES = 32  # ... and that one program goes through
FEWEST_COLUMNS = 128  # of a program that goes through a row at once
WARP_ELEMENTS = 256  # ... that a warp of it holds
TILE_ROWS = 64  # query rows of one program, the heads of a group together
ROUND = 16  # elements; rows of masses begin at multiples of it, which lets loads be wide at any number of blocks
# numbers that differ from prompt to prompt: not each kind of them may mean a kernel of its own
OF_A_PROMPT = [
    *("first", "keys", "first_strip", "strips", "per", "rows", "tail", "blocks", "stride", "picked"),
    *("first_block", "slots", "most"),
]
OCTAVES = tl.constexpr(flex_search.OCTAVES)
NEIGHBOURS = tl.constexpr(flex_search.NEIGHBOURS)
NEAR = tl.constexpr(flex_search.NEAR)
LOWEST = tl.constexpr(-1e30)  # in place of -inf, which no row may be shifted by


@triton.jit
def _position(strip, sample, first, keys, per, TOKENS: tl.constexpr):
    """Position of a strip's sampled row; the last row stands in beyond the last strip."""
    lo = tl.maximum(strip * TOKENS, first)
    hi = tl.minimum((strip + 1) * TOKENS, keys)
    number = (strip * per + sample).to(tl.uint32) * 2654435761
    jitter = (number >> 16).to(tl.int64)
    at = lo + ((sample.to(tl.int64) * 65536 + jitter) * (hi - lo) // (per * 65536)).to(tl.int32)
    return tl.minimum(at, keys - 1)


@triton.jit
def _key_tile(k, table, b, row, last, head, k_b, k_s, k_h, ROWS: tl.constexpr, D, D_PAD, PAGE, TMA):
    """Keys of ``ROWS`` buffer rows from ``row`` on, ``[ROWS, D]``; what lies after row ``last`` is unspecified."""
    if TMA:
        y = k.load([b, head, row, 0]).reshape(ROWS, D_PAD)
    else:
        rows = row + tl.arange(0, ROWS)
        inside = rows <= last
        dim = tl.arange(0, D_PAD)
        if PAGE > 0:
            page = tl.load(table + rows // PAGE, mask=inside, other=0).to(tl.int64)
            where = page * k_b + (rows % PAGE) * k_s
        else:
            where = b.to(tl.int64) * k_b + rows.to(tl.int64) * k_s
        where += head.to(tl.int64) * k_h
        y = tl.load(k + where[:, None] + dim[None, :], mask=inside[:, None] & (dim[None, :] < D), other=0.0)
    return y


@triton.jit(do_not_specialize=OF_A_PROMPT)
def _tile_mass(
    q,
    k,
    table,
    key_start,
    out,
    first,
    keys,
    first_strip,
    rows,
    tail,
    pitch,
    factor,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    table_b,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    KEY_TILES: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PER: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Log2 of the summed weights of every tile of keys, for the sampled rows of a group: [B, H, rows, tiles]."""
    b, kv_head = tl.program_id(2) // (HEADS // GROUP), tl.program_id(2) % (HEADS // GROUP)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last rows have the most keys
    m = tl.arange(0, ROWS * GROUP_PAD)
    row = tile * ROWS + m // GROUP_PAD
    head = kv_head * GROUP + m % GROUP_PAD
    real = (row < rows) & (m % GROUP_PAD < GROUP)
    position = _position(first_strip + row // PER, row % PER, first, keys, PER, TOKENS)
    position = tl.where(row < rows - tail, position, keys - rows + row)  # behind the strips' rows: the last of all
    position = tl.where(row < rows, position, -1)
    last = tl.max(position)
    begin = tl.program_id(0) * KEY_TILES
    end = tl.minimum(begin + KEY_TILES, last // TILE + 1)
    if begin < end:
        dim = tl.arange(0, D_PAD)
        q_at = b.to(tl.int64) * q_b + (position - first).to(tl.int64) * q_t + head.to(tl.int64) * q_h
        x = tl.load(q + q_at[:, None] + dim[None, :], mask=real[:, None] & (dim[None, :] < D), other=0.0)
        start = tl.load(key_start + b).to(tl.int32)
        if PAGE > 0:
            table += b * table_b
        slot = tl.arange(0, KEY_TILES)
        result = tl.full([ROWS * GROUP_PAD, KEY_TILES], float("-inf"), tl.float32)
        earliest = tl.min(tl.where(position < 0, keys, position))
        for c in range(begin, end):
            y = _key_tile(
                k, table, b, start + c * TILE, start + keys - 1, kv_head, k_b, k_s, k_h, TILE, D, D_PAD, PAGE, TMA
            )
            score = tl.dot(x, y.T, input_precision="ieee")
            if (c + 1) * TILE > earliest + 1:
                key = c * TILE + tl.arange(0, TILE)
                score = tl.where(key[None, :] <= position[:, None], score, float("-inf"))
            high = tl.maximum(tl.max(score, 1), LOWEST) * factor
            total = high + tl.log2(tl.sum(tl.exp2(score * factor - high[:, None]), 1))
            result = tl.where(slot[None, :] == c - begin, total[:, None], result)
        column = begin + slot
        at = ((b * HEADS + head).to(tl.int64) * rows + row) * pitch
        tl.store(out + at[:, None] + column[None, :], result, mask=real[:, None] & (column[None, :] < end))


@triton.jit(do_not_specialize=OF_A_PROMPT)
def _strip_mass(
    rows_mass,
    mean,
    half,
    first,
    keys,
    first_strip,
    strips,
    tail,
    blocks,
    pitch,
    BLOCK: tl.constexpr,
    PER: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    C_PAD: tl.constexpr,
):
    """Share of attention by key block, of ``TILES`` tiles each: mean over a strip's rows, and over every other."""
    strip, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sample, column = tl.arange(0, PER), tl.arange(0, C_PAD)
    position = _position(first_strip + strip, sample, first, keys, PER, TOKENS)
    tile = tl.arange(0, C_PAD * TILES)
    known = tile[None, :] <= (position // (BLOCK // TILES))[:, None]
    at = (bh * (strips * PER + tail) + strip * PER + sample) * pitch * TILES
    x = tl.load(rows_mass + at[:, None] + tile[None, :], mask=known, other=float("-inf"))
    share = tl.exp2(x - tl.max(x, 1)[:, None])
    share = share / tl.sum(share, 1)[:, None]
    share = tl.sum(share.reshape(PER, C_PAD, TILES), 2)
    at = (bh * strips + strip) * pitch + column
    tl.store(mean + at, tl.sum(share, 0) / PER, mask=column < blocks)
    if PER > 1:
        even = tl.where((sample % 2 == 0)[:, None], share, 0.0)
        tl.store(half + at, tl.sum(even, 0) / (PER // 2), mask=column < blocks)


@triton.jit(do_not_specialize=OF_A_PROMPT)
def _last_mass(
    rows_mass, last, keys, rows, tail, blocks, pitch, TILES: tl.constexpr, TILE: tl.constexpr, C_PAD: tl.constexpr
):
    """Largest share of attention that one of the last rows gives to each key block, of ``TILES`` tiles each."""
    row, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, tile = tl.arange(0, C_PAD), tl.arange(0, C_PAD * TILES)
    known = tile <= (keys - tail + row) // TILE
    x = tl.load(rows_mass + (bh * rows + rows - tail + row) * pitch * TILES + tile, mask=known, other=float("-inf"))
    share = tl.exp2(x - tl.max(x))
    share = tl.sum((share / tl.sum(share)).reshape(C_PAD, TILES), 1)
    # floats of one sign are ordered like their bits
    tl.atomic_max(last + bh * pitch + column, share.to(tl.int32, bitcast=True), mask=(column < blocks) & (share > 0))


@triton.jit
def row_block(strip, first, keys, first_strip, per, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """Block of a strip's rows."""
    return _position(first_strip + strip, per - 1 + strip * 0, first, keys, per, TOKENS) // BLOCK


@triton.jit
def seen_from(mass, at, block, column, blocks):
    """What a strip whose rows lie in block ``at`` says of the rows of ``block``."""
    seen = tl.load(mass + column, mask=column <= at, other=0.0)
    if block != at:
        moved = column - (block - at)
        near = (column > block - NEAR) & (moved >= 0) & (moved <= at) & (column < blocks)
        shifted = tl.load(mass + moved, mask=near, other=0.0)
        seen = tl.where(column > block - NEAR, (seen + shifted) / 2, seen)
    return seen


@triton.jit
def beside(
    mean,  # of this sequence and head
    strip,
    block,
    column,
    first,
    keys,
    first_strip,
    strips,
    per,
    blocks,
    pitch,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What the strips before and behind say of the rows of ``block``, their mean."""
    total = tl.zeros_like(column).to(tl.float32)
    number = 0
    if strip > 0:
        at = row_block(strip - 1, first, keys, first_strip, per, BLOCK, TOKENS)
        total += seen_from(mean + (strip - 1) * pitch, at, block, column, blocks)
        number += 1
    if strip < strips - 1:
        at = row_block(strip + 1, first, keys, first_strip, per, BLOCK, TOKENS)
        total += seen_from(mean + (strip + 1) * pitch, at, block, column, blocks)
        number += 1
    return total / tl.maximum(number, 1)


@triton.jit(do_not_specialize=OF_A_PROMPT)
def _held_out(
    mean,
    half,
    last,
    above,  # [B * H, 2], of each half: the end of the octave in which its threshold lies
    covered,  # [B * H, picked, 2, OCTAVES]
    first,
    keys,
    first_strip,
    strips,
    per,
    blocks,
    pitch,
    stride,
    striking,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    C_PAD: tl.constexpr,
    FOLDS: tl.constexpr,
    FINE: tl.constexpr,
):
    """Mass of rows that had no say, on the blocks that the others' estimate puts above each threshold."""
    picked, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    strip = picked * stride
    mean += bh * strips * pitch
    half += bh * strips * pitch
    covered += (bh * tl.num_programs(0) + picked) * 2 * OCTAVES
    at = row_block(strip, first, keys, first_strip, per, BLOCK, TOKENS)
    column = tl.arange(0, C_PAD)
    always = (column == at) | (tl.load(last + bh * pitch + column, mask=column < at, other=0.0) >= striking)
    whole = tl.load(mean + strip * pitch + column, mask=column <= at, other=0.0)
    near = beside(mean, strip, at, column, first, keys, first_strip, strips, per, blocks, pitch, BLOCK, TOKENS)
    of_one, of_other = 1.0, 1.0
    if FINE:
        of_one = tl.load(above + bh * 2)
        if FOLDS > 1:
            of_other = tl.load(above + bh * 2 + 1)
    if FOLDS > 1:
        a = tl.load(half + strip * pitch + column, mask=column <= at, other=0.0)
        b = 2 * whole - a
        _covered_by(with_near(a, near, per // 2, strips), b, always, of_one, covered, FINE)
        _covered_by(with_near(b, near, per // 2, strips), a, always, of_other, covered + OCTAVES, FINE)
    else:
        _covered_by(tl.where(strips > 1, near, whole), whole, always, of_one, covered, FINE)


@triton.jit
def with_near(own, near, rows, strips):
    """Estimate from ``rows`` rows of a strip and what the strips beside it say."""
    return tl.where(strips > 1, (rows * own + NEIGHBOURS * near) / (rows + NEIGHBOURS), own)


@triton.jit
def _covered_by(estimate, held_out, always, above, covered, FINE: tl.constexpr):
    """For every threshold, the held-out mass of the blocks whose estimate reaches it."""
    estimate = tl.where(always, float("inf"), estimate)
    for step in tl.static_range(8 if FINE else OCTAVES):
        threshold = above * 2.0 ** (-(step + 1) / 8) if FINE else 2.0 ** (-step)
        tl.store(covered + step, tl.sum(tl.where(estimate >= threshold, held_out, 0.0)))


@triton.jit(do_not_specialize=OF_A_PROMPT)
def _threshold(covered, above, threshold, picked, gamma, FOLDS: tl.constexpr, CHUNK: tl.constexpr, FINE: tl.constexpr):
    """The highest threshold at which the held-out rows are covered to gamma: first its octave, then its eighth of it.

    The halves of the rows each have one; the lower counts. 0 where none is low enough.
    """
    bh = tl.program_id(0).to(tl.int64)
    step, lowest = tl.arange(0, OCTAVES), 1.0
    for fold in tl.static_range(FOLDS):
        total = tl.zeros([OCTAVES], tl.float32)
        for begin in range(0, picked, CHUNK):
            strip = begin + tl.arange(0, CHUNK)
            at = ((bh * picked + strip) * 2 + fold) * OCTAVES
            there = (strip < picked)[:, None] & (step < (8 if FINE else OCTAVES))[None, :]
            total += tl.sum(tl.load(covered + at[:, None] + step[None, :], mask=there, other=0.0), 0)
        enough = total / picked >= gamma
        if FINE:
            tried = tl.load(above + bh * 2 + fold) * tl.exp2(-(step + 1).to(tl.float32) / 8)
            lowest = tl.minimum(lowest, tl.max(tl.where(enough, tried, 0.0)))
        else:
            octave = tl.min(tl.where(enough, step, OCTAVES))
            tl.store(above + bh * 2 + fold, tl.exp2((1 - octave).to(tl.float32)))
    if FINE:
        tl.store(threshold + bh, lowest)


def search(q_BTHD: Tensor, kv: KV, scale: float, gamma: float, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Mass by strip and key block, that of the last rows, and the threshold of each head (see ``FlexPlan``)."""
    batch, _, heads, dim = q_BTHD.shape
    kv_heads = kv.k.shape[2]
    group = heads // kv_heads
    strips, blocks, per = len(sampling.strips), sampling.blocks, sampling.per
    rows = strips * per + sampling.tail
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, kv.k))
    if triton.knobs.runtime.interpret:  # its dot takes the bits of bfloat16 for integers
        q, k = q.float(), k.float()
    paged = kv.table is not None
    group_pad = triton.next_power_of_2(group)
    tile = max(1, min(TILE_ROWS // group_pad, triton.next_power_of_2(rows)))
    tile = max(tile, 16 // group_pad)
    device = q.device
    options: dict[str, Any] = {"BLOCK": sampling.block, "TOKENS": sampling.strip}
    where = (sampling.first, sampling.keys, sampling.strips.start)
    pitch = -(-blocks // ROUND) * ROUND
    key_tile = min(KEY_TILE, sampling.block)
    tiles = sampling.block // key_tile
    rows_mass = torch.empty(batch, heads, rows, pitch * tiles, dtype=torch.float32, device=device)
    grid = (-(-blocks * tiles // KEY_TILES), -(-rows // tile), batch * kv_heads)
    d_pad = max(16, triton.next_power_of_2(dim))
    hopper = not k.is_cuda or torch.cuda.get_device_capability(k.device)[0] >= 9
    tma = hopper and not paged and tma_takes(k) and (k.stride(0) != 0 or batch == 1)
    _tile_mass[grid](
        q,
        token_tiles(k, key_tile, d_pad) if tma else k,
        kv.table if paged else rows_mass,
        kv.start,
        rows_mass,
        *where,
        rows,
        sampling.tail,
        pitch * tiles,
        scale * math.log2(math.e),
        *q.stride()[:3],
        *k.stride()[:3],
        kv.table.stride(0) if kv.table is not None else 0,
        HEADS=heads,
        GROUP=group,
        GROUP_PAD=group_pad,
        ROWS=tile,
        KEY_TILES=KEY_TILES,
        TILE=key_tile,
        PER=per,
        TOKENS=sampling.strip,
        D=dim,
        D_PAD=d_pad,
        PAGE=k.shape[1] if paged else 0,
        TMA=tma,
        num_warps=4,
        num_stages=3 if d_pad * q.element_size() <= 256 else 2,
    )
    mean = torch.empty(batch, heads, strips, pitch, dtype=torch.float32, device=device)
    half = torch.empty_like(mean) if per > 1 else mean
    c_pad = columns(blocks)
    _strip_mass[(strips, batch * heads)](
        rows_mass,
        mean,
        half,
        *where,
        strips,
        sampling.tail,
        blocks,
        pitch,
        PER=per,
        TILES=tiles,
        C_PAD=c_pad,
        num_warps=warps(c_pad * per),
        **options,
    )
    last = torch.zeros(batch, heads, pitch, dtype=torch.int32, device=device)
    _last_mass[(sampling.tail, batch * heads)](
        rows_mass,
        last,
        sampling.keys,
        rows,
        sampling.tail,
        blocks,
        pitch,
        TILES=tiles,
        TILE=key_tile,
        C_PAD=c_pad,
        num_warps=warps(c_pad),
    )
    last = last.view(torch.float32)
    picked = -(-strips // sampling.stride)
    covered = torch.empty(batch, heads, picked, 2, flex_search.OCTAVES, dtype=torch.float32, device=device)
    above = torch.empty(batch, heads, 2, dtype=torch.float32, device=device)
    threshold = torch.empty(batch, heads, dtype=torch.float32, device=device)
    folds = min(per, 2)
    for fine in (False, True):
        _held_out[(picked, batch * heads)](
            mean,
            half,
            last,
            above,
            covered,
            *where,
            strips,
            per,
            blocks,
            pitch,
            sampling.stride,
            sampling.striking,
            C_PAD=c_pad,
            FOLDS=folds,
            FINE=fine,
            num_warps=warps(c_pad),
            **options,
        )
        _threshold[(batch * heads,)](
            covered, above, threshold, picked, gamma, FOLDS=folds, CHUNK=32, FINE=fine, num_warps=1
        )
    return mean[..., :blocks], last[..., :blocks], threshold


def columns(blocks: int) -> int:
    """Key blocks that a program goes through at once, a power of two."""
    return max(FEWEST_COLUMNS, triton.next_power_of_2(blocks))


def warps(elements: int) -> int:
    return max(1, min(16, elements // WARP_ELEMENTS))
