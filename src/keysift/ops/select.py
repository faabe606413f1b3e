"""Choosing entries of a score vector: the k best, or the fewest that cover a share of the mass."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(score: Tensor, count: Tensor | int) -> Tensor:
    """The ``count`` highest entries of the last dimension, ties by lower index, as bool like ``score``.

    ``count`` is an int or an integer tensor that broadcasts to score's leading dimensions; -inf is never chosen.
    """
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    rank = torch.arange(score.shape[-1], device=score.device)
    count = torch.as_tensor(count, device=score.device)[..., None]
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, (rank < count).expand(order.shape))
    return chosen & (score != -torch.inf)


def cover(mass: Tensor, share: float, at_least: int = 1, at_most: int | None = None) -> Tensor:
    """The fewest entries of the last dimension whose mass reaches ``share`` of the total, as bool like ``mass``.

    The number is then clamped to ``at_least`` .. ``at_most``; entries of zero mass may be taken to reach ``at_least``.
    """
    ordered, order = torch.sort(mass, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of all larger entries: an entry is needed while this is short
    need = (before < share * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    need = need.clamp(min=at_least, max=mass.shape[-1] if at_most is None else at_most)
    rank = torch.arange(mass.shape[-1], device=mass.device)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, rank < need)
