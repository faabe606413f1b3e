"""What attention read, counted; and, where asked for, how far its output is from dense attention's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops.heads import per_query_head
from keysift.types import KV, BlockMask, Selection, Stats

UNCOUNTED = 1 << 24  # rows of lists whose counts are kept until somebody asks
UNCOUNTED_STEPS = 1 << 12  # decode steps likewise


class ReadBlocks(NamedTuple):
    """How many blocks a mask lists; not which, for those lists are large."""

    full: Tensor  # [B, H, Q]
    partial: Tensor
    block: int
    start: int  # position of the first query block's first token
    tokens: range  # query positions that were computed


class Totals(NamedTuple):
    """What ``Stats`` are made of: sums, and how much was added up."""

    pairs: float = 0.0  # of the causal triangle
    pairs_read: float = 0.0
    read: float = 0.0  # (query head, key) pairs of decode steps
    cached: float = 0.0
    bytes: float = 0.0
    steps: float = 0.0
    mass: float = 0.0
    masses: float = 0.0
    prefill_error: float = 0.0
    prefill_errors: float = 0.0
    decode_error: float = 0.0
    decode_errors: float = 0.0

    def plus(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))

    def stats(self) -> Stats:
        parts = (
            (self.pairs_read, self.pairs),
            (self.read, self.cached),
            (self.mass, self.masses),
            (self.bytes, self.steps),
            (self.prefill_error, self.prefill_errors),
            (self.decode_error, self.decode_errors),
        )
        return Stats(*(part / whole if whole else None for part, whole in parts))


@dataclass
class Meter:
    """Counts what was read; see ``Stats``."""

    measure_mass: bool = False
    measure_error: bool = False
    pairs: float = 0.0  # prefill: causal
    pairs_read: float = 0.0  # and read
    uncounted: list[ReadBlocks] = field(default_factory=list)  # of masks that nobody has waited for yet
    uncounted_steps: list[Tensor] = field(default_factory=list)  # decode: keys read, cached, bytes
    decoded: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # what they add up to
    queries: Counter[int] = field(default_factory=Counter)  # decode: by layer
    mass: list[Tensor] = field(default_factory=list)
    errors: dict[str, list[Tensor]] = field(default_factory=lambda: {"prefill": [], "decode": []})

    def stats(self) -> Stats:
        return self.totals().stats()

    def totals(self) -> Totals:
        """Sums so far; waits for the devices they are on."""
        self._count()
        steps = max(self.queries.values(), default=0)
        sums = (_sum(x) for x in (self.mass, self.errors["prefill"], self.errors["decode"]))
        decode = *self.decoded.tolist(), steps
        return Totals(self.pairs, self.pairs_read, *decode, *(number for pair in sums for number in pair))

    def add_mask(self, mask: BlockMask, tokens: range, heads: int, batch: int) -> None:
        """Count the pairs that ``mask`` reads for the query positions ``tokens``."""
        self.uncounted.append(ReadBlocks(mask.full_count, mask.partial_count, mask.block, mask.rows().start, tokens))
        self.pairs += batch * heads * _causal_pairs(tokens)
        if sum(read.full.numel() for read in self.uncounted) > UNCOUNTED:
            self._count()

    def _count(self) -> None:
        """Add up the masks so far, which waits for the devices they are on."""
        for read in self.uncounted:
            start = torch.arange(read.full.shape[2]) * read.block + read.start
            queries = (start + read.block).clamp(max=read.tokens.stop) - start.clamp(min=read.tokens.start)
            on_diagonal = (start.clamp(min=read.tokens.start) - start) * queries + queries * (queries + 1) // 2
            full, partial = read.full.sum((0, 1)).cpu(), read.partial.sum((0, 1)).cpu()
            self.pairs_read += float((full * read.block * queries + partial * on_diagonal).sum())
        self.uncounted.clear()
        for step in self.uncounted_steps:
            self.decoded += step.cpu()
        self.uncounted_steps.clear()

    def add_dense(self, tokens: range, heads: int, batch: int) -> None:
        """Count a dense prefill of the query positions ``tokens``."""
        pairs = batch * heads * _causal_pairs(tokens)
        self.pairs_read += pairs
        self.pairs += pairs
        if self.measure_mass:
            self.mass.append(torch.ones(1))
        if self.measure_error:
            self.errors["prefill"].append(torch.zeros(batch * heads))

    def add_step(
        self, kv: KV, heads: int, layer: int, middle: KV | None, selection: Selection | None, scanned: Tensor | int
    ) -> None:
        """Count a decode step over the cache ``kv``: all of it, or ``selection`` from its ``middle`` and all rows
        outside, after scanning so many bytes."""
        self.uncounted_steps.append(read_of_step(kv, heads, middle, selection, scanned).sum(1))
        self.queries[layer] += kv.length.shape[0]
        if len(self.uncounted_steps) >= UNCOUNTED_STEPS:
            self._count()
        if self.measure_error and selection is None:
            self.errors["decode"].append(torch.zeros(kv.length.shape[0] * heads))

    def add_error(self, phase: str, out_BTHD: Tensor, dense_BTHD: Tensor) -> None:
        """Note how far an output is from dense attention's; ``phase`` is "prefill" or "decode"."""
        self.errors[phase].append(relative_error(out_BTHD, dense_BTHD).flatten().cpu())


