"""Host memory in large pages, so that reading rows here and there does not wait for address translation."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

PAGE = 2 << 20
MADV_HUGEPAGE = 14  # of Linux


def in_large_pages(x: Tensor) -> Tensor:
    """``x``, of whose memory the system is asked to make large pages; before it is first written to.

    A hint: it does nothing for small tensors, those of other devices, and where the system knows no such pages.
    """
    madvise = _madvise()
    first = -(-x.data_ptr() // PAGE) * PAGE if x.is_cpu else 0
    size = (x.data_ptr() + x.numel() * x.element_size()) // PAGE * PAGE - first if x.is_cpu else 0
    if madvise is not None and size > 0:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return x


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
