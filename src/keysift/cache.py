"""The store: one layer's keys and values, with the side data of the decode method that reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from keysift.ops.cpu.memory import in_large_pages
from keysift.ops.rows import write_rows
from keysift.slots import Slots, ordinary_tensors
from keysift.types import KV, Ctx, Decode, Index, Side, State

ROOM = 256  # sequences in one piece get room for rows in multiples of this


class Store:
    """One layer's keys, values and side data.

    With slots of its own, made by the first ``append``, all sequences end at the same row and lie in one piece, which
    grows: what a Hugging Face cache is. ``in_pages`` makes one for slots that several layers share.
    """

    def __init__(self) -> None:
        self.slots: Slots | None = None
        self.k: Tensor | None = None  # [pages, page, K, D]
        self.v: Tensor | None = None
        self._tail: Tensor | None = None  # last queries of the prompt, [B, T, H, D]
        self._index: Index = {}
        self._kinds: dict[str, Side | State | None] = {}
        self._built_by: tuple[Decode, int] | None = None  # method and seed the index belongs to
        self._seen: list[int] = []  # slots.appended when side data were brought up to date

    @classmethod
    def in_pages(cls, slots: Slots, kv_heads: int, dim: int, v_dim: int, dtype: torch.dtype) -> Store:
        """Buffers for one layer, in the pages of ``slots``."""
        self = cls()
        self.slots = slots
        with ordinary_tensors():
            shape = (slots.pages, slots.page, kv_heads)
            self.k, self.v = (
                in_large_pages(torch.empty(*shape, d, dtype=dtype, device=slots.device)).zero_() for d in (dim, v_dim)
            )
        self._seen = [0] * len(slots)
        slots.stores.append(self)
        return self

    # ---- rows -------------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Rows of the longest sequence, as the host knows."""
        return max(self.slots.lengths) if self.slots else 0

    @property
    def prompt(self) -> int:
        """Rows of the longest prompt."""
        return max(self.slots.prompts) if self.slots else 0

    @property
    def keys(self) -> Tensor | None:
        """Of sequences in one piece: ``[B, K, length, D]``, a view."""
        return None if self.k is None else self.k[:, : self.length].transpose(1, 2)

    @property
    def values(self) -> Tensor | None:
        """``[B, K, length, Dv]``, a view."""
        return None if self.v is None else self.v[:, : self.length].transpose(1, 2)

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        """Add T rows to every sequence of slots of our own."""
        batch, _, tokens, _ = k_BKTD.shape
        if self.slots is None or self.k is None:
            self._start(k_BKTD, v_BKTD)
        elif batch != len(self.slots):
            raise ValueError(f"batch of {batch} for a cache of {len(self.slots)} sequences")
        assert self.slots is not None and self.k is not None and self.v is not None
        if self.length + tokens > self.slots.page:
            self._grow(rows_with_room(self.length, self.length + tokens))
        self.slots.append(tokens)
        self.put(k_BKTD.transpose(1, 2), v_BKTD.transpose(1, 2))

    def put(self, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Fill the last T rows of sequences in one piece, which ``Slots.append`` has counted, as the host knows."""
        _, k, v = self._made()
        rows = slice(self.length - k_BTKD.shape[1], self.length)
        k[:, rows], v[:, rows] = k_BTKD, v_BTKD

    def write(self, k_BTKD: Tensor, v_BTKD: Tensor, which: slice = slice(None)) -> None:
        """Fill the last T rows of some slots, which ``Slots.append`` has counted; an empty slot's go to page 0."""
        slots, k, v = self._made()
        write_rows(k, v, k_BTKD, v_BTKD, slots.table[which], slots.length[which])

    def view(self, which: slice = slice(None)) -> KV:
        """All rows but the padding."""
        slots, k, v = self._made()
        return slots.view(k, v, which)

    def truncate(self, length: int) -> None:
        """Forget the rows of every sequence from ``length`` on."""
        if self.slots is None or length >= self.length:
            return
        if length < self.prompt:
            self._built_by, self._tail = None, None
        for slot in range(len(self.slots)):
            self.slots.truncate(slot, length)

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat sequences in one piece: ``i`` becomes what ``rows[i]`` was (int64 ``[B']``)."""
        if self.slots is None or self.k is None or self.v is None:
            return
        order = rows.tolist()
        self.slots.reorder(order)
        self._seen = [self._seen[i] for i in order]
        with ordinary_tensors():
            self.k, self.v = (self._picked(x, rows) for x in (self.k, self.v))
            self._tail = None if self._tail is None else self._tail.index_select(0, rows.to(self._tail.device))
            self._index = {
                name: x if self._kinds[name] is None else x.index_select(0, rows.to(x.device))
                for name, x in self._index.items()
            }

    def copied(self, device: torch.device, copy: Callable[[Tensor], Tensor], sides: bool = True) -> Store:
        """The same rows and, if wanted, side data on another device, by ``copy``; for sequences in one piece."""
        slots, k, v = self._made()
        other = Store()
        with ordinary_tensors():
            other.slots = slots.copied(device)
            other.slots.stores.append(other)
            other.k, other.v = copy(k), copy(v)
            other._tail = None if self._tail is None else copy(self._tail)
            other._index = {name: copy(x) for name, x in self._index.items()} if sides else {}
        other._seen = list(self._seen)
        if sides:
            other._kinds, other._built_by = dict(self._kinds), self._built_by
        return other

    def copy_page(self, source: int, to: int) -> None:
        """What ``Slots`` asks for when a shared page is about to be written."""
        _, k, v = self._made()
        sides = (x for name, x in self._index.items() if isinstance(self._kinds[name], Side))
        for x in (k, v, *sides):
            x[to].copy_(x[source])

    def copy_state(self, source: int, to: int) -> None:
        """What ``Slots`` asks for when a slot is forked."""
        appended = self.slots.appended if self.slots else []
        self._seen[to] = appended[to] - (appended[source] - self._seen[source])
        for name, x in self._index.items():
            if isinstance(self._kinds[name], State):
                x[to].copy_(x[source])

    def forget(self, slot: int, length: int) -> None:
        """What ``Slots`` asks for when a sequence is cut: side data of later rows no longer hold."""
        assert self.slots is not None
        # an entry of several keys may hold some that are gone: there is something to bring up to date
        self._seen[slot] = min(self._seen[slot], self.slots.appended[slot] - 1)

    def doubt(self, rows: int) -> None:
        """Have side data of the newest rows made again before they are used: other rows may lie there by now."""
        slots, _, _ = self._made()
        self._seen = [min(seen, n - rows) for seen, n in zip(self._seen, slots.appended, strict=True)]

    def join(self, slots: Slots) -> None:
        """Be counted with another layer, whose slots hold the same sequences, from here on."""
        own, _, _ = self._made()
        assert slots.in_one_piece and (slots.lengths, slots.starts, slots.page) == (own.lengths, own.starts, own.page)
        self._seen = [n - (then - seen) for n, then, seen in zip(slots.appended, own.appended, self._seen, strict=True)]
        self.slots = slots
        slots.stores.append(self)

    def leave(self) -> None:
        """Have slots of its own again."""
        shared, _, _ = self._made()
        self.slots = shared.copied(shared.device)
        self.slots.stores.append(self)

    # ---- the method's side data -------------------------------------------------------------------------------------

    def end_prefill(self, q_BTHD: Tensor, tail: int) -> None:
        """Note that the rows so far are prompt, and keep its last ``tail`` queries; for sequences in one piece."""
        follows = self._tail is not None and self.prompt == self.length - q_BTHD.shape[1]
        newest = q_BTHD[:, max(0, q_BTHD.shape[1] - tail) :]
        if self._tail is not None and follows:
            newest = torch.cat([self._tail, newest], 1)[:, -tail:] if tail else newest
        self._tail = newest.clone() if tail else None  # a view would keep all queries of the prompt alive
        self.end_prompt()
        self._built_by = None

    def end_prompt(self) -> None:
        """Note that the rows so far are prompt."""
        slots, _, _ = self._made()
        for slot in range(len(slots)):
            slots.end_prompt(slot)

    def middle(self, method: Decode, which: slice = slice(None)) -> KV:
        """The rows that ``method`` may choose from: all but its sinks and its window."""
        slots, _, _ = self._made()
        for slot in range(*which.indices(len(slots))):
            if not slots.prompts[slot] and slots.lengths[slot]:  # rows that came by other ways than prefill
                slots.end_prompt(slot, slots.lengths[slot] - 1)
        return slots.part(self.view(which), method.sinks, method.window, method.grows, which)

    def longest_middle(self, method: Decode) -> int:
        """Rows of the longest middle, as far as the host knows."""
        slots, _, _ = self._made()
        return slots.longest_part(method.sinks, method.window, method.grows)

    def most_outside(self, method: Decode) -> int | None:
        """Rows of a sequence outside its middle at most, as far as the host knows; None for any number."""
        return method.sinks + method.window if method.grows else None

    def index(self, method: Decode, q_BHD: Tensor, ctx: Ctx) -> Index:
        """Side data of ``method``, built or extended as needed.

        Where the prompt's last queries are not known (another attention read it, or it was cut), the query at hand
        stands in for them.
        """
        slots, _, _ = self._made()
        if self._built_by != (method, ctx.seed):
            self.begin(method, q_BHD[:, None] if self._tail is None else self._tail, ctx)
        elif most := max((n - seen for n, seen in zip(slots.appended, self._seen, strict=True)), default=0):
            with ordinary_tensors():
                self._extend(method, most, ctx)
        return self._index

    def begin(self, method: Decode, tail_q_BTHD: Tensor, ctx: Ctx, which: slice = slice(None)) -> None:
        """Make side data for the prompts of some slots; those of the others stay, if they are of the same method."""
        slots, _, _ = self._made()
        with ordinary_tensors():
            if self._built_by != (method, ctx.seed):
                self._allocate(method, ctx)
            middle, kv = self.middle(method, which), self.view(which)
            prompt = kv._replace(length=slots.prompt[which] - kv.start, spans=None, most=kv.bound)
            method.begin(self._of(which), middle, prompt, tail_q_BTHD, ctx)
            self._extend(method, kv.bound, ctx, which)

    def wait(self, which: slice) -> None:
        """Leave the newest rows of some slots without side data: their prompt goes on, and ``begin`` will make them."""
        slots, _, _ = self._made()
        self._seen[which] = slots.appended[which]

    def _extend(self, method: Decode, most: int, ctx: Ctx, which: slice = slice(None)) -> None:
        """Bring side data up to date, of which the last ``most`` rows of every sequence may have none yet."""
        slots, _, _ = self._made()
        if any(isinstance(kind, Side) for kind in self._kinds.values()):
            rows = slots.part(self.view(which), method.sinks, 0, method.grows, which)
            done = slots.all_but(most, method.sinks, method.grows, which)
            method.extend(self._of(which), rows, done, most, ctx)
        self._seen[which] = slots.appended[which]

    def _of(self, which: slice) -> Index:
        """The index for some slots: what has one entry a sequence is cut to them, and so are pages that are pieces."""
        slots, _, _ = self._made()

        def cut(name: str) -> bool:
            kind = self._kinds[name]
            return isinstance(kind, State) or (isinstance(kind, Side) and slots.in_one_piece)

        return {name: x[which] if cut(name) else x for name, x in self._index.items()}

    def _allocate(self, method: Decode, ctx: Ctx) -> None:
        slots, k, _ = self._made()
        kv_heads, dim = k.shape[2:]
        constants = method.constants(kv_heads, dim, slots.device, ctx)
        kinds = self._kinds_of(method)
        self._kinds = {**kinds, **dict.fromkeys(constants)}
        self._index = {name: self._blank(kind) for name, kind in kinds.items()} | constants
        self._built_by = (method, ctx.seed)

    def _kinds_of(self, method: Decode) -> dict[str, Side | State | None]:
        slots, k, _ = self._made()
        return {**method.sides(k.shape[3], k.dtype), **method.states(k.shape[2], k.shape[3], slots.capacity)}

    def _blank(self, kind: Side | State | None) -> Tensor:
        slots, k, _ = self._made()
        if isinstance(kind, Side):
            shape = (slots.pages, k.shape[2], -(-slots.page // kind.unit), *kind.shape)
            return torch.full(shape, kind.fill, dtype=kind.dtype, device=slots.device)
        assert kind is not None
        return torch.zeros(len(slots), *kind.shape, dtype=kind.dtype, device=slots.device)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _made(self) -> tuple[Slots, Tensor, Tensor]:
        if self.slots is None or self.k is None or self.v is None:
            raise AssertionError("empty store")
        return self.slots, self.k, self.v

    def _start(self, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        """Slots of our own, and room for the first rows."""
        batch, _, tokens, _ = k_BKTD.shape
        self.slots = Slots.in_pieces(batch, rows_with_room(0, tokens), k_BKTD.device)
        self.slots.stores.append(self)
        with ordinary_tensors():
            self.k, self.v = (
                in_large_pages(torch.empty(batch, self.slots.page, *x.shape[1::2], dtype=x.dtype, device=x.device))
                for x in (k_BKTD, v_BKTD)
            )
        self._seen = [0] * batch

    def reserve(self, rows: int) -> None:
        """Room for ``rows`` rows in every piece, so that nothing moves until there are more."""
        slots, _, _ = self._made()
        if rows > slots.page:
            self._grow(rows)

    def _picked(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows.to(x.device))

    def _enlarged(self, x: Tensor, rows: int) -> Tensor:
        larger = in_large_pages(torch.empty(len(x), rows, *x.shape[2:], dtype=x.dtype, device=x.device))
        larger[:, : self.length] = x[:, : self.length]
        return larger

    def _grow(self, rows: int) -> None:
        slots, k, v = self._made()
        slots.page = rows
        with ordinary_tensors():
            self.k, self.v = (self._enlarged(x, rows) for x in (k, v))
            if self._built_by is not None:
                kinds = self._kinds_of(self._built_by[0])
                self._index |= {name: _overlaid(self._blank(kind), self._index[name]) for name, kind in kinds.items()}


def rows_with_room(used: int, needed: int) -> int:
    """Capacity for ``needed`` rows and at least one more, with a quarter of what is used to spare."""
    return -(-max(needed + 1, used + used // 4) // ROOM) * ROOM


def _overlaid(larger: Tensor, x: Tensor) -> Tensor:
    """``larger`` with ``x`` in its corner."""
    larger[tuple(slice(n) for n in x.shape)] = x
    return larger
