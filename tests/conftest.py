"""Triton kernels run in Triton's interpreter where there is no CUDA device; it has to be chosen before the import."""

import os
from collections import defaultdict

import pytest
import torch

MOST_WORKERS = 8  # each may hold 2 GB
FAST_CASES = 2  # of a test, in `make test-fast`

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n auto``: one a core that is ours; one with a GPU, where others would spoil measured times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.cuda.is_available() else min(MOST_WORKERS, cores)


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test of many cases a few, which lie evenly among them, are fast enough together."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("slow") and not item.get_closest_marker("soak"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_test in cases.values():
        fast = {i * len(of_test) // FAST_CASES for i in range(FAST_CASES)}
        for i, item in enumerate(of_test):
            if len(of_test) > FAST_CASES and i not in fast:
                item.add_marker(pytest.mark.slow)
