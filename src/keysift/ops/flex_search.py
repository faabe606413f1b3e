"""FlexPrefill's search for the key blocks that a prompt reads (arXiv:2502.20766): ours, and the authors' to the letter.

The last block of queries shows each head's pattern. Where its attention, pooled in blocks, looks like the attention of
pooled queries and keys, the head is query-aware and each row of blocks is chosen by pooled scores; else the columns and
diagonals that carry the last block's mass are kept for all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.ops.heads import group
from keysift.ops.select import cover, top_k
from keysift.ops.vertical_slash import block_sum, last_queries_attention, vertical_slash_blocks, vertical_slash_mass


class PooledRows(NamedTuple):
    """Query-aware rows, by pooled scores: ``cover`` row by row when the rows are asked for."""

    q: Tensor  # pooled queries, [B, Q, H, D], from query block `first`
    k: Tensor  # pooled keys, [B, C, K, D]
    scale: float
    gamma: float
    least: int
    most: int | None
    first: int

    def active(self, blocks: range) -> Tensor:
        score = _scores(self.q[:, blocks.start - self.first : blocks.stop - self.first], self.k, self.scale)
        query = torch.arange(blocks.start, blocks.stop, device=score.device)[:, None]
        causal = torch.arange(score.shape[-1], device=score.device) <= query
        return cover(score.masked_fill(~causal, -torch.inf).softmax(-1), self.gamma, self.least, self.most) & causal


class ChosenRows(NamedTuple):
    """Query-aware rows that were chosen all at once, bool ``[B, H, C, C]``."""

    chosen: Tensor

    def active(self, blocks: range) -> Tensor:
        return self.chosen[:, :, blocks.start : blocks.stop]


class FlexPlan(NamedTuple):
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
        active = vertical_slash_blocks(self.vertical, self.slash, blocks)
        if self.rows is None:
            return active
        return active | (self.rows.active(blocks) & self.query_aware[..., None, None])


def flex_search(
    q_BTHD: Tensor, k_BNKD: Tensor, scale: float, gamma: float, tau: float, least: int, most: int | None, block: int
) -> FlexPlan:
    """FlexPrefill's search, mended: gamma is a share of block mass, and every row keeps its sink and diagonal blocks.

    Args:
        q_BTHD: queries of the last T positions.
        k_BNKD: keys of all N positions.
        scale: factor on q.k, in the search too.
        gamma: attention mass to cover, by columns and by diagonals of the last queries, by rows in query-aware heads.
        tau: a head is query-aware if the Jensen-Shannon distance between pooled and true attention is below this.
        least, most: bounds on the columns, on the diagonals and on a query-aware row, in blocks.
        block: tokens a block.
    """
    return flex_search_reference(q_BTHD, k_BNKD, scale, gamma, tau, least, most, block)


def flex_search_reference(
    q_BTHD: Tensor, k_BNKD: Tensor, scale: float, gamma: float, tau: float, least: int, most: int | None, block: int
) -> FlexPlan:
    """fp32."""
    tokens, keys = q_BTHD.shape[1], k_BNKD.shape[1]
    last_q = q_BTHD[:, -block:]
    vertical_mass, slash_mass = vertical_slash_mass(last_q, k_BNKD, scale, block)
    pooled_k = pool(k_BNKD, block, 0)
    estimate = _scores(last_q.float().mean(1, keepdim=True), pooled_k, scale)[:, :, 0].softmax(-1)
    query_aware = jensen_shannon_distance(estimate, vertical_mass) < tau
    rows = None
    if bool(query_aware.any()):
        pooled_q = pool(q_BTHD, block, (keys - tokens) % block)
        rows = PooledRows(pooled_q, pooled_k, scale, gamma, least, most, (keys - tokens) // block)
    wide = ~query_aware[..., None]
    vertical = cover(vertical_mass, gamma, least, most) & wide
    slash = cover(slash_mass, gamma, least, most) & wide
    vertical[..., 0] = True
    slash[..., 0] = True
    return FlexPlan(vertical, slash, query_aware, rows)


def flex_search_seed(
    q_BNHD: Tensor, k_BNKD: Tensor, gamma: float, tau: float, least: int, most: int | None, block: int
) -> FlexPlan:
    """FlexPrefill's search as its authors' code has it, faults included: the same block sets.

    Its budgets count tokens as if they lay side by side, in blocks of 128 whatever the block; it scales by
    1 / sqrt(D) always; an underflow in the pattern test means vertical-slash; query-aware rows may end up empty and
    know no upper bound. Query and key lengths must be equal.
    """
    keys, dim = k_BNKD.shape[1:4:2]
    if q_BNHD.shape[1] != keys:
        raise ValueError(f"mode=seed needs as many queries as keys, got {q_BNHD.shape[1]} and {keys}: use mode=default")
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
    return FlexPlan(vertical, slash, query_aware, rows)


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


def jensen_shannon_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural log) over the last dimension."""
    middle = (p + q) / 2
    halves = [torch.special.xlogy(x, x) - torch.special.xlogy(x, middle) for x in (p, q)]
    return ((halves[0] + halves[1]).sum(-1) / 2).clamp(min=0).sqrt()


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
