"""A smaller model that drafts for a larger one, over a cache of so many rows a sequence, however long the context is.

Its keys and queries have positions within that cache, so that a model made for 2,048 tokens drafts after 16,384. Where
rows go, those of a ``streaming`` cache are read again from their tokens, at the positions where they are now; those
that a head keeps by ``snapkv`` are turned there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from keysift.hf.config import context_tokens
from keysift.hf.rounds import Choose
from keysift.hf.served import DENSE, ServedModel, on_device
from keysift.meter import Meter
from keysift.methods import describe, snapkv, streaming
from keysift.slots import Slots
from keysift.types import Decode

DEFAULT_BUDGET = 1024  # rows of a sequence
LEAST = 64
TURNED = 0.03  # of a key's length that rounding may make of turning it
CHECKED = 37  # positions by which a key is turned, to see that it is the key of that position then


class DraftModel:
    """Drafts for the sequences of another model's slots, by slots of its own.

    Attributes:
        served: the model, over slots of ``rows`` rows.
        rows: of a sequence, at most; also the longest position that the model ever sees.
        spare: rows that are free after rows have gone, to read more into.
    """

    selects = False

    def __init__(
        self, model: PreTrainedModel, method: Decode, most: int, vocabulary: int, compile_layers: bool = True
    ) -> None:
        """Take over a model, until ``close``; ``open`` comes before anything is drafted.

        Args:
            method: ``streaming`` or ``snapkv``, which says what stays, and by ``budget`` how many rows.
            most: tokens that are drafted at a time, at most.
            vocabulary: of the model that it drafts for.
            compile_layers: as of ``ServedModel``.

        Raises:
            ValueError: another method, or a budget that is too small or that the model is not made for.
        """
        self.most, self.vocabulary = most, vocabulary
        self.rows = budget_of(method, context_tokens(model.config))
        self.spare = max(self.rows // 4, 2 * (most + 2))
        self.method = replace(method, dense_layers=())  # type: ignore[type-var]
        self._selects = isinstance(method, snapkv.Method)
        self.served = ServedModel(model, DENSE, self.method if self._selects else DENSE, compile_layers=compile_layers)
        self._known: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        try:
            self._turner = Turner(self.served) if self._selects else None
        except BaseException:
            self.close()
            raise

    def bytes(self, sequences: int, page: int) -> int:
        """Of the keys and values of so many sequences."""
        rows = (1 + sequences * self._pages(page)) * page
        return rows * sum(shape.row_bytes for shape in self.served.shapes)

    def _pages(self, page: int) -> int:
        """Of a sequence."""
        return -(-(self.rows + self.most + 1) // page)

    def open(self, sequences: int, page: int) -> None:
        """Make room for so many sequences."""
        self.served.let_go()
        pages = self._pages(page)
        device = self.served.model.device
        self.slots = Slots(sequences, page, pages, sequences * pages + 1, device)
        self.served.open(self.slots)
        for slot in range(sequences):
            self.slots.reserve(slot, self.slots.capacity)
        self._read = [0] * sequences  # tokens of each sequence that rows stand for, or once did
        self._fixed = [0] * sequences  # first rows, which stay
        self._before = torch.zeros(sequences, 1, dtype=torch.int64, device=device)

    def let_go(self) -> None:
        """Give back the memory of keys and values; ``open`` makes anew."""
        self.served.let_go()

    def close(self) -> None:
        """Give the model back as it was."""
        self.served.close()

    # ---- what was said so far ---------------------------------------------------------------------------------------

    def is_behind(self, slot: int, tokens: int) -> bool:
        """Whether ``follow`` has something to do before a round, for a sequence of so many tokens."""
        return self._read[slot] != tokens - 2 or self._room(slot) < 0

    def follow(self, slot: int, sequence: Sequence[int]) -> bool:
        """Read all but the two newest tokens of a sequence, as far as that was not done; a round begins with those.
        Returns whether nothing of it was read before."""
        until, began = len(sequence) - 2, self._read[slot] == 0
        if self._read[slot] > until:  # an error has kept tokens from a sequence that a round had given it
            self.forget(slot)
        if self._selects:
            self._follow_by_parts(slot, sequence, until)
        elif until - self._read[slot] <= self._room(slot):
            self._take_in(slot, sequence[self._read[slot] : until])
        else:
            sinks, kept = self.method.sinks, self.rows - self.spare
            self.slots.truncate(slot, 0)
            newest = sequence[max(sinks, until - kept + sinks) : until]
            self._take_in(slot, [*sequence[: min(sinks, until)], *newest])
        self._read[slot] = until
        return began

    def forget(self, slot: int) -> None:
        """Begin anew with a slot."""
        self.slots.truncate(slot, 0)
        self._read[slot] = self._fixed[slot] = 0

    def _room(self, slot: int) -> int:
        """Rows that may be read into before a round."""
        return self.rows - self.slots.lengths[slot] - (self.most + 1)

    def _take_in(self, slot: int, tokens: Sequence[int]) -> None:
        if tokens:
            self.served.read(slot, [min(token, self._known - 1) for token in tokens], Meter(), last=False)

    def _follow_by_parts(self, slot: int, sequence: Sequence[int], until: int) -> None:
        """What the observation window of each part attends to stays when the next one needs room; of the answer, the
        newest rows do."""
        prompt = self._read[slot] == 0
        while True:
            done, room = self._read[slot], self._room(slot)
            if room < min(self.spare - (self.most + 1), until - done) or room < 0:
                self._make_room(slot, votes=prompt and done > 0)
                continue
            part = sequence[done : min(until, done + room)]
            self._take_in(slot, part)
            self._read[slot] += len(part)
            if self._read[slot] == until:
                break
        if prompt:
            self._fixed[slot] = min(self.slots.lengths[slot], (self.rows - self.spare) // 2)

    def _make_room(self, slot: int, votes: bool) -> None:
        """Have all rows go but ``rows - spare``: those voted for, or the fixed ones and the newest."""
        served, length, kept = self.served, self.slots.lengths[slot], self.rows - self.spare
        which, layers = slice(slot, slot + 1), []
        for layer, store in enumerate(served.stores):
            kv = store.view(which).unpaged()
            k, v = kv.k[0, :length].transpose(0, 1), kv.v[0, :length].transpose(0, 1)
            if votes:
                rows = self._voted(layer, slot, kept)
            else:
                fixed = self._fixed[slot]
                rows = torch.cat([torch.arange(fixed), torch.arange(length - kept + fixed, length)])
                rows = rows.to(k.device).expand(len(k), -1)
            to = torch.arange(kept, device=k.device)
            assert self._turner is not None
            k, v = (x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1])) for x in (k, v))
            layers.append((self._turner.turned(k, to - rows), v))
        self.slots.truncate(slot, 0)
        counts = [0] * len(self.slots)
        counts[slot] = kept
        self.slots.append(counts)
        for store, (k, v) in zip(served.stores, layers, strict=True):
            store.write(k.transpose(0, 1)[None], v.transpose(0, 1)[None], which)

    def _voted(self, layer: int, slot: int, kept: int) -> Tensor:
        """Rows that the newest queries attend to most, with sinks and window, ascending, int64 ``[K, kept]``."""
        method, length = self.method, self.slots.lengths[slot]
        assert isinstance(method, snapkv.Method) and self._turner is not None
        kv = self.served.stores[layer].view(slice(slot, slot + 1)).unpaged()
        tail, ctx = self.served.newest_queries(layer), self.served.ctx(layer, self._turner.scales[layer])
        votes = torch.stack([method.votes(head, kv, tail, ctx)[0] for head in range(kv.k.shape[2])])[:, :length]
        votes = F.avg_pool1d(votes, method.kernel, stride=1, padding=method.kernel // 2)
        votes[:, : method.sinks] = torch.inf
        votes[:, max(0, length - method.window) :] = torch.inf
        return votes.topk(kept, dim=-1).indices.sort(-1).values

    # ---- a round ----------------------------------------------------------------------------------------------------

    def begin(self, before: Sequence[int]) -> None:
        """As of ``Drafter``."""
        self._before.copy_(torch.tensor(before)[:, None])
        if self.slots.device.type == "cuda":
            with on_device(self.slots.device):
                self.served.prepare(lambda: self.draft(torch.zeros_like(self._before).expand(-1, 2).clone(), 1, None))

    def draft(self, tokens: Tensor, gamma: int, choose: Choose | None) -> None:
        """As of ``Drafter``."""
        slots, served = self.slots, self.served
        with slots.unknown_lengths(slots.capacity), served.compiled_layers():
            for i in range(gamma):
                new = tokens[:, i : i + 1] if i else torch.cat([self._before, tokens[:, :1]], 1)
                slots.append(torch.full_like(slots.length, new.shape[1]), most=new.shape[1])
                logits = self._padded(served.forward(new.clamp(max=self._known - 1), served.over_all_keys)[:, -1])
                tokens[:, i + 1] = logits.argmax(-1) if choose is None else choose(logits, i)
            slots.length -= gamma + 1

    def keep(self, rows: Sequence[int]) -> None:
        """As of ``Drafter``."""
        self.slots.append(rows)
        self._read = [n + more for n, more in zip(self._read, rows, strict=True)]

    def _padded(self, logits: Tensor) -> Tensor:
        """Logits of the other model's tokens: of one tokenizer, models may have more or less unused ones."""
        missing = self.vocabulary - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[:, : self.vocabulary]


