"""The draws of ``keysift.ops.random`` inside Triton kernels: the same address gives the same number."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]


@triton.jit
def mix(x):
    """A bijection of 32-bit integers that scatters every input bit; ``x`` is uint32."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def absorb(state, word):
    """The state after one more word of an address; ``word`` is a non-negative integer below 2**31, or an int64."""
    wide = word.to(tl.int64)
    state = mix(state + (wide & 0xFFFFFFFF).to(tl.uint32) + 0x9E3779B9)
    return mix(state ^ ((wide >> 32) & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def to_uniform(state):
    """The draw in (0, 1), fp32, of an address that is complete."""
    return ((state >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
