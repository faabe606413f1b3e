"""``keysift bench``: how long attention takes, and the first token of a model; beside dense, on this machine."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Exit
from typer import Option as option

from keysift import pocket
from keysift.bench import first_token as ttft
from keysift.bench import prefill as attention
from keysift.bench.plots import draw_prefill
from keysift.checkpoint import encode, load, pick_device, pick_dtype
from keysift.cli import info, options
from keysift.cli.eval import parse_lengths
from keysift.cli.generate import INTERRUPTED
from keysift.cli.prompt import read_prompt
from keysift.eval.results import replace_file
from keysift.functional import BACKENDS
from keysift.hf.config import context_tokens
from keysift.methods import parse
from keysift.ops import crossover
from keysift.types import one_of

GPU_SHAPE, CPU_SHAPE = (32, 8, 128), (4, 2, 64)  # heads, KV heads, dim
GPU_LENGTHS = [1024 << i for i in range(8)]
GPU_PROMPTS = [1 << 15, 1 << 17, 1 << 19]
CPU_LENGTHS = [512, 1024, 2048]
CROSSOVER_LENGTHS = [1024 << i for i in range(6)]
CROSSOVER_METHOD = "flexprefill:dense_below=0"

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure speed on this machine, dense beside sparse."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Lengths = Annotated[
    str | None,
    option(metavar="N,M", show_default="as suits the device", help="Prompts in tokens, such as 8192,16384 or 8k,16k."),
]
Out = Annotated[Path | None, option(metavar="DIR", help="Folder for the results.")]
Force = Annotated[bool, option("--force", help="Replace the results of an earlier run in DIR.")]
AsJson = Annotated[bool, option("--json", help="Print JSON instead of the table.")]
ShapeName = Annotated[
    str | None,
    option(
        metavar="NAME",
        show_default="llama-8b, on a CPU tiny",
        help=f"Random weights: {', '.join(ttft.SHAPES)}.",
    ),
]
ModelPath = Annotated[str | None, option(metavar="PATH", help="A model with its weights, instead of --shape.")]
DType = Annotated[
    str, option(metavar="T", help="auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16 or float16.")
]


@app.command("prefill")
def prefill(
    lengths: Lengths = None,
    methods: Annotated[
        list[str] | None, option(metavar="SPEC", show_default="flexprefill", help="Beside dense; may be repeated.")
    ] = None,
    backends: Annotated[
        str, option(metavar="A,B", help="Of block-sparse attention: auto, fa4, triton, cpu, sdpa.")
    ] = "auto",
    batch: Annotated[int, option(metavar="N", help="Sequences.")] = 1,
    heads: Annotated[int | None, option(metavar="N", show_default="32, on a CPU 4", help="Query heads.")] = None,
    kv_heads: Annotated[int | None, option(metavar="N", show_default="8, on a CPU 2", help="KV heads.")] = None,
    dim: Annotated[int | None, option(metavar="N", show_default="128, on a CPU 64", help="Of a head.")] = None,
    inputs: Annotated[
        str, option(metavar="KIND", help="structured (shaped like real heads' attention) or random (noise).")
    ] = "structured",
    chunk: Annotated[
        int | None, option(metavar="N", show_default="whole", help="Read the prompt N tokens at a time.")
    ] = None,
    repeats: Annotated[
        int | None, option(metavar="N", show_default="half a second, on a CPU one", help="Timed runs of each part.")
    ] = None,
    warmup: Annotated[int | None, option(metavar="N", show_default="some", help="Runs before them.")] = None,
    check_rows: Annotated[int, option(metavar="N", help="Query blocks compared with the fp32 reference.")] = 8,
    save_crossover: Annotated[
        bool, option("--save-crossover", help="Measure from which length on flexprefill pays, and remember it.")
    ] = False,
    out: Out = None,
    force: Force = False,
    seed: Annotated[int, option(metavar="N", help="Of the inputs, and of methods that draw.")] = 0,
    device: options.Device = "auto",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Time prefill attention: the search, the attention and both, beside dense. Wrong results get no speed."""
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    if save_crossover and not on_gpu:
        raise ValueError(f"--save-crossover: is measured on a GPU, and the device is {where}")
    usual = GPU_SHAPE if on_gpu else CPU_SHAPE
    setup = attention.Setup(
        heads=usual[0] if heads is None else heads,
        kv_heads=usual[1] if kv_heads is None else kv_heads,
        dim=usual[2] if dim is None else dim,
        batch=batch,
        dtype=tensor_dtype(dtype, where),
        device=where,
        seed=seed,
        inputs=inputs,
        chunk=chunk,
        repeats=repeats,
        warmup=warmup,
        check_rows=check_rows,
    )
    chosen = [parse(spec, "prefill") for spec in methods or ["flexprefill"]]
    sizes = (GPU_LENGTHS if on_gpu else CPU_LENGTHS) if lengths is None else parse_lengths(lengths)
    kernels = parse_backends(backends)
    attention.check_backends(setup, chosen, kernels)
    file = claim(out, "prefill.json", force)
    rows: list[attention.Row] = []
    data = about(where) | {"settings": settings_of(setup), "rows": []}
    console = Console(stderr=True)
    try:
        run(attention.measure, (setup, sizes, chosen, kernels), rows, data, file, console)
        if save_crossover:
            data["crossover"] = remember_crossover(setup, console)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    finish(data, file, lambda: print_prefill(rows, setup), as_json)
    if file is not None:
        picture(lambda: draw_prefill(rows, title(setup, data)), file.with_suffix(".png"))
    end(rows, interrupted)


