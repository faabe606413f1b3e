"""Kernels of a step that follow each other closely (programmatic dependent launch, compute capability 9 and later).

The programs of such a kernel may be placed while the one before it still runs; they wait for it before they touch
memory. That hides the launch, which is a good part of a step over few keys.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor
from triton.language.extra.cuda import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)


def chained(x: Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel whose first act is ``wait_for_previous(CHAINED)``."""
    if triton.knobs.runtime.interpret or not x.is_cuda or not _can_chain(x.device):
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


@functools.cache
def _can_chain(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """Before a program reads or writes anything: the kernel before is done, and the next may be placed."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
