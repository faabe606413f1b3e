# mypy: allow-untyped-defs, allow-incomplete-defs
"""The sum of a small tensor over GPUs that reach each other's memory, in one launch and without a barrier.

Each GPU writes its numbers into the others' memory, every two of them beside the number of the call in one word of 64
bits, which arrives whole. Who waits for a word sees by the call's number that it has come. Two halves of the memory
take turns: to write a half again, a GPU must have had the others' words of the call between, which they sent when they
were done with that half. All add up in the same order, so that all get the same bits.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

WORDS = 512  # of a program; each holds two numbers
CAPACITY = 1 << 16  # words of one GPU in one half


def buffer_words(ranks: int) -> int:
    """Words of 64 bits that a GPU needs in memory that the others reach."""
    return 2 * ranks * CAPACITY


def takes(x: Tensor) -> bool:
    """Whether a tensor can be summed so."""
    return x.dtype == torch.bfloat16 and x.numel() % 2 == 0 and x.numel() // 2 <= CAPACITY


def sum_ranks(x: Tensor, mine: Tensor, addresses: Tensor, calls: Tensor, rank: int) -> Tensor:
    """The sum of what all GPUs have; all must make the same calls in the same order.

    Args:
        x: bf16, contiguous; ``takes`` it.
        mine: this GPU's ``buffer_words``, int64, zero before the first call.
        addresses: of all GPUs' ``mine``, as this one sees them, int64 ``[ranks]``.
        calls: how many each program has made, int32 ``[CAPACITY / WORDS]``, zero before the first.
        rank: of this GPU.
    """
    out = torch.empty_like(x)
    words = x.numel() // 2
    _sum[(triton.cdiv(words, WORDS),)](
        x.view(-1).view(torch.int32), out.view(-1).view(torch.int32), mine, addresses, calls, words,
        RANK=rank, RANKS=len(addresses), WORDS=WORDS, CAPACITY=CAPACITY, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _sum(
    x, out, mine, addresses, calls, words,
    RANK: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    call = tl.load(calls + program) + 1
    half = (call & 1) * RANKS
    i = program * WORDS + tl.arange(0, WORDS)
    inside = i < words
    own = tl.load(x + i, inside, other=0)
    stamp = call.to(tl.int64) << 32
    for r in tl.static_range(RANKS):
        if r != RANK:
            there = tl.load(addresses + r).to(tl.pointer_type(tl.int64))
            tl.store(there + (half + RANK) * CAPACITY + i, stamp | (own.to(tl.int64) & 0xFFFFFFFF), inside)
    low = tl.zeros([WORDS], tl.float32)
    high = tl.zeros([WORDS], tl.float32)
    for r in tl.static_range(RANKS):
        part = own
        if r != RANK:
            here = mine + (half + r) * CAPACITY + i
            word = tl.load(here, inside, other=0, volatile=True)
            while tl.max((inside & ((word >> 32) != call)).to(tl.int32)) != 0:
                word = tl.load(here, inside, other=0, volatile=True)
            part = word.to(tl.int32)
        low += (part << 16).to(tl.float32, bitcast=True)
        high += (part & -65536).to(tl.float32, bitcast=True)
    low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    high_bits = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(out + i, (low_bits & 0xFFFF) | (high_bits << 16), inside)
    tl.store(calls + program, call)
