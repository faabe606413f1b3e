"""Pages of keys ranked by an upper bound of their scores (Quest)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.methods.base import DENSE_LAYERS, BudgetedDecode, option
from keysift.ops.pages import PER, extend_bounds, page_scores_lse, top_pages
from keysift.types import KV, Ctx, Index, Selection, Side

PAGES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Method(BudgetedDecode):
    """Quest: reads the pages whose keys' elementwise bounds allow the highest q.k.

    The paper chooses for each query head. One choice for a KV head's group reads every row once for all its heads.
    """

    paper: ClassVar[str] = "arXiv:2406.10774"
    reads_sides_alone: ClassVar[bool] = True

    dense_layers: tuple[int, ...] = option((0, 1), DENSE_LAYERS, low=0)
    page: int = option(16, "keys a page", choices=PAGES)
    per: str = option("kv_head", "whose heads choose pages: all that share keys together, or each its own", choices=PER)

    def lists(self, group: int) -> int:
        return group if self.per == "query_head" else 1

    def sides(self, dim: int, dtype: torch.dtype) -> dict[str, Side]:
        return {"bounds": Side(self.page, (2, dim), dtype)}

    def extend(self, index: Index, kv: KV, done: Tensor, most: int, ctx: Ctx) -> None:
        extend_bounds(index["bounds"], kv, self.page, done, most)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        most_pages = max(1, self.most(kv.bound) // self.page)
        score, lse = page_scores_lse(q_BHD, index["bounds"], kv, self.page, ctx.scale)
        return top_pages(score, kv, self.page, self.quota(q_BHD, kv), most_pages, self.per, lse)

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor:
        """Both bounds of every page that holds a key of the middle."""
        first = (kv.start - kv.first) // self.page
        last = (kv.end - kv.first - 1) // self.page
        pages = (last - first + 1).where(kv.length > 0, 0)
        return pages * (2 * kv.k.shape[2] * kv.k.shape[3] * index["bounds"].element_size())
