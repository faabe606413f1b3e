"""Kernels are compiled when the server starts, not while the first requests wait.

Triton compiles a kernel when something comes that is unlike what it has seen: another power of two of sequences, of
keys or of new tokens, as kernels are told of here. So attention of a layer is computed of all these kinds, over a page
that vLLM gives to no sequence.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from keysift.vllm_plugin.batch import Batch, Batches, round_lengths
from keysift.vllm_plugin.layer import LayerAttention

MOST_TOKENS = 1 << 23  # of all sequences of a batch here; some methods keep a number a token and query head in a step
Layers = Sequence[tuple[LayerAttention, Tensor, int]]  # one of each kind, its cache, and its query heads
log = logging.getLogger("vllm.keysift")


def warm_up(layers: Layers, batches: Batches, longest: int, most_tokens: int, table: Tensor) -> None:
    """Compile what attention of any batch needs, as far as such a batch fits into memory.

    Args:
        layers: those to compute.
        batches: makes batches for them.
        longest: no sequence has more tokens.
        most_tokens: no batch has more new ones.
        table: pages of any sequences, int32 ``[*, P]``, whose layout those of later batches have.
    """
    started = time.monotonic()
    rows = min(cache.shape[0] * layer.pages(cache).page for layer, cache, _ in layers)
    for new, batch in kinds(batches, rows, longest, most_tokens, table):
        try:
            rehearse(layers, batch, new)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    batches.filled = None
    if table.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # vLLM measures what its graphs take
    log.info("keysift: kernels are ready after %.1f s", time.monotonic() - started)


def rehearse(layers: Layers, batch: Batch, tokens: int) -> None:
    """Compute attention of a batch of so many new tokens, of queries that are 0."""
    for layer, cache, heads in layers:
        q = cache.new_zeros(tokens, heads, layer.layer.dim)
        layer.attend(q, cache, batch, cache.new_empty(tokens, heads, layer.layer.v_dim))


def kinds(batches: Batches, rows: int, longest: int, most_tokens: int, table: Tensor) -> Iterator[tuple[int, Batch]]:
    """A batch of each kind, and how many new tokens it has; ``rows`` is how many the cache has."""
    lengths = [*round_lengths(longest)]
    most = min(batches.most_sequences, most_tokens)
    columns = max(table.shape[1], -(-longest // batches.layout.page))
    pages = table.new_zeros(most, max(table.stride(0), columns))[:, :columns]
    for length, count in itertools.product(lengths, powers(most)):
        if length + count - 1 <= rows and count * length <= MOST_TOKENS or count == 1:  # one may be much the longest
            yield count, _batch(batches, [1] * count, length, length, pages)
    for end in sorted({end for length in lengths for end in (length // 2 + 1, length - 1, length)}):
        for new in powers(min(end, most_tokens)):
            if new > 1:
                yield new, _batch(batches, [new], end, longest, pages)


def powers(most: int) -> Iterator[int]:
    """Powers of two below a number, and that."""
    yield from (1 << i for i in range((most - 1).bit_length()))
    yield most


def _batch(batches: Batches, new: list[int], length: int, longest: int, pages: Tensor) -> Batch:
    """A batch of sequences of one length, which have the first rows of a table."""
    lengths = torch.full((len(new),), length, dtype=torch.int32, device=pages.device)
    return batches.batch([0, *itertools.accumulate(new)], [length] * len(new), lengths, pages[: len(new)], longest)
