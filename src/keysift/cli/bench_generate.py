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

import torch
import transformers
from rich.console import Console
from rich.table import Table
from typer import Exit
from typer import Option as option

from keysift.bench import generate, speculate
from keysift.bench.first_token import SHAPES, random_model
from keysift.bench.generate import Row, Shape, Subject
from keysift.bench.generate_plot import draw_generations
from keysift.bench.speculate import Run
from keysift.bench.speculate_plot import draw_speculation
from keysift.bench.steps import DENSE
from keysift.checkpoint import check_vocabularies, encode, is_folder, load, pick_device, pick_dtype
from keysift.cli import bench, options
from keysift.cli.bench import shown
from keysift.cli.bench_steps import METHODS, NOTE
from keysift.cli.prompt import read_prompt
from keysift.engine import ELSEWHERE
from keysift.hf.draft_model import DEFAULT_BUDGET
from keysift.hf.parallel import ranks_of_environment, this_rank
from keysift.methods import describe, parse
from keysift.ranks import deal_out_once
from keysift.speculate import MOST, check_refresh
from keysift.types import one_of

GPU_SHAPES = [Shape(batch, prefix, 64) for prefix in (32768, 131072) for batch in (1, 0)]
CPU_SHAPES = [Shape(1, 2048, 32)]
COLUMNS = (
    "batch|prefix|generated|method|first token s|step ms|ms/token|tokens/s|speed-up|dense floor ms|floor share"
    "|kept|GiB|"
)
DRAFT_COLUMNS = (
    "batch|prefix|generated|draft|gamma|tokens/round|accepted|draft ms|verify ms|rest ms|ms/token|tokens/s|speed-up"
    "|by the speed model|rounds|"
)
AUTO = "auto"
USUAL_CACHE = f"streaming:budget={DEFAULT_BUDGET}"
DRAFT_CONTEXT = 1 << 17  # tokens that random weights are made for
ACCEPTANCE = 0.8  # that is assumed where it means nothing


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
        option(
            metavar="SPEC",
            show_default=f"{', '.join(METHODS)}; none with --draft",
            help="Of decode, beside dense; may be repeated.",
        ),
    ] = None,
    draft: Annotated[
        list[str] | None,
        option(metavar="SPEC", show_default="none", help="Decode method that drafts tokens; may be repeated."),
    ] = None,
    draft_model: Annotated[
        str | None,
        option(metavar="PATH", help="A smaller model drafts; --draft is its own cache, streaming or snapkv."),
    ] = None,
    draft_shape: Annotated[
        str | None, option(metavar="NAME", help="The same with random weights of a shape, such as llama-1b.")
    ] = None,
    gamma: Annotated[
        str | None,
        option(metavar="N,M", show_default=AUTO, help=f"Tokens drafted at a time, 1 to {MOST}, or auto: as it pays."),
    ] = None,
    budget: Annotated[
        str | None,
        option(metavar="N,M", show_default="each draft's own", help="Keys that drafts read: each is run with each."),
    ] = None,
    refresh: options.Refresh = "verify",
    acceptance: Annotated[
        float | None,
        option(
            metavar="A",
            show_default=f"{ACCEPTANCE}; measured where a --model reads prompts",
            help="Share of drafted tokens that is assumed to stand, where what they are means nothing.",
        ),
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
    other = check_other(draft_model, draft_shape)
    draft = draft or ([USUAL_CACHE if budget is None else "streaming"] if other else None)
    runs = parse_runs(methods, draft, gamma, budget, acceptance, other)
    check_refresh(refresh, next((run.draft for run in runs if run.drafts), None), other)
    reading = reads(method, model, text, read)
    assumed = assumption(acceptance, model is not None and draft_shape is None and reading) if draft else None
    setup = generate.Setup(method, reading, page, seed, print_output, tensor_parallel, None, assumed, refresh)
    book = None if text is None else read_prompt(None, text, None)
    longest = max(generate.rows_needed(size, setup.read, run) for size in sizes for run in [Run(), *runs])
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
        if other:
            drafter, its_own = load_drafter(subject, draft_model, draft_shape, where, dtype)
            subject = dataclasses.replace(subject, draft_model=drafter, draft_tokenizer=its_own)
        setup = dataclasses.replace(setup, copy_gb_s=generate.copy_gb_s(where))
    rows: list[Row] = []
    settings = settings_of(setup, lm, model, name, text) | {"draft_model": draft_shape or named(draft_model)}
    data = bench.about(where) | {"settings": settings, "rows": []}
    data["note"] = remark(setup, model, name, text)
    if draft_shape is not None:
        data["note"] += f"; drafts by {draft_shape} with random weights"
    try:
        bench.run(generate.measure, (subject, setup, sizes, runs), rows, data, file, console)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    bench.finish(data, file, lambda: print_rows(rows, data["note"]), as_json)
    if file is not None:
        head = f"{data['gpu'] or data['cpu']}; {data['settings']['model'] or name}, {data['settings']['dtype']}"
        bench.picture(lambda: draw_generations(rows, f"{head}; {data['note']}"), file.with_suffix(".png"))
        if draft:
            bench.picture(lambda: draw_speculation(rows, f"{head}; {data['note']}"), file.with_name("speculate.png"))
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


def parse_shapes(text: str, name: str = "--shapes") -> list[Shape]:
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        parts = re.fullmatch(r"([0-9]+)x([0-9]+)([kK]?)x([0-9]+)", item)
        if not parts:
            raise ValueError(f"{name} {item}: write BATCHxPREFIXxGENERATED, such as 4x32768x64")
        found.append(Shape(int(parts[1]), int(parts[2]) * (1024 if parts[3] else 1), int(parts[4])))
        if not (found[-1].prefix and found[-1].generated):
            raise ValueError(f"{name} {item}: prefix and generated tokens must be 1 or more")
    if not found:
        raise ValueError(f"{name} is empty: write BATCHxPREFIXxGENERATED, such as 4x32768x64")
    return list(dict.fromkeys(found))


def parse_runs(
    methods: Sequence[str] | None,
    drafts: Sequence[str] | None,
    gamma: str | None,
    budget: str | None,
    acceptance: float | None,
    other: bool,
) -> list[Run]:
    """What is run beside dense decoding: methods, then drafts with every budget and gamma."""
    if not drafts:
        given = {"--gamma": gamma, "--budget": budget, "--acceptance": acceptance}
        if alone := [f"{name} {value}" for name, value in given.items() if value is not None]:
            raise ValueError(f"{alone[0]}: needs a draft, such as --draft streaming:budget=512")
    chosen = [Run(parse(spec, "decode")) for spec in (methods or (() if drafts else METHODS))]
    gammas = [None] if gamma is None else parse_gammas(gamma)
    return chosen + speculate.sweep(drafts or (), [] if budget is None else parse_budgets(budget), gammas, other)


def check_other(draft_model: str | None, draft_shape: str | None) -> bool:
    """Whether another model drafts."""
    if draft_model is not None and draft_shape is not None:
        raise ValueError("--draft-model and --draft-shape: give one of them")
    if draft_shape is not None:
        one_of("draft-shape", draft_shape, SHAPES)
    return draft_model is not None or draft_shape is not None


def load_drafter(
    subject: Subject, path: str | None, shape: str | None, where: torch.device, dtype: str
) -> tuple[Any, Any]:
    """The model that drafts, of the same vocabulary, and its tokenizer; of several processes the first needs it."""
    if this_rank():
        return ELSEWHERE, None
    if path is None:
        assert shape is not None
        return random_model(shape, DRAFT_CONTEXT, where, bench.tensor_dtype(dtype, where)).model, None
    model, tokenizer = load(path, where, pick_dtype(dtype, where))
    check_vocabularies(model, tokenizer, subject.model, subject.tokenizer)
    return model, tokenizer


def parse_gammas(text: str) -> list[int | None]:
    found: list[int | None] = []
    for part in (part.strip() for part in text.split(",")):
        if part != AUTO and not (part.isdecimal() and 1 <= int(part) <= MOST):
            raise ValueError(f"--gamma {text}: choose 1 to {MOST} or {AUTO}, joined by commas")
        found.append(None if part == AUTO else int(part))
    return found


def parse_budgets(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--budget {text}: write numbers of keys, 1 or more, joined by commas")
    return [int(part) for part in parts]


def assumption(acceptance: float | None, measured: bool) -> float | None:
    """The share of drafted tokens that is assumed to stand; None where it is measured."""
    if not measured:
        return ACCEPTANCE if acceptance is None else acceptance
    if acceptance is not None:
        raise ValueError(
            f"--acceptance {acceptance}: where a model reads prompts it is measured; leave it out, or add --fill"
        )
    return None


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
        "model": named(model),
        "shape": None if model else name,
        "text": None if text is None else text.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def named(model: str | None) -> str | None:
    """A model as results name it: a folder by its own name alone."""
    return Path(model).name if model is not None and Path(model).is_dir() else model


def remark(setup: generate.Setup, model: str | None, name: str, text: Path | None) -> str:
    """Whose weights, what the contexts are, and what is assumed."""
    weights = f"{name} with random weights; " if model is None else ""
    assumed = "" if setup.acceptance is None else f"; acceptance assumed: {setup.acceptance:g} of drafted tokens"
    if not setup.read:
        return weights + NOTE + assumed
    source = "random tokens" if text is None else text.name
    return f"{weights}prompts of {source}, read by {describe(setup.prefill)}{assumed}"


def print_rows(rows: Sequence[Row], remark: str) -> None:
    bench.show_table(table_of_methods([row for row in rows if row.draft is None]))
    if drafts := [row for row in rows if row.draft is not None]:
        print()
        bench.show_table(table_of_drafts(drafts))
    bench.print_reasons(rows)
    for row in rows:
        if row.output is not None:
            print(f"{bench.case(row)} generated: {row.output}")
    print(remark)


def table_of_methods(rows: Sequence[Row]) -> Table:
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
    return grid


def table_of_drafts(rows: Sequence[Row]) -> Table:
    grid = bench.table(DRAFT_COLUMNS)
    grid.columns[3].justify = "left"
    for row in rows:
        used = f" ({row.timed_gamma})" if row.timed_gamma else ""
        grid.add_row(
            *(f"{x:,}" for x in row.shape),
            row.draft,
            f"{AUTO}{used}" if row.gamma is None else f"{row.gamma}",
            shown(row.tokens_per_round, ".2f"),
            shown(row.acceptance, ".1%"),
            *(shown(x, ".3f") for x in (row.draft_ms, row.verify_ms, row.rest_ms, row.ms_per_token)),
            shown(row.tokens_per_s, ",.1f"),
            *(shown(x, ".2f") for x in (row.speedup, row.model_speedup)),
            shown(row.rounds_share, ".0%"),
            "" if row.status == "ok" else row.status,
        )
    return grid
