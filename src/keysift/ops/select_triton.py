"""Triton kernels that choose the highest entries of rows by a threshold, without sorting them.

A program owns a row. Where it has at most ``WHOLE_ROW`` entries, it keeps them in registers; else it reads them again
at every step. A step counts the entries that reach two cuts: the middle of where the threshold can be, and where the
numbers of entries found so far suggest it. So no row takes more than 32 steps, and most take about 8.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.select import count_of_rows

WHOLE_ROW = 16384  # entries that 1024 threads hold
THREAD_ENTRIES = 16
NOTHING = tl.constexpr(-(2**31))  # the key of an entry that is not there: below all others
LOG2E = tl.constexpr(1.4426950408889634)


def tile_of(entries: int) -> tuple[int, bool, int]:
    """Entries that a program of a row holds at once, whether those are the whole row, and its warps."""
    tile = min(max(16, triton.next_power_of_2(entries)), WHOLE_ROW)
    return tile, entries <= WHOLE_ROW, min(32, max(4, tile // (32 * THREAD_ENTRIES)))


def chosen_lists(
    score_BXN: Tensor, count: Tensor | int, most: int, share: float | None = None
) -> tuple[Tensor, Tensor]:
    """``select_top``, or with a share ``select_mass``, in one launch."""
    batch, rows, entries = score_BXN.shape
    score = score_BXN.contiguous()
    wanted = count_of_rows(count, score)
    index = torch.empty(batch, rows, most, dtype=torch.int32, device=score.device)
    used = torch.empty(batch, rows, dtype=torch.int32, device=score.device)
    tile, whole, warps = tile_of(entries)
    if used.numel():
        with torch.cuda.device_of(score):
            _choose[(batch * rows,)](
                *(score, wanted, *wanted.stride(), index, used, rows, entries, most, 0.0 if share is None else share),
                TILE=tile,
                WHOLE=whole,
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
    """The score that has this key, an int64 scalar."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _loaded(row, start, n, TILE: tl.constexpr):
    at = start + tl.arange(0, TILE)
    return keys_of(tl.load(row + at, mask=at < n, other=float("-inf")), at < n)


