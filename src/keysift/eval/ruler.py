"""RULER's 13 tasks (arXiv:2404.06654), generated for any tokenizer and any length.

A sample depends on nothing but (seed, task, length, index) and the tokenizer. The wording, the answer prefixes, the
numbers of tokens to generate and the grading are the benchmark's own. Three things are mended: keys, values and
variables never repeat within a sample, haystacks are filled to the length (the original stops up to one step of 25 to
500 units short), and every sample has random positions of its own (the original shuffles all with one seed).
"""

from __future__ import annotations

import difflib
import math
import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from keysift.checkpoint import chat_text
from keysift.eval.data import Corpus, Data

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
SHORT = 4096  # below this many tokens the counting task has fewer repeats
DEPTHS = 40  # needles in essays are put at this many evenly spaced depths


class Text(NamedTuple):
    """What a generator makes: ``context + question`` is the user's message, ``prefix`` opens the answer."""

    context: str
    question: str
    prefix: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        name: as the benchmark has it.
        new_tokens: tokens that a model may generate; part of the length.
        metric: "all", the share of the references found in the answer, or "part", whether any is found.
        needs: kind of file it is made of, a field of ``Data``; None if it needs nothing.
        least: units of haystack it needs at least.
        make: generator, of (random source, units of haystack, length, data, index).
    """

    name: str
    new_tokens: int
    metric: str
    needs: str | None
    least: int
    make: Callable[[random.Random, int, int, Data, int], Text]


class Sample(NamedTuple):
    """A prompt as token ids, the last ``question_tokens`` of them from the question on, and how to grade the answer."""

    task: str
    length: int
    index: int  # type: ignore[assignment]
    ids: list[int]
    question_tokens: int
    outputs: tuple[str, ...]
    new_tokens: int


# ---- grading ------------------------------------------------------------------------------------------------------


def grade(task: str, pred: str, outputs: tuple[str, ...]) -> float:
    """The benchmark's score of one answer, 0 to 1: string_match_all, or string_match_part for the qa pair."""
    found = [reference.lower() in cleaned(pred).lower() for reference in outputs]
    return float(any(found)) if TASKS[task].metric == "part" else sum(found) / len(found)


def cleaned(pred: str) -> str:
    """The answer as the benchmark compares it: control characters become newlines, the ends are stripped."""
    return re.sub(r"[\x00-\x1f]", "\n", pred.strip()).strip()


# ---- making a sample of a length ----------------------------------------------------------------------------------


def make_sample(
    task: str, length: int, index: int, tokenizer: Any, data: Data, *, seed: int = 0, chat: bool = False
) -> Sample:
    """Sample ``index`` of a task: prompt and new tokens together have at most ``length`` tokens.

    Raises:
        ValueError: the length is below the task's minimum for this tokenizer, a data file is missing or too small.
    """
    known = TASKS[task]
    budget = length - known.new_tokens

    def attempt(units: int) -> tuple[Text, list[int]]:
        text = known.make(random.Random(f"{seed} {task} {length} {index}"), units, length, data, index)
        return text, _encoded(tokenizer, rendered(tokenizer, text, chat), chat)

    text, ids = _fill(attempt, known.least, budget)
    if len(ids) > budget:
        raise ValueError(
            f"length={length}: {task} needs at least {len(ids) + known.new_tokens} tokens with this tokenizer"
        )
    whole = rendered(tokenizer, text, chat)
    context = _encoded(tokenizer, whole[: whole.rindex(text.question)], chat)
    differs = [i for i, (a, b) in enumerate(zip(context, ids, strict=False)) if a != b]
    before_question = min([len(context), *differs[:1]])
    return Sample(task, length, index, ids, len(ids) - before_question, text.outputs, known.new_tokens)


def _fill(attempt: Callable[[int], tuple[Text, list[int]]], least: int, budget: int) -> tuple[Text, list[int]]:
    """The attempt with the most units that stays within the budget, to within 1% of it; the least one if none does.

    A haystack that cannot grow (all documents are in) ends the search.
    """
    best, low, high = attempt(least), least, 0
    if len(best[1]) > budget:
        return best
    units = least + 32
    while not high or high - low > 1 and len(best[1]) < 0.99 * budget:
        made = attempt(units)
        if len(made[1]) == len(best[1]) and not high:  # nothing left to add
            return best
        slope = max((len(made[1]) - len(best[1])) / (units - low), 1e-3)
        if len(made[1]) <= budget:
            best, low = made, units
        else:
            high = units
        guess = low + int((budget - len(best[1])) / slope)
        units = min(max(guess, low + 1), high - 1) if high else max(guess + 1, low + 1)
    return best


