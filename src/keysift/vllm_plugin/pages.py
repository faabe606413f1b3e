"""What lies in a page of vLLM's cache: keys, values, what a method keeps beside them, and of a sequence's first page
what the method keeps of the sequence.

What a sequence's states are made of must be shared by all sequences that share its pages, so it is its first page
alone; they lie there, and come along wherever the page is shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from keysift.types import Decode, Index, Side, State

ALIGNED = 256  # bytes


class Pages(NamedTuple):
    """Views of a layer's cache.

    Attributes:
        k, v: ``[pages, page, K, D]`` and ``[pages, page, K, Dv]``.
        sides: a method's side data, by name, as ``types.Side`` says.
        states: a method's states, ``[pages, *shape]``, of which the first page of a sequence has the sequence's.
    """

    k: Tensor
    v: Tensor
    sides: Index
    states: Index

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[1]


@dataclass(frozen=True)
class PageLayout:
    """Where things lie in a page, one behind the other: keys, values, side data, states.

    Attributes:
        page: tokens.
        kv_heads, dim, v_dim: of the layer, in this process.
        dtype: of keys and values.
        method: that keeps something beside keys; dense keeps nothing.
    """

    page: int
    kv_heads: int
    dim: int
    v_dim: int
    dtype: torch.dtype
    method: Decode

    @property
    def row_bytes(self) -> int:
        """Of a token's key and value."""
        return self.kv_heads * (self.dim + self.v_dim) * self.dtype.itemsize

    @property
    def sides(self) -> dict[str, Side]:
        return self.method.sides(self.dim, self.dtype)

    @property
    def states(self) -> dict[str, State]:
        return self.method.states(self.kv_heads, self.dim, self.page)

    def _entries(self, side: Side) -> tuple[int, ...]:
        return (self.kv_heads, -(-self.page // side.unit), *side.shape)

    @cached_property
    def parts(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """Offset in bytes, shape and dtype of everything in a page, by name."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "k": ((self.page, self.kv_heads, self.dim), self.dtype),
            "v": ((self.page, self.kv_heads, self.v_dim), self.dtype),
            **{name: (self._entries(side), side.dtype) for name, side in self.sides.items()},
            **{name: (state.shape, state.dtype) for name, state in self.states.items()},
        }
        parts, offset = {}, 0
        for name, (shape, dtype) in shapes.items():
            parts[name] = (offset, shape, dtype)
            offset = round_up(offset + math.prod(shape) * dtype.itemsize, ALIGNED)
        return parts

    @cached_property
    def bytes(self) -> int:
        """Of a page, all heads; kernels count from page to page in what one head has of side data."""
        of_heads = (math.prod(self._entries(side)[1:]) * side.dtype.itemsize for side in self.sides.values())
        offset, shape, dtype = [*self.parts.values()][-1]
        return round_up(offset + math.prod(shape) * dtype.itemsize, math.lcm(ALIGNED, *of_heads))

    def pages(self, cache: Tensor) -> Pages:
        """Views of a cache whose first dimension counts pages; each must be one piece of at least so many bytes."""
        distance = cache.stride(0)
        assert distance * cache.element_size() >= self.bytes, "pages of vLLM's cache are smaller than was asked for"
        elements = self.bytes // cache.element_size()
        raw = torch.as_strided(cache, (cache.shape[0], elements), (distance, 1)).view(torch.uint8)
        views = {}
        for name, (offset, shape, dtype) in self.parts.items():
            piece = raw[:, offset : offset + math.prod(shape) * dtype.itemsize].view(dtype)
            views[name] = piece.unflatten(1, shape)
        sides, states = ({name: views[name] for name in kinds} for kinds in (self.sides, self.states))
        return Pages(views["k"], views["v"], sides, states)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
