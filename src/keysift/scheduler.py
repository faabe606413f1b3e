"""Which prompt is read when, and which answers get a token: continuous batching over a served model's slots."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keysift.capacity import draft_cost, slots_for
from keysift.hf.draft_model import DraftModel, Elsewhere
from keysift.hf.parallel import all_or_none, is_dealt_out, number_of_first, total
from keysift.hf.rounds import OwnDraft, Rounds
from keysift.hf.served import ServedModel
from keysift.meter import Totals
from keysift.prefixes import Prefixes
from keysift.requests import Delta, Request, RequestOutput
from keysift.sampling import Sampler, logprobs_of
from keysift.speculate import MOST, Controller, agreeing


class Room(NamedTuple):
    """What is given to sequences: rows a page, tokens of a sequence, bytes in all; None for what there is."""

    page: int
    max_length: int | None
    kv_memory: int | None


class Scheduler:
    """Requests at work.

    Attributes:
        slots: of the sequences.
        max_length: tokens that a sequence may have.
        prefixes: what prompts may share; None if nothing.
        waiting: requests that have no slot yet.
        running: those that have one, by slot; the one that is being read included.
        done: answers that nobody was told of yet.
        news: what answers grew by, likewise.
        accepted: how many drafted tokens of a round stand; a benchmark may assume another share of them.
    """

    def __init__(
        self,
        served: ServedModel,
        room: Room,
        max_batch: int,
        eos: Iterable[int],
        prefill_chunk: int | None,
        reuse_prefixes: bool,
        count_every: int,
        gamma: int | None = None,
        draft_model: DraftModel | Elsewhere | None = None,
        refreshes: bool = True,
    ) -> None:
        """Make room; raises ValueError where not even one sequence fits.

        Args:
            served: the model.
            room: for its sequences.
            max_batch: sequences at a time.
            eos: tokens that end an answer.
            prefill_chunk, reuse_prefixes, count_every, gamma: as of ``LLM``.
            draft_model: who drafts, if not the model itself by its draft method.
            refreshes: whether the draft method selects in each round.
        """
        self.served, self.max_batch, self.prefill_chunk = served, max_batch, prefill_chunk
        self.draft_model, self._refreshes = draft_model, refreshes
        self._eos, self._reuses, self._count_every = frozenset(eos), reuse_prefixes, count_every
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.done: list[RequestOutput] = []
        self.news: list[tuple[Request, Delta]] = []
        self.accepted = agreeing
        self._reading: int | None = None
        self._no_room_for: Request | None = None  # until another one ends
        self._steps, self._fixed_gamma = 0, gamma
        self._dealt_out = is_dealt_out(served.model)
        self.sampler = Sampler(max_batch, served.vocabulary, served.model.device)
        self.open(room)

    def open(self, room: Room) -> None:
        """Make room for sequences; nothing may be at work."""
        self.room, self._opened = room, False
        drafts = self.draft_model is not None or self.served.draft_method is not None
        if self.draft_model is not None:
            room = self._open_draft_model(self.draft_model, room)
        self.slots, self.max_length = slots_for(self.served, self.max_batch, *room, spare=MOST if drafts else 0)
        self.served.open(self.slots, rounds=drafts)
        chunk = self.prefill_chunk if self._reuses else None
        self.prefixes = None if chunk is None else Prefixes(self.slots, chunk)
        self._rounds: Rounds | None = None
        self._controller: Controller | None = None
        if drafts:
            drafter = self.draft_model or OwnDraft(self.served, MOST, self._refreshes)
            self._rounds = Rounds(self.served, MOST, self.sampler.guess, drafter)
            other = (drafter.served, drafter.rows) if isinstance(drafter, DraftModel) else None
            cost = draft_cost(self.served, self.max_batch, self.max_length, other)
            self._controller = Controller(cost, self.served.model.device.type, self._fixed_gamma)
            if isinstance(drafter, DraftModel):
                self.slots.beside = (drafter.slots,)
        self._opened = True

    def _open_draft_model(self, draft_model: DraftModel | Elsewhere, room: Room) -> Room:
        """Make its room; returns what is left for the model."""

        def do() -> Room:
            needed = draft_model.bytes(self.max_batch, room.page)
            if room.kv_memory is not None and needed >= room.kv_memory:
                raise ValueError(f"kv_memory={room.kv_memory}: the draft model's cache needs {needed:,} bytes of it")
            draft_model.open(self.max_batch, room.page)
            return room if room.kv_memory is None else room._replace(kv_memory=room.kv_memory - needed)

        return all_or_none(do) if self._dealt_out else do()

    def switch(self, prefill: Any, decode: Any, draft: Any, room: Room) -> None:
        """Other methods and other room, without prefixes that were kept; raises as ``open``, and all else is as it was
        then."""
        served = self.served
        before = served.prefill_method, served.decode_method, served.draft_method, self.room
        if (prefill, decode, draft, room) == before and self._opened:
            return
        self._opened = False
        served.let_go()
        if self.draft_model is not None:
            self.draft_model.let_go()
        try:
            served.prefill_method, served.decode_method, served.draft_method = prefill, decode, draft
            self.open(room)
        except BaseException:
            served.prefill_method, served.decode_method, served.draft_method, room = before
            self.open(room)
            raise
        if served.slots.device.type == "cuda":
            served.warm_up(metered=self._count_every == 1)

    @property
    def unfinished(self) -> int:
        """Requests that are waiting or running, and answers that nobody was told of yet."""
        return len(self.waiting) + len(self.running) + len(self.done)

    def step(self) -> None:
        """Read a part of a prompt if one waits and a slot is free, and have one more token of every answer."""
        reads = self._reading is not None or self._admit()
        if reads:
            self._read()
        answering = [slot for slot in self.running if slot != self._reading]
        if answering:
            self._answer(sorted(answering), alone=not reads)

    def abort(self, index: int) -> tuple[Request, RequestOutput, Delta] | None:
        """End a request now; None if it is not at work."""
        for request in list(self.waiting):
            if request.index == index:
                self.waiting.remove(request)
                return request, *self._finish(request, "aborted", None)
        for slot, request in list(self.running.items()):
            if request.index == index:
                return request, *self._finish(request, "aborted", slot)
        return None

    def _admit(self) -> bool:
        """Give the first request that waits a slot, if it fits now."""
        slot = next((s for s in range(self.max_batch) if s not in self.running), None)
        if not self.waiting or slot is None or self._no_room_for is self.waiting[0]:
            return False
        request, slots = self.waiting[0], self.slots
        pages = -(-request.rows // slots.page)
        if self.prefixes is not None:
            tail = max(1, self.served.keeps_for.tail)  # of which the decode method wants to see the queries
            found = self.prefixes.find(request.prompt, request.context - tail)
            slots.begin_with(slot, found)  # theirs now, whatever has to make room
            pages -= len(found)
            fits = self.prefixes.make_room(pages)
        else:
            fits = pages <= slots.free_pages
        if not fits:
            slots.free(slot)
            self._no_room_for = request
            return False
        slots.reserve(slot, request.rows)
        request.reused = slots.lengths[slot]
        self.waiting.popleft()
        self.running[slot], self._reading = request, slot
        self.served.meter.begin(slot)
        self.sampler.begin(slot, request.params, request.prompt)
        return True

    def _read(self) -> None:
        """Read the next part of a prompt; the last gives the first token."""
        slot = self._reading
        assert slot is not None
        request = self.running[slot]
        done = self.slots.lengths[slot]
        dense = done >= request.context
        parts = request.read_as_prompt if dense else request.context
        end = min(parts, done + (self.prefill_chunk or parts))
        last = end == request.read_as_prompt
        logits = self.served.read(slot, request.prompt[done:end], request.meter, last, dense)
        if not last:
            return
        self._reading = None
        if self.prefixes is not None:
            self.prefixes.keep(slot, request.prompt[: request.context])
        if end < len(request.prompt):
            self.served.activate(slot, request.prompt[end])
            return
        token = self.sampler.tokens(logits[None], [slot], [0])
        self.served.activate(slot, token[0])
        self._take(slot, token.tolist(), logits[None])

    def _answer(self, slots: list[int], alone: bool) -> None:
        """A decode step, or a round of speculation; what reads beside it may still be at work on a GPU."""
        requests = [self.running[slot] for slot in slots]
        gamma = self._gamma(requests, slots)
        begin = time.perf_counter()
        timed = self._speculate(slots, gamma) if gamma else self._step_all(slots)
        if self._controller is not None and timed and alone:
            self._controller.note(gamma, time.perf_counter() - begin)

    def _gamma(self, requests: list[Request], slots: list[int]) -> int:
        """Tokens to draft; 0 for a plain step."""
        if self._controller is None:
            return 0
        rows = [self.slots.lengths[slot] for slot in slots]
        if any(n < len(r.prompt) for n, r in zip(rows, requests, strict=True)):
            return 0  # a question is still being read
        gamma = self._controller.choose(request.acceptance for request in requests)
        return number_of_first(gamma) if self._dealt_out else gamma

    def _step_all(self, slots: list[int]) -> bool:
        """One more token of each; returns whether it took the time that it will take."""
        requests = [self.running[slot] for slot in slots]
        counted = self._rounds is None and self._counts(requests)  # else what drafts read is counted
        ready = self.served.ready(("step", counted))
        self.served.step(metered=counted)
        slots = self._feed(slots)
        requests = [self.running[slot] for slot in slots]
        asked = any(not r.params.greedy or r.params.logprobs is not None for r in requests)
        logits = self.served.logits[slots] if asked else None
        if logits is not None and any(not r.params.greedy for r in requests):
            tokens = self.sampler.tokens(logits, slots, [len(r.text.token_ids) for r in requests])
            self.served.ids[slots, 0] = tokens
            known = tokens.tolist()
        else:
            all_known = self.served.ids[:, 0].tolist()
            known = [all_known[slot] for slot in slots]
        for i, (slot, token) in enumerate(zip(slots, known, strict=True)):
            self._take(slot, [token], None if logits is None else logits[i : i + 1])
        return ready

    def _speculate(self, slots: list[int], gamma: int) -> bool:
        """A round of speculation; returns as ``_step_all``."""
        assert self._rounds is not None
        requests = [self.running[slot] for slot in slots]
        places, before, begins = [0] * self.max_batch, [0] * self.max_batch, False
        for slot, request in zip(slots, requests, strict=True):
            ids = request.text.token_ids
            places[slot], before[slot] = len(ids), ids[-2] if len(ids) > 1 else request.prompt[-1]
            if self.draft_model is not None and self.draft_model.is_behind(slot, len(request.prompt) + len(ids)):
                begins |= self.draft_model.follow(slot, request.prompt + ids)
        greedy = all(r.params.greedy for r in requests)
        every = self._rounds.run(gamma, None if greedy else places, self._counts(requests), before)
        which = torch.tensor(slots, device=every.device)
        drafted = self._rounds.tokens[which, 1 : gamma + 1]
        if greedy:
            found = every.argmax(-1)[which]
        else:
            found = self.sampler.tokens_after(every[which], drafted, slots, [places[slot] for slot in slots])
        accepted = self.accepted(drafted, found)
        newest = self.served.ids[:, 0].clone()
        newest[which] = found.gather(1, accepted[:, None])[:, 0]
        known = torch.cat([found, accepted[:, None]], 1).tolist()
        rows = [0] * self.max_batch
        for slot, (*_, count) in zip(slots, known, strict=True):
            rows[slot] = count + 1
        self._rounds.keep(rows, newest)
        for slot, request, (*tokens, count) in zip(slots, requests, known, strict=True):
            request.rounds, request.accepted = request.rounds + 1, request.accepted + count
            request.acceptance.note(count, gamma)
            self.sampler.note(slot, tokens[: count + 1])
            self._take(slot, tokens[: count + 1], None if request.params.logprobs is None else every[slot])
        return self._rounds.was_ready and not begins

    def _counts(self, requests: list[Request]) -> bool:
        """Whether what the next step reads is counted: of so many one, and the first of each answer."""
        counts = self._steps % self._count_every == 0 or not all(r.counted for r in requests)
        self._steps += 1
        for request in requests:
            request.counted |= counts
        return counts

    def _feed(self, slots: list[int]) -> list[int]:
        """Give slots that are still at their questions the next token of those; returns the others."""
        answering = []
        for slot in slots:
            request, rows = self.running[slot], self.slots.lengths[slot]
            if rows < len(request.prompt):
                self.served.activate(slot, request.prompt[rows])
            else:
                answering.append(slot)
        return answering

    def _take(self, slot: int, tokens: list[int], logits: Tensor | None) -> None:
        """Give a request its new tokens up to the one that ends it; ``logits`` are what they were of, ``[T, V]``."""
        request, new = self.running[slot], ""
        request.last_token = time.perf_counter()
        request.first_token = request.first_token or request.last_token
        for i, token in enumerate(tokens):
            if request.params.logprobs is not None and logits is not None:
                request.logprobs.append(logprobs_of(logits[i], token, request.params.logprobs))
            new += request.text.add(token)
            if reason := self._reason(request, token):
                out, delta = self._finish(request, reason, slot, new, tokens[: i + 1])
                self.done.append(out)
                self.news.append((request, delta))
                return
        self.news.append((request, Delta(request.index, new, tokens, False)))

    def _reason(self, request: Request, token: int) -> str | None:
        """Why an answer ends with a token, if it does."""
        params = request.params
        if request.text.stopped or token in params.stop_token_ids:
            return "stop"
        if token in self._eos and not params.ignore_eos:
            return "eos"
        return "length" if len(request.text.token_ids) >= params.max_new_tokens else None

    def _finish(
        self, request: Request, reason: str, slot: int | None, new: str = "", came: Sequence[int] = ()
    ) -> tuple[RequestOutput, Delta]:
        """Let go of a request's slot; what came of it, and the last of its text."""
        new += request.text.end()
        read = request.meter.totals()
        if slot is not None:
            self._no_room_for = None
            of_steps = self.served.meter.totals(slot)
            if self._rounds is not None:  # whose errors nobody sees
                of_steps = of_steps._replace(decode_error=0.0, decode_errors=0.0)
            read = read.plus(of_steps)
            self.served.deactivate(slot)
            self.sampler.end(slot)
            if self._rounds is not None:
                self._rounds.drafter.forget(slot)
            self.slots.free(slot)
            del self.running[slot]
            if self._reading == slot:
                self._reading = None
        if self._dealt_out:  # every process counts what its heads read; an abort may be one's alone
            read = Totals(*total(read))._replace(steps=read.steps) if reason != "aborted" else Totals()
        return request.output(reason, read.stats()), Delta(request.index, new, [*came], True)
