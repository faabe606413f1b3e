"""Bucket tables on a CPU: the keys of each code of each table, so that a step reads only those of the query's codes.

They find what the bits of all keys would find, in a part of the time, for 2 bytes a key and table. Keys that came after
the tables were built are found by their bits, until those are so many that the tables are built anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops import pool as pools
from keysift.ops.codes_cpu import list_hits, match
from keysift.ops.pool_cpu import masks_of
from keysift.ops.select_cpu import I64, PTR, View, call, fields, fill_view, pointer
from keysift.types import KV, Index, Law, Selection, State

SEGMENT = 1 << 16  # tokens that 16 bits can number
LATER = 1024  # keys, and
LATER_SHARE = 1 / 8  # of those in tables, that may come before the tables are built anew
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

    @staticmethod
    def states(kv_heads: int, bits: int, tables: int, capacity: int) -> dict[str, State]:
        """What a method keeps of a sequence of up to ``capacity`` rows."""
        segments = -(-capacity // SEGMENT)
        return {
            "ids": State((kv_heads, tables, capacity), torch.int16),
            "offsets": State((kv_heads, tables, segments, (1 << bits) + 1), torch.int32),
            "built": State((), torch.int64),
        }

    @classmethod
    def of(cls, index: Index) -> Buckets:
        """Those that an index holds."""
        return cls(index["ids"], index["offsets"], index["built"])


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
        buckets: written in place, ``built`` too.
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


def update_buckets(buckets: Buckets, planes: Tensor, kv: KV, columns: Tensor, done: Tensor) -> None:
    """Note that rows from ``done`` on (int64 ``[B]``) were written, and build the tables anew if it is time to."""
    buckets.built.copy_(torch.minimum(buckets.built, done))
    known = (buckets.built - kv.start).clamp(min=0)
    if bool((kv.length - known > LATER + known * LATER_SHARE).any()):
        build_buckets(buckets, planes, kv, columns)


def bucket_collisions(
    codes_BHL: Tensor,
    buckets: Buckets,
    columns: Tensor,
    planes: Tensor,
    kv: KV,
    law: Law | None,
    pooled: bool = False,
    isa: str = "auto",
) -> Selection:
    """``codes.collisions`` of a view: rows before ``buckets.built`` by the tables, later ones by their planes.

    Args:
        codes_BHL: of the queries, or the words of a pool.
        buckets, columns: as for ``build_buckets``.
        planes, kv, law: as for ``codes.collisions``.
        pooled: whether the tables are of a pool.
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
        masks = masks_of(bits, tables, words) if pooled else None
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
