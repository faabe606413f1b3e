"""The path: method + store + operation -> output. Everything that runs a method goes through here."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.cache import Store
from keysift.meter import Meter
from keysift.ops.block_sparse import block_sparse_attention
from keysift.ops.coverage import mass_covered
from keysift.ops.dense import dense_attention, dense_attention_reference
from keysift.ops.gather import gather_attention
from keysift.ops.merge import merge
from keysift.types import KV, Ctx, Decode, Prefill, Selection

LIST_BYTES = 1 << 28  # block lists and the masks they are made of exist for so many bytes at a time


def prefill(
    q_BTHD: Tensor,
    kv: KV,
    method: Prefill,
    ctx: Ctx,
    meter: Meter,
    *,
    window: int | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last T positions, over the blocks that ``method`` chooses.

    A ragged or padded batch goes one sequence at a time; queries before a sequence's first token get zeros. A layer
    with a sliding window of its own stays dense within it.

    Returns:
        Output in q's dtype ``[B, T, H, Dv]``, and the log-sum-exp, fp32 ``[B, T, H]``, if asked for.
    """
    lengths, starts = kv.length.tolist(), kv.start.tolist()
    if len({*lengths}) > 1 or len({*starts}) > 1 or lengths[0] < q_BTHD.shape[1]:
        return _prefill_ragged(q_BTHD, kv, method, ctx, meter, window, with_lse)
    batch, tokens, heads = q_BTHD.shape[:3]
    keys = lengths[0]
    positions = range(keys - tokens, keys)
    exact = window is not None or ctx.layer in method.dense_layers
    plan = None if exact else method.plan(q_BTHD, kv, ctx)
    if plan is None:
        meter.add_dense(positions, heads, batch)
        if with_lse:
            part = dense_attention_reference(q_BTHD, kv, ctx.scale, window)
            return part.out.to(q_BTHD.dtype), part.lse
        return dense_attention(q_BTHD, kv, ctx.scale, window), None
    parts = []
    first, stop = positions.start // method.block, -(-keys // method.block)
    step = max(1, LIST_BYTES // (16 * batch * heads * stop))
    for i in range(first, stop, step):
        mask = method.mask(plan, range(i, min(i + step, stop)))
        parts.append(block_sparse_attention(q_BTHD, kv, mask, ctx.scale, with_lse))
        meter.add_mask(mask, range(max(positions.start, mask.rows().start), min(keys, mask.rows().stop)), heads, batch)
        if meter.measure_mass:
            meter.mass.append(mass_covered(q_BTHD, kv, mask, ctx.scale).flatten().cpu())
    out = torch.cat([part[0] for part in parts], 1)
    if meter.measure_error:
        meter.add_error("prefill", out, dense_attention(q_BTHD, kv, ctx.scale))
    return out, torch.cat([lse for _, lse in parts if lse is not None], 1) if with_lse else None


def _prefill_ragged(
    q_BTHD: Tensor, kv: KV, method: Prefill, ctx: Ctx, meter: Meter, window: int | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    out = q_BTHD.new_zeros(*q_BTHD.shape[:3], kv.v.shape[-1])
    lse = q_BTHD.new_full(q_BTHD.shape[:3], -torch.inf, dtype=torch.float32) if with_lse else None
    for b in range(q_BTHD.shape[0]):
        if tokens := min(q_BTHD.shape[1], int(kv.length[b])):
            one = ctx._replace(positions=ctx.positions[b : b + 1])
            q = q_BTHD[b : b + 1, -tokens:]
            part, part_lse = prefill(q, kv.only(b), method, one, meter, window=window, with_lse=with_lse)
            out[b, -tokens:] = part[0]
            if lse is not None and part_lse is not None:
                lse[b, -tokens:] = part_lse[0]
    return out, lse


def decode(
    q_BHD: Tensor, store: Store, method: Decode, ctx: Ctx, meter: Meter, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new query a sequence: exact over sinks and window, as ``method`` selects from the middle.

    Returns:
        Output in q's dtype ``[B, H, Dv]``, and the log-sum-exp, fp32 ``[B, H]``, if asked for.
    """
    kv, index, selection = store.view(), None, None
    middle, heads = store.middle(method), q_BHD.shape[1]
    if ctx.layer not in method.dense_layers and bool((middle.length > 0).any()):
        index = store.index(method, middle, q_BHD, ctx)
        selection = method.select(q_BHD, middle, index, ctx)
    if selection is None:
        meter.add_step(kv, heads, ctx.layer, None, 0)
        if with_lse:
            part = gather_attention(q_BHD, kv, _outside(kv, kv.between(kv.end, kv.end)), ctx.scale)
            return part.out[:, 0].to(q_BHD.dtype), part.lse[:, 0]
        return dense_attention(q_BHD[:, None], kv, ctx.scale)[:, 0], None
    exact = _outside(kv, middle)
    part = merge(*(gather_attention(q_BHD, kv, rows, ctx.scale) for rows in (exact, selection)))
    meter.add_step(kv, heads, ctx.layer, (exact, selection), method.scan_bytes(middle, index))
    if meter.measure_error:
        meter.add_error("decode", part.out, dense_attention(q_BHD[:, None], kv, ctx.scale))
    return part.out[:, 0].to(q_BHD.dtype), part.lse[:, 0] if with_lse else None


def _outside(kv: KV, middle: KV) -> Selection:
    """The rows of ``kv`` before and after ``middle``, the same for all KV heads."""
    before = torch.minimum(middle.start - kv.start, kv.length)[:, None]
    after = torch.where(middle.length > 0, middle.end, kv.start + before[:, 0])[:, None]
    count = kv.length - middle.length
    slot = torch.arange(int(count.max()), device=count.device)
    rows = torch.where(slot < before, kv.start[:, None] + slot, after + slot - before)
    rows = rows.masked_fill(slot >= count[:, None], 0)
    heads = kv.k.shape[2]
    return Selection(rows[:, None].expand(-1, heads, -1), count[:, None].expand(-1, heads))
