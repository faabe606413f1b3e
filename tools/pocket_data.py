"""Documents that teach and test retrieval: RULER's families in RULER's own wording, paraphrases, and drills.

A quiz is a context with questions. For training it becomes one row of tokens with a loss weight each: 1 on answers,
less on the words around them, almost none on the haystack. For evaluation it is a prompt and the strings expected.
The wording of RULER's templates follows lm-evaluation-harness's `ruler` tasks (arXiv:2404.06654).
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pocket_text import NOISE, Haystack, Lexicon, Library, Pieces
from pocket_words import NOUNS, THINGS

W_ANSWER, W_PREFIX, W_REPEAT, W_REST = 1.0, 0.1, 0.1, 0.005


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about the context; `prefix` opens the answer, `want` are the strings it must hold."""

    question: str
    prefix: str
    answer: str
    want: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quiz:
    """Token ids of a context (it ends where a question may begin) and its questions."""

    context: list[int]
    asks: list[Ask]


@dataclass(frozen=True, slots=True)
class Tools:
    """What every task draws from."""

    pieces: Pieces
    library: Library
    rng: random.Random
    breadth: float

    def lexicon(self) -> Lexicon:
        return Lexicon(self.rng, self.library.rare, self.breadth)

    def haystack(self, kind: str, lexicon: Lexicon) -> Haystack:
        return Haystack(kind, self.pieces, lexicon, self.library)

    def tokens(self, asks: list[Ask]) -> int:
        return sum(
            len(self.pieces(a.question)) + len(self.pieces(a.prefix)) + len(self.pieces(a.answer)) + 2 for a in asks
        )


def weave(tools: Tools, needles: list[list[int]], filler: list[list[int]], ordered: bool = False) -> list[int]:
    """Needles at random places between the filler's pieces; `ordered` keeps their order."""
    rng = tools.rng
    spots = sorted(rng.randint(0, len(filler)) for _ in needles)
    if not ordered:
        rng.shuffle(needles)
    out: list[int] = []
    at = 0
    for spot, needle in zip(spots, needles, strict=True):
        for piece in filler[at:spot]:
            out += piece
        out += needle
        at = spot
    for piece in filler[at:]:
        out += piece
    return out


def unspaced(pieces: Pieces, body: list[int]) -> list[int]:
    """The same text without its first space, where its first word is also known without one."""
    first = pieces.tokenizer.decode(body[:1])
    bare = pieces(first[1:]) if first.startswith(" ") else []
    return bare + body[1:] if len(bare) == 1 else body


# ---- needles -----------------------------------------------------------------------------------------------------

KIND_NAMES = {
    "uuid": "uuids",
    "pair": "words",
    "rare_pair": "words",
    "word": "words",
    "rare_word": "words",
    "phrase": "words",
    "saying": "words",
    "title": "words",
    "name": "words",
}


def ruler_head(kind: str, several: bool) -> str:
    """RULER's opening of a needle task."""
    if several:
        return f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
    one = kind[:-1]
    return f"A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about the {one} afterwards.\n"


def ruler_ask(kind: str, keys: list[str], values: list[list[str]]) -> Ask:
    """RULER's question: one key with one value, one key with several values, or several keys."""
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    want = tuple(v for vs in values for v in vs)
    if len(want) == 1:
        one = kind[:-1]
        return Ask(
            f"What is the special magic {one} for {query} mentioned in the provided text?",
            f" The special magic {one} for {query} mentioned in the provided text is",
            f" {want[0]}",
            want,
        )
    if len(keys) == 1:
        answer = " " + ", ".join(want)
    else:
        answer = " " + ", ".join(f"{k}: {', '.join(vs)}" for k, vs in zip(keys, values, strict=True))
    return Ask(
        f"What are all the special magic {kind} for {query} mentioned in the provided text?",
        f" The special magic {kind} for {query} mentioned in the provided text are",
        answer,
        want,
    )


