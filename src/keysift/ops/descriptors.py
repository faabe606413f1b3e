"""Tensor descriptors: how Triton kernels load tiles of tokens through the bulk copy engine (TMA)."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    TensorDescriptor,
)


def tma_takes(x: Tensor) -> bool:
    """Whether ``x`` (``[B, S, K, D]``, last dimension contiguous) can be loaded so: on Hopper or newer, and aligned."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    strides = [s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and x.numel() > 0 and all(s * x.element_size() % 16 == 0 for s in strides)


def token_tiles(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of ``rows`` tokens of one head of ``x``, addressed by [sequence, head, token, 0]; zeros outside."""
    batch, tokens, heads, dim = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1)]
    shape = [batch, heads, tokens, dim]
    strides = [s if size > 1 and s else 8 for s, size in zip(strides, shape[:3], strict=True)]  # 8: never walked
    return TensorDescriptor(x, shape, [*strides, 1], [1, 1, rows, width])
