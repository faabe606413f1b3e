"""The command line: ``keysift generate | serve | eval | inspect | bench | methods | info``, one file a command.

This file holds the app and the error boundary: whatever the user got wrong ends as one line on standard error
and exit code 2. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import torch
import typer

from keysift import __version__
from keysift.cli import (
    bench,
    bench_decode,
    bench_generate,
    bench_hybrid,
    bench_serve,
    bench_steps,
    generate,
    info,
    inspect,
    methods,
    serve,
)
from keysift.cli import eval as evaluation

app = typer.Typer(
    name="keysift",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: one line an option, which grep can find
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.command)
app.command("eval")(evaluation.command)
# what begins with -h may be an option of vLLM's, which is handed on
app.command(
    "serve",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]},
)(serve.command)
app.command("inspect")(inspect.command)
app.add_typer(bench.app, name="bench")
bench.app.command("decode")(bench_decode.command)
bench.app.command("steps")(bench_steps.command)
bench.app.command("generate")(bench_generate.command)
bench.app.command("serve")(bench_serve.command)
bench.app.command("hybrid")(bench_hybrid.command)
app.command("methods")(methods.command)
app.command("info")(info.command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Long-context inference that reads fewer keys."""
    if show_version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` by default) and return its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 must not end a generation
    try:
        return app(args, prog_name="keysift", standalone_mode=False) or 0
    except typer.TyperException as error:  # an option or argument that cannot be parsed
        return fail(error.format_message())
    except ValueError as error:
        return fail(str(error))
    except MemoryError as error:
        return fail(str(error) or "out of memory", code=1)
    except OSError as error:  # standard output cannot be written: a full disk
        if isinstance(error, BrokenPipeError):
            raise
        return fail(f"cannot write standard output: {error.strerror}", code=1)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return fail(f"out of memory: {str(error).partition('. ')[0]}", code=1)
        raise


def fail(message: str, code: int = 2) -> int:
    typer.echo(f"keysift: {' '.join(message.split())}", err=True)
    return code
