"""Logits to tokens: each sequence of a batch by settings and random numbers of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops.random import uniform
from keysift.types import check_seed


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued, and until when.

    The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token every time.
        top_p: of the likeliest tokens, the fewest that have this mass.
        top_k: the likeliest so many tokens; 0 for all.
        min_p: tokens at least so probable as this share of the likeliest one's probability.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens seen in prompt or answer
            (arXiv:1909.05858).
        seed: of the draws; the same request with the same seed gets the same tokens, whatever else is in the batch.
        stop: strings that end an answer, which goes up to the first of them.
        stop_token_ids: tokens that end it, besides the model's own end-of-sequence tokens.
        ignore_eos: go on past end-of-sequence tokens.
        logprobs: report the log probability of each token and of the so many likeliest ones, by the model's own logits;
            None for none.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        rules = (
            ("max_new_tokens", isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature < math.inf, "0, or 1e-6 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", isinstance(self.top_k, int) and 0 <= self.top_k < 2**31, "1 or more, or 0 for all"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0"),
            ("stop", _tuple_of(str, self.stop) and all(self.stop), "a tuple of strings that are not empty"),
            ("stop_token_ids", _tuple_of(int, self.stop_token_ids), "a tuple of token ids"),
            (
                "logprobs",
                self.logprobs is None or (isinstance(self.logprobs, int) and 0 <= self.logprobs <= MOST_LOGPROBS),
                f"0 to {MOST_LOGPROBS}",
            ),
        )
        for name, holds, able in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: choose {able}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as the model's logits say."""
        return self.temperature == 0 and self.repetition_penalty == 1


MOST_LOGPROBS = 100


def _tuple_of(kind: type, value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, kind) for x in value)


class Logprobs(NamedTuple):
    """Of one token of an answer.

    Attributes:
        token: log probability of the token that was taken.
        top: of the likeliest tokens, by their ids, the likeliest first.
    """

    token: float
    top: dict[int, float]


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits ``[B, V]``, those of tokens ``seen`` (bool ``[B, V]``) made less likely by ``penalty``, fp32 ``[B]``."""
    factor = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits)


def likeliest(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities of the tokens that may be drawn, 0 for others.

    Args:
        logits: fp32 ``[B, V]``.
        temperature, top_p, min_p: fp64 ``[B]``; temperature is above 0.
        top_k: int64 ``[B]``; 0 for all.

    Returns:
        Probabilities in falling order, fp64 ``[B, V]``, and the tokens they belong to, int64 ``[B, V]``.
    """
    ordered, token = torch.sort(logits, dim=-1, descending=True, stable=True)
    p = (ordered.double() / temperature[:, None]).softmax(-1)
    rank = torch.arange(p.shape[1], device=p.device)
    p = p.masked_fill((rank >= top_k[:, None]) & (top_k > 0)[:, None], 0)
    p = p / p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill((before >= top_p[:, None]) & (top_p < 1)[:, None] & (rank > 0), 0)
    p = p.masked_fill(p < min_p[:, None] * p[:, :1], 0)
    return p / p.sum(-1, keepdim=True), token


