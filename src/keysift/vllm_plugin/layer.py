"""Attention of a layer over vLLM's pages, by the methods that serve everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from keysift import attention as path
from keysift.meter import NoMeter
from keysift.methods import dense
from keysift.ops.dense import dense_attention
from keysift.ops.rows import write_at
from keysift.types import KV, Ctx, Decode, Index
from keysift.vllm_plugin.batch import Batch, Chunk, Filled, StepRows, Steps
from keysift.vllm_plugin.options import Options
from keysift.vllm_plugin.pages import PageLayout, Pages

DENSE = dense.Method()


@dataclass(frozen=True)
class Layer:
    """What distinguishes a layer's attention.

    Attributes:
        number: of the layer in the model, whichever process has it.
        kv_heads, dim, v_dim: in this process.
        scale: factor on q.k.
        window: tokens of a sliding window of its own; None if it has none.
        first_head: number of its first KV head in the model.
    """

    number: int
    kv_heads: int
    dim: int
    v_dim: int
    scale: float
    window: int | None = None
    first_head: int = 0


class LayerAttention:
    """Attention of a layer.

    Attributes:
        prefill: method that reads prompts.
        method: method that reads the keys of decode steps.
    """

    def __init__(
        self,
        layer: Layer,
        options: Options,
        flash: Callable[..., Any] | None = None,
        views: Callable[[Tensor], Pages] | None = None,
    ) -> None:
        """``flash`` is vLLM's FlashAttention, for dense prefill; ``views`` tells keys and values in a cache whose pages
        are laid out otherwise than ``PageLayout`` says."""
        self.layer, self.prefill, self.seed = layer, options.prefill, options.seed
        self.method: Decode = method_of(options, layer.window)
        # in steps the middle of a sequence is empty where all its keys are to be read
        self._always: Any = self.method if self.method == DENSE else dataclasses.replace(self.method, dense_below=0)  # type: ignore[type-var]
        self._flash, self._views = flash, views
        self._layout: PageLayout | None = None
        self._constants: Index = {}

    # ---- the cache --------------------------------------------------------------------------------------------------

    def pages(self, cache: Tensor) -> Pages:
        """Views of the layer's cache; made anew each time, for vLLM has caches that it wants to let go."""
        if self._layout is None or (self._layout.page, self._layout.dtype) != (cache.shape[2], cache.dtype):
            layer = self.layer
            layout = PageLayout(cache.shape[2], layer.kv_heads, layer.dim, layer.v_dim, cache.dtype, self.method)
            ctx = self._ctx(torch.zeros(1, dtype=torch.int64), layout.page)
            self._constants = self.method.constants(layer.kv_heads, layer.dim, cache.device, ctx)
            self._layout = layout
        return (self._views or self._layout.pages)(cache)

    def write(self, cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write the keys and values of a batch, ``[T, K, *]``, to their places; -1 is none."""
        if cache.numel():
            pages = self.pages(cache)
            write_at(pages.k, pages.v, key, value, slots)

    def complete(self, cache: Tensor, filled: Filled) -> None:
        """Make what is kept of sequences, and side data of the keys, of first pages that are full."""
        pages, method, table = self.pages(cache), self.method, filled.table
        if not self._keeps(pages):
            return
        page = pages.page
        kv = KV.on(pages.k, pages.v, [(0, page)] * len(table), table)
        states = {name: x.new_zeros(len(table), *x.shape[1:]) for name, x in pages.states.items()}
        index, ctx = pages.sides | states | self._constants, self._ctx(kv.length - 1, page)
        method.begin(index, kv, kv, kv.k[:0], ctx)
        for name, x in states.items():
            pages.states[name][table[:, 0].long()] = x
        first = min(method.sinks, page)
        rows = kv.between(kv.start + first, kv.end)
        method.extend(index, rows, rows.start, page - first, ctx)
        for chunk in filled.sharers:
            self._keep(pages, chunk)

    def _keeps(self, pages: Pages) -> bool:
        return bool(pages.sides) and not self.reads_all

    @property
    def reads_all(self) -> bool:
        """Whether steps read all keys in this layer, however many."""
        return self.method == DENSE or self.layer.number in self.method.dense_layers

    def _index(self, pages: Pages, table: Tensor) -> Index:
        """What the method keeps, of sequences with these pages."""
        first = table[:, 0]
        return pages.sides | {name: x.index_select(0, first) for name, x in pages.states.items()} | self._constants

    def _ctx(self, positions: Tensor, page: int) -> Ctx:
        return Ctx(self.layer.number, self.layer.scale, positions, self.seed, page, self.layer.first_head)

    # ---- attention --------------------------------------------------------------------------------------------------

    def attend(self, q_THD: Tensor, cache: Tensor, batch: Batch, out_THD: Tensor) -> None:
        """Attention of a batch whose keys are in the cache."""
        pages = self.pages(cache)
        if batch.filled is not None:
            self.complete(cache, batch.filled)
        if batch.steps is not None:
            count = len(batch.steps.length)  # a round number of sequences, maybe of more than there are queries
            q = q_THD[:count] if count <= len(q_THD) else pad(q_THD, (0, 0, 0, 0, 0, count - len(q_THD)))
            out_THD[: batch.count] = self._step(q, pages, batch.steps)[: batch.count]
        for chunk in batch.chunks:
            self._keep(pages, chunk)
            out_THD[chunk.rows] = self._read(q_THD[None, chunk.rows], pages, chunk)[0]

    def _step(self, q: Tensor, pages: Pages, steps: Steps) -> Tensor:
        """Attention of one new token of each sequence."""
        kv, ctx, method = steps.view(pages), self._ctx(steps.positions, pages.page), self._always
        if self.reads_all:
            return dense_attention(q[:, None], kv, self.layer.scale, self.layer.window)[:, 0]
        index = self._index(pages, steps.table)
        if pages.sides:
            rows = kv._replace(start=steps.side_start, length=steps.side_length)
            method.extend(index, rows, steps.done, 1, ctx)
        return path.decode(q, StepRows(pages, steps, index), method, ctx, None)[0]

    def _read(self, q: Tensor, pages: Pages, chunk: Chunk) -> Tensor:
        """Attention of a prompt, or a part of one; a single token, which may be a step's, reads all keys."""
        kv = chunk.view(pages)
        ctx = self._ctx(kv.length - 1, pages.page)
        flash = None if self._flash is None or q.dtype == torch.float32 else partial(self._by_flash, chunk)
        method = DENSE if chunk.new == 1 else self.prefill
        return path.prefill(q, kv, method, ctx, NoMeter(), window=self.layer.window, dense=flash)[0]

    def _keep(self, pages: Pages, chunk: Chunk) -> None:
        """Make side data of the keys of a chunk, but those of the first page."""
        if self._keeps(pages) and chunk.undone:
            kv = chunk.view(pages)
            rows, ctx = kv.between(kv.start + self.method.sinks, kv.end), self._ctx(kv.length - 1, pages.page)
            self.method.extend(self._index(pages, chunk.table), rows, chunk.done, chunk.undone, ctx)

    def _by_flash(self, chunk: Chunk, q: Tensor, kv: KV, scale: float, window: int | None) -> Tensor:
        """Dense attention of a chunk by vLLM's kernel."""
        assert self._flash is not None
        out = self._flash(
            q=q[0],
            k=kv.k,
            v=kv.v,
            cu_seqlens_q=chunk.query_start,
            max_seqlen_q=chunk.new,
            seqused_k=kv.length.int(),
            max_seqlen_k=chunk.end,
            softmax_scale=scale,
            causal=True,
            window_size=[-1, -1] if window is None else [window - 1, 0],
            block_table=chunk.table,
        )
        return out[None]


def method_of(options: Options, window: int | None) -> Decode:
    """The decode method of a layer: one with a window of its own stays dense in it."""
    return DENSE if window is not None else options.decode
