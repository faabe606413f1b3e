"""These tests need vLLM, whose torch is not that of the others: `make test-vllm` has an environment for them."""

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HAVE_VLLM = importlib.util.find_spec("vllm") is not None and importlib.util.find_spec("vllm").origin is not None

if HAVE_VLLM:  # read when vLLM is imported, which the tests do
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.soak)
            if not HAVE_VLLM:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-vllm"))
