"""Which rows of which sequence lie in which pages.

One ``Slots`` serves all layers of a model, or each layer has its own. What a decode step reads of it has fixed
addresses, and lengths live on the device, so a CUDA graph may count and read them again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from keysift.ops.rows import part_bounds
from keysift.types import KV


class Layer(Protocol):
    """What slots ask of the layers whose rows they place."""

    def copy_page(self, source: int, to: int) -> None: ...

    def copy_state(self, source: int, to: int) -> None: ...

    def forget(self, slot: int, length: int) -> None: ...


class Slots:
    """Sequences and the pages they own.

    A slot holds one sequence or none. Its rows are ``start .. length - 1``; those before ``start`` are padding. Pages
    may belong to several slots after a fork; whoever writes to one gets a copy of its own first. Page 0 belongs to
    nobody: what a slot without room writes lands there.

    The host plans (``reserve``, ``free``, ``fork``, ``truncate``); the device counts (``append``), and a CUDA graph may
    hold the counting, as long as the host reserves rows before each replay and calls ``note`` after it.

    Attributes:
        table: page of each ``page`` rows, int32 ``[slots, P]``.
        start, length, prompt: first row, rows, and rows that prefill wrote, int64 ``[slots]``.
        lengths, starts, prompts: the same as the host knows them.
        appended: rows that each slot may have gained so far, those that it lost again included.
        beside: slots of another model that count in the same steps, for ``take_back``.
    """

    def __init__(self, slots: int, page: int, pages_per_slot: int, pages: int, device: torch.device | str) -> None:
        """Room for ``slots`` sequences of up to ``pages_per_slot * page`` rows, in ``pages`` pages (one is nobody's).

        Raises:
            ValueError: a page that is no power of two of 16 or more, or fewer pages than one sequence may need.
        """
        check_page(page)
        if pages <= pages_per_slot:
            raise ValueError(f"pages={pages}: a sequence may need {pages_per_slot}, and one page is nobody's")
        self.page, self.pages, self.in_one_piece = page, pages, False
        self._set_up(slots, pages_per_slot, torch.device(device))
        self._free = list(range(pages - 1, 0, -1))
        self._owned: list[list[int]] = [[] for _ in range(slots)]
        self._owners = [0] * pages

    @classmethod
    def in_pieces(cls, slots: int, rows: int, device: torch.device) -> Slots:
        """One page of ``rows`` rows for each sequence: rows in one piece, which can grow, and cannot be shared."""
        self = cls.__new__(cls)
        self.page, self.pages, self.in_one_piece = rows, slots, True
        self._set_up(slots, 1, device)
        with ordinary_tensors():
            self.table.copy_(torch.arange(slots)[:, None])
        return self

    def _set_up(self, slots: int, pages_per_slot: int, device: torch.device) -> None:
        self.device, self.appended, self.stores = device, [0] * slots, list[Layer]()
        self.beside: tuple[Slots, ...] = ()
        with ordinary_tensors():
            self.table = torch.zeros(slots, pages_per_slot, dtype=torch.int32, device=device)
            self.start, self.length, self.prompt = (
                torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(3)
            )
        self.starts, self.lengths, self.prompts = [0] * slots, [0] * slots, [0] * slots
        self._views: dict[Any, tuple[Tensor, Tensor]] = {}
        self._limit: int | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Rows that a sequence may have."""
        return self.page * self.table.shape[1]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    # ---- what the host plans ----------------------------------------------------------------------------------------

    def reserve(self, slot: int, rows: int) -> None:
        """Make sure that ``slot`` may be written up to ``rows`` rows, its shared pages among them copied.

        Raises:
            ValueError: more rows than a slot may have, or no page is left; nothing has changed then.
        """
        if rows > self.capacity:
            raise ValueError(f"{rows} rows: a sequence may have {self.capacity}; make the store with more pages a slot")
        if self.in_one_piece:
            return
        self._own(slot, self.lengths[slot], rows)

    def _own(self, slot: int, first: int, rows: int) -> None:
        """Have pages for ``rows`` rows, of which those from ``first`` on are to be written."""
        owned, needed = self._owned[slot], -(-rows // self.page)
        shared = [i for i in range(first // self.page, len(owned)) if self._owners[owned[i]] > 1]
        more = max(0, needed - len(owned)) + len(shared)
        if more > len(self._free):
            raise ValueError(
                f"the store is full: {rows} rows need {more} more pages of {self.page} and {len(self._free)} are free;"
                " free a slot, or make the store with more pages"
            )
        for i in shared:
            fresh = self._take()
            for store in self.stores:
                store.copy_page(owned[i], fresh)
            self._give_back(owned[i])
            owned[i] = fresh
        if shared or needed > len(owned):
            owned.extend(self._take() for _ in range(needed - len(owned)))
            self._write_table(slot)

    def free(self, slot: int) -> None:
        """End a sequence; its pages go back, and other slots stay as they are."""
        self._set_rows(slot, 0, 0, 0)
        for page in self._owned[slot]:
            self._give_back(page)
        self._owned[slot].clear()
        self._write_table(slot)

    def fork(self, source: int, to: int) -> None:
        """Begin slot ``to`` as a copy of ``source``: they share pages until one writes to them.

        Raises:
            ValueError: ``to`` is in use.
        """
        if self._owned[to]:
            raise ValueError(f"slot {to} holds {self.lengths[to]} rows: free it first")
        self._owned[to] = self._owned[source][: -(-self.lengths[source] // self.page)]
        for page in self._owned[to]:
            self._owners[page] += 1
        self._set_rows(to, self.starts[source], self.lengths[source], self.prompts[source])
        self._write_table(to)
        for store in self.stores:
            store.copy_state(source, to)

    def pin(self, slot: int, rows: int) -> list[int]:
        """The pages of a slot's first ``rows`` rows, whole pages, kept whatever becomes of the slot until ``unpin``."""
        assert rows % self.page == 0 and rows <= self.lengths[slot]
        pages = self._owned[slot][: rows // self.page]
        for page in pages:
            self._owners[page] += 1
        return pages

    def shared(self, page: int) -> bool:
        """Whether a page belongs to several slots, or to one and to who pinned it."""
        return self._owners[page] > 1

    def unpin(self, pages: Sequence[int]) -> None:
        """Let go of pages that ``pin`` gave."""
        for page in pages:
            self._give_back(page)

    def begin_with(self, slot: int, pages: Sequence[int]) -> None:
        """Begin an empty slot with the rows of pages that are pinned: it reads them, and does not write to them.

        Raises:
            ValueError: the slot is in use.
        """
        if self._owned[slot]:
            raise ValueError(f"slot {slot} holds {self.lengths[slot]} rows: free it first")
        self._owned[slot] = list(pages)
        for page in pages:
            self._owners[page] += 1
        self._set_rows(slot, 0, len(pages) * self.page, 0)
        self._write_table(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forget the rows from ``length`` on; the next append overwrites them. The slot's own pages stay reserved.

        Raises:
            ValueError: the cut goes through a page that another slot reads, and none is left for a copy.
        """
        length = min(length, self.lengths[slot])
        if not self.in_one_piece:
            owned, kept = self._owned[slot], -(-length // self.page)
            dropped = owned[kept:] if any(self._owners[page] > 1 for page in owned[kept:]) else []
            cut = owned[kept - 1 : kept] if length % self.page else []
            available = self._free or any(self._owners[page] == 1 for page in dropped)
            if any(self._owners[page] > 1 for page in cut) and not available:
                raise ValueError("the store is full: no page for a copy of the one that is cut; free a slot")
            for page in dropped:
                owned.pop()
                self._give_back(page)
            self._own(slot, length, length)
            self._write_table(slot)
        self._set_rows(slot, min(self.starts[slot], length), length, min(self.prompts[slot], length))
        for store in self.stores:
            store.forget(slot, length)

    def end_prompt(self, slot: int, rows: int | None = None) -> None:
        """Note that the first ``rows`` rows are prompt; by default all so far."""
        self.prompts[slot] = self.lengths[slot] if rows is None else rows
        self.prompt[slot] = self.prompts[slot]
        self._views.clear()

    def pad(self, starts: Sequence[int]) -> None:
        """Note that the rows before these are padding."""
        if list(starts) != self.starts:
            self.starts = list(starts)
            self.start.copy_(torch.tensor(self.starts))
            self._views.clear()

    def reorder(self, rows: Sequence[int]) -> None:
        """Slot ``i`` becomes what slot ``rows[i]`` was; in one piece only."""
        assert self.in_one_piece
        self.starts, self.lengths, self.prompts = (
            [x[i] for i in rows] for x in (self.starts, self.lengths, self.prompts)
        )
        self.pages, self.appended = len(rows), [self.appended[i] for i in rows]
        with ordinary_tensors():
            which = torch.tensor(rows, dtype=torch.int64, device=self.device)
            self.start, self.length, self.prompt = (x[which] for x in (self.start, self.length, self.prompt))
            self.table = torch.arange(len(rows), dtype=torch.int32, device=self.device)[:, None]
        self._views.clear()

    def copied(self, device: torch.device) -> Slots:
        """The same sequences for rows on another device; in one piece only."""
        assert self.in_one_piece
        other = Slots.in_pieces(len(self), self.page, device)
        other.starts, other.lengths, other.prompts = list(self.starts), list(self.lengths), list(self.prompts)
        for own, known in ((other.start, other.starts), (other.length, other.lengths), (other.prompt, other.prompts)):
            own.copy_(torch.tensor(known))
        other.appended = list(self.appended)
        return other

    # ---- what the device counts -------------------------------------------------------------------------------------

    def append(self, rows: int | Sequence[int] | Tensor, most: int = 1) -> None:
        """Lengthen the sequences by so many rows, which must be reserved.

        Args:
            rows: of each sequence, or one number for all. A tensor (int64 ``[slots]``) is not waited for: the host is
                to be told with ``note``, also of every replay of a graph.
            most: the most that the tensor says.
        """
        self._views.clear()
        if isinstance(rows, Tensor):
            self.length += rows
            counts = [most] * len(self)
        else:
            counts = [rows] * len(self) if isinstance(rows, int) else list(rows)
            self.length += rows if isinstance(rows, int) else torch.tensor(counts).to(self.device)
            self.note(counts)
        self.appended = [n + more for n, more in zip(self.appended, counts, strict=True)]

    def note(self, rows: Sequence[int]) -> None:
        """Tell the host what the device has appended."""
        self.lengths = [n + more for n, more in zip(self.lengths, rows, strict=True)]

    def take_back(self) -> None:
        """Undo what the device has appended and the host was not told of."""
        for slots in (self, *self.beside):
            for slot, length in enumerate(slots.lengths):
                slots.truncate(slot, length)

    @property
    def lengths_are_known(self) -> bool:
        """Whether views may tell the host's lengths."""
        return self._limit is None

    @property
    def positions(self) -> Tensor:
        """Position of each sequence's newest token, int64 ``[slots]``."""
        return self._once("positions", lambda: (self.length - self.start - 1,) * 2, slice(None))[0]

    @contextmanager
    def unknown_lengths(self, limit: int) -> Iterator[None]:
        """What is captured within may be replayed at any lengths up to ``limit``: views promise no more than that."""
        self._limit = limit
        self._views.clear()
        try:
            yield
        finally:
            self._limit = None
            self._views.clear()

    def view(self, k: Tensor, v: Tensor, which: slice = slice(None)) -> KV:
        """The rows of some slots in a layer's buffers."""
        start, length = self._once("all", lambda: (self.start, self.length - self.start), which)
        known = self._limit is None
        spans = tuple(zip(self.starts[which], self.lengths[which], strict=True)) if known else None
        table = None if self.in_one_piece else self.table[which]
        k, v = (x[which] if self.in_one_piece else x for x in (k, v))
        return KV(k, v, start, length, spans, table, self.start[which], None if known else self._limit)

    def part(self, kv: KV, sinks: int, window: int, grows: bool, which: slice = slice(None)) -> KV:
        """The rows of a view after the first ``sinks`` and before the last ``window``; of the prompt's rows, if the
        part is not to grow."""

        def bounds() -> tuple[Tensor, Tensor]:
            return part_bounds(self.start, self.length, self.length if grows else self.prompt, sinks, window)

        start, length = self._once((sinks, window, grows), bounds, which)
        return kv._replace(start=start, length=length, spans=None, most=kv.bound)

    def all_but(self, most: int, sinks: int, grows: bool, which: slice = slice(None)) -> Tensor:
        """The row at which the last ``most`` rows of such a part without a window begin, int64 ``[slots]``."""

        def begin() -> tuple[Tensor, Tensor]:
            return part_bounds(self.start, self.length, self.length if grows else self.prompt, sinks, 0, most)

        return self._once((sinks, grows, "all but", most), begin, which)[0]

    def longest_part(self, sinks: int, window: int, grows: bool, which: slice = slice(None)) -> int:
        """Rows of the longest such part, as far as the host knows."""
        if self._limit is not None:
            return self._limit - sinks - window
        ends = self.lengths if grows else self.prompts
        return max((e - s - sinks - window for s, e in zip(self.starts[which], ends[which], strict=True)), default=0)

    def _once(self, key: Any, make: Callable[[], tuple[Tensor, Tensor]], which: slice) -> tuple[Tensor, Tensor]:
        """A view's start and length, made once a step for all layers."""
        if key not in self._views:
            with ordinary_tensors():
                self._views[key] = make()
        start, length = self._views[key]
        return start[which], length[which]

    # ---- bookkeeping ------------------------------------------------------------------------------------------------

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _give_back(self, page: int) -> None:
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)

    def _write_table(self, slot: int) -> None:
        row = torch.zeros(self.table.shape[1], dtype=torch.int32)
        row[: len(self._owned[slot])] = torch.tensor(self._owned[slot], dtype=torch.int32)
        self.table[slot].copy_(row)

    def _set_rows(self, slot: int, start: int, length: int, prompt: int) -> None:
        self.starts[slot], self.lengths[slot], self.prompts[slot] = start, length, prompt
        for tensor, value in ((self.start, start), (self.length, length), (self.prompt, prompt)):
            tensor[slot] = value
        self._views.clear()


def check_page(page: int) -> None:
    """Raise ValueError unless a page may have so many rows."""
    if page < 16 or page & (page - 1):
        raise ValueError(f"page={page}: choose 16, 32, 64, 128 or 256")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is made within may be written to later, in inference mode or out of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield
