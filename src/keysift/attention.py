"""The path: method + store + operation -> output. Everything that runs a method goes through here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from keysift.cache import Store
from keysift.meter import Meter, StepMeter
from keysift.offload import OffloadedStore, arriving
from keysift.ops.block_sparse import Backend, block_sparse_attention, block_sparse_attention_varlen
from keysift.ops.coverage import mass_covered
from keysift.ops.crossover import dense_below_bytes
from keysift.ops.dense import dense_attention, dense_attention_lse
from keysift.ops.gather import gather_attention
from keysift.ops.merge import merge
from keysift.ops.prune import prune
from keysift.ops.short import short_attention
from keysift.types import KV, BlockMask, Ctx, Decode, Index, Law, Partial, Prefill, Selection

Dense = Callable[[Tensor, KV, float, int | None], Tensor]  # as dense_attention
LIST_BYTES = 1 << 28  # block lists of a sequence, and the masks they are made of, exist for so many bytes at a time


def prefill(
    q_BTHD: Tensor,
    kv: KV,
    method: Prefill,
    ctx: Ctx,
    meter: Meter,
    *,
    window: int | None = None,
    with_lse: bool = False,
    backend: Backend = "auto",
    dense: Dense | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last T positions, over the blocks that ``method`` chooses.

    In a ragged or padded batch queries before a sequence's first token get zeros. A layer with a sliding window of its
    own stays dense within it. ``backend`` is that of ``block_sparse_attention``, ``dense`` what reads all keys in the
    place of ``dense_attention``, of one sequence or of several alike.

    Returns:
        Output in q's dtype ``[B, T, H, Dv]``, and the log-sum-exp, fp32 ``[B, T, H]``, if asked for.
    """
    spans = {*kv.known_spans()}
    start, end = next(iter(spans))
    batch, tokens, heads = q_BTHD.shape[:3]
    keys = end - start
    if len(spans) > 1 or keys < tokens:
        return _prefill_ragged(q_BTHD, kv, method, ctx, meter, window, with_lse, backend)
    positions = range(keys - tokens, keys)
    exact = window is not None or ctx.layer in method.dense_layers
    plan = None if exact else method.plan(q_BTHD, kv, ctx)
    if plan is None:
        meter.add_dense(positions, heads, batch)
        if with_lse:
            return dense_attention_lse(q_BTHD, kv, ctx.scale, window)
        return (dense or dense_attention)(q_BTHD, kv, ctx.scale, window), None
    parts = []
    for blocks in list_ranges(positions, method.block, batch * heads):
        mask = method.mask(plan, blocks)
        parts.append(block_sparse_attention(q_BTHD, kv, mask, ctx.scale, with_lse, backend))
        _note(meter, mask, q_BTHD, kv, ctx.scale)
    out = parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts], 1)
    if meter.measure_error:
        meter.add_error("prefill", out, dense_attention(q_BTHD, kv, ctx.scale))
    return out, torch.cat([lse for _, lse in parts if lse is not None], 1) if with_lse else None


