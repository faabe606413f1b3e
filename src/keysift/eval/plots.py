"""Results as pictures: accuracy against what was read, scores by task and length, and speed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from keysift.eval.report import AVERAGE, Cell

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")  # colour-blind safe
MARKERS = "osD^vP*X"


def draw(made: list[Cell], methods: dict[str, str], folder: Path) -> list[Path]:
    """Write the pictures; those that would be empty are left out.

    Args:
        made: the cells of a report.
        methods: by run, the name of the curve it belongs to.
        folder: where the PNG files go.

    Returns:
        Their paths.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'keysift[plot]'") from error
    drawn = []
    for name, figure in (
        ("accuracy.png", _accuracy(made, methods)),
        ("heatmap.png", _heatmap(made)),
        ("speed.png", _speed(made)),
    ):
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            drawn.append(folder / name)
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _overall(made: list[Cell]) -> list[Cell]:
    """For each run and length the average over tasks, or the one task's cell."""
    averaged = {(c.run, c.length) for c in made if c.task == AVERAGE}
    return [c for c in made if c.score and (c.task == AVERAGE or (c.run, c.length) not in averaged)]


def _style(names: list[str]) -> dict[str, dict[str, Any]]:
    """A look of its own for each name: colours, then the same colours dashed, and so on."""
    many = len(COLOURS)
    return {
        name: {
            "color": COLOURS[i % many],
            "marker": MARKERS[i % many],
            "linestyle": ("-", "--", ":", "-.")[i // many % 4],
        }
        for i, name in enumerate(names)
    }


QUANTITIES = (  # the part of a run that reads it, the field, the axis, its unit
    ("decode=", "bytes_per_step", "MB read in a decode step", 1e-6),
    ("decode=", "kept_fraction", "share of the cached keys that decode kept", 1.0),
    ("prefill=", "prefill_density", "share of the causal triangle that prefill read", 1.0),
)


def _accuracy(made: list[Cell], methods: dict[str, str]) -> Any:
    """A row a quantity, a column a length; one curve a method, its runs from the cheapest to the dearest."""
    from matplotlib.ticker import LogLocator

    cells = [c for c in _overall(made) if c.length]
    lengths = list(dict.fromkeys(c.length for c in cells))
    shown = [q for q in QUANTITIES if any(q[0] in c.run and c.read[q[1]] is not None for c in cells)]
    if not shown:
        return None
    figure = _figure(4.6 * len(lengths) + 1, 3.6 * len(shown) + 0.4)
    axes = figure.subplots(len(shown), len(lengths), squeeze=False, sharey=True)
    for row, (part, field, label, unit) in enumerate(shown):
        style = _style(list(dict.fromkeys(methods[c.run] for c in cells if part in c.run or c.run == "dense")))
        for axis, length in zip(axes[row], lengths, strict=True):
            curves: dict[str, list[Cell]] = defaultdict(list)
            for cell in cells:
                if cell.length == length and cell.read[field] is not None and (part in cell.run or cell.run == "dense"):
                    curves[methods[cell.run]].append(cell)
            for name, points in curves.items():
                _curve(axis, points, field, unit, label=name, **style[name])
            if field != "prefill_density":
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter("")
            axis.set_title(f"{length:,} tokens")
            axis.set_xlabel(label)
            axis.set_ylim(-3, 103)
            axis.grid(alpha=0.3)
        axes[row][0].legend(fontsize=7)
        axes[row][0].set_ylabel("score, % (95% interval)")
    return figure


def _curve(axis: Any, points: list[Cell], field: str, unit: float, **style: Any) -> None:
    points = sorted(points, key=lambda c: c.read[field] or 0)
    scores = [c.score for c in points if c.score]
    below = [100 * max(0.0, s.mean - s.low) for s in scores]
    above = [100 * max(0.0, s.high - s.mean) for s in scores]
    x, y = [(c.read[field] or 0) * unit for c in points], [100 * s.mean for s in scores]
    axis.errorbar(x, y, yerr=[below, above], capsize=2, linewidth=1.2, markersize=5, **style)


def _heatmap(made: list[Cell]) -> Any:
    """One panel a run: tasks down, lengths across."""
    cells = {(c.run, c.task, c.length): c for c in made if c.score}
    runs, tasks = (
        list(dict.fromkeys(c.run for c in cells.values())),
        list(dict.fromkeys(c.task for c in cells.values())),
    )
    tasks.sort(key=lambda task: task == AVERAGE)  # last, the others as they come
    lengths = list(dict.fromkeys(c.length for c in cells.values()))
    if not cells:
        return None
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    longest = max(len(str(t)) for t in tasks)
    figure = _figure((0.75 * len(lengths) + 0.09 * longest + 1.6) * columns, (0.32 * len(tasks) + 1.0) * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= len(runs):
            axis.set_visible(False)
            continue
        values = [[_percent(cells.get((runs[i], task, length))) for length in lengths] for task in tasks]
        image = axis.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if value == value:  # not NaN
                    shade = "black" if value > 55 else "white"
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=shade)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" if n else "any" for n in lengths])
        axis.set_yticks(range(len(tasks)), tasks)
        axis.tick_params(labelsize=7)
        axis.set_title(_wrapped(runs[i]), fontsize=7)
    figure.colorbar(image, ax=axes, label="score, %", shrink=0.6)
    return figure


def _percent(cell: Cell | None) -> float:
    return 100 * cell.score.mean if cell and cell.score else float("nan")


def _speed(made: list[Cell]) -> Any:
    """Time to first token and decode speed against length, a line a run."""
    cells = [c for c in _overall(made) if c.length and c.speed["ttft_s"] is not None]
    if not cells:
        return None
    runs = list(dict.fromkeys(c.run for c in cells))
    figure = _figure(11, 4.4 + 0.12 * len(runs))
    axes = figure.subplots(1, 2)
    style = _style(runs)
    for axis, field, label in (
        (axes[0], "ttft_s", "time to first token, s"),
        (axes[1], "tokens_per_s", "decode, tokens/s of a sequence"),
    ):
        for run in runs:
            points = [(c.length, c.speed[field]) for c in cells if c.run == run and c.speed[field]]
            axis.plot([p[0] for p in points], [p[1] for p in points], label=run, linewidth=1.2, **style[run])
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        ticks = sorted({c.length for c in cells if c.length})
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=6, ncols=2 if len(runs) > 3 else 1)
    return figure


def _wrapped(run: str, width: int = 34) -> str:
    """A run's name over several lines, broken after ; and commas."""
    lines = [""]
    for piece in run.replace(";", ";\0").replace(",", ",\0").split("\0"):
        if len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(filter(None, lines))
