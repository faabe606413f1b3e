"""A batch of vLLM's in our words.

Requests with one new token go first. What their steps need is the same for all layers, and is computed once, into
tensors with fixed addresses, so that a CUDA graph can replay the steps; nothing there waits for the device. The others,
prompts or parts of them, are read one by one, as the host knows their lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from keysift.ops.crossover import dense_below_bytes
from keysift.ops.rows import part_bounds
from keysift.types import KV, Ctx, Decode, Index
from keysift.vllm_plugin.pages import PageLayout, Pages

SHORTEST = 1024  # tokens; shorter sequences are one kind


class Steps(NamedTuple):
    """Decode steps of some sequences; tensors over them, the same for all layers.

    Attributes:
        table: pages of each sequence, int32 ``[B, P]``.
        start: zeros, int64 ``[B]``.
        length: rows, the new ones included, int64 ``[B]``.
        side_start, side_length: rows that have side data.
        done: the first row whose side data are missing.
        middle_start, middle_length: rows to choose from; none where all are read.
        positions: of the newest token.
        most: no sequence has more rows, as the host knows.
    """

    table: Tensor
    start: Tensor
    length: Tensor
    side_start: Tensor
    side_length: Tensor
    done: Tensor
    middle_start: Tensor
    middle_length: Tensor
    positions: Tensor
    most: int

    def view(self, pages: Pages) -> KV:
        """All rows."""
        return KV(pages.k, pages.v, self.start, self.length, None, self.table, None, self.most)


class StepRows:
    """The rows of decode steps, as ``attention.decode`` asks for them."""

    def __init__(self, pages: Pages, steps: Steps, index: Index) -> None:
        self._kv = steps.view(pages)
        self._middle = self._kv._replace(start=steps.middle_start, length=steps.middle_length)
        self._index = index

    def view(self) -> KV:
        return self._kv

    def middle(self, method: Decode) -> KV:
        return self._middle

    def longest_middle(self, method: Decode) -> int:
        return max(0, self._kv.bound - method.sinks - method.window)

    def most_outside(self, method: Decode) -> int | None:
        return None  # where a middle is empty, all rows

    def index(self, method: Decode, q_BHD: Tensor, ctx: Ctx) -> Index:
        return self._index


@dataclass
class Chunk:
    """A prompt, or a part of one.

    Attributes:
        rows: its tokens in the batch.
        end: tokens of the sequence, these included.
        new: how many these are.
        table, start, length: as in ``KV``, of this sequence.
        done: where its missing side data begin, those of the first page left out, int64 ``[1]``.
        undone: how many rows are missing.
        query_start: 0 and the number of its tokens, int32 ``[2]``.
    """

    rows: slice
    end: int
    new: int
    table: Tensor
    start: Tensor
    length: Tensor
    done: Tensor
    undone: int
    query_start: Tensor

    def view(self, pages: Pages) -> KV:
        """Its rows in a layer's pages."""
        return KV(pages.k, pages.v, self.start, self.length, ((0, self.end),), self.table)


@dataclass
class Filled:
    """First pages that are full with a batch.

    Attributes:
        table: their numbers, int32 ``[n, 1]``.
        sharers: newest tokens of sequences that may begin with one of them: vLLM shares a page as soon as it knows what
            will be in it, and their side data need what is made of that page.
    """

    table: Tensor
    sharers: list[Chunk]


@dataclass
class Batch:
    """What attention is to be computed of.

    Attributes:
        count: sequences with one new token, the first of the batch.
        steps: their steps, and maybe those of more sequences without a token; None if there are none.
        chunks: the others.
        filled: what is full with this batch; None if nothing is, or if it is left to the next batch.
    """

    count: int
    steps: Steps | None
    chunks: list[Chunk]
    filled: Filled | None = None