@app.command("first-token")
def first_token(
    lengths: Lengths = None,
    shape: ShapeName = None,
    model: ModelPath = None,
    prompt_file: Annotated[
        Path | None,
        option(metavar="FILE", show_default="the demo document", help="With --model: text, repeated as needed."),
    ] = None,
    chunk: Annotated[int, option(metavar="N", help="Read the prompt N tokens at a time.")] = 16384,
    prefill: Annotated[str, option(metavar="SPEC", help="Beside dense.")] = "flexprefill",
    skip_dense_above: Annotated[
        int | None, option(metavar="N", help="Do not read longer prompts densely: that can take minutes.")
    ] = None,
    all_logits: Annotated[bool, option("--all-logits", help="Keep the logits of all tokens.")] = False,
    repeats: Annotated[int, option(metavar="N", help="Timed runs.")] = 1,
    out: Out = None,
    force: Force = False,
    seed: Annotated[int, option(metavar="N", help="Of weights, prompts, and of methods that draw.")] = 0,
    device: options.Device = "auto",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Time a model's first token, the prompt read densely and by a method, in chunks into a cache."""
    setup = ttft.Setup(parse(prefill, "prefill"), chunk, seed, repeats, skip_dense_above, all_logits)
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    name = shape_name(shape, model, on_gpu)
    if model is None and prompt_file is not None:
        raise ValueError("--prompt-file is for --model: random weights read random tokens")
    sizes = (GPU_PROMPTS if on_gpu else CPU_LENGTHS) if lengths is None else parse_lengths(lengths)
    file = claim(out, "first-token.json", force)
    console = Console(stderr=True)
    with console.status("Making the model" if model is None else "Loading the model"):
        if model is None:
            subject = ttft.random_model(name, max(sizes), where, tensor_dtype(dtype, where), seed)
        else:
            subject = trained(model, prompt_file, max(sizes), where, dtype)
    rows: list[ttft.Row] = []
    settings = {**ttft.settings_of(setup), "model": model, "shape": None if model else name}
    settings["dtype"] = str(subject.model.dtype).removeprefix("torch.")
    data = about(where) | {"settings": settings, "rows": []}
    try:
        run(ttft.measure, (subject, setup, sizes), rows, data, file, console)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    if subject.random:
        data["note"] = what_random_means(name, rows)
    finish(data, file, lambda: print_first_token(rows, data.get("note")), as_json)
    end(rows, interrupted)


def shape_name(shape: str | None, model: str | None, on_gpu: bool) -> str:
    """The shape of random weights: what was asked for, or what suits the device."""
    if model is not None and shape is not None:
        raise ValueError("--model and --shape: give one of them")
    name = shape or ("llama-8b" if on_gpu else "tiny")
    one_of("shape", name, ttft.SHAPES)
    return name


def decoder(
    model: str | None, shape: str, rows: int, asked: str, device: torch.device, dtype: str, seed: int, longest: int
) -> Any:
    """A checkpoint, which must take the rows that ``asked`` comes to, or random weights that take ``longest``."""
    if model is None:
        return ttft.random_model(shape, longest, device, tensor_dtype(dtype, device), seed).model
    lm, _ = load(model, device, pick_dtype(dtype, device))
    limit = context_tokens(lm.config)
    if limit is not None and rows > limit:
        raise ValueError(f"{asked}: {rows} rows are needed, and the model's context is {limit:,} tokens")
    return lm


def trained(model: str, prompt_file: Path | None, longest: int, device: torch.device, dtype: str) -> ttft.Subject:
    """A checkpoint, and prompts that repeat a text."""
    text = read_prompt(None, prompt_file or pocket.path() / "demo.txt", None)
    lm, tokenizer = load(model, device, pick_dtype(dtype, device))
    limit = context_tokens(lm.config)
    if limit is not None and longest > limit:
        raise ValueError(f"--lengths {longest}: the model's context is {limit:,} tokens")
    once = encode(tokenizer, text, False, lm.get_input_embeddings().num_embeddings)["input_ids"].to(device)

    def prompt(length: int) -> torch.Tensor:
        return once.repeat(1, -(-length // once.shape[1]))[:, :length]

    return ttft.Subject(lm, prompt, random=False)


def what_random_means(shape: str, rows: Sequence[ttft.Row]) -> str:
    read = ", ".join(f"{r.density:.1%} at {r.length:,}" for r in rows if r.masks == "structured" and r.density)
    return (
        f"{shape} with random weights: the search runs on the model's own queries and keys, and attention reads the"
        f" blocks found in structured inputs of the same shape (density {read or 'not measured'})"
    )


# ---- what the user gave -------------------------------------------------------------------------------------------


def tensor_dtype(name: str, device: torch.device) -> torch.dtype:
    picked = pick_dtype(name, device)
    return torch.bfloat16 if picked == "auto" else picked


def parse_backends(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        one_of("backends", name, BACKENDS)
    return names


def claim(out: Path | None, name: str, force: bool) -> Path | None:
    """The file for the results, refused now if it could not be written or would replace another run's."""
    if out is None:
        return None
    file = out / name
    if file.exists() and not force:
        raise ValueError(f"{file} holds the results of an earlier run: choose another --out, or add --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / f".{name}.trial"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to --out {out}: {error.strerror}") from error
    return file


def about(device: torch.device) -> dict[str, Any]:
    """Where and with what a run is made."""
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": info.cpu()["name"],
        "versions": info.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["keysift", *sys.argv[1:]]),
    }


def settings_of(setup: Any) -> dict[str, Any]:
    found = dataclasses.asdict(setup)
    return {**found, "dtype": str(setup.dtype).removeprefix("torch."), "device": str(setup.device)}


# ---- running and showing ------------------------------------------------------------------------------------------


def run(
    measure: Callable[..., Any],
    arguments: tuple[Any, ...],
    rows: list[Any],
    data: dict[str, Any],
    file: Path | None,
    console: Console,
) -> None:
    """Collect the rows; each is on disk before the next is measured."""
    with console.status("Measuring") as status:

        def start(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                note(text)

        for row in measure(*arguments, start):
            rows.append(row)
            data["rows"].append(dataclasses.asdict(row))
            if file is not None:
                save(file, data)


def save(file: Path, data: dict[str, Any]) -> None:
    try:
        replace_file(file, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        note(f"cannot write {file}: {error.strerror}")  # the table still comes


def remember_crossover(setup: attention.Setup, console: Console) -> dict[str, Any]:
    """Measure from which length on flexprefill is faster than dense, search included, and store it."""
    rows: list[attention.Row] = []
    whole = dataclasses.replace(setup, chunk=None)
    arguments = (whole, CROSSOVER_LENGTHS, [parse(CROSSOVER_METHOD, "prefill")], ["auto"])
    run(attention.measure, arguments, rows, {"rows": []}, None, console)
    speedups = {row.length: row.speedup for row in rows if row.speedup and row.method != "dense"}
    shape = crossover.shape_name(setup.batch * setup.heads, setup.batch * setup.kv_heads, setup.dim)
    found: dict[str, Any] = {"shape": shape, "tokens": None, "file": None, "speedups": speedups}
    if len(speedups) < len(CROSSOVER_LENGTHS):
        missing = next(row for row in rows if not row.speedup)
        note(f"no crossover stored: {missing.length:,} {missing.method} was not measured, {missing.reason}")
        return found
    tokens = attention.crossover_tokens(speedups)
    if tokens is None:
        note(f"no crossover stored: dense is faster up to {CROSSOVER_LENGTHS[-1]:,} tokens")
        return found
    try:
        path = crossover.save(torch.cuda.get_device_name(setup.device), shape, tokens)
    except OSError as error:
        note(f"crossover of {shape}: {tokens:,} tokens, but it cannot be stored: {error}")
        return found | {"tokens": tokens}
    note(f"crossover of {shape}: {tokens:,} tokens, stored in {path}")
    return found | {"tokens": tokens, "file": str(path)}


def finish(data: dict[str, Any], file: Path | None, show: Callable[[], None], as_json: bool) -> None:
    """Write the JSON a last time, and print it or the table."""
    if file is not None:
        save(file, data)
    if as_json:
        print(json.dumps(data))
    else:
        show()
    if file is not None and file.exists():
        note(f"wrote {file}")


def picture(draw: Callable[[], bytes | None], file: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        return note("no picture: it needs matplotlib: pip install 'keysift[plot]'")
    try:
        png = draw()
        if png is not None:
            file.write_bytes(png)
            note(f"wrote {file}")
    except OSError as error:
        note(f"cannot write {file}: {error.strerror}")
    except ValueError as error:
        note(f"no picture: {error}")


def title(setup: attention.Setup, data: dict[str, Any]) -> str:
    shape = f"{setup.heads}/{setup.kv_heads} heads of {setup.dim}, {str(setup.dtype).removeprefix('torch.')}"
    reading = f"in chunks of {setup.chunk:,}" if setup.chunk else "whole"
    many = f", batch {setup.batch}" if setup.batch > 1 else ""
    return f"{data['gpu'] or data['cpu']}; {shape}{many}; {setup.inputs} inputs, read {reading}"


def print_prefill(rows: Sequence[attention.Row], setup: attention.Setup) -> None:
    grid = table(
        "tokens|method|backend|search ms|attention ms|total ms|speed-up|density|mass|worst head|TFLOP/s|of dense|MiB|"
    )
    for row in rows:
        grid.add_row(
            f"{row.length:,}",
            row.method,
            f"auto ({row.kernel or '-'})" if row.backend == "auto" else row.backend,
            *(shown(x, ".3f") for x in (row.search_ms, row.attention_ms, row.total_ms)),
            shown(row.speedup, ".2f"),
            *(shown(x, ".1%") for x in (row.density, row.mass_covered, row.mass_covered_worst_head)),
            shown(row.tflops, ".1f" if setup.device.type == "cuda" else ".3f"),
            shown(row.tflops_of_dense, ".2f"),
            shown(row.peak_mib, ",.0f"),
            "" if row.status == "ok" else row.status,
        )
    show_table(grid)
    print_reasons(rows)


def print_first_token(rows: Sequence[ttft.Row], remark: str | None) -> None:
    grid = table("tokens|method|first token s|speed-up|attention s|share|density|MiB|")
    for row in rows:
        grid.add_row(
            f"{row.length:,}",
            row.method,
            shown(row.ttft_s, ".3f"),
            shown(row.speedup, ".2f"),
            shown(row.attention_s, ".3f"),
            *(shown(x, ".1%") for x in (row.attention_share, row.density)),
            shown(row.peak_mib, ",.0f"),
            "" if row.status == "ok" else row.status,
        )
    show_table(grid)
    print_reasons(rows)
    if remark:
        print(remark)


def print_reasons(rows: Sequence[Any]) -> None:
    for row in rows:
        if row.reason:
            print(f"{case(row)}: {row.reason}")


def case(row: Any) -> str:
    """What a row measured, in words."""
    if hasattr(row, "length"):
        size = f"{row.length:,}"
    else:
        size = str(row.shape) if hasattr(row, "shape") else f"{row.batch}x{row.context}"
    backend = getattr(row, "backend", "auto")
    return f"{size} {row.method}" + ("" if backend == "auto" else f" on {backend}")


def end(rows: Sequence[Any], interrupted: bool) -> None:
    """The exit code, and the line that explains it."""
    if interrupted:
        note("interrupted: what was measured is kept")
        raise Exit(INTERRUPTED)
    if bad := [row for row in rows if row.status in ("wrong", "failed")]:
        first = bad[0]
        note(f"{len(bad)} of {len(rows)} rows have no speed, the first: {case(first)}: {first.reason}")
        raise Exit(1)


def table(columns: str) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns.split("|"):
        grid.add_column(name, justify="left" if name in ("method", "backend", "") else "right")
    return grid


def show_table(grid: Table) -> None:
    Console(width=max(160, Console().width) if sys.stdout.isatty() else 200, highlight=False, markup=False).print(grid)


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def note(text: str) -> None:
    print(text, file=sys.stderr)
