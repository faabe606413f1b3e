"""``keysift inspect``: what heads attend to, and what a method keeps of it, as a figure, a table and data."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from typer import Exit
from typer import Option as option

from keysift import pocket
from keysift.checkpoint import encode, load, pick_device, pick_dtype
from keysift.cli import options
from keysift.cli.generate import INTERRUPTED, check_range
from keysift.cli.prompt import read_prompt
from keysift.cli.stream import prefill_bar
from keysift.eval.inspect import Head, Inspection, Layout, choose, inspect, layout
from keysift.eval.inspect_plot import draw, share
from keysift.hf.config import context_tokens
from keysift.methods import describe, parse

DEFAULT_OUT = Path("keysift-inspect.png")
FIGURES = {  # of a head, in the order of CSV columns; those of decode are the last step's
    "layer": None,
    "head": None,
    "density_for_95": "pairs for 95%",
    "density": "pairs read",
    "mass_covered": "mass covered",
    "mass_covered_worst": "worst block",
    "rows_read": "rows read",
    "rows_cached": "of",
    "decode_mass_covered": "mass covered",
    "decode_output_error": "output error",
}


def command(
    dash: options.Dash = None,
    model: options.Model = None,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    prefill: options.Prefill = "dense",
    decode: Annotated[str | None, option(metavar="SPEC", help="How new tokens read the past; none without it.")] = None,
    layers: Annotated[str | None, option(metavar="LIST", help="Such as 0,3; or all. Default: a few.")] = None,
    heads: Annotated[str | None, option(metavar="LIST", help="Query heads, likewise.")] = None,
    steps: Annotated[int | None, option(metavar="N", show_default="1", help="Greedy steps with --decode.")] = None,
    out: Annotated[
        Path | None, option(metavar="PNG", help=f"The figure; {DEFAULT_OUT} if no other output is named.")
    ] = None,
    csv_file: Annotated[Path | None, option("--csv", metavar="FILE", help="The table as CSV.")] = None,
    as_json: Annotated[bool, option("--json", help="One JSON object instead of the table.")] = False,
    maps: Annotated[bool, option("--maps", help="The block maps and the rows read, in the JSON object.")] = False,
    seed: Annotated[int, option(metavar="N", help="For methods that draw.")] = 0,
    chat: options.Chat = False,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
) -> None:
    """Draw what heads attend to in a prompt, and what methods keep of it."""
    methods = parse(prefill, "prefill"), None if decode is None else parse(decode, "decode")
    wanted = numbers("layers", layers), numbers("heads", heads)
    check_range("seed", seed, 0, 2**63 - 1)
    check_range("steps", steps, 1)
    if steps is not None and decode is None:
        raise ValueError(f"steps={steps}: steps need a method, name one with --decode")
    if maps and not as_json:
        raise ValueError("--maps: the maps go into the JSON object, add --json")
    picture = DEFAULT_OUT if out is None and not as_json and csv_file is None else out
    check_outputs(picture, csv_file)
    text = read_prompt(prompt, prompt_file, dash)
    where = pick_device(device)
    console, name = Console(stderr=True), "pocket" if model is None else model
    try:
        with console.status("Loading the model"):
            lm, tokenizer = load(str(pocket.path()) if model is None else model, where, pick_dtype(dtype, where))
        input_ids = encode(tokenizer, text, chat, lm.get_input_embeddings().num_embeddings)["input_ids"].to(where)
        check_context(lm.config, input_ids.shape[1], 0 if decode is None else steps or 1)
        there = layout(lm)
        chosen = choose(there, *wanted)
        say_what_is_shown(there, chosen, wanted)
        seen = look(lm, input_ids, chosen, methods, steps or 1, seed, console)
        settings = {"model": name, "seed": seed, "device": str(where), "dtype": str(lm.dtype).removeprefix("torch.")}
        print(json.dumps(as_data(seen, settings, there, maps))) if as_json else print_table(seen)
        if csv_file is not None:
            write(csv_file, as_csv(seen).encode())
        if picture is not None:
            with console.status("Drawing"):
                png = draw(seen, name)
            write(picture, png)
    except KeyboardInterrupt:
        raise Exit(INTERRUPTED) from None


def numbers(name: str, text: str | None) -> list[int] | str | None:
    """``0,3`` as a list, ``all`` as it is."""
    if text is None or text.strip() == "all":
        return text and text.strip()
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text}: write numbers joined by commas, such as 0,3, or all") from None


def check_outputs(picture: Path | None, csv_file: Path | None) -> None:
    """Refuse now what could not be written later; nothing that exists is changed."""
    if picture is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the figure needs matplotlib: pip install 'keysift[plot]', or use --json or --csv alone")
        if picture.suffix.lower() != ".png":
            raise ValueError(f"out={picture}: the figure is a PNG, give it a name that ends in .png")
    for file in filter(None, (picture, csv_file)):
        existed = file.exists()
        try:
            with file.open("ab"):
                pass
            if not existed:
                file.unlink()
        except OSError as error:
            raise ValueError(f"cannot write {file}: {error.strerror}") from error


def check_context(config: Any, prompt_tokens: int, steps: int) -> None:
    limit = context_tokens(config)
    if limit is not None and prompt_tokens + steps > limit:
        tokens = f"{prompt_tokens:,} prompt tokens" + (f" and {steps:,} decode step{'s'[: steps > 1]}" if steps else "")
        over = prompt_tokens + steps - limit
        raise ValueError(f"{tokens} exceed the model's context of {limit:,}: shorten the prompt by {over:,}")


def say_what_is_shown(there: Layout, chosen: dict[int, list[int]], wanted: tuple[Any, Any]) -> None:
    """What was left out, and what was chosen without being named, on standard error."""
    asked = range(there.num_layers) if isinstance(wanted[0], str) else wanted[0] or []
    if skipped := [layer for layer in asked if layer not in chosen]:
        note(f"layers {joined(skipped)} left out: they have an attention window of their own, which no method serves")
    if None in wanted:
        heads = " / ".join(sorted({joined(heads) for heads in chosen.values()}))
        served = f"{len(there.heads)} layers with {max(there.heads.values())} query heads"
        note(f"showing layers {joined(chosen)} and heads {heads} of {served}; choose with --layers and --heads")


def note(text: str) -> None:
    print(text, file=sys.stderr)


def joined(values: Any) -> str:
    return ",".join(map(str, values))


def look(
    lm: Any,
    input_ids: Tensor,
    chosen: dict[int, list[int]],
    methods: tuple[Any, Any | None],
    steps: int,
    seed: int,
    console: Console,
) -> Inspection:
    with prefill_bar(lm, input_ids.shape[1], 1, console) as end_bar:
        return inspect(lm, input_ids, chosen, *methods, steps=steps, seed=seed, on_prompt_read=end_bar)


def figures(head: Head) -> dict[str, Any]:
    """The figures of a head, by column; without decode steps theirs are None."""
    assert head.prefill is not None
    step = head.steps[-1] if head.steps else None
    return {
        "layer": head.layer,
        "head": head.head,
        "density_for_95": head.prefill.density_enough,
        "density": head.prefill.density,
        "mass_covered": head.prefill.mass_covered,
        "mass_covered_worst": head.prefill.mass_covered_worst,
        "rows_read": step and step.rows_read,
        "rows_cached": step and step.rows_cached,
        "decode_mass_covered": step and step.mass_covered,
        "decode_output_error": step and step.output_error,
    }


def as_data(seen: Inspection, settings: dict[str, Any], there: Layout, maps: bool) -> dict[str, Any]:
    return {
        **settings,
        "prefill": describe(seen.prefill),
        "decode": seen.decode and describe(seen.decode),
        "prompt_tokens": seen.prompt_tokens,
        "token_ids": seen.token_ids,
        "layers_without_method": there.unserved,
        "heads": [head_data(head, maps) for head in seen.heads],
    }


def head_data(head: Head, maps: bool) -> dict[str, Any]:
    view = head.prefill
    assert view is not None
    data = {**figures(head), "block": view.block, "dense": view.dense or None}
    data["steps"] = [step._asdict() for step in head.steps]
    if maps:
        data["attention"], data["kept"] = view.attention.tolist(), view.kept.int().tolist()
        last = head.last_step
        data["last_rows"] = last and last.read.nonzero()[:, 0].tolist()
        data["last_weights"] = last and last.weight.tolist()
    return data


def as_csv(seen: Inspection) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIGURES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(figures(head) for head in seen.heads)
    return text.getvalue()


def print_table(seen: Inspection) -> None:
    title = f"{seen.prompt_tokens:,} prompt tokens; prefill {describe(seen.prefill)}"
    if seen.decode is not None:
        title += f"; decode {describe(seen.decode)}, step {len(seen.token_ids)}"
    grid = Table(box=None, pad_edge=False, header_style="bold")
    columns = list(FIGURES)[: None if seen.decode else 6]
    for column in columns:
        grid.add_column(FIGURES[column] or column, justify="right")
    for head in seen.heads:
        grid.add_row(*(cell(value) for column, value in figures(head).items() if column in columns))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(title)
    console.print(grid)


def cell(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else share(value)


def write(file: Path, data: bytes) -> None:
    try:
        file.write_bytes(data)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror}") from error
    note(f"wrote {file}")
