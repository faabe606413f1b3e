"""Tokens to text as they come, whole characters at a time, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # how tokenizers decode bytes that are not a whole character yet


class Detokenizer:
    """The text of one answer.

    A character can span tokens, and a token's text can depend on the one before it (leading spaces). So a few tokens
    are decoded again with every new one, and what ends in half a character waits. What could be the beginning of a
    stop string waits as well. Of several stop strings the one that is complete first counts.

    Attributes:
        token_ids: of the answer so far.
        text: that is certain, up to the first stop string.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._known = ""  # text of all tokens before `_known_tokens`, stop strings and all
        self._context, self._known_tokens = 0, 0  # decoding starts at the first, so that text comes as in its sentence

    def add(self, token: int) -> str:
        """One more token; returns the text that became certain."""
        self.token_ids.append(token)
        return self._advance(final=False)

    def end(self) -> str:
        """The rest of the text, which was waiting."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self._tokenizer is None or self.stopped:
            return ""
        before = self._decode(self.token_ids[self._context : self._known_tokens])
        after = self._decode(self.token_ids[self._context :])
        if len(after) > len(before) and (final or not after.endswith(INCOMPLETE)):
            self._known += after[len(before) :]
            self._context, self._known_tokens = self._known_tokens, len(self.token_ids)
        certain = self._certain(final)
        new, self.text = certain[len(self.text) :], certain
        return new

    def _certain(self, final: bool) -> str:
        text = self._known
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self.text) - longest)
        found = [(place + len(s), place) for s in self._stop if (place := text.find(s, start)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        if final or not self._stop:
            return text
        beginning = (
            n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)
        )
        return text[: len(text) - next(beginning, 0)]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
