"""``keysift eval``: what a method costs in accuracy, beside dense, on tasks of any length."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer import Exit
from typer import Option as option

from keysift import LLM
from keysift.cli import options
from keysift.cli.generate import INTERRUPTED
from keysift.cli.models import open_llm
from keysift.eval import data as files
from keysift.eval import plots, report, results, ruler, runner, runs
from keysift.hf.config import context_tokens
from keysift.requests import QUESTIONS
from keysift.types import check_seed, one_of

DEFAULT_LENGTHS, DEFAULT_SAMPLES = (4096,), 20


def command(
    tasks: Annotated[
        str | None,
        option(
            metavar="A,B", show_default="the six that need no file", help="RULER tasks, all, or lm:NAME of lm-eval."
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        option(metavar="RUN", show_default="dense", help="prefill=SPEC;decode=SPEC;draft=SPEC; may be repeated."),
    ] = None,
    lengths: Annotated[
        str | None, option(metavar="N,M", show_default="4096", help="Tokens of prompt and answer together.")
    ] = None,
    samples: Annotated[
        int | None, option(metavar="N", show_default=str(DEFAULT_SAMPLES), help="Samples of each task and length.")
    ] = None,
    out: Annotated[Path | None, option(metavar="DIR", help="Results; the same command continues there.")] = None,
    model: options.Model = None,
    preset: Annotated[str | None, option(metavar="NAME", help="A published protocol: magicpig or flexprefill.")] = None,
    question: Annotated[
        str, option(metavar="HOW", help="How the question is read: sparse (as the prompt), dense, or decode.")
    ] = "sparse",
    chat: options.Chat = False,
    seed: Annotated[int, option(metavar="N", help="Of the samples, and of methods that draw.")] = 0,
    batch: Annotated[int, option(metavar="N", help="Samples answered together.")] = 1,
    tensor_parallel: options.TensorParallel = None,
    measure_error: Annotated[
        bool, option("--measure-error", help="Also compare attention outputs with dense ones (slow).")
    ] = False,
    essays: Annotated[Path | None, option(metavar="FILE", help="Text for the essay haystacks.")] = None,
    squad: Annotated[Path | None, option(metavar="FILE", help="SQuAD's dev-v2.0.json, for qa_1.")] = None,
    hotpot: Annotated[Path | None, option(metavar="FILE", help="HotpotQA's dev set (distractor), for qa_2.")] = None,
    include_path: Annotated[Path | None, option(metavar="DIR", help="Folder with lm-eval task files.")] = None,
    shard: Annotated[str, option(metavar="I/N", help="Do every N-th batch: for N processes on one folder.")] = "0/1",
    extend: Annotated[bool, option("--extend", help="Add tasks, lengths, runs or samples to a folder.")] = False,
    retry_failed: Annotated[bool, option("--retry-failed", help="Do the samples again that failed.")] = False,
    only_report: Annotated[bool, option("--report", help="Only show what is in the folder.")] = False,
    fetch: Annotated[bool, option("--fetch", help="Download what the tasks need, and stop.")] = False,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    as_json: Annotated[bool, option("--json", help="Print JSON instead of the table.")] = False,
    as_csv: Annotated[bool, option("--csv", help="Print CSV instead of the table.")] = False,
) -> None:
    """Measure accuracy, what was read, and speed. Results, report.json, report.csv and pictures go to DIR."""
    show = "json" if as_json else "csv" if as_csv else "table"
    if only_report:
        return finish(need_out(out), show)
    one_of("question", question, QUESTIONS)
    check_seed(seed)
    at_least_one(samples=samples, batch=batch)
    part = parse_shard(shard)
    names = None if tasks is None else parse_tasks(tasks)
    if fetch:
        return fetch_data(names or list(ruler.TASKS), include_path)
    asked = runs.parse_runs(run or ())
    sizes = None if lengths is None else parse_lengths(lengths)
    folder_path = need_out(out)
    if extend:
        names, sizes, asked, samples = added(results.read_settings(folder_path), names, sizes, asked, samples)
    if preset is not None:
        one_of("preset", preset, runs.PRESETS)
    console = Console(stderr=True)
    # each length brings its own room, and short answers are not worth compiling for
    room: dict[str, Any] = {"max_batch": batch, "max_length": 1, "compile_layers": False}
    counting: dict[str, Any] = {"count_every": 1, "measure_error": measure_error}
    where = {"device": device, "dtype": dtype}
    with open_llm(model, console, tensor_parallel, **where, **room, **counting, seed=seed) as llm:
        limit = context_tokens(llm.model.config)
        if preset is not None:
            config = llm.model.config.get_text_config()
            chosen = runs.preset(preset, names, config.model_type, model or "pocket", config.num_hidden_layers)
            console.print(f"preset {preset}: {chosen.note}", highlight=False)
            asked = list({r.name: r for r in [*runs.parse_runs(chosen.runs), *asked]}.values())
            names, samples = names or list(chosen.tasks), samples or chosen.samples
            sizes = sizes or fitting(chosen.lengths, limit, console)
        plan = runner.Plan(
            tuple(names or ruler.OFFLINE),
            tuple(sizes or DEFAULT_LENGTHS),
            tuple(asked or [runs.parse_run("dense")]),
            samples or DEFAULT_SAMPLES,
            seed,
            question,
            chat,
            batch,
            measure_error,
            part,
            tensor_parallel or 1,
        )
        material = files.Data(essays, squad, hotpot)
        harness = load_harness(plan, llm.model, include_path)
        check_lengths(plan, llm.tokenizer, material, limit)
        runner.check_served(llm, plan.runs)
        decided = runner.settings(plan, llm.model, llm.tokenizer, model or "pocket", material, harness)
        shard_name = "" if part == (0, 1) else f"{part[0]}-{part[1]}"
        folder = results.Folder(folder_path, decided, extend=extend, shard=shard_name)
        try:
            if retry_failed:
                folder.forget_failed()
            folder.claim(r.name for r in plan.runs)
            interrupted = work(plan, llm, material, folder, harness, console)
        finally:
            folder.close()
    if interrupted:
        text = f"interrupted: what is done is safe in {folder_path}; the same command continues"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        raise Exit(INTERRUPTED)
    finish(folder_path, show)


# ---- what the user gave -------------------------------------------------------------------------------------------


def need_out(out: Path | None) -> Path:
    if out is None:
        raise ValueError("--out DIR is missing: the folder for the results")
    return out


def parse_tasks(text: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    if "all" in names:
        names = list(dict.fromkeys([*ruler.TASKS, *(n for n in names if n != "all")]))
    if not names:
        raise ValueError("--tasks is empty: name tasks, or leave it out")
    ruler.check_tasks([name for name in names if not name.startswith(runner.HARNESS)])
    return names


def parse_lengths(text: str) -> list[int]:
    sizes = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if not re.fullmatch(r"[0-9]+[kK]?", item) or not int(item.rstrip("kK")):
            raise ValueError(f"--lengths {item}: write numbers of tokens such as 4096,16384 or 4k,16k")
        sizes.append(int(item.rstrip("kK")) * (1024 if item[-1] in "kK" else 1))
    if not sizes:
        raise ValueError("--lengths is empty: write numbers of tokens such as 4096,16384")
    return sorted(set(sizes))


def parse_shard(text: str) -> tuple[int, int]:
    parts = re.fullmatch(r"(\d+)/(\d+)", text)
    if not parts or int(parts[1]) >= int(parts[2]):
        raise ValueError(f"--shard {text}: write I/N with I from 0 to N-1, such as 0/4")
    return int(parts[1]), int(parts[2])


def at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: choose 1 or more")


def check_lengths(plan: runner.Plan, tokenizer: Any, material: files.Data, limit: int | None) -> None:
    """Every task at its shortest length, so that missing files and impossible lengths show before anything runs."""
    local = [task for task in plan.tasks if task in ruler.TASKS]
    for length in plan.lengths if local else ():
        if limit is not None and length > limit:
            raise ValueError(f"length={length}: the model's context is {limit:,} tokens")
    for task in local:
        if (kind := ruler.TASKS[task].needs) is not None:
            try:
                getattr(material, kind)
            except ValueError as error:
                raise ValueError(f"task {task}: {error}") from None
        runner.make_sample(plan, task, plan.lengths[0], 0, tokenizer, material)
        if kind in ("squad", "hotpot"):
            runner.make_sample(plan, task, plan.lengths[0], plan.samples - 1, tokenizer, material)


def added(
    before: dict[str, Any], names: list[str] | None, sizes: list[int] | None, asked: list[runs.Run], samples: int | None
) -> tuple[list[str], list[int], list[runs.Run], int]:
    """What a folder was begun with, and what is named besides."""
    return (
        list(dict.fromkeys([*before["tasks"], *(names or ())])),
        sorted({*before["lengths"], *(sizes or ())}),
        runs.parse_runs([*before["runs"], *(r.name for r in asked)]),
        max(before["samples"], samples or 0),
    )


def fitting(lengths: tuple[int, ...], limit: int | None, console: Console) -> list[int]:
    """Those of a preset's lengths that the model's context holds."""
    fit = [n for n in lengths if limit is None or n <= limit]
    if not fit:
        raise ValueError(
            f"the preset begins at {lengths[0]:,} tokens, the model's context is {limit:,}: give --lengths"
        )
    if left := lengths[len(fit) :]:
        console.print(f"beyond the model's context and left out: {', '.join(f'{n:,}' for n in left)}", highlight=False)
    return fit


def load_harness(plan: runner.Plan, lm: Any, include_path: Path | None) -> dict[str, Any]:
    """lm-eval's tasks among those of the plan."""
    names = [task.removeprefix(runner.HARNESS) for task in plan.tasks if task.startswith(runner.HARNESS)]
    if not names:
        return {}
    if plan.tensor_parallel > 1:
        raise ValueError("--tensor-parallel is for RULER's own tasks: evaluate lm-eval's in a folder of their own")
    if plan.question != "sparse" or plan.chat:
        asked = "--chat" if plan.chat else f"--question {plan.question}"
        raise ValueError(
            f"{asked} is for RULER's own tasks: evaluate lm-eval's in a folder of their own without it, or with"
            " `python -m keysift.eval.lm`, which has options for both"
        )
    module = harness_module()
    with module.quiet():
        made = module.load(names, lm.config._name_or_path, plan.lengths, plan.seed, include_path)
    for name, task in made.items():
        if not task.higher_is_better:
            raise ValueError(
                f"lm:{name} is scored by {task.metric}, which is no share of right answers: use python -m"
                " keysift.eval.lm"
            )
        if task.by_length and len(plan.lengths) > 1:
            raise ValueError(f"lm:{name}: lm-eval's RULER takes one length a folder; give --lengths one")
    return made