class Batches:
    """Makes batches for layers whose pages are counted together.

    Attributes:
        most_sequences: that a batch may have.
        in_round_numbers: whether steps are always those of a power of two of sequences, as far as there is room.
        filled: what the last batch has filled, which was of steps alone and may have been a graph; None if nothing.
    """

    def __init__(self, layout: PageLayout, most_sequences: int, device: torch.device) -> None:
        self.layout, self.device, self.most_sequences = layout, device, most_sequences
        self.in_round_numbers = device.type == "cuda"
        self._fixed = torch.zeros(8, most_sequences, dtype=torch.int64, device=device)
        self.filled: Filled | None = None

    def batch(
        self,
        starts: Sequence[int],
        ends: Sequence[int],
        lengths: Tensor,
        table: Tensor,
        longest: int,
        prefilling: Tensor | None = None,
    ) -> Batch:
        """A batch as the host knows it.

        Args:
            starts: rows of the batch at which the sequences begin, and how many there are.
            ends: tokens of each sequence, the new ones included.
            lengths: the same on the device, int32.
            table: pages of each sequence, int32 ``[B, P]``.
            longest: no sequence has more tokens.
            prefilling: which sequences are still in their prompts, bool; None for those with several new tokens.
        """
        new = [b - a for a, b in itertools.pairwise(starts)]
        count = next((i for i, n in enumerate(new) if n > 1), len(new))
        steps = self._padded(lengths[:count], table[:count], longest, prefilling) if count else None
        chunks = [self._chunk(table, i, starts[i], starts[i + 1], ends[i]) for i in range(count, len(new)) if new[i]]
        page = self.layout.page if self.layout.sides else 0
        full = [i for i, (end, n) in enumerate(zip(ends, new, strict=True)) if end - n < page <= end]
        filled = Filled(table[full, :1].clone(), []) if full else None
        if filled is not None and not chunks:
            late = [i for i in range(count) if ends[i] > page and (prefilling is None or prefilling[i])]
            filled.sharers = [self._chunk(table, i, i, i + 1, ends[i]) for i in late]
            self.filled, filled = filled, None
        return Batch(count, steps, chunks, filled)

    def _padded(self, lengths: Tensor, table: Tensor, longest: int, prefilling: Tensor | None) -> Steps:
        """Steps of a round number of sequences, on a GPU: more of no length do not matter, and another number may mean
        other kernels, to be compiled while somebody waits."""
        count = min(self.most_sequences, 1 << (len(lengths) - 1).bit_length()) if self.in_round_numbers else 0
        if (more := count - len(lengths)) > 0:
            prefilling = None if prefilling is None else prefilling[: len(lengths)]
            lengths, table = pad(lengths, (0, more)), pad(table, (0, 0, 0, more))
        return self.steps(lengths, table, longest, prefilling)

    def steps(self, lengths: Tensor, table: Tensor, longest: int, prefilling: Tensor | None = None) -> Steps:
        """Steps of sequences of these lengths, in tensors that the next call overwrites."""
        method, count = self.layout.method, len(lengths)
        start, length, *rest = fixed = self._fixed[:, :count].unbind(0)
        length.copy_(lengths)
        middle_start, middle_length = part_bounds(start, length, length, method.sinks, method.window)
        whole = length < self._dense_below(count)
        if prefilling is not None and bool(prefilling[:count].any()):  # the last token of a prompt, on its own
            still = prefilling[:count].to(whole.device, non_blocking=True)  # of sequences with a token, at least
            whole = whole | pad(still.byte(), (0, count - len(still))).bool()
        sides = part_bounds(start, length, length, method.sinks, 0)
        done = part_bounds(start, length, length, method.sinks, 0, 1)[0]
        values = (*sides, done, middle_start, middle_length.masked_fill(whole, 0), length - 1)
        for kept, value in zip(rest, values, strict=True):
            kept.copy_(value)
        return Steps._make((table, *fixed, longest))

    def _dense_below(self, count: int) -> int:
        """Tokens of a sequence below which all keys are read: where that is faster in a batch of so many, and as long
        as the first page, with what is kept of the sequence, is not full."""
        method, layout = self.layout.method, self.layout
        first = layout.page + 1 if layout.sides else 0
        if method.dense_below is not None:
            return max(first, method.dense_below)
        name = type(method).__module__.rpartition(".")[2]
        return max(first, -(-dense_below_bytes(self.device, name) // (layout.row_bytes * count)))

    def _chunk(self, table: Tensor, i: int, first: int, last: int, end: int) -> Chunk:
        new = last - first
        done = min(max(end - new, self.layout.page, self.layout.method.sinks), end)
        numbers = torch.tensor([0, end, done], dtype=torch.int64).to(self.device, non_blocking=True)
        query_start = torch.tensor([0, new], dtype=torch.int32).to(self.device, non_blocking=True)
        start, length, missing = numbers[:1], numbers[1:2], numbers[2:]
        pages = table[i : i + 1].clone()  # vLLM changes its own; and rows of a table are not all aligned, as this is
        return Chunk(slice(first, last), end, new, pages, start, length, missing, end - done, query_start)


def round_lengths(longest: int) -> Iterator[int]:
    """What kernels are told of the length of sequences that have up to ``longest`` tokens: powers of two, and that."""
    length = SHORTEST
    while length < longest:
        yield length
        length *= 2
    yield longest
