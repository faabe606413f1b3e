"""Pages of keys ranked by an upper bound of their scores (Quest)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from keysift.methods.base import DENSE_LAYERS, BudgetedDecode, grown, option
from keysift.ops.pages import page_bounds, page_scores
from keysift.ops.select import top_k
from keysift.types import KV, Ctx, Selection


class Index(NamedTuple):
    """Bounds of the keys of each page, fp32 ``[B, K, P, D]``; pages count from the first row of the middle."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True)
class Method(BudgetedDecode):
    """Quest: reads the pages whose keys' elementwise bounds allow the highest q.k."""

    paper: ClassVar[str] = "arXiv:2406.10774"

    dense_layers: tuple[int, ...] = option((0, 1), DENSE_LAYERS, low=0)
    page: int = option(16, "keys a page", low=1)

    def build(self, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> Index:
        return Index(*page_bounds(kv, self.page, self._pages(kv)))

    def append(self, index: Index, kv: KV, done: Tensor, ctx: Ctx) -> Index:
        first = (done - kv.start).clamp(min=0) // self.page  # each sequence's first page that is not complete
        new = self._pages(kv.between(kv.start + first * self.page, kv.end))
        slots = (first[:, None] + torch.arange(new, device=first.device))[:, None, :, None]
        low, high = (grown(x, 2, int(first.max()) + new) for x in index)
        bounds = page_bounds(kv.between(kv.start + first * self.page, kv.end), self.page, new)
        for kept, fresh in zip((low, high), bounds, strict=True):
            kept.scatter_(2, slots.expand_as(fresh), fresh)
        return Index(low, high)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection | None:
        if self.reads_all(kv.length):
            return None
        pages = self._pages(kv)
        score = page_scores(q_BHD, index.low[:, :, :pages], index.high[:, :, :pages])
        count = (self.count(kv.length) // self.page).clamp(min=1)
        best = top_k(score, count[:, None])
        page_of_row = (torch.arange(kv.k.shape[1], device=q_BHD.device) - kv.start[:, None]) // self.page
        row_chosen = best.gather(-1, page_of_row.clamp(0, pages - 1)[:, None].expand(-1, best.shape[1], -1))
        return Selection.of(row_chosen & kv.contains()[:, None])

    def scan_bytes(self, kv: KV, index: Index) -> int:
        """Both bounds of every page."""
        pages = int((-(-kv.length // self.page)).sum())
        return 2 * pages * kv.k.shape[2] * kv.k.shape[3] * index.low.element_size()

    def _pages(self, kv: KV) -> int:
        return -(-int(kv.length.max()) // self.page)
