"""Elementwise bounds of the keys of a page, and the score they allow (Quest, arXiv:2406.10774)."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.heads import group
from keysift.types import KV


def page_bounds(kv: KV, page: int, num_pages: int) -> tuple[Tensor, Tensor]:
    """Elementwise minimum and maximum of the keys of each page; pages count from the first row of the view.

    Returns:
        Two fp32 tensors ``[B, K, num_pages, D]``; +inf and -inf where a page holds no row of the view.
    """
    rows = kv.start[:, None] + torch.arange(num_pages * page, device=kv.k.device)
    inside = (rows < kv.end[:, None])[..., None, None]
    b = torch.arange(len(rows), device=rows.device)[:, None]
    k = kv.k[b, rows.clamp(max=kv.k.shape[1] - 1)].float()
    low = k.masked_fill(~inside, torch.inf).unflatten(1, (num_pages, page)).amin(2)
    high = k.masked_fill(~inside, -torch.inf).unflatten(1, (num_pages, page)).amax(2)
    return low.transpose(1, 2), high.transpose(1, 2)


def page_scores(q_BHD: Tensor, low_BKPD: Tensor, high_BKPD: Tensor) -> Tensor:
    """Upper bound of q.k over each page, ``sum_d max(q_d low_d, q_d high_d)``, fp32 ``[B, H, P]``; -inf if empty."""
    empty = (low_BKPD > high_BKPD).any(-1)
    low, high = (x.masked_fill(empty[..., None], 0) for x in (low_BKPD, high_BKPD))
    q = group(q_BHD.float(), low.shape[1], 1)
    score = torch.einsum("bkgd,bkpd->bkgp", q.clamp(min=0), high) + torch.einsum("bkgd,bkpd->bkgp", q.clamp(max=0), low)
    return score.masked_fill(empty[:, :, None], -torch.inf).flatten(1, 2)
