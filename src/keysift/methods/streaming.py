"""Attention sinks and a recent window, nothing between (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from keysift.methods.base import BLOCKS, DENSE_LAYERS, DecodeMethod, check, option
from keysift.ops.lists import block_lists
from keysift.types import KV, BlockMask, Ctx, Index, Selection

DEFAULT_WINDOW = 1008


class Plan(NamedTuple):
    batch: int
    heads: int
    blocks: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Method(DecodeMethod):
    """StreamingLLM: the first and the last keys, in prefill rounded up to whole blocks."""

    paper: ClassVar[str] = "arXiv:2309.17453"

    sinks: int = option(16, "first keys, always read", low=0)
    window: int = option(DEFAULT_WINDOW, "last keys, always read", low=1)
    dense_layers: tuple[int, ...] = option((), DENSE_LAYERS, low=0)
    budget: int | None = option(None, "keys to read in all, instead of window: window = budget - sinks", low=1)
    block: int = option(128, "tokens a block, in prefill", choices=BLOCKS)

    def __post_init__(self) -> None:
        check(self)
        if self.budget is not None:
            if self.budget <= self.sinks:
                raise ValueError(f"budget={self.budget}: must exceed sinks={self.sinks}")
            if self.window not in (DEFAULT_WINDOW, self.budget - self.sinks):
                raise ValueError(f"window={self.window} and budget={self.budget}: give one of them")
            object.__setattr__(self, "window", self.budget - self.sinks)

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Plan | None:
        start, end = kv.known_spans()[0]
        keys = end - start
        if keys <= self.sinks + self.window:
            return None
        return Plan(q_BTHD.shape[0], q_BTHD.shape[2], -(-keys // self.block), q_BTHD.device)

    def mask(self, plan: Plan, blocks: range) -> BlockMask:
        query = torch.arange(blocks.start, blocks.stop, device=plan.device)[:, None]
        column = torch.arange(plan.blocks, device=plan.device)
        sink = column < -(-self.sinks // self.block)
        # the oldest key that the block's first query still sees lies window - 1 tokens before it
        recent = column >= (query * self.block - self.window + 1).div(self.block, rounding_mode="floor")
        active = (sink | recent) & (column <= query)
        return block_lists(active.expand(plan.batch, plan.heads, *active.shape), self.block, blocks.start)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        batch, kv_heads = q_BHD.shape[0], kv.k.shape[2]
        none = torch.zeros(batch, kv_heads, 0, dtype=torch.int64, device=q_BHD.device)
        return Selection(none, none.sum(-1))
