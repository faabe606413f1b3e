"""FlexPrefill's search for the key blocks that a prompt reads, as its authors' code has it (arXiv:2502.20766).

The last block of queries shows each head's pattern. Where its attention, pooled in blocks, looks like the attention of
pooled queries and keys, the head is query-aware and its blocks are chosen by pooled scores; else the columns and
diagonals that carry the last block's mass are kept for all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops.heads import group
from keysift.ops.lists import on_gpu
from keysift.ops.pooling import pool
from keysift.ops.select import top_k
from keysift.ops.vertical_slash import block_sum, last_queries_attention, vertical_slash_blocks
from keysift.types import one_of

BACKENDS = ("auto", "reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ChosenRows(NamedTuple):
    """Query-aware rows that were chosen all at once, bool ``[B, H, C, C]``."""

    chosen: Tensor


class PooledRows(NamedTuple):
    """Query-aware rows as a threshold on the softmax of pooled scores; what other heads have here is unspecified.

    Attributes:
        q, k: mean of each block's queries and keys, fp32 ``[B, C, H, D]`` and ``[B, C, K, D]``.
        lse: log2 of each row's sum of weights, fp32 ``[B, H, C]``.
        threshold: the smallest share that is kept, fp32 ``[B, H]``.
        scale: factor on q.k that makes log2 units of it.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    threshold: Tensor
    scale: float


class SeedPlan(NamedTuple):
    """The search's result, from which the blocks of any row follow.

    Attributes:
        vertical, slash: chosen key blocks and block diagonals, bool ``[B, H, C]``.
        query_aware: heads whose rows are chosen by pooled scores, bool ``[B, H]``.
        rows: how those heads' blocks are chosen; None if no head is query-aware.
    """

    vertical: Tensor
    slash: Tensor
    query_aware: Tensor
    rows: PooledRows | ChosenRows | None

    def active(self, blocks: range) -> Tensor:
        """The blocks of the query blocks at positions ``blocks``, bool ``[B, H, len(blocks), C]``."""
        if isinstance(self.rows, PooledRows):
            from keysift.ops.flex_seed_rows_triton import chosen_blocks

            return chosen_blocks(self.vertical, self.slash, self.query_aware, self.rows, blocks)
        active = vertical_slash_blocks(self.vertical, self.slash, blocks)
        if self.rows is None:
            return active
        return active | (self.rows.chosen[:, :, blocks.start : blocks.stop] & self.query_aware[..., None, None])


