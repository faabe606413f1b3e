"""The figure of an inspection: a row for each head, maps of the prompt and the rows of the last decode step."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keysift.eval.inspect import Head, Inspection, PrefillView, StepFigures, StepView
from keysift.methods import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
PANEL, GAP_X, GAP_Y = 2.5, 1.15, 0.95  # inches: the side of a panel, and what lies between two
LEFT, RIGHT, TOP, BOTTOM = 0.95, 0.75, 1.15, 0.6
WIDE = 1.4  # panels of decode, in sides of a map
MAPS_ACROSS = 4  # where there is nothing but maps
FAINTEST = 1e-6  # share of a row's attention: colours begin no lower
FEW = 0.01  # share of the blocks that may be fainter than where the colours begin
BINS_A_DECADE = 8  # of ranks
MISSED = 0.01  # a block that is not read is marked if it holds this share of its row's attention
# colours that are told apart with any colour vision (Okabe and Ito)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
GREY, LIGHT, BAND = "#8A8A8A", "#E3E3E3", "#D5E6F2"
LEAST_WEIGHT = 1e-9  # lighter rows are drawn here


def draw(inspection: Inspection, title: str) -> bytes:
    """The figure as PNG. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(inspection, title)
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    return png.getvalue()


def _figure(inspection: Inspection, title: str) -> Figure:
    sparse = describe(inspection.prefill) != "dense"
    decodes = inspection.decode is not None
    columns = [1.0] + [1.0] * sparse + [WIDE, WIDE] * decodes
    across = min(MAPS_ACROSS, len(inspection.heads)) if len(columns) == 1 else 1
    figure, rows = _panels(len(inspection.heads), columns, across)
    faintest = _faintest([head.prefill for head in inspection.heads if head.prefill])
    for head, axes in zip(inspection.heads, rows, strict=True):
        rest = iter(axes)
        _draw_head(head, faintest, next(rest), next(rest) if sparse else None, list(rest))
    height = figure.get_figheight()
    left = LEFT / figure.get_figwidth() * 0.5
    figure.text(left, 1 - 0.2 / height, f"keysift inspect: {title}", fontsize=11, weight="bold", va="top")
    figure.text(left, 1 - 0.45 / height, _settings(inspection), fontsize=9, va="top")
    return figure


def _settings(inspection: Inspection) -> str:
    parts = [f"{inspection.prompt_tokens:,} prompt tokens", f"prefill {describe(inspection.prefill)}"]
    if inspection.decode is not None:
        parts.append(f"decode {describe(inspection.decode)}, step {len(inspection.token_ids)}")
    return "; ".join(parts)