PLAIN_FORMS = (  # statement, question, opening of the answer; the value comes after the key
    ("The {thing} of {key} is {value}.", "What is the {thing} of {key}?", " The {thing} of {key} is"),
    ("The {thing} of the {key} is {value}.", "What is the {thing} of the {key}?", " The {thing} of the {key} is"),
    ("The {thing} for {key} is: {value}.", "What is the {thing} for {key}?", " The {thing} for {key} is:"),
    ("Remember that the {thing} of {key} is {value}.", "Tell me the {thing} of {key}.", " The {thing} of {key} is"),
    (
        "The secret {thing} for {key} is {value}.",
        "What is the secret {thing} for {key}?",
        " The secret {thing} for {key} is",
    ),
    (
        "The special magic {thing} for {key} is {value}.",
        "What is the special magic {thing} for {key}?",
        " The special magic {thing} for {key} is",
    ),
    (
        "One of the special magic {thing}s for {key} is: {value}.",
        "What is the special magic {thing} for {key}?",
        " The special magic {thing} for {key} is",
    ),
    ("They set the {thing} for {key} to {value}.", "What is the {thing} for {key}?", " The {thing} for {key} is"),
    ("{key} has the {thing} {value}.", "Which {thing} has {key}?", " {key} has the {thing}"),
    ("{key}'s {thing} is {value}.", "What is {key}'s {thing}?", " {key}'s {thing} is"),
    ("{key}: {value}.", "What is {key}?", " {key}:"),
    ("{key} = {value}.", "What is the value of {key}?", " {key} ="),
)
ECHO_FORM = (
    "One of the special magic {thing}s for {key} is: {value}.",
    "",
    "One of the special magic {thing}s for {key} is:",
)
HEADS = (
    "Read the document and answer the question.\n",
    "Use only the following text.\n",
    "Document:\n",
    "Here is a text.\n",
)


def _thing(rng: random.Random, lexicon: Lexicon) -> str:
    """What a plain statement is about: "code", "winter price", any word."""
    draw = rng.random() * (0.5 + 0.5 * lexicon.breadth)
    if draw < 0.6:
        return rng.choice(["number", "word", *THINGS])
    return lexicon.rare_word() if draw < 0.8 else f"{lexicon.word()} {rng.choice(THINGS)}"


def _plain(form: tuple[str, str, str], thing: str, key: str, value: str, opening: bool) -> Ask:
    question, prefix = (t.format(thing=thing, key=key, value=value) for t in form[1:])
    if not opening and question:
        prefix = "\nAnswer:"
    return Ask(question, prefix, f" {value}", (value,))


def _statements(
    lexicon: Lexicon, names: list[str], told: dict[str, list[str]], most: int, value_kind: str
) -> list[tuple[str, str]]:
    """Keys with values in a random order: those asked for (`told`), then other names until there are `most`."""
    statements = [(k, v) for k in names if k in told for v in told[k]]
    extra = max(0, min(len(names) - len(told), most - len(statements)))
    statements += [(k, lexicon.make(value_kind)) for k in names if k not in told][:extra]
    lexicon.rng.shuffle(statements)
    queues = {k: iter(vs) for k, vs in told.items()}  # a key's values are answered in the order of their appearance
    return [(k, next(queues[k])) if k in told else (k, v) for k, v in statements]


