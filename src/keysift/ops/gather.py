"""Attention of one query over selected rows, with importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.heads import per_query_head
from keysift.types import KV, Partial, Selection


def gather_attention(q_BHD: Tensor, kv: KV, selection: Selection, scale: float) -> Partial:
    """Self-normalised importance sampling over the selected rows (arXiv:2410.16179).

    A row with log weight ``w`` counts with ``exp(q.k * scale + w)``: where w is the log of 1 / inclusion probability,
    ``exp(lse) * out`` and ``exp(lse)`` are unbiased estimates of the full sums.

    Args:
        q_BHD: one query per sequence and head.
        kv: keys and values; the selection's rows are buffer rows, whatever the view.
        selection: rows per KV head or per query head, in use up to their count.
        scale: factor on q.k.

    Returns:
        Partial with T = 1.
    """
    return gather_attention_reference(q_BHD, kv, selection, scale)


def gather_attention_reference(q_BHD: Tensor, kv: KV, selection: Selection, scale: float) -> Partial:
    """fp32, rows gathered."""
    batch, heads, _ = q_BHD.shape
    rows = per_query_head(selection.rows, heads, 1)
    used = per_query_head(selection.in_use(), heads, 1)
    b = torch.arange(batch, device=rows.device)[:, None, None]
    kv_head = (torch.arange(heads, device=rows.device) // (heads // kv.k.shape[2]))[:, None]
    k_BHRD, v_BHRD = (x[b, rows, kv_head].float().masked_fill(~used[..., None], 0) for x in (kv.k, kv.v))
    z = torch.einsum("bhd,bhrd->bhr", q_BHD.float(), k_BHRD) * scale
    if isinstance(selection.log_w, Tensor):
        z = z + per_query_head(selection.log_w, heads, 1)
    elif selection.log_w is not None:
        z = z + selection.log_w.log_w(q_BHD, k_BHRD)
    z = z.masked_fill(~used, -torch.inf)
    lse = z.logsumexp(-1) if z.shape[-1] else z.new_full((batch, heads), -torch.inf)
    weight = (z - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return Partial(torch.einsum("bhr,bhre->bhe", weight, v_BHRD)[:, None], lse[:, None])
