"""Triton kernels that choose the highest entries of rows by a threshold, without sorting them.

A program owns a row. Where it has at most ``WHOLE_ROW`` entries, it keeps them in registers, in as many tiles as it
takes; else it reads them again at every step. A step counts the entries that reach two cuts: the middle of where the
threshold can be, and where the numbers of entries found so far suggest it; the first step looks where it would be if
scores were normal. So no row takes more than 33 steps, and most take about 5.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.select import count_of_rows

WHOLE_ROW = 16384  # entries that a program holds
HELD_TILE, LOOP_TILE = 1024, 8192  # entries of a tile in registers, and of one that is read again
WARPS, MOST_WARPS, WIDE = 8, 16, 10  # of a row; the more from so many tiles on
PACKED = tl.constexpr(5)  # tiles whose places are found in one sum over their threads, in fields of 12 bits
FEWER, MORE = tl.constexpr(0.77), tl.constexpr(1.3)  # of what is wanted, where the search begins
NOTHING = tl.constexpr(-(2**31))  # the key of an entry that is not there: below all others
LOG2E = tl.constexpr(1.4426950408889634)


def tile_of(entries: int) -> tuple[int, int, int]:
    """Entries of a tile, the tiles that a program holds (0 if a row is too long for that), and its warps."""
    if entries > WHOLE_ROW:
        return min(LOOP_TILE, WHOLE_ROW), 0, 32
    tile = min(max(16, triton.next_power_of_2(entries)), HELD_TILE)
    tiles = max(1, triton.cdiv(entries, tile))
    return tile, tiles, MOST_WARPS if tiles > WIDE else max(1, min(WARPS, tile // 64))


def chosen_lists(
    score_BXN: Tensor, count: Tensor | int, most: int, share: float | None = None
) -> tuple[Tensor, Tensor]:
    """``select_top``, or with a share ``select_mass``, in one launch."""
    batch, rows, entries = score_BXN.shape
    score = score_BXN.contiguous()
    wanted = count_of_rows(count, score)
    index = torch.empty(batch, rows, most, dtype=torch.int32, device=score.device)
    used = torch.empty(batch, rows, dtype=torch.int32, device=score.device)
    tile, tiles, warps = tile_of(entries)
    if used.numel():
        with torch.cuda.device_of(score):
            _choose[(batch * rows,)](
                *(score, wanted, *wanted.stride(), index, used, rows, entries, most, 0.0 if share is None else share),
                TILE=tile,
                TILES=tiles,
                MASS=share is not None,
                num_warps=warps,
            )
    return index, used


@triton.jit
def keys_of(score, seen):
    """Integers in the order of fp32 scores; NOTHING for -inf, NaN, and what is not ``seen``."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(seen & (score > float("-inf")), key, NOTHING)


@triton.jit
def _score_of(key):
    """The score that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _loaded(row, start, n, TILE: tl.constexpr):
    at = start + tl.arange(0, TILE)
    return keys_of(tl.load(row + at, mask=at < n, other=float("-inf")), at < n)


@triton.jit
def held(row, n, TILE: tl.constexpr, TILES: tl.constexpr):
    """The keys of a row of ``n`` entries, tile by tile; none where they are too many: ``row`` is read when needed."""
    keys = ()
    for i in tl.static_range(TILES):
        keys = keys + (_loaded(row, i * TILE, n, TILE),)  # type: ignore[assignment]  # noqa: RUF005
    return keys


@triton.jit
def _reach(keys, row, n, x, y, TILE: tl.constexpr, TILES: tl.constexpr):
    """How many keys are at least ``x``, and how many at least ``y``: both counts in one sum."""
    if TILES > 0:
        both = tl.zeros((TILE,), tl.int32)
        for i in tl.static_range(TILES):
            both += (keys[i] >= x).to(tl.int32) + ((keys[i] >= y).to(tl.int32) << 16)
        total = tl.sum(both)
        of_x, of_y = total & 0xFFFF, total >> 16
    else:
        many = tl.zeros((TILE,), tl.int64)
        for start in range(0, n, TILE):
            some = _loaded(row, start, n, TILE)
            many += (some >= x).to(tl.int64) + ((some >= y).to(tl.int64) << 32)
        sums = tl.sum(many)
        of_x, of_y = (sums & 0xFFFFFFFF).to(tl.int32), (sums >> 32).to(tl.int32)
    return of_x, of_y


@triton.jit
def _wider(least, greatest, number, total, square, low, high, more, total_more, square_more):
    """Two spans as one."""
    return tl.minimum(least, low), tl.maximum(greatest, high), number + more, total + total_more, square + square_more


@triton.jit
def _stretched(span, keys):
    """A span, thread by thread, and more keys."""
    least, greatest, number, total, square = span
    there = keys != NOTHING
    score = tl.where(there, _score_of(keys), 0.0)
    return (
        tl.minimum(least, tl.where(there, keys, 0x7FFFFFFF)),
        tl.maximum(greatest, keys),
        number + there.to(tl.int32),
        total + score,
        square + score * score,
    )


@triton.jit
def _span(keys, row, n, TILE: tl.constexpr, TILES: tl.constexpr):
    """The lowest key of an entry, one past the highest (int64), the number of entries, mean and deviation of scores."""
    empty, none = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.float32)
    span = (empty + 0x7FFFFFFF, empty + NOTHING, empty, none, none)
    if TILES > 0:
        for i in tl.static_range(TILES):
            span = _stretched(span, keys[i])
    else:
        for start in range(0, n, TILE):
            span = _stretched(span, _loaded(row, start, n, TILE))
    least, greatest, number, total, square = tl.reduce(span, 0, _wider)
    many = tl.maximum(number, 1).to(tl.float32)
    mean = total / many
    deviation = tl.sqrt(tl.maximum(square / many - mean * mean, 0.0))
    return least.to(tl.int64), greatest.to(tl.int64) + 1, number, mean, deviation


@triton.jit
def _key_near(score):
    """The key of a score that is but a guess, int64."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _guess(low, high, at_low, at_high, wanted):
    """Where the ``wanted`` highest may end, if the logarithm of their number falls evenly with the score."""
    most, least = tl.log2(at_low.to(tl.float32)), tl.log2(tl.maximum(at_high.to(tl.float32), 0.5))
    part = (most - tl.log2(wanted.to(tl.float32))) / (most - least)
    bottom, top = _score_of(low.to(tl.int32)), _score_of(high.to(tl.int32))
    return _key_near(bottom + (top - bottom) * part)


