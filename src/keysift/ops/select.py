"""Choosing entries of a score vector: the k best, or the fewest that cover a share of the mass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keysift.ops.lists import on_cpu, on_gpu


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


def select_top(score_BXN: Tensor, count: Tensor | int, most: int) -> tuple[Tensor, Tensor]:
    """Indices of the ``count`` highest scores of each row, ascending, ties by lower index; the host never waits.

    Args:
        score_BXN: fp32; -inf and NaN are never chosen.
        count: entries to choose, an int or an integer tensor ``[B]`` or ``[B, X]``.
        most: static size of the lists, and the most entries that are chosen.

    Returns:
        Indices, int32 ``[B, X, most]``, and how many of them are in use, int32 ``[B, X]``; the rest is unspecified.
    """
    chosen_lists = _kernel(score_BXN)
    if chosen_lists is None:
        return select_top_reference(score_BXN, count, most)
    lists: tuple[Tensor, Tensor] = chosen_lists(score_BXN, count, most)
    return lists


def _kernel(score: Tensor) -> Callable[..., Any] | None:
    """``chosen_lists`` for the device of a score; None where there is only the reference."""
    if on_gpu(score):
        from keysift.ops import select_triton

        return select_triton.chosen_lists
    if on_cpu(score):
        from keysift.ops import select_cpu

        return select_cpu.chosen_lists
    return None


def select_top_reference(score_BXN: Tensor, count: Tensor | int, most: int) -> tuple[Tensor, Tensor]:
    """The same by sorting."""
    count = count_of_rows(count, score_BXN).clamp(max=most)
    return listed(top_k(score_BXN.masked_fill(score_BXN.isnan(), -torch.inf), count), most)


def select_mass(log_weight_BXN: Tensor, share: float, at_most: Tensor | int, most: int) -> tuple[Tensor, Tensor]:
    """Indices of the fewest entries whose softmax mass reaches ``share``, but of at most ``at_most``; ascending.

    Args:
        log_weight_BXN: fp32; -inf and NaN have no mass and are never chosen.
        share: part of the mass of a row, from 0 to 1.
        at_most: an int or an integer tensor ``[B]`` or ``[B, X]``.
        most: static size of the lists, and the most entries that are chosen.

    Returns:
        Indices and counts as from ``select_top``, which the entries of the largest weights are chosen like.

    Raises:
        ValueError: a share outside 0 .. 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: must be from 0 to 1")
    chosen_lists = _kernel(log_weight_BXN)
    if chosen_lists is None:
        return select_mass_reference(log_weight_BXN, share, at_most, most)
    lists: tuple[Tensor, Tensor] = chosen_lists(log_weight_BXN, at_most, most, share)
    return lists


def select_mass_reference(
    log_weight_BXN: Tensor, share: float, at_most: Tensor | int, most: int
) -> tuple[Tensor, Tensor]:
    """The same by sorting, with masses summed in fp64."""
    score = log_weight_BXN.masked_fill(log_weight_BXN.isnan(), -torch.inf)
    mass = score.double().softmax(-1).nan_to_num(0)  # a row without weights is all NaN
    ordered = mass.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    need = (before < share * mass.sum(-1, keepdim=True)).sum(-1)
    return select_top_reference(score, torch.minimum(need, count_of_rows(at_most, score)), most)


def count_of_rows(count: Tensor | int, rows: Tensor) -> Tensor:
    """An int, or an integer tensor ``[B]`` or ``[B, X]``, as a tensor ``[B, X]`` for ``rows [B, X, ...]``."""
    if isinstance(count, int):
        count = torch.full((), count, dtype=torch.int64, device=rows.device)
    elif count.dim() == 1:
        count = count[:, None]
    return count.expand(rows.shape[:2])


def listed(chosen_BXN: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Ascending indices of the true entries, int32 ``[B, X, most]``, and their number, int32 ``[B, X]``."""
    order = (~chosen_BXN).byte().sort(dim=-1, stable=True).indices[..., :most].int()
    index = torch.nn.functional.pad(order, (0, most - order.shape[-1]))
    return index, chosen_BXN.sum(-1).int()
