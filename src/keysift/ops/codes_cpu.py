"""The CPU kernels behind ``keysift.ops.codes``: hash keys and queries, match their codes, list the keys that collide.

Keys of 16 bits are hashed as integers of 16 bits, on a common scale for each vector, or as bf16 where the CPU
multiplies that; fp32 keys in fp32. A bit may differ from the reference's where a product is within some 1e-4 of its
standard deviation of the threshold. Directions may be bf16 or fp32: their numbers are bf16 in either case, and reading
them takes most of the time of a decode step's hash.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.codes import UNIT, WORDS
from keysift.ops.cpu.library import DTYPES, Args
from keysift.ops.select_cpu import I32, I64, PTR, View, call, fields, fill_view, pointer, rows_in_one_piece
from keysift.types import KV, Law, Selection


class _HashPlanes(View):
    _fields_ = fields(
        ("planes", PTR),
        ("planes_stride_0", I64),
        ("planes_stride_head", I64),
        ("planes_stride_entry", I64),
        ("mean", PTR),
        ("threshold", PTR),
        ("w", PTR),
        ("w_stride_head", I64),
        ("columns", I64),
        ("done", PTR),
        ("most", I64),
        ("w_dtype", I32),
        ("reserved_2", I32),
    )


class _HashQuery(Args):
    _fields_ = fields(
        ("q", PTR),
        ("q_stride_b", I64),
        ("q_stride_head", I64),
        ("w", PTR),
        ("w_stride_head", I64),
        ("batch", I64),
        ("heads", I64),
        ("kv_heads", I64),
        ("dim", I64),
        ("bits", I64),
        ("tables", I64),
        ("codes", PTR),
        ("q_dtype", I32),
        ("w_dtype", I32),
    )


class _Match(View):
    _fields_ = fields(
        ("planes", PTR),
        ("planes_stride_0", I64),
        ("planes_stride_head", I64),
        ("planes_stride_entry", I64),
        ("codes", PTR),
        ("heads", I64),
        ("bits", I64),
        ("tables", I64),
        ("words", I64),
        ("masks", PTR),
        ("masks_count", I64),
        ("hits", PTR),
        ("entries", I64),
        ("counts", PTR),
    )


class _ListHits(View):
    _fields_ = fields(("hits", PTR), ("heads", I64), ("entries", I64), ("rows", PTR), ("width", I64), ("after", PTR))


def hash_planes(
    planes: Tensor,
    kv: KV,
    mean_BKD: Tensor,
    threshold_BKN: Tensor | None,
    w: Tensor,
    done: Tensor,
    most: int,
    isa: str = "auto",
) -> None:
    """As ``codes.hash_planes``."""
    keys, w = rows_in_one_piece(kv.k), w.contiguous()
    mean, done = mean_BKD.float().contiguous(), done.contiguous()
    threshold = None if threshold_BKN is None else threshold_BKN.float().contiguous()
    args = _HashPlanes(planes=pointer(planes), mean=pointer(mean), threshold=pointer(threshold), w=pointer(w))
    held = fill_view(args, kv, keys)
    args.planes_stride_0, args.planes_stride_head, args.planes_stride_entry = planes.stride()[:3]
    args.w_stride_head, args.w_dtype, args.columns = 0 if w.shape[0] == 1 else w.stride(0), DTYPES[w.dtype], w.shape[1]
    args.done, args.most = done.data_ptr(), most
    call("hash_planes", args, isa)
    del held


def hash_query(q_BHD: Tensor, w: Tensor, bits: int, isa: str = "auto") -> Tensor:
    """As ``codes.hash_query``."""
    q, w = rows_in_one_piece(q_BHD), w.contiguous()
    (batch, heads, dim), (kv_heads, columns, _) = q.shape, w.shape
    codes = torch.empty(batch, heads, columns // bits, dtype=torch.int32)
    args = _HashQuery(q=pointer(q), q_stride_b=q.stride(0), q_stride_head=q.stride(1), q_dtype=DTYPES[q.dtype])
    args.w, args.w_stride_head, args.w_dtype = pointer(w), w.stride(0), DTYPES[w.dtype]
    args.batch, args.heads, args.kv_heads, args.dim = batch, heads, kv_heads, dim
    args.bits, args.tables, args.codes = bits, columns // bits, pointer(codes)
    if codes.numel():
        call("hash_query", args, isa)
    return codes


def collisions(codes_BHL: Tensor, planes: Tensor, kv: KV, bits: int, law: Law | None, isa: str = "auto") -> Selection:
    """As ``codes.collisions`` for tables with bits of their own; R is the largest count."""
    return matched(codes_BHL, planes, kv, bits, codes_BHL.shape[2], None, law, isa)


def matched(
    codes_BHL: Tensor,
    planes: Tensor,
    kv: KV,
    bits: int,
    tables: int,
    masks: Tensor | None,
    law: Law | None,
    isa: str = "auto",
) -> Selection:
    """The rows of two collisions; ``masks``, int32, are the bits of a pool's word that each of its tables takes."""
    counts = torch.empty(codes_BHL.shape[:2], dtype=torch.int32)
    if not counts.numel():
        return Selection(counts.new_empty(*counts.shape, 0), counts, law)
    hits = match(codes_BHL, planes, kv, bits, tables, masks, counts, isa)
    rows = torch.empty(*counts.shape, int(counts.max()), dtype=torch.int32)
    list_hits(hits, kv, rows, None, isa)
    return Selection(rows, counts, law)


def match(
    codes_BHL: Tensor,
    planes: Tensor,
    kv: KV,
    bits: int,
    tables: int,
    masks: Tensor | None,
    counts: Tensor,
    isa: str = "auto",
) -> Tensor:
    """A bit for each token that collides, in the order of the entries; writes how many they are into ``counts``."""
    codes = codes_BHL.contiguous()
    batch, heads, words = codes.shape
    hits = torch.empty(batch, heads, entries_of(kv) * WORDS, dtype=torch.int32)
    args = _Match(planes=pointer(planes), codes=pointer(codes), heads=heads, bits=bits, tables=tables)
    held = fill_view(args, kv)
    args.planes_stride_0, args.planes_stride_head, args.planes_stride_entry = planes.stride()[:3]
    if masks is not None:
        args.words, args.masks, args.masks_count = words, pointer(masks), len(masks)
    args.hits, args.entries, args.counts = pointer(hits), entries_of(kv), pointer(counts)
    call("match", args, isa)
    del held
    return hits


def list_hits(hits: Tensor, kv: KV, rows: Tensor, after: Tensor | None, isa: str = "auto") -> None:
    """Write the rows of the bits that are set, behind the first ``after`` entries of each list."""
    args = _ListHits(hits=pointer(hits), heads=rows.shape[1], entries=entries_of(kv), rows=pointer(rows))
    args.width, args.after = rows.shape[2], pointer(after)
    held = fill_view(args, kv)
    if rows.numel():
        call("list_hits", args, isa)
    del held


def entries_of(kv: KV) -> int:
    """Entries that a view may reach."""
    if kv.table is None:
        return -(-kv.bound // UNIT)
    page = kv.k.shape[1]
    return -(-kv.bound // page) * -(-page // UNIT)