@triton.jit
def _normal(share):
    """How many deviations above its mean a normal variable has so small a share of its mass beyond (Abramowitz and
    Stegun 26.2.23)."""
    t = tl.sqrt(-2 * tl.log(tl.minimum(tl.maximum(tl.minimum(share, 1 - share), 1e-7), 0.5)))
    above = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(share < 0.5, above, -above)


@triton.jit
def cut(keys, row, n, wanted, TILE: tl.constexpr, TILES: tl.constexpr):
    """What parts the ``wanted`` highest keys from the others.

    Returns:
        (least, tie, room, number): chosen are the keys from ``least`` on, and the first ``room`` of those that equal
        ``tie``, which is lower; ``number`` of them in all, as many as there are if that is less than wanted.
    """
    low, high, at_low, mean, deviation = _span(keys, row, n, TILE, TILES)
    at_high = at_low * 0
    wanted = tl.maximum(tl.minimum(wanted, at_low), 0)
    low = tl.where(wanted > 0, low, high)  # nothing is wanted: the loop does not run
    share = wanted.to(tl.float32) / tl.maximum(at_low, 1).to(tl.float32)
    first = _key_near(mean + deviation * _normal(share * FEWER))  # as if scores were normal, and a little off
    second = _key_near(mean + deviation * _normal(share * MORE))
    while (high - low > 1) & (at_low > wanted):
        x = tl.minimum(tl.maximum(tl.minimum(first, second), low + 1), high - 1)
        y = tl.minimum(tl.maximum(tl.maximum(first, second), low + 1), high - 1)
        of_x, of_y = _reach(keys, row, n, x.to(tl.int32), y.to(tl.int32), TILE, TILES)
        up = of_y >= wanted
        between = of_x >= wanted
        at_high = tl.where(up, at_high, tl.where(between, of_y, of_x))
        high = tl.where(up, high, tl.where(between, y, x))
        at_low = tl.where(up, of_y, tl.where(between, of_x, at_low))
        low = tl.where(up, y, tl.where(between, x, low))
        first, second = low + (high - low) // 2, _guess(low, high, at_low, at_high, wanted)
    exact = at_low == wanted
    least = tl.where(exact, low, high).to(tl.int32)
    return least, low.to(tl.int32), tl.where(exact | (wanted == 0), 0, wanted - at_high), wanted


@triton.jit
def _summed(flags, first: tl.constexpr, TILES: tl.constexpr):
    """Running sums of up to ``PACKED`` tiles of flags from ``first`` on, a field of 12 bits each, and their totals."""
    packed = flags[first].to(tl.int64)
    for i in tl.static_range(first + 1, min(first + PACKED, TILES)):
        packed += flags[i].to(tl.int64) << 12 * (i - first)
    return tl.cumsum(packed, 0), tl.sum(packed)


