"""Attention under a block mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.ops.dense import keys_values
from keysift.types import KV, BlockMask, Partial

GATHERED_ELEMENTS = 1 << 26  # so many elements of keys, and as many of values, are gathered at a time


def block_sparse_attention(
    q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last T positions over the key blocks of ``mask``.

    Only the queries whose block is in the mask are computed: with ``p`` the position of the first query, those at
    positions ``max(p, mask.rows().start) .. min(N, mask.rows().stop) - 1``.

    Args:
        q_BTHD: queries; all sequences of the batch have one length.
        kv: keys and values, N of them.
        mask: key blocks per query head and query block.
        scale: factor on q.k.
        with_lse: also return the log-sum-exp.

    Returns:
        Output in q's dtype, ``[B, rows, H, Dv]``, zero for a query without blocks; lse, fp32 ``[B, rows, H]``, or None.
    """
    if with_lse:
        part = block_sparse_attention_reference(q_BTHD, kv, mask, scale)
        return part.out.to(q_BTHD.dtype), part.lse
    by_sdpa = _by_query_block if q_BTHD.is_cuda else _by_tile  # few large launches, or no wasted work
    return by_sdpa(q_BTHD, kv, mask, scale), None


def block_sparse_attention_reference(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Partial:
    """The same in fp32."""
    rows = _computed_rows(q_BTHD, kv, mask)
    heads, width = q_BTHD.shape[2], kv.v.shape[-1]
    out = q_BTHD.new_zeros(q_BTHD.shape[0], len(rows), heads, width, dtype=torch.float32)
    lse = q_BTHD.new_full((q_BTHD.shape[0], len(rows), heads), -torch.inf, dtype=torch.float32)
    for tile in _tiles(q_BTHD, kv, mask):
        score = tile.q.float() @ tile.k.float().T * scale
        if tile.seen is not None:
            score = score.masked_fill(~tile.seen, -torch.inf)
        out[tile.at] = score.softmax(-1) @ tile.v.float()
        lse[tile.at] = score.logsumexp(-1)
    return Partial(out, lse)


def _by_tile(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Tensor:
    """Torch SDPA on the gathered keys of each tile."""
    rows = _computed_rows(q_BTHD, kv, mask)
    out = q_BTHD.new_zeros(q_BTHD.shape[0], len(rows), q_BTHD.shape[2], kv.v.shape[-1])
    for tile in _tiles(q_BTHD, kv, mask):
        q, k, v = (x[None, None] for x in (tile.q, tile.k, tile.v))
        out[tile.at] = F.scaled_dot_product_attention(q, k, v, tile.seen, scale=scale)[0, 0]
    return out


def _by_query_block(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Tensor:
    """Torch SDPA on the gathered keys of all heads of a query block, padded to the longest list."""
    rows, offset, block = _computed_rows(q_BTHD, kv, mask), int(kv.length[0]) - q_BTHD.shape[1], mask.block
    k, v = _blocks(kv, block)
    batch, heads = q_BTHD.shape[0], q_BTHD.shape[2]
    active = mask.active(k.shape[2])
    order = torch.argsort(active.byte(), dim=-1, descending=True, stable=True)
    count = active.sum(-1)
    longest = count.amax((0, 1)).tolist()
    if batch * heads * max(longest) * block * k.shape[-1] > GATHERED_ELEMENTS:
        return _by_tile(q_BTHD, kv, mask, scale)
    b = torch.arange(batch, device=q_BTHD.device)[:, None, None]
    kv_head = (torch.arange(heads, device=q_BTHD.device) // (heads // k.shape[1]))[:, None]
    triangle = torch.ones(block, block, dtype=torch.bool, device=q_BTHD.device).tril()
    out = q_BTHD.new_zeros(batch, len(rows), heads, v.shape[-1])
    for i, most in enumerate(longest):
        first = (mask.first + i) * block
        lo, hi = max(first, rows.start), min(first + block, rows.stop)
        if lo >= hi or not most:
            continue
        chosen = order[:, :, i, :most]
        used = torch.arange(most, device=q_BTHD.device) < count[:, :, i, None]
        on_diagonal = (chosen == mask.first + i)[..., None, :, None]
        seen = used[..., None, :, None] & (~on_diagonal | triangle[lo - first : hi - first, None])
        part = F.scaled_dot_product_attention(
            q_BTHD[:, lo - offset : hi - offset].transpose(1, 2),
            k[b, kv_head, chosen].flatten(2, 3),
            v[b, kv_head, chosen].flatten(2, 3),
            seen.flatten(3),
            scale=scale,
        )
        out[:, lo - rows.start : hi - rows.start] = part.masked_fill(~used[..., :1, None], 0).transpose(1, 2)
    return out


class _Tile(NamedTuple):
    """One query block of one head, with the keys it reads."""

    at: tuple[int, slice, int]  # where its output goes
    q: Tensor  # [rows, D]
    k: Tensor  # [keys, D]
    v: Tensor  # [keys, Dv]
    seen: Tensor | None  # [rows, keys]; None for all


def _tiles(q_BTHD: Tensor, kv: KV, mask: BlockMask) -> Iterator[_Tile]:
    """The tiles that have keys. Keys past the end pad the last block with zeros; the causal mask hides them."""
    rows, offset = _computed_rows(q_BTHD, kv, mask), int(kv.length[0]) - q_BTHD.shape[1]
    k, v = _blocks(kv, mask.block)
    group = q_BTHD.shape[2] // k.shape[1]
    triangle = torch.ones(mask.block, mask.block, dtype=torch.bool, device=q_BTHD.device).tril()
    num_full, num_partial = mask.full_count.tolist(), mask.partial_count.tolist()
    for i in range(mask.full_count.shape[2]):
        first = (mask.first + i) * mask.block
        lo, hi = max(first, rows.start), min(first + mask.block, rows.stop)
        for b in range(q_BTHD.shape[0]):
            for h in range(q_BTHD.shape[2]):
                full, partial = num_full[b][h][i], num_partial[b][h][i]
                if lo >= hi or not full + partial:
                    continue
                blocks = torch.cat([mask.full_index[b, h, i, :full], mask.partial_index[b, h, i, :partial]])
                seen = F.pad(triangle[lo - first : hi - first], (full * mask.block, 0), value=True) if partial else None
                yield _Tile(
                    (b, slice(lo - rows.start, hi - rows.start), h),
                    q_BTHD[b, lo - offset : hi - offset, h],
                    k[b, h // group, blocks].flatten(0, 1),
                    v[b, h // group, blocks].flatten(0, 1),
                    seen,
                )


def _blocks(kv: KV, block: int) -> tuple[Tensor, Tensor]:
    """Keys and values by block, ``[B, K, C, block, *]``; zeros fill the last one."""
    fill = -int(kv.length[0]) % block
    k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4) for x in keys_values(kv))
    return k, v


def _computed_rows(q_BTHD: Tensor, kv: KV, mask: BlockMask) -> range:
    keys = int(kv.length[0])
    return range(max(keys - q_BTHD.shape[1], mask.rows().start), min(keys, mask.rows().stop))
