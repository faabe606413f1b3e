"""The CPU kernels of Quest (arXiv:2406.10774): bounds of pages, their scores, the best pages; ``pages`` says what."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.cpu.library import DTYPES
from keysift.ops.pages import LSE_PAGES, Quota, page_count, touched
from keysift.ops.select_cpu import F32, I32, I64, PTR, View, call, fields, fill_view, pointer, rows_in_one_piece
from keysift.types import KV, Selection

_BOUNDS = (
    ("bounds", PTR),
    ("bounds_stride_0", I64),
    ("bounds_stride_head", I64),
    ("bounds_stride_slot", I64),
    ("bounds_stride_half", I64),
    ("unit", I64),
)


class _Extend(View):
    _fields_ = fields(*_BOUNDS, ("done", PTR), ("pages", I64))


class _Score(View):
    _fields_ = fields(
        *_BOUNDS,
        ("q", PTR),
        ("q_stride_b", I64),
        ("q_stride_head", I64),
        ("heads", I64),
        ("pages", I64),
        ("score", PTR),
        ("lse", PTR),
        ("scale", F32),
        ("q_dtype", I32),
    )


class _Top(View):
    _fields_ = fields(
        *_BOUNDS,
        ("score", PTR),
        ("lse", PTR),
        ("heads", I64),
        ("pages", I64),
        ("parts", I64),
        ("lists", I64),
        ("count", PTR),
        ("quota_keys", I64),
        ("most_pages", I64),
        ("rows", PTR),
        ("used", PTR),
        ("quota_share", F32),
        ("shared", I32),
    )


def _fill_bounds(args: _Extend | _Score, bounds: Tensor, unit: int) -> None:
    args.bounds, args.unit, args.k_dtype = pointer(bounds), unit, DTYPES[bounds.dtype]
    strides = bounds.stride()[:4]
    args.bounds_stride_0, args.bounds_stride_head, args.bounds_stride_slot, args.bounds_stride_half = strides


def extend(bounds: Tensor, kv: KV, unit: int, done: Tensor, most: int, isa: str = "auto") -> None:
    """``extend_bounds``; bounds have the dtype of the keys."""
    if bounds.dtype != kv.k.dtype:
        raise ValueError(f"bounds are {bounds.dtype}, keys {kv.k.dtype}: they must be alike")
    keys, done = rows_in_one_piece(kv.k), done.contiguous()
    args = _Extend(done=done.data_ptr(), pages=min(touched(most, unit), page_count(kv, unit)))
    held = fill_view(args, kv, keys)
    _fill_bounds(args, bounds, unit)
    if bounds.numel():
        call("page_extend", args, isa)
    del held


def scores(q_BHD: Tensor, bounds: Tensor, kv: KV, unit: int, scale: float, isa: str = "auto") -> tuple[Tensor, Tensor]:
    """``page_scores_lse``."""
    q, pages = rows_in_one_piece(q_BHD), page_count(kv, unit)
    batch, heads, _ = q.shape
    score, lse = torch.empty(batch, heads, pages), torch.empty(batch, heads, -(-pages // LSE_PAGES))
    args = _Score(heads=heads, pages=pages, score=pointer(score), lse=pointer(lse), scale=scale)
    args.q, args.q_stride_b, args.q_stride_head, args.q_dtype = pointer(q), *q.stride()[:2], DTYPES[q.dtype]
    held = fill_view(args, kv)
    _fill_bounds(args, bounds, unit)
    if score.numel():
        call("page_score", args, isa)
    del held
    return score, lse


def top(
    score_BHP: Tensor,
    kv: KV,
    unit: int,
    count: Tensor | Quota,
    most_pages: int,
    shared: bool,
    lse: Tensor,
    isa: str = "auto",
) -> Selection:
    """``top_pages``."""
    batch, heads, pages = score_BHP.shape
    lists = kv.k.shape[2] if shared else heads
    score, lse = score_BHP.float().contiguous(), lse.float().contiguous()
    rows = torch.empty(batch, lists, most_pages * unit, dtype=torch.int32)
    used = torch.empty(batch, lists, dtype=torch.int32)
    args = _Top(unit=unit, score=pointer(score), lse=pointer(lse), heads=heads, pages=pages, parts=lse.shape[2])
    held = fill_view(args, kv)
    quota, number = (count, None) if isinstance(count, Quota) else (Quota(), count.long().contiguous())
    args.count, args.quota_share, args.quota_keys = pointer(number), quota.share, quota.keys
    args.lists, args.shared, args.most_pages = lists, shared, most_pages
    args.rows, args.used = pointer(rows), pointer(used)
    if used.numel():
        call("page_top", args, isa)
    del held
    return Selection(rows, used)
