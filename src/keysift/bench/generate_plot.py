"""Whole generations as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from keysift.bench.generate import Row
from keysift.eval.plots import COLOURS, MARKERS


def draw_generations(rows: Sequence[Row], title: str) -> bytes | None:
    """Left tokens a second as bars, a group a shape; right the time of a step against dense attention's floor, both
    logarithmic, the floor itself dashed; PNG, None without times.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'keysift[plot]'") from error
    known = [row for row in rows if row.step_ms is not None]
    if not known:
        return None
    shapes = list(dict.fromkeys(row.shape for row in known))
    methods = list(dict.fromkeys(row.method for row in known))
    figure = Figure(figsize=(6 + max(5.0, 0.3 * len(shapes) * (len(methods) + 1)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _bars(left, known, shapes, methods)
    _against_floor(right, known, methods)
    figure.suptitle(title, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _bars(axis: Any, rows: list[Row], shapes: list[Any], methods: list[str]) -> None:
    width = 0.85 / len(methods)
    for i, method in enumerate(methods):
        found = [(shapes.index(row.shape), row.tokens_per_s) for row in rows if row.method == method]
        at, heights = zip(*found, strict=True)
        shifted = [place + (i - (len(methods) - 1) / 2) * width for place in at]
        axis.bar(shifted, heights, width, label=method, color=COLOURS[i % len(COLOURS)])
    axis.set_xticks(range(len(shapes)), [f"{s.batch} x {s.prefix:,}\n+ {s.generated:,}" for s in shapes], fontsize=7)
    axis.set_ylabel("tokens/s of the batch")
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)


def _against_floor(axis: Any, rows: list[Row], methods: list[str]) -> None:
    from matplotlib.ticker import LogLocator

    floors = [row.dense_floor_ms for row in rows if row.dense_floor_ms]
    ends = 0.8 * min(floors), 1.25 * max(floors)
    axis.plot(ends, ends, "--", color="0.5", linewidth=1, label="dense floor")
    for i, method in enumerate(methods):
        found = [(row.dense_floor_ms, row.step_ms) for row in rows if row.method == method and row.dense_floor_ms]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": "none"}
        axis.plot(*zip(*found, strict=True), label=method, **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("reading weights, keys and values once, ms")
    axis.set_ylabel("a step, ms")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
