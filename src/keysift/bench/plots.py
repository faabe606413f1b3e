"""Measurements as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

from keysift.bench.prefill import Row
from keysift.eval.plots import COLOURS, MARKERS


def draw_prefill(rows: Sequence[Row], title: str) -> bytes | None:
    """Time against length, both logarithmic, as PNG; a line a method and backend, dense dashed; None without times.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'keysift[plot]'") from error
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.total_ms is not None:
            lines.setdefault((row.method, row.backend), []).append((row.length, row.total_ms))
    if not lines:
        return None
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, ((method, backend), points) in enumerate(lines.items()):
        label, style = (method, "--") if method == "dense" else (f"{method} ({backend})", "-")
        axis.plot(
            *zip(*sorted(points), strict=True),
            label=label,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=style,
            linewidth=1.3,
            markersize=5,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({length for points in lines.values() for length, _ in points})
    axis.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in ticks])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("tokens")
    axis.set_ylabel("prefill attention with search, ms")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()
