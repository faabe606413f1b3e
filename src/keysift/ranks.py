"""A model from a folder, in this process or dealt out to several."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from keysift.checkpoint import check_ranks, check_vocabularies, load, pick_device, pick_dtype, read_config
from keysift.hf.config import context_tokens
from keysift.hf.draft_model import DraftModel, Elsewhere, budget_of, usual_cache
from keysift.hf.parallel import (
    all_or_none,
    deal_out,
    is_dealt_out,
    join,
    leave,
    localise,
    ranks_here,
    ranks_of_environment,
    the_group,
    this_rank,
)
from keysift.hf.served import ServedModel
from keysift.speculate import MOST
from keysift.types import Decode
from keysift.workers import Workers


class Ranks:
    """The processes that share a model: this one alone, those that torchrun started, or those that are started here.

    Attributes:
        model, tokenizer: this process's part of the model.
    """

    def __init__(
        self, name: str, device: str, dtype: str, tensor_parallel: int | None, program: str, options: dict[str, Any]
    ) -> None:
        """Load a model.

        Args:
            name: folder or hub id.
            device, dtype: names; "auto" is one GPU for each process.
            tensor_parallel: how many processes; None for what torchrun has started.
            program: what processes that are started here run.
            options: what they are told first.

        Raises:
            ValueError: a number of processes that the model or the machine cannot have, or a broken model.
        """
        self._workers: Workers | None = None
        started = ranks_of_environment()
        ranks = started if tensor_parallel is None else tensor_parallel
        if started > 1 and ranks != started:
            raise ValueError(f"tensor_parallel={ranks}: torchrun has started {started} processes; leave it out")
        if ranks == 1:
            where = pick_device(device)
            self.model, self.tokenizer = load(name, where, pick_dtype(dtype, where))
            return
        check_ranks(name, ranks)
        if started == 1 and ranks_here() > 1:
            raise ValueError(f"tensor_parallel={ranks}: this process has another such LLM open; close that first")
        if device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"device={device}: with tensor_parallel, choose auto, cuda or cpu")
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        where = pick_device(f"cuda:{rank}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
        if where.type == "cuda" and torch.cuda.device_count() < ranks:
            raise ValueError(f"tensor_parallel={ranks}: PyTorch sees {torch.cuda.device_count()} GPUs here")
        try:
            environment = self._start(program, ranks, options) if started == 1 else {}
            with environment_with(environment):
                join(where)
                self.model, self.tokenizer = load(name, where, pick_dtype(dtype, where), ranks)
            the_group(where)
            localise(self.model)
        except BaseException:
            self.close()
            raise

    def _start(self, program: str, ranks: int, options: dict[str, Any]) -> dict[str, str]:
        self._workers = Workers(program, ranks)
        self._workers.tell(options)
        return self._workers.environment

    def tell(self, *call: Any) -> None:
        """Have the processes that were started here make a call that this one is about to make.

        Raises:
            RuntimeError: one of them has died.
        """
        if self._workers is not None:
            self._workers.tell(*call)

    def give_up(self) -> None:
        """End the processes that were started here: an error in this one alone has left them waiting for it."""
        if self._workers is not None:
            self._workers.end("an error in one process has ended the others; make a new LLM")

    def died(self) -> bool:
        """Whether one of them has died, or is found dead within a second."""
        deadline = time.monotonic() + 1
        while self._workers is not None and not self.broken and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.broken is not None

    @property
    def broken(self) -> str | None:
        """Which of them has died, if one has."""
        return None if self._workers is None else self._workers.dead

    def close(self) -> None:
        """End the processes that were started here, and leave their group; torchrun's goes on, for the next model."""
        if self._workers is not None:
            broken = self.broken
            self._workers.close()
            self._workers = None
            leave(politely=broken is None)


def deal_out_once(model: Any, ranks: int | None) -> None:
    """Have each of torchrun's processes keep its part of a model that all have whole, if that was not done before.

    Raises:
        ValueError: not under torchrun, or with another number of processes, or parts that would not be equal.
    """
    if ranks != ranks_of_environment():
        raise ValueError(f"tensor_parallel={ranks} of a loaded model: torchrun must start as many; or pass its folder")
    if not is_dealt_out(model):
        join(model.device)
        deal_out(model, the_group(model.device))


def load_draft(
    model: Any, tokenizer: Any, target: ServedModel, of_target: Any, cache: Decode | None, dtype: str, compiles: bool
) -> DraftModel | Elsewhere:
    """A draft model, which of several processes the first has.

    Args:
        model, tokenizer: folder or hub id, or a loaded model and its tokenizer, if it has one.
        target, of_target: the model that it drafts for, and its tokenizer.
        cache: what its cache keeps; None for what is usual.
        dtype, compiles: as of ``LLM``.

    Raises:
        ValueError: no such model, or one that cannot draft for this.
    """
    dealt_out = is_dealt_out(target.model)

    def do() -> DraftModel | Elsewhere:
        if dealt_out and this_rank():
            return Elsewhere()
        loaded, its_own, where = model, tokenizer, target.model.device
        if isinstance(model, (str, Path)):
            loaded, its_own = load(str(model), where, pick_dtype(dtype, where))
        if not isinstance(loaded, PreTrainedModel):
            raise ValueError(f"draft_model={loaded!r}: pass a folder, a hub id or a loaded model")
        if loaded.device != where:
            raise ValueError(f"draft_model is on {loaded.device}, and the model on {where}: move it there")
        check_vocabularies(loaded, its_own, target.model, of_target)
        return DraftModel(loaded, cache or usual_cache(loaded.config), MOST, target.vocabulary, compiles)

    return all_or_none(do) if dealt_out else do()


def check_draft_folder(model: Any, cache: Decode | None) -> None:
    """Raise ValueError for what can be seen to be wrong with a draft model before anything is loaded."""
    if isinstance(model, (str, Path)):
        config = read_config(str(model))
        budget_of(cache or usual_cache(config), context_tokens(config))


@contextmanager
def environment_with(variables: dict[str, str]) -> Iterator[None]:
    """Have environment variables for a while: transformers and torch ask for what torchrun would have set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