def fetch_data(names: list[str], include_path: Path | None) -> None:
    """Download what tasks need; say what there is."""
    kinds = list(dict.fromkeys(t.needs for n in names if (t := ruler.TASKS.get(n)) and t.needs))
    for path in files.fetch(kinds):
        print(path)
    if theirs := [n.removeprefix(runner.HARNESS) for n in names if n.startswith(runner.HARNESS)]:
        module = harness_module()
        with module.quiet():
            module.fetch(theirs, include_path=include_path)
        print(f"lm-eval has the data of {', '.join(theirs)}")


def harness_module() -> Any:
    try:
        from keysift.eval import harness
    except ImportError as error:
        raise ValueError(f"tasks of lm-eval need it: pip install 'keysift[eval]' ({error})") from error
    return harness


# ---- running and showing ------------------------------------------------------------------------------------------


def work(
    plan: runner.Plan,
    llm: LLM,
    material: files.Data,
    folder: results.Folder,
    harness: dict[str, Any],
    console: Console,
) -> bool:
    """Do the plan under a progress bar with the time left, or with a line a task where there is no terminal.

    Returns:
        Whether Ctrl-C ended it.
    """
    left = list(runner.steps(plan, folder.done, harness))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=3600,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=sum(step.cost for step in left))
        seen: dict[tuple[str, int | None], int] = {}
        total = {key: sum((s.task, s.length) == key for s in left) for key in {(s.task, s.length) for s in left}}

        def on_step(step: runner.Step) -> None:
            key = (step.task, step.length)
            seen[key] = seen.get(key, 0) + 1
            progress.update(bar, advance=step.cost, description=f"{step.task} {step.length or ''}")
            if seen[key] == total[key] and not console.is_terminal:
                remaining = progress.tasks[0].time_remaining
                text = f", {remaining:.0f} s left" if remaining else ""
                console.print(f"{step.task} {step.length or ''} done: {progress.tasks[0].percentage:.0f}%{text}")

        try:
            runner.evaluate(plan, left, llm, material, folder, harness, on_step)
        except KeyboardInterrupt:
            return True
    return False


