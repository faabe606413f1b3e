"""Texts that some RULER tasks are made of: essays for haystacks, SQuAD and HotpotQA for the question-answering pair.

They come from files of the user's, or from the cache that ``fetch`` fills; nothing is downloaded unasked.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"
HOTPOT = ("namlh2004/hotpotqa", "hotpot_dev_distractor_v1.json")  # a copy on the hub: the original host is gone
LONGEST_SENTENCE = 1000  # characters; text without full stops is cut, so that needles find places in it
ESSAYS = "baber/paul_graham_essays"
FILES = {"essays": "essays.txt", "squad": "squad-dev-v2.0.json", "hotpot": HOTPOT[1]}
WHAT = {
    "essays": "text for the haystack: .txt, or .json and .jsonl with a field `text`",
    "squad": "SQuAD's dev-v2.0.json",
    "hotpot": "HotpotQA's hotpot_dev_distractor_v1.json",
}


class Question(NamedTuple):
    """A question, its reference answers, the documents that hold the answer, and documents close to those."""

    text: str
    outputs: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]


class Corpus(NamedTuple):
    """Documents, and questions that refer to them by number."""

    documents: list[str]
    questions: list[Question]


@dataclass(frozen=True)
class Data:
    """The files at hand: ``None`` looks in the cache. Each is read when a task first needs it.

    Raises (on access):
        ValueError: no such file, or it does not hold what it should; names the option and the remedy.
    """

    essays_file: Path | None = None
    squad_file: Path | None = None
    hotpot_file: Path | None = None

    def file(self, kind: str) -> Path:
        """The file of one kind; an error that says how to get it where there is none."""
        given = getattr(self, f"{kind}_file")
        path = given or cache_folder() / FILES[kind]
        if not path.is_file():
            where = f"{given} is no file" if given else f"no {kind} file"
            raise ValueError(
                f"{where}: pass --{kind} FILE ({WHAT[kind]}), or run keysift eval with --fetch where there is a network"
            )
        return path

    @cached_property
    def essays(self) -> list[str]:
        """The essays' sentences, whitespace normalised."""
        text = re.sub(r"\s+", " ", _read("essays", self.file("essays"), _essay_text)).strip()
        if len(text) < 200:
            raise ValueError(f"--essays {self.file('essays')} holds {len(text)} characters: a haystack needs more")
        sentences = re.split(r"(?<=[.!?]) |(?<=[。！？])", text)
        return [part for s in sentences if s for part in textwrap.wrap(s, LONGEST_SENTENCE)]

    @cached_property
    def squad(self) -> Corpus:
        return _read("squad", self.file("squad"), lambda path: _squad(json.loads(path.read_text(encoding="utf-8"))))

    @cached_property
    def hotpot(self) -> Corpus:
        return _read("hotpot", self.file("hotpot"), lambda path: _hotpot(json.loads(path.read_text(encoding="utf-8"))))


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "keysift" / "ruler"


def fetch(kinds: list[str]) -> list[Path]:
    """Download what is not in the cache yet; the paths of all.

    Raises:
        ValueError: no network, or the source has changed; says which file to get by hand instead.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    folder, paths = cache_folder(), []
    for kind in kinds:
        path = folder / FILES[kind]
        paths.append(path)
        if path.is_file():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                part = Path(scratch) / "part"
                SOURCES[kind](part)
                getattr(Data(**{f"{kind}_file": part}), kind)  # a page that says "not found" is no data
                part.replace(path)
        except Exception as error:  # network libraries raise many types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"cannot fetch {WHAT[kind]}: {reason}; get it by hand and pass --{kind} FILE") from error
    return paths


def _fetch_squad(path: Path) -> None:
    with urllib.request.urlopen(SQUAD_URL, timeout=60) as response, path.open("wb") as out:
        shutil.copyfileobj(response, out)


def _fetch_hotpot(path: Path) -> None:
    from huggingface_hub import hf_hub_download

    shutil.copyfile(hf_hub_download(HOTPOT[0], HOTPOT[1], repo_type="dataset"), path)


def _fetch_essays(path: Path) -> None:
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError("needs the library `datasets`: pip install 'keysift[eval]'") from error
    datasets.logging.set_verbosity_error()
    path.write_text("\n".join(datasets.load_dataset(ESSAYS, split="train")["text"]), encoding="utf-8")


SOURCES: dict[str, Callable[[Path], None]] = {"essays": _fetch_essays, "squad": _fetch_squad, "hotpot": _fetch_hotpot}


def _read(kind: str, path: Path, parse: Callable[[Path], Any]) -> Any:
    try:
        return parse(path)
    except OSError as error:
        raise ValueError(f"--{kind}: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--{kind}: {path} is not {WHAT[kind]}: {type(error).__name__} {error}") from error


def _essay_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return " ".join(json.loads(line)["text"] for line in text.split("\n") if line.strip())
    if path.suffix == ".json":
        held = json.loads(text)
        return " ".join(item["text"] for item in (held if isinstance(held, list) else [held]))
    return text


def _squad(raw: dict[str, Any]) -> Corpus:
    articles = [[p["context"] for p in article["paragraphs"]] for article in raw["data"]]
    documents = sorted({text for article in articles for text in article})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article, texts in zip(raw["data"], articles, strict=True):
        for paragraph in article["paragraphs"]:
            gold = number[paragraph["context"]]
            near = tuple(sorted({number[text] for text in texts} - {gold}))
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible") and asked["answers"]:
                    outputs = tuple(answer["text"] for answer in asked["answers"])
                    questions.append(Question(asked["question"], outputs, (gold,), near))
    if not questions:
        raise ValueError("no question has an answer")
    return Corpus(documents, questions)


def _hotpot(raw: list[dict[str, Any]]) -> Corpus:
    def text(document: list[Any]) -> str:
        if not (isinstance(document, list) and len(document) == 2 and isinstance(document[1], list)):
            raise ValueError("a context is not a list of [title, [sentences]]")
        return f"{document[0]}\n{''.join(document[1])}"

    documents = sorted({text(d) for item in raw for d in item["context"]})
    number = {d: i for i, d in enumerate(documents)}
    questions = [
        Question(item["question"], (item["answer"],), tuple(number[text(d)] for d in item["context"]), ())
        for item in raw
    ]
    return Corpus(documents, questions)
