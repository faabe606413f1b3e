"""``keysift bench generate``: whole generations by the engine, dense and by methods, in one run."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import transformers
from rich.console import Console
from typer import Exit
from typer import Option as option

from keysift.bench import generate
from keysift.bench.generate import Shape, Subject
from keysift.bench.generate_plot import draw_generations
from keysift.bench.steps import DENSE
from keysift.checkpoint import encode, is_folder, pick_device
from keysift.cli import bench, options
from keysift.cli.bench import shown
from keysift.cli.bench_steps import METHODS, NOTE
from keysift.cli.prompt import read_prompt
from keysift.hf.parallel import ranks_of_environment
from keysift.methods import describe, parse
from keysift.ranks import deal_out_once

GPU_SHAPES = [Shape(batch, prefix, 64) for prefix in (32768, 131072) for batch in (1, 0)]
CPU_SHAPES = [Shape(1, 2048, 32)]
COLUMNS = (
    "batch|prefix|generated|method|first token s|step ms|ms/token|tokens/s|speed-up|dense floor ms|floor share"
    "|kept|GiB|"
)


def command(
    shapes: Annotated[
        str | None,
        option(
            metavar="BxPxG,...",
            show_default="as suits the device",
            help="Batch x prefix x generated tokens, such as 4x32kx64; 0xPxG is all sequences that fit.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        option(metavar="SPEC", show_default=", ".join(METHODS), help="Of decode, beside dense; may be repeated."),
    ] = None,
    prefill: Annotated[str, option(metavar="SPEC", help="How prompts are read.")] = "dense",
    shape: bench.ShapeName = None,
    model: bench.ModelPath = None,
    text: Annotated[
        Path | None,
        option(metavar="FILE", show_default="random tokens", help="With --model: prompts are pieces of it; --read."),
    ] = None,
    read: Annotated[
        bool | None,
        option("--read/--fill", show_default="--fill", help="Read prompts, or fill contexts with noise instead."),
    ] = None,
    print_output: Annotated[
        bool, option("--print-output", help="Print what the first sequence of each row got.")
    ] = False,
    tensor_parallel: Annotated[
        int, option(metavar="N", help="Processes that share the model, a GPU each; started by torchrun.")
    ] = 1,
    page: Annotated[int, option(metavar="N", help="Rows a page of the cache.")] = 128,
    out: bench.Out = None,
    force: bench.Force = False,
    seed: Annotated[int, option(metavar="N", help="Of weights, contexts, and of methods that draw.")] = 0,
    device: options.Device = "auto",
    dtype: bench.DType = "auto",
    as_json: bench.AsJson = False,
) -> None:
    """Time whole generations by the engine, beside the time to read all weights and keys once."""
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    name = bench.shape_name(shape, model, on_gpu)
    sizes = (GPU_SHAPES if on_gpu else CPU_SHAPES) if shapes is None else parse_shapes(shapes)
    method = parse(prefill, "prefill")
    setup = generate.Setup(method, reads(method, model, text, read), page, seed, print_output, tensor_parallel)
    chosen = [parse(spec, "decode") for spec in methods or METHODS]
    book = None if text is None else read_prompt(None, text, None)
    longest = max(generate.rows_needed(size, setup.read) for size in sizes)
    rank = rank_of(tensor_parallel)
    if rank and on_gpu:
        where = pick_device(f"cuda:{rank}")
    file = None if rank else bench.claim(out, "generate.json", force)
    console = Console(stderr=True, quiet=rank > 0)
    with console.status("Making the model" if model is None else "Loading the model"):
        lm = bench.decoder(model, name, longest, "--shapes", where, dtype, seed, longest)
        if tensor_parallel > 1:
            deal_out_once(lm, tensor_parallel)
        subject = subject_of(lm, model, book, sizes)
        setup = dataclasses.replace(setup, copy_gb_s=generate.copy_gb_s(where))
    rows: list[generate.Row] = []
    data = bench.about(where) | {"settings": settings_of(setup, lm, model, name, text), "rows": []}
    data["note"] = remark(setup, model, name, text)
    try:
        bench.run(generate.measure, (subject, setup, sizes, chosen), rows, data, file, console)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    bench.finish(data, file, lambda: print_rows(rows, data["note"]), as_json)
    if file is not None:
        head = f"{data['gpu'] or data['cpu']}; {data['settings']['model'] or name}, {data['settings']['dtype']}"
        bench.picture(lambda: draw_generations(rows, f"{head}; {data['note']}"), file.with_suffix(".png"))
    bench.end(rows, interrupted)


def rank_of(tensor_parallel: int) -> int:
    """Of this process; where torchrun is needed and has not started it, torchrun runs the same command instead."""
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel={tensor_parallel}: choose 1 or more")
    if tensor_parallel == 1 or ranks_of_environment() > 1:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            sys.stdout = io.StringIO()  # what all ranks find, the first one says
        return rank
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tensor_parallel}"]
    raise Exit(subprocess.run([*start, "-m", "keysift.cli", *sys.argv[1:]]).returncode)


def parse_shapes(text: str) -> list[Shape]:
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        parts = re.fullmatch(r"([0-9]+)x([0-9]+)([kK]?)x([0-9]+)", item)
        if not parts:
            raise ValueError(f"--shapes {item}: write BATCHxPREFIXxGENERATED, such as 4x32768x64")
        found.append(Shape(int(parts[1]), int(parts[2]) * (1024 if parts[3] else 1), int(parts[4])))
        if not (found[-1].prefix and found[-1].generated):
            raise ValueError(f"--shapes {item}: prefix and generated tokens must be 1 or more")
    if not found:
        raise ValueError("--shapes is empty: write BATCHxPREFIXxGENERATED, such as 4x32768x64")
    return list(dict.fromkeys(found))


def reads(prefill: Any, model: str | None, text: Path | None, read: bool | None) -> bool:
    """Whether prompts are read: if asked for, or for a text."""
    if text is not None and model is None:
        raise ValueError("--text needs --model: random weights have no tokenizer")
    if text is not None and read is False:
        raise ValueError("--text and --fill: a text is read; give one of them")
    if text is None and not read and prefill != DENSE:
        raise ValueError(f"--prefill {describe(prefill)}: nothing is read where contexts are noise; add --read")
    return text is not None or bool(read)


def subject_of(lm: Any, model: str | None, book: str | None, sizes: Sequence[Shape]) -> Subject:
    """The model with its tokenizer and the tokens of its text, which has to be long enough for all shapes."""
    if model is None:
        return Subject(lm)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, local_files_only=is_folder(model))
    if book is None:
        return Subject(lm, tokenizer)
    ids = encode(tokenizer, book, False, lm.get_input_embeddings().num_embeddings)["input_ids"][0].tolist()
    subject = Subject(lm, tokenizer, ids)
    for size in sizes:
        subject.prompts(max(1, size.batch), size.prefix, 0)
    return subject


def settings_of(setup: generate.Setup, lm: Any, model: str | None, name: str, text: Path | None) -> dict[str, Any]:
    return dataclasses.asdict(setup) | {
        "prefill": describe(setup.prefill),
        "model": Path(model).name if model is not None and Path(model).is_dir() else model,
        "shape": None if model else name,
        "text": None if text is None else text.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def remark(setup: generate.Setup, model: str | None, name: str, text: Path | None) -> str:
    """Whose weights, and what the contexts are."""
    weights = f"{name} with random weights; " if model is None else ""
    if not setup.read:
        return weights + NOTE
    return f"{weights}prompts of {'random tokens' if text is None else text.name}, read by {describe(setup.prefill)}"


def print_rows(rows: Sequence[generate.Row], remark: str) -> None:
    grid = bench.table(COLUMNS)
    for row in rows:
        grid.add_row(
            *(f"{x:,}" for x in row.shape),
            row.method,
            *(shown(x, ".3f") for x in (row.ttft_s, row.step_ms, row.ms_per_token)),
            shown(row.tokens_per_s, ",.1f"),
            shown(row.speedup, ".2f"),
            shown(row.dense_floor_ms, ".3f"),
            *(shown(x, ".1%") for x in (row.dense_floor_share, row.kept_fraction)),
            shown(row.peak_gib, ",.1f"),
            "" if row.status == "ok" else row.status,
        )
    bench.show_table(grid)
    bench.print_reasons(rows)
    for row in rows:
        if row.output is not None:
            print(f"{bench.case(row)} generated: {row.output}")
    print(remark)
