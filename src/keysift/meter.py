"""What attention read, counted; and, where asked for, how far its output is from dense attention's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
        self._count()
        read, cached, bytes_read = self.decoded.tolist()
        density, kept = (
            part / total if total else None for part, total in ((self.pairs_read, self.pairs), (read, cached))
        )
        steps = max(self.queries.values(), default=0)
        per_step = bytes_read / steps if steps else None
        mass, prefill, decode = (_mean(x) for x in (self.mass, self.errors["prefill"], self.errors["decode"]))
        return Stats(density, kept, mass, per_step, prefill, decode)

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
        row = sum(x.shape[-1] * x.element_size() for x in (kv.k, kv.v))
        cached = kv.length.double().sum()
        keys, rows = cached * heads, cached * kv.k.shape[2]
        if middle is not None and selection is not None:
            always = cached - middle.length.double().sum()
            keys = always * heads + per_query_head(selection.count, heads, 1).double().sum()
            rows = always * kv.k.shape[2] + selection.count.double().sum()
        self.uncounted_steps.append(torch.stack([keys, cached * heads, rows * row + scanned]))
        self.queries[layer] += kv.length.shape[0]
        if len(self.uncounted_steps) >= UNCOUNTED_STEPS:
            self._count()
        if self.measure_error and selection is None:
            self.errors["decode"].append(torch.zeros(kv.length.shape[0] * heads))

    def add_error(self, phase: str, out_BTHD: Tensor, dense_BTHD: Tensor) -> None:
        """Note how far an output is from dense attention's; ``phase`` is "prefill" or "decode"."""
        out, dense = out_BTHD.float(), dense_BTHD.float()
        difference, norm = ((x**2).sum((1, 3)).sqrt() for x in (out - dense, dense))
        self.errors[phase].append((difference / norm.clamp(min=1e-30)).flatten().cpu())


class StepMeter:
    """Counts the keys that decode steps read, slot by slot, without waiting for the device.

    Attributes:
        read, cached: (query head, key) pairs so far, fp64 ``[slots]``.
    """

    measure_error = False

    def __init__(self, slots: int, device: torch.device) -> None:
        self.read, self.cached = (torch.zeros(slots, dtype=torch.float64, device=device) for _ in range(2))

    def begin(self, slot: int) -> None:
        """Count anew for a slot."""
        self.read[slot], self.cached[slot] = 0, 0

    def kept(self, slot: int) -> float | None:
        """Share of the cached keys that the steps of a slot read; None before one that was counted."""
        read, cached = float(self.read[slot]), float(self.cached[slot])
        return read / cached if cached else None

    def add_step(
        self, kv: KV, heads: int, layer: int, middle: KV | None, selection: Selection | None, scanned: Any
    ) -> None:
        """As ``Meter.add_step``."""
        read = kv.length * heads
        if middle is not None and selection is not None:
            read = (kv.length - middle.length) * heads + per_query_head(selection.count, heads, 1).sum(1)
        self.read += read
        self.cached += kv.length * heads


def _mean(parts: list[Tensor]) -> float | None:
    return float(torch.cat([x.cpu() for x in parts]).mean()) if parts else None


def _causal_pairs(tokens: range) -> int:
    return (tokens.start + 1 + tokens.stop) * len(tokens) // 2
