"""Where the rows of a KV view lie, inside Triton kernels, and how many programs go through what a bound allows for."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]


def programs(parts: int, rows: int, enough: int) -> int:
    """How many programs go through the parts of each of so many rows: a part each, unless a bound allows for far more
    parts than there will be. Then ``enough`` for all rows are started, as starting more for nothing takes time."""
    return min(parts, max(1, enough // max(1, rows)))


@triton.jit
def row_offsets(rows, seen, b, table, table_stride, stride_0, stride_1, PAGE: tl.constexpr):
    """Elements from the start of a buffer to buffer rows of sequence ``b``, int64; 0 where a row is not ``seen``.

    ``PAGE`` is the rows of a page, or 0 where the buffer is ``[B, S, ...]``; the strides are the buffer's first two.
    """
    if PAGE > 0:
        page = tl.load(table + b * table_stride + rows // PAGE, mask=seen, other=0)
        return page.to(tl.int64) * stride_0 + (rows % PAGE).to(tl.int64) * stride_1
    else:
        return b.to(tl.int64) * stride_0 + tl.where(seen, rows, 0).to(tl.int64) * stride_1
