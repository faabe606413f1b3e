"""Columns and diagonals, or blocks by pooled scores, found per head and per input (FlexPrefill)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keysift.methods.base import PrefillMethod, check, option
from keysift.ops.dense import keys_values
from keysift.ops.flex_search import FlexPlan, flex_search, flex_search_seed
from keysift.types import KV, BlockMask, Ctx


@dataclass(frozen=True, slots=True)
class Method(PrefillMethod):
    """FlexPrefill: keeps the key blocks that carry a share gamma of the attention."""

    paper: ClassVar[str] = "arXiv:2502.20766"

    gamma: float = option(0.95, "share of attention mass to cover; 1 means dense", above=0, high=1)
    tau: float = option(0.1, "a head closer than this to its pooled estimate is query-aware; 0 for none", low=0)
    min_budget: int | None = option(1024, "tokens at least, for columns and for diagonals", low=0)
    max_budget: int | None = option(None, "tokens at most, for columns and for diagonals", low=1)
    mode: str = option(
        "default", "default, or seed: the authors' block sets to the letter", choices=("default", "seed")
    )

    def __post_init__(self) -> None:
        check(self)
        if self.max_budget is not None and self.max_budget < (self.min_budget or 0):
            raise ValueError(f"max_budget={self.max_budget}: must be at least min_budget={self.min_budget}")

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> FlexPlan | None:
        tokens, keys = q_BTHD.shape[1], int(kv.length[0])
        least = max(1, -(-(self.min_budget or 0) // self.block))
        if tokens == 1 or self.gamma == 1 or keys <= max(2, least) * self.block:
            return None
        most = None if self.max_budget is None else -(-self.max_budget // self.block)
        k = keys_values(kv)[0]
        if self.mode == "seed":
            return flex_search_seed(q_BTHD, k, self.gamma, self.tau, least, most, self.block)
        return flex_search(q_BTHD, k, ctx.scale, self.gamma, self.tau, least, most, self.block)

    def mask(self, plan: FlexPlan, blocks: range) -> BlockMask:
        return BlockMask.of(plan.active(blocks), self.block, blocks.start)
