"""Triton kernels of Quest (arXiv:2406.10774): bounds of pages, their scores, the best pages; ``pages`` says what."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.chain_triton import chained, wait_for_previous
from keysift.ops.pages import LSE_PAGES, Quota, page_count, touched
from keysift.ops.paging_triton import programs, row_offsets
from keysift.ops.select_triton import HELD_TILE, LOG2E, cut, keys_of, tile_of, write_chosen
from keysift.types import KV, Selection

EXTEND_PAGES = 16  # Quest pages of a program
EXTEND_STEP = 8  # tokens of each of them that are loaded at a time
SCORE_TILE, SCORE_WARPS, SCORE_STAGES = 32, 2, 2  # pages that are scored at once
SCORE_PROGRAMS = 8192  # that are enough; where a bound allows for more pages, a program goes through several parts
ROWS_TILE = 4096  # rows that a program writes at a time
FEW_TILES = 4  # where no more are needed than these, or one, the best pages are found sooner than among a bound's
LOWEST = tl.constexpr(-1e30)  # in place of -inf, which nothing may be shifted by
LN2 = tl.constexpr(0.6931471805599453)


def extend(bounds: Tensor, kv: KV, unit: int, done: Tensor, most: int) -> None:
    """``extend_bounds`` in one launch."""
    batch, (_, page, heads, dim) = kv.start.shape[0], kv.k.shape
    pages = min(touched(most, unit), page_count(kv, unit))
    if not batch * pages * heads:
        return
    tile = min(EXTEND_PAGES, triton.next_power_of_2(pages))
    k = kv.k if kv.k.stride(3) == 1 else kv.k.contiguous()
    width = triton.next_power_of_2(dim)
    with torch.cuda.device_of(bounds):
        _extend[(heads * -(-pages // tile), batch)](
            *(k, bounds, *_view(kv), done, heads),
            *(*k.stride()[:3], *bounds.stride()[:4]),
            UNIT=unit,
            STEP=EXTEND_STEP if unit % EXTEND_STEP == 0 else 1,
            PAGE=0 if kv.table is None else page,
            ORIGIN=kv.origin is not None,
            PAGES=tile,
            D=dim,
            D_PAD=width,
            num_warps=min(4, max(1, tile * width // 512)),
            **chained(k),
        )


def scores(q_BHD: Tensor, bounds: Tensor, kv: KV, unit: int, scale: float) -> tuple[Tensor, Tensor]:
    """``page_scores_lse`` in one launch."""
    (batch, heads, dim), kv_heads, pages = q_BHD.shape, bounds.shape[1], page_count(kv, unit)
    parts = -(-pages // LSE_PAGES)
    score = torch.empty(batch, heads, parts * LSE_PAGES, dtype=torch.float32, device=q_BHD.device)
    lse = torch.empty(batch, parts, heads, dtype=torch.float32, device=q_BHD.device).transpose(1, 2)
    if not score.numel():
        return score[..., :pages], lse
    q = q_BHD if q_BHD.stride(2) == 1 else q_BHD.contiguous()
    wide = triton.knobs.runtime.interpret or q.dtype != bounds.dtype
    with torch.cuda.device_of(bounds):
        _score[(programs(parts, batch * kv_heads, SCORE_PROGRAMS), batch * kv_heads)](
            *(q, bounds, score, lse, *_view(kv)),
            *(kv_heads, parts, scale),
            *(*q.stride()[:2], *bounds.stride()[:4]),
            UNIT=unit,
            PAGE=0 if kv.table is None else kv.k.shape[1],
            ORIGIN=kv.origin is not None,
            PAGES=LSE_PAGES,
            TILE=SCORE_TILE,
            STAGES=SCORE_STAGES,
            G=heads // kv_heads,
            G_PAD=max(16, triton.next_power_of_2(heads // kv_heads)),
            D=dim,
            D_PAD=triton.next_power_of_2(dim),
            WIDEN=wide,  # the interpreter's dot takes the bits of bfloat16 for integers
            num_warps=SCORE_WARPS,
            **chained(q),
        )
    return score[..., :pages], lse


def top(
    score_BHP: Tensor, kv: KV, unit: int, count: Tensor | Quota, most_pages: int, shared: bool, lse: Tensor
) -> Selection:
    """``top_pages`` in one launch."""
    batch, heads, pages = score_BHP.shape
    kv_heads = kv.k.shape[2]
    chosen = kv_heads if shared else heads
    even = score_BHP.stride(2) == 1 and score_BHP.stride(0) == heads * score_BHP.stride(1)
    score, device = score_BHP if even else score_BHP.contiguous(), score_BHP.device
    rows = torch.empty(batch, chosen, most_pages * unit, dtype=torch.int32, device=device)
    used = torch.empty(batch, chosen, dtype=torch.int32, device=device)
    best = torch.empty(batch, chosen, most_pages, dtype=torch.int32, device=device)
    tile, tiles, warps = tile_of(pages)
    values = score if tiles else torch.empty(batch, chosen, score.stride(1), dtype=torch.float32, device=device)
    quota = count if isinstance(count, Quota) else Quota()
    if used.numel():
        with torch.cuda.device_of(score):
            _top[(batch * chosen,)](
                *(score, lse, values, best, rows, used, *_view(kv)[2:]),
                *(kv.start if isinstance(count, Quota) else count, quota.share, quota.keys),
                *(chosen, score.stride(1), most_pages, lse.shape[2], *lse.stride()),
                LSE_PAGES=LSE_PAGES,
                UNIT=unit,
                ORIGIN=kv.origin is not None,
                QUOTA=isinstance(count, Quota),
                SHARED=shared,
                G=heads // chosen,
                G_PAD=triton.next_power_of_2(heads // chosen),
                PARTS=triton.next_power_of_2(max(lse.shape[2], 1)),
                TILE=tile,
                TILES=tiles,
                FEW=0 if 0 < tiles <= FEW_TILES else HELD_TILE,
                FEW_TILES=FEW_TILES,
                ROWS_TILE=min(ROWS_TILE, triton.next_power_of_2(most_pages * unit)),
                num_warps=warps,
                **chained(score),
            )
    return Selection(rows, used)


def _view(kv: KV) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
    """Table and its stride, first token, start and length; what is not there is stood in for."""
    start, length = kv.start.contiguous(), kv.length.contiguous()
    table = start if kv.table is None else kv.table
    return table, table.stride(0), start if kv.origin is None else kv.origin.contiguous(), start, length


@triton.jit
def _limits(origin, start, length, b, ORIGIN: tl.constexpr):
    """Row of the first token, first row of the view, and one past the last, as int32."""
    first = tl.load(origin + b).to(tl.int32) if ORIGIN else tl.zeros((), tl.int32)
    begin = tl.load(start + b).to(tl.int32)
    return first, begin, begin + tl.load(length + b).to(tl.int32)


@triton.jit
def _extend(
    k, bounds, table, table_stride, origin, start, length, done, heads,
    k_0, k_1, k_head, side_0, side_head, side_slot, side_half,
    UNIT: tl.constexpr, STEP: tl.constexpr, PAGE: tl.constexpr, ORIGIN: tl.constexpr, PAGES: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Bounds of ``PAGES`` Quest pages of one KV head."""
    wait_for_previous(CHAINED)
    b, tile = tl.program_id(1), tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    first, begin, end = _limits(origin, start, length, b, ORIGIN)
    new = tl.maximum(tl.load(done + b).to(tl.int32), begin) - first
    earliest = new // UNIT + tile * PAGES
    if (begin < end) & (first + earliest * UNIT < end):
        page = earliest + tl.arange(0, PAGES)
        row = first + page * UNIT
        kept = (row < end) & (row + UNIT > begin)
        dim = tl.arange(0, D_PAD)
        low = tl.full((PAGES, D_PAD), float("inf"), tl.float32)
        high = tl.full((PAGES, D_PAD), float("-inf"), tl.float32)
        for step in range(0, UNIT, STEP):
            for u in tl.static_range(STEP):
                rows = row + step + u
                seen = (rows >= begin) & (rows < end)
                at = row_offsets(rows, seen, b, table, table_stride, k_0, k_1, PAGE) + head * k_head
                x = tl.load(k + at[:, None] + dim[None, :], mask=seen[:, None] & (dim[None, :] < D), other=0.0)
                x = x.to(tl.float32)
                low = tl.minimum(low, tl.where(seen[:, None], x, float("inf")))
                high = tl.maximum(high, tl.where(seen[:, None], x, float("-inf")))
        at = row_offsets(page, kept, b, table, table_stride, side_0, side_slot, PAGE // UNIT) + head * side_head
        out = bounds + at[:, None] + dim[None, :]
        kept = kept[:, None] & (dim[None, :] < D)
        tl.store(out, low.to(bounds.dtype.element_ty), mask=kept)
        tl.store(out + side_half, high.to(bounds.dtype.element_ty), mask=kept)


@triton.jit
def _score(
    q, bounds, score, lse, table, table_stride, origin, start, length,
    kv_heads, parts, scale, q_b, q_head, side_0, side_head, side_slot, side_half,
    UNIT: tl.constexpr, PAGE: tl.constexpr, ORIGIN: tl.constexpr, PAGES: tl.constexpr, TILE: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDEN: tl.constexpr,
    STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Scores of parts of ``PAGES`` Quest pages for the heads of a group, a tile at a time while later ones are being
    loaded; the two bounds of a page are one row of a product."""
    b, kv_head = tl.program_id(1) // kv_heads, (tl.program_id(1) % kv_heads).to(tl.int64)
    bounds += kv_head * side_head
    wait_for_previous(CHAINED)
    first, begin, end = _limits(origin, start, length, b, ORIGIN)
    g = tl.arange(0, G_PAD)
    head = (b * kv_heads + kv_head) * G + g  # int64: kv_head is
    both = tl.arange(0, 2 * D_PAD)
    half, dim = both // D_PAD, both % D_PAD
    where = q + b.to(tl.int64) * q_b + (kv_head * G + g)[:, None] * q_head + dim[None, :]
    x = tl.load(where, mask=(g[:, None] < G) & (dim[None, :] < D), other=0.0)
    x = tl.where((x > 0) == (half[None, :] == 1), x, tl.zeros_like(x))  # minima for what is negative
    if WIDEN:
        x = x.to(tl.float32)
    x = x.T
    pages = tl.where(begin < end, (end - first + UNIT - 1) // UNIT, 0)  # up to the last that has a row
    for part in range(tl.program_id(0), tl.minimum((pages + PAGES - 1) // PAGES, parts), tl.num_programs(0)):
        peak = tl.full((G_PAD,), LOWEST, tl.float32)
        mass = tl.zeros((G_PAD,), tl.float32)
        for i in tl.range(part * PAGES, tl.minimum((part + 1) * PAGES, pages), TILE, num_stages=STAGES):
            page = i + tl.arange(0, TILE)
            row = first + page * UNIT
            kept = (row < end) & (row + UNIT > begin)
            at = row_offsets(page, kept, b, table, table_stride, side_0, side_slot, PAGE // UNIT)
            at = bounds + at[:, None] + (half * side_half + dim)[None, :]
            bound = tl.load(at, mask=kept[:, None] & (dim[None, :] < D), other=0.0)
            if WIDEN:
                bound = bound.to(tl.float32)
            z = tl.dot(bound, x, input_precision="tf32x3") * scale  # fp32 by "ieee" would overflow the registers
            z = tl.where(kept[:, None], z, float("-inf"))
            tl.store(score + head[None, :] * parts * PAGES + page[:, None], z, mask=(g < G)[None, :])
            higher = tl.maximum(tl.max(z, 0), peak)
            mass = mass * tl.exp2((peak - higher) * LOG2E) + tl.sum(tl.exp2((z - higher[None, :]) * LOG2E), 0)
            peak = higher
        alike = lse + (b.to(tl.int64) * parts + part) * kv_heads * G + kv_head * G + g
        tl.store(alike, tl.where(mass > 0, peak + tl.log2(mass) * LN2, float("-inf")), mask=g < G)


@triton.jit
def _values(
    score, shift, from_page, low, high, pitch,
    SHARED: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What ``TILE`` pages count with: their score, or the sum over a group's heads of the softmax weights."""
    page = from_page + tl.arange(0, TILE)
    if SHARED:
        value, peak = tl.zeros((TILE,), tl.float32), tl.full((TILE,), float("-inf"), tl.float32)
        for g in tl.static_range(G):
            own = tl.sum(tl.where(tl.arange(0, G_PAD) == g, shift, 0.0))
            x = tl.load(score + g * pitch + page, mask=page < high, other=float("-inf"))
            value += tl.exp2(x * LOG2E - own)
            peak = tl.maximum(peak, x)
        # their logarithms, of which the threshold is found in fewer steps
        value = tl.where(peak > float("-inf"), tl.log2(tl.maximum(value, 1e-37)), float("-inf"))
    else:
        value = tl.load(score + page, mask=page < high, other=float("-inf"))
    return tl.where((page >= low) & (page < high), value, float("-inf"))


@triton.jit
def _shifts(lse, parts, lse_head, lse_part, G: tl.constexpr, G_PAD: tl.constexpr, PARTS: tl.constexpr):
    """Log2 of the summed weights of each head of a group."""
    part, g = tl.arange(0, PARTS)[:, None], tl.arange(0, G_PAD)[None, :]  # so that a thread has all heads
    x = tl.load(lse + part * lse_part + g * lse_head, mask=(g < G) & (part < parts), other=float("-inf")) * LOG2E
    peak = tl.maximum(tl.max(x, 0), LOWEST)
    return peak + tl.log2(tl.maximum(tl.sum(tl.exp2(x - peak[None, :]), 0), 1e-30))


@triton.jit
def _wanted(count, b, length, share, more, UNIT: tl.constexpr, QUOTA: tl.constexpr):
    """Pages to choose."""
    if QUOTA:
        keys = (share * length.to(tl.float32)).to(tl.int32) + more
        pages = tl.maximum(tl.minimum(tl.maximum(keys, 1), length) // UNIT, 1)
    else:
        pages = tl.load(count + b).to(tl.int32)
    return pages


@triton.jit
def _best(
    view, row, best, wanted,
    SHARED: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the best pages in ascending order, and return how many they are; ``row`` has room for what all count with,
    where no tiles are held."""
    score, shift, low, high, pitch = view
    keys = ()
    if TILES > 0:
        for i in tl.static_range(TILES):
            value = _values(score, shift, i * TILE, low, high, pitch, SHARED, G, G_PAD, TILE)
            keys = keys + (keys_of(value, i * TILE + tl.arange(0, TILE) < high),)  # type: ignore[assignment]  # noqa: RUF005
    else:
        for from_page in range(0, high, TILE):
            value = _values(score, shift, from_page, low, high, pitch, SHARED, G, G_PAD, TILE)
            page = from_page + tl.arange(0, TILE)
            tl.store(row + page, value, mask=page < high)
        tl.debug_barrier()
    least, tie, room, number = cut(keys, row, high, wanted, TILE, TILES)
    write_chosen(keys, row, high, best, least, tie, room, TILE, TILES)
    return number


@triton.jit
def _top(
    score, lse, values, best, rows, used, origin, start, length,
    count, share, more, heads, pitch, most, parts, lse_b, lse_head, lse_part,
    LSE_PAGES: tl.constexpr, UNIT: tl.constexpr, ORIGIN: tl.constexpr, QUOTA: tl.constexpr, SHARED: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, FEW: tl.constexpr, FEW_TILES: tl.constexpr, ROWS_TILE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Pages, then rows, of one KV head or query head."""
    wait_for_previous(CHAINED)
    at = tl.program_id(0).to(tl.int64)
    b = tl.program_id(0) // heads
    first, begin, end = _limits(origin, start, length, b, ORIGIN)
    low = (begin - first) // UNIT
    high = tl.minimum(tl.where(begin < end, (end - first + UNIT - 1) // UNIT, low), pitch)
    wanted = tl.minimum(_wanted(count, b, end - begin, share, more, UNIT, QUOTA), most)
    score += at * G * pitch
    if SHARED:
        lse += b.to(tl.int64) * lse_b + (tl.program_id(0) % heads) * G * lse_head
        parts = tl.minimum(parts, (high + LSE_PAGES - 1) // LSE_PAGES)
        shift = _shifts(lse, parts, lse_head, lse_part, G, G_PAD, PARTS)
    else:
        shift = 0.0
    row = score
    if TILES == 0:
        row = values + at * pitch
    best += at * most
    view = (score, shift, low, high, pitch)
    if FEW == 0:
        number = _best(view, row, best, wanted, SHARED, G, G_PAD, TILE, TILES)
    elif high <= FEW:
        number = _best(view, row, best, wanted, SHARED, G, G_PAD, FEW, 1)
    elif high <= FEW * FEW_TILES:
        number = _best(view, row, best, wanted, SHARED, G, G_PAD, FEW, FEW_TILES)
    else:
        number = _best(view, row, best, wanted, SHARED, G, G_PAD, TILE, TILES)
    tl.debug_barrier()  # other threads wrote the pages
    earliest = tl.load(best, mask=number > 0, other=0)
    latest = tl.load(best + number - 1, mask=number > 0, other=0)
    lead = tl.maximum(begin - first - earliest * UNIT, 0)
    tail = tl.maximum(first + (latest + 1) * UNIT - end, 0)
    total = tl.where(number > 0, number * UNIT - lead - tail, 0)
    rows += at * most * UNIT
    for i in range(0, total, ROWS_TILE):
        slot = i + tl.arange(0, ROWS_TILE)
        written = slot < total
        found = tl.load(best + (slot + lead) // UNIT, mask=written, other=0)
        tl.store(rows + slot, first + found * UNIT + (slot + lead) % UNIT, mask=written)
    tl.store(used + at, total)
