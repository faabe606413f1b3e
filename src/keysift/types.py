"""The nouns that every other room speaks in.

Shape letters, used as suffixes where shapes matter:
B sequences, T query tokens, S rows of a key buffer, H query heads, K key/value heads, G = H / K query heads a KV head,
D head dim, N keys of a view, R rows of a selection, Q query blocks of a mask, C key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class KV(NamedTuple):
    """A view of cached keys and values: rows ``start[b] .. start[b] + length[b] - 1`` of sequence ``b``.

    Attributes:
        k: keys, rotated, ``[B, S, K, D]``; any strides, any float dtype. With a table, ``[pages, page, K, D]``.
        v: values, ``[B, S, K, Dv]``, or ``[pages, page, K, Dv]``.
        start: first row of the view, int64 ``[B]``.
        length: rows in the view, int64 ``[B]``; may be 0.
        spans: start and end of every sequence where the host knows them, so that nobody waits for the device to tell.
        table: page of each ``page`` consecutive rows of a sequence, contiguous int32 ``[B, P]``; None where rows lie in
            one piece.
        origin: row of each sequence's first token, from which side data count, int64 ``[B]``; None for row 0.
        most: what the host knows of the largest ``start + length``; None where it knows no more than the spans say.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor
    spans: tuple[tuple[int, int], ...] | None = None
    table: Tensor | None = None
    origin: Tensor | None = None
    most: int | None = None

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> KV:
        """All rows of ``k`` and ``v``."""
        return cls.on(k, v, ((0, k.shape[1]),) * k.shape[0])

    @classmethod
    def on(cls, k: Tensor, v: Tensor, spans: Iterable[tuple[int, int]], table: Tensor | None = None) -> KV:
        """The rows ``start .. end - 1`` of each sequence, as the host knows them."""
        known = tuple(spans)
        start = torch.tensor([s for s, _ in known], dtype=torch.int64)
        end = torch.tensor([e for _, e in known], dtype=torch.int64)
        table = None if table is None else table.contiguous()
        return cls(k, v, _to(start, k.device), _to(end - start, k.device), known, table)

    def known_spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of every sequence; waits for the device where the host does not know them."""
        if self.spans is not None:
            return self.spans
        return tuple(zip(self.start.tolist(), self.end.tolist(), strict=True))

    @property
    def end(self) -> Tensor:
        """One past the last row of the view, int64 ``[B]``."""
        return self.start + self.length

    @property
    def capacity(self) -> int:
        """Rows that a sequence can address."""
        return self.k.shape[1] * (1 if self.table is None else self.table.shape[1])

    @property
    def bound(self) -> int:
        """A row that no view of these sequences reaches past, as far as the host knows; never waits for the device."""
        if self.most is not None:
            return min(self.most, self.capacity)
        return self.capacity if self.spans is None else max((end for _, end in self.spans), default=0)

    @property
    def first(self) -> Tensor:
        """Row of each sequence's first token, int64 ``[B]``."""
        return torch.zeros_like(self.start) if self.origin is None else self.origin

    def locate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where buffer rows (integers ``[B, ...]``) lie: the first two indices into ``k`` and ``v``."""
        rows = rows.long()
        b = torch.arange(rows.shape[0], device=rows.device).view(-1, *(1,) * (rows.dim() - 1))
        if self.table is None:
            return b.expand_as(rows), rows
        page = self.k.shape[1]
        return self.table[b, rows // page].long(), rows % page

    def unpaged(self) -> KV:
        """The same rows in one piece a sequence; copied where they lie in pages."""
        if self.table is None:
            return self
        pages = self.table.long()
        return self._replace(k=self.k[pages].flatten(1, 2), v=self.v[pages].flatten(1, 2), table=None)

    def between(self, start: Tensor, end: Tensor) -> KV:
        """The rows of this view that lie in ``start .. end - 1`` (buffer rows, int64 ``[B]``)."""
        start = torch.maximum(self.start, start)
        length = (torch.minimum(self.end, end) - start).clamp(min=0)
        return self._replace(start=start, length=length, spans=None, most=self.bound)

    def contains(self) -> Tensor:
        """Which buffer rows belong to the view, bool ``[B, S]``."""
        rows = torch.arange(self.capacity, device=self.k.device)
        return (rows >= self.start[:, None]) & (rows < self.end[:, None])

    def only(self, b: int) -> KV:
        """Sequence ``b`` alone, cut to its view: what a batch of one would hold."""
        start, end = self.known_spans()[b]
        if self.table is not None:
            one = KV.on(self.k, self.v, [(start, end)], self.table[b : b + 1])
            return one._replace(origin=None if self.origin is None else self.origin[b : b + 1])
        return KV.of(self.k[b : b + 1, start:end], self.v[b : b + 1, start:end])


class Ctx(NamedTuple):
    """What a method may know besides tensors.

    Attributes:
        layer: index of the decoder layer.
        scale: what q.k is multiplied with before the softmax.
        positions: position of the newest query of each sequence, counted from its first token, int64 ``[B]``.
        seed: with layer, head and position it determines every random draw, so that batching does not change one.
        shared: rows with which all prompts begin alike that share pages, so that side data may depend on these alone;
            None where pages are not shared.
        first_head: number of the first KV head here, where a layer's heads are dealt out to several processes.
    """

    layer: int
    scale: float
    positions: Tensor
    seed: int = 0
    shared: int | None = None
    first_head: int = 0


class BlockMask(NamedTuple):
    """Key blocks that each query block reads, per query head; key blocks count from the first row of the view.

    Two lists: blocks that hold keys later than some of the queries (the diagonal) need a token mask, the others none.

    Attributes:
        partial_count, full_count: entries in use, int32 ``[B, H, Q]``.
        partial_index, full_index: key blocks in ascending order, int32 ``[B, H, Q, *]``; unused
            entries are unspecified.
        block: tokens a block.
        first: block position of query block 0; query and key blocks are aligned, so block ``i`` holds positions
            ``i * block .. (i + 1) * block - 1`` on both sides.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor
    block: int
    first: int

    @classmethod
    def of(cls, active: Tensor, block: int, first: int) -> BlockMask:
        """Lists of the active blocks of ``active`` (bool ``[B, H, Q, C]``); blocks after the diagonal are dropped."""
        diagonal = torch.arange(first, first + active.shape[2], device=active.device)[:, None]
        column = torch.arange(active.shape[3], device=active.device)
        full_count, full_index = _compact(active & (column < diagonal))
        partial_count, partial_index = _compact(active & (column == diagonal))
        return cls(partial_count.int(), partial_index.int(), full_count.int(), full_index.int(), block, first)

    def active(self, num_blocks: int) -> Tensor:
        """The set as bool ``[B, H, Q, num_blocks]``."""
        out = torch.zeros(*self.full_count.shape, num_blocks + 1, dtype=torch.bool, device=self.full_count.device)
        for count, index in ((self.full_count, self.full_index), (self.partial_count, self.partial_index)):
            slot = torch.arange(index.shape[-1], device=index.device)
            out.scatter_(-1, index.long().masked_fill(slot >= count[..., None], num_blocks), True)
        return out[..., :num_blocks]

    def rows(self) -> range:
        """Positions of the query tokens that the mask speaks of (the last block may reach past the last token)."""
        return range(self.first * self.block, (self.first + self.full_count.shape[2]) * self.block)


