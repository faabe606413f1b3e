"""Sign-bit hashing of keys and queries, and matching of the codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keysift.ops.heads import group
from keysift.ops.random import normal

MAX_BITS = 15  # a table's code is kept in an int16


def projections(seed: int, layer: int, num_kv_heads: int, dim: int, columns: int, device: torch.device) -> Tensor:
    """Independent N(0, 1) directions for each KV head of a layer, fp32 ``[K, D, columns]``."""
    axes = [torch.arange(n, device=device) for n in (num_kv_heads, dim, columns)]
    return normal(seed, layer, axes[0][:, None, None], axes[1][:, None], axes[2])


def hash_codes(x: Tensor, w: Tensor, bits: int) -> Tensor:
    """SimHash: bit b of table l is the sign of ``x . w[:, l * bits + b]`` (arXiv:2410.16179).

    Args:
        x: vectors ``[..., D]``; products are taken in fp32.
        w: directions, fp32 ``[..., D, L * bits]``, broadcast against x's leading dimensions by matmul.
        bits: bits a table, 1 to 15.

    Returns:
        Codes, int16 ``[..., L]``.
    """
    positive = (x.float() @ w.float() > 0).float().unflatten(-1, (-1, bits))
    return (positive @ 2.0 ** torch.arange(bits, device=x.device)).to(torch.int16)  # exact: fewer than 24 bits


def match_codes(q_codes_BHL: Tensor, k_codes_BKLS: Tensor) -> Tensor:
    """How many tables give query and key one code, int16 ``[B, H, S]``; query heads read their KV head's codes."""
    q = group(q_codes_BHL, k_codes_BKLS.shape[1], 1)
    hits = torch.zeros(*q.shape[:3], k_codes_BKLS.shape[3], dtype=torch.int16, device=q.device)
    for q_part, k_part in zip(q.split(16, 3), k_codes_BKLS.split(16, 2), strict=True):  # a few large steps, bounded
        equal = q_part[..., None] == k_part[:, :, None]
        hits += equal.view(torch.uint8).sum(-2, dtype=torch.uint8)
    return hits.flatten(1, 2)


def collision_log_probability(cosine: Tensor, bits: int, tables: int, floor: float = 0.0) -> Tensor:
    """Log probability that at least two of L tables collide: with p = 1 - angle / pi and r = p^bits,
    ``u = 1 - (1 - r)^L - L r (1 - r)^(L - 1)`` (arXiv:2410.16179).

    Args:
        cosine: of the angle between query and key, any shape, clamped to [-1, 1].
        bits, tables: K and L of the paper.
        floor: added to u before the logarithm (the authors' code adds 1e-4, which biases rare keys).
    """
    angle = torch.acos(cosine.double().clamp(-1, 1))
    r = (1 - angle / math.pi) ** bits
    miss = torch.log1p(-r.clamp(max=1 - 1e-15))
    u = -torch.expm1(tables * miss) - tables * r * torch.exp((tables - 1) * miss)
    small = tables * (tables - 1) / 2 * r * r  # leading term, where the difference above has cancelled
    u = torch.where(tables * r < 1e-6, small, u)
    return (u + floor).clamp(1e-300, 1).log().float()
