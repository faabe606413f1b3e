"""Rounds of speculation over a served model's slots: some tokens by who drafts, then one pass that checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift import attention as path
from keysift.cache import Store
from keysift.hf.parallel import from_first, is_dealt_out
from keysift.hf.served import ServedModel
from keysift.methods import streaming
from keysift.ops.dense import dense_attention
from keysift.ops.gather import gather_attention
from keysift.types import KV, Ctx, Selection

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

    def forget(self, slot: int) -> None:
        """What a slot held is no more."""

    @property
    def selects(self) -> bool:
        """Whether the round at hand selects rows: one that does not is another graph."""


class Rounds:
    """Rounds of up to so many tokens. A round leaves the slots as long as they were; ``keep`` says what of it stays.

    Attributes:
        tokens: the newest token of each slot and those drafted after it, int64 ``[slots, most + 1]``.
        was_ready: whether the newest round needed no preparation.
    """

    def __init__(self, served: ServedModel, most: int, draw: Draw, drafter: Drafter) -> None:
        """Buffers for rounds of up to ``most`` tokens; ``draw`` gives tokens for logits ``[slots, V]`` and places."""
        self.served, self.most, self._draw, self.drafter = served, most, draw, drafter
        slots, device = len(served.slots), served.slots.device
        self.tokens = torch.zeros(slots, most + 1, dtype=torch.int64, device=device)
        self._places = torch.zeros(slots, dtype=torch.int64, device=device)
        self._logits: dict[int, Tensor] = {}
        self.was_ready = False
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
        name = "round", gamma, draws, metered, self.drafter.selects
        self.was_ready = served.ready(name)
        served.run(name, partial(self._round, gamma, draws), metered)
        return self._logits[gamma]

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


class Kept(NamedTuple):
    """What a layer's method has selected for each slot, and where the middle was then: rows after it are all read."""

    selection: Selection
    start: Tensor
    length: Tensor


class OwnDraft:
    """Drafts by ``served.draft_method`` over the cache of the model itself.

    Of a round the method selects once, by the query of the token that the last pass gave; later steps read the same
    rows, and their own. Methods that draw rows with weights select in each step: the weights belong to one query.
    Without ``refresh`` what an answer's first round selects is read to its end, unweighted, and all rows since.
    """

    def __init__(self, served: ServedModel, most: int, refresh: bool = True) -> None:
        assert served.draft_method is not None
        self.served, self.method, self.most = served, served.draft_method, most
        self.refresh = refresh or not self.method.grows or isinstance(self.method, streaming.Method)  # by no query
        self._chosen: dict[int, Selection | None] = {}  # by layer, of the round at hand
        self._kept: dict[int, Kept | None] = {}
        self.selects, self._selects = True, False
        self._plain_steps = served.plain_steps
        self._new = torch.ones(len(served.slots), dtype=torch.bool, device=served.slots.device)  # slots to select for
        self._unselected = set(range(len(served.slots)))

    def forget(self, slot: int) -> None:
        """As of ``Drafter``."""
        self._unselected.add(slot)

    def begin(self, before: Sequence[int]) -> None:
        """Which slots are to be selected for; and side data of what plain steps have appended, which do not need
        them."""
        served = self.served
        new = self._unselected & served.active
        self.selects = self.refresh or not self._kept or bool(new)
        if new and not self.refresh:
            self._new.copy_(torch.tensor([slot in new for slot in range(len(served.slots))]))
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
                self._selects = self.selects and i == 0
                logits = served.forward(tokens[:, i : i + 1], self._attend)[:, 0]
                tokens[:, i + 1] = logits.argmax(-1) if choose is None else choose(logits, i)
            slots.length -= gamma
        self._chosen.clear()

    def keep(self, rows: Sequence[int]) -> None:
        """As of ``Drafter``."""
        self._plain_steps = self.served.plain_steps
        self._unselected -= self.served.active

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of a drafted token."""
        served = self.served
        store = served.stores[layer]
        store.write(k, v)
        if window is not None:
            return dense_attention(q, store.view(), scale, window)
        ctx = served.ctx(layer, scale)
        if not self.refresh:
            return self._attend_as_before(layer, q[:, 0], store, ctx)
        chosen = self._chosen.get(layer)
        if self._selects or (chosen is not None and chosen.log_w is not None):  # weights are of one query
            self._chosen[layer] = path.select(q[:, 0], store, self.method, ctx, served.metering)
        return path.attend(q[:, 0], store, self.method, self._chosen[layer], ctx).out

    def _attend_as_before(self, layer: int, q_BHD: Tensor, store: Store, ctx: Ctx) -> Tensor:
        """The same over what was selected once for each slot, and all rows after the middle of then."""
        if self._selects:
            found = path.select(q_BHD, store, self.method, ctx, self.served.metering)
            self._keep_selected(layer, found, store.middle(self.method))
        kept = self._kept[layer]
        if kept is None:
            return path.attend(q_BHD, store, self.method, None, ctx).out
        kv = store.view()
        start = torch.minimum(torch.maximum(kept.start, kv.start), kv.end)  # slots without a sequence have less by now
        length = torch.minimum(kept.length, kv.end - start)
        middle = store.middle(self.method)._replace(start=start, length=length)
        return gather_attention(q_BHD, kv, kept.selection, ctx.scale, middle, q_BHD.dtype).out

    def _keep_selected(self, layer: int, found: Selection | None, middle: KV) -> None:
        """Of new slots; on a GPU, where lists of a method are all as wide, buffers stay where they are, for graphs."""
        if found is None:
            self._kept[layer] = None
            return
        old, rows = self._kept.get(layer), found.rows
        if old is None:
            none = Selection(torch.zeros_like(rows), torch.zeros_like(found.count))
            old = Kept(none, torch.zeros_like(middle.start), torch.zeros_like(middle.length))
        wider = rows.shape[-1] - old.selection.rows.shape[-1]
        if wider > 0:
            old = old._replace(selection=old.selection._replace(rows=F.pad(old.selection.rows, (0, wider))))
        self._kept[layer] = old
        there = F.pad(rows, (0, max(0, -wider))), found.count, middle.start, middle.length
        for x, now in zip((*old.selection[:2], old.start, old.length), there, strict=True):
            new = self._new.view(-1, *[1] * (x.dim() - 1))
            x.copy_(torch.where(new, now, x))
