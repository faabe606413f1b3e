"""What is compared: runs, each a prefill and a decode method, and published protocols as ready-made sets of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from keysift.eval import ruler
from keysift.methods import describe, parse
from keysift.speculate import check_draft

PARTS = ("prefill", "decode", "draft")


class Run(NamedTuple):
    """One way to run the model; ``name`` spells it canonically, and equal names mean equal methods."""

    name: str
    prefill: Any
    decode: Any
    draft: Any = None

    @property
    def methods(self) -> str:
        """The methods without their numbers: runs of one curve share them."""
        there = [part for part in PARTS if getattr(self, part) is not None]
        names = {part: _without_numbers(describe(getattr(self, part))) for part in there}
        return " + ".join(f"{n} {part}" for part, n in names.items() if n != "dense") or "dense"


def _without_numbers(spec: str) -> str:
    name, _, options = spec.partition(":")
    words = [item for item in options.split(",") if item.partition("=")[2].isalpha()]
    return f"{name} {' '.join(words)}".strip()


def parse_run(text: str) -> Run:
    """A run from ``prefill=SPEC;decode=SPEC;draft=SPEC``, dense where a part is left out; "dense" or "" means dense.

    Raises:
        ValueError: unknown part, SPEC or option; a draft beside a sparse decode method.
    """
    specs: dict[str, str] = {}
    for piece in filter(None, (p.strip() for p in text.split(";"))):
        part, equals, spec = (p.strip() for p in piece.partition("="))
        if piece == "dense":
            continue
        if part not in PARTS or not equals or not spec:
            raise ValueError(f"--run '{text}': write prefill=SPEC;decode=SPEC;draft=SPEC, each part at most once")
        if part in specs:
            raise ValueError(f"--run '{text}': {part} stands there twice")
        specs[part] = spec
    try:
        prefill, decode = parse(specs.get("prefill", "dense"), "prefill"), parse(specs.get("decode", "dense"), "decode")
        draft = parse(specs["draft"], "decode") if "draft" in specs else None
        check_draft(draft, decode, None)
    except ValueError as error:
        raise ValueError(f"--run '{text}': {error}") from None
    named = [f"{p}={describe(m)}" for p, m in (("prefill", prefill), ("decode", decode)) if describe(m) != "dense"]
    named += [] if draft is None else [f"draft={describe(draft)}"]
    return Run(";".join(named) or "dense", prefill, decode, draft)


def parse_runs(texts: Iterable[str]) -> list[Run]:
    """Runs without repetitions, in their order."""
    return list({run.name: run for run in map(parse_run, texts)}.values())


@dataclass(frozen=True)
class Preset:
    """A published protocol: what it compares, on which tasks, lengths and how many samples."""

    runs: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    note: str


SHORT_TASKS = ("lm:gsm8k_cot", "lm:mmlu_flan_cot_fewshot", "lm:coqa")  # MagicPIG's tasks with a window of 24
MAGICPIG_SETTINGS = {64: ((10, 150), (9, 120), (8, 75)), 24: ((10, 220), (8, 90))}  # (K, L) by window
QUEST_SETTINGS = {64: ((16, 0.04), (32, 0.06), (64, 0.08)), 24: ((16, 0.05), (32, 0.1))}  # (page, share)
GAMMA = {"llama": 0.95, "glm": 0.95, "glm4": 0.95, "chatglm": 0.95, "yi": 0.9, "qwen2": 0.9}
PRESETS = ("magicpig", "flexprefill")


def preset(name: str, tasks: list[str] | None, model_type: str, model_name: str, layers: int) -> Preset:
    """A protocol for a model.

    Args:
        name: "magicpig" (arXiv:2410.16179) or "flexprefill" (arXiv:2502.20766).
        tasks: those asked for, where the user names them: MagicPIG's window depends on them.
        model_type: as the model's config has it; FlexPrefill's gamma depends on it.
        model_name: folder or hub id; Yi models call themselves llama in their config.
        layers: number of decoder layers.

    Raises:
        ValueError: unknown name; tasks of both windows at once.
    """
    if name == "magicpig":
        return _magicpig(tasks or list(ruler.TASKS), layers)
    if name == "flexprefill":
        return _flexprefill(model_type, model_name)
    raise ValueError(f"unknown preset '{name}': choose {' or '.join(PRESETS)}")


def _magicpig(tasks: list[str], layers: int) -> Preset:
    short = [task for task in tasks if task in SHORT_TASKS]
    if short and len(short) < len(tasks):
        raise ValueError(
            f"--preset magicpig has a window of 24 for {', '.join(short)} and of 64 for the other tasks:"
            " evaluate them one after the other, each with an --out folder of its own"
        )
    window = 24 if short else 64
    dense = "+".join(str(i) for i in range(0, layers, 16))
    runs = ["dense"]
    runs += [f"decode=magicpig:K={k},L={t},window={window},dense_layers={dense}" for k, t in MAGICPIG_SETTINGS[window]]
    runs += [f"decode=quest:page={p},keep={s},window={window}" for p, s in QUEST_SETTINGS[window]]
    runs += [f"decode={m}:keep=0.02,window={window}" for m in ("topk", "oracle")]
    return Preset(tuple(runs), tuple(tasks), (16384, 32768, 65536, 98304), 50, f"window {window}, dense layers {dense}")


def _flexprefill(model_type: str, model_name: str) -> Preset:
    family = "yi" if model_name.lower().rstrip("/").rpartition("/")[2].startswith("yi") else model_type
    gammas = [GAMMA[family]] if family in GAMMA else sorted({*GAMMA.values()})
    note = f"gamma {' and '.join(map(str, gammas))} for a {family} model, tau 0.1, min budget 1024"
    flex = [f"prefill=flexprefill:mode=seed,gamma={g},tau=0.1,min_budget=1024" for g in gammas]
    flex += [f"prefill=flexprefill:gamma={g},tau=0.1,min_budget=1024" for g in gammas]
    others = ["prefill=streaming:sinks=1024,window=8192", "prefill=minference:vertical=1000,slash=6096"]
    lengths = (4096, 8192, 16384, 32768, 65536, 131072)
    return Preset(("dense", *flex, *others), tuple(ruler.TASKS), lengths, 32, note)
