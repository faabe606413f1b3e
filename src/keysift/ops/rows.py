"""Writing the newest rows of sequences into their pages."""

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


def move_on(reached: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """How far views had been worked through: ``reached`` (int64 ``[B]``) cut to them; then it moves to their ends."""
    if on_gpu(reached):
        from keysift.ops.rows_triton import move

        return move(reached, start, length)
    done = torch.minimum(reached, start + length).maximum(start)
    reached.copy_(start + length)
    return done
