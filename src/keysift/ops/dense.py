"""Attention over all keys of a view, causal, bottom-right aligned."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.ops import attention_cpu, fa4
from keysift.ops.heads import group
from keysift.ops.lists import has_triton
from keysift.ops.short import short_attention
from keysift.types import KV, Partial

FEW = 16  # so many queries a sequence go together, whatever its length
MASK_ELEMENTS = 1 << 26  # a boolean mask is built for so many (query, key) pairs at a time


def dense_attention(q_BTHD: Tensor, kv: KV, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of the last T positions over all keys.

    Up to 16 queries a sequence go through our split kernel, which on a GPU never waits for the device; more through
    FlashAttention-4 where it is installed, else through our Triton kernel where queries are fewer than keys or these
    lie in pages; otherwise, and with a window, through torch SDPA.

    Args:
        q_BTHD: queries; with more than 16, or on a CPU more than one, all sequences must have one length.
        kv: keys and values.
        scale: factor on q.k.
        window: sliding window in tokens, the query's own included; None means unlimited.

    Returns:
        Output in the dtype of q, ``[B, T, H, Dv]``; zero for a sequence without keys.
    """
    out = _few_queries(q_BTHD, kv, scale, window)
    if out is not None:
        return out
    by_kernel = _by_kernel(q_BTHD, kv, scale, window, with_lse=False)
    return by_kernel[0] if by_kernel is not None else _by_sdpa(q_BTHD, kv, scale, window)


def dense_attention_lse(q_BTHD: Tensor, kv: KV, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
    """The same with the log-sum-exp; all sequences must have one length.

    On GPUs through FlashAttention-4 or our Triton kernel; with a window, in fp32, on a CPU: by the reference.

    Returns:
        Output in the dtype of q, ``[B, T, H, Dv]``; lse, fp32 natural log, ``[B, T, H]``, -inf without keys.
    """
    by_kernel = _by_kernel(q_BTHD, kv, scale, window, with_lse=True)
    if by_kernel is not None:
        return by_kernel
    part = dense_attention_reference(q_BTHD, kv, scale, window)
    return part.out.to(q_BTHD.dtype), part.lse


@functools.cache
def triton_kernels() -> Any:
    """The module of the Triton kernel, or None where triton cannot be imported."""
    if not has_triton():
        return None
    return importlib.import_module("keysift.ops.block_sparse_triton")


def _by_kernel(q_BTHD: Tensor, kv: KV, scale: float, window: int | None, with_lse: bool) -> Any:
    """Output and lse (or None) of the fastest kernel that takes the case; None if there is none or SDPA is faster."""
    lengths = {end - start for start, end in kv.known_spans()} if q_BTHD.is_cuda else {0}
    tokens, keys = q_BTHD.shape[1], max(lengths)
    if len(lengths) > 1 or not 0 < tokens <= keys or (window is not None and window < keys):
        return None
    if kv.table is None and len(set(kv.known_spans())) == 1:
        k, v = keys_values(kv)
        if fa4.unsupported(q_BTHD, k, v, scale) is None:
            return fa4.dense(q_BTHD, k, v, scale, with_lse)
    kernels = triton_kernels()
    if (with_lse or tokens < keys or kv.table is not None) and kernels and tokens > 1:
        block = kernels.BLOCKS[-1]
        if kernels.unsupported(q_BTHD, kv, block, scale) is None:
            return kernels.dense(q_BTHD, kv, scale, with_lse, block)
    return None


def _by_sdpa(q_BTHD: Tensor, kv: KV, scale: float, window: int | None) -> Tensor:
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
    """Keys and values of a view whose sequences have one start and one length, ``[B, N, K, *]``; copied from pages."""
    start, end = uniform_span(kv)
    if kv.table is None:
        return kv.k[:, start:end], kv.v[:, start:end]
    row = torch.arange(start, end, device=kv.k.device)
    page = kv.table[:, row // kv.k.shape[1]].long()
    return kv.k[page, row % kv.k.shape[1]], kv.v[page, row % kv.k.shape[1]]


def uniform_span(kv: KV) -> tuple[int, int]:
    """Start and end of a view whose sequences have one start and one length."""
    spans = set(kv.known_spans())
    assert len(spans) == 1, "ragged view"
    return spans.pop()


def _causal(position: Tensor, first: int, last: int, window: int | None) -> Tensor:
    key = torch.arange(first, last, device=position.device)
    seen = key <= position[:, None]
    return seen if window is None else seen & (key > position[:, None] - window)


def _few_queries(q_BTHD: Tensor, kv: KV, scale: float, window: int | None) -> Tensor | None:
    """A decode step or a verification pass; None where many queries are served better."""
    tokens = q_BTHD.shape[1]
    ours = q_BTHD.is_cuda or attention_cpu.takes(q_BTHD, kv)
    if tokens > FEW or (tokens > 1 and (window is not None or not ours)):
        return None
    if window is not None:
        kv = kv.between(kv.end - window, kv.end)
    if ours or kv.table is not None:
        return short_attention(q_BTHD, kv, scale, q_BTHD.dtype).out
    spans = kv.known_spans()
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    k, v = (x[:, first:last].transpose(1, 2) for x in (kv.k, kv.v))
    mask = None if len(set(spans)) == 1 else kv.contains()[:, None, None, first:last]
    out = _grouped(q_BTHD.transpose(1, 2), k, v, mask, scale).transpose(1, 2)
    return out if mask is None else out.masked_fill((kv.length == 0)[:, None, None, None], 0)


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
