"""Intervals of 95%: of a mean score, of a paired difference, of an average over tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # two-sided 95%


class Estimate(NamedTuple):
    """A mean with its interval, and how many samples it comes from."""

    mean: float
    low: float
    high: float
    count: int  # type: ignore[assignment]


def mean_score(scores: Sequence[float]) -> Estimate | None:
    """Mean of scores. Between 0 and 1: Wilson's interval (doi:10.1080/01621459.1927.10502953), which holds at 0 and 1
    as well, and is wider than need be for scores between; otherwise the normal one. None without scores."""
    n = len(scores)
    if not n:
        return None
    mean = math.fsum(scores) / n
    if min(scores) < 0 or max(scores) > 1:
        half = Z * math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / max(1, n - 1) / n)
        return Estimate(mean, mean - half, mean + half, n)
    centre, scale = (mean + Z**2 / (2 * n)), 1 + Z**2 / n
    half = Z * math.sqrt(max(0.0, mean * (1 - mean)) / n + Z**2 / (4 * n**2))
    return Estimate(mean, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), n)


def paired_difference(scores: Sequence[float], others: Sequence[float]) -> Estimate | None:
    """Mean of ``scores - others``, sample by sample, both between 0 and 1 (larger ones are scaled by their range).

    Bonett and Price's interval (doi:10.3102/1076998611411915): one pair is added for each sign, so that pairs which all
    agree still leave room for doubt. The interval is centred on the shrunken mean; the mean is the plain one.
    """
    n = len(scores)
    if not n:
        return None
    unit = max(1.0, *(abs(x) for x in (*scores, *others)))
    pairs = [(a - b) / unit for a, b in zip(scores, others, strict=True)]
    centre = math.fsum(pairs) / (n + 2)
    spread = (math.fsum(d * d for d in pairs) + 2) / (n + 2) - centre**2
    half = Z * math.sqrt(max(0.0, spread) / (n + 2))
    mean = math.fsum(pairs) / n
    return Estimate(unit * mean, unit * max(-1.0, centre - half), unit * min(1.0, centre + half), n)


def average(parts: Sequence[Estimate]) -> Estimate | None:
    """Mean of independent means, each counting the same; the interval joins theirs (MOVER, doi:10.1002/sim.3095)."""
    if not parts:
        return None
    k = len(parts)
    mean = math.fsum(p.mean for p in parts) / k
    below = math.sqrt(math.fsum((p.mean - p.low) ** 2 for p in parts)) / k
    above = math.sqrt(math.fsum((p.high - p.mean) ** 2 for p in parts)) / k
    return Estimate(mean, mean - below, mean + above, sum(p.count for p in parts))