def _to(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _compact(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Count and ascending indices of the true entries of the last dimension, int64; unused entries are 0."""
    count = chosen.sum(-1)
    index = torch.zeros(*chosen.shape[:-1], int(count.max()) if count.numel() else 0, dtype=torch.int64)
    index = index.to(chosen.device)
    *where, column = chosen.nonzero(as_tuple=True)
    index[(*where, (chosen.cumsum(-1) - 1)[chosen])] = column
    return count, index


class Law(NamedTuple):
    """Importance weights as a function of the angle between the query and the centred key.

    Attributes:
        mean: what keys are centred with, ``[B, K, D]``.
        table: log importance weight, fp32, at cosines evenly spaced from -1 to 1; linear between them.
    """

    mean: Tensor
    table: Tensor

    def log_w(self, q_BHD: Tensor, k_BHRD: Tensor) -> Tensor:
        """Log importance weight of each row, fp32 ``[B, H, R]``; ``q.k - q.mean`` over the product of the norms."""
        mean = self.mean.float().repeat_interleave(q_BHD.shape[1] // self.mean.shape[1], 1)
        centred = k_BHRD.float() - mean[:, :, None]
        cosine = torch.nn.functional.cosine_similarity(q_BHD.float()[:, :, None], centred, dim=-1)
        at = (cosine.clamp(-1, 1) + 1) * ((len(self.table) - 1) / 2)
        left = at.floor().clamp(max=len(self.table) - 2).long()
        low, high = self.table[left], self.table[left + 1]
        return low + (high - low) * (at - left)


class Selection(NamedTuple):
    """Rows that a decode step reads.

    Attributes:
        rows: buffer rows, int64 or int32 ``[B, K, R]`` (one selection a KV head) or ``[B, H, R]`` (one a query head).
        count: entries in use, of the same type, rows without their last dimension; a row appears at most once.
        log_w: log importance weight of each row, 1 / inclusion probability, fp32 like ``rows``; draws with replacement
            are merged into one row with their multiplicity. None means weight 1; a Law computes it from q and k.
    """

    rows: Tensor
    count: Tensor  # type: ignore[assignment]  # the field's own word, though tuple has a method of that name
    log_w: Tensor | Law | None = None

    @classmethod
    def of(cls, chosen: Tensor, log_w: Tensor | Law | None = None) -> Selection:
        """The true rows of ``chosen`` (bool ``[B, K or H, S]``), ascending; a ``log_w`` tensor is shaped like it."""
        count, rows = _compact(chosen)
        return cls(rows, count, log_w.gather(-1, rows) if isinstance(log_w, Tensor) else log_w)

    def in_use(self) -> Tensor:
        """Which entries of ``rows`` count, bool like ``rows``."""
        return torch.arange(self.rows.shape[-1], device=self.rows.device) < self.count[..., None]


class Partial(NamedTuple):
    """Attention over part of the keys: ``exp(lse) * out`` and ``exp(lse)`` add up over disjoint parts.

    Attributes:
        out: normalised output, fp32 ``[B, T, H, Dv]``; zero where there was no key.
        lse: natural log of the sum of weights, fp32 ``[B, T, H]``; -inf where there was no key.
    """

    out: Tensor
    lse: Tensor


class Method(Protocol):
    """What every method has: it is a frozen dataclass, and its config is the method."""

    paper: ClassVar[str]

    @property
    def dense_layers(self) -> tuple[int, ...]: ...


class Prefill(Method, Protocol):
    """Chooses key blocks for the query blocks of a prompt.

    ``plan`` sees a batch whose sequences have one length (ragged batches arrive one by one) and may return None for
    dense. ``mask`` then gives the blocks for some of the query blocks, so that lists never exist for a whole 1M prompt.
    """

    @property
    def block(self) -> int: ...

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Any | None:
        """What ``mask`` needs, from the queries (the last T positions) and all keys; None means dense."""
        ...

    def mask(self, plan: Any, blocks: range) -> BlockMask:
        """The key blocks of the query blocks at positions ``blocks``."""
        ...


class Side(NamedTuple):
    """One kind of data about the keys that a decode method keeps beside them, in their pages.

    Attributes:
        unit: consecutive tokens that share an entry; entries count from a sequence's first token.
        shape: of the entry of one KV head. The tensor is ``[pages, K, ceil(page / unit), *shape]``, where keys are
            ``[pages, page, K, D]``; keys ``[B, S, K, D]`` without a table are pages of S rows.
        dtype: of the tensor.
        fill: what it holds at first.
    """

    unit: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0

    @property
    def token_bytes(self) -> float:
        """Of one token of one KV head."""
        return math.prod(self.shape) * self.dtype.itemsize / self.unit


class State(NamedTuple):
    """One kind of data that a decode method keeps for each sequence: a tensor ``[B, *shape]``, zero at first."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Index = dict[str, Tensor]  # a method's side data, states and constants, by the names that the method gave them


class Decode(Method, Protocol):
    """Chooses the keys that one new query reads.

    ``sinks`` first and ``window`` last keys are read exactly by everyone; a method sees and chooses from the middle. If
    ``grows`` is False the middle ends where it ended when the index was built, and all later keys are read exactly.
    """

    @property
    def sinks(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def tail(self) -> int: ...

    @property
    def grows(self) -> bool: ...

    @property
    def dense_below(self) -> int | None:
        """Keys of a sequence below which dense attention reads them all; None: where that was measured as faster."""
        ...

    @property
    def top_p(self) -> float | None:
        """Share of the selected rows' weight that is enough (Twilight, arXiv:2502.02770); None for all rows."""
        ...

    @property
    def reads_sides_alone(self) -> bool:
        """Whether ``select`` reads side data and no keys, so that the rows may be elsewhere."""
        ...

    def covers(self, keys: int) -> bool:
        """Whether all of a middle of so many keys would be read: dense attention serves it then."""
        ...

    def sides(self, dim: int, dtype: torch.dtype) -> dict[str, Side]:
        """What is kept beside the keys, of a head dim and dtype; empty where there is nothing to keep."""
        ...

    def states(self, kv_heads: int, dim: int, capacity: int) -> dict[str, State]:
        """What is kept once a sequence of at most ``capacity`` rows."""
        ...

    def constants(self, kv_heads: int, dim: int, device: torch.device, ctx: Ctx) -> dict[str, Tensor]:
        """What all sequences share, such as hash directions."""
        ...

    def begin(self, index: Index, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        """Write the states at the end of a prompt, whose rows are ``prompt`` and whose last ``tail`` queries (fewer if
        it was shorter) are ``tail_q``; ``kv`` is the middle."""
        ...

    def extend(self, index: Index, kv: KV, done: Tensor, most: int, ctx: Ctx) -> None:
        """Bring the side data of ``kv`` (all rows but the sinks) up to date: they hold for buffer rows before ``done``
        (int64 ``[B]``), and at most ``most`` rows a sequence are new. Never waits for the device."""
        ...

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection | None:
        """The rows of the middle ``kv`` to read; None means all of them. Never waits for a GPU."""
        ...

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor | int:
        """Bytes of side data and keys that one ``select`` over the middle, for so many query heads, reads to
        choose; ``[B]``, or 0."""
        ...


class Stats(NamedTuple):
    """What a run read. None where it does not apply or was not asked for.

    Attributes:
        density: share of the causal triangle's (query, key) pairs that prefill read, over tokens, heads, layers.
        kept_fraction: share of the cached keys that decode read, over steps, heads, layers.
        mass_covered: attention mass that fell on the keys read, mean over a sample of query rows.
        bytes_per_step: bytes of keys, values and side data that decode read for one token of one sequence, all layers
            together. A row that heads of a group chose one by one counts once for each.
        prefill_error, decode_error: relative error of the attention output, |o - dense| / |dense| on the same queries
            and keys, mean over heads, layers and sequences; norms over all rows of a prefill, or over one decode step.
    """

    density: float | None = None
    kept_fraction: float | None = None
    mass_covered: float | None = None
    bytes_per_step: float | None = None
    prefill_error: float | None = None
    decode_error: float | None = None


def check_seed(seed: object) -> None:
    """Raise ValueError unless ``seed`` can address a random draw."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: must be an integer from 0 to 2**63 - 1")


def one_of(what: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    options = list(choices)
    if value not in options:
        raise ValueError(f"{what}={value}: choose {', '.join(map(str, options[:-1]))} or {options[-1]}")