def _panels(heads: int, columns: list[float], across: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure with axes for each head, ``across`` heads side by side; columns are given in sides of a map."""
    from matplotlib.figure import Figure

    down = -(-heads // across)
    widths = [PANEL * column for column in columns] * across
    width = LEFT + sum(widths) + GAP_X * (len(widths) - 1) + RIGHT
    height = TOP + PANEL * down + GAP_Y * (down - 1) + BOTTOM
    figure, rows = Figure((width, height)), []
    for i in range(heads):
        y = height - TOP - PANEL - (i // across) * (PANEL + GAP_Y)
        row = []
        for j in range(len(columns)):
            at = (i % across) * len(columns) + j
            x = LEFT + sum(widths[:at]) + GAP_X * at
            row.append(figure.add_axes((x / width, y / height, widths[at] / width, PANEL / height)))
        rows.append(row)
    return figure, rows


def _faintest(views: list[PrefillView]) -> float:
    """Where the colours of all maps begin, so that they compare: the power of ten that few blocks fall short of."""
    shares = torch.cat([view.attention[torch.ones_like(view.kept).tril()] for view in views])
    rank = max(1, int(FEW * len(shares)))
    return min(0.1, max(FAINTEST, 10 ** math.floor(math.log10(max(FAINTEST, float(shares.kthvalue(rank).values))))))


def _draw_head(head: Head, faintest: float, attention: Axes, kept: Axes | None, decode: list[Axes]) -> None:
    assert head.prefill is not None
    name = f"layer {head.layer}, head {head.head}"
    _attention(attention, head.prefill, faintest)
    _title(attention, name, "share of attention by block, rows sum to 1")
    if kept is not None:
        _kept(kept, head.prefill)
    if decode and head.last_step is not None:
        step = head.steps[-1]
        _ranks(decode[0], head.last_step)
        _positions(decode[1], head.last_step)
        _title(decode[0], f"decode reads {step.rows_read:,} of {step.rows_cached:,} rows", _of_step(step))
        _legend(decode[1], "where these rows lie")


def _of_step(step: StepFigures) -> str:
    if step.rows_read == step.rows_cached:
        return "all rows: dense attention"
    error = "estimate off by" if step.weighted else "output off by"
    return f"{share(step.mass_covered)} of the mass, {error} {share(step.output_error)}"


def share(x: float) -> str:
    """A share in percent, with as many places as tell it from 0 and from 100."""
    return f"{100 * x:.2f}%" if x < 0.01 or 0.99 <= x < 1 else f"{100 * x:.1f}%"


def _title(axes: Axes, first: str, second: str) -> None:
    axes.set_title(first, fontsize=9, weight="bold", loc="left", pad=16)
    axes.text(0, 1.03, second, transform=axes.transAxes, fontsize=8, va="bottom")


def _legend(axes: Axes, title: str) -> None:
    """A title, and under it, where others have a line of text, the legend."""
    _title(axes, title, "")
    form = {"fontsize": 7.5, "markerscale": 2, "ncols": 3, "columnspacing": 1, "handletextpad": 0.1, "frameon": False}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), borderaxespad=0, **form)


def _attention(axes: Axes, view: PrefillView, faintest: float) -> None:
    from matplotlib.colors import LogNorm

    future = torch.ones_like(view.kept).triu(1)
    shown = view.attention.clamp(min=faintest).masked_fill(future, torch.nan).numpy()
    image = axes.imshow(shown, norm=LogNorm(faintest, 1), cmap="viridis", extent=_extent(view))
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)), extend="min")
    bar.ax.tick_params(labelsize=7)
    _map_axes(axes, view.tokens)


def _kept(axes: Axes, view: PrefillView) -> None:
    from matplotlib.patches import Patch

    causal = torch.ones_like(view.kept).tril()
    missed = causal & ~view.kept & (view.attention >= MISSED)
    colours = torch.ones(*view.kept.shape, 3)
    for where, colour in ((causal, LIGHT), (view.kept, BLUE), (missed, ORANGE)):
        colours[where] = _rgb(colour)
    axes.imshow(colours.numpy(), extent=_extent(view))
    handles = [Patch(color=BLUE, label="read")]
    if bool((causal & ~view.kept).any()):
        handles.append(Patch(color=LIGHT, label="not read"))
    if bool(missed.any()):
        handles.append(Patch(color=ORANGE, label=f"not read, ≥ {MISSED:.0%} of\nits row's attention"))
    axes.legend(handles=handles, fontsize=7, loc="upper right", edgecolor="none", borderaxespad=0.2)
    _map_axes(axes, view.tokens)
    if view.dense:
        _title(axes, "prefill reads everything", view.dense)
    else:
        covered = f"{share(view.mass_covered)} of the mass, worst block {share(view.mass_covered_worst)}"
        _title(axes, f"prefill reads {share(view.density)} of pairs", covered)


def _rgb(colour: str) -> Tensor:
    from matplotlib.colors import to_rgb

    return torch.tensor(to_rgb(colour))


def _extent(view: PrefillView) -> tuple[float, float, float, float]:
    end = view.attention.shape[0] * view.block
    return 0, end, end, 0


def _map_axes(axes: Axes, tokens: int) -> None:
    axes.set_xlim(0, tokens)  # the last block may reach further
    axes.set_ylim(tokens, 0)
    axes.set_xlabel("key position", fontsize=8, labelpad=1)
    axes.set_ylabel("query position", fontsize=8, labelpad=1)
    _ticks(axes, "x", "y")


def _ticks(axes: Axes, *dimensions: str) -> None:
    for dimension in dimensions:
        getattr(axes, f"{dimension}axis").set_major_formatter("{x:,.0f}")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _ranks(axes: Axes, view: StepView) -> None:
    """Weights by rank over the share of each range of ranks that is read."""
    order = view.weight.argsort(descending=True)
    rank, read = torch.arange(1, len(order) + 1), view.read[order]
    edges, shares = _share_read(read)
    right = axes.twinx()
    right.stairs(100 * shares.numpy(), edges.numpy(), fill=True, color=BAND, label="share read (right)")
    right.set_ylim(0, 100)
    right.set_ylabel("rows of such ranks that are read, %", fontsize=7, labelpad=1)
    right.tick_params(labelsize=7)
    right.spines["top"].set_visible(False)
    axes.set_zorder(1)  # the dots before the band
    axes.patch.set_visible(False)
    # one dot over the one before it, so that where they crowd the colours seen are a fair sample
    colours = [
        GREEN if fixed else BLUE if chosen else GREY for chosen, fixed in zip(read, view.always[order], strict=True)
    ]
    axes.scatter(rank, view.weight[order].clamp(min=LEAST_WEIGHT), s=7, c=colours, linewidths=0)
    _weight_axis(axes, view.weight)
    _ticks(axes)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlim(0.8, len(order) * 1.25)
    axes.set_xlabel("rank by true weight", fontsize=8, labelpad=1)


def _share_read(read: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of bins of ranks, a few a decade, and the share of each bin's rows that are read (in order of rank)."""
    count = max(1, math.ceil(math.log10(len(read) + 1) * BINS_A_DECADE))
    edges = torch.unique((10 ** (torch.arange(count + 1) / BINS_A_DECADE)).round().long().clamp(max=len(read) + 1))
    total = torch.cat([torch.zeros(1), read.cumsum(0)])
    return edges - 0.5, total[edges - 1].diff() / edges.diff()


def _positions(axes: Axes, view: StepView) -> None:
    """Weights by position; rows that are read lie above the others."""
    position = torch.arange(len(view.weight))
    chosen = "read" if bool(view.read.all()) else "read: chosen"
    kinds = (
        ("not read", ~view.read, GREY, 3),
        (chosen, view.read & ~view.always, BLUE, 7),
        ("read: sinks and window", view.read & view.always, GREEN, 7),
    )
    for label, which, colour, size in kinds:
        if bool(which.any()):
            weight = view.weight[which].clamp(min=LEAST_WEIGHT)
            axes.scatter(position[which], weight, s=size, color=colour, label=label, linewidths=0)
    _weight_axis(axes, view.weight)
    _ticks(axes, "x")
    axes.set_xlim(-0.01 * len(position), 1.01 * len(position))
    axes.set_xlabel("key position", fontsize=8, labelpad=1)


def _weight_axis(axes: Axes, weight: Tensor) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylim(max(LEAST_WEIGHT, float(weight.min())) * 0.6, 2)
    axes.set_ylabel("true softmax weight", fontsize=8, labelpad=1)
