"""Triton kernel that lists the key blocks our search has found; ``flex_search.FlexPlan`` says which they are."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from keysift.ops import flex_search
from keysift.ops.flex_search import FlexPlan
from keysift.ops.flex_search_triton import OF_A_PROMPT, beside, columns, row_block, seen_from, warps, with_near
from keysift.types import BlockMask

FIRST_OF_NONE = tl.constexpr(flex_search.FIRST_OF_NONE)
COARSE = tl.constexpr(flex_search.COARSE_BITS)


@triton.jit
def _enough(score, estimate, cutoff, share, least):
    kept = score >= cutoff
    enough = tl.sum(tl.where(kept, estimate, 0.0)) >= share
    if least > 1:
        enough &= tl.sum(kept.to(tl.int32)) >= least
    return enough


@triton.jit(do_not_specialize=OF_A_PROMPT)
def _chosen(
    mean,
    last,
    threshold,
    count,
    index,
    first,
    keys,
    first_strip,
    strips,
    per,
    blocks,
    pitch,
    first_block,
    slots,
    rows,
    wanted,  # share of the mass that each row keeps
    least,
    most,
    striking,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    C_PAD: tl.constexpr,
    LIMITED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """List of the blocks before the diagonal that a row of blocks reads."""
    bh = tl.program_id(1).to(tl.int64)
    mean += bh * strips * pitch
    highest = tl.load(threshold + bh)
    column = tl.arange(0, C_PAD)
    share_of_last = tl.load(last + bh * pitch + column, mask=column < blocks, other=0.0)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * AT_ONCE  # rows that follow each other read the same strips
    for row in range(begin, tl.minimum(begin + AT_ONCE, rows)):
        block = first_block + row
        middle = tl.minimum(tl.maximum(block * BLOCK + BLOCK // 2, first), keys - 1)
        strip = middle // TOKENS - first_strip
        at = row_block(strip, first, keys, first_strip, per, BLOCK, TOKENS)
        own = seen_from(mean + strip * pitch, at, block, column, blocks)
        near = beside(mean, strip, block, column, first, keys, first_strip, strips, per, blocks, pitch, BLOCK, TOKENS)
        estimate = tl.where(column <= block, with_near(own, near, per, strips), 0.0)
        score = tl.where(column <= block, estimate + FIRST_OF_NONE * (column + 1), -1.0)
        score = tl.where((share_of_last >= striking) & (column < block), 1 + share_of_last, score)
        score = tl.where(column == block, float("inf"), score)
        cutoff = _cutoff(score, estimate, highest, wanted * tl.sum(estimate), tl.minimum(least, block + 1))
        kept = score >= cutoff
        if LIMITED:
            above, tied = _limits(score, cutoff, most)
            ties = (score >= tied) & (score < above)
            room = most - tl.sum((score >= above).to(tl.int32))
            kept &= (score >= above) | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))
        kept &= column < block
        slot = tl.cumsum(kept.to(tl.int32), 0) - 1
        out = bh * rows + row
        tl.store(index + out * slots + slot, column, mask=kept)
        tl.store(count + out, tl.sum(kept.to(tl.int32)))


@triton.jit
def _cutoff(score, estimate, cutoff, share, least):
    """``cutoff``, or a lower one where it leaves less than ``share`` of the mass or fewer than ``least`` blocks."""
    if not _enough(score, estimate, cutoff, share, least):
        # floats of one sign are ordered like their bits
        low, high = 0, (cutoff.to(tl.int32, bitcast=True) >> COARSE) + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            if _enough(score, estimate, (middle << COARSE).to(tl.float32, bitcast=True), share, least):
                low = middle
            else:
                high = middle
        cutoff = (low << COARSE).to(tl.float32, bitcast=True)
    return cutoff


@triton.jit
def _limits(score, cutoff, most):
    """The lowest score that at most ``most`` reach, and the next below, at which some may tie."""
    low, high = cutoff.to(tl.int32, bitcast=True), cutoff.to(tl.int32, bitcast=True)
    if tl.sum((score >= cutoff).to(tl.int32)) > most:
        high = low * 0 + 0x7F800000
        while high - low > 1:
            middle = low + (high - low) // 2
            if tl.sum((score >= middle.to(tl.float32, bitcast=True)).to(tl.int32)) > most:
                low = middle
            else:
                high = middle
    return high.to(tl.float32, bitcast=True), low.to(tl.float32, bitcast=True)


def chosen_lists(plan: FlexPlan, blocks: range) -> BlockMask:
    """The blocks of the query blocks at positions ``blocks``; unused entries of the lists are unspecified."""
    sampling, mean = plan.sampling, plan.mass
    batch, heads, strips, _ = mean.shape
    slots = max(1, blocks.stop - 1)
    count = torch.empty(batch, heads, len(blocks), dtype=torch.int32, device=mean.device)
    index = torch.empty(batch, heads, len(blocks), slots, dtype=torch.int32, device=mean.device)
    c_pad = columns(blocks.stop)
    at_once = 4 if len(blocks) >= 256 else 1
    _chosen[(-(-len(blocks) // at_once), batch * heads)](
        mean,
        plan.last,
        plan.threshold,
        count,
        index,
        sampling.first,
        sampling.keys,
        sampling.strips.start,
        strips,
        sampling.per,
        sampling.blocks,
        mean.stride(2),
        blocks.start,
        slots,
        len(blocks),
        plan.gamma - flex_search.ROW_SLACK,
        plan.least,
        blocks.stop if plan.most is None else plan.most,
        sampling.striking,
        BLOCK=sampling.block,
        TOKENS=sampling.strip,
        C_PAD=c_pad,
        LIMITED=plan.most is not None,
        AT_ONCE=at_once,
        num_warps=warps(c_pad),
    )
    one = torch.ones((), dtype=torch.int32, device=mean.device).expand(batch, heads, len(blocks))
    diagonal = torch.arange(blocks.start, blocks.stop, dtype=torch.int32, device=mean.device)
    diagonal = diagonal[:, None].expand(batch, heads, len(blocks), 1)
    return BlockMask(one, diagonal, count, index, sampling.block, blocks.start)