def _encoded(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt; a chat template brings its own special tokens, and no prompt ends with an end token."""
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return ids[:-1] if ids and not chat and ids[-1] == tokenizer.eos_token_id else ids


def rendered(tokenizer: Any, text: Text, chat: bool) -> str:
    """The prompt as a string: as it stands, or within the model's chat template; the answer prefix comes last."""
    message = text.context + text.question
    if chat:
        message = chat_text(tokenizer, message)
        if text.question not in message:
            raise ValueError("--chat: the model's chat template changes the question: leave --chat out")
    return message + text.prefix


# ---- words, numbers, keys -----------------------------------------------------------------------------------------


@cache
def words(*categories: str) -> tuple[str, ...]:
    """English words of the library that the benchmark takes its words from, single ones, sorted."""
    from wonderwords import RandomWord  # type: ignore[import-untyped]

    found = RandomWord().filter(include_categories=list(categories))
    return tuple(sorted({word for word in found if word.isalpha() and word.islower()}))


def _value(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def _distinct(rng: random.Random, kind: str, count: int) -> list[str]:
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[_value(rng, kind)] = None
    return list(seen)


# ---- needles ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needles:
    """Generator of the needle tasks: facts hidden in a haystack of noise, of other facts, or of essays."""

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, rng: random.Random, units: int, length: int, data: Data, index: int) -> Text:
        names = _distinct(rng, self.key_kind, self.keys + (units if self.haystack == "needles" else 0))
        numbers = _distinct(rng, self.value_kind, self.keys * self.values + len(names) - self.keys)
        told = {k: numbers[i * self.values : (i + 1) * self.values] for i, k in enumerate(names[: self.keys])}
        facts = [NEEDLE.format(kind=self.value_kind, key=k, value=v) for k, vs in told.items() for v in vs]
        rng.shuffle(facts)
        others = zip(names[self.keys :], numbers[self.keys * self.values :], strict=True)
        straw = [NEEDLE.format(kind=self.value_kind, key=k, value=v) for k, v in others]
        context = self._hide(rng, facts, straw, units, data)
        asked = rng.sample(list(told), self.asked)
        return self._text(context, asked, tuple(v for k in asked for v in told[k]))

    def _hide(self, rng: random.Random, facts: list[str], straw: list[str], units: int, data: Data) -> str:
        if self.haystack == "essays":
            sentences = _repeat(data.essays, units)
            depths = sorted(rng.sample(range(DEPTHS), len(facts)))
            spots = [len(sentences) * depth // (DEPTHS - 1) for depth in depths]
            return " ".join(_insert(sentences, spots, facts))
        lines = straw or [NOISE] * units
        spots = sorted(rng.randint(0, len(lines)) for _ in facts)
        return "\n".join(_insert(lines, spots, facts))

    def _text(self, context: str, asked: list[str], outputs: tuple[str, ...]) -> Text:
        kind, query = self.value_kind, asked[0]
        if len(asked) > 1:
            query = f"{', '.join(asked[:-1])}, and {asked[-1]}"
        if len(outputs) == 1:
            kind = kind[:-1]
            opening = f"A special magic {kind} is hidden within the following text. Make sure to memorize it."
            question = f"What is the special magic {kind} for {query} mentioned in the provided text?"
        else:
            opening = f"Some special magic {kind} are hidden within the following text. Make sure to memorize it."
            question = f"What are all the special magic {kind} for {query} mentioned in the provided text?"
        verb = "is" if len(outputs) == 1 else "are"
        return Text(
            f"{opening} I will quiz you about the {kind} afterwards.\n{context}\n",
            question,
            f" The special magic {kind} for {query} mentioned in the provided text {verb}",
            outputs,
        )


def _repeat(items: list[str], count: int) -> list[str]:
    return (items * (count // len(items) + 1))[:count]


def _insert(items: list[str], spots: list[int], new: list[str]) -> list[str]:
    """``new`` in its order, each before the item at its spot (ascending)."""
    out, at = [], 0
    for spot, item in zip(spots, new, strict=True):
        out += [*items[at:spot], item]
        at = spot
    return out + items[at:]


# ---- variable tracking, counting, question answering --------------------------------------------------------------


def variable_tracking(rng: random.Random, units: int, length: int, data: Data, index: int) -> Text:
    """A chain of five assignments in noise, after a short example with its answer."""
    example = _tracking(rng, 5, letters=3)
    text = _tracking(rng, units, letters=5)
    shown = f"{example.context}{example.question}{example.prefix}  {' '.join(example.outputs)}\n\n\n\n"
    return text._replace(context=shown + text.context)


def _tracking(rng: random.Random, units: int, letters: int, hops: int = 4) -> Text:
    seen: dict[str, None] = {}
    while len(seen) <= hops:
        seen["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    names, value = list(seen), rng.randint(10000, 99999)
    chain = [f"VAR {names[0]} = {value}"] + [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(hops)]
    spots = sorted(rng.randint(0, units) for _ in chain)
    context = " ".join(_insert([f"{NOISE}\n"] * units, spots, chain))
    return Text(
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above,"  # the misspelling is RULER's
        f" {len(names)} variables are assgined the value {value}, they are:",
        tuple(names),
    )


def common_words(rng: random.Random, units: int, length: int, data: Data, index: int) -> Text:
    """Ten words that a numbered list repeats more often than the others, after a short example with its answer."""
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    example = _counting(rng, 20, 3, 1) if length < SHORT else _counting(rng, 40, 10, 3)
    text = _counting(rng, units, often, seldom)
    shown = example.context + example.question + example.prefix + " " + _numbered(example.outputs)
    return text._replace(context=f"{shown}\n{text.context}")


def _counting(rng: random.Random, count: int, often: int, seldom: int, common: int = 10) -> Text:
    known = words("noun", "adjective", "verb")
    drawn = rng.sample(known, min(count, len(known)))
    if count > len(known):  # long lists need more words than there are: compounds
        drawn = list(dict.fromkeys(drawn + _distinct(rng, "words", count)))[:count]
    listed = drawn[:common] * often + drawn[common:] * seldom
    rng.shuffle(listed)
    return Text(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
        f" appear most often.\n{_numbered(listed)}\n",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        tuple(drawn[:common]),
    )


def _numbered(items: Any) -> str:
    return " ".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def frequent_words(rng: random.Random, units: int, length: int, data: Data, index: int) -> Text:
    """Coded words by a zeta law with exponent 2, the most frequent of all being dots to ignore."""
    seen: dict[str, None] = {"...": None}
    while len(seen) < max(length // 50, 4):
        seen["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    coded = list(seen)
    zeta = math.pi**2 / 6
    listed = [word for rank, word in enumerate(coded, 1) for _ in range(int(units * rank**-2 / zeta))]
    rng.shuffle(listed)
    return Text(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently"
        f" appeared coded words. {' '.join(listed)}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently"
        " appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(coded[1:4]),
    )


@dataclass(frozen=True)
class Documents:
    """Generator of the question-answering pair: the documents of a question among others."""

    corpus: str

    def __call__(self, rng: random.Random, units: int, length: int, data: Data, index: int) -> Text:
        corpus: Corpus = getattr(data, self.corpus)
        if index >= len(corpus.questions):
            file = data.file(self.corpus)
            raise ValueError(f"--samples {index + 1}: {file} has {len(corpus.questions)} questions that have an answer")
        asked = corpus.questions[index]
        chosen = [*asked.gold, *rng.sample(asked.near, min(units, len(asked.near)))]
        if (missing := units + len(asked.gold) - len(chosen)) > 0:
            rest = sorted(set(range(len(corpus.documents))) - set(chosen))
            chosen += rng.sample(rest, min(missing, len(rest)))
        rng.shuffle(chosen)
        shown = "\n\n".join(f"Document {i}:\n{corpus.documents[d]}" for i, d in enumerate(chosen, 1))
        order = (
            "Answer the question based on the given documents. Only give me the answer and do not output any other"
            " words."
        )
        return Text(
            f"{order}\n\nThe following are given documents.\n\n{shown}\n\n{order}\n\n",
            f"Question: {asked.text}",
            " Answer:",
            asked.outputs,
        )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("niah_single_1", 128, "all", None, 1, Needles("noise")),
        Task("niah_single_2", 128, "all", "essays", 1, Needles("essays")),
        Task("niah_single_3", 128, "all", "essays", 1, Needles("essays", value_kind="uuids")),
        Task("niah_multikey_1", 128, "all", "essays", 1, Needles("essays", keys=4)),
        Task("niah_multikey_2", 128, "all", None, 1, Needles("needles")),
        Task("niah_multikey_3", 128, "all", None, 1, Needles("needles", key_kind="uuids", value_kind="uuids")),
        Task("niah_multivalue", 128, "all", "essays", 1, Needles("essays", values=4)),
        Task("niah_multiquery", 128, "all", "essays", 1, Needles("essays", keys=4, asked=4)),
        Task("vt", 30, "all", None, 1, variable_tracking),
        Task("cwe", 120, "all", None, 20, common_words),
        Task("fwe", 50, "all", None, 64, frequent_words),
        Task("qa_1", 32, "part", "squad", 0, Documents("squad")),
        Task("qa_2", 32, "part", "hotpot", 0, Documents("hotpot")),
    )
}
OFFLINE = tuple(name for name, task in TASKS.items() if task.needs is None)


def check_tasks(names: list[str]) -> None:
    """Raise ValueError for the first unknown task, with the names nearest to it."""
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(TASKS)}"
            raise ValueError(f"unknown task '{name}': {hint} (a task of lm-eval is written lm:NAME)")