@triton.jit
def held(row, n, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """The keys of a row of ``n`` entries; where they are too many, those of nothing: ``row`` is read when needed."""
    return _loaded(row, 0, n, TILE) if WHOLE else tl.full((TILE,), NOTHING, tl.int32)


@triton.jit
def _reach(keys, row, n, x, y, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """How many keys are at least ``x``, and how many at least ``y``: both counts in one sum."""
    if WHOLE:
        both = tl.sum((keys >= x).to(tl.int32) + ((keys >= y).to(tl.int32) << 16))
        of_x, of_y = both & 0xFFFF, both >> 16
    else:
        many = tl.zeros((TILE,), tl.int64)
        for start in range(0, n, TILE):
            some = _loaded(row, start, n, TILE)
            many += (some >= x).to(tl.int64) + ((some >= y).to(tl.int64) << 32)
        total = tl.sum(many)
        of_x, of_y = (total & 0xFFFFFFFF).to(tl.int32), (total >> 32).to(tl.int32)
    return of_x, of_y


@triton.jit
def _span(keys, row, n, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """The lowest key of an entry, one past the highest (int64), and the number of entries."""
    least, greatest = keys, keys
    if not WHOLE:
        for start in range(0, n, TILE):
            some = _loaded(row, start, n, TILE)
            greatest = tl.maximum(greatest, some)
    high = tl.max(greatest).to(tl.int64) + 1
    if WHOLE:
        least = tl.where(keys == NOTHING, 0x7FFFFFFF, keys)
    else:
        least = tl.full((TILE,), 0x7FFFFFFF, tl.int32)
        for start in range(0, n, TILE):
            some = _loaded(row, start, n, TILE)
            least = tl.minimum(least, tl.where(some == NOTHING, 0x7FFFFFFF, some))
    there, _ = _reach(keys, row, n, NOTHING + 1, NOTHING + 1, TILE, WHOLE)
    return tl.min(least).to(tl.int64), high, there


@triton.jit
def _guess(low, high, at_low, at_high, wanted):
    """Where the ``wanted`` highest may end, if the logarithm of their number falls evenly with the score."""
    most, least = tl.log2(at_low.to(tl.float32)), tl.log2(tl.maximum(at_high.to(tl.float32), 0.5))
    part = (most - tl.log2(wanted.to(tl.float32))) / (most - least)
    bottom, top = _score_of(low), _score_of(high)
    bits = (bottom + (top - bottom) * part).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def cut(keys, row, n, wanted, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """What parts the ``wanted`` highest keys from the others.

    Returns:
        (least, tie, room, number): chosen are the keys from ``least`` on, and the first ``room`` of those that equal
        ``tie``, which is lower; ``number`` of them in all, as many as there are if that is less than wanted.
    """
    low, high, at_low = _span(keys, row, n, TILE, WHOLE)
    at_high = at_low * 0
    wanted = tl.maximum(tl.minimum(wanted, at_low), 0)
    low = tl.where(wanted > 0, low, high)  # nothing is wanted: the loop does not run
    while (high - low > 1) & (at_low > wanted):
        middle = low + (high - low) // 2
        guess = tl.minimum(tl.maximum(_guess(low, high, at_low, at_high, wanted), low + 1), high - 1)
        x, y = tl.minimum(middle, guess), tl.maximum(middle, guess)
        of_x, of_y = _reach(keys, row, n, x.to(tl.int32), y.to(tl.int32), TILE, WHOLE)
        up = of_y >= wanted
        between = of_x >= wanted
        at_high = tl.where(up, at_high, tl.where(between, of_y, of_x))
        high = tl.where(up, high, tl.where(between, y, x))
        at_low = tl.where(up, of_y, tl.where(between, of_x, at_low))
        low = tl.where(up, y, tl.where(between, x, low))
    exact = at_low == wanted
    least = tl.where(exact, low, high).to(tl.int32)
    return least, low.to(tl.int32), tl.where(exact | (wanted == 0), 0, wanted - at_high), wanted


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
def write_chosen(keys, row, n, out, least, tie, room, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """The chosen indices in ascending order, from ``out`` on."""
    taken, tied = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    if WHOLE:
        _mark(keys, 0, out, least, tie, room, taken, tied)
    else:
        for start in range(0, n, TILE):
            taken, tied = _mark(_loaded(row, start, n, TILE), start, out, least, tie, room, taken, tied)


@triton.jit
def _weights(key, highest):
    """Weights against that of the highest key, fp32; 0 for NOTHING."""
    score = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    equal = key == highest  # +inf among them
    weight = tl.where(equal, 1.0, tl.exp2((score - _score_of(highest)) * LOG2E))
    return tl.where(key == NOTHING, 0.0, weight)


@triton.jit
def _mass(keys, weight, row, n, least, highest, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Summed weight and number of the keys from ``least`` on.

    The order of the additions does not depend on ``least``, so more entries never add up to less.
    """
    if WHOLE:
        reached = keys >= least
        mass, count = tl.sum(tl.where(reached, weight, 0.0)), tl.sum(reached.to(tl.int32))
    else:
        masses, counts = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
        for start in range(0, n, TILE):
            some = _loaded(row, start, n, TILE)
            masses += tl.where(some >= least, _weights(some, highest), 0.0)
            counts += (some >= least).to(tl.int32)
        mass, count = tl.sum(masses), tl.sum(counts)
    return mass, count


@triton.jit
def _needed(keys, row, n, share, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """How many of the highest keys it takes to reach a share of the mass."""
    low, high, at_low = _span(keys, row, n, TILE, WHOLE)
    highest = high - 1
    weight = _weights(keys, highest)
    total, _ = _mass(keys, weight, row, n, NOTHING + 1, highest, TILE, WHOLE)
    target = share * total
    at_high, above = at_low * 0, total * 0
    while (high - low > 1) & (at_low - at_high > 1) & (target > 0):
        middle = low + (high - low) // 2
        mass, count = _mass(keys, weight, row, n, middle.to(tl.int32), highest, TILE, WHOLE)
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
    TILE: tl.constexpr, WHOLE: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    row = score + at.to(tl.int64) * n
    number = tl.load(wanted + (at // rows).to(tl.int64) * wanted_b + (at % rows) * wanted_x)
    number = tl.minimum(number, most).to(tl.int32)
    keys = held(row, n, TILE, WHOLE)
    if MASS:
        number = tl.minimum(number, _needed(keys, row, n, share, TILE, WHOLE))
    least, tie, room, number = cut(keys, row, n, number, TILE, WHOLE)
    write_chosen(keys, row, n, index + at.to(tl.int64) * most, least, tie, room, TILE, WHOLE)
    tl.store(used + at, number)
