"""Attention of one new token over selected rows, and of a few new tokens over all rows, by the CPU kernels.

A thread reads a share of the rows once for all query heads (and tokens) that attend to them; shares are merged by their
log-sum-exps (arXiv:2501.01005) in a fixed order, so that the number of threads never changes a bit of the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keysift.ops.cpu.library import DTYPES, Args, function, isa_of, load, threads
from keysift.types import KV, Law, Partial, Selection

_INT32, _INT64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


def fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    """Fields of one type."""
    return tuple((name, kind) for name in names.split())


KEY_FIELDS = (
    *fields(_POINTER, "q k v"),
    *fields(_INT64, "q_stride0 q_stride1 k_stride0 k_stride1 k_stride2 v_stride0 v_stride1 v_stride2"),
    *fields(_POINTER, "table"),
    *fields(_INT64, "table_stride page pages capacity batch heads kv_heads dim v_dim"),
)


class GatherArgs(Args):
    """``ks_gather_args`` of gather.h."""

    _fields_ = (
        *KEY_FIELDS,
        *fields(_INT64, "slots"),
        *fields(_POINTER, "rows count"),
        *fields(_INT64, "rows_stride0 rows_stride1 count_stride0 count_stride1 width"),
        *fields(_POINTER, "log_w"),
        *fields(_INT64, "log_w_stride0 log_w_stride1"),
        *fields(_POINTER, "mean law"),
        *fields(_INT64, "entries"),
        *fields(_POINTER, "start length middle_start middle_length out lse"),
        *fields(_INT32, "q_dtype kv_dtype out_dtype long_rows long_count"),
        ("scale", ctypes.c_float),
    )


class ShortArgs(Args):
    """``ks_short_args`` of short.h."""

    _fields_ = (
        *KEY_FIELDS,
        *fields(_INT64, "q_stride2 tokens"),
        *fields(_POINTER, "start length out lse"),
        *fields(_INT32, "q_dtype kv_dtype out_dtype"),
        ("scale", ctypes.c_float),
    )


def takes(q: Tensor, kv: KV) -> bool:
    """Whether the kernels are there and take the case."""
    if q.device.type != "cpu" or load() is None:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, kv.k, kv.v)):
        return False  # no backward
    return kv.k.dtype == kv.v.dtype and q.dtype in DTYPES and kv.k.dtype in DTYPES


def gather(
    q_BHD: Tensor,
    kv: KV,
    selection: Selection,
    scale: float,
    middle: KV | None = None,
    dtype: torch.dtype = torch.float32,
    isa: str = "auto",
) -> Partial:
    """``gather_attention`` on a CPU; ``isa`` forces a path.

    Raises:
        ValueError: a row, count or page that does not exist, or an instruction set that this CPU lacks.
    """
    around = None if middle is None else (kv.start, kv.length, middle.start, middle.length)
    operands = (q_BHD, kv.k, kv.v, kv.table, selection.rows, selection.count, *_weights(selection))
    if torch.compiler.is_compiling():
        return Partial(*_gather_op(*operands, list(around or ()), scale, dtype, isa))
    return Partial(*_gather(*operands, around or (), scale, dtype, isa))


def _weights(selection: Selection) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Log weights of rows, or a law's mean and table."""
    log_w = selection.log_w
    return (None, log_w.mean, log_w.table) if isinstance(log_w, Law) else (log_w, None, None)


def short(
    q_BTHD: Tensor,
    kv: KV,
    scale: float,
    dtype: torch.dtype = torch.float32,
    isa: str = "auto",
) -> Partial:
    """``short_attention`` on a CPU; ``isa`` forces a path.

    Raises:
        ValueError: rows beyond the buffer, or an instruction set that this CPU lacks.
    """
    operands = (q_BTHD, kv.k, kv.v, kv.table, kv.start, kv.length, scale, dtype, isa)
    return Partial(*(_short_op if torch.compiler.is_compiling() else _short)(*operands))


_GATHER_BYTES, _SHORT_BYTES = ctypes.sizeof(GatherArgs), ctypes.sizeof(ShortArgs)


def key_values(q: Tensor, heads: int, k: Tensor, v: Tensor, table: Tensor | None) -> tuple[int | None, ...]:
    """The values of ``KEY_FIELDS``; of q the strides of the first two dimensions."""
    (k0, k1, k2, _), (v0, v1, v2, _) = k.stride(), v.stride()
    pages, page, kv_heads, dim = k.shape
    where: tuple[int | None, ...]
    if table is None:
        where = (None, 0, 0, 0, page)
    else:
        where = (table.data_ptr(), table.stride(0), page, pages, page * table.shape[1])
    return (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), q.stride(1), k0, k1, k2, v0, v1, v2,
        *where, q.shape[0], heads, kv_heads, dim, v.shape[3],
    )  # fmt: skip


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with elements of the last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    rows: Tensor,
    count: Tensor,
    log_w: Tensor | None,
    mean: Tensor | None,
    law: Tensor | None,
    around: tuple[Tensor, ...] | list[Tensor],
    scale: float,
    dtype: torch.dtype,
    isa: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, _ = q.shape
    out = torch.empty(batch, 1, heads, v.shape[3], dtype=dtype)
    lse = torch.empty(batch, 1, heads, dtype=torch.float32)
    args, _held = _gather_args(q, k, v, table, rows, count, log_w, mean, law, around, scale, out, lse, isa)
    function("gather", GatherArgs)(args)
    return out, lse