def finish(path: Path, show: str) -> None:
    """Write the report's files and print the table; exit code 1 if samples failed."""
    settings, records = results.read_settings(path), results.read_records(path)
    made = report.cells(records, settings)
    console = Console(stderr=True)
    methods = {name: runs.parse_run(name).methods for name in settings["runs"]}
    whole = {"settings": settings, "cells": [cell.flat() for cell in made]}
    written: list[Path] = []
    try:
        results.replace_file(path / "report.json", json.dumps(whole, indent=1) + "\n")
        results.replace_file(path / "report.csv", report.to_csv(made))
        written = [path / "report.json", path / "report.csv"]
        written += plots.draw(made, methods, path)
    except OSError as error:
        text = f"cannot write the report to {path}: {error.strerror}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    except ValueError as error:  # no matplotlib
        console.print(f"no pictures: {error}", soft_wrap=True, highlight=False, markup=False)
    if show == "json":
        print(json.dumps(whole))
    elif show == "csv":
        sys.stdout.write(report.to_csv(made))
    else:
        Console(width=max(160, Console().width) if sys.stdout.isatty() else 200, highlight=False).print(
            report.table(made, settings)
        )
    if written:
        console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True, highlight=False, markup=False)
    if failed := [r for r in records if r["error"]]:
        console.print(
            f"{len(failed)} of {len(records)} samples failed, the first with {failed[0]['error']}:"
            " --retry-failed does them again",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        raise Exit(1)
