"""``keysift serve``: an OpenAI-compatible server, which is vLLM with our attention."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Annotated, Any

from typer import Argument as argument
from typer import Context
from typer import Option as option

from keysift import pocket
from keysift.cli import options
from keysift.engine import at_least_one
from keysift.vllm_plugin.options import SECTION, Options
from keysift.vllm_plugin.versions import unsupported

NAME_OF_POCKET = "keysift-pocket"
RESERVED = ("--attention-backend", "--attention-config", "-ac", "--additional-config")  # what the command says itself


def command(
    context: Context,
    model: Annotated[
        str | None, argument(metavar="[MODEL]", help="Model folder or hub id.", show_default="the shipped pocket model")
    ] = None,
    prefill: options.Prefill = "dense",
    decode: Annotated[
        str, option(metavar="SPEC", help="How new tokens read the past: dense, magicpig, quest, signbits or streaming.")
    ] = "dense",
    seed: Annotated[int, option(metavar="N", help="For methods that draw.")] = 0,
    host: Annotated[str, option(metavar="H", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option(metavar="N", help="Port to listen on.")] = 8000,
    tensor_parallel: options.TensorParallel = None,
    max_length: Annotated[
        int | None, option(metavar="N", show_default="the model's", help="Tokens of a request, prompt and answer.")
    ] = None,
    dtype: Annotated[str, option(metavar="T", help="auto (the model's own), float32, bfloat16 or float16.")] = "auto",
    dry_run: Annotated[bool, option("--dry-run", help="Print the command line of vLLM, and do not start it.")] = False,
) -> None:
    """Serve a model to OpenAI clients, by vLLM with sparse attention; further options go to ``vllm serve``."""
    if model == "-h":
        print(context.get_help())
        return
    at_least_one(tensor_parallel=tensor_parallel, max_length=max_length)
    section: dict[str, Any] = {"prefill": prefill, "decode": decode} | ({"seed": seed} if seed else {})
    Options.of(section)
    for text in (model or "", *context.args):
        name = text.partition("=")[0].partition(".")[0].replace("_", "-")
        if name in RESERVED:
            raise ValueError(f"{name}: keysift serve gives it itself; or start vllm serve with it")
    if model is not None and model.startswith("-"):
        raise ValueError(f"{model}: options of vLLM's come after MODEL; the shipped model is called {pocket.NAME}")
    shipped = model in (None, pocket.NAME)
    if not dry_run and (reason := unsupported()):
        raise ValueError(reason)
    flags = {
        "--host": host,
        "--port": port,
        "--dtype": dtype,
        "--tensor-parallel-size": tensor_parallel,
        "--max-model-len": max_length,
        "--attention-backend": "CUSTOM",
        "--additional-config": json.dumps({SECTION: section}),
        "--served-model-name": NAME_OF_POCKET if shipped else None,
    }
    given = [text for flag, value in flags.items() if value is not None for text in (flag, str(value))]
    line = ["serve", str(pocket.path()) if shipped else str(model), *given, *context.args]
    if dry_run:
        print(shlex.join(["vllm", *line]))
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # vLLM takes this process over: signals reach it, its exit code is ours
    os.execv(sys.executable, [sys.executable, "-m", "keysift.vllm_plugin.launch", *line])
