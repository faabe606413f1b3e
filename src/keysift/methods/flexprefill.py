"""The key blocks that carry a share gamma of the attention, found per head and per input (FlexPrefill)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keysift.methods.base import PrefillMethod, check, option
from keysift.ops.crossover import dense_below
from keysift.ops.dense import keys_values
from keysift.ops.flex_search import ROWS, FlexPlan, flex_search
from keysift.ops.flex_seed import SeedPlan, flex_search_seed
from keysift.ops.lists import block_lists
from keysift.types import KV, BlockMask, Ctx


@dataclass(frozen=True, slots=True)
class Method(PrefillMethod):
    """FlexPrefill: keeps the key blocks that carry a share gamma of the attention."""

    paper: ClassVar[str] = "arXiv:2502.20766"

    gamma: float = option(0.95, "share of attention mass to cover; 1 means dense", above=0, high=1)
    tau: float = option(0.1, "mode=seed: a head closer than this to its pooled estimate is query-aware", low=0)
    min_budget: int | None = option(None, "keys at least, of each block of queries", low=0)
    max_budget: int | None = option(None, "keys at most, of each block of queries", low=1)
    rows: int = option(ROWS, "query rows of a chunk that the search looks at, about; fewer beyond 32K keys", low=1)
    dense_below: int | None = option(
        None,
        "shorter prompts are read densely; none: where that was measured to be faster, not with mode=seed",
        low=0,
    )
    mode: str = option(
        "default", "default, or seed: the authors' block sets to the letter", choices=("default", "seed")
    )

    def __post_init__(self) -> None:
        check(self)
        if self.max_budget is not None and self.max_budget < (self.min_budget or 0):
            raise ValueError(f"max_budget={self.max_budget}: must be at least min_budget={self.min_budget}")

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> FlexPlan | SeedPlan | None:
        tokens, (start, end) = q_BTHD.shape[1], kv.known_spans()[0]
        keys = end - start
        least = max(1, -(-(self.min_budget or 0) // self.block))
        if tokens == 1 or self.gamma == 1 or keys <= max(2, least) * self.block:
            return None
        below = self.dense_below
        if below is None:
            below = 0 if self.mode == "seed" else dense_below(q_BTHD, kv.k)
        if tokens * (2 * keys - tokens) < below**2:  # as many pairs as a whole prompt of `below` tokens has
            return None
        most = None if self.max_budget is None else -(-self.max_budget // self.block)
        if self.mode == "seed":
            return flex_search_seed(q_BTHD, keys_values(kv)[0], self.gamma, self.tau, least, most, self.block)
        return flex_search(q_BTHD, kv, ctx.scale, self.gamma, least, most, self.block, self.rows)

    def mask(self, plan: FlexPlan | SeedPlan, blocks: range) -> BlockMask:
        if isinstance(plan, FlexPlan):
            return plan.lists(blocks)
        return block_lists(plan.active(blocks), self.block, blocks.start)
