"""Self-speculation: how many tokens to draft before the next pass over all keys (MagicDec, arXiv:2408.11049).

With each drafted token accepted with probability alpha, a round of gamma gives
``(1 - alpha^(gamma + 1)) / (1 - alpha)`` tokens, the pass's own included, and takes gamma draft steps and one pass over
gamma + 1 tokens. A token is accepted if it is the one that plain decoding would have taken, sampled ones too: their
random numbers belong to their places. So the tokens are those of plain decoding, whatever is drafted and how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from keysift.methods import describe, parse
from keysift.types import Decode, one_of

MOST = 8  # tokens drafted at a time
REFRESHES = "verify", "never"
GAMMAS = (2, 4, 7)  # which are worth trying: within some 2% of the best one at any acceptance
PRIOR = 0.75  # acceptance that is assumed before any is known
WEIGHT = 4.0  # in tokens, of what was assumed
FADES = 0.98  # a round, of what was seen
SLOWER = {"cuda": 0.05, "cpu": 0.35}  # what a token more adds to a pass, as a share of a step, before it is measured
AGAIN = 256  # rounds after which a plain step is timed again, and steps after which drafting is tried again
WORTH = 1.03  # times plain decoding's speed that a round has to promise


def check_refresh(refresh: str, draft: Decode | None, model: bool) -> None:
    """Raise ValueError for a ``refresh`` that is not "verify" or "never", or where nothing selects again anyway."""
    one_of("refresh", refresh, REFRESHES)
    if refresh != REFRESHES[0] and (draft is None or model):
        raise ValueError(f"refresh={refresh}: needs a draft over the model's own keys, such as draft=quest:budget=512")


def check_draft(draft: Decode | None, decode: Decode, gamma: object, model: bool = False) -> None:
    """Raise ValueError for speculation that cannot be: beside a sparse decode method, or of a wrong length; ``model``
    says whether another model drafts."""
    if gamma is not None and (not isinstance(gamma, int) or isinstance(gamma, bool) or not 1 <= gamma <= MOST):
        raise ValueError(f"gamma={gamma}: choose 1 to {MOST}, or leave it out to have it chosen")
    if draft is None and not model:
        if gamma is not None:
            raise ValueError(f"gamma={gamma}: needs a draft, such as draft=streaming:budget=512")
    elif decode != parse("dense", "decode"):
        what = "a draft model" if draft is None else f"draft={describe(draft)}"
        raise ValueError(f"{what} and decode={describe(decode)}: drafts are checked against all keys; leave decode out")


@dataclass
class Acceptance:
    """How often a sequence's drafted tokens were accepted of late."""

    accepted: float = PRIOR * WEIGHT
    seen: float = WEIGHT

    def note(self, accepted: int, drafted: int) -> None:
        """Tokens after the first one that is wrong say nothing."""
        self.accepted = self.accepted * FADES + accepted
        self.seen = self.seen * FADES + min(accepted + 1, drafted)

    def forget(self) -> None:
        """Assume again."""
        self.accepted, self.seen = PRIOR * WEIGHT, WEIGHT

    @property
    def rate(self) -> float:
        return self.accepted / self.seen


def agreeing(drafted: Tensor, found: Tensor) -> Tensor:
    """How many tokens of a draft are right, up to the first that is not, int64 ``[B]``.

    Args:
        drafted: int64 ``[B, gamma]``.
        found: what plain decoding takes at each place, and at the one after them, int64 ``[B, gamma + 1]``.
    """
    return (drafted == found[:, :-1]).long().cumprod(1).sum(1)


def tokens_of_round(gamma: int, alpha: float) -> float:
    """Expected tokens, the one of the pass itself included."""
    return gamma + 1 if alpha >= 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


@dataclass
class Controller:
    """Chooses how many tokens to draft, so that most tokens a second come.

    Attributes:
        draft_cost: of a draft step, as a share of a plain one, before either was measured.
        device: "cuda" or "cpu".
        fixed: always draft so many; None to choose.
    """

    draft_cost: float
    device: str
    fixed: int | None = None
    seconds: dict[int, float] = field(default_factory=dict)  # of a round by its gamma; of a plain step by 0
    _batch: int = 0
    _was: bool = False  # whether something was drafted the last time
    _alike: int = 0  # choices in a row that were alike in that
    _patience: int = AGAIN  # plain steps until drafting is tried again, twice as many each time that it does not pay

    def choose(self, acceptances: Iterable[Acceptance]) -> int:
        """Tokens to draft next; 0 for a plain step.

        Args:
            acceptances: of the sequences at hand.
        """
        if self.fixed is not None:
            return self.fixed
        known = list(acceptances)
        if len(known) != self._batch:  # all take another time now
            self._batch = len(known)
            self.seconds.clear()
        plain = self.seconds.get(0)
        if plain is None:
            return 0
        best, promised = self._best(known, plain)
        if not self._was and self._alike >= self._patience:
            self._alike, self._patience = 0, 2 * self._patience
            self.seconds = {0: plain}  # it may be another by now, acceptance too
            for acceptance in known:
                acceptance.forget()
            promised = self._best(known, plain)[1]
            best = min(GAMMAS)
        gamma = best if promised >= (1.0 if self._was else WORTH) else 0
        if self._was and self._alike >= AGAIN:  # how long a plain step takes by now
            gamma, self._patience = 0, AGAIN
        self._alike = self._alike + 1 if bool(gamma) == self._was else 0
        self._was = bool(gamma)
        return gamma

    def _best(self, known: Sequence[Acceptance], plain: float) -> tuple[int, float]:
        """The gamma of most tokens a second, and those as a multiple of plain decoding's."""
        cost = {gamma: self._of(gamma, plain) / plain for gamma in GAMMAS}
        promised = {g: sum(tokens_of_round(g, x.rate) for x in known) / len(known) / cost[g] for g in GAMMAS}
        best = max(GAMMAS, key=lambda g: promised[g])
        return best, promised[best]

    def note(self, gamma: int, seconds: float) -> None:
        """A round, or a plain step, took so long."""
        before = self.seconds.get(gamma)
        self.seconds[gamma] = seconds if before is None else 0.8 * before + 0.2 * seconds

    def _of(self, gamma: int, plain: float) -> float:
        """Seconds of a round: measured, or by another one that was, or as assumed."""
        if gamma in self.seconds:
            return self.seconds[gamma]
        assumed = {g: plain * (g * self.draft_cost + 1 + g * SLOWER.get(self.device, 0.35)) for g in GAMMAS}
        known = [g for g in GAMMAS if g in self.seconds]
        nearest = min(known, key=lambda g: abs(g - gamma), default=None)
        return assumed[gamma] * (1.0 if nearest is None else self.seconds[nearest] / assumed[nearest])
