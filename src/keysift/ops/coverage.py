"""How much attention mass a block mask covers, and how few blocks could have covered as much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keysift.ops.dense import keys_values
from keysift.ops.heads import group
from keysift.ops.vertical_slash import block_sum
from keysift.types import KV, BlockMask

COVERAGE_ROWS = 64  # query rows that `mass_covered` looks at


def mass_covered(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float, most: int = COVERAGE_ROWS) -> Tensor:
    """Share of the exact attention mass that falls on the mask's blocks, for a few query rows.

    Rows are spread evenly over the mask's query blocks, at most one a block. Nothing waits for the device.

    Returns:
        fp32 ``[B, H, min(most, Q)]``.
    """
    keys = keys_values(kv)[0].shape[1]
    first = keys - q_BTHD.shape[1]
    count = mask.full_count.shape[2]
    number = min(most, count)
    blocks = [mask.first + (2 * i + 1) * count // (2 * number) for i in range(number)]
    shares = []
    for i in blocks:
        lo, hi = max(i * mask.block, first), min((i + 1) * mask.block, keys)
        row = range(hi - 1, hi) if i == blocks[-1] else range((lo + hi) // 2, (lo + hi) // 2 + 1)
        inside = _row(mask, i - mask.first).active(-(-keys // mask.block))[:, :, 0]
        shares.append((_mass(q_BTHD, kv, scale, mask.block, row) * inside).sum(-1))
    return torch.stack(shares, -1)


def block_mass(q_BTHD: Tensor, kv: KV, scale: float, block: int, blocks: Sequence[int]) -> Tensor:
    """Exact share of attention by key block, mean over all query rows of each of ``blocks``, fp32 ``[B, H, *, C]``."""
    keys = keys_values(kv)[0].shape[1]
    first = keys - q_BTHD.shape[1]
    rows = (range(max(i * block, first), min((i + 1) * block, keys)) for i in blocks)
    return torch.stack([_mass(q_BTHD, kv, scale, block, row) for row in rows], 2)


def fewest_blocks(mass: Tensor, covered: Tensor) -> Tensor:
    """Blocks that a row-wise choice by the true mass needs to cover as much: the limit of any row-wise method.

    Every row of ``mass`` (``[..., Q, C]``) takes its heaviest blocks up to one share of its mass; the share is the one
    at which the rows' mean reaches ``covered`` (``[...]``).

    Returns:
        Blocks taken by all rows together, int64 ``[...]``.
    """
    ordered = mass.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    low, high = torch.zeros_like(covered), torch.ones_like(covered)
    for _ in range(30):
        share = (low + high) / 2
        enough = (ordered * (before < share[..., None, None])).sum(-1).mean(-1) >= covered
        low, high = torch.where(enough, low, share), torch.where(enough, share, high)
    return ((before < high[..., None, None]) & (ordered > 0)).sum((-1, -2))


def _mass(q_BTHD: Tensor, kv: KV, scale: float, block: int, rows: range) -> Tensor:
    """Mean over the query positions ``rows`` of their share of attention by key block, ``[B, H, C]``."""
    k = keys_values(kv)[0]
    keys, first = k.shape[1], k.shape[1] - q_BTHD.shape[1]
    at = torch.arange(rows.start, rows.stop, device=k.device)
    seen = torch.arange(rows.stop, device=k.device) <= at[:, None]
    q = group(q_BTHD[:, rows.start - first : rows.stop - first].float(), k.shape[2], 2)
    parts = []
    for h in range(k.shape[2]):  # a head at a time: fp32 copies of all keys would double the memory
        score = torch.einsum("btgd,bnd->bgtn", q[:, :, h], k[:, : rows.stop, h].float()) * scale
        parts.append(block_sum(score.masked_fill(~seen, -torch.inf).softmax(-1).mean(2), block))
    mass = torch.cat(parts, 1)
    return torch.nn.functional.pad(mass, (0, -(-keys // block) - mass.shape[-1]))


def _row(mask: BlockMask, i: int) -> BlockMask:
    """The mask of its ``i``-th query block alone."""
    partial_count, partial_index, full_count, full_index = (x[:, :, i : i + 1] for x in mask[:4])
    return BlockMask(partial_count, partial_index, full_count, full_index, mask.block, mask.first + i)
