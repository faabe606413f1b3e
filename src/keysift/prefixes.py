"""Beginnings of prompts that are kept, for prompts that share a document."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from keysift.slots import Slots


class Prefixes:
    """Pages of whole chunks of prompts that have been read; what was not used for longest goes first.

    Prompts are read in chunks of one size, and chunks are shared whole, so that a prompt is computed in the same parts
    whether it finds its beginning here or not: what comes out is the same to the bit.
    """

    def __init__(self, slots: Slots, chunk: int) -> None:
        """``chunk`` tokens at a time, a multiple of ``slots.page``."""
        assert chunk % slots.page == 0
        self._slots, self._chunk = slots, chunk
        self._pages: OrderedDict[bytes, list[int]] = OrderedDict()  # of the last chunk of each beginning

    def __len__(self) -> int:
        """Chunks that are kept."""
        return len(self._pages)

    def find(self, token_ids: Sequence[int], most: int) -> list[int]:
        """The pages of the longest beginning that is kept, of at most ``most`` tokens."""
        found = []
        for name in self._names(token_ids[: max(0, most)]):
            if name not in self._pages:
                break
            found.append(name)
        self._use(found)
        return [page for name in found for page in self._pages[name]]

    def keep(self, slot: int, token_ids: Sequence[int]) -> None:
        """Keep the whole chunks of a prompt that was read into a slot."""
        names = list(self._names(token_ids))
        of_chunk = self._chunk // self._slots.page
        for i, name in enumerate(names):
            if name not in self._pages:
                pages = self._slots.pin(slot, (i + 1) * self._chunk)
                self._slots.unpin(pages[:-of_chunk])
                self._pages[name] = pages[-of_chunk:]
        self._use(names)

    def _use(self, names: Sequence[bytes]) -> None:
        """Note that chunks of one beginning were used: its end is to go first."""
        for name in reversed(names):
            self._pages.move_to_end(name)

    def clear(self) -> None:
        """Keep nothing."""
        for pages in self._pages.values():
            self._slots.unpin(pages)
        self._pages.clear()

    def make_room(self, pages: int) -> bool:
        """Drop what was not used for longest until so many pages are free; nothing if that would not do.

        What a slot reads too stays: to drop it would free nothing.
        """
        missing, dropped = pages - self._slots.free_pages, []
        for name, own in self._pages.items():
            if missing <= 0:
                break
            if not any(self._slots.shared(page) for page in own):
                dropped.append(name)
                missing -= len(own)
        if missing > 0:
            return False
        for name in dropped:
            self._slots.unpin(self._pages.pop(name))
        return True

    def _names(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        """A name for each whole chunk, which tells all tokens up to its end."""
        digest = hashlib.sha256()
        for end in range(self._chunk, len(token_ids) + 1, self._chunk):
            digest.update(array("q", token_ids[end - self._chunk : end]).tobytes())
            yield digest.digest()
