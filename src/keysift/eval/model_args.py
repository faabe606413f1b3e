"""lm-eval's ``--model_args`` with SPECs in them: lm-eval splits at every comma, and a SPEC has commas of its own."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

from keysift import pocket
from keysift.methods import catalog, parse

SPECS = ("prefill", "decode", "draft")
SEPARATOR = ";"  # in place of the comma between a SPEC's options, where a comma separates arguments


def method(spec: Any, role: Any) -> Any:
    """``methods.parse``, which also takes semicolons for commas."""
    return parse(spec.replace(SEPARATOR, ",") if isinstance(spec, str) else spec, role)


def refuse_draft(draft: Any) -> None:
    """Raise ValueError for a draft that would be one, after errors in its SPEC."""
    if draft in (None, "", "none", "None"):
        return
    if method(draft, "decode") != parse("dense", "decode"):
        raise ValueError(
            f"draft={draft}: lm-eval's tasks are answered without drafts, which change no answer: leave draft out"
        )


def glue(text: str, known: Collection[str]) -> str:
    """Comma-separated ``key=value`` pairs in which a SPEC's own commas became semicolons.

    What follows a SPEC belongs to it, up to the next ``known`` argument: any other goes before the SPECs.
    """
    joined, in_spec = "", False
    for piece in text.split(","):
        key = piece.partition("=")[0].strip()
        follows = in_spec and key not in known
        joined += (SEPARATOR if follows else ",") + piece if joined else piece
        in_spec = follows or key in SPECS
    return joined


def glue_pairs(pairs: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A dict in which the options that lm-eval's splitting at commas took out of a SPEC are back in it.

    Raises:
        ValueError: an option that may come from either of two SPECs.
    """
    out, spec = dict[str, Any](), ""
    options = {name: _options(pairs.get(name)) for name in SPECS}
    for key, value in pairs.items():
        if key in known or not spec or key not in options[spec]:
            out[key] = value
            spec = key if key in SPECS else spec
            continue
        later = list(pairs)[list(pairs).index(key) :]
        if any(key in options[name] for name in SPECS if name in later):
            raise ValueError(f"{key}={value} may belong to either SPEC: write ; for , between the options of a SPEC")
        out[spec] += f"{SEPARATOR if ':' in out[spec] else ':'}{key}={value}"
    return out


def _options(spec: Any) -> set[str]:
    cls = catalog().get(spec.partition(":")[0].strip()) if isinstance(spec, str) else None
    return {f.name for f in fields(cls)} if cls else set()


def prepare(args: Iterable[str], known: Collection[str]) -> list[str]:
    """lm-eval's arguments, with SPECs that survive its splitting at commas and a folder for the pocket model."""
    rest, values = _take(list(args), ("--model_args", "-a"))
    kept, model = _take(rest, ("--model", "-M"))
    if model[-1:] != ["keysift"] or not values and {"--config", "-C"} & set(kept):
        return list(args)
    folder = str(pocket.path())
    if values and values[0].lstrip().startswith("{"):
        try:
            pairs = json.loads(values[0])
        except json.JSONDecodeError:
            return list(args)  # lm-eval says what is wrong
        name = pairs.get("pretrained", "pocket")
        return [*rest, "--model_args", json.dumps({**pairs, "pretrained": folder if name == "pocket" else name})]
    pieces = [piece for piece in glue(",".join(values), known).split(",") if piece.strip()]
    if not any(piece.partition("=")[0].strip() == "pretrained" for piece in pieces):
        pieces.insert(0, "pretrained=pocket")
    return [*rest, "--model_args", ",".join(p if p != "pretrained=pocket" else f"pretrained={folder}" for p in pieces)]


def _take(args: list[str], names: tuple[str, str]) -> tuple[list[str], list[str]]:
    """Arguments without an option of one or more values, and its values."""
    kept: list[str] = []
    values: list[str] = []
    inside = False
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in names:
            inside = not equals
            values += [value] if equals else []
        elif inside and not arg.startswith("-"):
            values.append(arg)
        else:
            inside = False
            kept.append(arg)
    return kept, values
