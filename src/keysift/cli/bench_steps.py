"""``keysift bench steps``: tokens a second of a whole model, dense and by methods, in one loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from rich.console import Console
from typer import Option as option

from keysift.bench import steps
from keysift.bench.layers import Shape
from keysift.checkpoint import pick_device
from keysift.cli import bench, options
from keysift.cli.bench import shown
from keysift.cli.bench_decode import parse_shapes
from keysift.methods import parse

GPU_SHAPES = [Shape(batch, context) for context in (32768, 131072) for batch in (1, 0)]
CPU_SHAPES = [Shape(1, 2048)]
METHODS = ("quest:keep=0.03", "signbits:keep=0.03")
NOTE = "contexts are noise: a step takes as long over them as over a text, and its tokens mean nothing"


def command(
    shapes: Annotated[
        str | None,
        option(metavar="BxN,...", show_default="as suits the device", help="Batch x context; 0xN is all that fit."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        option(metavar="SPEC", show_default=", ".join(METHODS), help="Beside dense; may be repeated."),
    ] = None,
    shape: bench.ShapeName = None,
    model: bench.ModelPath = None,
    timed: Annotated[int, option("--steps", metavar="N", help="Timed steps.")] = 30,
    page: Annotated[int, option(metavar="N", help="Rows a page of the cache.")] = 128,
    out: bench.Out = None,
    force: bench.Force = False,
    seed: Annotated[int, option(metavar="N", help="Of weights, contexts, and of methods that draw.")] = 0,
    device: options.Device = "auto",
    dtype: bench.DType = "auto",
    as_json: bench.AsJson = False,
) -> None:
    """Time a model's decode steps over long contexts, in CUDA graphs on a GPU."""
    setup = steps.Setup(timed, page, seed)
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    name = bench.shape_name(shape, model, on_gpu)
    sizes = (GPU_SHAPES if on_gpu else CPU_SHAPES) if shapes is None else parse_shapes(shapes)
    if empty := [size for size in sizes if size.context < 1]:
        raise ValueError(f"--shapes {empty[0]}: the context must be 1 or more")
    chosen = [parse(spec, "decode") for spec in methods or METHODS]
    longest = max(steps.rows_needed(setup, size.context) for size in sizes)
    file = bench.claim(out, "steps.json", force)
    console = Console(stderr=True)
    with console.status("Making the model" if model is None else "Loading the model"):
        lm = bench.decoder(model, name, longest, "--shapes", where, dtype, seed, longest)
    rows: list[steps.Row] = []
    settings = {"steps": timed, "page": page, "seed": seed, "model": model, "shape": None if model else name}
    data = bench.about(where) | {"settings": settings | {"dtype": str(lm.dtype).removeprefix("torch.")}, "rows": []}
    data["note"] = f"{name} with random weights; {NOTE}" if model is None else NOTE
    try:
        bench.run(steps.measure, (lm, setup, sizes, chosen), rows, data, file, console)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    bench.finish(data, file, lambda: print_rows(rows, data["note"]), as_json)
    bench.end(rows, interrupted)


def print_rows(rows: Sequence[steps.Row], remark: str) -> None:
    grid = bench.table("batch|context|method|step ms|tokens/s|speed-up|side data|GiB|")
    for row in rows:
        grid.add_row(
            f"{row.batch:,}",
            f"{row.context:,}",
            row.method,
            shown(row.step_ms, ".3f"),
            shown(row.tokens_per_s, ",.1f"),
            shown(row.speedup, ".2f"),
            shown(row.side_share, ".1%"),
            shown(row.peak_gib, ",.1f"),
            "" if row.status == "ok" else row.status,
        )
    bench.show_table(grid)
    bench.print_reasons(rows)
    print(remark)
