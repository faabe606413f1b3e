"""Blocks within a factor of their row's best, by pooled keys; no sort (FlashPrefill)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from keysift.methods.base import PrefillMethod, option
from keysift.ops.dense import keys_values
from keysift.ops.heads import group
from keysift.ops.lists import block_lists
from keysift.ops.pooling import pool
from keysift.types import KV, BlockMask, Ctx


class Plan(NamedTuple):
    q: Tensor  # [B, T, H, D]
    pooled_k: Tensor  # [B, C, K, D]
    keys: int
    scale: float


@dataclass(frozen=True, slots=True)
class Method(PrefillMethod):
    """FlashPrefill: keeps a block if its score reaches alpha times the largest of its row."""

    paper: ClassVar[str] = "arXiv:2603.06199"

    alpha: float = option(0.12, "share of the row's largest score; the paper: .18 Llama, .08 Qwen2.5, .12 Qwen3", low=0)
    sink_blocks: int = option(2, "first blocks, always read", low=1)
    window_blocks: int = option(4, "last blocks of a row, always read", low=1)
    last_rows: int = option(2, "last query blocks, dense", low=0)

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Plan | None:
        k = keys_values(kv)[0]
        keys = k.shape[1]
        if q_BTHD.shape[1] == 1 or self.alpha == 0 or keys <= 2 * self.block:
            return None
        return Plan(q_BTHD, pool(k, self.block, 0), keys, ctx.scale)

    def mask(self, plan: Plan, blocks: range) -> BlockMask:
        return block_lists(torch.stack([self._row(plan, i) for i in blocks], 2), self.block, blocks.start)

    def _row(self, plan: Plan, i: int) -> Tensor:
        """Key blocks of query block ``i``, bool ``[B, H, C]``."""
        tokens, column = plan.q.shape[1], torch.arange(plan.pooled_k.shape[1], device=plan.q.device)
        lo, hi = (min(max(x - (plan.keys - tokens), 0), tokens) for x in (i * self.block, (i + 1) * self.block))
        q = group(plan.q[:, lo:hi].float(), plan.pooled_k.shape[2], 2)
        score = torch.einsum("btkgd,bckd->bkgtc", q, plan.pooled_k).flatten(1, 2) * plan.scale
        score = score.masked_fill(
            column >= i, -torch.inf
        )  # the diagonal block is always read, its mean sees the future
        score = (score - score.amax((2, 3), keepdim=True)).exp().sum(2)
        best = score >= self.alpha * score.amax(-1, keepdim=True)
        always = (column < self.sink_blocks) | (column > i - self.window_blocks)
        if i >= plan.pooled_k.shape[1] - self.last_rows:
            always = torch.ones_like(always)
        return (best | always) & (column <= i)
