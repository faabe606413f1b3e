"""Triton kernels behind ``keysift.ops.key_codes.sample``. The first scores a few tokens, the second finds from them
what brings probabilities to the quota, the third reads all codes and takes rows block by block, and the last closes up
the lists, which is where it is known how many rows there are. No score of the third is ever stored.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops import key_codes
from keysift.ops.chain_triton import chained, wait_for_previous
from keysift.ops.key_codes import Draw, Probe, pitch_of
from keysift.ops.key_codes_triton import entries, lines_of_group, middle, probe, scores, shapes, view
from keysift.ops.pages import Quota
from keysift.ops.paging_triton import programs
from keysift.ops.random_triton import absorb
from keysift.types import KV, Selection

SAMPLE = tl.constexpr(key_codes.SAMPLE)
BLOCK, ONE, THINNING = (tl.constexpr(x) for x in (key_codes.BLOCK, key_codes.ONE, key_codes.THINNING))
ONE_BITS = tl.constexpr(key_codes.ONE.bit_length() - 1)
ALL = tl.constexpr(key_codes.ALL)
LN2 = tl.constexpr(0.6931471805599453)
SCORED = 128  # sampled tokens of a program; where there are many programs, twice as many
MANY_SCORED = 4096
SOLVE_WARPS = 8
RESIDENT = 1188  # programs that take rows at the same time on a large GPU
MOST_BLOCKS = 8  # blocks of one of them, so that the last do not end late; more if MOST_TAKING says so
TAKE_STAGES = 5
MOST_TAKING = 65536  # programs that take at all: most of so many have no block, where a bound allows for far more
CLOSED_UP, CLOSED_TILE = 64, 512  # programs that close up a list at most, and rows of a tile
MOST_CLOSING = 8192  # that close up all lists, if one for each is not more
NEWTON = tl.constexpr(40)  # steps in which a draw's factor is found, at most


@triton.jit
def _step(begin, end, ROW: tl.constexpr):
    """One run of ROW tokens in so many is sampled; as ``keysift.ops.key_codes.sampled`` says."""
    return tl.maximum((end - 1) // ROW - begin // ROW, 0) // (SAMPLE // ROW - 1) + 1


@triton.jit
def _count(
    out, weights, line, codes, size, start, length, origin, table, table_stride, heads, codes_pitch, size_pitch,
    tokens, pitch, G: tl.constexpr, G_PAD: tl.constexpr, PER: tl.constexpr, CODE: tl.constexpr, FIELDS: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, HAS_ORIGIN: tl.constexpr, EVERY: tl.constexpr, INTERPRET: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Scores of sampled tokens, ``out[b, h, :pitch]``, -inf where there is none; with EVERY of all, by token."""
    wait_for_previous(CHAINED)
    BYTES: tl.constexpr = CODE // FIELDS
    head, b = tl.program_id(1), tl.program_id(2)
    begin, end = middle(start, length, origin, b, HAS_ORIGIN)
    h = (b * heads + head).to(tl.int64) * G
    i = tl.program_id(0) * (TILE // PER) + tl.arange(0, TILE // PER)
    if EVERY:
        t = i * PER
    else:
        step = _step(begin, end, PER)
        run = begin // PER // step + i
        scattered = ((run.to(tl.uint32) * 0x9E3779B1) >> 12).to(tl.int32)
        t = (run * step + scattered % step) * PER
    r, k, g = tl.arange(0, PER), tl.arange(0, PER * BYTES), tl.arange(0, G_PAD)
    seen = (t + PER > begin) & (t < end)
    entry = entries(t, seen, (b, head, codes_pitch, table, table_stride, tokens), PAGE)
    inside = seen[:, None] & (t[:, None] + k[None, :] // BYTES < end)
    code = tl.load(codes + entry[:, None] * BYTES + k[None, :], mask=inside, other=0)
    entry = entries(t, seen, (b, head, size_pitch, table, table_stride, tokens), PAGE)
    each = t[:, None] + r[None, :]
    inside = (each >= begin) & (each < end)
    of_code = tl.load(size + entry[:, None] + r[None, :], mask=inside, other=0.0).to(tl.float32)
    value = scores(code, lines_of_group(weights, line, h, G, G_PAD, PER, CODE, FIELDS), FIELDS, INTERPRET)
    value = tl.reshape(value, (TILE // PER, PER, G_PAD)) * of_code[:, :, None]
    value = tl.where(inside[:, :, None], value * LN2 if EVERY else value, float("-inf"))
    slot = i[:, None] * PER + r[None, :]
    to = out + (h + g)[None, None, :] * pitch + slot[:, :, None]
    tl.store(to, value, mask=(slot < pitch)[:, :, None] & (g < G)[None, None, :])


@triton.jit
def _wanted(share, more, count):
    """Rows that a quota wants of so many, fp32."""
    wanted = (share * count.to(tl.float32)).to(tl.int32) + more
    return tl.minimum(tl.maximum(wanted, 1), count).to(tl.float32)


@triton.jit
def _both(a, b, c, d):
    """Two sums in one reduction."""
    return a + c, b + d


@triton.jit
def _solve(
    log_c, known, length, share, more, lists, pitch,
    G: tl.constexpr, G_PAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Log2 of the factors of the heads that share a list: see ``log_factors_reference``.

    Newton's steps on a sum that is concave in the factor: they come from below, and the last is exact.
    """
    wait_for_previous(CHAINED)
    at, b = tl.program_id(0), tl.program_id(1)
    count = tl.load(length + b).to(tl.int32)
    wanted = _wanted(share, more, count)
    h = (b * lists + at).to(tl.int64) * G
    i, g = tl.arange(0, SAMPLE)[:, None], tl.arange(0, G_PAD)[None, :]
    score = tl.load(known + (h + g) * pitch + i, mask=(i < pitch) & (g < G), other=float("-inf"))
    top = tl.maximum(tl.max(score, 0), -ALL)
    weight = tl.exp2(score - top[None, :])
    total = tl.maximum(tl.sum(weight, 0), 1e-30)
    some = tl.max(score, 1) > float("-inf")
    x = tl.where(some, tl.maximum(tl.sum(weight * (1 / total)[None, :], 1), 1e-30), 0.0)
    held, mass = tl.reduce((some.to(tl.float32), x), 0, _both)
    target = wanted / tl.maximum(count, 1).to(tl.float32) * held
    f = target / tl.maximum(mass, 1e-30)
    before = f * 0
    turns = 0
    while (f > before * 1.000001) & (turns < NEWTON):
        certain = f * x >= 1
        before = f
        taken, rest = tl.reduce((certain.to(tl.float32), tl.where(certain, 0.0, x)), 0, _both)
        f = tl.minimum(tl.maximum(target - taken, 0.0) / tl.maximum(rest, 1e-30), 1e30)
        turns += 1
    log_f = tl.log2(tl.maximum(tl.maximum(f, before), 1e-30))
    to = log_c + h + tl.arange(0, G_PAD)
    out = tl.where(wanted >= count.to(tl.float32), ALL, log_f - top - tl.log2(total))
    tl.store(to, out, mask=tl.arange(0, G_PAD) < G)


@triton.jit
def _blocks(begin, end):
    """First block of a view, and one past its last; none if it is empty."""
    return begin // BLOCK, tl.where(begin < end, tl.cdiv(end, BLOCK), 0)


@triton.jit
def _of_query(state, at, positions, b):
    """What the random numbers of a query's draw continue from."""
    return absorb(absorb(state.to(tl.uint32), at), tl.load(positions + b))


@triton.jit
def _pages(tile, stop, place, begin, end, PAGE: tl.constexpr, RUN: tl.constexpr, PAGES: tl.constexpr):
    """Where the runs of a block lie, of RUN tokens in one piece each: in paged side data in units of RUN entries, which
    tells the compiler what they are multiples of."""
    b, head, heads, table, table_stride, size = place
    out = ()
    for n in tl.static_range(PAGES):
        t = tile * BLOCK + n * RUN
        if PAGE > 0:
            exists = (tile < stop) & (t < end) & (t + RUN > begin)
            page = tl.load(table + b * table_stride + t // PAGE, mask=exists, other=0).to(tl.int64)
            out = out + ((page * heads + head) * (PAGE // RUN) + t % PAGE // RUN,)  # type: ignore[assignment]  # noqa: RUF005
        else:
            out = out + ((b.to(tl.int64) * heads + head) * size + t,)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def _entries_of(pages, at, tile, place, begin, end, PAGE: tl.constexpr, RUN: tl.constexpr, PAGES: tl.constexpr):
    """Entries of the tokens ``at`` of a block."""
    if PAGES == 0:  # pages so small that each token looks its own up
        t = tile * BLOCK + at
        return entries(t, (t // PAGE >= begin // PAGE) & (t < end), place, PAGE)
    else:
        base = pages[0]
        for n in tl.static_range(1, PAGES):
            base = tl.where(at >= n * RUN, pages[n], base)
        return base * (RUN if PAGE > 0 else 1) + at % RUN


@triton.jit
def _sizes(
    size, tile, stop, place, begin, end, PAGE: tl.constexpr, RUN: tl.constexpr, PAGES: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    pages = _pages(tile, stop, place, begin, end, PAGE, RUN, PAGES)
    entry = _entries_of(pages, i, tile, place, begin, end, PAGE, RUN, PAGES)
    if EVEN:
        return tl.load(size + entry)
    else:
        t = tile * BLOCK + i
        return tl.load(size + entry, mask=(tile < stop) & (t >= begin) & (t < end), other=0.0)


@triton.jit
def _take_from(slots, counts, sums, u, own, inside, to, INDEPENDENT: tl.constexpr):
    """Take from a block with the probabilities ``u`` for the list at ``to``."""
    i = tl.arange(0, BLOCK)
    unit = tl.where(inside, tl.maximum((tl.minimum(u, 1.0) * ONE).to(tl.int32), 1), 0)
    total = tl.sum(unit, 0)
    if INDEPENDENT:
        taken = (absorb(own, i) >> (32 - ONE_BITS)).to(tl.int32) < unit
        rank = tl.cumsum(taken.to(tl.int32), 0) - 1
        count = tl.sum(taken.to(tl.int32), 0)
    else:  # sums are exact: the running sum passes a whole number at a token with just its probability
        r = (own >> (32 - ONE_BITS)).to(tl.int32)
        running = tl.cumsum(unit, 0) + r
        taken = (running & (ONE - 1)) < unit
        rank = (running >> ONE_BITS) - 1
        count = (total + r) >> ONE_BITS
    # so that a thread holds four neighbours, which the sum over them likes; masked, they are still stored one by one
    at = tl.max_contiguous(tl.multiple_of(to * BLOCK + rank, 8), 8)
    tl.store(slots + at, (unit << 8) + i, mask=taken)
    tl.store(counts + to, count)
    tl.store(sums + to, total)


@triton.jit(do_not_specialize=["state", "each"])
def _take(
    slots, counts, sums, weights, line, log_c, codes, size, positions, state, numbered, start, length, origin, table,
    table_stride, heads, codes_pitch, size_pitch, tokens, blocks, each,
    G: tl.constexpr, G_PAD: tl.constexpr, PER: tl.constexpr, CODE: tl.constexpr, FIELDS: tl.constexpr,
    LISTS: tl.constexpr, INDEPENDENT: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr, PAGES: tl.constexpr,
    EVEN: tl.constexpr, HAS_ORIGIN: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Rows of ``each`` blocks of one KV head, ascending, in slots of the block's own: probability and place in it."""
    wait_for_previous(CHAINED)
    BYTES: tl.constexpr = CODE // FIELDS
    ROWS: tl.constexpr = BLOCK // PER
    head, b = tl.program_id(1), tl.program_id(2)
    begin, end = middle(start, length, origin, b, HAS_ORIGIN)
    place = (b, head, codes_pitch, table, table_stride, tokens)
    of_size = (b, head, size_pitch, table, table_stride, tokens)
    at = (b * heads + head).to(tl.int64)
    low, high = _blocks(begin, end)
    first = tl.program_id(0) * each
    low, high = tl.maximum(low, first), tl.minimum(high, first + each)
    if low < high:
        query = lines_of_group(weights, line, at * G, G, G_PAD, PER, CODE, FIELDS)
        row, k, g = tl.arange(0, ROWS), tl.arange(0, PER * BYTES), tl.arange(0, G_PAD)
        factor = tl.load(log_c + at * G + g, mask=g < G, other=float("-inf"))
        of_query = ()
        for c in tl.static_range(LISTS):
            of_query = of_query + (_of_query(state, numbered + head * LISTS + c, positions, b),)  # type: ignore[assignment]  # noqa: RUF005
        # sizes, too narrow for the pipeline of copies, are read a turn ahead
        of_code = _sizes(size, low, high, of_size, begin, end, PAGE, RUN, PAGES, EVEN)
        for tile in tl.range(low, high, num_stages=STAGES):
            following = _sizes(size, tile + 1, high, of_size, begin, end, PAGE, RUN, PAGES, EVEN)
            pages = _pages(tile, high, place, begin, end, PAGE, RUN, PAGES)
            entry = _entries_of(pages, row * PER, tile, place, begin, end, PAGE, RUN, PAGES)
            where = codes + entry[:, None] * BYTES + k[None, :]
            if EVEN:
                code = tl.load(where)
            else:
                t = tile * BLOCK + row[:, None] * PER + k[None, :] // BYTES
                code = tl.load(where, mask=(t >= begin) & (t < end), other=0)
            value = tl.reshape(scores(code, query, FIELDS, INTERPRET), (ROWS, PER, G_PAD))
            scale = tl.reshape(of_code.to(tl.float32), (ROWS, PER))
            u = tl.exp2(value * scale[:, :, None] + factor[None, None, :])
            i = tile * BLOCK + tl.arange(0, BLOCK)
            inside = (i >= begin) & (i < end)
            for c in tl.static_range(LISTS):
                own = absorb(of_query[c], low * 0 + tile)  # a tensor for the interpreter, too
                mine = u if LISTS == 1 else tl.where((g == c)[None, None, :], u, 0.0)
                mine = tl.reshape(tl.sum(mine, 2), (BLOCK,))
                _take_from(slots, counts, sums, mine, own, inside, (at * LISTS + c) * blocks + tile, INDEPENDENT)
            of_code = following


@triton.jit
def _block_of(ahead, i, HALVINGS: tl.constexpr):
    """In which of ``2**HALVINGS`` blocks the i-th row is, by the rows ``ahead`` of each block."""
    block = i * 0
    for n in tl.static_range(HALVINGS):
        further = block + (1 << HALVINGS - 1 - n)
        block = tl.where(tl.gather(ahead, further, 0) <= i, further, block)
    return block


@triton.jit(do_not_specialize=["state"])
def _close_up(
    rows, log_w, found, expected, overflow, slots, counts, sums, positions, state, numbered, start, length, origin,
    lists, blocks, most_rows,
    HALVINGS: tl.constexpr, TILE: tl.constexpr, INDEPENDENT: tl.constexpr, HAS_ORIGIN: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Some rows of a list, from the blocks that the counts say; of a draw that is too long, evenly some."""
    wait_for_previous(CHAINED)
    c, b = tl.program_id(1), tl.program_id(2)
    at = (b * lists + c).to(tl.int64)
    begin, end = middle(start, length, origin, b, HAS_ORIGIN)
    low, high = _blocks(begin, end)
    block = tl.arange(0, 1 << HALVINGS)
    seen = (block >= low) & (block < high)
    count = tl.load(counts + at * blocks + block, mask=seen, other=0)
    units = tl.load(sums + at * blocks + block, mask=seen, other=0)
    through = tl.cumsum(count, 0)
    taken = tl.sum(count, 0)
    factor, mean = _thinning(units, tl.load(length + b), most_rows, INDEPENDENT)
    scatter = absorb(_of_query(state, numbered + c, positions, b), c * 0 + THINNING).to(tl.int64)
    if tl.program_id(0) == 0:
        total = (taken * factor + scatter) >> 32
        tl.store(found + at, tl.minimum(total, most_rows).to(tl.int32))
        tl.store(overflow + at, (total > most_rows).to(tl.uint8))
        tl.store(expected + at, mean.to(tl.float32))
    zero = c * 0
    if HAS_ORIGIN:
        zero = tl.load(origin + b).to(tl.int32)
    less = tl.log(factor.to(tl.float32) * 2.3283064365386963e-10)
    ahead = through - count
    for first in range(tl.program_id(0) * TILE, taken, tl.num_programs(0) * TILE):
        i = first + tl.arange(0, TILE)
        own = _block_of(ahead, i, HALVINGS)
        there = i < taken
        entry = tl.load(slots + (at * blocks + own) * BLOCK + i - tl.gather(ahead, own, 0), mask=there, other=0)
        place = i.to(tl.int64) * factor + scatter
        kept = there & ((place + factor) >> 32 != place >> 32) & (place >> 32 < most_rows)
        to = at * most_rows + (place >> 32)
        tl.store(rows + to, zero + own * BLOCK + (entry & 255), mask=kept)
        u = tl.maximum(entry >> 8, 1).to(tl.float32) / ONE
        tl.store(log_w + to, -tl.log(u) - less, mask=kept)


@triton.jit
def _thinning(units, length, most_rows, INDEPENDENT: tl.constexpr):
    """``keysift.ops.key_codes.thinning``."""
    total = tl.sum(units.to(tl.int64), 0).to(tl.float64) / ONE
    if INDEPENDENT:
        variance = total
    else:
        fraction = (units & (ONE - 1)).to(tl.float64) / ONE
        variance = tl.sum(fraction * (1 - fraction), 0)
    likely = tl.minimum(total + 6 * tl.sqrt(variance) + 1, length.to(tl.float64))
    share = tl.where(
        likely <= most_rows, total * 0 + 1, tl.maximum(most_rows - 1, 0).to(tl.float64) / tl.maximum(likely, 1)
    )
    return tl.maximum((share * 4294967296.0).to(tl.int64), 1), total * share


def sample(
    q: Tensor,
    codes: Tensor,
    size: Tensor,
    kv: KV,
    mean: Tensor,
    w: Tensor,
    planes: int,
    scale: float,
    quota: Quota,
    state: int,
    positions: Tensor,
    most_rows: int,
    per: str,
    independent: bool,
    first_head: int,
    new: Tensor | None,
) -> Draw:
    """``keysift.ops.key_codes.sample`` in five launches."""
    of_query = probe(q, w, planes, scale, None if new is None else (codes, size, kv, mean, new))
    heads, kv_heads = q.shape[1], w.shape[0]
    lists = kv_heads if per == "kv_head" else heads
    log_c = factors(of_query, codes, size, kv, planes, quota, lists)
    return draw(of_query, log_c, codes, size, kv, planes, state, positions, most_rows, lists, independent, first_head)


def estimate(q: Tensor, codes: Tensor, size: Tensor, kv: KV, w: Tensor, planes: int, scale: float) -> Tensor:
    """``keysift.ops.key_codes.estimate`` in two launches."""
    return _scored(probe(q, w, planes, scale), codes, size, kv, planes, kv.bound, every=True)


def _scored(of_query: Probe, codes: Tensor, size: Tensor, kv: KV, planes: int, pitch: int, every: bool) -> Tensor:
    (batch, heads, _), kv_heads = of_query.weights.shape, codes.shape[1]
    out = torch.empty(batch, heads, pitch, dtype=torch.float32, device=codes.device)
    shape = shapes(heads // kv_heads, codes, planes)
    tile = max(SCORED * (2 if batch * kv_heads * pitch > MANY_SCORED * SCORED else 1), 16 * shape["PER"])
    if out.numel():
        with torch.cuda.device_of(codes):
            _count[(triton.cdiv(pitch, tile), kv_heads, batch)](
                *(out, *of_query, codes, size, *view(kv)),
                *(kv_heads, pitch_of(codes), pitch_of(size), codes.shape[2], pitch),
                **shape,
                TILE=tile,
                PAGE=0 if kv.table is None else codes.shape[2],
                HAS_ORIGIN=kv.origin is not None,
                EVERY=every,
                INTERPRET=triton.knobs.runtime.interpret,
                num_warps=2,
                **chained(codes),
            )
    return out


def factors(of_query: Probe, codes: Tensor, size: Tensor, kv: KV, planes: int, quota: Quota, lists: int) -> Tensor:
    """Log2 of the factors of a draw, fp32 ``[B, H]``, in two launches."""
    batch, heads, _ = of_query.weights.shape
    row = shapes(heads // codes.shape[1], codes, planes)["PER"]
    # divisible alike at any bound, so that sums are the same in any batch
    pitch = -(-min(max(kv.bound, 1), SAMPLE.value) // (16 * row)) * 16 * row
    known = _scored(of_query, codes, size, kv, planes, pitch, every=False)
    log_c = torch.empty(batch, heads, dtype=torch.float32, device=codes.device)
    if batch:
        with torch.cuda.device_of(codes):
            _solve[(lists, batch)](
                *(log_c, known, kv.length.contiguous(), quota.share, quota.keys, lists, pitch),
                G=heads // lists,
                G_PAD=triton.next_power_of_2(heads // lists),
                num_warps=SOLVE_WARPS,
                **chained(codes),
            )
    return log_c


def draw(
    of_query: Probe,
    log_c: Tensor,
    codes: Tensor,
    size: Tensor,
    kv: KV,
    planes: int,
    state: int,
    positions: Tensor,
    most_rows: int,
    lists: int,
    independent: bool,
    first_head: int = 0,
) -> Draw:
    """``keysift.ops.key_codes.draw_reference`` of the scores that codes estimate, in two launches."""
    batch, kv_heads, tokens = len(log_c), *codes.shape[1:3]
    blocks = max(1, triton.cdiv(kv.bound, BLOCK.value))

    def empty(*tail: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(batch, lists, *tail, dtype=dtype, device=codes.device)

    rows, log_w, found = empty(most_rows), empty(most_rows, dtype=torch.float32), empty()
    expected, overflow = empty(dtype=torch.float32), empty(dtype=torch.bool)
    slots, counts, sums = empty(blocks, BLOCK.value), empty(blocks), empty(blocks)
    state -= (state >> 31) << 32  # as int32
    numbered = first_head * lists // kv_heads
    positions, place = positions.contiguous(), view(kv)
    page = 0 if kv.table is None else tokens
    run = min(page or BLOCK.value, BLOCK.value)
    work = blocks * kv_heads * batch
    each = max(1, min(MOST_BLOCKS, triton.cdiv(work, RESIDENT)), triton.cdiv(work, MOST_TAKING))
    with torch.cuda.device_of(codes):
        _take[(triton.cdiv(blocks, each), kv_heads, batch)](
            *(slots, counts, sums, *of_query, log_c, codes, size, positions, state, numbered, *place),
            *(kv_heads, pitch_of(codes), pitch_of(size), tokens, blocks, each),
            **shapes(log_c.shape[1] // kv_heads, codes, planes),
            LISTS=lists // kv_heads,
            INDEPENDENT=independent,
            PAGE=page,
            RUN=run,
            PAGES=BLOCK.value // run if run >= 64 else 0,
            EVEN=page >= 64 or (not page and tokens % BLOCK.value == 0),
            HAS_ORIGIN=kv.origin is not None,
            STAGES=TAKE_STAGES,
            INTERPRET=triton.knobs.runtime.interpret,
            num_warps=1,
            **chained(codes),
        )
        tiles = min(CLOSED_UP, triton.cdiv(most_rows, CLOSED_TILE))
        _close_up[(programs(tiles, lists * batch, MOST_CLOSING), lists, batch)](
            *(rows, log_w, found, expected, overflow.view(torch.uint8), slots, counts, sums),
            *(positions, state, numbered, *place[:3], lists, blocks, most_rows),
            HALVINGS=(blocks - 1).bit_length(),
            TILE=CLOSED_TILE,
            INDEPENDENT=independent,
            HAS_ORIGIN=kv.origin is not None,
            num_warps=4,
            **chained(codes),
        )
    return Draw(Selection(rows, found, log_w), expected, overflow)
