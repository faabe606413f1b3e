"""Dropping selected rows that the output hardly needs (Twilight, arXiv:2502.02770)."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.heads import group, per_query_head
from keysift.ops.select import listed, select_mass
from keysift.types import KV, Selection


def prune(selection: Selection, q_BHD: Tensor, kv: KV, scale: float, top_p: float) -> Selection:
    """The fewest of the selected rows whose weights reach the share ``top_p`` of all selected rows' weights.

    A row's weight for a head is ``exp(q.k * scale + log_w)``; where a group shares rows, those stay that any of its
    heads needs. The rows keep their order and their log_w, and there is room for as many as before. Reads the keys of
    the selected rows, and no values; the host never waits.

    Args:
        selection: rows per KV head or per query head.
        q_BHD: one query per sequence and head.
        kv: keys; the selection's rows are buffer rows, whatever the view.
        scale: factor on q.k.
        top_p: share of the weights to keep, above 0; 1 keeps every row.

    Raises:
        ValueError: top_p outside of 0 .. 1.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    if top_p == 1:
        return selection
    heads, slots, room = q_BHD.shape[1], *selection.rows.shape[1:]
    index, count = select_mass(_log_weights(selection, q_BHD, kv, scale), top_p, room, room)
    used = torch.arange(room, device=index.device) < count[..., None]
    if heads != slots:
        needed = torch.zeros(*index.shape[:2], room + 1, dtype=torch.bool, device=index.device)
        needed.scatter_(-1, index.long().masked_fill(~used, room), True)
        index, count = listed(group(needed[..., :room], slots, 1).any(2), room)
        used = torch.arange(room, device=index.device) < count[..., None]
    at, log_w = index.long().masked_fill(~used, 0), selection.log_w  # what is not in use may be anything
    log_w = log_w.gather(-1, at) if isinstance(log_w, Tensor) else log_w
    return Selection(selection.rows.gather(-1, at), count.to(selection.count.dtype), log_w)


def _log_weights(selection: Selection, q_BHD: Tensor, kv: KV, scale: float) -> Tensor:
    """Of every head and selected row, fp32 ``[B, H, R]``; -inf where a row does not count."""
    heads, slots = q_BHD.shape[1], selection.rows.shape[1]
    used = selection.in_use()
    first, second = (x.masked_fill(~used, 0) for x in kv.locate(selection.rows.masked_fill(~used, 0)))
    kv_head = torch.arange(slots, device=used.device) // (slots // kv.k.shape[2])
    k_BSRD = kv.k[first, second, kv_head[:, None]].float().masked_fill(~used[..., None], 0)
    z = torch.einsum("bsgd,bsrd->bsgr", group(q_BHD.float(), slots, 1), k_BSRD).flatten(1, 2) * scale
    if isinstance(selection.log_w, Tensor):
        z = z + per_query_head(selection.log_w, heads, 1)
    elif selection.log_w is not None:
        z = z + selection.log_w.log_w(q_BHD, per_query_head(k_BSRD, heads, 1))
    return z.masked_fill(~per_query_head(used, heads, 1), -torch.inf)
