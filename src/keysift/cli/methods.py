"""``keysift methods``: what there is to choose from, with every field, its default and its paper."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keysift.methods import catalog, roles


def command(
    name: Annotated[str | None, typer.Argument(show_default=False, help="Show this one in detail.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the methods, or show one in detail."""
    known = catalog()
    if name is not None and name not in known:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(known)}")
    shown = [describe(key, cls) for key, cls in known.items() if name in (None, key)]
    if as_json:
        print(json.dumps(shown if name is None else shown[0], indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(table(shown, limits=name is not None))
    if name is None:
        console.print("\nA SPEC is name[:key=value,...], such as flexprefill:gamma=0.9")
    else:
        console.print((inspect.getdoc(known[name]) or "").partition("\n")[2])


def describe(name: str, cls: Any) -> dict[str, Any]:
    """A method as plain data; ``url`` is None where the source is not on arXiv."""
    return {
        "name": name,
        "roles": list(roles(cls)),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "paper": cls.paper,
        "url": link(cls.paper),
        "fields": [describe_field(field) for field in dataclasses.fields(cls)],
    }


def link(paper: str) -> str | None:
    return f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" if paper.startswith("arXiv:") else None


def describe_field(field: dataclasses.Field[Any]) -> dict[str, Any]:
    known = {key: value for key, value in field.metadata.items() if value is not None}
    return {"name": field.name, "default": field.default, "type": str(field.type), **known}


def spell(value: Any) -> str:
    """A field's value as a SPEC has it."""
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def limits_of(field: dict[str, Any]) -> str:
    """The values that a field takes, in words; empty where its type says it all."""
    if "choices" in field:
        return "one of " + ", ".join(map(str, field["choices"]))
    words = {"above": "above", "low": "at least", "high": "at most"}
    return " and ".join(f"{word} {field[key]}" for key, word in words.items() if key in field)


def table(shown: list[dict[str, Any]], limits: bool) -> Table:
    """One block a method: its name, roles and source, then a line a field, with (``limits``) the values it takes."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", "default", "what it is"):
        grid.add_column(title, overflow="fold")
    for index, method in enumerate(shown):
        if index:
            grid.add_row()
        roles, source = " ".join(method["roles"]), method["url"] or method["paper"]
        grid.add_row(Text(method["name"], style="bold"), roles, f"{method['summary']} {source}".strip())
        for field in method["fields"]:
            doc, bounds = field.get("doc", ""), limits_of(field) if limits else ""
            grid.add_row(f"  {field['name']}", spell(field["default"]), f"{doc} ({bounds})" if bounds else doc)
    return grid
