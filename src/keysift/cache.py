"""The store: keys and values of one layer, preallocated, with the side data of the decode method that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from keysift.types import KV, Ctx, Decode

ROOM = 256  # rows are allocated in multiples of this


class Store:
    """Keys and values of one layer for a batch of sequences that end at the same row.

    Rows before ``start[b]`` are padding. ``prompt`` is the number of rows that prefill has written; later rows came
    from decode steps. Side data is built at the first decode step after a prefill, so a prompt may come in any chunks.
    """

    def __init__(self) -> None:
        self._k: Tensor | None = None  # [B, K, capacity, D], the layout of Hugging Face caches
        self._v: Tensor | None = None
        self.start: Tensor | None = None
        self.length = 0
        self.prompt = 0
        self._tail: Tensor | None = None  # last queries of the prompt, [B, T, H, D]
        self._index: Any = None
        self._built_by: tuple[Decode, int] | None = None  # method and seed the index belongs to
        self._indexed: Tensor | None = None  # side data hold up to this row, [B]

    @property
    def keys(self) -> Tensor | None:
        """``[B, K, length, D]``, a view."""
        return None if self._k is None else self._k[:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        """``[B, K, length, Dv]``, a view."""
        return None if self._v is None else self._v[:, :, : self.length]

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        """Add T rows to every sequence."""
        end = self.length + k_BKTD.shape[2]
        if self._k is None or self._v is None:
            with _ordinary_tensors():
                self.start = torch.zeros(k_BKTD.shape[0], dtype=torch.int64, device=k_BKTD.device)
        elif k_BKTD.shape[0] != self._k.shape[0]:
            raise ValueError(f"batch of {k_BKTD.shape[0]} for a cache of {self._k.shape[0]} sequences")
        self._k = _with_room(self._k, k_BKTD, self.length, end)
        self._v = _with_room(self._v, v_BKTD, self.length, end)
        self._k[:, :, self.length : end] = k_BKTD
        self._v[:, :, self.length : end] = v_BKTD
        self.length = end

    def view(self) -> KV:
        """All rows but the padding."""
        if self._k is None or self._v is None or self.start is None:
            raise AssertionError("empty store")
        return KV(self._k.transpose(1, 2), self._v.transpose(1, 2), self.start, self.length - self.start)

    def end_prefill(self, q_BTHD: Tensor, tail: int) -> None:
        """Note that the rows so far are prompt, and keep its last ``tail`` queries."""
        follows = self._tail is not None and self.prompt == self.length - q_BTHD.shape[1]
        newest = q_BTHD[:, max(0, q_BTHD.shape[1] - tail) :]
        if self._tail is not None and follows:
            newest = torch.cat([self._tail, newest], 1)[:, -tail:] if tail else newest
        self._tail = newest.clone() if tail else None  # a view would keep all queries of the prompt alive
        self.prompt = self.length
        self._built_by = None

    def middle(self, method: Decode) -> KV:
        """The rows that ``method`` may choose from: all but its sinks and its window."""
        kv = self.view()
        if not self.prompt:  # rows that came by other ways than prefill: all but the newest are prompt
            self.prompt = self.length - 1
        last = self.length if method.grows else self.prompt
        return kv.between(kv.start + method.sinks, torch.full_like(kv.start, last - method.window))

    def index(self, method: Decode, middle: KV, q_BHD: Tensor, ctx: Ctx) -> Any:
        """Side data of ``method`` for the middle, built or extended as needed.

        Where the prompt's last queries are not known (another attention read it, or it was cut), the query at hand
        stands in for them.
        """
        with _ordinary_tensors():
            return self._index_of(method, middle, q_BHD, ctx)

    def _index_of(self, method: Decode, middle: KV, q_BHD: Tensor, ctx: Ctx) -> Any:
        if self._built_by != (method, ctx.seed):
            kv = self.view()
            prompt = kv.between(kv.start, torch.full_like(kv.start, self.prompt))
            tail = q_BHD[:, None] if self._tail is None else self._tail
            self._index, self._built_by = method.build(middle, prompt, tail, ctx), (method, ctx.seed)
        elif method.grows and self._indexed is not None and bool((middle.end != self._indexed).any()):
            self._index = method.append(self._index, middle, torch.minimum(self._indexed, middle.end), ctx)
        self._indexed = middle.end
        return self._index

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on; they are overwritten by the next append."""
        self.length = min(self.length, length)
        if self.length < self.prompt:
            self.prompt, self._built_by, self._tail = self.length, None, None
        if self._indexed is not None:
            self._indexed = self._indexed.clamp(max=self.length)

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat sequences: sequence ``i`` becomes what ``rows[i]`` was (int64 ``[B']``)."""
        if self._k is None:
            return
        with _ordinary_tensors():
            self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to everything that has one entry a sequence."""
        for name in ("_k", "_v", "start", "_tail", "_indexed"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, change(x))
        if self._index is not None:
            self._index = type(self._index)(*(change(x) if isinstance(x, Tensor) else x for x in self._index))


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """What is made within may be written to later, in inference mode or out of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _with_room(buffer: Tensor | None, like: Tensor, used: int, needed: int) -> Tensor:
    """``buffer`` with capacity for ``needed`` rows: itself, or a copy with a quarter to spare."""
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    capacity = -(-max(needed + 1, used + used // 4) // ROOM) * ROOM
    with _ordinary_tensors():
        larger = torch.empty(*like.shape[:2], capacity, like.shape[3], dtype=like.dtype, device=like.device)
    if buffer is not None:
        larger[:, :, :used] = buffer[:, :, :used]
    return larger
