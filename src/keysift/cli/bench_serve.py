"""``keysift bench serve``: vLLM with our attention beside vLLM alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from rich.console import Console
from typer import Option as option

from keysift.bench import serve
from keysift.bench.generate import Shape
from keysift.checkpoint import pick_device, read_tokenizer, stated_context
from keysift.cli import bench
from keysift.cli.bench import shown
from keysift.cli.bench_generate import parse_shapes
from keysift.eval import ruler
from keysift.eval.data import Data
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
    rates: Annotated[
        str | None,
        option(
            metavar="R,S",
            show_default="all requests together",
            help="Requests a second that arrive, one rate after the other.",
        ),
    ] = None,
    latency: Annotated[
        float | None,
        option(metavar="S", help="With --rates: the highest at which 9 in 10 get their first token in S seconds."),
    ] = None,
    shape: bench.ShapeName = None,
    model: Annotated[
        str | None, option(metavar="PATH", help="A model with its weights, or pocket, instead of --shape.")
    ] = None,
    samples: Annotated[
        int, option(metavar="N", help="With --model: also answer N samples of each RULER task that needs no file.")
    ] = 0,
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
    """Time vLLM with our attention, and vLLM alone, on requests that arrive together or at a rate."""
    if reason := unsupported():
        raise ValueError(reason)
    one_of("dtype", dtype, DTYPES)
    where = pick_device("auto")
    on_gpu = where.type == "cuda"
    name = bench.shape_name(shape, model, on_gpu)
    kind = dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"
    setup = serve.Setup(
        shape=None if model else name,
        model=model,
        dtype=kind,
        chunk=chunk,
        memory=memory or (0.9 if on_gpu else 1.0),
        seed=seed,
        eager=eager or not on_gpu,
        rates=(None,) if rates is None else parse_rates(rates),
        samples=samples,
    )
    if latency is not None and (rates is None or not latency > 0):
        raise ValueError(f"--latency {latency}: goes with --rates, and is more than 0 seconds")
    sizes = (GPU_LOADS if on_gpu else CPU_LOADS) if loads is None else parse_shapes(loads, "--loads")
    check_loads(setup, sizes)
    if memory is not None and not (0 < memory <= 1 if on_gpu else 1 <= memory < math.inf and memory % 1 == 0):
        raise ValueError(
            f"--memory {memory}: a share of a GPU's memory, above 0 and at most 1; on a CPU, GiB, a whole number"
        )
    servers = [parse_run(text, seed) for text in runs or RUNS]
    file = bench.claim(out, "serve.json", force)
    rows: list[serve.Row] = []
    data = bench.about(where) | {"settings": asdict(setup), "rows": []}
    try:
        bench.run(serve.measure, (setup, sizes, servers), rows, data, file, Console(stderr=True))
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    if latency is not None:
        data |= {"latency": latency, "highest_rates": serve.highest_rates(rows, setup.rates, latency)}
    bench.finish(data, file, lambda: print_rows(rows, data.get("highest_rates", ()), latency), as_json)
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


def check_loads(setup: serve.Setup, loads: Sequence[Shape]) -> None:
    """Raise ValueError for what no server could serve, before one is started."""
    for load in loads:
        if not load.batch:
            raise ValueError(f"--loads {load}: there must be a request")
        if setup.chunk < load.batch:
            raise ValueError(
                f"--chunk {setup.chunk}: a step has a token of each of the {load.batch} requests of {load}"
            )
    if (name := setup.model_name) is None:
        return
    length, limit = serve.longest(loads), stated_context(name)
    if limit is not None and length > limit:
        raise ValueError(f"--loads: {length:,} tokens are needed, and the model's context is {limit:,}")
    if setup.samples:
        tokenizer, shortest = read_tokenizer(name), min(load.prefix for load in loads)
        for task, number in itertools.product(ruler.OFFLINE, range(setup.samples)):
            ruler.make_sample(task, shortest, number, tokenizer, Data(), seed=setup.seed)


def parse_rates(text: str) -> list[float]:
    """Requests a second, in rising order."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < rate < math.inf for rate in found):
        raise ValueError(f"--rates {text}: write requests a second, above 0, joined by commas, such as 0.5,1,2")
    return found


def print_rows(rows: Sequence[serve.Row], highest: Sequence[dict[str, Any]], latency: float | None) -> None:
    columns: dict[str, Callable[[serve.Row], str]] = {
        "requests": lambda row: f"{row.requests:,}",
        "prompt": lambda row: f"{row.prompt:,}",
        "new": lambda row: f"{row.new:,}",
        "a second": lambda row: shown(row.rate, "g"),
        "method": lambda row: row.method,
        "first token s": lambda row: shown(row.first_token_s, ".3f"),
        "9 in 10": lambda row: shown(row.first_token_90_s, ".3f"),
        "at most": lambda row: shown(row.last_first_token_s, ".3f"),
        "token ms": lambda row: shown(row.token_ms, ".2f"),
        "step ms": lambda row: shown(row.step_ms, ".2f"),
        "tokens/s": lambda row: shown(row.tokens_per_s, ",.1f"),
        "in all": lambda row: shown(row.total_tokens_per_s, ",.1f"),
        "earlier": lambda row: shown(row.earlier, ".2f"),
        "faster": lambda row: shown(row.faster, ".2f"),
        "more": lambda row: shown(row.more, ".2f"),
        "right": lambda row: shown(row.right, ".1%"),
        "": lambda row: "" if row.status == "ok" else row.status,
    }
    for title, field in {
        "a second": "rate",
        "step ms": "step_ms",
        "tokens/s": "tokens_per_s",
        "right": "right",
    }.items():
        if all(getattr(row, field) is None for row in rows):
            del columns[title]
    grid = bench.table("|".join(columns))
    for row in rows:
        grid.add_row(*(cell(row) for cell in columns.values()))
    bench.show_table(grid)
    for of in highest:
        rate = "none of the rates" if of["rate"] is None else f"{of['rate']:g} a second"
        load = f"{of['requests']}x{of['prompt']}x{of['new']}"
        print(f"{load}, {of['method']}: {rate}, 9 in 10 first tokens within {latency:g} s")
    bench.print_reasons(rows)
