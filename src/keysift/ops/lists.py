"""Lists of the active blocks of a mask, made where the mask is."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from keysift.ops.cpu.library import load
from keysift.types import BlockMask


def block_lists(active: Tensor, block: int, first: int) -> BlockMask:
    """``BlockMask.of`` that never makes the host wait for a GPU.

    On a GPU the lists are as long as the longest could be: all key blocks before the diagonal of the last row.

    Args:
        active: bool ``[B, H, Q, C]``, any strides; blocks after the diagonal are dropped.
        block: tokens a block.
        first: block position of query block 0.

    Returns:
        The lists: ascending, unused entries 0.
    """
    if not on_gpu(active):
        return BlockMask.of(active, block, first)
    from keysift.ops.lists_triton import compact

    return compact(active, block, first)


def on_gpu(x: Tensor) -> bool:
    """Whether Triton kernels can take ``x``."""
    return x.is_cuda and has_triton()


def on_cpu(*tensors: Tensor) -> bool:
    """Whether the kernels of ``ops.cpu`` can take these: where they were built, and no gradient is asked for."""
    grad = torch.is_grad_enabled()
    return all(x.is_cpu and not (grad and x.requires_grad) for x in tensors) and load() is not None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None
