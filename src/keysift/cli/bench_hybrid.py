"""``keysift bench hybrid``: tokens a second with keys and values in host memory; MagicPIG's options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

from rich.console import Console
from typer import Option as option

from keysift.bench import hybrid
from keysift.bench.hybrid_plot import draw_trace
from keysift.checkpoint import pick_device
from keysift.cli import bench, options
from keysift.cli.bench import shown
from keysift.cli.generate import check_range
from keysift.methods import describe, parse

METHOD = "signbits:keep=0.02"
PROMPT, CPU_PROMPT = 98304, 2048


def command(
    batch: Annotated[
        int | None, option("--B", metavar="N", show_default="what the host's memory holds", help="Sequences.")
    ] = None,
    prompt: Annotated[
        int | None, option("--P", metavar="N", show_default="98304, on a CPU 2048", help="Tokens of a prompt.")
    ] = None,
    most: Annotated[
        int | None, option("--M", metavar="N", show_default="as needed", help="Tokens that a sequence may come to.")
    ] = None,
    generated: Annotated[int, option("--G", metavar="N", help="Timed steps.")] = 20,
    bits: Annotated[
        int | None, option("--K", metavar="N", help="MagicPIG's bits a table, instead of --decode; 0 means dense.")
    ] = None,
    tables: Annotated[int | None, option("--L", metavar="N", help="MagicPIG's tables.")] = None,
    decode: Annotated[
        str | None, option(metavar="SPEC", show_default=METHOD, help="How new tokens read the past.")
    ] = None,
    shape: bench.ShapeName = None,
    model: bench.ModelPath = None,
    gpu_memory: Annotated[
        float | None, option(metavar="GIB", show_default="all", help="Of the GPU, to stand for a smaller one.")
    ] = None,
    host_memory: Annotated[
        float | None, option(metavar="GIB", show_default="what is free", help="That the cache may take.")
    ] = None,
    select_device: Annotated[
        str, option(metavar="D", help="Where rows are selected: gpu, cpu or auto, the GPU if side data fit there.")
    ] = "auto",
    batches: Annotated[int, option(metavar="N", help="Parts of the batch that are in flight at once.")] = 2,
    out: bench.Out = None,
    force: bench.Force = False,
    seed: Annotated[int, option(metavar="N", help="Of weights, contexts, and of methods that draw.")] = 0,
    device: options.Device = "auto",
    dtype: bench.DType = "auto",
    as_json: bench.AsJson = False,
) -> None:
    """Time decode steps with keys and values in host memory, beside dense on the GPU alone."""
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    check_range("K", bits, 0)
    method = parse(spec_of(bits, tables, decode), "decode")
    context = (PROMPT if on_gpu else CPU_PROMPT) if prompt is None else prompt
    setup = hybrid.Setup(
        method,
        context,
        batch=(0 if on_gpu else 2) if batch is None else batch,
        steps=generated,
        batches=batches,
        gpu_memory=gib("gpu_memory", gpu_memory),
        host_memory=gib("host_memory", host_memory),
        select_device=select_device,
        seed=seed,
    )
    needed = context + setup.room
    if most is not None and most < needed:
        raise ValueError(
            f"--M {most}: {needed} are needed, the prompt and {setup.room} steps, {generated} of them timed"
        )
    if gpu_memory is not None and not on_gpu:
        raise ValueError(f"--gpu-memory {gpu_memory:g}: the device is {where}")
    name = bench.shape_name(shape, model, on_gpu)
    file = bench.claim(out, "hybrid.json", force)
    console = Console(stderr=True)
    with console.status("Making the model" if model is None else "Loading the model"):
        lm = bench.decoder(model, name, needed, f"--P {context}", where, dtype, seed, most or needed)
    rows: list[hybrid.Row] = []
    traced = hybrid.Traced()
    settings = dataclasses.asdict(setup) | {
        "method": describe(method),
        "model": model,
        "shape": None if model else name,
    }
    data = bench.about(where) | {"settings": settings | {"dtype": str(lm.dtype).removeprefix("torch.")}, "rows": []}
    data["note"] = ("random weights; " if model is None else "") + "contexts are noise, and tokens mean nothing"
    try:
        bench.run(hybrid.measure, (lm, setup, traced), rows, data, file, console)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    bench.finish(data, file, lambda: print_rows(rows, data["note"]), as_json)
    if file is not None and traced.spans:
        head = f"{data['gpu']}, {data['cpu']}; {model or name}, {rows[0].batch} x {context:,}; {describe(method)}"
        share = f"GPU busy {rows[0].gpu_busy:.0%}, CPU {rows[0].cpu_busy:.0%}"
        one = [span for span in traced.spans if span.start <= traced.spans[0].start + 1e-3 * (rows[0].step_ms or 0)]
        bench.picture(lambda: draw_trace(one, f"{head}; {share} of the time; one step"), file.with_suffix(".png"))
    bench.end(rows, interrupted)


def spec_of(bits: int | None, tables: int | None, decode: str | None) -> str:
    """The method: MagicPIG by its two numbers, or any by its SPEC."""
    if bits is None and tables is None:
        return METHOD if decode is None else decode
    if decode is not None:
        raise ValueError("--decode and --K, --L: give the one or the others")
    if bits == 0:
        return "dense"
    given = [f"{name}={value}" for name, value in (("K", bits), ("L", tables)) if value is not None]
    return "magicpig:" + ",".join(given)


def gib(name: str, value: float | None) -> int | None:
    """Bytes."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: choose more than 0, in GiB")
    return None if value is None else max(1, int(value * 2**30))


def print_rows(rows: Sequence[hybrid.Row], remark: str) -> None:
    grid = bench.table("batch|context|method|selects on|step ms|tokens/s|host GiB|GPU GiB|GPU busy|CPU busy|")
    for row in rows:
        grid.add_row(
            f"{row.batch:,}",
            f"{row.context:,}",
            row.method,
            row.selects_on or "-",
            shown(row.step_ms, ",.1f"),
            shown(row.tokens_per_s, ",.1f"),
            *(shown(x, ",.1f") for x in (row.host_gib, row.gpu_gib)),
            *(shown(x, ".0%") for x in (row.gpu_busy, row.cpu_busy)),
            "" if row.status == "ok" else row.status,
        )
    bench.show_table(grid)
    bench.print_reasons(rows)
    print(remark)
