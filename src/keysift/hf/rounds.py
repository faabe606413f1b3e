"""Rounds of speculation over a served model's slots: some tokens by who drafts, then one pass that checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from keysift import attention as path
from keysift.hf.parallel import from_first, is_dealt_out
from keysift.hf.served import ServedModel
from keysift.ops.dense import dense_attention
from keysift.types import Selection

Draw = Callable[[Tensor, Tensor], Tensor]
Choose = Callable[[Tensor, int], Tensor]


class Drafter(Protocol):
    """Who drafts."""

    def begin(self, before: Sequence[int]) -> None:
        """A round comes; ``before`` are the tokens before the newest of each slot."""

    def draft(self, tokens: Tensor, gamma: int, choose: Choose | None) -> None:
        """Fill a round's tokens, ``tokens[:, 0]`` being the newest of each slot; slots are as long as before then.
        Nothing waits for the device.

        Args:
            tokens: int64 ``[slots, gamma + 1]`` or more.
            gamma: how many.
            choose: a token for logits ``[slots, V]`` of this many-th place; None takes the likeliest.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """So many tokens more of each slot are said, the round's newest included."""

    def take_back(self) -> None:
        """Undo what a round that failed has appended."""


class Rounds:
    """Rounds of up to so many tokens. A round leaves the slots as long as they were; ``keep`` says what of it stays.

    Attributes:
        tokens: the newest token of each slot and those drafted after it, int64 ``[slots, most + 1]``.
    """

    def __init__(self, served: ServedModel, most: int, draw: Draw, drafter: Drafter) -> None:
        """Buffers for rounds of up to ``most`` tokens; ``draw`` gives tokens for logits ``[slots, V]`` and places."""
        self.served, self.most, self._draw, self.drafter = served, most, draw, drafter
        slots, device = len(served.slots), served.slots.device
        self.tokens = torch.zeros(slots, most + 1, dtype=torch.int64, device=device)
        self._places = torch.zeros(slots, dtype=torch.int64, device=device)
        self._logits: dict[int, Tensor] = {}
        self._told = is_dealt_out(served.model) and not isinstance(drafter, OwnDraft)

    def run(
        self,
        gamma: int,
        places: Sequence[int] | None = None,
        metered: bool = False,
        before: Sequence[int] | None = None,
    ) -> Tensor:
        """Draft ``gamma`` tokens after each slot's newest, and read them.

        Args:
            gamma: 1 to ``most``.
            places: of each slot's next token, where some are sampled; None takes the likeliest.
            metered: whether what is read by who selects is counted.
            before: of each slot, the token before its newest; for other models that draft.

        Returns:
            Logits after the newest token and after each drafted one, fp32 ``[slots, gamma + 1, V]``, until the next
            round of so many.
        """
        served, slots = self.served, self.served.slots
        if gamma not in self._logits:
            shape = len(slots), gamma + 1, served.vocabulary
            self._logits[gamma] = torch.zeros(shape, device=slots.device)
        if places is not None:
            self._places.copy_(torch.tensor(places))
        self.drafter.begin(before or [0] * len(slots))
        draws = places is not None
        try:
            served.run(self.name(gamma, draws, metered), partial(self._round, gamma, draws), metered)
        except BaseException:
            self.drafter.take_back()
            raise
        return self._logits[gamma]

    @staticmethod
    def name(gamma: int, draws: bool, metered: bool) -> tuple[str, int, bool, bool]:
        """Of a round's graph."""
        return "round", gamma, draws, metered

    def keep(self, rows: Sequence[int], newest: Tensor) -> None:
        """Lengthen slots by so many of the round's rows; ``newest`` are the tokens after those, int64 ``[slots]``."""
        self.served.slots.append(rows)
        self.served.ids.copy_(newest[:, None])
        self.drafter.keep(rows)

    def _round(self, gamma: int, draws: bool) -> None:
        self.draft_all(gamma, draws)
        self.verify_all(gamma)

    def draft_all(self, gamma: int, draws: bool) -> None:
        """The tokens of a round."""
        self.tokens[:, :1] = self.served.ids
        self.drafter.draft(self.tokens, gamma, (lambda x, i: self._draw(x, self._places + i)) if draws else None)
        if self._told:
            self.tokens.copy_(from_first(self.tokens))

    def verify_all(self, gamma: int) -> None:
        """Logits of a round."""
        served, slots = self.served, self.served.slots
        with slots.unknown_lengths(slots.capacity), served.compiled_layers():
            slots.append(torch.full_like(slots.length, gamma + 1), most=gamma + 1)
            self._logits[gamma].copy_(served.forward(self.tokens[:, : gamma + 1], served.over_all_keys))
            slots.length -= gamma + 1


class OwnDraft:
    """Drafts by ``served.draft_method`` over the cache of the model itself.

    Of a round the method selects once; later steps read the same rows, and their own. Methods that draw rows with
    weights select in each step: the weights belong to one query.
    """

    def __init__(self, served: ServedModel, most: int) -> None:
        assert served.draft_method is not None
        self.served, self.method, self.most = served, served.draft_method, most
        self._chosen: dict[int, Selection | None] = {}  # by layer, of the round at hand
        self._selects = False
        self._plain_steps = served.plain_steps

    def begin(self, before: Sequence[int]) -> None:
        """Side data of what plain steps have appended, which do not need them."""
        served = self.served
        missing = served.plain_steps - self._plain_steps
        if not missing or served.slots.device.type != "cuda":  # elsewhere the store knows what it has appended
            return
        with served.slots.unknown_lengths(served.slots.capacity):  # what rounds decide by
            for layer, store in enumerate(served.stores):
                if path.chooses(self.method, store, layer):
                    store.doubt(missing + self.most + 1)
                    store.index(self.method, served.ids[:, :1, None], served.ctx(layer, 1.0))
        self._plain_steps = served.plain_steps

    def draft(self, tokens: Tensor, gamma: int, choose: Choose | None) -> None:
        """As of ``Drafter``."""
        served, slots = self.served, self.served.slots
        one = torch.ones_like(slots.length)
        for store in served.stores:
            store.doubt(self.most + 1)  # of rows that the last pass has written
        with slots.unknown_lengths(slots.capacity), served.compiled_layers():
            for i in range(gamma):
                slots.append(one)
                self._selects = i == 0
                logits = served.forward(tokens[:, i : i + 1], self._attend)[:, 0]
                tokens[:, i + 1] = logits.argmax(-1) if choose is None else choose(logits, i)
            slots.length -= gamma
        self._chosen.clear()

    def keep(self, rows: Sequence[int]) -> None:
        """As of ``Drafter``."""
        self._plain_steps = self.served.plain_steps

    def take_back(self) -> None:
        """The slots are those of the model, which does it."""

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of a drafted token."""
        served = self.served
        store = served.stores[layer]
        store.write(k, v)
        if window is not None:
            return dense_attention(q, store.view(), scale, window)
        ctx = served.ctx(layer, scale)
        chosen = self._chosen.get(layer)
        if self._selects or (chosen is not None and chosen.log_w is not None):  # weights are of one query
            self._chosen[layer] = path.select(q[:, 0], store, self.method, ctx, served.metering)
        return path.attend(q[:, 0], store, self.method, self._chosen[layer], ctx).out
