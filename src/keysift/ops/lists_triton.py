"""The kernel behind ``keysift.ops.lists``."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.types import BlockMask

MIN_TILE, MAX_TILE = 128, 2048  # columns that a program compacts at a time
# numbers that differ from prompt to prompt: not each kind of them may mean a kernel of its own
OF_A_PROMPT = ["stride_b", "stride_h", "stride_q", "rows", "columns", "width", "first"]


def compact(active: Tensor, block: int, first: int) -> BlockMask:
    """The lists of ``active``, bool ``[B, H, Q, C]``, in one launch, without waiting for the device."""
    batch, heads, rows, columns = active.shape
    width = max(0, min(columns, first + rows - 1))

    def empty(*tail: int) -> Tensor:
        return torch.empty(batch, heads, rows, *tail, dtype=torch.int32, device=active.device)

    mask = BlockMask(empty(), empty(1), empty(), empty(width), block, first)
    if mask.full_count.numel():
        with torch.cuda.device_of(active):
            _compact[(rows, batch * heads)](
                *(active.view(torch.uint8), *active.stride()),
                *(mask.partial_count, mask.partial_index, mask.full_count, mask.full_index),
                *(heads, rows, columns, width, first),
                TILE=min(MAX_TILE, max(MIN_TILE, triton.next_power_of_2(width))),
            )
    return mask


@triton.jit(do_not_specialize=OF_A_PROMPT)
def _compact(
    active_ptr, stride_b, stride_h, stride_q, stride_c,
    partial_count_ptr, partial_index_ptr, full_count_ptr, full_index_ptr,
    heads, rows, columns, width, first, TILE: tl.constexpr,
):  # fmt: skip
    """One row of one head: indices go to where the running count says; zeros fill the rest."""
    row, head = tl.program_id(0), tl.program_id(1)
    diagonal = first + row
    from_ptr = active_ptr + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    from_ptr += row.to(tl.int64) * stride_q
    at = head.to(tl.int64) * rows + row
    full_index_ptr += at * width
    count = tl.zeros((), tl.int32)
    for start in range(0, tl.minimum(diagonal, columns), TILE):
        column = start + tl.arange(0, TILE)
        inside = (column < diagonal) & (column < columns)
        chosen = (tl.load(from_ptr + column * stride_c, mask=inside, other=0) != 0).to(tl.int32)
        slot = count + tl.cumsum(chosen, 0) - chosen
        tl.store(full_index_ptr + slot, column, mask=chosen != 0)
        count += tl.sum(chosen, 0)
    for start in range(count, width, TILE):
        slot = start + tl.arange(0, TILE)
        tl.store(full_index_ptr + slot, tl.zeros((TILE,), tl.int32), mask=slot < width)
    tl.store(full_count_ptr + at, count)
    on = tl.load(from_ptr + diagonal * stride_c, mask=diagonal < columns, other=0) != 0
    tl.store(partial_count_ptr + at, on.to(tl.int32))
    tl.store(partial_index_ptr + at, tl.where(on, diagonal, 0))
