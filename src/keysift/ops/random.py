"""Counter-based random numbers: a draw is a pure function of its address, the same on every device and in any batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that scatters every input bit (two rounds of multiply and xor-shift)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def uniform(*address: Tensor | int) -> Tensor:
    """Uniform draws in (0, 1), fp32, one for each broadcast element of the address (integers of any size)."""
    tensors = [a if isinstance(a, Tensor) else torch.tensor(a) for a in address]
    device = next((t.device for t in tensors if t.dim()), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for word in tensors:
        state = _absorb(state, word.to(device, torch.int64))
    return ((state >> 8).float() + 0.5) * 2.0**-24


def state_of(*address: int) -> int:
    """What kernels continue from: the 32-bit state after the first words of an address."""
    state = torch.zeros((), dtype=torch.int64)
    for word in address:
        state = _absorb(state, torch.tensor(word))
    return int(state)


def _absorb(state: Tensor, word: Tensor) -> Tensor:
    state = _mix((state + (word & _MASK) + 0x9E3779B9) & _MASK)
    return _mix(state ^ ((word >> 32) & _MASK))


def normal(*address: Tensor | int) -> Tensor:
    """Standard normal draws, fp32 (Box-Muller)."""
    return (-2 * uniform(*address, 0).log()).sqrt() * (2 * math.pi * uniform(*address, 1)).cos()