class NoMeter(Meter):
    """Counts nothing."""

    def add_mask(self, mask: BlockMask, tokens: range, heads: int, batch: int) -> None:
        return None

    def add_dense(self, tokens: range, heads: int, batch: int) -> None:
        return None


class StepMeter:
    """Counts what decode steps read, slot by slot, without waiting for the device: a step that is counted may be
    captured.

    Attributes:
        sums: of each slot, fp64 ``[6, slots]``: keys read, cached, bytes, steps, relative error, heads compared.
    """

    def __init__(self, idle: Tensor, measure_error: bool = False) -> None:
        """``idle``, int64 ``[slots]``, is 1 where a slot takes no part in steps; it may change from step to step."""
        self._idle = idle
        self.sums = torch.zeros(6, len(idle), dtype=torch.float64, device=idle.device)
        self.measure_error = measure_error
        self._first_layer: int | None = None

    def begin(self, slot: int) -> None:
        """Count anew for a slot."""
        self.sums[:, slot] = 0

    def totals(self, slot: int) -> Totals:
        """What the steps of a slot that were counted add up to; waits for the device."""
        read, cached, size, steps, error, errors = self.sums[:, slot].tolist()
        return Totals(read=read, cached=cached, bytes=size, steps=steps, decode_error=error, decode_errors=errors)

    def add_step(
        self, kv: KV, heads: int, layer: int, middle: KV | None, selection: Selection | None, scanned: Tensor | int
    ) -> None:
        """As ``Meter.add_step``."""
        if self._first_layer is None:
            self._first_layer = layer
        counts = 1 - self._idle
        self.sums[:3] += read_of_step(kv, heads, middle, selection, scanned) * counts
        self.sums[3] += counts * int(layer == self._first_layer)
        if self.measure_error and selection is None:
            self.sums[5] += heads * counts

    def add_error(self, phase: str, out_BTHD: Tensor, dense_BTHD: Tensor) -> None:
        """As ``Meter.add_error``, of decode."""
        error = relative_error(out_BTHD, dense_BTHD)
        self.sums[4] += error.sum(1).masked_fill(self._idle > 0, 0)
        self.sums[5] += error.shape[1] * (1 - self._idle)


def read_of_step(kv: KV, heads: int, middle: KV | None, selection: Selection | None, scanned: Tensor | int) -> Tensor:
    """What a decode step over a cache reads of each sequence, fp64 ``[3, B]``: (query head, key) pairs, those that are
    cached, and bytes; see ``Meter.add_step``."""
    row = sum(x.shape[-1] * x.element_size() for x in (kv.k, kv.v))
    cached = kv.length.double()
    keys, rows = cached * heads, cached * kv.k.shape[2]
    if middle is not None and selection is not None:
        always = cached - middle.length
        keys = always * heads + per_query_head(selection.count, heads, 1).double().sum(1)
        rows = always * kv.k.shape[2] + selection.count.double().sum(1)
    return torch.stack([keys, cached * heads, rows * row + scanned])


def relative_error(out_BTHD: Tensor, dense_BTHD: Tensor) -> Tensor:
    """|out - dense| / |dense| of each head, fp32 ``[B, H]``."""
    out, dense = out_BTHD.float(), dense_BTHD.float()
    difference, norm = ((x**2).sum((1, 3)).sqrt() for x in (out - dense, dense))
    return difference / norm.clamp(min=1e-30)


def _sum(parts: list[Tensor]) -> tuple[float, float]:
    """Sum and number of entries."""
    return sum(float(x.double().sum()) for x in parts), float(sum(x.numel() for x in parts))


def _causal_pairs(tokens: range) -> int:
    return (tokens.start + 1 + tokens.stop) * len(tokens) // 2
