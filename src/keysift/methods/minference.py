"""The columns and diagonals that the last queries attend to (MInference's vertical-slash pattern)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from keysift.methods.base import PrefillMethod, option
from keysift.ops.dense import keys_values
from keysift.ops.lists import block_lists
from keysift.ops.select import top_k
from keysift.ops.vertical_slash import vertical_slash_blocks, vertical_slash_mass
from keysift.types import KV, BlockMask, Ctx


class Plan(NamedTuple):
    vertical: Tensor
    slash: Tensor


@dataclass(frozen=True, slots=True)
class Method(PrefillMethod):
    """MInference, vertical-slash for every head: a fixed budget of columns and diagonals, in whole blocks."""

    paper: ClassVar[str] = "arXiv:2407.02490"

    vertical: int = option(1024, "tokens of columns to keep", low=1)
    slash: int = option(6144, "tokens of diagonals to keep", low=1)
    last_q: int = option(64, "last queries that show the pattern", low=1)

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Plan | None:
        num_vertical, num_slash = -(-self.vertical // self.block), -(-self.slash // self.block)
        k = keys_values(kv)[0]
        blocks = -(-k.shape[1] // self.block)
        if q_BTHD.shape[1] == 1 or num_slash >= blocks or num_vertical >= blocks:
            return None
        mass = vertical_slash_mass(q_BTHD[:, -self.last_q :], k, ctx.scale, self.block)
        counts = (torch.full((), n, device=k.device) for n in (num_vertical, num_slash))  # no copy from the host
        vertical, slash = (top_k(m, n) for m, n in zip(mass, counts, strict=True))
        vertical[..., 0] = True
        slash[..., 0] = True
        return Plan(vertical, slash)

    def mask(self, plan: Plan, blocks: range) -> BlockMask:
        return block_lists(vertical_slash_blocks(plan.vertical, plan.slash, blocks), self.block, blocks.start)
