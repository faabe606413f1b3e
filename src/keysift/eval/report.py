"""Results as tables: by task and length, with intervals, beside dense on the same samples."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from keysift.eval.results import Record
from keysift.eval.statistics import Estimate, average, mean_score, paired_difference

AVERAGE = "average"
READ = ("prefill_density", "kept_fraction", "bytes_per_step", "prefill_error", "decode_error", "accepted_per_round")
SPEED = ("ttft_s", "tokens_per_s")


class Cell(NamedTuple):
    """One run on one task at one length, or on the average of the tasks.

    Attributes:
        score: mean score with its interval; None if no sample succeeded.
        difference: score less dense's on the same samples; None for dense itself and where there are no pairs.
        failed: samples that ended in an error.
        read: means of what ``Stats`` measures.
        speed: medians over the samples.
    """

    run: str
    task: str
    length: int | None
    score: Estimate | None
    difference: Estimate | None
    failed: int
    read: dict[str, float | None]
    speed: dict[str, float | None]

    def flat(self) -> dict[str, Any]:
        """As one row of plain values."""
        score, diff = self.score, self.difference
        return {
            "run": self.run,
            "task": self.task,
            "length": self.length,
            "samples": score.count if score else 0,
            "failed": self.failed,
            "score": score and score.mean,
            "score_low": score and score.low,
            "score_high": score and score.high,
            "difference": diff and diff.mean,
            "difference_low": diff and diff.low,
            "difference_high": diff and diff.high,
            "pairs": diff.count if diff else 0,
            **self.read,
            **self.speed,
        }


def cells(records: list[Record], settings: dict[str, Any]) -> list[Cell]:
    """All cells in the order of the settings: lengths, then tasks (their average last), then runs."""
    by_cell: dict[tuple[str, str, int | None], dict[int, Record]] = defaultdict(dict)
    for r in records:
        by_cell[r["run"], r["task"], r["length"]][r["index"]] = r
    tasks = list(dict.fromkeys([*settings["tasks"], *sorted({task for _, task, _ in by_cell})]))
    out = []
    for length in sorted({key[2] for key in by_cell}, key=lambda n: n or 0):
        made = [
            _cell(by_cell, run, task, length)
            for task in tasks
            for run in settings["runs"]
            if (run, task, length) in by_cell
        ]
        out += made
        scored = {task: {c.run for c in made if c.task == task and c.score} for task in tasks}
        shared = [task for task, has in scored.items() if has == {c.run for c in made}]  # a fair average needs all runs
        if len(shared) > 1:
            out += [
                _average([c for c in made if c.run == run and c.task in shared], length)
                for run in settings["runs"]
                if run in scored[shared[0]]
            ]
    return out


def _cell(by_cell: dict[Any, dict[int, Record]], run: str, task: str, length: int | None) -> Cell:
    mine = by_cell[run, task, length]
    good = {i: r for i, r in mine.items() if not r["error"]}
    dense = {i: r for i, r in by_cell.get(("dense", task, length), {}).items() if not r["error"]}
    pairs = [] if run == "dense" else sorted(good.keys() & dense.keys())
    return Cell(
        run,
        task,
        length,
        mean_score([r["score"] for r in good.values()]),
        paired_difference([good[i]["score"] for i in pairs], [dense[i]["score"] for i in pairs]),
        len(mine) - len(good),
        {field: _middle(statistics.fmean, good, field) for field in READ},
        {field: _middle(statistics.median, good, field) for field in SPEED},
    )


def _middle(of: Any, records: dict[int, Record], field: str) -> float | None:
    values = [r[field] for r in records.values() if r.get(field) is not None]
    return of(values) if values else None


def _average(parts: list[Cell], length: int | None) -> Cell:
    """The mean over tasks, each counting the same."""

    def mean(group: str, field: str) -> float | None:
        values = [v for c in parts if (v := getattr(c, group)[field]) is not None]
        return statistics.fmean(values) if values else None

    return Cell(
        parts[0].run,
        AVERAGE,
        length,
        average([c.score for c in parts if c.score]),
        average([c.difference for c in parts if c.difference]),
        sum(c.failed for c in parts),
        {field: mean("read", field) for field in READ},
        {field: mean("speed", field) for field in SPEED},
    )


def to_csv(made: list[Cell]) -> str:
    out = io.StringIO()
    rows = [cell.flat() for cell in made]
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def table(made: list[Cell], settings: dict[str, Any]) -> Table:
    """Rows by length, task and run; percent with 95% intervals; a cell with failures is marked."""
    shown = Table(title=caption(settings), title_justify="left", box=None, pad_edge=False, header_style="bold")
    sometimes = "prefill_error", "decode_error", "accepted_per_round"
    measured = [f for f in sometimes if any(c.read[f] is not None for c in made)]
    for name in ("length", "task", "run"):
        shown.add_column(name, overflow="fold")
    titles = ["score %", "samples", "less dense", "density", "kept", "MB/step", *measured, "first token", "tokens/s"]
    for name in titles:
        shown.add_column(name.replace("_", " "), justify="right")
    before = None
    for cell in made:
        first = before != (cell.length, cell.task)
        if first and before:
            shown.add_row()
        named = [_number(cell.length, "{:,}") if first else "", cell.task if first else ""]
        before = (cell.length, cell.task)
        read, speed = cell.read, cell.speed
        shown.add_row(
            *named,
            cell.run,
            _interval(cell.score, "{:.1f}"),
            Text(
                f"{cell.score.count if cell.score else 0}{f', {cell.failed} failed' if cell.failed else ''}",
                style="bold red" if cell.failed else "",
            ),
            _interval(cell.difference, "{:+.1f}"),
            _number(read["prefill_density"], "{:.3f}"),
            _number(read["kept_fraction"], "{:.3f}"),
            _number(read["bytes_per_step"] and read["bytes_per_step"] / 1e6, "{:.2f}"),
            *(_number(read[f], "{:.3f}") for f in measured),
            _number(speed["ttft_s"], "{:.2f} s"),
            _number(speed["tokens_per_s"], "{:.1f}"),
        )
    return shown


def caption(settings: dict[str, Any]) -> str:
    """What every figure depends on, in a line."""
    how = {"sparse": "by the prefill method", "dense": "densely", "decode": "by the decode method"}
    return (
        f"{settings['model']}, {settings['dtype']} on {settings['device']}; up to {settings['samples']} samples a cell,"
        f" seed {settings['seed']}; question read {how[settings['question']]}"
        f"{', chat template' if settings['chat'] else ''}; brackets are 95% intervals"
    )


def _interval(value: Estimate | None, form: str) -> str:
    if value is None:
        return ""
    return f"{form} [{form}, {form}]".format(*(100 * x for x in value[:3]))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
