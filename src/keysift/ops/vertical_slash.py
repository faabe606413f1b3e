"""How the attention of the last queries spreads over key columns (vertical) and over diagonals (slash), in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.ops.heads import group


def last_queries_attention(q_BRHD: Tensor, k_BNKD: Tensor, scale: float) -> Tensor:
    """Exact causal attention weights of the last R positions over all keys, fp32 ``[B, H, R, N]``."""
    rows, keys = q_BRHD.shape[1], k_BNKD.shape[1]
    q = group(q_BRHD.float(), k_BNKD.shape[2], 2)
    score = torch.einsum("brkgd,bnkd->bkgrn", q, k_BNKD.float()).flatten(1, 2) * scale
    position = torch.arange(keys - rows, keys, device=score.device)
    return score.masked_fill(torch.arange(keys, device=score.device) > position[:, None], -torch.inf).softmax(-1)


def vertical_slash_mass(q_BRHD: Tensor, k_BNKD: Tensor, scale: float, block: int) -> tuple[Tensor, Tensor]:
    """Attention mass of the last R queries by key block, and by block diagonal (query block - key block).

    A diagonal of tokens that runs through two blocks gives each its share, so that no part of a band is lost
    (FlexPrefill, arXiv:2502.20766, sums token diagonals and keeps only one of the two).

    Returns:
        vertical and slash mass, fp32 ``[B, H, C]`` each; both sum to 1.
    """
    rows, keys = q_BRHD.shape[1], k_BNKD.shape[1]
    blocks = -(-keys // block)
    by_block = torch.cat([_block_mass(q, k, scale, block) for q, k in _kv_heads(q_BRHD, k_BNKD)], 1)
    query_block = torch.arange(keys - rows, keys, device=by_block.device) // block
    diagonal = query_block[:, None] - torch.arange(blocks, device=by_block.device)  # negative only where the mass is 0
    slash = torch.zeros_like(by_block[:, :, 0])
    slash.scatter_add_(-1, diagonal.clamp(min=0).expand_as(by_block).flatten(2), by_block.flatten(2))
    return by_block.sum(2), slash


def _kv_heads(q_BRHD: Tensor, k_BNKD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One KV head at a time with its queries: [rows, N] weights exist for one group only."""
    q = group(q_BRHD, k_BNKD.shape[2], 2)
    for h in range(k_BNKD.shape[2]):
        yield q[:, :, h], k_BNKD[:, :, h : h + 1]


def _block_mass(q_BRGD: Tensor, k_BN1D: Tensor, scale: float, block: int) -> Tensor:
    """Share of the queries' attention on each key block, by query, ``[B, G, R, C]``; sums to 1 over R and C."""
    weight = last_queries_attention(q_BRGD, k_BN1D, scale)
    return block_sum(weight, block) / weight.shape[2]


def block_sum(x: Tensor, block: int) -> Tensor:
    """Sums of the last dimension's blocks, the last of them as long as it is."""
    return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def vertical_slash_blocks(vertical: Tensor, slash: Tensor, blocks: range) -> Tensor:
    """Active blocks of the query blocks at positions ``blocks``: chosen columns and chosen diagonals.

    Args:
        vertical: chosen key blocks, bool ``[B, H, C]``.
        slash: chosen block diagonals, bool ``[B, H, C]``.

    Returns:
        bool ``[B, H, len(blocks), C]``, nothing after the diagonal.
    """
    query = torch.arange(blocks.start, blocks.stop, device=vertical.device)[:, None]
    behind = query - torch.arange(vertical.shape[-1], device=vertical.device)
    on_slash = slash[..., behind.clamp(min=0)]
    return (vertical[:, :, None] | on_slash) & (behind >= 0)
