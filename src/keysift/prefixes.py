"""Beginnings of prompts that are kept, for prompts that share a document."""

from __future__ import annotations

import hashlib
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
        pages: list[int] = []
        for name in self._names(token_ids[:most]):
            if name not in self._pages:
                break
            self._pages.move_to_end(name)
            pages += self._pages[name]
        return pages

    def keep(self, slot: int, token_ids: Sequence[int]) -> None:
        """Keep the whole chunks of a prompt that was read into a slot."""
        for i, name in enumerate(self._names(token_ids)):
            if name in self._pages:
                self._pages.move_to_end(name)
            else:
                pages = self._slots.pin(slot, (i + 1) * self._chunk)
                own = pages[-(self._chunk // self._slots.page) :]
                self._slots.unpin(pages[: -len(own)])
                self._pages[name] = own

    def make_room(self, pages: int) -> None:
        """Drop what was not used for longest until so many pages are free, or nothing is kept."""
        while self._slots.free_pages < pages and self._pages:
            _, dropped = self._pages.popitem(last=False)
            self._slots.unpin(dropped)

    def _names(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        """A name for each whole chunk, which tells all tokens up to its end."""
        digest = hashlib.sha256()
        for end in range(self._chunk, len(token_ids) + 1, self._chunk):
            for token in token_ids[end - self._chunk : end]:
                digest.update(token.to_bytes(8, "little"))
            yield digest.digest()
