"""``keysift bench serve``: vLLM with our attention beside vLLM alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from rich.console import Console
from typer import Option as option

from keysift.bench import serve
from keysift.bench.generate import Shape
from keysift.checkpoint import pick_device
from keysift.cli import bench
from keysift.cli.bench import shown
from keysift.cli.bench_generate import parse_shapes
from keysift.types import one_of
from keysift.vllm_plugin.options import Options
from keysift.vllm_plugin.versions import unsupported

GPU_LOADS = [Shape(16, 32768, 128), Shape(4, 131072, 128)]
CPU_LOADS = [Shape(4, 2048, 16)]
RUNS = ("prefill=flexprefill;decode=quest", "prefill=flexprefill;decode=signbits")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def command(
    loads: Annotated[
        str | None,
        option(metavar="RxPxN,...", show_default="as suits the device", help="Requests x prompt x new tokens."),
    ] = None,
    runs: Annotated[
        list[str] | None,
        option("--run", metavar="prefill=SPEC;decode=SPEC", show_default=" and ".join(RUNS), help="May be repeated."),
    ] = None,
    shape: bench.ShapeName = None,
    model: bench.ModelPath = None,
    chunk: Annotated[int, option(metavar="N", help="Tokens that a step of the server reads at most.")] = 16384,
    memory: Annotated[
        float | None,
        option(metavar="X", show_default="0.9, or 1", help="Share of a GPU's memory; on a CPU, GiB of keys."),
    ] = None,
    eager: Annotated[bool, option("--eager", help="Without compilation and CUDA graphs.")] = False,
    out: bench.Out = None,
    force: bench.Force = False,
    seed: Annotated[int, option(metavar="N", help="Of prompts, and of methods that draw.")] = 0,
    dtype: Annotated[
        str, option(metavar="T", help="auto (bfloat16, on a CPU float32), bfloat16, float16, float32.")
    ] = "auto",
    as_json: bench.AsJson = False,
) -> None:
    """Time vLLM with our attention, and vLLM alone, on requests that arrive together."""
    if reason := unsupported():
        raise ValueError(reason)
    one_of("dtype", dtype, DTYPES)
    where = pick_device("auto")
    on_gpu = where.type == "cuda"
    name = bench.shape_name(shape, model, on_gpu)
    kind = dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"
    setup = serve.Setup(
        None if model else name, model, kind, chunk, memory or (0.9 if on_gpu else 1.0), seed, eager or not on_gpu
    )
    sizes = (GPU_LOADS if on_gpu else CPU_LOADS) if loads is None else parse_shapes(loads)
    if empty := [size for size in sizes if not size.batch]:
        raise ValueError(f"--loads {empty[0]}: there must be a request")
    most = 1.0 if on_gpu else math.inf
    if memory is not None and not 0 < memory <= most:
        raise ValueError(f"--memory {memory}: a share of a GPU's memory, above 0 and at most 1; on a CPU, GiB")
    servers = [parse_run(text, seed) for text in runs or RUNS]
    file = bench.claim(out, "serve.json", force)
    rows: list[serve.Row] = []
    data = bench.about(where) | {"settings": asdict(setup), "rows": []}
    try:
        bench.run(serve.measure, (setup, sizes, servers), rows, data, file, Console(stderr=True))
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    bench.finish(data, file, lambda: print_rows(rows), as_json)
    bench.end(rows, interrupted)


def parse_run(text: str, seed: int) -> Options:
    """Options of a server as ``prefill=SPEC;decode=SPEC``; either may be left out."""
    section: dict[str, str | int] = {"seed": seed}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        key, equals, spec = part.partition("=")
        if key not in ("prefill", "decode") or not equals or key in section:
            raise ValueError(f"--run {text}: write prefill=SPEC;decode=SPEC")
        section[key] = spec
    return Options.of(section)


def print_rows(rows: Sequence[serve.Row]) -> None:
    grid = bench.table("requests|prompt|new|method|first token s|at most|step ms|tokens/s|in all|earlier|faster|more|")
    for row in rows:
        grid.add_row(
            f"{row.requests:,}",
            f"{row.prompt:,}",
            f"{row.new:,}",
            row.method,
            shown(row.first_token_s, ".3f"),
            shown(row.last_first_token_s, ".3f"),
            shown(row.step_ms, ".2f"),
            shown(row.tokens_per_s, ",.1f"),
            shown(row.total_tokens_per_s, ",.1f"),
            shown(row.earlier, ".2f"),
            shown(row.faster, ".2f"),
            shown(row.more, ".2f"),
            "" if row.status == "ok" else row.status,
        )
    bench.show_table(grid)
    bench.print_reasons(rows)
