"""Who worked when, GPU and CPU, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from keysift.eval.plots import COLOURS
from keysift.hf.hybrid import Span


def draw_trace(spans: Sequence[Span], title: str) -> bytes | None:
    """Two rows, GPU and CPU; a bar is what one of them did for a layer, its colour the batch; PNG, None without spans.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'keysift[plot]'") from error
    if not spans:
        return None
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    began = min(span.start for span in spans)
    batches = sorted({span.batch for span in spans})
    for batch in batches:
        for device, at in (("gpu", len(batches)), ("cpu", 0)):
            bars = [
                (1e3 * (s.start - began), 1e3 * (s.end - s.start))
                for s in spans
                if s.batch == batch and s.device == device
            ]
            axis.broken_barh(
                bars, (at + batch + 0.1 * (at > 0), 0.85), color=COLOURS[batch % len(COLOURS)], linewidth=0
            )
    middle = len(batches) / 2
    axis.set_yticks([middle, middle + len(batches)], ["CPU", "GPU"])
    axis.set_xlabel("ms")
    axis.set_title(title, fontsize=9)
    patches = [Patch(color=COLOURS[b % len(COLOURS)], label=f"part {b + 1} of the batch") for b in batches]
    figure.legend(handles=patches, fontsize=7, loc="outside right center")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()
