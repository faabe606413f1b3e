"""Attention under a block mask."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.dense import keys_values
from keysift.ops.heads import group
from keysift.types import KV, BlockMask, Partial


def block_sparse_attention(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Partial:
    """Causal attention of the last T positions over the key blocks of ``mask``.

    Only the queries whose block is in the mask are computed: with ``p`` the position of the first query, those at
    positions ``max(p, mask.rows().start) .. min(N, mask.rows().stop) - 1``.

    Args:
        q_BTHD: queries; all sequences of the batch have one length.
        kv: keys and values, N of them.
        mask: key blocks per query head and query block.
        scale: factor on q.k.
    """
    return block_sparse_attention_reference(q_BTHD, kv, mask, scale)


def block_sparse_attention_reference(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Partial:
    """fp32, block by block."""
    k, v = (x.float().transpose(1, 2) for x in keys_values(kv))
    batch, tokens, heads = q_BTHD.shape[:3]
    keys, offset = k.shape[2], k.shape[2] - tokens
    rows = range(max(offset, mask.rows().start), min(keys, mask.rows().stop))
    out = q_BTHD.new_zeros(batch, len(rows), heads, v.shape[-1], dtype=torch.float32)
    lse = q_BTHD.new_full((batch, len(rows), heads), -torch.inf, dtype=torch.float32)
    q = group(q_BTHD.float(), k.shape[1], 2)
    counts = (mask.full_count + mask.partial_count).cpu()
    for i in range(mask.full_count.shape[2]):
        first = (mask.first + i) * mask.block
        lo, hi = max(first, rows.start), min(first + mask.block, rows.stop)
        if lo >= hi:
            continue
        position = torch.arange(lo, hi, device=q.device)
        for b in range(batch):
            for h in range(heads):
                if not counts[b, h, i]:
                    continue
                at = _tokens(mask, b, h, i, keys)
                kh, g = divmod(h, q.shape[3])
                score = q[b, lo - offset : hi - offset, kh, g] @ k[b, kh, at].T * scale
                score = score.masked_fill(at > position[:, None], -torch.inf)
                row_lse = score.logsumexp(-1)
                weight = (score - row_lse.masked_fill(row_lse == -torch.inf, 0)[:, None]).exp()
                out[b, lo - rows.start : hi - rows.start, h] = weight @ v[b, kh, at]
                lse[b, lo - rows.start : hi - rows.start, h] = row_lse
    return Partial(out, lse)


def _tokens(mask: BlockMask, b: int, h: int, i: int, keys: int) -> Tensor:
    """Key positions that query block ``i`` reads, ``[*]``."""
    full = mask.full_index[b, h, i, : mask.full_count[b, h, i]]
    partial = mask.partial_index[b, h, i, : mask.partial_count[b, h, i]]
    at = torch.cat([full, partial]).long()[:, None] * mask.block + torch.arange(mask.block, device=full.device)
    return at[at < keys]
