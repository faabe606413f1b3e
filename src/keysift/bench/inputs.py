"""Queries, keys and values whose attention has the shapes that heads of long-context models show.

Normal noise attends to everything alike, and no sparse method can or should save anything on it. Here the KV heads take
turns at three kinds, as the papers on sparse prefill describe them:

local: the mass lies near the diagonal; slash: on some heavy columns too; block: queries of a topic attend to the keys
of that topic. All heads look at a sink of four keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("local", "slash", "block", "slash")
NOISE = 0.6
BASE = 500_000.0  # of the rotary embedding
SLOW_DIMS = 8  # rotary dims that hardly turn: position does not matter there
TOPICS, TOPIC_TOKENS = 64, 997
NEARBY = {"local": 1.6, "slash": 1.3, "block": 0.7}  # strength of the attention to near keys


def structured_qkv(
    tokens: int,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    *,
    batch: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[batch, tokens, heads, dim]``, keys and values ``[batch, tokens, kv_heads, dim]``, after rotary.

    The same seed gives the same tensors on the same kind of device. ``dim`` must be even and at least 32.
    """
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    group = heads // kv_heads
    slow = slice(dim // 2 - SLOW_DIMS, dim // 2)
    topic = torch.arange(tokens, device=device) // TOPIC_TOKENS * 2654435761 % TOPICS
    q = torch.empty(batch, tokens, heads, dim, dtype=dtype, device=device)
    k = torch.empty(batch, tokens, kv_heads, dim, dtype=dtype, device=device)
    for kv_head in range(kv_heads):
        kind = KINDS[kv_head % len(KINDS)]
        queries = normal(batch, tokens, group, dim) * NOISE
        keys = normal(batch, tokens, 1, dim) * NOISE
        direction = normal(dim)
        nearby = NEARBY[kind] * math.sqrt(dim) * direction / direction.norm()
        queries += nearby
        keys += nearby
        queries[..., slow] += 1
        keys[:, :4, :, slow] += 6  # the sink
        if kind == "slash":
            columns = torch.randint(tokens, (max(4, tokens // 2000),), generator=random, device=device)
            queries[..., slow] += 3
            keys[:, columns.unique(), :, slow] += 7
        if kind == "block":
            meaning = normal(TOPICS, SLOW_DIMS)
            meaning = 9 * meaning / meaning.norm(dim=-1, keepdim=True)
            queries[..., slow] += meaning[topic][:, None]
            keys[..., slow] += meaning[topic][:, None]
        q[:, :, kv_head * group : (kv_head + 1) * group] = _rotated(queries)
        k[:, :, kv_head : kv_head + 1] = _rotated(keys)
    return q, k, normal(batch, tokens, kv_heads, dim).to(dtype)


def _rotated(x: Tensor) -> Tensor:
    """Rotary embedding of ``[batch, tokens, heads, dim]``."""
    tokens, half = x.shape[1], x.shape[3] // 2
    frequency = BASE ** -(torch.arange(half, device=x.device) / half)
    angle = (torch.arange(tokens, device=x.device)[:, None] * frequency)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
