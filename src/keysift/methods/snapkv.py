"""Keys that the last prompt queries attended to, chosen once after prefill (SnapKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.methods.base import BudgetedDecode, option
from keysift.methods.topk import exact_scores
from keysift.ops.heads import group
from keysift.ops.select import top_k
from keysift.types import KV, Ctx, Selection


class Index(NamedTuple):
    """The kept rows of each KV head, int64 ``[B, K, R]``, with their count ``[B, K]``."""

    rows: Tensor
    count: Tensor  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Method(BudgetedDecode):
    """SnapKV: each KV head keeps the keys its observation window attends to; later tokens are all read."""

    paper: ClassVar[str] = "arXiv:2404.14469"
    grows: ClassVar[bool] = False

    sinks: int = option(0, "first keys, always read", low=0)
    window: int = option(32, "last prompt keys: always read, and their queries choose", low=1)
    budget: int | None = option(1024, "prompt keys to read in all, sinks and window included; replaces keep", low=1)
    kernel: int = option(5, "keys that the average pooling of the scores spans, odd", low=1)

    def __post_init__(self) -> None:
        BudgetedDecode.__post_init__(self)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: must be odd")

    @property
    def tail(self) -> int:  # type: ignore[override]
        return self.window

    def build(self, kv: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> Index:
        prompt = kv._replace(start=kv.start - self.sinks, length=kv.length + self.sinks + self.window)
        middle, tokens = kv.contains()[:, None], tail_q_BTHD.shape[1]
        votes = torch.zeros(kv.k.shape[0], kv.k.shape[2], kv.k.shape[1], device=kv.k.device)
        for t in range(tokens):
            seen = prompt._replace(length=prompt.length - (tokens - 1 - t))
            weight = exact_scores(tail_q_BTHD[:, t], seen, ctx.scale).softmax(-1).nan_to_num(0)
            votes += group(weight, kv.k.shape[2], 1).sum(2)
        votes = votes * middle
        pooled = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        chosen = Selection.of(top_k(pooled.masked_fill(~middle, -torch.inf), self.count(kv.length)[:, None]))
        return Index(chosen.rows, chosen.count)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        return Selection(index.rows, index.count)
