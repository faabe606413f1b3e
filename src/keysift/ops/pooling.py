"""Means of blocks of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(x_BTHD: Tensor, block: int, skip: int) -> Tensor:
    """Mean of each block's tokens, fp32 ``[B, Q, H, D]``; a block that is not full is divided by the tokens it has.

    The first block starts ``skip`` tokens before the first token.
    """
    tokens = x_BTHD.shape[1]
    blocks = -(-(tokens + skip) // block)
    padded = F.pad(x_BTHD.float(), (0, 0, 0, 0, skip, blocks * block - skip - tokens))
    edge = torch.arange(blocks + 1, device=x_BTHD.device) * block - skip
    held = edge[1:].clamp(max=tokens) - edge[:-1].clamp(min=0)
    return padded.unflatten(1, (blocks, block)).sum(2) / held[:, None, None]
