"""Rounds of self-speculation over a served model's slots: some tokens by a draft method, then one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keysift import attention as path
from keysift.hf.served import ServedModel
from keysift.ops.dense import dense_attention
from keysift.ops.short import short_attention
from keysift.types import Selection

Draw = Callable[[Tensor, Tensor], Tensor]


class Rounds:
    """Drafts by ``served.draft_method`` over the same cache, and passes that check them with all keys.

    Of a round the draft method selects once; its later steps read the same rows, and their own. Methods that draw rows
    with weights select in each step: the weights belong to one query. A round leaves the slots as long as they were;
    ``keep`` says how many of its rows stay.

    Attributes:
        tokens: the newest token of each slot and those drafted after it, int64 ``[slots, most + 1]``.
    """

    def __init__(self, served: ServedModel, most: int, draw: Draw) -> None:
        """Buffers for rounds of up to ``most`` tokens; ``draw`` gives tokens for logits ``[slots, V]`` and places."""
        assert served.draft_method is not None
        self.served, self.method, self.most, self._draw = served, served.draft_method, most, draw
        slots, device = len(served.slots), served.slots.device
        self.tokens = torch.zeros(slots, most + 1, dtype=torch.int64, device=device)
        self._places = torch.zeros(slots, dtype=torch.int64, device=device)
        self._logits: dict[int, Tensor] = {}
        self._chosen: dict[int, Selection | None] = {}  # by layer, of the round at hand
        self._selects = False
        self._plain_steps = served.plain_steps

    def run(self, gamma: int, places: Sequence[int] | None = None, metered: bool = False) -> Tensor:
        """Draft ``gamma`` tokens after each slot's newest, and read them.

        Args:
            gamma: 1 to ``most``.
            places: of each slot's next token, where some are sampled; None takes the likeliest.
            metered: whether what is read by who selects is counted.

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
        self._catch_up()
        draws = places is not None
        served.run(self.name(gamma, draws, metered), partial(self._round, gamma, draws), metered)
        return self._logits[gamma]

    @staticmethod
    def name(gamma: int, draws: bool, metered: bool) -> tuple[str, int, bool, bool]:
        """Of a round's graph."""
        return "round", gamma, draws, metered

    def keep(self, rows: Sequence[int], newest: Tensor) -> None:
        """Lengthen slots by so many of the round's rows; ``newest`` are the tokens after those, int64 ``[slots]``."""
        self.served.slots.append(rows)
        self.served.ids.copy_(newest[:, None])
        self._plain_steps = self.served.plain_steps

    def _catch_up(self) -> None:
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

    def _round(self, gamma: int, draws: bool) -> None:
        self._draft_all(gamma, draws)
        self._verify_all(gamma)

    def _draft_all(self, gamma: int, draws: bool) -> None:
        """The tokens of a round; slots are as long as before."""
        served, slots = self.served, self.served.slots
        one = torch.ones_like(slots.length)
        for store in served.stores:
            store.doubt(self.most + 1)  # of rows that the last pass has written
        with slots.unknown_lengths(slots.capacity), served.compiled_layers():
            self.tokens[:, :1] = served.ids
            for i in range(gamma):
                slots.append(one)
                self._selects = i == 0
                logits = served.forward(self.tokens[:, i : i + 1], self._draft)[:, 0]
                self.tokens[:, i + 1] = self._draw(logits, self._places + i) if draws else logits.argmax(-1)
            slots.length -= gamma
        self._chosen.clear()

    def _verify_all(self, gamma: int) -> None:
        """Logits of a round; slots are as long as before."""
        served, slots = self.served, self.served.slots
        with slots.unknown_lengths(slots.capacity), served.compiled_layers():
            slots.append(torch.full_like(slots.length, gamma + 1), most=gamma + 1)
            self._logits[gamma].copy_(served.forward(self.tokens[:, : gamma + 1], self._verify))
            slots.length -= gamma + 1

    def _draft(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
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

    def _verify(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of a round's tokens, each over all keys up to its own."""
        store = self.served.stores[layer]
        store.write(k, v)
        kv = store.view()
        if window is None:
            return short_attention(q, kv, scale, q.dtype).out
        tokens = q.shape[1]
        ends = (kv.end - (tokens - 1 - i) for i in range(tokens))
        out: list[Any] = [
            dense_attention(q[:, i : i + 1], kv.between(kv.start, end), scale, window) for i, end in enumerate(ends)
        ]
        return torch.cat(out, 1)
