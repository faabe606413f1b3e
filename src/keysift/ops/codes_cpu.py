"""The CPU kernels behind ``keysift.ops.codes``: hash keys and queries, match their codes, list the keys that collide.

Keys of 16 bits are hashed as integers of 16 bits, on a common scale for each vector, or as bf16 where the CPU
multiplies that; fp32 keys in fp32. A bit may differ from the reference's where a product is within some 1e-4 of its
standard deviation of the threshold. Directions may be bf16 or fp32: their numbers are bf16 in either case, and reading
them takes most of the time of a decode step's hash.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops import pool as pools
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


# ---- bucket tables --------------------------------------------------------------------------------------------------

SEGMENT = 1 << 16  # tokens that 16 bits can number
_TABLES = (
    ("ids", PTR),
    ("room", I64),
    ("offsets", PTR),
    ("segments", I64),
    ("columns", PTR),
    ("tables", I64),
    ("bits", I64),
)


class _Build(View):
    _fields_ = fields(
        *_TABLES, ("planes", PTR), ("planes_stride_0", I64), ("planes_stride_head", I64), ("stride_entry", I64)
    )


class _MatchTables(View):
    _fields_ = fields(*_TABLES, ("codes", PTR), ("words", I64), ("heads", I64), ("hits", PTR), ("counts", PTR))


class _ListTables(View):
    _fields_ = fields(("hits", PTR), ("segments", I64), ("heads", I64), ("rows", PTR), ("width", I64))


class Buckets(NamedTuple):
    """The tokens of a prompt by their codes, so that a step reads only those of the query's codes.

    Attributes:
        ids: tokens within a segment of ``SEGMENT``, uint16 in int16, ``[B, K, L, room]``: of each table and segment in
            the order of their codes.
        offsets: where the tokens of each code begin, int32 ``[B, K, L, segments, 2 ** bits + 1]``.
        built: rows before it are in the tables, int64 ``[B]``. Whoever writes a row anew lowers it to that row: later
            rows are then found by the bits of their planes.
    """

    ids: Tensor
    offsets: Tensor
    built: Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, tables: int, bits: int, room: int) -> Buckets:
        """Memory for views of up to ``room`` tokens; what is not written stays untouched."""
        segments = -(-room // SEGMENT)
        ids = torch.empty(batch, kv_heads, tables, room, dtype=torch.int16)
        offsets = torch.empty(batch, kv_heads, tables, segments, (1 << bits) + 1, dtype=torch.int32)
        return cls(ids, offsets, torch.zeros(batch, dtype=torch.int64))


def columns_of(bits: int, tables: int, pool_bits: int | None = None) -> Tensor:
    """The planes whose bits make the code of each table, int32 ``[L, bits]``."""
    if pool_bits is not None:
        return pools.table_columns(bits, tables, pool_bits).int()
    return (torch.arange(bits) * tables + torch.arange(tables)[:, None]).int()


def _fill_buckets(args: _Build | _MatchTables, buckets: Buckets, columns: Tensor) -> None:
    args.ids, args.room = pointer(buckets.ids), buckets.ids.shape[3]
    args.offsets, args.segments = pointer(buckets.offsets), buckets.offsets.shape[3]
    args.columns, (args.tables, args.bits) = pointer(columns), columns.shape


def build_buckets(buckets: Buckets, planes: Tensor, kv: KV, columns: Tensor, isa: str = "auto") -> None:
    """Put the tokens of a view into tables, by the bits that ``hash_planes`` wrote.

    Args:
        buckets: of ``Buckets.empty``, written in place, ``built`` too.
        planes: as for ``codes.collisions``; those of a pool, too.
        kv: the view; its first row is to be that of all views that are matched.
        columns: of ``columns_of``.
    """
    args = _Build(planes=pointer(planes))
    held = fill_view(args, kv)
    _fill_buckets(args, buckets, columns)
    args.planes_stride_0, args.planes_stride_head, args.stride_entry = planes.stride()[:3]
    call("tables_build", args, isa)
    buckets.built.copy_(kv.end)
    del held


def bucket_collisions(
    codes_BHL: Tensor,
    buckets: Buckets,
    columns: Tensor,
    planes: Tensor,
    kv: KV,
    masks: Tensor | None,
    law: Law | None,
    isa: str = "auto",
) -> Selection:
    """``codes.collisions`` of a view: rows before ``buckets.built`` by the tables, later ones by their planes.

    Args:
        codes_BHL: of the queries, or the words of a pool.
        buckets, columns: as for ``build_buckets``.
        planes, kv, law: as for ``codes.collisions``.
        masks: of a pool, as for ``matched``; else None.
    """
    tables, bits = columns.shape
    codes = codes_BHL.contiguous()
    batch, heads, words = codes.shape
    counts = torch.empty(batch, heads, dtype=torch.int32)
    if not counts.numel():
        return Selection(counts.new_empty(batch, heads, 0), counts, law)
    inside = kv._replace(length=(torch.minimum(kv.end, buckets.built) - kv.start).clamp(min=0), spans=None)
    args = _MatchTables(codes=pointer(codes), words=words, heads=heads, counts=pointer(counts))
    _fill_buckets(args, buckets, columns)
    hits = torch.empty(batch, heads, args.segments * SEGMENT // 64, dtype=torch.int64)
    args.hits = pointer(hits)
    held = fill_view(args, inside)
    call("tables_match", args, isa)
    later, more = None, torch.zeros_like(counts)
    if bool((kv.end > buckets.built).any()):
        start = torch.maximum(kv.start, buckets.built)
        later = kv._replace(start=start, length=(kv.end - start).clamp(min=0), spans=None, most=kv.bound)
        bitmap = match(codes, planes, later, bits, tables, masks, more, isa)
    rows = torch.empty(batch, heads, int((counts + more).max()), dtype=torch.int32)
    listing = _ListTables(hits=pointer(hits), segments=args.segments, heads=heads, rows=pointer(rows))
    listing.width = rows.shape[2]
    held = fill_view(listing, inside)
    if rows.numel():
        call("tables_list", listing, isa)
        if later is not None:
            list_hits(bitmap, later, rows, counts, isa)
    del held
    return Selection(rows, counts + more, law)