def flex_search_seed(
    q_BNHD: Tensor,
    k_BNKD: Tensor,
    gamma: float,
    tau: float,
    least: int,
    most: int | None,
    block: int,
    backend: str = "auto",
) -> SeedPlan:
    """FlexPrefill's search as its authors' code has it, faults included: the same block sets (arXiv:2502.20766).

    Its budgets count tokens as if they lay side by side, in blocks of 128 whatever the block; it scales by
    1 / sqrt(D) always; an underflow in the pattern test means vertical-slash; query-aware rows may end up empty and
    know no upper bound.

    The Triton backend never makes the host wait, takes workspace linear in N, and gives the same blocks on every run;
    they differ from the reference's only where rounding decides.

    Args:
        q_BNHD: queries of all N positions, float32, bfloat16 or float16.
        k_BNKD: keys of all N positions.
        gamma: share of attention mass to cover, counted as said.
        tau: a head is query-aware if the Jensen-Shannon distance between pooled and true attention is below this.
        least, most: bounds on the columns and on the diagonals, in blocks.
        block: tokens a block: 16, 32, 64 or 128.
        backend: "triton", "reference", or "auto": Triton where there is a CUDA device and Triton.

    Raises:
        ValueError: fewer queries than keys, or an unknown backend.
    """
    one_of("backend", backend, BACKENDS)
    keys = k_BNKD.shape[1]
    if q_BNHD.shape[1] != keys:
        raise ValueError(f"mode=seed needs as many queries as keys, got {q_BNHD.shape[1]} and {keys}: use mode=default")
    if backend == "auto":
        backend = "triton" if on_gpu(q_BNHD) and q_BNHD.dtype in DTYPES else "reference"
    if backend == "reference":
        return flex_search_seed_reference(q_BNHD, k_BNKD, gamma, tau, least, most, block)
    from keysift.ops.flex_seed_triton import search

    most = -(-keys // block) if most is None else most
    vertical, slash, query_aware, rows = search(q_BNHD, k_BNKD, gamma, tau, least, most, block)
    return SeedPlan(vertical, slash, query_aware, rows)


def flex_search_seed_reference(
    q_BNHD: Tensor, k_BNKD: Tensor, gamma: float, tau: float, least: int, most: int | None, block: int
) -> SeedPlan:
    """The same in fp32, step by step."""
    keys, dim = k_BNKD.shape[1:4:2]
    blocks, scale = -(-keys // block), dim**-0.5
    weight = last_queries_attention(q_BNHD[:, -block:], k_BNKD, scale)
    by_column, by_offset = weight.mean(2), _mean_by_offset(weight)
    most = blocks if most is None else most
    vertical_mass = block_sum(by_column, block)
    slash_mass = block_sum(by_offset.flip(-1), block).flip(-1)

    pooled_k = pool(k_BNKD, block, 0)
    estimate = _scores(q_BNHD[:, -block:].float().mean(1, keepdim=True), pooled_k, scale)[:, :, 0].softmax(-1)
    middle = (estimate + vertical_mass) / 2
    divergence = (estimate * (estimate / middle).log() + vertical_mass * (vertical_mass / middle).log()).sum(-1) / 2
    query_aware = divergence.sqrt() < tau  # NaN compares false

    vertical_mass[..., 0] = slash_mass[..., 0] = torch.inf
    num_vertical = _seed_rank(by_column, gamma).clamp(least, most)
    num_slash = _seed_rank(by_offset, gamma).clamp(least, most)
    vertical = top_k(vertical_mass, num_vertical.masked_fill(query_aware, least))
    slash = top_k(slash_mass, num_slash.masked_fill(query_aware, least))
    rows = None
    if bool(query_aware.any()):
        score = _scores(pool(q_BNHD, block, 0), pooled_k, scale)
        causal = torch.ones(blocks, blocks, dtype=torch.bool, device=score.device).tril()
        share = score.masked_fill(~causal, -torch.inf).softmax(-1)
        ordered, order = torch.sort(share.flatten(2), dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(ordered, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(-1) <= gamma * blocks)
        rows = ChosenRows(kept.unflatten(-1, (blocks, blocks)) & causal)
    return SeedPlan(vertical, slash, query_aware, rows)


def _scores(pooled_q_BQHD: Tensor, pooled_k_BCKD: Tensor, scale: float) -> Tensor:
    q = group(pooled_q_BQHD, pooled_k_BCKD.shape[2], 2)
    return torch.einsum("bqkgd,bckd->bkgqc", q, pooled_k_BCKD).flatten(1, 2) * scale


def _mean_by_offset(weight_BHRN: Tensor) -> Tensor:
    """Mean over the last R queries of the weight at each distance, ``[B, H, N]``."""
    rows, keys = weight_BHRN.shape[-2:]
    position = torch.arange(keys - rows, keys, device=weight_BHRN.device)[:, None]
    at = position - torch.arange(keys, device=weight_BHRN.device)
    return (weight_BHRN.gather(-1, at.clamp(min=0).expand_as(weight_BHRN)) * (at >= 0)).mean(2)


def _seed_rank(x: Tensor, gamma: float) -> Tensor:
    """Tokens that reach gamma when sorted, as blocks of 128 side by side."""
    return (x.sort(-1, descending=True).values.cumsum(-1) <= gamma).sum(-1).add(1) // 128 + 1
