"""How much attention mass a block mask covers."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.dense import keys_values
from keysift.ops.heads import group
from keysift.types import KV, BlockMask


def mass_covered(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float, rows_a_block: int = 1) -> Tensor:
    """Share of the exact attention mass that falls on the mask's blocks, for a few query rows of every block.

    Returns:
        fp32 ``[B, H, Q * rows_a_block]``, rows of a block evenly spaced (repeated where a block has fewer).
    """
    k = keys_values(kv)[0].float()
    keys, offset = k.shape[1], k.shape[1] - q_BTHD.shape[1]
    active = mask.active(-(-keys // mask.block))
    shares = []
    for i in range(active.shape[2]):
        lo = max((mask.first + i) * mask.block, offset)
        hi = min((mask.first + i + 1) * mask.block, keys)
        at = torch.linspace(lo, hi - 1, rows_a_block + 1, device=k.device)[1:].round().long()
        q = group(q_BTHD[:, at - offset].float(), k.shape[2], 2)
        score = torch.einsum("btkgd,bnkd->bkgtn", q, k).flatten(1, 2) * scale
        score = score.masked_fill(torch.arange(keys, device=k.device) > at[:, None], -torch.inf)
        inside = active[:, :, i, None].repeat_interleave(mask.block, -1)[..., :keys]
        shares.append((score.softmax(-1) * inside).sum(-1))
    return torch.cat(shares, -1)
