"""The model of a command, in the engine."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from keysift import LLM, pocket
from keysift.engine import at_least_one


def open_llm(model: str | None, console: Console, tensor_parallel: int | None, **options: Any) -> LLM:
    """The engine with a model, None for the shipped one."""
    at_least_one(tensor_parallel=tensor_parallel)
    with console.status("Loading the model"):
        return LLM(str(pocket.path()) if model is None else model, tensor_parallel=tensor_parallel, **options)
