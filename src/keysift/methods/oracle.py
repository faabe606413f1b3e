"""Sampling with replacement from the exact attention weights: the limit of independent draws (MagicPIG's oracle)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.methods.base import ExactDecode
from keysift.methods.topk import all_keys_bytes, exact_scores
from keysift.ops.random import uniform
from keysift.ops.select import listed
from keysift.types import KV, Ctx, Index, Selection


@dataclass(frozen=True, slots=True)
class Method(ExactDecode):
    """Oracle sampling: keys drawn from the exact weights, each draw counting the same; for studies."""

    paper: ClassVar[str] = "arXiv:2410.16179"

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        weight = exact_scores(q_BHD, kv, ctx.scale).double().softmax(-1).nan_to_num(0)  # an empty middle has no weights
        draws = self.quota(q_BHD, kv).of(kv.length)
        cumulative = weight.cumsum(-1)
        first = ctx.first_head * (q_BHD.shape[1] // kv.k.shape[2])
        head = torch.arange(first, first + q_BHD.shape[1], device=q_BHD.device)[:, None]
        most = max(1, self.most(kv.bound))
        draw = torch.arange(most, device=q_BHD.device)
        u = uniform(ctx.seed, ctx.layer, ctx.positions[:, None, None], head, draw).double() * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, u).clamp(max=weight.shape[-1] - 1)
        counts = (draw < draws[:, None, None]).double().expand(u.shape)
        times = torch.zeros_like(weight).scatter_add_(-1, drawn, counts)
        log_w = (times / (draws[:, None, None] * weight)).log().float()
        rows, count = listed(times > 0, most)
        return Selection(rows, count, log_w.gather(-1, rows.long()))

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor:
        return all_keys_bytes(kv)
