"""Hash tables that draw their bits from a pool: fewer bits to keep and to read than tables of their own (MagicPIG).

A pool is made of words of 32 bits, and table ``l`` lies in word ``l % words``. The tables of a word take whole pairs of
its bits (and, where a table has an odd number of them, the first of one pair more), so that what two bits say of a key
is found once for all tables that have both. Any two of them share few bits. All words are alike.

Bits of a word agree with a query's independently of each other, each with the probability ``p`` of the angle between
key and query, and words are independent: that any two of the tables match remains a function of the angle alone, which
is found exactly, by inclusion and exclusion.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

WORD = 32  # bits
PAIRS = WORD // 2
MOST = 20  # tables of a word; their law takes 2 ** MOST terms


def words_of(tables: int, pool: int) -> int | None:
    """Words of a pool that can serve so many tables; None where a word would have too many."""
    words = pool // WORD
    return words if tables <= MOST * words else None


@functools.lru_cache(maxsize=16)
def tables_of_word(bits: int, count: int) -> tuple[int, ...]:
    """The bits of a word that each of ``count`` tables takes, as masks.

    From tables that take turns at the pairs, each swap of one pair for another is made that helps most to lower the sum
    of ``2 ** (bits in common)`` over two tables, in proportion to which a key orthogonal to the query has both.
    """
    per = bits // 2
    pairs = [{(t * per + i) % PAIRS for i in range(per)} for t in range(count)]

    def cost(t: int, mine: set[int]) -> int:
        return sum(4 ** len(mine & other) for i, other in enumerate(pairs) if i != t)

    better = True
    while better:
        better = False
        for t, mine in enumerate(pairs):
            swaps = [mine - {a} | {b} for a in sorted(mine) for b in range(PAIRS) if b not in mine]
            best = min(swaps, key=lambda swap: cost(t, swap), default=mine)
            if cost(t, best) < cost(t, mine):
                pairs[t], better = best, True
    masks: list[int] = []
    for mine in pairs:
        mask = sum(3 << (2 * i) for i in mine)
        if bits % 2:
            singles = [mask | 1 << (2 * i) for i in range(PAIRS) if i not in mine]
            mask = min(singles, key=lambda m: sum(2 ** (m & other).bit_count() for other in masks))
        masks.append(mask)
    return tuple(masks)


def table_columns(bits: int, tables: int, pool: int) -> Tensor:
    """The planes of each table, int64 ``[L, bits]``: bit ``j`` of word ``c`` is plane ``j * words + c``."""
    words = pool // WORD
    masks = tables_of_word(bits, -(-tables // words))
    taken = [[j for j in range(WORD) if mask >> j & 1] for mask in masks]
    return torch.tensor([[j * words + t % words for j in taken[t // words]] for t in range(tables)])


def collision_log_probability(cosine: Tensor, bits: int, tables: int, pool: int, floor: float = 0.0) -> Tensor:
    """Log probability that at least two tables match; see ``codes.collision_log_probability``."""
    p = 1 - torch.acos(cosine.double().clamp(-1, 1)) / math.pi
    words = pool // WORD
    none, once, twice = torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for word in range(min(words, tables)):
        masks = tables_of_word(bits, -(-tables // words))[: (tables - word - 1) // words + 1]
        none_here, once_here, twice_here = (_polynomial(c, p).clamp(0, 1) for c in _matches(masks))
        twice = twice + once * (1 - none_here) + none * twice_here  # a sum of what is positive keeps its digits
        none, once = none * none_here, once * none_here + none * once_here
    return (twice + floor).clamp(1e-300, 1).log().float()


@functools.lru_cache(maxsize=16)
def _matches(masks: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """Polynomials in ``p``: that none of the tables of a word matches, that one does, and that more do."""
    union, size = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for mask in masks:  # every set of tables: the bits that it needs, and how many tables it has
        union, size = torch.cat([union, union | mask]), torch.cat([size, size + 1])
    needed = sum((union >> j & 1) for j in range(WORD))
    assert isinstance(needed, Tensor)
    sign = 1.0 - 2 * (size % 2).double()
    factors = (sign, -sign * size, sign * (size - 1).clamp(min=0))
    return tuple(tuple(torch.bincount(needed, factor, WORD + 1).tolist()) for factor in factors)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total
