"""Attention of one query over selected rows, with importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops import attention_cpu
from keysift.ops.heads import group, per_query_head
from keysift.ops.lists import on_gpu
from keysift.types import KV, Partial, Selection


def gather_attention(
    q_BHD: Tensor,
    kv: KV,
    selection: Selection,
    scale: float,
    middle: KV | None = None,
    dtype: torch.dtype = torch.float32,
    splits: int | None = None,
    outside: int | None = None,
) -> Partial:
    """Self-normalised importance sampling over the selected rows (arXiv:2410.16179).

    A row with log weight ``w`` counts with ``exp(q.k * scale + w)``: where w is the log of 1 / inclusion probability,
    ``exp(lse) * out`` and ``exp(lse)`` are unbiased estimates of the full sums.

    On a GPU by a Triton kernel that shares the rows of a head out among programs; the host never waits for the device.
    On a CPU by the kernels of ``ops.cpu``.

    Args:
        q_BHD: one query per sequence and head.
        kv: keys and values; the selection's rows are buffer rows, whatever the view.
        selection: rows per KV head or per query head, in use up to their count.
        scale: factor on q.k.
        middle: the part of ``kv`` that the rows were selected from. With it the rows of ``kv`` before and after are
            read too, with weight 1: all rows of a sequence whose middle is empty.
        dtype: of the output.
        splits: shares of a head's rows; None chooses by the device. Never changes more than rounding.
        outside: rows of ``kv`` outside ``middle`` at most, if the host knows; likewise.

    Returns:
        Partial with T = 1.
    """
    if on_gpu(q_BHD):
        from keysift.ops import gather_triton, split_merge_triton

        if split_merge_triton.takes(q_BHD, kv):
            return gather_triton.gather(q_BHD, kv, selection, scale, middle, dtype, splits, outside=outside)
    if attention_cpu.takes(q_BHD, kv):
        return attention_cpu.gather(q_BHD, kv, selection, scale, middle, dtype)
    return gather_attention_reference(q_BHD, kv, selection, scale, middle, dtype)


def gather_attention_reference(
    q_BHD: Tensor,
    kv: KV,
    selection: Selection,
    scale: float,
    middle: KV | None = None,
    dtype: torch.dtype = torch.float32,
) -> Partial:
    """fp32, rows gathered; with a middle it waits for the device to learn how many rows are outside."""
    heads, slots = q_BHD.shape[1], selection.rows.shape[1]
    rows, used, exact = selection.rows.long(), selection.in_use(), 0
    if middle is not None:
        around, counts = _outside(kv, middle)
        exact = around.shape[1]
        rows = torch.cat([around[:, None].expand(-1, slots, -1), rows], -1)
        used = torch.cat([counts[:, None].expand(-1, slots, -1), used], -1)
    share = slots // kv.k.shape[2]
    kv_head = torch.arange(slots, device=rows.device) // share
    k_BSRD, v_BSRD = gathered(kv, rows, used, kv_head[:, None])
    z = torch.einsum("bsgd,bsrd->bsgr", group(q_BHD.float(), slots, 1), k_BSRD).flatten(1, 2) * scale
    if isinstance(selection.log_w, Tensor):
        z[..., exact:] += per_query_head(selection.log_w, heads, 1)
    elif selection.log_w is not None:
        z[..., exact:] += selection.log_w.log_w(q_BHD, per_query_head(k_BSRD[:, :, exact:], heads, 1))
    z = z.masked_fill(~per_query_head(used, heads, 1), -torch.inf)
    weight, lse = normalised(z)
    out = torch.einsum("bsgr,bsre->bsge", group(weight, slots, 1), v_BSRD).flatten(1, 2)
    return Partial(out[:, None].to(dtype), lse[:, None])


def gathered(kv: KV, rows: Tensor, used: Tensor, kv_head: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of buffer rows, fp32 ``[*rows, D]``; zero, and not read, where a row is not ``used``."""
    first, second = (x.masked_fill(~used, 0) for x in kv.locate(rows.masked_fill(~used, 0)))
    return _read(kv.k, first, second, used, kv_head), _read(kv.v, first, second, used, kv_head)


def _read(x: Tensor, first: Tensor, second: Tensor, used: Tensor, kv_head: Tensor) -> Tensor:
    return x[first, second, kv_head].float().masked_fill(~used[..., None], 0)


def normalised(z: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp; 0 and -inf where there is no key."""
    lse = z.logsumexp(-1) if z.shape[-1] else z.new_full(z.shape[:-1], -torch.inf)
    return (z - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp(), lse


def _outside(kv: KV, middle: KV) -> tuple[Tensor, Tensor]:
    """The rows of ``kv`` before and after ``middle``, and which entries count, ``[B, N]``."""
    count = kv.length - middle.length
    before = (middle.start - kv.start)[:, None]  # wherever an empty middle is, rows before and behind it join up
    slot = torch.arange(int(count.max()) if len(count) else 0, device=count.device)
    rows = torch.where(slot < before, kv.start[:, None] + slot, middle.end[:, None] + slot - before)
    return rows, slot < count[:, None]