def _gather_args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    rows: Tensor,
    count: Tensor,
    log_w: Tensor | None,
    mean: Tensor | None,
    law: Tensor | None,
    around: Sequence[Tensor],
    scale: float,
    out: Tensor,
    lse: Tensor,
    isa: str,
) -> tuple[GatherArgs, tuple[object, ...]]:
    """The arguments of a call, and what has to stay alive for it."""
    q, k, v, rows = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(rows)
    log_w = None if log_w is None else dense_rows(log_w.float())
    mean = None if mean is None else mean.float().contiguous()
    law = None if law is None else law.float().contiguous()
    bounds = [x.contiguous() for x in around]
    args = GatherArgs(
        _GATHER_BYTES, isa_of(isa), threads(),
        *key_values(q, q.shape[1], k, v, table),
        rows.shape[1], rows.data_ptr(), count.data_ptr(), *rows.stride()[:2], *count.stride(), rows.shape[2],
        *((None, 0, 0) if log_w is None else (log_w.data_ptr(), *log_w.stride()[:2])),
        None if mean is None else mean.data_ptr(),
        *((None, 0) if law is None else (law.data_ptr(), len(law))),
        *((x.data_ptr() for x in bounds) if bounds else (None,) * 4),
        out.data_ptr(), lse.data_ptr(), DTYPES[q.dtype], DTYPES[k.dtype], DTYPES[out.dtype],
        rows.dtype == torch.int64, count.dtype == torch.int64, scale,
    )  # fmt: skip
    return args, (q, k, v, table, rows, count, log_w, mean, law, bounds, out, lse)


def repeated_gather(
    q_BHD: Tensor, kv: KV, selection: Selection, scale: float, out: Tensor, lse: Tensor
) -> Callable[[], None] | None:
    """``gather`` over tensors that stay where they are, whatever is written to them: each call costs no more than the
    kernel. None where the kernels do not take the case.

    Args:
        out, lse: what each call writes to, contiguous, in the shapes of a Partial.
    """
    if not takes(q_BHD, kv):
        return None
    weights = _weights(selection)
    args, held = _gather_args(
        q_BHD, kv.k, kv.v, kv.table, selection.rows, selection.count, *weights, (), scale, out, lse, "auto"
    )
    run = function("gather", GatherArgs)

    def call() -> None:
        run(args)

    call.held = held  # type: ignore[attr-defined]
    return call


def _short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    start: Tensor,
    length: Tensor,
    scale: float,
    dtype: torch.dtype,
    isa: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    q, k, v, start, length = dense_rows(q), dense_rows(k), dense_rows(v), start.contiguous(), length.contiguous()
    out = torch.empty(batch, tokens, heads, v.shape[3], dtype=dtype)
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32)
    function("short", ShortArgs)(
        ShortArgs(
            _SHORT_BYTES, isa_of(isa), threads(),
            *key_values(q, heads, k, v, table),
            q.stride(2), tokens, start.data_ptr(), length.data_ptr(), out.data_ptr(), lse.data_ptr(),
            DTYPES[q.dtype], DTYPES[k.dtype], DTYPES[dtype], scale,
        )
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("keysift::gather_cpu", mutates_args=(), device_types="cpu")
def _gather_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    rows: Tensor,
    count: Tensor,
    log_w: Tensor | None,
    mean: Tensor | None,
    law: Tensor | None,
    around: list[Tensor],
    scale: float,
    dtype: torch.dtype,
    isa: str,
) -> tuple[Tensor, Tensor]:
    return _gather(q, k, v, table, rows, count, log_w, mean, law, around, scale, dtype, isa)


@_gather_op.register_fake
def _gather_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    rows: Tensor,
    count: Tensor,
    log_w: Tensor | None,
    mean: Tensor | None,
    law: Tensor | None,
    around: list[Tensor],
    scale: float,
    dtype: torch.dtype,
    isa: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, _ = q.shape
    return q.new_empty(batch, 1, heads, v.shape[3], dtype=dtype), q.new_empty(batch, 1, heads, dtype=torch.float32)


@torch.library.custom_op("keysift::short_cpu", mutates_args=(), device_types="cpu")
def _short_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    start: Tensor,
    length: Tensor,
    scale: float,
    dtype: torch.dtype,
    isa: str,
) -> tuple[Tensor, Tensor]:
    return _short(q, k, v, table, start, length, scale, dtype, isa)


@_short_op.register_fake
def _short_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    start: Tensor,
    length: Tensor,
    scale: float,
    dtype: torch.dtype,
    isa: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3], dtype=dtype)
    return out, q.new_empty(batch, tokens, heads, dtype=torch.float32)
