"""The figures of decode attention as a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from keysift.bench.decode import OURS, Row
from keysift.eval.plots import COLOURS, MARKERS

WIDTH, HEIGHT = 11.0, 3.9  # of the two panels of a shape, in inches


def draw_decode(rows: Sequence[Row], title: str) -> bytes | None:
    """A line of two panels for each shape, as PNG; None without times.

    Left the time of a step against the share of rows kept, right the error against the bytes read; all axes are
    logarithmic, a curve is a method at its budgets, and dense is dashed.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'keysift[plot]'") from error
    shapes = list(dict.fromkeys((row.batch, row.context) for row in rows if row.total_us is not None))
    if not shapes:
        return None
    methods = list(dict.fromkeys(curve(row.method) for row in rows if not _is_dense(row)))
    looks = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(methods, 1)}
    figure = Figure(figsize=(WIDTH, HEIGHT * len(shapes)), layout="constrained")
    FigureCanvasAgg(figure)
    for shape, (left, right) in zip(shapes, figure.subplots(len(shapes), 2, squeeze=False), strict=True):
        _panels(left, right, [row for row in rows if (row.batch, row.context) == shape], looks)
        left.set_title(f"batch {shape[0]}, context {shape[1]:,}", fontsize=9)
    figure.suptitle(title, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def curve(method: str) -> str:
    """The SPEC of a method without its budget: what the points of a curve have in common."""
    name, _, options = method.partition(":")
    others = [x for x in options.split(",") if x and not re.match(r"(keep|budget)=", x)]
    return ":".join(filter(None, (name, ",".join(others))))


def _is_dense(row: Row) -> bool:
    return row.method in ("dense", OURS)


def _panels(left: Any, right: Any, rows: list[Row], looks: dict[str, tuple[str, str]]) -> None:
    from matplotlib.ticker import LogLocator

    for row, shade in zip((r for r in rows if _is_dense(r)), ("0", "0.5"), strict=False):
        label = f"{row.method}, {row.kernel}" if row.kernel else row.method
        if row.total_us is not None:
            left.axhline(row.total_us, color=shade, linestyle="--", linewidth=1, label=label)
        if row.bytes_read is not None and row.method == "dense":
            right.axvline(row.bytes_read / 1e6, color=shade, linestyle="--", linewidth=1, label="dense")
    _curves(left, rows, looks, lambda row: (row.kept_share, row.total_us))
    _curves(right, rows, looks, lambda row: (row.bytes_read and row.bytes_read / 1e6, row.error_mean))
    left.set_xlabel("share of rows read by a KV head")
    left.set_ylabel("time of a step, us")
    right.set_xlabel("bytes read by a step, MB")
    right.set_ylabel("relative error, mean over heads")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)


def _curves(
    axis: Any,
    rows: list[Row],
    looks: dict[str, tuple[str, str]],
    point: Callable[[Row], tuple[float | None, float | None]],
) -> None:
    for name, (colour, marker) in looks.items():
        points = [point(row) for row in rows if not _is_dense(row) and curve(row.method) == name]
        known = sorted((x, y) for x, y in points if x and y)
        if known:
            axis.plot(*zip(*known, strict=True), label=name, color=colour, marker=marker, linewidth=1.3, markersize=5)
