"""``keysift bench decode``: one layer's attention of a decode step, selection included, beside dense."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from rich.console import Console
from typer import Option as option

from keysift.bench import decode
from keysift.bench.decode_plot import draw_decode
from keysift.bench.layers import Setup, Shape
from keysift.checkpoint import pick_device
from keysift.cli import bench, options
from keysift.cli.bench import shown
from keysift.methods import parse

GPU_SHAPE, CPU_SHAPE = (32, 8, 128), (8, 2, 128)  # heads, KV heads, dim
GPU_SHAPES = [Shape(1, 4096), Shape(1, 131072), Shape(16, 65536), Shape(24, 32768)]
CPU_SHAPES = [Shape(1, 4096), Shape(1, 16384)]
METHODS = ("quest:keep=0.03", "signbits:keep=0.03", "magicpig")
COLUMNS = (
    "batch|context|method|kept|keys|side data|MB read|hash us|select us|attend us|merge us|total us|speed-up|TB/s|"
    "median error|mean error|MiB|"
)


def command(
    shapes: Annotated[
        str | None,
        option(metavar="BxN,...", show_default="as suits the device", help="Batch x context, such as 1x131072,16x64k."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        option(metavar="SPEC", show_default=", ".join(METHODS), help="Beside dense; may be repeated."),
    ] = None,
    keep: Annotated[
        str | None,
        option(metavar="A,B", show_default="as the methods say", help="Budgets of methods that have keep, each a row."),
    ] = None,
    heads: Annotated[int | None, option(metavar="N", show_default="32, on a CPU 8", help="Query heads.")] = None,
    kv_heads: Annotated[int | None, option(metavar="N", show_default="8, on a CPU 2", help="KV heads.")] = None,
    dim: Annotated[int | None, option(metavar="N", show_default="128", help="Of a head.")] = None,
    page: Annotated[int, option(metavar="N", help="Rows a page of the cache.")] = 128,
    inputs: Annotated[
        str, option(metavar="KIND", help="structured (shaped like real heads' attention) or random (noise).")
    ] = "structured",
    repeats: Annotated[
        int | None, option(metavar="N", show_default="half a second, on a CPU one", help="Timed rounds of each part.")
    ] = None,
    draws: Annotated[int, option(metavar="N", help="Seeds that the error of methods that draw is averaged over.")] = 5,
    out: bench.Out = None,
    force: bench.Force = False,
    seed: Annotated[int, option(metavar="N", help="Of the inputs, and of methods that draw.")] = 0,
    device: options.Device = "auto",
    dtype: bench.DType = "auto",
    as_json: bench.AsJson = False,
) -> None:
    """Time one layer's attention in a decode step, selection included, beside dense. Wrong results get no speed."""
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    usual = GPU_SHAPE if on_gpu else CPU_SHAPE
    setup = Setup(
        heads=usual[0] if heads is None else heads,
        kv_heads=usual[1] if kv_heads is None else kv_heads,
        dim=usual[2] if dim is None else dim,
        dtype=bench.tensor_dtype(dtype, where),
        device=where,
        page=page,
        seed=seed,
        inputs=inputs,
        repeats=repeats,
        draws=draws,
    )
    chosen = [parse(spec, "decode") for spec in methods or METHODS]
    chosen = chosen if keep is None else decode.swept(chosen, parse_shares(keep))
    sizes = (GPU_SHAPES if on_gpu else CPU_SHAPES) if shapes is None else parse_shapes(shapes)
    decode.check_shapes(sizes, chosen)
    file = bench.claim(out, "decode.json", force)
    rows: list[decode.Row] = []
    data = bench.about(where) | {"settings": bench.settings_of(setup), "rows": []}
    try:
        bench.run(decode.measure, (setup, sizes, chosen), rows, data, file, Console(stderr=True))
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    bench.finish(data, file, lambda: print_rows(rows), as_json)
    if file is not None:
        bench.picture(lambda: draw_decode(rows, title(setup, data)), file.with_suffix(".png"))
    bench.end(rows, interrupted)


def parse_shapes(text: str) -> list[Shape]:
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        parts = re.fullmatch(r"([0-9]+)x([0-9]+)([kK]?)", item)
        if not parts:
            raise ValueError(f"--shapes {item}: write BATCHxCONTEXT, such as 16x65536")
        found.append(Shape(int(parts[1]), int(parts[2]) * (1024 if parts[3] else 1)))
    if not found:
        raise ValueError("--shapes is empty: write BATCHxCONTEXT, such as 16x65536")
    return list(dict.fromkeys(found))


def parse_shares(text: str) -> list[float]:
    shares = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            shares.append(float(item))
        except ValueError:
            shares.append(0.0)
        if not 0 < shares[-1] <= 1:
            raise ValueError(f"--keep {item}: write shares above 0 and at most 1, such as 0.01,0.02")
    if not shares:
        raise ValueError("--keep is empty: write shares such as 0.01,0.02")
    return sorted(set(shares))


def title(setup: Setup, data: dict[str, Any]) -> str:
    shape = f"{setup.heads}/{setup.kv_heads} heads of {setup.dim}, {str(setup.dtype).removeprefix('torch.')}"
    return f"{data['gpu'] or data['cpu']}; {shape}; {setup.inputs} inputs, pages of {setup.page}"


def print_rows(rows: Sequence[decode.Row]) -> None:
    promised = any(row.within_epsilon is not None for row in rows)
    grid = bench.table(COLUMNS.replace("MiB", "within epsilon|MiB") if promised else COLUMNS)
    for row in rows:
        grid.add_row(
            f"{row.batch:,}",
            f"{row.context:,}",
            f"{row.method} ({row.kernel})" if row.kernel else row.method,
            shown(row.kept_share, ".1%"),
            shown(row.keys_per_head, ",.0f"),
            shown(row.side_share, ".1%"),
            shown(row.bytes_read and row.bytes_read / 1e6, ",.2f"),
            *(shown(x, ",.1f") for x in (row.hash_us, row.select_us, row.attend_us, row.merge_us, row.total_us)),
            shown(row.speedup, ".2f"),
            shown(row.tb_s, ".3g"),
            *(shown(x, ".2g") for x in (row.error_median, row.error_mean)),
            *([shown(row.within_epsilon, ".1%")] if promised else []),
            shown(row.peak_mib, ",.0f"),
            "" if row.status == "ok" else row.status,
        )
    bench.show_table(grid)
    bench.print_reasons(rows)
