"""Attention over all keys of a view, causal, bottom-right aligned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.ops.heads import group
from keysift.types import KV, Partial

MASK_ELEMENTS = 1 << 26  # a boolean mask is built for so many (query, key) pairs at a time


def dense_attention(q_BTHD: Tensor, kv: KV, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of the last T positions over all keys, through torch SDPA.

    Args:
        q_BTHD: queries; with T > 1 all sequences must have one length (T = 1 may be ragged).
        kv: keys and values.
        scale: factor on q.k.
        window: sliding window in tokens, the query's own included; None means unlimited.

    Returns:
        Output in the dtype of q, ``[B, T, H, Dv]``; zero for a sequence without keys.
    """
    if q_BTHD.shape[1] == 1:
        return _one_query(q_BTHD, kv, scale, window)
    k, v = keys_values(kv)
    tokens, keys = q_BTHD.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k, v))
    if tokens == keys and (window is None or window >= keys):
        return _sdpa(q, k, v, scale, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
    out, step = [], max(16, MASK_ELEMENTS // keys)
    for lo in range(0, tokens, step):
        hi = min(lo + step, tokens)
        last = keys - tokens + hi
        first = 0 if window is None else max(0, keys - tokens + lo - window + 1)
        mask = _causal(torch.arange(last - (hi - lo), last, device=q.device), first, last, window)
        out.append(_grouped(q[:, :, lo:hi], k[:, :, first:last], v[:, :, first:last], mask, scale))
    return torch.cat(out, 2).transpose(1, 2)


def dense_attention_reference(q_BTHD: Tensor, kv: KV, scale: float, window: int | None = None) -> Partial:
    """The same in fp32, with the log-sum-exp; a bounded number of query rows at a time."""
    k, v = (x.float().transpose(1, 2) for x in keys_values(kv))
    tokens, keys, heads = q_BTHD.shape[1], k.shape[2], q_BTHD.shape[2]
    q = group(q_BTHD.float().transpose(1, 2), k.shape[1], 1)
    outs, lses, step = [], [], max(1, MASK_ELEMENTS // max(1, keys * heads * q.shape[0]))
    for lo in range(0, tokens, step):
        hi = min(lo + step, tokens)
        position = torch.arange(keys - tokens + lo, keys - tokens + hi, device=q.device)
        score = torch.einsum("bkgtd,bknd->bkgtn", q[:, :, :, lo:hi], k) * scale
        score = score.masked_fill(~_causal(position, 0, keys, window), -torch.inf)
        lse = score.logsumexp(-1)
        weight = (score - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        outs.append(torch.einsum("bkgtn,bkne->btkge", weight, v).flatten(2, 3))
        lses.append(lse.flatten(1, 2).transpose(1, 2))
    return Partial(torch.cat(outs, 1), torch.cat(lses, 1))


def keys_values(kv: KV) -> tuple[Tensor, Tensor]:
    """Keys and values of a view whose sequences have one start and one length, ``[B, N, K, *]``."""
    start, length = int(kv.start[0]), int(kv.length[0])
    assert bool((kv.start == start).all() and (kv.length == length).all()), "ragged view"
    return kv.k[:, start : start + length], kv.v[:, start : start + length]


def _causal(position: Tensor, first: int, last: int, window: int | None) -> Tensor:
    key = torch.arange(first, last, device=position.device)
    seen = key <= position[:, None]
    return seen if window is None else seen & (key > position[:, None] - window)


def _one_query(q_BTHD: Tensor, kv: KV, scale: float, window: int | None) -> Tensor:
    if window is not None:
        kv = kv.between(kv.end - window, kv.end)
    first, last = int(kv.start.min()), int(kv.end.max())
    k, v = (x[:, first:last].transpose(1, 2) for x in (kv.k, kv.v))
    seen = kv.contains()[:, first:last]
    mask = None if bool(seen.all()) else seen[:, None, None]
    out = _grouped(q_BTHD.transpose(1, 2), k, v, mask, scale).transpose(1, 2)
    return out.masked_fill((kv.length == 0)[:, None, None, None], 0)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA with a mask: the heads of a group become query rows, so that keys are read once and never repeated."""
    heads, tokens, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    q = group(q, kv_heads, 1).flatten(2, 3)
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat(heads // kv_heads, 1)
    out = _sdpa(q, k, v, scale, attn_mask=mask)
    return out.unflatten(2, (heads // kv_heads, tokens)).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: object) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **options)  # type: ignore[arg-type]
