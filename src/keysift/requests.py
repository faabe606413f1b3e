"""A request of the engine: its prompt and settings, how far its answer is, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from keysift.meter import Meter
from keysift.sampling import Logprobs, SamplingParams
from keysift.text import Detokenizer

OnText = Callable[["Delta"], object]


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer grew by.

    Attributes:
        index: of the request.
        text: that became certain; may be empty.
        token_ids: that came.
        finished: whether this is the end.
    """

    index: int
    text: str
    token_ids: list[int]
    finished: bool


class GenerationStats(NamedTuple):
    """What a request took. None where it does not apply.

    Attributes:
        prompt_tokens, new_tokens: of the request.
        reused_tokens: of the prompt, that were found read.
        ttft_s: from the call to the first token, waiting included.
        tokens_per_s: after the first.
        prefill_density: share of the causal triangle of what was read of the prompt.
        kept_fraction: share of the cached keys read by new tokens; on a GPU a sample of steps is counted.
        accepted_per_round: of drafted tokens.
    """

    prompt_tokens: int
    new_tokens: int
    reused_tokens: int
    ttft_s: float | None
    tokens_per_s: float | None
    prefill_density: float | None
    kept_fraction: float | None
    accepted_per_round: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """An answer.

    Attributes:
        index: of the request, in the order of submission.
        text: without special tokens, up to a stop string; empty without a tokenizer.
        token_ids: all new tokens, the one that ended it included.
        finish_reason: "eos", "stop" (a stop string or stop token), "length", or "aborted".
        logprobs: of each new token, if asked for.
        stats: what it took.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Logprobs] | None
    stats: GenerationStats


@dataclass(eq=False)
class Request:
    """A prompt, and how far its answer is."""

    index: int
    prompt: list[int]
    params: SamplingParams
    text: Detokenizer
    on_text: OnText | None
    submitted: float
    logprobs: list[Logprobs] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    reused: int = 0
    first_token: float | None = None
    last_token: float | None = None
    told_end: bool = False

    @property
    def rows(self) -> int:
        """Rows that it may need: its last token is never read."""
        return len(self.prompt) + self.params.max_new_tokens
