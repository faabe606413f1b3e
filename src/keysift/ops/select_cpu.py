"""The CPU kernels that choose entries of rows by a threshold; and what all selection kernels hand to the library.

``View`` mirrors the fields of ``codes_view.h``: a ``KV`` as the kernels see it. Everything in it is borrowed: callers
keep the tensors alive until the call returns.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from keysift.ops.cpu.library import DTYPES, Args, function, isa_of, threads
from keysift.ops.select import count_of_rows
from keysift.types import KV

I32, I64, F32, F64, PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_void_p


def fields(*own: tuple[str, Any]) -> Any:
    """Fields of a struct, after those of its base."""
    return own


class View(Args):
    """``KS_VIEW_FIELDS``."""

    _fields_ = fields(
        ("k", PTR),
        ("k_stride_0", I64),
        ("k_stride_1", I64),
        ("k_stride_head", I64),
        ("table", PTR),
        ("table_stride", I64),
        ("start", PTR),
        ("length", PTR),
        ("origin", PTR),
        ("batch", I64),
        ("page", I64),
        ("bound", I64),
        ("kv_heads", I64),
        ("dim", I64),
        ("k_dtype", I32),
        ("reserved", I32),
    )


def call(name: str, args: Args, isa: str = "auto") -> None:
    """Run an exported function on as many threads as torch has."""
    args.size = ctypes.sizeof(args)
    args.isa = isa_of(isa)
    args.threads = threads()
    function(name, type(args))(args)


def pointer(x: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for None and for a tensor without numbers."""
    return None if x is None else x.data_ptr() or None


def fill_view(args: View, kv: KV, keys: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Write a view into arguments; ``keys`` where they are read.

    Returns:
        What has to stay alive during the call.
    """
    start, length = kv.start.contiguous(), kv.length.contiguous()
    origin = None if kv.origin is None else kv.origin.contiguous()
    args.start, args.length, args.origin = start.data_ptr(), length.data_ptr(), pointer(origin)
    if kv.table is not None:
        args.table, args.table_stride, args.page = pointer(kv.table), kv.table.stride(0), kv.k.shape[1]
    args.batch, args.bound, args.kv_heads, args.dim = len(start), kv.bound, kv.k.shape[2], kv.k.shape[3]
    if keys is not None:
        args.k, args.k_dtype = pointer(keys), DTYPES[keys.dtype]
        args.k_stride_0, args.k_stride_1, args.k_stride_head = keys.stride()[:3]
    return start, length, origin, keys


def rows_in_one_piece(x: Tensor) -> Tensor:
    """The same with a stride of 1 in its last dimension, and a dtype that kernels know."""
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


class _Choose(Args):
    _fields_ = fields(
        ("score", PTR),
        ("stride", I64),
        ("rows", I64),
        ("entries", I64),
        ("count", PTR),
        ("share", F64),
        ("index", PTR),
        ("most", I64),
        ("used", PTR),
    )


def chosen_lists(
    score_BXN: Tensor, count: Tensor | int, most: int, share: float | None = None, isa: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``select_top``, or with a share ``select_mass``; see ``keysift.ops.select``."""
    batch, rows, entries = score_BXN.shape
    score = score_BXN.float().contiguous()
    wanted = count_of_rows(count, score).to(torch.int64).contiguous()
    index = torch.empty(batch, rows, most, dtype=torch.int32)
    used = torch.empty(batch, rows, dtype=torch.int32)
    args = _Choose(score=pointer(score), stride=entries, rows=batch * rows, entries=entries, most=most)
    args.count, args.index, args.used = wanted.data_ptr(), pointer(index), pointer(used)
    args.share = -1.0 if share is None else share
    if used.numel():
        call("choose", args, isa)
    return index, used