def needles(
    tools: Tools,
    tokens: int,
    *,
    key_kind: str,
    value_kind: str,
    keys: int | None,
    values: int = 1,
    asked: int = 1,
    asks: int = 1,
    hay: str = "noise",
    lines: bool = True,
    style: str = "ruler",
    head: bool = True,
    narrow: float = 0.4,
) -> Quiz:
    """A needle quiz of about `tokens` tokens; keys=None fills the whole context with needles.

    values: values of each asked key; asked: keys in one question; asks: questions; style: ruler, plain or echo.
    """
    rng, pieces, lexicon = tools.rng, tools.pieces, tools.lexicon()
    kind = KIND_NAMES.get(value_kind, "numbers")
    form = rng.choice(PLAIN_FORMS) if style == "plain" else ECHO_FORM
    thing = _thing(rng, lexicon) if style == "plain" else kind[:-1]

    def say(key: str, value: str, about: str = thing) -> list[int]:
        text = form[0].format(thing=about, key=key, value=value)
        return pieces.words(text) + pieces("\n") if lines else pieces.words(" " + text)

    opening = ""
    if head:
        opening = ruler_head(kind, asked * values > 1) if style == "ruler" else rng.choice(HEADS)
    size = -(-sum(len(say(lexicon.make(key_kind), lexicon.make(value_kind))) for _ in range(8)) // 8)
    room = max(tokens - len(pieces(opening)) - 1, 24)
    fits = max(1, room // size - 1)
    count = fits if keys is None else min(keys, max(1, fits // values))
    if rng.random() < narrow and key_kind == "pair" and tools.breadth > 0:
        lexicon.narrow(count + asks * asked * values)
    names = lexicon.distinct(key_kind, max(count, asked))
    asks = max(1, min(asks, len(names) // asked))
    targets = [names[i * asked : (i + 1) * asked] for i in range(asks)]
    told = {k: [lexicon.make(value_kind) for _ in range(values)] for group in targets for k in group}
    rng.shuffle(targets)

    def ask(group: list[str]) -> Ask:
        if style == "ruler":
            return ruler_ask(kind, group, [told[k] for k in group])
        return _plain(form, thing, group[0], told[group[0]][0], style == "echo" or opening_given)

    opening_given = rng.random() < 0.7
    questions = [ask(g) for g in targets]
    room -= tools.tokens(questions)
    while len(questions) > 1 and room < size * len(told):
        room += tools.tokens([questions.pop()])
    told = {k: told[k] for g in targets[: len(questions)] for k in g}
    straw = [say(k, v) for k, v in _statements(lexicon, names, told, room // size, value_kind)]
    if "{thing}" in form[1] and rng.random() < 0.4:  # the same keys with something else said of them
        other = _thing(rng, lexicon)
        decoys = [say(k, lexicon.make(value_kind), other) for k in sorted(told)[:8] if other != thing]
        straw += [d for d in decoys if room > 4 * size * (len(straw) + len(decoys))]
        rng.shuffle(straw)
    rest = room - sum(map(len, straw))
    filler = tools.haystack(hay, lexicon).fill(rest, lines) if keys is not None else []
    body = weave(tools, straw, filler, ordered=True)
    return Quiz(pieces(opening) + (body if lines else unspaced(pieces, body) + pieces("\n")), questions)


# ---- variable tracking -------------------------------------------------------------------------------------------

VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def vt_ask(value: str, names: list[str]) -> Ask:
    """RULER's question and its own spelling of "assigned"."""
    return Ask(
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are assgined the value {value}, they are:",
        " " + " ".join(names),
        tuple(names),
    )


def _chains(tools: Tools, chains: int, hops: int, letters: int) -> list[list[str]]:
    seen: dict[str, None] = {}
    while len(seen) < chains * (hops + 1):
        seen["".join(tools.rng.choices(string.ascii_uppercase, k=letters))] = None
    names = list(seen)
    return [names[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chains)]


def tracking(
    tools: Tools,
    tokens: int,
    *,
    chains: int = 1,
    hops: int = 4,
    letters: int = 5,
    hay: str = "noise",
    shot: bool = False,
    head: bool = True,
    value_digits: int = 5,
) -> Quiz:
    """Chains of assignments "VAR A = 1", "VAR B = VAR A " in RULER's noise (or another haystack), each asked for."""
    rng, pieces, lexicon = tools.rng, tools.pieces, tools.lexicon()
    groups = _chains(tools, chains, hops, letters)
    values = lexicon.distinct(f"digits{value_digits}", chains)
    asks = [vt_ask(v, g) for v, g in zip(values, groups, strict=False)]
    start = pieces(VT_HEAD) if head else []
    if shot:
        start = _tracking_example(tools, hops) + start
    room = tokens - len(start) - tools.tokens(asks) - 1
    texts = [
        [f" VAR {g[0]} = {v}"] + [f" VAR {b} = VAR {a} " for a, b in itertools.pairwise(g)]
        for v, g in zip(values, groups, strict=False)
    ]
    straws = [[pieces(t) for t in chain] for chain in texts]
    if hay == "noise":  # RULER joins blocks that end in a newline by spaces, so lines begin with one
        block = pieces(" " + NOISE) + pieces("\n")
        filler = [block] * max(0, (room - sum(len(s) for c in straws for s in c)) // len(block))
    else:
        filler = tools.haystack(hay, lexicon).fill(room - sum(len(s) for c in straws for s in c), False)
    merged = list(straws[0])
    for chain in straws[1:]:  # interleave the chains, each in its own order
        spots = sorted(rng.randint(0, len(merged)) for _ in chain)
        for shift, (spot, straw) in enumerate(zip(spots, chain, strict=True)):
            merged.insert(spot + shift, straw)
    body = weave(tools, merged, filler, ordered=True)
    rng.shuffle(asks)
    return Quiz(start + unspaced(pieces, body) + pieces("\n"), asks)


def _tracking_example(tools: Tools, hops: int) -> list[int]:
    """RULER's worked example before the task: three-letter names, five blocks of noise, the answer after two spaces."""
    quiz = tracking(tools, 330, hops=hops, letters=3)
    ask = quiz.asks[0]
    return quiz.context + tools.pieces(ask.question + ask.prefix + " " + ask.answer + "\n\n\n\n")


# ---- counting ----------------------------------------------------------------------------------------------------

CWE_HEAD = "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
FWE_HEAD = "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words."
FWE_ASK = Ask(
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    "",
    (),
)


def common_words(
    tools: Tools,
    tokens: int,
    *,
    common: int = 10,
    often: int = 30,
    seldom: int = 3,
    rare_share: float = 0.0,
    blank: str = "\n\n",
    numbered: bool = True,
) -> Quiz:
    """RULER's common-word extraction: a numbered list in which `common` words appear `often` times, the rest `seldom`."""
    rng, pieces, lexicon = tools.rng, tools.pieces, tools.lexicon()

    def word() -> str:
        return lexicon.rare_word() if rng.random() < rare_share else lexicon.word()

    def entries(words: list[str], first: int) -> list[int]:
        if not numbered:
            return [t for w in words for t in pieces(f" {w}")]
        return [t for i, w in enumerate(words, first) for t in pieces(f" {i}.") + pieces(f" {w}")]

    def other(taken: set[str]) -> str:
        """A word not yet taken: from the document's few words, else any known one, else a rare or invented one."""
        for draw in [word] * 4 + [lambda: rng.choice(NOUNS)] * 4 + [lexicon.rare_word] * 8:
            if (found := draw()) not in taken:
                return found
        return f"{lexicon.rare_word()}{len(taken)}"

    top = list(dict.fromkeys(word() for _ in range(4 * common)))[:common]
    probe = len(entries([word() for _ in range(64)], 1000)) / 64
    room = tokens - 60 - 12 * len(top)
    often = max(2, min(often, int(room / probe * 0.6 / len(top))))
    seldom = max(1, min(seldom, often // 3))
    fits = int(room / probe)
    words = top * often
    taken = set(top)
    while len(words) + seldom <= fits:
        taken.add(new := other(taken))
        words += [new] * seldom
    rng.shuffle(words)
    body = entries(words, 1)
    body = pieces("1.") + body[len(pieces(" 1.")) :] if numbered else unspaced(pieces, body)
    rng.shuffle(top)
    ask = Ask(
        f"Question: What are the {len(top)} most common words in the above list?",
        f"{blank}Answer: The top {len(top)} words that appear most often in the list are:",
        "".join(f" {i}. {w}" for i, w in enumerate(top, 1)),
        tuple(top),
    )
    return Quiz(pieces(CWE_HEAD if numbered else CWE_HEAD.replace("numbered ", "")) + body + pieces("\n"), [ask])


def frequent_words(tools: Tools, tokens: int, *, letters: int = 6, alpha: float = 2.0, known: bool = False) -> Quiz:
    """RULER's frequent-word extraction: coded words by a zeta law, the commonest of all being dots to ignore."""
    rng, pieces, lexicon = tools.rng, tools.pieces, tools.lexicon()
    size = max(12, tokens // 50)
    if known:
        coded = lexicon.distinct("word", size)
    else:
        coded = list(dict.fromkeys("".join(rng.choices(string.ascii_lowercase, k=letters)) for _ in range(size)))
    rng.shuffle(coded)
    coded[0] = "..."
    law = np.arange(1, len(coded) + 1) ** -alpha
    law /= (np.arange(1, 100_000) ** -alpha).sum()
    cost = np.array([len(pieces(" " + w)) for w in coded])
    room = tokens - 110
    total = int(room / float((law * cost).sum()))
    counts = (total * law).astype(int)
    while (counts * cost).sum() > room:
        total = int(total * 0.98)
        counts = (total * law).astype(int)
    words = [w for w, n in zip(coded, counts.tolist(), strict=True) for _ in range(n)]
    rng.shuffle(words)
    body = [t for w in words for t in pieces(" " + w)]
    ask = Ask(FWE_ASK.question, FWE_ASK.prefix, " " + " ".join(coded[1:4]), tuple(coded[1:4]))
    return Quiz(pieces(FWE_HEAD) + body + pieces("\n"), [ask])


Task = Callable[[Tools, int], Quiz]
