"""Sampling with replacement from the exact attention weights: the limit of independent draws (MagicPIG's oracle)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.methods.base import DENSE_LAYERS, BudgetedDecode, option
from keysift.methods.topk import all_keys_bytes, exact_scores
from keysift.ops.random import uniform
from keysift.types import KV, Ctx, Selection


@dataclass(frozen=True, slots=True)
class Method(BudgetedDecode):
    """Oracle sampling: keys drawn from the exact weights, each draw counting the same; for studies."""

    paper: ClassVar[str] = "arXiv:2410.16179"

    dense_layers: tuple[int, ...] = option((0, 1), DENSE_LAYERS, low=0)

    def select(self, q_BHD: Tensor, kv: KV, index: None, ctx: Ctx) -> Selection | None:
        if self.reads_all(kv.length):
            return None
        weight = exact_scores(q_BHD, kv, ctx.scale).double().softmax(-1).nan_to_num(0)  # an empty middle has no weights
        draws = self.count(kv.length)
        cumulative = weight.cumsum(-1)
        head = torch.arange(q_BHD.shape[1], device=q_BHD.device)[:, None]
        draw = torch.arange(int(draws.max()), device=q_BHD.device)
        u = uniform(ctx.seed, ctx.layer, ctx.positions[:, None, None], head, draw).double() * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, u).clamp(max=weight.shape[-1] - 1)
        counts = (draw < draws[:, None, None]).double().expand(u.shape)
        times = torch.zeros_like(weight).scatter_add_(-1, drawn, counts)
        log_w = (times / (draws[:, None, None] * weight)).log().float()
        return Selection.of(times > 0, log_w)

    def scan_bytes(self, kv: KV, index: None) -> int:
        return all_keys_bytes(kv)
