"""Our search for the key blocks that a prompt reads: FlexPrefill (arXiv:2502.20766) with a gamma that is kept.

The authors judge all rows of a head by its last block of queries and count gamma in tokens. Here a few query rows of
every block are attended to exactly and summed by key block. The blocks with the most mass are kept, down to one
threshold a head. The threshold is the highest at which rows that had no say in the choice are covered to gamma: each
half of the sampled rows chooses for the other half, or, where one row a strip is all that time allows, its neighbours
choose for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops import attention_cpu
from keysift.ops.dense import keys_values
from keysift.ops.lists import block_lists, on_gpu
from keysift.ops.vertical_slash import block_sum
from keysift.types import KV, BlockMask, one_of

ROWS = 4096  # query rows that are looked at, about
FULL_KEYS = 1 << 15  # with more keys fewer rows are looked at, so that rows times keys stay the same
MOST_ROWS = 32  # of one block
ROWS_AT_ONCE = 128  # in the reference, whose scores then stay in the cache
MOST_STRIPS = 768  # beyond, strips get wider than a block
MOST_STRIPS_OF_LONG = 576  # ... where there are more keys than LONG
LONG = 1 << 19
LAST_ROWS = 32
STRIKING = 1 / 16  # a block that gets so much of the attention of one of the last rows is kept for all rows ...
STRIKING_BLOCKS = 3  # ... if it is also so many times what a block gets on average
NEAR = 64  # blocks from the diagonal within which distance says as much as the column does
NEIGHBOURS = 0.5  # the strips before and behind count together as so many rows of one's own
OCTAVES = 16  # thresholds go down so far from 1, in eighths
ROW_SLACK = 0.05  # a row of blocks may be covered by so much less than gamma, where others are covered by more
FIRST_OF_NONE = 1e-30  # of blocks without mass the latest come first
COARSE_BITS = 16  # a row's own cutoff is rounded down to so many bits less than a float has
CALIBRATING_ROWS = 256  # strips are passed over where more rows or halves of strips than these would be held out


RowMass = Callable[[Tensor, Tensor, float, "Sampling", Tensor], Tensor]


class Sampling(NamedTuple):
    """Which query rows are looked at: ``per`` rows of every strip of so many tokens.

    Attributes:
        first: position of the first query.
        keys: number of keys; the last query's position plus one.
        block: tokens a block.
        strip: tokens a strip: a block or, in quarters of one, more; aligned to position 0.
        per: rows a strip, a power of two; 1 where a strip is wider than a block.
    """

    first: int
    keys: int
    block: int
    strip: int
    per: int

    @classmethod
    def of(cls, tokens: int, keys: int, block: int, rows: int | None = None) -> Sampling:
        """About ``rows`` (default ``ROWS``) rows, fewer where keys are many: down to one a strip."""
        first, strip = keys - tokens, block
        most = MOST_STRIPS if keys <= LONG else MOST_STRIPS_OF_LONG
        while -(-keys // strip) - first // strip > most:
            strip += block // 4
        strips = -(-keys // strip) - first // strip
        rows = ROWS if rows is None else rows
        rows = min(rows, rows * FULL_KEYS // keys)
        return cls(first, keys, block, strip, min(MOST_ROWS, _power_of_two(rows // strips)) if strip == block else 1)

    @property
    def strips(self) -> range:
        """Absolute numbers of the strips that hold queries."""
        return range(self.first // self.strip, -(-self.keys // self.strip))

    @property
    def blocks(self) -> int:
        return -(-self.keys // self.block)

    @property
    def stride(self) -> int:
        """Every how many strips the threshold is calibrated on."""
        return max(1, len(self.strips) * min(self.per, 2) // CALIBRATING_ROWS)

    @property
    def striking(self) -> float:
        """Share of a last row's attention from which on a block is kept for all rows."""
        return max(STRIKING, STRIKING_BLOCKS / self.blocks)

    @property
    def tail(self) -> int:
        """The last rows are all looked at, so many of them: in a prompt they ask the question."""
        return min(LAST_ROWS, self.keys - self.first)

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the sampled rows, evenly spread over a strip's queries with a fixed jitter, ``[S, per]``."""
        strip = torch.arange(self.strips.start, self.strips.stop, device=device)[:, None]
        sample = torch.arange(self.per, device=device)
        lo, hi = (strip * self.strip).clamp(min=self.first), ((strip + 1) * self.strip).clamp(max=self.keys)
        jitter = ((strip * self.per + sample) * 2654435761 & 0xFFFFFFFF) >> 16
        return lo + (sample * 65536 + jitter) * (hi - lo) // (self.per * 65536)

    def row_blocks(self, device: torch.device) -> Tensor:
        """Block of each strip's last sampled row, ``[S]``."""
        return self.positions(device)[:, -1] // self.block

    def strip_of(self, block: Tensor) -> Tensor:
        """Strip in which the middle of each query block lies, counted from the first that holds queries."""
        middle = (block * self.block + self.block // 2).clamp(self.first, self.keys - 1)
        return middle // self.strip - self.strips.start


def _power_of_two(n: int) -> int:
    """The largest power of two up to ``n``, at least 1."""
    return 1 << max(0, n.bit_length() - 1)


class FlexPlan(NamedTuple):
    """The search's result, from which the blocks of any row follow.

    Attributes:
        mass: share of attention by key block, mean over a strip's sampled rows, fp32 ``[B, H, S, C]``; unspecified
            after the block of the rows.
        last: largest share that one of the last rows gives to each key block, fp32 ``[B, H, C]``.
        threshold: estimated mass from which on a block is kept, fp32 ``[B, H]``; 0 keeps all.
        sampling: which rows were looked at.
        gamma: share of attention mass to cover.
        least, most: bounds on the blocks that a row of blocks reads.
        backend: "triton" or "reference".
    """

    mass: Tensor
    last: Tensor
    threshold: Tensor
    sampling: Sampling
    gamma: float
    least: int
    most: int | None
    backend: str

    def active(self, blocks: range) -> Tensor:
        """The blocks of the query blocks at positions ``blocks``, bool ``[B, H, len(blocks), C]`` (reference)."""
        index = torch.arange(blocks.start, blocks.stop, device=self.mass.device)
        strip = self.sampling.strip_of(index)
        estimate = _estimate(self.mass, self.mass, self.sampling.per, self.sampling, strip, index)
        column = torch.arange(estimate.shape[-1], device=self.mass.device)
        diagonal, before = column == index[:, None], column < index[:, None]
        score = (estimate + FIRST_OF_NONE * (column + 1)) * (before | diagonal)
        striking = (self.last >= self.sampling.striking)[:, :, None] & before
        score = torch.where(striking, 1 + self.last[:, :, None], score).masked_fill(diagonal, torch.inf)
        ordered, order = score.sort(dim=-1, descending=True, stable=True)
        share = estimate.gather(-1, order) * (ordered > 0)
        short = (share.cumsum(-1) - share) < (self.gamma - ROW_SLACK) * share.sum(-1, keepdim=True)
        rank = column.expand_as(ordered)
        needed = ordered.masked_fill(~(short | (rank < self.least)) | (ordered <= 0), torch.inf).amin(-1, keepdim=True)
        coarse = (needed.view(torch.int32) >> COARSE_BITS << COARSE_BITS).view(torch.float32)
        cutoff = self.threshold[..., None, None]
        kept = ordered >= torch.where(needed < cutoff, coarse, cutoff)
        if self.most is not None:
            kept &= rank < self.most
        return torch.zeros_like(kept).scatter_(-1, order, kept & (ordered > 0))

    def lists(self, blocks: range) -> BlockMask:
        """The same as lists."""
        if self.backend == "triton":
            from keysift.ops.flex_lists_triton import chosen_lists

            with torch.cuda.device_of(self.mass):  # kernels start on the current device
                return chosen_lists(self, blocks)
        return block_lists(self.active(blocks), self.sampling.block, blocks.start)


def flex_search(
    q_BTHD: Tensor,
    kv: KV,
    scale: float,
    gamma: float,
    least: int,
    most: int | None,
    block: int,
    rows: int | None = None,
    backend: str = "auto",
) -> FlexPlan:
    """Find out where the attention of the last T positions goes, from a few exact rows of every block of queries.

    Args:
        q_BTHD: queries of the last T positions, any float dtype.
        kv: keys of all N positions, one length for all sequences; values are not read.
        scale: factor on q.k.
        gamma: share of attention mass to cover, mean over a head's query rows; no row of blocks is covered to less than
            gamma - 0.05 of its estimate, unless ``most`` cuts it.
        least, most: bounds on the blocks that a row of blocks reads; the diagonal block is always among them.
        block: tokens a block.
        rows: query rows to look at, about, by default ``ROWS``; fewer with more than 32K keys.
        backend: "triton", "cpu", "reference", or "auto": Triton where it is installed and takes the case, on a CPU its
            kernel where that was built.

    Raises:
        ValueError: no such backend.
    """
    one_of("backend", backend, ("auto", "triton", "cpu", "reference"))
    sampling = Sampling.of(q_BTHD.shape[1], _keys(kv), block, rows)
    if backend == "triton" or backend == "auto" and _triton_takes(q_BTHD):
        from keysift.ops.flex_search_triton import search

        with torch.cuda.device_of(q_BTHD):  # kernels start on the current device
            mass, last, threshold = search(q_BTHD, kv, scale, gamma, sampling)
        return FlexPlan(mass, last, threshold, sampling, gamma, least, most, "triton")
    by_kernel = backend in ("auto", "cpu") and attention_cpu.takes(q_BTHD, kv)
    if backend == "cpu" and not by_kernel:
        raise ValueError("backend=cpu: needs tensors on a CPU, in a dtype of its kernels, and those built")
    of_rows = _row_mass_cpu if by_kernel else row_mass_reference
    mass, last, threshold = flex_search_reference(q_BTHD, kv, scale, gamma, sampling, of_rows)
    return FlexPlan(mass, last, threshold, sampling, gamma, least, most, "reference")


def flex_search_reference(
    q_BTHD: Tensor, kv: KV, scale: float, gamma: float, sampling: Sampling, row_mass: RowMass | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass by strip and key block, that of the last rows, and each head's threshold, in fp32 (see ``FlexPlan``)."""
    k, row_mass = keys_values(kv)[0], row_mass or row_mass_reference
    rows = row_mass(q_BTHD, k, scale, sampling, sampling.positions(k.device))
    tail = torch.arange(sampling.keys - sampling.tail, sampling.keys, device=k.device)
    last = row_mass(q_BTHD, k, scale, sampling, tail[:, None]).amax((2, 3))
    mass, striking = rows.mean(3), last >= sampling.striking
    picked = torch.arange(0, mass.shape[2], sampling.stride, device=mass.device)
    at = sampling.row_blocks(mass.device)[picked]
    if sampling.per == 1:
        chosen_by = _estimate(mass, mass, 0, sampling, picked, at)
        return mass, last, _threshold(chosen_by, mass[:, :, picked], at, striking, gamma)
    halves = rows[:, :, :, 0::2].mean(3), rows[:, :, :, 1::2].mean(3)
    thresholds = [
        _threshold(
            _estimate(mass, a, sampling.per // 2, sampling, picked, at),
            b[:, :, picked],
            at,
            striking,
            gamma,
        )
        for a, b in (halves, halves[::-1])
    ]
    return mass, last, torch.minimum(*thresholds)


def _row_mass_cpu(q_BTHD: Tensor, k_BNKD: Tensor, scale: float, sampling: Sampling, position: Tensor) -> Tensor:
    from keysift.ops import flex_search_cpu

    mass = flex_search_cpu.row_mass(q_BTHD, k_BNKD, scale, sampling.block, position.flatten())
    return mass.unflatten(2, position.shape)


def row_mass_reference(q_BTHD: Tensor, k_BNKD: Tensor, scale: float, sampling: Sampling, position: Tensor) -> Tensor:
    """Exact share of attention by key block of the rows at ``position`` (``[S, per]``), ``[B, H, S, per, C]``."""
    batch, heads = q_BTHD.shape[0], q_BTHD.shape[2]
    mass = k_BNKD.new_zeros(batch, heads, position.numel(), sampling.blocks, dtype=torch.float32)
    for first, rows in enumerate(position.flatten().split(ROWS_AT_ONCE)):
        keys = int(rows.max()) + 1
        later = torch.arange(keys, device=rows.device) > rows[:, None]
        at = slice(first * ROWS_AT_ONCE, first * ROWS_AT_ONCE + len(rows))
        for h in range(heads):
            k = k_BNKD[:, :keys, h // (heads // k_BNKD.shape[2])].float()
            score = q_BTHD[:, rows - sampling.first, h].float() @ k.mT * scale
            share = block_sum(score.masked_fill_(later, -torch.inf).softmax(-1), sampling.block)
            mass[:, h, at, : share.shape[-1]] = share
    return mass.unflatten(2, position.shape)


def _estimate(mass: Tensor, own: Tensor, rows: int, sampling: Sampling, strip: Tensor, block: Tensor) -> Tensor:
    """Mass of the query blocks ``block``, which lie in the strips ``strip``, ``[B, H, len(block), C]``.

    ``own`` is what ``rows`` rows of the strip itself saw; the strips beside it count together as ``NEIGHBOURS`` rows.
    """
    at = sampling.row_blocks(mass.device)
    beside = torch.zeros_like(mass[:, :, strip])
    number = torch.zeros_like(strip)
    for step in (-1, 1):
        there = strip + step
        exists = (there >= 0) & (there < mass.shape[2])
        there = there.clamp(0, mass.shape[2] - 1)
        beside += _seen_from(mass[:, :, there], at[there], block) * exists[:, None]
        number += exists
    itself = _seen_from(own[:, :, strip], at[strip], block)
    if mass.shape[2] == 1:
        return itself
    return (rows * itself + NEIGHBOURS * beside / number[:, None]) / (rows + NEIGHBOURS)


def _seen_from(row: Tensor, at: Tensor, block: Tensor) -> Tensor:
    """What rows of the blocks ``at`` say of those of ``block``: by column and, near the diagonal, by distance to it."""
    column = torch.arange(row.shape[-1], device=row.device)
    known = row * (column <= at[:, None])
    moved = column - (block - at)[:, None]
    shifted = known.gather(-1, moved.clamp(0, row.shape[-1] - 1).expand_as(known)) * (
        (moved >= 0) & (moved < row.shape[-1])
    )
    return torch.where(column > (block - NEAR)[:, None], (known + shifted) / 2, known)


def _threshold(estimate: Tensor, held_out: Tensor, block: Tensor, striking: Tensor, gamma: float) -> Tensor:
    """The highest threshold on ``estimate`` at which ``held_out`` rows are covered to gamma, ``[B, H]``."""
    column = torch.arange(estimate.shape[-1], device=estimate.device)
    striking = striking[:, :, None] & (column < block[:, None])
    always = (held_out * (striking | (column == block[:, None]))).sum(-1).mean(-1)
    candidate = held_out * (~striking & (column < block[:, None]))
    result = torch.zeros_like(always)
    for k in reversed(range(8 * OCTAVES + 1)):
        threshold = 2.0 ** (-k / 8)
        covered = always + (candidate * (estimate >= threshold)).sum(-1).mean(-1)
        result = torch.where(covered >= gamma, threshold, result)
    return result


def _keys(kv: KV) -> int:
    spans = {end - start for start, end in kv.known_spans()}
    assert len(spans) == 1, "ragged view"
    return spans.pop()


def _triton_takes(q_BTHD: Tensor) -> bool:
    """Whether there is Triton, a device new enough, and room for a tile of keys in its shared memory."""
    if not on_gpu(q_BTHD) or q_BTHD.shape[-1] * q_BTHD.element_size() > 512:
        return False
    return torch.cuda.get_device_capability(q_BTHD.device) >= (8, 0)
