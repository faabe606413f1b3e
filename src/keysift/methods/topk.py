"""The keys with the highest scores, found exactly: what selection without sampling could reach at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.methods.base import ExactDecode
from keysift.ops.heads import group
from keysift.ops.select import select_top
from keysift.types import KV, Ctx, Index, Selection


def exact_scores(q_BHD: Tensor, kv: KV, scale: float) -> Tensor:
    """q.k * scale for every row of the buffer, fp32 ``[B, H, S]``; -inf outside the view."""
    q = group(q_BHD.float(), kv.k.shape[2], 1)
    score = torch.einsum("bkgd,bskd->bkgs", q, kv.unpaged().k.float()).flatten(1, 2) * scale
    return score.masked_fill(~kv.contains()[:, None], -torch.inf)


def all_keys_bytes(kv: KV) -> Tensor:
    """Bytes that the exact scores read, ``[B]``."""
    return kv.length * (kv.k.shape[2] * kv.k.shape[3] * kv.k.element_size())


@dataclass(frozen=True, slots=True)
class Method(ExactDecode):
    """TopK: the highest q.k of each query head, by reading all keys first; for studies."""

    paper: ClassVar[str] = "arXiv:2410.16179"

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        score = exact_scores(q_BHD, kv, ctx.scale)
        return Selection(*select_top(score, self.quota(q_BHD, kv).of(kv.length), self.most(kv.bound)))

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor:
        return all_keys_bytes(kv)
