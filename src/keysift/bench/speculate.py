"""Self-speculation in ``keysift bench generate``: what is run, which drafted tokens stand, and what rounds take.

MagicDec's speed model (arXiv:2408.11049): with each drafted token accepted with probability alpha, a round of gamma
gives ``Omega = (1 - alpha^(gamma + 1)) / (1 - alpha)`` tokens and takes gamma draft steps and one pass over gamma + 1
tokens, so that a token takes ``(gamma * T_draft + T_verify) / Omega``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keysift.bench.steps import DENSE, WARMUP, timed_ms
from keysift.engine import LLM
from keysift.methods import describe, parse
from keysift.speculate import GAMMAS, agreeing, tokens_of_round

CHOOSING = 16  # untimed steps in which the engine's controller times plain steps and rounds of several gammas
TIMES = 11  # that a part of a round, or a step, is timed; the median counts


class Run(NamedTuple):
    """How a row decodes.

    Attributes:
        method: of decode.
        draft: decode method that drafts; None drafts nothing.
        gamma: tokens drafted at a time; None has the engine choose.
        other: whether a draft model drafts, whose cache keeps what ``draft`` says.
    """

    method: Any = DENSE
    draft: Any = None
    gamma: int | None = None
    other: bool = False

    def __str__(self) -> str:
        if not self.drafts:
            return describe(self.method)
        who = "draft model with " if self.other else "draft="
        return f"{who}{describe(self.draft)};gamma={'auto' if self.gamma is None else self.gamma}"

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted."""
        return self.draft is not None

    @property
    def keeps_for(self) -> Any:
        """The method for which side data are kept."""
        return self.method if self.draft is None or self.other else self.draft

    @property
    def gammas(self) -> tuple[int, ...]:
        """What may be drafted at a time."""
        if not self.drafts:
            return ()
        return GAMMAS if self.gamma is None else (self.gamma,)

    @property
    def most(self) -> int:
        """Tokens that a step of the engine gives a sequence at most."""
        return 1 + max(self.gammas, default=0)

    @property
    def warmup(self) -> int:
        """Steps before any is timed."""
        return CHOOSING if self.drafts and self.gamma is None else WARMUP


def sweep(
    drafts: Sequence[str], budgets: Sequence[int], gammas: Sequence[int | None], other: bool = False
) -> list[Run]:
    """Runs of every draft with every budget, if there are any, and every gamma; ``other`` has a draft model draft.

    Raises:
        ValueError: a SPEC that is wrong, without a budget to set, or with one set already.
    """
    methods = [method for spec in drafts for method in _with_budgets(spec, budgets)]
    return list(dict.fromkeys(Run(DENSE, method, gamma, other) for method in methods for gamma in gammas))


def _with_budgets(spec: str, budgets: Sequence[int]) -> list[Any]:
    method = parse(spec, "decode")
    if not budgets:
        return [method]
    if "budget" not in {field.name for field in fields(method)}:
        raise ValueError(f"--budget: the draft {spec} has no budget; leave --budget out, or take another draft")
    if "budget=" in spec.replace(" ", ""):
        raise ValueError(f"--draft {spec} and --budget: give the budget once")
    joined = "," if ":" in spec else ":"
    try:
        return [parse(f"{spec}{joined}budget={budget}", "decode") for budget in budgets]
    except ValueError as error:
        raise ValueError(f"--draft {spec} with --budget: {error}") from None


# ---- which drafted tokens stand -------------------------------------------------------------------------------------


class Round(NamedTuple):
    """What a round drafted for each sequence, and how many of these tokens stood."""

    gamma: int
    accepted: list[int]


class Accepting:
    """Says how many drafted tokens of a round stand, in place of the engine's ``agreeing``, and remembers it.

    What is assumed is drawn on the host from the seed, so that processes that share a model agree.
    """

    def __init__(self, assumed: float | None, seed: int) -> None:
        """``assumed``: probability with which a drafted token stands, whatever it is; None compares tokens."""
        self.assumed = assumed
        self._draws = torch.Generator().manual_seed(seed)
        self._counts: list[tuple[int, Tensor]] = []

    def __call__(self, drafted: Tensor, found: Tensor) -> Tensor:
        if self.assumed is None:
            counts = agreeing(drafted, found)
        else:
            stands = torch.rand(drafted.shape, generator=self._draws) < self.assumed
            counts = stands.long().cumprod(1).sum(1).to(found.device)
        self._counts.append((drafted.shape[1], counts))  # on the device: nothing waits for it now
        return counts

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def newest_gamma(self) -> int:
        """Of the last round."""
        return self._counts[-1][0]

    def since(self, first: int) -> list[Round]:
        """The rounds from number ``first`` on."""
        return [Round(gamma, counts.tolist()) for gamma, counts in self._counts[first:]]


def tokens_per_round(rounds: Sequence[Round]) -> float | None:
    """Tokens that a round gave a sequence, the pass's own included; mean. None without rounds."""
    counts = [count + 1 for each in rounds for count in each.accepted]
    return statistics.mean(counts) if counts else None


def acceptance(rounds: Sequence[Round]) -> float | None:
    """Accepted tokens over those that were looked at: after the first wrong one none is. None without rounds."""
    counts = [(count, min(count + 1, each.gamma)) for each in rounds for count in each.accepted]
    return sum(a for a, _ in counts) / sum(seen for _, seen in counts) if counts else None


def accepted_at(rounds: Sequence[Round]) -> list[float | None] | None:
    """By position in a draft: of the drafts whose earlier tokens were all accepted, the share whose token there was,
    None where no draft came so far; None without rounds."""
    shares = []
    for i in range(max((each.gamma for each in rounds), default=0)):
        reached = [count > i for each in rounds if each.gamma > i for count in each.accepted if count >= i]
        shares.append(statistics.mean(map(float, reached)) if reached else None)
    return shares or None


# ---- what rounds take -----------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """Median times of a drafted token, and of the pass over gamma + 1 tokens, in ms."""

    draft_ms: float
    verify_ms: float


def prepare(llm: LLM, run: Run) -> None:
    """Compile and capture rounds of all gammas that may be drafted; side data must exist, nothing may be at work."""
    work = llm._work
    for gamma in run.gammas:
        assert work._rounds is not None
        for metered in (True,) if work._count_every == 1 else (True, False):
            work._rounds.run(gamma, metered=metered)


def time_parts(llm: LLM, gamma: int) -> Parts:
    """Time the two parts of a round at the lengths that sequences have, in graphs of their own on a GPU; answers can
    go on afterwards. ``gamma + 1`` more rows must be reserved."""
    served, rounds = llm.served, llm._work._rounds
    assert rounds is not None
    on_gpu = llm.model.device.type == "cuda"
    rounds.run(gamma, metered=not on_gpu)
    bodies = {"draft": partial(rounds.draft_all, gamma, False), "verify": partial(rounds.verify_all, gamma)}
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(1 + TIMES):
        for name, body in bodies.items():
            times[name].append(timed_ms(partial(served.run, (name, gamma), body, not on_gpu), on_gpu))
    draft, verify = (statistics.median(times[name][1:]) for name in ("draft", "verify"))
    return Parts(draft / gamma, verify)


def model_speedup(plain_ms: float, parts: Parts, gamma: int, alpha: float) -> float:
    """Plain decoding's time of a token over that of speculation, by the speed model."""
    round_ms = gamma * parts.draft_ms + parts.verify_ms
    return plain_ms * tokens_of_round(gamma, alpha) / round_ms
