"""What the pocket model is trained on, by length and progress, as batches of tokens and weights; and its test samples."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pocket_data import (
    W_ANSWER,
    W_PREFIX,
    W_REPEAT,
    W_REST,
    Quiz,
    Tools,
    common_words,
    frequent_words,
    needles,
    tracking,
    weave,
)
from pocket_text import HAYSTACKS, Library, Pieces
from tokenizers import Tokenizer

# Until this share of the time: how often each length is drawn.
SCHEDULE = (
    (0.12, {256: 1.0}),
    (0.26, {1024: 0.80, 256: 0.20}),
    (0.44, {4096: 0.70, 1024: 0.25, 256: 0.05}),
    (0.66, {16384: 0.60, 4096: 0.25, 1024: 0.15}),
    (1.01, {32768: 0.50, 16384: 0.20, 4096: 0.20, 1024: 0.10}),
)
# At most this length: how often each task is drawn.
MIXTURE = (
    (
        256,
        {"recall": 0.28, "spans": 0.15, "needle": 0.25, "track": 0.18, "values": 0.04, "queries": 0.04, "common": 0.06},
    ),
    (
        1024,
        {
            "recall": 0.07,
            "spans": 0.07,
            "needle": 0.21,
            "track": 0.14,
            "values": 0.10,
            "queries": 0.05,
            "plain": 0.08,
            "common": 0.20,
            "frequent": 0.08,
        },
    ),
    (
        1 << 20,
        {
            "recall": 0.03,
            "spans": 0.04,
            "needle": 0.24,
            "track": 0.14,
            "values": 0.13,
            "queries": 0.05,
            "plain": 0.08,
            "common": 0.22,
            "frequent": 0.07,
        },
    ),
)


def lengths_at(progress: float) -> dict[int, float]:
    """The lengths drawn at this share of the training time."""
    return next(mix for until, mix in SCHEDULE if progress < until)


# ---- drills ------------------------------------------------------------------------------------------------------

Row = tuple[list[int], list[float]]
RECALL_FORMS = ("{k} {v}", "{k} is {v}", "{k}: {v}", "{k} = {v}", "{k} -> {v}", "{k} is: {v}")


def recall(tools: Tools, tokens: int) -> Row:
    """Pairs "key value", alone or spread in a haystack, asked again in another order."""
    rng, pieces, lexicon = tools.rng, tools.pieces, tools.lexicon()
    form = rng.choice(RECALL_FORMS)
    key_kind = rng.choice(["word", "word", "pair"]) if rng.random() > tools.breadth else lexicon.key_kind()
    value_kind = lexicon.value_kind()
    end = rng.choice(["\n", ".\n", ",\n"])

    def say(k: str, v: str) -> tuple[list[int], list[int]]:
        left = form.split("{v}")[0]
        head = pieces.words(left.format(k=k).rstrip(" "))
        return head, pieces(" " + v) + pieces(end)

    probe = sum(map(len, say(lexicon.make(key_kind), lexicon.make(value_kind))))
    spread = rng.random() < (0.3 if tokens < 512 else 0.6)
    most = tokens // (2 * probe)
    count = rng.randint(max(1, most // 8), max(1, most // 2)) if spread else most
    count = min(count, 400)
    keys = lexicon.distinct(key_kind, count)
    told = [(k, *say(k, lexicon.make(value_kind))) for k in keys]
    again = rng.sample(told, len(told))
    straw = [h + v for _, h, v in told]
    size = sum(map(len, straw))
    filler = tools.haystack(rng.choice(HAYSTACKS), lexicon).fill(tokens - 2 * size, True) if spread else []
    ids = weave(tools, straw, filler, ordered=True)
    weights = [W_REST] * len(ids)
    tail = len(pieces(end))
    for _, head, value in again:
        ids += head + value
        weights += [W_REST] * len(head) + [W_ANSWER] * (len(value) - tail) + [W_REST] * tail
    return ids, weights


def spans(tools: Tools, tokens: int) -> Row:
    """Random tokens of a small or large alphabet, with earlier spans repeated: matching on several tokens."""
    rng = np.random.default_rng(tools.rng.getrandbits(32))
    vocab = tools.pieces.tokenizer.get_vocab_size()
    size = int(np.exp(rng.uniform(np.log(4), np.log(500))))
    alphabet = rng.choice(np.arange(3, vocab), size=size, replace=False)
    ids = rng.choice(alphabet, size=tokens)
    weights = np.full(tokens, W_REST, dtype=np.float32)
    at = int(min(tokens // 2, rng.integers(16, 2000)))
    while at < tokens:
        if rng.random() < 0.3:
            at += int(rng.integers(2, 24))
            continue
        n = int(min(rng.integers(6, 40), tokens - at))
        start = int(rng.integers(0, max(1, at - n)))
        ids[at : at + n] = ids[start : start + n]
        weights[at + 2 : at + n] = W_REPEAT
        at += n
    return ids.tolist(), weights.tolist()


# ---- quizzes -----------------------------------------------------------------------------------------------------


def _needle(tools: Tools, tokens: int, task: str) -> Quiz:
    rng, lexicon = tools.rng, tools.lexicon()
    key_kind, value_kind = lexicon.key_kind(), lexicon.value_kind()
    hay = rng.choice(("noise", "chorus", "fresh") if tools.breadth < 0.2 else HAYSTACKS)
    short = tokens < 512
    if task == "values":
        return needles(
            tools,
            tokens,
            key_kind=key_kind,
            value_kind=value_kind,
            values=rng.choice([2, 3, 4, 4]),
            keys=rng.choice([1, 2, 4, 12]),
            asks=rng.choice([1, 2, 4]),
            hay=hay,
            lines=rng.random() < 0.5,
            head=not short and rng.random() < 0.8,
        )
    if task == "queries":
        return needles(
            tools,
            tokens,
            key_kind=key_kind,
            value_kind=value_kind,
            asked=rng.choice([2, 3, 4, 4]),
            keys=rng.choice([4, 4, 8, 32, None]),
            asks=rng.choice([1, 2, 4]),
            hay=hay,
            lines=rng.random() < 0.5,
            head=not short and rng.random() < 0.8,
        )
    style = (
        rng.choice(["plain", "plain", "plain", "echo"])
        if task == "plain"
        else rng.choice(["ruler", "ruler", "ruler", "echo"])
    )
    keys = rng.choice([1, 4, rng.randint(8, 64), max(1, tokens // 40), None, None])
    return needles(
        tools,
        tokens,
        key_kind=key_kind,
        value_kind=value_kind,
        keys=keys,
        asks=rng.randint(1, 16 if tokens < 4000 else 32),
        hay=hay,
        lines=rng.random() < 0.6,
        style=style,
        head=not short and rng.random() < 0.8,
    )


def _track(tools: Tools, tokens: int) -> Quiz:
    rng = tools.rng
    if tokens < 512:
        chains, hops, letters = rng.randint(1, 2), rng.randint(1, 4), rng.choice([1, 2, 3, 5])
        return tracking(
            tools,
            tokens,
            chains=chains,
            hops=hops,
            letters=letters if letters > 1 else 2,
            value_digits=rng.choice([2, 5]),
            hay=rng.choice(["noise", "fresh"]),
            head=rng.random() < 0.3,
        )
    chains, hops = rng.choice([1, 1, 2, 4, 8]), rng.choice([4, 4, 4, rng.randint(1, 8)])
    return tracking(
        tools,
        tokens,
        chains=chains,
        hops=hops,
        letters=rng.choice([5, 5, 5, 3, 4]),
        value_digits=5,
        hay=rng.choice(["noise", "noise", "noise", "fresh", "text", "chorus"]),
        shot=rng.random() < 0.4,
    )


def _common(tools: Tools, tokens: int) -> Quiz:
    rng = tools.rng
    often, seldom = (6, 1) if tokens < 4000 else (30, 3)
    if tokens < 512:
        often, seldom = rng.randint(3, 6), 1
    elif rng.random() < 0.3:
        often = rng.randint(5, 40)
    common = rng.randint(1, 3) if tokens < 512 else rng.choice([10, 10, 10, rng.randint(1, 12)])
    return common_words(
        tools,
        tokens,
        common=common,
        often=often,
        seldom=seldom,
        rare_share=rng.choice([0.0, 0.5, 1.0]) * (tools.breadth > 0.3),
        blank=rng.choice(["\n\n", " "]),
        numbered=tokens >= 512 and rng.random() < 0.75,
    )


def quiz(tools: Tools, tokens: int, task: str) -> Quiz:
    """A training quiz of one task."""
    if task == "track":
        return _track(tools, tokens)
    if task == "common":
        return _common(tools, tokens)
    if task == "frequent":
        return frequent_words(tools, tokens, letters=tools.rng.choice([6, 6, 6, 4, 5]), known=tools.rng.random() < 0.15)
    return _needle(tools, tokens, task)


def as_row(tools: Tools, made: Quiz, bos: bool) -> Row:
    """The quiz with its answers, each followed by the end token."""
    pieces = tools.pieces
    ids = ([pieces.bos] if bos else []) + made.context
    weights = [W_REST] * len(ids)
    for i, ask in enumerate(made.asks):
        question = pieces(("\n" if i else "") + ask.question) if ask.question else pieces("\n") if i else []
        prefix, answer = pieces(ask.prefix), [*pieces(ask.answer), pieces.eos]
        ids = ids + question + prefix + answer
        weights += [W_REST] * len(question) + [W_PREFIX] * len(prefix) + [W_ANSWER] * len(answer)
    return ids, weights


def document(tools: Tools, length: int) -> Row:
    """One training row of at most `length` tokens: half of it to all of it."""
    rng = tools.rng
    tokens = rng.randint(length // 2, length) - 2
    mix = next(m for limit, m in MIXTURE if length <= limit)
    task = rng.choices(list(mix), list(mix.values()))[0]
    if task == "recall":
        ids, weights = recall(tools, tokens)
    elif task == "spans":
        ids, weights = spans(tools, tokens)
    else:
        ids, weights = as_row(tools, quiz(tools, tokens, task), bos=rng.random() < 0.75)
    return (ids, weights) if len(ids) <= length else document(tools, length)


def batch(tools: Tools, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens, weights [rows, length]: uint16 and float16; padding weighs nothing."""
    tokens = np.full((rows, length), tools.pieces.pad, dtype=np.uint16)
    weights = np.zeros((rows, length), dtype=np.float16)
    for r in range(rows):
        ids, w = document(tools, length)
        tokens[r, : len(ids)] = ids
        weights[r, : len(w)] = w
    rest = (weights > 0) & (weights < 2 * W_REST)  # else a long haystack would outweigh its few answers
    weights[rest] *= min(1.0, 2048 / length)
    return tokens, weights


