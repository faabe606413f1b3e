"""A request of the engine: its prompt and settings, how far its answer is, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from keysift.meter import Meter
from keysift.sampling import Logprobs, SamplingParams
from keysift.speculate import Acceptance
from keysift.text import Detokenizer
from keysift.types import Stats, one_of

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
    """What a request took. None where it does not apply; see ``types.Stats`` for what was read.

    Attributes:
        prompt_tokens, new_tokens: of the request.
        reused_tokens: of the prompt, that were found read.
        ttft_s: from the call to the first token, waiting included.
        tokens_per_s: after the first.
        prefill_density: share of the causal triangle of what was read of the prompt.
        kept_fraction: share of the cached keys read by new tokens, in the steps that were counted.
        bytes_per_step: bytes of keys, values and side data that a new token read.
        prefill_error, decode_error: of attention outputs against dense ones, where measured.
        accepted_per_round: of drafted tokens, in rounds of speculation.
    """

    prompt_tokens: int
    new_tokens: int
    reused_tokens: int
    ttft_s: float | None
    tokens_per_s: float | None
    prefill_density: float | None
    kept_fraction: float | None
    bytes_per_step: float | None = None
    prefill_error: float | None = None
    decode_error: float | None = None
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
    question: str = "sparse"
    question_tokens: int | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    reused: int = 0
    first_token: float | None = None
    last_token: float | None = None
    told_end: bool = False
    counted: bool = False  # a step of it was
    acceptance: Acceptance = field(default_factory=Acceptance)
    rounds: int = 0
    accepted: int = 0  # drafted tokens

    @property
    def rows(self) -> int:
        """Rows that it may need: its last token is never read."""
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def context(self) -> int:
        """Tokens of the prompt that are the prefill method's: all before the question, but one at least."""
        tokens = len(self.prompt)
        return tokens if self.question == "sparse" else max(1, tokens - (self.question_tokens or 0))

    @property
    def read_as_prompt(self) -> int:
        """Tokens of the prompt that are read in parts; the rest is a token a step."""
        return self.context if self.question == "decode" else len(self.prompt)

    def output(self, reason: str, read: Stats) -> RequestOutput:
        """What came of it, which read so much."""
        ids = self.text.token_ids
        ttft, rate = None, None
        if self.first_token is not None and self.last_token is not None:
            ttft, seconds = self.first_token - self.submitted, self.last_token - self.first_token
            rate = (len(ids) - 1) / seconds if seconds > 0 else None
        counts = len(self.prompt), len(ids), self.reused, ttft, rate
        of_steps = read.kept_fraction, read.bytes_per_step, read.prefill_error, read.decode_error
        accepted = self.accepted / self.rounds if self.rounds else None
        stats = GenerationStats(*counts, read.density, *of_steps, accepted)
        logprobs = None if self.params.logprobs is None else self.logprobs
        return RequestOutput(self.index, self.text.text, ids, reason, logprobs, stats)


QUESTIONS = ("sparse", "dense", "decode")


def check_question(question: str, question_tokens: int | None) -> None:
    """Raise ValueError for an unknown way of reading the question, or one without its length."""
    one_of("question", question, QUESTIONS)
    if question_tokens is not None and (not isinstance(question_tokens, int) or question_tokens < 1):
        raise ValueError(f"question_tokens={question_tokens}: choose 1 or more")
    if question != "sparse" and question_tokens is None:
        raise ValueError(f"question={question} needs question_tokens=N: the last N tokens of a prompt are its question")
