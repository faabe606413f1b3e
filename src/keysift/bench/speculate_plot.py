"""Self-speculation as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from keysift.bench.generate import Row
from keysift.eval.plots import COLOURS, MARKERS


def draw_speculation(rows: Sequence[Row], title: str) -> bytes | None:
    """Left the speed-up over plain decoding against the batch, or against the context where only that varies, a line a
    draft and gamma, and dotted what the speed model makes of them; right the acceptance by position in a draft; PNG,
    None without drafts that were timed.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'keysift[plot]'") from error
    known = [row for row in rows if row.draft is not None and row.speedup is not None]
    if not known:
        return None
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _speedups(left, known)
    _positions(right, known)
    figure.suptitle(title, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _style(colour: int, marker: int) -> dict[str, Any]:
    """Of a line: a colour a draft, of which black is plain decoding's, and a marker for what else it is of."""
    colours = COLOURS[1:]
    return {"color": colours[colour % len(colours)], "marker": MARKERS[marker % len(MARKERS)], "markersize": 5}


def lines_of(rows: Sequence[Row]) -> tuple[str, dict[tuple[str, str], list[Row]]]:
    """What the speed-up is drawn against, "batch" or "prefix", and each line's rows in that order, by draft and by what
    else the line is of."""
    batches, prefixes = ({getattr(row, name) for row in rows} for name in ("batch", "prefix"))
    against = "prefix" if len(batches) == 1 and len(prefixes) > 1 else "batch"
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(getattr(row, against))):
        context = f", {row.prefix:,} tokens" if against == "batch" and len(prefixes) > 1 else ""
        gamma = "auto" if row.gamma is None else row.gamma
        lines.setdefault((row.draft or "", f"gamma {gamma}{context}"), []).append(row)
    return against, lines


def _speedups(axis: Any, rows: Sequence[Row]) -> None:
    against, lines = lines_of(rows)
    drafts, kinds = ([*dict.fromkeys(key[i] for key in lines)] for i in (0, 1))
    axis.axhline(1, color=COLOURS[0], linestyle="--", linewidth=1)
    for (draft, kind), points in lines.items():
        style = _style(drafts.index(draft), kinds.index(kind))
        measured = [(getattr(row, against), row.speedup) for row in points]
        axis.plot(*zip(*measured, strict=True), label=f"{draft}, {kind}", linewidth=1.3, **style)
        modelled = [(getattr(row, against), row.model_speedup) for row in points if row.model_speedup is not None]
        if modelled:
            style |= {"markerfacecolor": "none", "linestyle": ":"}
            axis.plot(*zip(*modelled, strict=True), linewidth=0.8, alpha=0.7, **style)
    axis.set_xscale("log", base=2)
    ticks = sorted({getattr(row, against) for row in rows})
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sequences" if against == "batch" else "tokens of context")
    axis.set_ylabel("speed-up over plain decoding")
    axis.set_title(f"measured, and by the speed model (dotted){_assumed(rows)}", fontsize=8)
    _finish(axis)


def _positions(axis: Any, rows: Sequence[Row]) -> None:
    """Of each draft the row with most positions, and most sequences of those."""
    drafts = [*dict.fromkeys(row.draft or "" for row in rows)]
    for i, draft in enumerate(drafts):
        row = max((r for r in rows if r.draft == draft), key=lambda r: (len(r.accepted_at or ()), r.batch))
        shares = [(at + 1, share) for at, share in enumerate(row.accepted_at or ()) if share is not None]
        if shares:
            axis.plot(*zip(*shares, strict=True), label=f"{draft}, {row.shape}", linewidth=1.3, **_style(i, i))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("position in the draft")
    axis.set_ylabel("accepted, of drafts right so far")
    axis.set_title(f"acceptance by position{_assumed(rows)}", fontsize=8)
    _finish(axis)


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2 if len(labels) > 2 else 1}
        axis.legend(handles, labels, fontsize=6, **below)


def _assumed(rows: Sequence[Row]) -> str:
    """A remark that acceptance was assumed, where it was."""
    shares = sorted({row.assumed for row in rows if row.assumed is not None})
    return f"; acceptance assumed: {', '.join(f'{x:g}' for x in shares)}" if shares else ""
