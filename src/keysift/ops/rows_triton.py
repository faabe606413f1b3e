"""The kernel behind ``keysift.ops.rows``."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.chain_triton import chained, wait_for_previous


def write(k: Tensor, v: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, table: Tensor, length: Tensor) -> None:
    """One launch for keys and values; a program writes all heads of one row."""
    batch, tokens = k_BTKD.shape[:2]
    new_k, new_v = (x if x.stride(3) == 1 else x.contiguous() for x in (k_BTKD, v_BTKD))
    with torch.cuda.device_of(k):
        _write[(tokens, batch)](
            *(k, v, new_k, new_v, table, length, tokens, table.stride(0), length.stride(0)),
            *(*k.stride()[:3], *v.stride()[:3], *new_k.stride()[:3], *new_v.stride()[:3]),
            **_constants(k, v),
        )


def _constants(k: Tensor, v: Tensor) -> dict[str, Any]:
    """Of kernels that write rows of these pages."""
    (_, page, heads, dim), v_dim = k.shape, v.shape[3]
    pads = {name: triton.next_power_of_2(n) for name, n in (("HEADS_PAD", heads), ("D_PAD", dim), ("DV_PAD", v_dim))}
    return {"PAGE": page, "HEADS": heads, "D": dim, "DV": v_dim} | pads | chained(k)


@triton.jit
def _write(
    k, v, new_k, new_v, table, length, tokens, table_stride, length_stride,
    k_page, k_row, k_head, v_page, v_row, v_head,
    from_k_b, from_k_t, from_k_h, from_v_b, from_v_t, from_v_h,
    PAGE: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(CHAINED)
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(length + b * length_stride) - tokens + t
    known = row >= 0
    page = tl.load(table + b * table_stride + row // PAGE, mask=known, other=0).to(tl.int64)
    row = tl.where(known, row % PAGE, 0)
    k += page * k_page + row * k_row
    v += page * v_page + row * v_row
    _copy_row(k, new_k + b * from_k_b + t * from_k_t, k_head, from_k_h, HEADS, HEADS_PAD, D, D_PAD)
    _copy_row(v, new_v + b * from_v_b + t * from_v_t, v_head, from_v_h, HEADS, HEADS_PAD, DV, DV_PAD)


@triton.jit
def _copy_row(
    to, x, to_head, x_head, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """What all heads have of a row."""
    head, d = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, D_PAD)[None, :]
    inside = (head < HEADS) & (d < D)
    tl.store(to + head * to_head + d, tl.load(x + head * x_head + d, mask=inside), mask=inside)


def write_at(k: Tensor, v: Tensor, k_TKD: Tensor, v_TKD: Tensor, slots: Tensor) -> None:
    """``keysift.ops.rows.write_at``; a program writes all heads of one row."""
    new_k, new_v = (x if x.stride(2) == 1 else x.contiguous() for x in (k_TKD, v_TKD))
    if len(slots):
        with torch.cuda.device_of(k):
            _write_at[(len(slots),)](
                *(k, v, new_k, new_v, slots, slots.stride(0)),
                *(*k.stride()[:3], *v.stride()[:3], *new_k.stride()[:2], *new_v.stride()[:2]),
                **_constants(k, v),
            )


@triton.jit
def _write_at(
    k, v, new_k, new_v, slots, of_slots, k_page, k_row, k_head, v_page, v_row, v_head,
    from_k_t, from_k_h, from_v_t, from_v_h,
    PAGE: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(CHAINED)
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t * of_slots).to(tl.int64)
    if slot >= 0:
        page, row = slot // PAGE, slot % PAGE
        k += page * k_page + row * k_row
        v += page * v_page + row * v_row
        _copy_row(k, new_k + t * from_k_t, k_head, from_k_h, HEADS, HEADS_PAD, D, D_PAD)
        _copy_row(v, new_v + t * from_v_t, v_head, from_v_h, HEADS, HEADS_PAD, DV, DV_PAD)


def bounds(
    start: Tensor, length: Tensor, end: Tensor, sinks: int, window: int, last: int | None
) -> tuple[Tensor, Tensor]:
    """``part_bounds`` in one launch."""
    first, rows = (torch.empty(len(start), dtype=torch.int64, device=start.device) for _ in range(2))
    if len(start):
        with torch.cuda.device_of(start):
            _bounds[(1,)](
                *(first, rows, start, length, end, *(x.stride(0) for x in (start, length, end))),
                *(len(start), sinks, window, last or 0),
                CUT=last is not None,
                SIZE=triton.next_power_of_2(len(start)),
                **chained(start),
            )
    return first, rows


@triton.jit(do_not_specialize=["n", "sinks", "window", "last"])
def _bounds(
    first, rows, start, length, end, of_start, of_length, of_end, n, sinks, window, last,
    CUT: tl.constexpr, SIZE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(CHAINED)
    b = tl.arange(0, SIZE)
    low = tl.load(start + b * of_start, mask=b < n, other=0) + sinks
    low = tl.minimum(low, tl.load(length + b * of_length, mask=b < n, other=0))
    stop = tl.maximum(tl.load(end + b * of_end, mask=b < n, other=0) - window, low)
    if CUT:
        low = tl.maximum(stop - last, low)
    tl.store(first + b, low, mask=b < n)
    tl.store(rows + b, stop - low, mask=b < n)
