"""Writing the newest rows of sequences into their pages, and parts of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.lists import on_gpu


def write_rows(k: Tensor, v: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, table: Tensor, length: Tensor) -> None:
    """Fill rows ``length - T .. length - 1`` of every sequence, in place; negative rows are written to page 0.

    Args:
        k, v: pages, ``[pages, page, K, D]`` and ``[pages, page, K, Dv]``.
        k_BTKD, v_BTKD: the rows.
        table: page of each ``page`` rows, int32 ``[B, P]``.
        length: rows of each sequence, the new ones included, int64 ``[B]``.
    """
    if on_gpu(k):
        from keysift.ops.rows_triton import write

        write(k, v, k_BTKD, v_BTKD, table, length)
    else:
        write_rows_reference(k, v, k_BTKD, v_BTKD, table, length)


def write_rows_reference(k: Tensor, v: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, table: Tensor, length: Tensor) -> None:
    """The same by indexing."""
    tokens = k_BTKD.shape[1]
    row = length[:, None] - tokens + torch.arange(tokens, device=length.device)
    page = table.gather(1, (row.clamp(min=0) // k.shape[1])).long().masked_fill(row < 0, 0)
    at = (page, row.clamp(min=0) % k.shape[1])
    k[at], v[at] = k_BTKD, v_BTKD


def write_at(k: Tensor, v: Tensor, k_TKD: Tensor, v_TKD: Tensor, slots: Tensor) -> None:
    """Write rows to given places, in place; on a GPU one launch that depends on shapes alone.

    Args:
        k, v: pages, ``[pages, page, K, D]`` and ``[pages, page, K, Dv]``.
        k_TKD, v_TKD: rows, of which the first ``len(slots)`` are written.
        slots: ``page number * page + row in it`` of each, int64 ``[T]``; a negative one is not written.
    """
    if on_gpu(k):
        from keysift.ops.rows_triton import write_at as write

        write(k, v, k_TKD, v_TKD, slots)
    else:
        write_at_reference(k, v, k_TKD, v_TKD, slots)


def write_at_reference(k: Tensor, v: Tensor, k_TKD: Tensor, v_TKD: Tensor, slots: Tensor) -> None:
    """The same by indexing."""
    kept = slots >= 0
    at = (slots[kept] // k.shape[1], slots[kept] % k.shape[1])
    k[at], v[at] = k_TKD[: len(slots)][kept], v_TKD[: len(slots)][kept]


def part_bounds(
    start: Tensor, length: Tensor, end: Tensor, sinks: int, window: int, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """First row and number of the rows after the first ``sinks`` and before the last ``window``.

    Args:
        start, length: first row of each sequence, and one past its last, int64 ``[B]``.
        end: where the part's window ends, int64 ``[B]``.
        sinks, window: rows that are left out.
        last: so many rows of the part, at its end, are all that is meant; None for all.
    """
    if on_gpu(start):
        from keysift.ops.rows_triton import bounds

        return bounds(start, length, end, sinks, window, last)
    first = torch.minimum(start + sinks, length)
    stop = (end - window).maximum(first)
    if last is not None:
        first = (stop - last).maximum(first)
    return first, stop - first
