"""Attention of a few new tokens over all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops import attention_cpu
from keysift.ops.gather import gathered, normalised
from keysift.ops.heads import group
from keysift.ops.lists import on_gpu
from keysift.types import KV, Partial


def short_attention(
    q_BTHD: Tensor,
    kv: KV,
    scale: float,
    dtype: torch.dtype = torch.float32,
    splits: int | None = None,
) -> Partial:
    """Causal attention of the last T positions of each sequence over all rows of the view, for small T.

    Made to verify drafted tokens (arXiv:2408.11049) and for dense decode: on a GPU a Triton kernel reads every key once
    for up to 128 pairs of a token and a head that see it; the host never waits for the device.

    Args:
        q_BTHD: queries of the last T positions; lengths may differ, and be less than T.
        kv: keys and values.
        scale: factor on q.k.
        dtype: of the output.
        splits: shares of a sequence's rows; None chooses by the device. Never changes more than rounding.

    Returns:
        Partial; 0 and -inf for a query before the first key.
    """
    if on_gpu(q_BTHD):
        from keysift.ops import gather_triton, split_merge_triton

        if split_merge_triton.takes(q_BTHD, kv):
            return gather_triton.short(q_BTHD, kv, scale, dtype, splits)
    if attention_cpu.takes(q_BTHD, kv):
        return attention_cpu.short(q_BTHD, kv, scale, dtype)
    return short_attention_reference(q_BTHD, kv, scale, dtype)


def short_attention_reference(q_BTHD: Tensor, kv: KV, scale: float, dtype: torch.dtype = torch.float32) -> Partial:
    """fp32; waits for the device where the host does not know the lengths."""
    tokens, kv_heads = q_BTHD.shape[1], kv.k.shape[2]
    slot = torch.arange(max((end - start for start, end in kv.known_spans()), default=0), device=q_BTHD.device)
    used = (slot < kv.length[:, None])[..., None]
    k_BSKD, v_BSKD = gathered(
        kv, (kv.start[:, None] + slot)[..., None], used, torch.arange(kv_heads, device=slot.device)
    )
    z = torch.einsum("btkgd,bskd->btkgs", group(q_BTHD.float(), kv_heads, 2), k_BSKD) * scale
    last = kv.length[:, None] - tokens + torch.arange(tokens, device=slot.device)  # key of each query itself
    z = z.masked_fill(slot > last[:, :, None, None, None], -torch.inf)
    weight, lse = normalised(z)
    return Partial(torch.einsum("btkgs,bske->btkge", weight, v_BSKD).flatten(2, 3).to(dtype), lse.flatten(2, 3))
