"""Raw material of the pocket model's documents: cached token pieces, keys and values, haystacks."""

from __future__ import annotations

import random
import re
import string
import uuid
from pathlib import Path

from pocket_tokenizer import corpus_files
from pocket_words import ADJECTIVES, NOUNS, VERBS
from tokenizers import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's filler
HAYSTACKS = ("noise", "chorus", "bank", "fresh", "words", "text", "symbols")


class Pieces:
    """Text to token ids, piece by piece, through a cache; pieces begin at a space or after a newline."""

    def __init__(self, tokenizer: Tokenizer, limit: int = 300_000) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self._cache: dict[str, list[int]] = {}
        self.bos = tokenizer.token_to_id("<|bos|>")
        self.eos = tokenizer.token_to_id("<|eos|>")
        self.pad = tokenizer.token_to_id("<|pad|>")

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`; the list is shared, so never change it."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < self.limit and len(text) < 200:
                self._cache[text] = ids
        return ids

    def words(self, text: str) -> list[int]:
        """Token ids of plain spaced text, each " word" cached by itself; equal to `self(text)`."""
        out: list[int] = []
        for piece in re.findall(r"^[^ ]+| [^ ]*", text):
            out += self(piece)
        return out


class Library:
    """Real text for haystacks and rare words for keys: from files of this machine, so nothing is downloaded."""

    def __init__(self, roots: list[Path], seed: int = 0, max_files: int = 300) -> None:
        self.texts = [p.read_text(encoding="utf-8", errors="ignore") for p in corpus_files(roots, max_files, seed)]
        if not self.texts:
            raise ValueError(
                f"no text files between 2 kB and 300 kB under {[str(r) for r in roots]}: name other folders with --text"
            )
        counts: dict[str, int] = {}
        for text in self.texts:
            for word in re.findall(r"\b[a-z]{3,12}\b", text):
                counts[word] = counts.get(word, 0) + 1
        self.rare = sorted(w for w, n in counts.items() if n >= 2)

    def excerpt(self, rng: random.Random, chars: int) -> str:
        """About `chars` characters of one text, from a line's start."""
        text = rng.choice(self.texts)
        start = text.find("\n", rng.randrange(max(1, len(text) - chars))) + 1
        return text[start : start + chars].replace("\r", "")


class Lexicon:
    """Keys and values of one document; `breadth` in [0, 1] widens the choice from few known words to anything."""

    def __init__(self, rng: random.Random, rare: list[str], breadth: float) -> None:
        self.rng, self.rare, self.breadth = rng, rare, breadth
        few = 40 + int(400 * breadth)
        self.adjectives = ADJECTIVES[:: max(1, len(ADJECTIVES) // few)]
        self.nouns = NOUNS[:: max(1, len(NOUNS) // few)]

    def narrow(self, count: int) -> None:
        """Keep so few words that `count` keys share their parts, and only the pair tells them apart."""
        side = max(2, int((1.5 * count) ** 0.5) + 1)
        self.adjectives = self.rng.sample(ADJECTIVES, min(side, len(ADJECTIVES)))
        self.nouns = self.rng.sample(NOUNS, min(side, len(NOUNS)))

    def rare_word(self) -> str:
        """A word the vocabulary mostly has not: from real text, or invented."""
        if self.rng.random() < 0.75:
            return self.rng.choice(self.rare)
        return "".join(self.rng.choice(string.ascii_lowercase) for _ in range(self.rng.randint(3, 8)))

    def word(self) -> str:
        """A known noun or adjective."""
        return self.rng.choice(self.nouns) if self.rng.random() < 0.6 else self.rng.choice(self.adjectives)

    def make(self, kind: str) -> str:
        """One key or value of `kind`: pair, rare_pair, phrase, saying, title, word, rare_word, number, digits1..digits12, uuid, name."""
        rng = self.rng
        if kind == "pair":
            return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"
        if kind == "rare_pair":
            left = self.rare_word() if rng.random() < 0.8 else rng.choice(self.adjectives)
            return f"{left}-{self.rare_word() if rng.random() < 0.8 else rng.choice(self.nouns)}"
        if kind == "phrase":
            return f"{rng.choice(self.adjectives)} {rng.choice(self.nouns)}"
        if kind == "title":
            return self.rare_word().capitalize()
        if kind == "saying":
            return " ".join(self.rare_word() if rng.random() < 0.5 else self.word() for _ in range(rng.randint(2, 6)))
        if kind == "word":
            return self.word()
        if kind == "rare_word":
            return self.rare_word()
        if kind == "number":
            return str(rng.randint(1_000_000, 9_999_999))
        if kind.startswith("digits"):
            n = int(kind[6:])
            return str(rng.randint(10 ** (n - 1), 10**n - 1))
        if kind == "uuid":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if kind == "name":
            return "".join(rng.choice(string.ascii_uppercase) for _ in range(5))
        raise ValueError(
            f"kind={kind!r}: choose pair, rare_pair, phrase, saying, title, word, rare_word, number, digits<n>, uuid or name"
        )

    def distinct(self, kind: str, count: int) -> list[str]:
        """`count` different ones, or as many as there are."""
        seen: dict[str, None] = {}
        for _ in range(20 * count + 50):
            seen[self.make(kind)] = None
            if len(seen) == count:
                break
        return list(seen)

    def key_kind(self) -> str:
        """What the keys of a document are."""
        if self.rng.random() > self.breadth:
            return self.rng.choice(["pair", "pair", "word", "phrase"])
        return self.rng.choice(
            [
                "pair",
                "pair",
                "pair",
                "rare_pair",
                "rare_pair",
                "rare_pair",
                "uuid",
                "uuid",
                "phrase",
                "title",
                "rare_word",
                "number",
                "name",
            ]
        )

    def value_kind(self) -> str:
        """What the values of a document are."""
        if self.rng.random() > self.breadth:
            return self.rng.choice(["digits2", "digits2", "word", "word", "digits4", "number"])
        return self.rng.choice(
            [
                "number",
                "number",
                "number",
                "number",
                "uuid",
                "uuid",
                "pair",
                "rare_word",
                "word",
                f"digits{self.rng.randint(1, 12)}",
                "rare_pair",
                "name",
                "saying",
            ]
        )


class Haystack:
    """Filler of one kind as pieces of token ids: sentences joined by spaces, or lines."""

    def __init__(self, kind: str, pieces: Pieces, lexicon: Lexicon, library: Library) -> None:
        self.kind, self.pieces, self.lexicon, self.library = kind, pieces, lexicon, library
        rng = lexicon.rng
        if kind == "chorus":
            self.bank = [self.sentence() for _ in range(rng.randint(1, 6))]
        elif kind == "bank":
            self.bank = [self.sentence() for _ in range(rng.randint(20, 200))]

    def sentence(self) -> str:
        rng, lex = self.lexicon.rng, self.lexicon
        noun = lambda: lex.rare_word() if rng.random() < 0.15 * lex.breadth else rng.choice(NOUNS)  # noqa: E731
        shape = rng.randrange(5)
        if shape == 0:
            return f"The {rng.choice(ADJECTIVES)} {noun()} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {noun()}."
        if shape == 1:
            return f"A {noun()} {rng.choice(VERBS)} the {noun()} and the {noun()} {rng.choice(VERBS)} it."
        if shape == 2:
            return f"The {noun()} is {rng.choice(ADJECTIVES)} but the {noun()} is {rng.choice(ADJECTIVES)}."
        if shape == 3:
            return f"There is no {noun()} on the {rng.choice(ADJECTIVES)} {noun()}."
        return f"When the {noun()} {rng.choice(VERBS)} {rng.randint(2, 99)} {noun()}s, they are not {rng.choice(ADJECTIVES)}."

    def _text(self, tokens: int, lines: bool) -> list[list[int]]:
        raw = self.library.excerpt(self.lexicon.rng, 2 * tokens + 200)
        if lines:
            return [self.pieces(line + "\n") for line in raw.split("\n")]
        sentences = re.split(r"(?<=[.!?;:]) ", " ".join(raw.split()))
        return [self.pieces(" " + s) for s in sentences if s]

    def _one(self, lines: bool) -> list[int]:
        rng, kind = self.lexicon.rng, self.kind
        if kind == "noise":
            text = NOISE
        elif kind in ("chorus", "bank"):
            text = (
                self.bank[min(int(rng.paretovariate(0.7)) - 1, len(self.bank) - 1)]
                if kind == "bank"
                else rng.choice(self.bank)
            )
        elif kind == "fresh":
            text = self.sentence()
        elif kind == "words":
            text = " ".join(self.lexicon.word() for _ in range(12))
        else:
            low, high = rng.choice([(33, 127), (0xA1, 0x250), (0x370, 0x500), (0x4E00, 0x4F00), (0x1F300, 0x1F600)])
            text = (
                "".join(chr(rng.randint(low, high)) if rng.random() < 0.85 else " " for _ in range(24)).strip() or "-"
            )
            return self.pieces.tokenizer.encode(text + "\n" if lines else " " + text, add_special_tokens=False).ids
        ids = self.pieces.words(text if lines else " " + text)
        return ids + self.pieces("\n") if lines else ids

    def fill(self, tokens: int, lines: bool) -> list[list[int]]:
        """Pieces of about `tokens` tokens in all: each ends in a newline (`lines`) or begins with a space."""
        out: list[list[int]] = []
        left = tokens
        while left > 0:
            batch = self._text(left, lines) if self.kind == "text" else [self._one(lines)]
            for ids in batch or [self.pieces("\n" if lines else " -")]:
                if len(ids) > left:
                    return out
                out.append(ids)
                left -= len(ids)
        return out
