"""Keys that the last prompt queries attended to, chosen once after prefill (SnapKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.methods.base import BudgetedDecode, option
from keysift.ops.heads import group
from keysift.ops.select import top_k
from keysift.types import KV, Ctx, Index, Selection, State

DEFAULT_BUDGET = 1024


@dataclass(frozen=True, slots=True)
class Method(BudgetedDecode):
    """SnapKV: each KV head keeps the keys its observation window attends to; later tokens are all read."""

    paper: ClassVar[str] = "arXiv:2404.14469"
    grows: ClassVar[bool] = False

    sinks: int = option(0, "first keys, always read", low=0)
    window: int = option(32, "last prompt keys: always read, and their queries choose", low=1)
    keep: float | None = option(None, "share of the prompt's middle keys to read; 1 means dense", above=0, high=1)
    budget: int | None = option(
        DEFAULT_BUDGET, "prompt keys to read in all, sinks and window included, instead of keep", low=1
    )
    kernel: int = option(5, "keys that the average pooling of the scores spans, odd", low=1)

    def __post_init__(self) -> None:
        if self.keep is not None and self.budget == DEFAULT_BUDGET:
            object.__setattr__(self, "budget", None)
        BudgetedDecode.__post_init__(self)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: must be odd")

    @property
    def tail(self) -> int:  # type: ignore[override]
        return self.window

    def states(self, kv_heads: int, dim: int, capacity: int) -> dict[str, State]:
        """The kept rows of each KV head, and how many."""
        kept = max(1, self.most(capacity))
        return {"rows": State((kv_heads, kept), torch.int32), "count": State((kv_heads,), torch.int32)}

    def begin(self, index: Index, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        kv, prompt, middle = kv.unpaged(), prompt.unpaged(), kv.contains()[:, None]
        votes = torch.stack([self.votes(h, prompt, tail_q_BTHD, ctx) for h in range(kv.k.shape[2])], 1)
        pooled = F.avg_pool1d(votes.masked_fill(~middle, 0), self.kernel, stride=1, padding=self.kernel // 2)
        count = self.quota(tail_q_BTHD[:, 0], kv).of(kv.length)[:, None]
        chosen = Selection.of(top_k(pooled.masked_fill(~middle, -torch.inf), count))
        index["rows"][..., : chosen.rows.shape[-1]] = chosen.rows
        index["count"].copy_(chosen.count)

    def votes(self, kv_head: int, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> Tensor:
        """Attention that the tail's queries of one group pay to each row, summed, fp32 ``[B, S]``."""
        q = group(tail_q_BTHD.float(), prompt.k.shape[2], 2)[:, :, kv_head]
        score = torch.einsum("btgd,bsd->bgts", q, prompt.k[:, :, kv_head].float()) * ctx.scale
        later = torch.arange(q.shape[1], device=q.device).flip(0)  # tokens of the prompt after each query
        row = torch.arange(score.shape[-1], device=q.device)
        hidden = (row < prompt.start[:, None, None]) | (row >= (prompt.end[:, None] - later)[..., None])
        return score.masked_fill(hidden[:, None], -torch.inf).softmax(-1).nan_to_num(0).sum((1, 2))

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        return Selection(index["rows"], index["count"])
