"""The kernel behind ``keysift.ops.rows``."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.chain_triton import chained, wait_for_previous


def write(k: Tensor, v: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, table: Tensor, length: Tensor) -> None:
    """One launch for keys and values; a program writes all heads of one row."""
    batch, tokens, heads, dim = k_BTKD.shape
    new_k, new_v = (x if x.stride(3) == 1 else x.contiguous() for x in (k_BTKD, v_BTKD))
    with torch.cuda.device_of(k):
        _write[(tokens, batch)](
            *(k, v, new_k, new_v, table, length, tokens, table.stride(0), length.stride(0)),
            *(*k.stride()[:3], *v.stride()[:3], *new_k.stride()[:3], *new_v.stride()[:3]),
            PAGE=k.shape[1],
            HEADS=heads,
            HEADS_PAD=triton.next_power_of_2(heads),
            D=dim,
            D_PAD=triton.next_power_of_2(dim),
            DV=new_v.shape[3],
            DV_PAD=triton.next_power_of_2(new_v.shape[3]),
            **chained(k),
        )


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
    head = tl.arange(0, HEADS_PAD)[:, None]
    d, dv = tl.arange(0, D_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    inside = (head < HEADS) & (d < D)
    x = tl.load(new_k + b * from_k_b + t * from_k_t + head * from_k_h + d, mask=inside)
    tl.store(k + page * k_page + row * k_row + head * k_head + d, x, mask=inside)
    inside = (head < HEADS) & (dv < DV)
    x = tl.load(new_v + b * from_v_b + t * from_v_t + head * from_v_h + dv, mask=inside)
    tl.store(v + page * v_page + row * v_row + head * v_head + dv, x, mask=inside)


def move(reached: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """``move_on`` in one launch."""
    done = torch.empty_like(reached)
    with torch.cuda.device_of(reached):
        _move[(1,)](
            *(done, reached, start, length, *(x.stride(0) for x in (reached, start, length)), len(reached)),
            SIZE=triton.next_power_of_2(max(1, len(reached))),
            **chained(reached),
        )
    return done


@triton.jit
def _move(done, reached, start, length, of_reached, of_start, of_length, n, SIZE: tl.constexpr, CHAINED: tl.constexpr):
    wait_for_previous(CHAINED)
    b = tl.arange(0, SIZE)
    first = tl.load(start + b * of_start, mask=b < n, other=0)
    end = first + tl.load(length + b * of_length, mask=b < n, other=0)
    was = tl.load(reached + b * of_reached, mask=b < n, other=0)
    tl.store(done + b, tl.maximum(tl.minimum(was, end), first), mask=b < n)
    tl.store(reached + b * of_reached, end, mask=b < n)