# ---- workers -----------------------------------------------------------------------------------------------------


def breadth_at(progress: float) -> float:
    """How wide keys, values and haystacks range: narrow while the skill forms, everything later."""
    return float(min(1.0, max(0.0, (progress - 0.06) / 0.20)))


def _work(tokenizer: str, roots: list[Path], seed: int, tokens: int, progress, out) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(seed)
    pieces, library = Pieces(Tokenizer.from_file(tokenizer)), Library(roots, seed % 7)
    while True:
        now = progress.value
        mix = lengths_at(now)
        length = rng.choices(list(mix), list(mix.values()))[0]
        length = min(length, tokens)
        out.put((length, *batch(Tools(pieces, library, rng, breadth_at(now)), tokens // length, length)))


class Feed:
    """Batches from worker processes; `progress` (0 to 1) sets what they make."""

    def __init__(
        self, tokenizer: Path, roots: list[Path], *, workers: int, tokens: int, seed: int, progress: float = 0.0
    ) -> None:
        context = mp.get_context("spawn")
        self.progress = context.Value("d", progress, lock=False)
        self._queue = context.Queue(maxsize=max(4, 3 * workers))
        self._workers = [
            context.Process(
                target=_work,
                args=(str(tokenizer), roots, 1000 * seed + i, tokens, self.progress, self._queue),
                daemon=True,
            )
            for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        while True:
            try:
                yield self._queue.get(timeout=120)
            except queue.Empty:
                raise RuntimeError("no batch for 120 s: a worker has failed, see its error above") from None

    def waiting(self) -> int:
        """Batches that wait: 0 means that the workers are the bottleneck."""
        return self._queue.qsize()

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()


# ---- test samples ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, the strings its answer must hold, and how many tokens to generate."""

    prompt: list[int]
    want: tuple[str, ...]
    new_tokens: int


_NIAH = {"style": "ruler", "keys": 1, "asks": 1, "narrow": 0.0}
EVAL_TASKS = {
    "niah_single_1": lambda t, n: needles(t, n, key_kind="pair", value_kind="number", hay="noise", **_NIAH),
    "niah_single_2": lambda t, n: needles(t, n, key_kind="pair", value_kind="number", hay="text", lines=False, **_NIAH),
    "niah_single_3": lambda t, n: needles(t, n, key_kind="pair", value_kind="uuid", hay="text", lines=False, **_NIAH),
    "niah_multikey_1": lambda t, n: needles(
        t, n, key_kind="pair", value_kind="number", hay="text", lines=False, **_NIAH | {"keys": 4}
    ),
    "niah_multikey_2": lambda t, n: needles(t, n, key_kind="pair", value_kind="number", **_NIAH | {"keys": None}),
    "niah_multikey_2_rare": lambda t, n: needles(
        t, n, key_kind="rare_pair", value_kind="number", **_NIAH | {"keys": None}
    ),
    "niah_multikey_2_words": lambda t, n: needles(t, n, key_kind="pair", value_kind="pair", **_NIAH | {"keys": None}),
    "niah_multikey_3": lambda t, n: needles(t, n, key_kind="uuid", value_kind="uuid", **_NIAH | {"keys": None}),
    "niah_multivalue": lambda t, n: needles(
        t, n, key_kind="pair", value_kind="number", values=4, hay="text", lines=False, **_NIAH
    ),
    "niah_multiquery": lambda t, n: needles(
        t, n, key_kind="pair", value_kind="number", asked=4, hay="text", lines=False, **_NIAH | {"keys": 4}
    ),
    "vt": lambda t, n: tracking(t, n, shot=True),
    "vt_no_example": lambda t, n: tracking(t, n),
    "cwe": lambda t, n: common_words(t, n, rare_share=0.5, often=6 if n < 4000 else 30, seldom=1 if n < 4000 else 3),
    "fwe": lambda t, n: frequent_words(t, n),
    "plain_question": lambda t, n: needles(
        t,
        n,
        key_kind="pair",
        value_kind="number",
        style="plain",
        keys=16,
        hay="fresh",
        lines=False,
        head=False,
        narrow=0.0,
    ),
}


def sample(tools: Tools, task: str, length: int) -> Sample:
    """One test sample: prompt and answer fit `length` tokens. A plain question gets no opening of the answer."""
    made, pieces, budget = EVAL_TASKS[task](tools, length - 3), tools.pieces, length - 3
    while len(made.context) + tools.tokens(made.asks[:1]) + 1 > length:
        budget -= 32
        made = EVAL_TASKS[task](tools, budget)
    ask = made.asks[0]
    prompt = (
        [pieces.bos] + made.context + pieces(ask.question) + ([] if task == "plain_question" else pieces(ask.prefix))
    )
    new = len(pieces(ask.answer)) + (len(pieces(ask.prefix)) if task == "plain_question" else 0)
    return Sample(prompt, ask.want, new + 12)
