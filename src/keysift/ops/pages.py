"""Elementwise bounds of the keys of a page, the score that they allow, and the best pages (Quest, arXiv:2406.10774).

Quest's pages are ``unit`` consecutive tokens, counted from a sequence's first. Their bounds lie beside the keys:
``[pages, K, page // unit, 2, D]``, or ``[B, K, ceil(S / unit), 2, D]`` where the keys have no table; minimum first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops.heads import group
from keysift.ops.lists import on_cpu, on_gpu
from keysift.ops.select import listed, top_k
from keysift.types import KV, Selection, one_of

PER = ("kv_head", "query_head")
LSE_PAGES = 64  # Quest pages whose scores one entry of an lse sums up


class Quota(NamedTuple):
    """How many keys of a view to read: ``share`` of its length and ``keys`` more; at least one, at most all."""

    share: float = 0.0
    keys: int = 0

    def of(self, length: Tensor) -> Tensor:
        """The number for views of these lengths, int64 like them."""
        return torch.minimum(((self.share * length).long() + self.keys).clamp(min=1), length)

    def pages(self, length: Tensor, unit: int) -> Tensor:
        """The same in whole pages, but one at least."""
        return (self.of(length) // unit).clamp(min=1)


def page_count(kv: KV, unit: int) -> int:
    """Quest pages that a sequence may have, as far as the host knows."""
    return -(-kv.bound // unit)


def extend_bounds(bounds: Tensor, kv: KV, unit: int, done: Tensor, most: int) -> None:
    """Bring bounds up to date in place: those of every page that holds a row of the view from ``done`` on.

    If ``done`` is within a page, the page's older rows are read too, so that nothing is left of keys that were taken
    back. A page's bounds are over its rows in the view; pages without one are left alone.

    Args:
        bounds: in the dtype of the keys, as the module says.
        kv: the view; of its keys only rows of the view are read.
        unit: tokens of a Quest page; divides the page of the keys where they have a table.
        done: the bounds hold for buffer rows before it, int64 ``[B]``.
        most: rows from ``done`` on that a sequence may have, known to the host.

    Raises:
        ValueError: a unit that does not divide the page.
    """
    _check(kv, unit)
    if on_gpu(bounds):
        from keysift.ops.pages_triton import extend

        extend(bounds, kv, unit, done, most)
    elif on_cpu(bounds, kv.k):
        from keysift.ops import pages_cpu

        pages_cpu.extend(bounds, kv, unit, done, most)
    else:
        extend_bounds_reference(bounds, kv, unit, done, most)


def extend_bounds_reference(bounds: Tensor, kv: KV, unit: int, done: Tensor, most: int) -> None:
    """The same by gathering the rows."""
    first = kv.first[:, None]
    page = (torch.maximum(done, kv.start)[:, None] - first) // unit
    page = page + torch.arange(touched(most, unit), device=done.device)
    rows = (first + page * unit)[..., None] + torch.arange(unit, device=done.device)
    inside = (rows >= kv.start[:, None, None]) & (rows < kv.end[:, None, None])
    at = kv.locate(rows.clamp(min=0, max=kv.capacity - 1))
    keys = kv.k[at[0].clamp(0, kv.k.shape[0] - 1), at[1]].float()  # [B, pages, unit, K, D]; tables may lie outside
    low = keys.masked_fill(~inside[..., None, None], torch.inf).amin(2)
    high = keys.masked_fill(~inside[..., None, None], -torch.inf).amax(2)
    held = inside.any(-1)
    where, slot = (x[held] for x in _side_at(kv, unit, page))
    bounds[where, :, slot] = torch.stack((low, high), 3)[held].to(bounds.dtype)


def page_scores_lse(q_BHD: Tensor, bounds: Tensor, kv: KV, unit: int, scale: float) -> tuple[Tensor, Tensor]:
    """Upper bound of ``q.k * scale`` over each page: ``sum_d max(q_d low_d, q_d high_d) * scale``.

    Args:
        q_BHD: one query per sequence and head.
        bounds: as the module says; only those of pages that hold a row of the view are read.
        kv: the view.
        unit: tokens of a Quest page.
        scale: positive factor.

    Returns:
        The bounds, fp32 ``[B, H, ceil(kv.bound / unit)]``: -inf for pages before the view's first row, unspecified for
        those behind its last (all of an empty one); and the log-sum-exp of each ``LSE_PAGES``, fp32 ``[B, H, *]``,
        unspecified where all of them are.

    Raises:
        ValueError: a unit that does not divide the page.
    """
    _check(kv, unit)
    if on_gpu(bounds):
        from keysift.ops import pages_triton

        return pages_triton.scores(q_BHD, bounds, kv, unit, scale)
    if on_cpu(bounds, q_BHD):
        from keysift.ops import pages_cpu

        return pages_cpu.scores(q_BHD, bounds, kv, unit, scale)
    score = page_scores_reference(q_BHD, bounds, kv, unit, scale)
    return score, _lse(score)


def page_scores_reference(q_BHD: Tensor, bounds: Tensor, kv: KV, unit: int, scale: float) -> Tensor:
    """fp32, bounds gathered."""
    page = torch.arange(page_count(kv, unit), device=q_BHD.device).expand(q_BHD.shape[0], -1)
    first, last = _ends(kv, unit)
    inside = (page >= first[:, None]) & (page < last[:, None])
    where, slot = _side_at(kv, unit, page)
    entry = bounds[where.clamp(0, bounds.shape[0] - 1), :, slot].float().masked_fill(~inside[..., None, None, None], 0)
    low, high = entry.unbind(3)  # [B, P, K, D]
    q = group(q_BHD.float(), bounds.shape[1], 1)
    score = torch.einsum("bkgd,bpkd->bkgp", q.clamp(min=0), high) + torch.einsum("bkgd,bpkd->bkgp", q.clamp(max=0), low)
    return (score * scale).flatten(1, 2).masked_fill(~inside[:, None], -torch.inf)


def top_pages(
    score_BHP: Tensor,
    kv: KV,
    unit: int,
    count: Tensor | Quota,
    most_pages: int,
    per: str = "kv_head",
    lse: Tensor | None = None,
) -> Selection:
    """The rows of the best pages, in ascending order and clipped to the view; ties go to the earlier page.

    Per KV head a page counts with the sum of its softmax weights over the heads of the group, each head's softmax
    taken over the upper bounds of all pages of the view: heads weigh the same, and a page that one head needs badly is
    not outvoted. Weights are fp32, so pages 87 below their heads' best tie at zero. Per query head, as in the paper,
    the scores themselves count.

    Args:
        score_BHP: of ``page_scores_lse``; pages without a row of the view, and -inf, are never chosen.
        kv: the view.
        unit: tokens of a Quest page.
        count: pages to read, integers ``[B]``, or a quota of keys.
        most_pages: static bound of count; no more pages are read.
        per: "kv_head" or "query_head".
        lse: log-sum-exp of each ``LSE_PAGES`` scores, fp32 ``[B, H, *]``, as ``page_scores_lse`` gives it; None to
            compute it, of scores that are all specified.

    Returns:
        Rows, int32 ``[B, K or H, most_pages * unit]``, and counts, int32.

    Raises:
        ValueError: an unknown ``per``.
    """
    one_of("per", per, PER)
    if on_gpu(score_BHP):
        from keysift.ops.pages_triton import top
    elif on_cpu(score_BHP):
        from keysift.ops.pages_cpu import top
    else:
        return top_pages_reference(score_BHP, kv, unit, count, most_pages, per)
    return top(score_BHP, kv, unit, count, most_pages, per == "kv_head", _lse(score_BHP) if lse is None else lse)


def top_pages_reference(
    score_BHP: Tensor, kv: KV, unit: int, count: Tensor | Quota, most_pages: int, per: str = "kv_head"
) -> Selection:
    """The same by sorting."""
    first, last = _ends(kv, unit)
    page = torch.arange(score_BHP.shape[-1], device=score_BHP.device)
    inside = ((page >= first[:, None]) & (page < last[:, None]))[:, None]
    score = score_BHP.masked_fill(~inside, -torch.inf)
    if per == "kv_head":
        weight = (score - _lse(score).logsumexp(-1, keepdim=True)).exp()
        inside = inside & (score > -torch.inf).unflatten(1, (kv.k.shape[2], -1)).any(2)
        score = group(weight.nan_to_num(0), kv.k.shape[2], 1).sum(2).masked_fill(~inside, -torch.inf)
    wanted = count.pages(kv.length, unit) if isinstance(count, Quota) else count
    index, used = listed(top_k(score, wanted.clamp(max=most_pages)[:, None]), most_pages)
    return _rows(index.long(), used.long(), kv, unit)


def _rows(page_BXN: Tensor, used_BX: Tensor, kv: KV, unit: int) -> Selection:
    """Rows of ascending pages: only the view's first page and its last can be cut."""
    first, start, end = (x[:, None] for x in (kv.first, kv.start, kv.end))
    none = used_BX == 0
    last = page_BXN.gather(-1, (used_BX - 1).clamp(min=0)[..., None])[..., 0]
    lead = (start - first - page_BXN[..., 0] * unit).clamp(min=0).masked_fill(none, 0)
    tail = (first + (last + 1) * unit - end).clamp(min=0).masked_fill(none, 0)
    slot = lead[..., None] + torch.arange(page_BXN.shape[-1] * unit, device=page_BXN.device)
    page = page_BXN.gather(-1, (slot // unit).clamp(max=page_BXN.shape[-1] - 1))
    rows = first[..., None] + page * unit + slot % unit
    return Selection(rows.int(), (used_BX * unit - lead - tail).int())


def _check(kv: KV, unit: int) -> None:
    if unit < 1 or (kv.table is not None and kv.k.shape[1] % unit):
        of = "" if kv.table is None else f", a divisor of the {kv.k.shape[1]} tokens of a page"
        raise ValueError(f"unit={unit}: must be a positive number of tokens{of}")


def touched(most: int, unit: int) -> int:
    """Quest pages that ``most`` rows in one piece may touch; one that holds the row before, if there are none."""
    return (max(most, 1) + unit - 2) // unit + 1


def _ends(kv: KV, unit: int) -> tuple[Tensor, Tensor]:
    """First page that holds a row of the view, and one past the last; alike where it is empty."""
    first = (kv.start - kv.first) // unit
    last = (kv.end - kv.first + unit - 1) // unit
    return first, torch.where(kv.length > 0, last, first)


def _side_at(kv: KV, unit: int, page_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The first and third index into the bounds of pages; anything for pages past the last."""
    b = torch.arange(page_BP.shape[0], device=page_BP.device)[:, None]
    if kv.table is None:
        return b.expand_as(page_BP), page_BP.clamp(max=-(-kv.k.shape[1] // unit) - 1)
    per = kv.k.shape[1] // unit
    return kv.table[b, (page_BP // per).clamp(max=kv.table.shape[1] - 1)].long(), page_BP % per


def _lse(score_BHP: Tensor) -> Tensor:
    """Log-sum-exp of each LSE_PAGES scores."""
    rest = -score_BHP.shape[-1] % LSE_PAGES
    parts = torch.nn.functional.pad(score_BHP, (0, rest), value=-torch.inf).unflatten(-1, (-1, LSE_PAGES))
    return parts.logsumexp(-1)