def prefill_varlen(
    q_THD: Tensor,
    cu_seqlens_q: Sequence[int],
    kv: KV,
    method: Prefill,
    ctx: Ctx,
    meter: Meter,
    *,
    with_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The same for packed queries of sequences of any lengths; those that a method reads sparsely share one launch.

    Args:
        q_THD: queries ``[total, H, D]``; those of a sequence are its last positions.
        cu_seqlens_q: rows at which the sequences begin, and ``total``: B + 1 numbers of the host.
        kv: keys and values of B sequences, with spans that the host knows.

    Returns:
        Output in q's dtype ``[total, H, Dv]``, and the log-sum-exp, fp32 ``[total, H]``, if asked for.
    """
    sequences = [slice(a, b) for a, b in itertools.pairwise(cu_seqlens_q)]
    masks = [
        _whole_mask(q_THD[None, rows], kv.only(b), method, _of_sequence(ctx, b), meter)
        for b, rows in enumerate(sequences)
    ]
    listed = [mask for mask in masks if mask is not None]
    if len(listed) == len(sequences):
        return block_sparse_attention_varlen(q_THD, cu_seqlens_q, kv, listed, ctx.scale, with_lse, backend)
    out = q_THD.new_zeros(*q_THD.shape[:2], kv.v.shape[-1])
    lse = q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=torch.float32) if with_lse else None
    for b, (rows, mask) in enumerate(zip(sequences, masks, strict=True)):
        q, one = q_THD[None, rows], kv.only(b)
        if mask is not None:
            part, part_lse = block_sparse_attention(q, one, mask, ctx.scale, with_lse, backend)
        elif q.shape[1]:
            alone = _of_sequence(ctx, b)
            part, part_lse = prefill(q, one, method, alone, meter, with_lse=with_lse, backend=backend)
        else:
            continue
        out[rows] = part[0]
        if lse is not None and part_lse is not None:
            lse[rows] = part_lse[0]
    return out, lse


def list_ranges(positions: range, block: int, heads: int) -> list[range]:
    """The query blocks of some positions, as many at a time as lists may exist for."""
    first, stop = positions.start // block, -(-positions.stop // block)
    step = max(1, LIST_BYTES // (16 * heads * stop))
    return [range(i, min(i + step, stop)) for i in range(first, stop, step)]


def _note(meter: Meter, mask: BlockMask, q_BTHD: Tensor, kv: KV, scale: float) -> None:
    """Count what is read of the queries that ``mask`` speaks of."""
    start, end = kv.known_spans()[0]
    batch, tokens, heads = q_BTHD.shape[:3]
    rows, keys = mask.rows(), end - start
    meter.add_mask(mask, range(max(keys - tokens, rows.start), min(keys, rows.stop)), heads, batch)
    if meter.measure_mass:
        meter.mass.append(mass_covered(q_BTHD, kv, mask, scale).flatten())


def _of_sequence(ctx: Ctx, b: int) -> Ctx:
    return ctx._replace(positions=ctx.positions[b : b + 1])


def _whole_mask(q_BTHD: Tensor, kv: KV, method: Prefill, ctx: Ctx, meter: Meter) -> BlockMask | None:
    """The mask of all queries of a sequence, counted; None where it is dense, has none, or would take several masks."""
    if not q_BTHD.shape[1]:
        return None
    start, end = kv.known_spans()[0]
    chunks = list_ranges(range(end - start - q_BTHD.shape[1], end - start), method.block, q_BTHD.shape[2])
    if len(chunks) > 1 or ctx.layer in method.dense_layers or meter.measure_error:
        return None
    plan = method.plan(q_BTHD, kv, ctx)
    if plan is None:
        return None
    mask = method.mask(plan, chunks[0])
    _note(meter, mask, q_BTHD, kv, ctx.scale)
    return mask


def _prefill_ragged(
    q_BTHD: Tensor,
    kv: KV,
    method: Prefill,
    ctx: Ctx,
    meter: Meter,
    window: int | None,
    with_lse: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    out = q_BTHD.new_zeros(*q_BTHD.shape[:3], kv.v.shape[-1])
    lse = q_BTHD.new_full(q_BTHD.shape[:3], -torch.inf, dtype=torch.float32) if with_lse else None
    tokens = [min(q_BTHD.shape[1], end - start) for start, end in kv.known_spans()]
    if window is None and all(tokens):
        packed = torch.cat([q_BTHD[b, -t:] for b, t in enumerate(tokens)])
        cu_seqlens = [0, *itertools.accumulate(tokens)]
        part, part_lse = prefill_varlen(packed, cu_seqlens, kv, method, ctx, meter, with_lse=with_lse, backend=backend)
        for b, (lo, hi) in enumerate(itertools.pairwise(cu_seqlens)):
            out[b, lo - hi :] = part[lo:hi]
            if lse is not None and part_lse is not None:
                lse[b, lo - hi :] = part_lse[lo:hi]
        return out, lse
    for b in range(q_BTHD.shape[0]):
        if tokens[b]:
            q = q_BTHD[b : b + 1, -tokens[b] :]
            part, part_lse = prefill(
                q, kv.only(b), method, _of_sequence(ctx, b), meter, window=window, with_lse=with_lse, backend=backend
            )
            out[b, -tokens[b] :] = part[0]
            if lse is not None and part_lse is not None:
                lse[b, -tokens[b] :] = part_lse[0]
    return out, lse


class Rows(Protocol):
    """What a decode step asks of a store."""

    def view(self) -> KV: ...

    def middle(self, method: Decode) -> KV: ...

    def longest_middle(self, method: Decode) -> int: ...

    def most_outside(self, method: Decode) -> int | None: ...

    def index(self, method: Decode, q_BHD: Tensor, ctx: Ctx) -> Index: ...


def decode(
    q_BHD: Tensor,
    store: Rows,
    method: Decode,
    ctx: Ctx,
    meter: Meter | StepMeter | None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new query a sequence: exact over sinks and window, as ``method`` selects from the middle.

    On a GPU nothing here waits for the device, so the step may be captured, with a ``StepMeter`` or without.

    Returns:
        Output in q's dtype ``[B, H, Dv]``, and the log-sum-exp, fp32 ``[B, H]``, if asked for.
    """
    selection = select(q_BHD, store, method, ctx, meter)
    if selection is None and not with_lse:
        return dense_attention(q_BHD[:, None], store.view(), ctx.scale)[:, 0], None
    part = attend(q_BHD, store, method, selection, ctx)
    if meter is not None and meter.measure_error and selection is not None:
        meter.add_error("decode", part.out, dense_attention(q_BHD[:, None], store.view(), ctx.scale))
    return part.out[:, 0], part.lse[:, 0] if with_lse else None


def attend(q_BHD: Tensor, store: Rows, method: Decode, selection: Selection | None, ctx: Ctx) -> Partial:
    """Attention of one new query a sequence over what is selected of the middle, None for all of it, and over sinks
    and window; the output in q's dtype, ``[B, 1, H, Dv]``."""
    kv = store.view()
    if selection is None:
        return short_attention(q_BHD[:, None], kv, ctx.scale, dtype=q_BHD.dtype)
    outside = store.most_outside(method)
    return gather_attention(q_BHD, kv, selection, ctx.scale, store.middle(method), q_BHD.dtype, outside=outside)


def short(q_BTHD: Tensor, store: Store, scale: float, window: int | None = None) -> Tensor:
    """Dense attention of a few new tokens a sequence, T at a time, each over all keys up to its own; ``window`` is that
    of a layer that has one.

    Returns:
        Output in q's dtype ``[B, T, H, Dv]``.
    """
    kv = store.view()
    if window is None:
        return short_attention(q_BTHD, kv, scale, q_BTHD.dtype).out
    tokens = q_BTHD.shape[1]
    ends = (kv.end - (tokens - 1 - i) for i in range(tokens))
    out = [
        dense_attention(q_BTHD[:, i : i + 1], kv.between(kv.start, end), scale, window) for i, end in enumerate(ends)
    ]
    return torch.cat(out, 1)


def select(
    q_BHD: Tensor, store: Rows, method: Decode, ctx: Ctx, meter: Meter | StepMeter | None, rows: Rows | None = None
) -> Selection | None:
    """What a step reads of the middle, counted; None where it reads all of it.

    Args:
        store: with the method's side data.
        rows: where the rows are, if the store has side data alone.
    """
    kv, middle = store.view(), store.middle(method)
    if not chooses(method, rows or store, ctx.layer):
        selection = None
    else:
        index = store.index(method, q_BHD, ctx)
        selection = method.select(q_BHD, middle, index, ctx)
    if selection is None:
        if meter is not None:
            meter.add_step(kv, q_BHD.shape[1], ctx.layer, None, None, 0)
        return None
    scanned = 0 if meter is None else method.scan_bytes(middle, index, q_BHD.shape[1])
    if method.top_p is not None:
        if meter is not None:  # their keys are read to see what can go
            scanned = scanned + selection.count.sum(1) * kv.k.shape[-1] * kv.k.element_size()
        selection = prune(selection, q_BHD, kv, ctx.scale, method.top_p)
    if meter is not None:
        meter.add_step(kv, q_BHD.shape[1], ctx.layer, middle, selection, scanned)
    return selection


def decode_offloaded(q_BHD: Tensor, store: OffloadedStore, method: Decode, ctx: Ctx, meter: Meter) -> Tensor:
    """The same where the middle is on the host: the device attends to sinks and window while the host does the rest.

    Returns:
        Output in q's dtype ``[B, H, Dv]``.
    """
    store.bring_up_to_date(ctx)
    there = arriving(q_BHD)
    if store.side is None:
        beside = attend_beside(q_BHD, store.near, method, ctx.scale)
        q = there()  # from here on the device is at work, and so is the host
        selection = select(q, store.host, method, ctx._replace(positions=store.host.view().length - 1), meter)
    else:
        ctx = ctx._replace(positions=store.side.view().length - 1)
        chosen = select(q_BHD, store.side, method, ctx, meter, store.host)
        sent = selection_arriving(chosen)
        beside = attend_beside(q_BHD, store.near, method, ctx.scale)
        q, selection = there(), sent()
    far = attend_on_host(q, store.host, selection, method, ctx.scale)
    part = merge(beside, Partial(*(x.to(q_BHD.device) for x in far)))
    return part.out[:, 0].to(q_BHD.dtype)


def attend_beside(q_BHD: Tensor, near: Store, method: Decode, scale: float) -> Partial:
    """Attention over sinks and window."""
    kv = near.view()
    nobody = torch.zeros(len(q_BHD), kv.k.shape[2], 1, dtype=torch.int32, device=kv.k.device)
    return gather_attention(q_BHD, kv, Selection(nobody, nobody[..., 0]), scale, near.middle(method))


def attend_on_host(q_BHD: Tensor, host: Store, selection: Selection | None, method: Decode, scale: float) -> Partial:
    """Attention over what is selected of the middle, or all of it."""
    if selection is None:
        return short_attention(q_BHD[:, None], host.middle(method), scale)
    return gather_attention(q_BHD, host.view(), selection, scale)


def selection_arriving(selection: Selection | None) -> Callable[[], Selection | None]:
    """``arriving`` for a selection."""
    if selection is None:
        return lambda: None
    law = isinstance(selection.log_w, Law)
    weights = () if selection.log_w is None else tuple(selection.log_w) if law else (selection.log_w,)
    parts = [arriving(x) for x in (selection.rows, selection.count, *weights)]

    def wait() -> Selection:
        rows, count, *of_rows = (part() for part in parts)
        return Selection(rows, count, Law(*of_rows) if law else of_rows[0] if of_rows else None)

    return wait


def chooses(method: Decode, store: Rows, layer: int) -> bool:
    """Whether a decode step asks the method at all, as far as the host knows.

    Not where its layer is dense, where it would take everything, or where dense attention is known to be faster.
    """
    if layer in method.dense_layers or method.covers(store.longest_middle(method)):
        return False
    kv = store.view()
    if method.dense_below is not None:
        return kv.bound >= method.dense_below
    row = sum(x.shape[-1] * x.element_size() for x in (kv.k, kv.v))
    name = type(method).__module__.rpartition(".")[2]
    return kv.start.shape[0] * kv.bound * kv.k.shape[2] * row >= dense_below_bytes(kv.k.device, name)
