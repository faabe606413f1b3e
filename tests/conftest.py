"""Triton kernels run in Triton's interpreter where there is no CUDA device; it has to be chosen before the import."""

import os

import pytest
import torch

MOST_WORKERS = 8  # each may hold 2 GB

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n auto``: one a core that is ours; one with a GPU, where others would spoil measured times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.cuda.is_available() else min(MOST_WORKERS, cores)
