"""The pocket model's tokenizer: one token for a known word, pairs for digits, bytes for everything else.

Text is cut into pieces by one regular expression (UUIDs into hex pairs, digits into pairs from the left, words with
their leading space, punctuation, whitespace). A piece that is in the vocabulary is one token; any other piece is
merged from its UTF-8 bytes, so every text round-trips. Cuts depend on local context only, hence a text may be
tokenized in parts, cut before a space or after a newline (pocket_data does, and its test checks it).
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pocket_words import ADJECTIVES, NOUNS, THINGS, VERBS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCAB_SIZE = 3584

# Words of RULER's prompts and of our paraphrases; each gets its own token, with a leading space and (if in BARE) without.
PHRASES = """
A Some special magic number numbers word words uuid uuids is are hidden within the following text Make sure to memorize it
I will quiz you about afterwards What all for mentioned in provided One of The Memorize and track chain variable assignment
Question Find variables that assigned value above Answer According they assgined VAR grass green sky blue sun yellow Here we
go There back again Below numbered list these some appear more often than others ones most common top Read coded frequency
each find three frequently appeared Do not provide any explanation Please ignore dots There's their was his her they there
with from this have has had but not no yes on at by as an to be if so when then now new who how which document
Remember answer question me tell Tell please Please note Note Which Here's called named set same given again read Read
Use only text's line Who Whose sentence list items Count key keys secret find also
"""
BARE = "A Some Make I What One The Memorize Question Find Answer VAR Below Read Here Remember Note Tell Which Please".split()
MARKS = [
    ":",
    ".",
    ",",
    "?",
    "!",
    "'",
    "...",
    " ...",
    " =",
    " ->",
    "chain(s)",
    "):",
    "()",
    "--",
    "==",
    "##",
    " #",
    "'.",
    ".'",
    "(s)",
]
SPACES = ["\n", "\r\n", "\t", " ", "  ", "   ", "    ", "       ", "           "]


def _uuid_pairs() -> str:
    """One alternative per hex pair of a UUID, told apart by what must follow (or, in the last group, precede) it."""
    h = "[0-9a-f]"
    tails = [
        f"-{h}{{4}}-{h}{{4}}-{h}{{4}}-{h}{{12}}",
        f"-{h}{{4}}-{h}{{4}}-{h}{{12}}",
        f"-{h}{{4}}-{h}{{12}}",
        f"-{h}{{12}}",
    ]
    parts = [f"{h}{{2}}(?={h}{{{n}}}{tails[0]})" for n in (6, 4, 2, 0)]
    parts += [f"{h}{{2}}(?={h}{{{n}}}{tail}(?!{h}))" for tail in tails[1:] for n in (2, 0)]
    parts += [f"(?<=-{h}{{{n}}}){h}{{2}}(?={h}{{{10 - n}}}(?![0-9A-Za-z]))" for n in (0, 2, 4, 6, 8, 10)]
    return "|".join(parts)


SPLIT = "|".join(
    [
        _uuid_pairs(),
        r"[0-9]{1,2}",  # digits: pairs from the left
        r" ?[\p{L}\p{M}]+",  # words, with their leading space
        r" ?[^\s\p{L}\p{M}0-9]+",  # punctuation and symbols
        r"\r?\n",  # one newline at a time
        r"[^\S\r\n]+(?=[^\S\r\n])|\s",  # a run of spaces leaves its last one to the word
    ]
)


def corpus_files(roots: list[Path], limit: int = 400, seed: int = 0) -> list[Path]:
    """Up to `limit` text files under `roots` (sources, documents, licences), in a seeded order."""
    found = [
        p
        for root in roots
        for p in sorted(root.rglob("*"))
        if p.suffix in {".py", ".md", ".rst", ".txt", ""} and p.is_file()
    ]
    found = [p for p in found if 2_000 < p.stat().st_size < 300_000]
    random.Random(seed).shuffle(found)
    return found[:limit]


def default_roots() -> list[Path]:
    """Text that is on any machine: Python's standard library, and the system's licence texts."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share/common-licenses"), Path("/usr/share/doc")]
    return [r for r in roots if r.is_dir()]


def _words(files: list[Path], at_least: int = 3) -> Iterator[str]:
    """Each lower-case word the files use at least so often, the root of its count times, so that merges also spell rare words."""
    counts = Counter(
        w for p in files for w in re.findall(r"\b[a-z]{3,}\b", p.read_text(encoding="utf-8", errors="ignore"))
    )
    for word, n in sorted((w, n) for w, n in counts.items() if n >= at_least):
        yield f" {word}\n" * round(n**0.5) + word


def _to_bytes(piece: str) -> str:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)[0][0]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def known_pieces() -> list[str]:
    """Every piece that must be one token, in vocabulary order."""
    phrases = sorted(set(re.findall(r"[A-Za-z]+", PHRASES)))
    hexes = [a + b for a in "0123456789abcdef" for b in "0123456789abcdef"]
    pieces = hexes + SPACES + MARKS + [" " + c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    pieces += [" " + w for w in phrases] + BARE
    pieces += [" " + w for w in ADJECTIVES + NOUNS + VERBS + THINGS] + NOUNS
    return list(dict.fromkeys(pieces))


def build(files: list[Path], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the byte merges on `files` and put the known pieces beside them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scratch = Tokenizer(models.BPE())
    scratch.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=4 * vocab_size, initial_alphabet=alphabet, show_progress=False)
    scratch.train_from_iterator(_words(files), trainer)
    space = _to_bytes(" ")
    learned = [(space, c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"] + [
        tuple(m) for m in json.loads(scratch.to_str())["model"]["merges"]
    ]

    vocab = {t: i for i, t in enumerate([PAD, BOS, EOS, *alphabet])}
    for piece in known_pieces():
        vocab.setdefault(_to_bytes(piece), len(vocab))
    merges = []
    for left, right in learned:
        whole = left + right
        if left not in vocab or right not in vocab or re.search("[A-Z].*[A-Z]", whole):
            continue
        if whole not in vocab and len(vocab) >= vocab_size:
            break
        vocab.setdefault(whole, len(vocab))
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True, byte_fallback=False))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as Hugging Face reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
