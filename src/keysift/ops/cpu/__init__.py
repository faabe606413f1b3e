"""Kernels for CPUs: C++ in ``src/``, built into one shared library with a plain C ABI."""