class Elsewhere:
    """A draft model of another process, which says what it drafted."""

    selects = False

    def bytes(self, sequences: int, page: int) -> int:
        return 0

    def open(self, sequences: int, page: int) -> None: ...

    def let_go(self) -> None: ...

    def close(self) -> None: ...

    def is_behind(self, slot: int, tokens: int) -> bool:
        return False

    def follow(self, slot: int, sequence: Sequence[int]) -> bool:
        return False

    def forget(self, slot: int) -> None: ...

    def begin(self, before: Sequence[int]) -> None: ...

    def draft(self, tokens: Tensor, gamma: int, choose: Choose | None) -> None: ...

    def keep(self, rows: Sequence[int]) -> None: ...


class Turner:
    """Turns keys to other positions, by the model's own rotary embedding.

    Attributes:
        scales: factor on q.k of each layer.
    """

    def __init__(self, served: ServedModel) -> None:
        """Raises ValueError for a model whose keys are not those of the other position then, or that has windows."""
        model = served.model
        self._embedding = getattr(model.base_model, "rotary_emb", None)
        self._rotate = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
        name = type(model).__name__
        if self._embedding is None or self._rotate is None:
            raise ValueError(f"draft=snapkv: {name} has no RoPE that keysift can turn; draft=streaming works")
        here, windows, self.scales = lone_keys(served, 0)
        if any(windows):
            raise ValueError(f"draft=snapkv: layers of {name} have windows of their own; draft=streaming works")
        there = lone_keys(served, CHECKED)[0]
        by = torch.full((1, 1), CHECKED, device=model.device)
        try:
            alike = True
            for k, wanted in zip(here, (k[0].transpose(0, 1).float() for k in there), strict=True):
                error = self.turned(k[0].transpose(0, 1), by.expand(k.shape[2], -1)).float() - wanted
                alike &= bool((error.norm(dim=-1) <= TURNED * wanted.norm(dim=-1)).all())
        except TypeError:  # an embedding that wants to know more
            alike = False
        if not alike:
            raise ValueError(f"draft=snapkv: the RoPE of {name} cannot be turned; draft=streaming works")

    def turned(self, k_KRD: Tensor, by: Tensor) -> Tensor:
        """Keys as they are so many positions later, int64 ``[K, R]``."""
        assert self._embedding is not None and self._rotate is not None
        cos, sin = self._embedding(k_KRD.float(), by)
        scaling = self._embedding(k_KRD.float(), torch.zeros_like(by))[0]
        k = k_KRD.float()[:, None]
        return self._rotate(k, k, cos / scaling, sin / scaling)[1][:, 0].to(k_KRD.dtype)