def drawn(p: Tensor, token: Tensor, u: Tensor) -> Tensor:
    """Tokens ``[B]`` by uniform numbers ``u`` in (0, 1), ``[B]``, of what ``likeliest`` returns."""
    reached = p.cumsum(-1)
    place = torch.searchsorted(reached, (u.double() * reached[:, -1])[:, None])
    last = ((p > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return token.gather(-1, torch.minimum(place, last))[:, 0]


class Sampler:
    """The settings of every slot's request, where the logits are."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.device, self.vocabulary = device, vocabulary
        self._params: list[SamplingParams | None] = [None] * slots
        self._seen: Tensor | None = None  # [slots, V], once a request has a penalty
        self._reals = torch.zeros(4, slots, dtype=torch.float64, device=device)  # temperature, top_p, min_p, penalty
        self._wholes = torch.zeros(2, slots, dtype=torch.int64, device=device)  # top_k, seed

    def begin(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Have ``slot`` continue ``prompt``."""
        self._params[slot] = params
        reals = params.temperature, params.top_p, params.min_p, params.repetition_penalty
        self._reals[:, slot] = torch.tensor(reals, dtype=torch.float64, device=self.device)
        self._wholes[:, slot] = torch.tensor((params.top_k, params.seed), device=self.device)
        if params.repetition_penalty != 1 and self._seen is None:
            self._seen = torch.zeros(len(self._params), self.vocabulary, dtype=torch.bool, device=self.device)
        if self._seen is not None:
            self._seen[slot] = False
            self._seen[slot, torch.tensor(prompt, device=self.device)] = True

    def end(self, slot: int) -> None:
        self._params[slot] = None
        self._reals[:, slot] = 0

    def tokens(self, logits: Tensor, slots: Sequence[int], places: Sequence[int]) -> Tensor:
        """The next token of some slots, int64 ``[n]``.

        Args:
            logits: of these slots, fp32 ``[n, V]``.
            places: how many tokens each of them has so far; with its seed, that is what a draw depends on.
        """
        which = torch.tensor(slots, device=self.device)
        chosen = self._chosen(logits, slots, places, None if self._seen is None else self._seen[which])
        if self._seen is not None:
            self._seen[which, chosen] = True
        return chosen

    def tokens_after(self, logits: Tensor, drafted: Tensor, slots: Sequence[int], places: Sequence[int]) -> Tensor:
        """What some slots would get after each of their drafted tokens, and before the first, int64 ``[n, T + 1]``.

        Args:
            logits: there, fp32 ``[n, T + 1, V]``.
            drafted: int64 ``[n, T]``.
            places: of the first.
        """
        which = torch.tensor(slots, device=self.device)
        seen = None if self._seen is None else self._seen[which]
        out = []
        for i in range(logits.shape[1]):
            if seen is not None and i:
                seen = seen.scatter(1, drafted[:, i - 1 : i], True)
            out.append(self._chosen(logits[:, i], slots, [place + i for place in places], seen))
        return torch.stack(out, 1)

    def note(self, slot: int, tokens: Sequence[int]) -> None:
        """A slot got tokens by ``tokens_after``."""
        if self._seen is not None:
            self._seen[slot, torch.tensor(tokens, device=self.device)] = True

    def guess(self, logits: Tensor, places: Tensor) -> Tensor:
        """Tokens of all slots for logits ``[slots, V]``, by the random numbers of their places, penalties apart; never
        waits for the device."""
        return self._drawn(logits, self._reals, self._wholes, places)

    def _chosen(self, logits: Tensor, slots: Sequence[int], places: Sequence[int], seen: Tensor | None) -> Tensor:
        params = [self._params[slot] for slot in slots]
        assert all(params)
        chosen = logits.argmax(-1)
        apart = [i for i, x in enumerate(params) if x is not None and not x.greedy]
        if apart:
            index = torch.tensor(apart, device=self.device)
            which = torch.tensor([slots[i] for i in apart], device=self.device)
            reals, of_apart = self._reals[:, which], logits[index]
            if seen is not None:
                of_apart = penalised(of_apart, seen[index], reals[3])
            there = torch.tensor([places[i] for i in apart], device=self.device)
            chosen[index] = self._drawn(of_apart, reals, self._wholes[:, which], there)
        return chosen

    def _drawn(self, logits: Tensor, reals: Tensor, wholes: Tensor, places: Tensor) -> Tensor:
        temperature, top_p, min_p, _ = reals
        top_k, seed = wholes
        cold = temperature == 0
        p, token = likeliest(logits, temperature.masked_fill(cold, 1), top_k, top_p, min_p)
        return torch.where(cold, token[:, 0], drawn(p, token, uniform(seed, places)))


def logprobs_of(logits: Tensor, token: int, top: int) -> Logprobs:
    """The log probability of a token and of the ``top`` likeliest, by logits ``[V]``."""
    log_p = logits.double().log_softmax(-1)
    values, ids = log_p.topk(min(top, len(log_p)))
    return Logprobs(float(log_p[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))
