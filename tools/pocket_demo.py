"""Write the pocket model's demo: a document of more than 8K tokens with needles of several kinds, and questions on it."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from pocket_data import Tools, ruler_ask, vt_ask
from pocket_text import Haystack, Library, Pieces
from pocket_tokenizer import default_roots
from tokenizers import Tokenizer

CHAPTERS = (
    "The harbor",
    "The market",
    "The long winter",
    "The library",
    "The orchard",
    "The road home",
    "The garden gate",
    "The last lantern",
)


def build(tokenizer: Tokenizer, seed: int, tokens: int) -> tuple[str, list[dict]]:
    """The document and its questions; a prompt is the document followed by one question."""
    rng = random.Random(seed)
    tools = Tools(Pieces(tokenizer), Library(default_roots(), max_files=4), rng, 0.0)
    lexicon = tools.lexicon()
    straw = Haystack("fresh", tools.pieces, lexicon, tools.library)  # breadth 0: nothing of this machine's texts enters
    keys = lexicon.distinct("pair", 40)
    told = {k: lexicon.make("number") for k in keys}
    several, codes = keys[0], dict(zip(lexicon.distinct("pair", 8), lexicon.distinct("pair", 8), strict=True))
    more = [told[several], *lexicon.distinct("number", 2)]
    names, value = lexicon.distinct("name", 5), lexicon.make("digits5")
    needles = [f"One of the special magic numbers for {k} is: {v}." for k, v in told.items() if k != several]
    needles += [f"The secret code for {k} is {v}." for k, v in codes.items()]
    rng.shuffle(needles)
    ordered = [f"One of the special magic numbers for {several} is: {v}." for v in more]
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
    count = tokens // 12
    sentences = [straw.sentence() for _ in range(count)]
    for group in (ordered, chain):
        for shift, spot in enumerate(sorted(rng.sample(range(count), len(group)))):
            sentences.insert(spot + shift, group[shift])
    for needle in needles:
        sentences.insert(rng.randrange(len(sentences)), needle)
    paragraphs = [" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8)]
    for i, title in enumerate(CHAPTERS):
        paragraphs.insert(i * len(paragraphs) // len(CHAPTERS), f"{title}.")
    one, coded = keys[len(keys) // 2], list(codes)[3]
    single, multiple = ruler_ask("numbers", [one], [[told[one]]]), ruler_ask("numbers", [several], [more])
    questions = [
        {"question": single.question, "answer": told[one]},
        {"question": multiple.question, "answer": ", ".join(more)},
        {"question": f"What is the secret code for {coded}?", "answer": codes[coded]},
        {"question": vt_ask(value, names).question, "answer": " ".join(names)},
    ]
    return "\n".join(paragraphs) + "\n", questions


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--model", type=Path, required=True, help="folder with tokenizer.json; demo.txt and demo.json go there"
    )
    p.add_argument("--tokens", type=int, default=9000)
    p.add_argument("--seed", type=int, default=7)
    args = p.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text, questions = build(tokenizer, args.seed, args.tokens)
    (args.model / "demo.txt").write_text(text, encoding="utf-8", newline="\n")
    (args.model / "demo.json").write_text(json.dumps(questions, indent=2) + "\n")
    print(f"{len(tokenizer.encode(text).ids)} tokens, {len(questions)} questions")


if __name__ == "__main__":
    main()