def lone_keys(served: ServedModel, position: int) -> tuple[list[Tensor], list[int | None], list[float]]:
    """What one and the same lone token has at a position: keys ``[1, 1, K, D]``, window and scale of each layer."""
    found: dict[int, tuple[Tensor, int | None, float]] = {}

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        found[layer] = k.clone(), window, scale
        return v.repeat_interleave(q.shape[2] // v.shape[2], 2)  # of one key: the same wherever it is

    one = torch.ones(1, 1, dtype=torch.int64, device=served.model.device)
    served.computed(one, one * position, attention)
    keys, windows, scales = zip(*(found[layer] for layer in sorted(found)), strict=True)
    return list(keys), list(windows), list(scales)


def budget_of(method: Decode, context: int | None) -> int:
    """Rows of a draft model's cache.

    Raises:
        ValueError: not for this method, or not so many.
    """
    if not isinstance(method, (streaming.Method, snapkv.Method)):
        raise ValueError(f"draft={describe(method)}: a draft model's cache is streaming or snapkv, with budget=ROWS")
    if method.budget is None:
        raise ValueError(f"draft={describe(method)}: give the rows of a draft model's cache, budget=ROWS")
    least = max(LEAST, 2 * (method.sinks + (method.window if isinstance(method, snapkv.Method) else 0)))
    if method.budget < least:
        raise ValueError(f"draft={describe(method)}: budget={method.budget} is too small; choose {least} or more")
    if context is not None and method.budget > context:
        raise ValueError(
            f"draft={describe(method)}: budget={method.budget}, and the draft model's context is {context:,} tokens;"
            " choose less"
        )
    return method.budget


def usual_cache(config: Any) -> Decode:
    """What a draft model's cache keeps if nothing else is asked for."""
    return streaming.Method(budget=min(DEFAULT_BUDGET, context_tokens(config) or DEFAULT_BUDGET))
