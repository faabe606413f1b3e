"""Blocks scored by the sums of their antidiagonals (XAttention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.methods.base import PrefillMethod, option
from keysift.ops.dense import keys_values
from keysift.ops.heads import group
from keysift.ops.lists import block_lists
from keysift.ops.select import cover
from keysift.types import KV, BlockMask, Ctx


class Plan(NamedTuple):
    q: Tensor  # [B, T / stride, H, stride * D], from query block `first`
    k: Tensor  # [B, N / stride, K, stride * D]
    first: int
    keys: int
    scale: float


@dataclass(frozen=True, slots=True)
class Method(PrefillMethod):
    """XAttention: the fewest blocks of each row whose antidiagonal scores reach a share of the row."""

    paper: ClassVar[str] = "arXiv:2503.16428"

    threshold: float = option(0.9, "share of a row's estimated mass to keep; 1 means dense", above=0, high=1)
    stride: int = option(8, "distance of the antidiagonals that are summed", choices=(4, 8, 16))

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Plan | None:
        tokens, k = q_BTHD.shape[1], keys_values(kv)[0]
        keys = k.shape[1]
        if tokens == 1 or self.threshold == 1 or keys <= 2 * self.block:
            return None
        skip, blocks = (keys - tokens) % self.block, -(-keys // self.block)
        fill = blocks * self.block - keys
        q = F.pad(q_BTHD.float(), (0, 0, 0, 0, skip, fill)).unflatten(1, (-1, self.stride)).flip(2)
        k = F.pad(k.float(), (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, self.stride))
        q, k = (x.transpose(2, 3).flatten(3) for x in (q, k))
        return Plan(q, k, (keys - tokens) // self.block, keys, ctx.scale / self.stride)

    def mask(self, plan: Plan, blocks: range) -> BlockMask:
        rows = [self._row(plan, i) for i in blocks]
        return block_lists(torch.stack(rows, 2), self.block, blocks.start)

    def _row(self, plan: Plan, i: int) -> Tensor:
        """Key blocks of query block ``i``, bool ``[B, H, C]``."""
        width = self.block // self.stride
        lo = (i - plan.first) * width
        q = group(plan.q[:, lo : lo + width], plan.k.shape[2], 2)
        score = torch.einsum("btkgd,bnkd->bkgtn", q, plan.k).flatten(1, 2) * plan.scale
        key = torch.arange(plan.k.shape[1], device=score.device)
        query = torch.arange(i * width, (i + 1) * width, device=score.device)[:, None]
        weight = score.masked_fill(key > query, -torch.inf).softmax(-1)
        weight = weight * (query * self.stride < plan.keys)  # rows past the last query count nothing
        mass = weight.unflatten(-1, (-1, width)).sum((2, -1))
        chosen = cover(mass, self.threshold)
        chosen[..., 0] = chosen[..., i] = True
        return chosen