@triton.jit
def _ranks(flags, TILES: tl.constexpr):
    """How many of the flags up to each one are set, it included, tile by tile; and how many in all."""
    ranks = ()
    before = tl.zeros((), tl.int32)
    for first in tl.static_range(0, TILES, PACKED):
        running, total = _summed(flags, first, TILES)
        for i in tl.static_range(first, min(first + PACKED, TILES)):
            ranks = ranks + (before + (running >> 12 * (i - first) & 0xFFF).to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005
            before += (total >> 12 * (i - first) & 0xFFF).to(tl.int32)
    return ranks, before


@triton.jit
def _chosen(keys, least, tie, room, TILES: tl.constexpr):
    """Flags of the keys from ``least`` on, and of the first ``room`` of those that equal ``tie``."""
    flags = ()
    for i in tl.static_range(TILES):
        flags = flags + ((keys[i] >= least).to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005
    if room > 0:
        equal = ()
        for i in tl.static_range(TILES):
            equal = equal + ((keys[i] == tie).to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005
        rank, _ = _ranks(equal, TILES)
        more = ()
        for i in tl.static_range(TILES):
            more = more + (flags[i] + tl.where(rank[i] <= room, equal[i], 0),)  # type: ignore[assignment]  # noqa: RUF005
        flags = more
    return flags


@triton.jit
def _mark(keys, start, out, least, tie, room, taken, tied):
    """Write the indices of the chosen among keys that follow ``taken`` chosen and ``tied`` equal ones."""
    chosen = (keys >= least).to(tl.int32)
    if room > 0:
        equal = (keys == tie).to(tl.int32)
        rank = tied + tl.cumsum(equal, 0)
        chosen += ((equal != 0) & (rank <= room)).to(tl.int32)
        tied += tl.sum(equal)
    ahead = tl.cumsum(chosen, 0)
    tl.store(out + taken + ahead - 1, start + tl.arange(0, keys.shape[0]), mask=chosen != 0)
    return taken + tl.sum(chosen), tied


@triton.jit
def write_chosen(keys, row, n, out, least, tie, room, TILE: tl.constexpr, TILES: tl.constexpr):
    """The chosen indices in ascending order, from ``out`` on."""
    if TILES > 0:
        flags = _chosen(keys, least, tie, room, TILES)
        ranks, _ = _ranks(flags, TILES)
        for i in tl.static_range(TILES):
            tl.store(out + ranks[i] - 1, i * TILE + tl.arange(0, TILE), mask=flags[i] != 0)
    else:
        taken, tied = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        for start in range(0, n, TILE):
            taken, tied = _mark(_loaded(row, start, n, TILE), start, out, least, tie, room, taken, tied)


@triton.jit
def _weights(key, highest):
    """Weights against that of the highest key, fp32; 0 for NOTHING."""
    equal = key == highest  # +inf among them
    weight = tl.where(equal, 1.0, tl.exp2((_score_of(key) - _score_of(highest.to(tl.int32))) * LOG2E))
    return tl.where(key == NOTHING, 0.0, weight)


@triton.jit
def _mass(keys, weight, row, n, least, highest, TILE: tl.constexpr, TILES: tl.constexpr):
    """Summed weight and number of the keys from ``least`` on.

    The order of the additions does not depend on ``least``, so more entries never add up to less.
    """
    masses, counts = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
    if TILES > 0:
        for i in tl.static_range(TILES):
            masses += tl.where(keys[i] >= least, weight[i], 0.0)
            counts += (keys[i] >= least).to(tl.int32)
    else:
        for start in range(0, n, TILE):
            some = _loaded(row, start, n, TILE)
            masses += tl.where(some >= least, _weights(some, highest), 0.0)
            counts += (some >= least).to(tl.int32)
    return tl.sum(masses), tl.sum(counts)


@triton.jit
def _needed(keys, row, n, share, TILE: tl.constexpr, TILES: tl.constexpr):
    """How many of the highest keys it takes to reach a share of the mass."""
    low, high, at_low, _, _ = _span(keys, row, n, TILE, TILES)
    highest = high - 1
    weight = ()
    for i in tl.static_range(TILES):
        weight = weight + (_weights(keys[i], highest),)  # type: ignore[assignment]  # noqa: RUF005
    total, _ = _mass(keys, weight, row, n, NOTHING + 1, highest, TILE, TILES)
    target = share * total
    at_high, above = at_low * 0, total * 0
    while (high - low > 1) & (at_low - at_high > 1) & (target > 0):
        middle = low + (high - low) // 2
        mass, count = _mass(keys, weight, row, n, middle.to(tl.int32), highest, TILE, TILES)
        enough = mass >= target
        low, at_low = tl.where(enough, middle, low), tl.where(enough, count, at_low)
        high, at_high = tl.where(enough, high, middle), tl.where(enough, at_high, count)
        above = tl.where(enough, above, mass)
    each = tl.where(at_low - at_high > 1, _weights(low.to(tl.int32), highest), 1.0)
    short = tl.ceil((target - above) / tl.maximum(each, 1e-38))  # entries of one weight; a single one is always enough
    equal = tl.minimum(tl.maximum(short, 1.0), (at_low - at_high).to(tl.float32))
    return tl.where(target > 0, at_high + equal.to(tl.int32), 0)


@triton.jit
def _choose(
    score, wanted, wanted_b, wanted_x, index, used, rows, n, most, share,
    TILE: tl.constexpr, TILES: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    row = score + at.to(tl.int64) * n
    number = tl.load(wanted + (at // rows).to(tl.int64) * wanted_b + (at % rows) * wanted_x)
    number = tl.minimum(number, most).to(tl.int32)
    keys = held(row, n, TILE, TILES)
    if MASS:
        number = tl.minimum(number, _needed(keys, row, n, share, TILE, TILES))
    least, tie, room, number = cut(keys, row, n, number, TILE, TILES)
    write_chosen(keys, row, n, index + at.to(tl.int64) * most, least, tie, room, TILE, TILES)
    tl.store(used + at, number)
