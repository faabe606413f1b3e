"""Tensor descriptors: how Triton kernels load tiles of tokens through the bulk copy engine (TMA)."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    TensorDescriptor,
)


def tma_takes(x: Tensor) -> bool:
    """Whether tiles of ``x`` (``[B, S, K, D]``) can be described: aligned, no head or token repeated by stride 0."""
    strides = [s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in strides)
    repeated = any(x.stride(i) == 0 and x.shape[i] > 1 for i in (1, 2))
    return aligned and not repeated and x.stride(-1) == 1 and x.numel() > 0


def token_tiles(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of ``rows`` tokens of one head of ``x``, addressed by [sequence, head, token, 0]; zeros outside of ``x``.

    Heads come before tokens so that a tile's own dimensions are the last. Where all sequences see one buffer (stride 0)
    there is sequence 0 only.
    """
    batch, tokens, heads, dim = x.shape
    shape = [batch if x.stride(0) else 1, heads, tokens, dim]
    strides = [x.stride(0), x.stride(2), x.stride(1)]
    strides = [s if size > 1 else 8 for s, size in zip(strides, shape[:3], strict=True)]  # 8: never walked
    return TensorDescriptor(x, shape, [*strides, 1], [1, 1, rows, width])
