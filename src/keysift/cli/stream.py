"""What a terminal shows while a model generates: a bar over prefill, then the text, whole characters at a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

INCOMPLETE = "\ufffd"  # how tokenizers decode bytes that are not a whole character yet


class Stream:
    """A streamer for ``generate()``: keeps the tokens and their times, and writes their text as it becomes certain.

    A character can span tokens, and a token's text can depend on the one before it (leading spaces). So a few tokens
    are decoded again with every new one, and what ends in half a character waits.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], on_first_token: Callable[[], None]) -> None:
        self.token_ids: list[int] = []
        self.first_time: float | None = None
        self.last_time: float | None = None
        self._tokenizer, self._write, self._on_first_token = tokenizer, write, on_first_token
        self.interrupted = False
        self._saw_prompt = False
        self._context = 0  # decoding starts here, so that text after `_written` comes out as in its sentence
        self._written = 0  # the text of the tokens before this one is written

    def put(self, value: Tensor) -> None:
        if not self._saw_prompt:  # generate() hands over the prompt before the first new token
            self._saw_prompt = True
            return
        self.last_time = time.perf_counter()
        if self.first_time is None:
            self.first_time = self.last_time
            self._on_first_token()
        self.token_ids += value.flatten().tolist()
        self._advance(final=False)
        if self.interrupted:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Write what was waiting; more calls do nothing."""
        self._advance(final=True)

    @property
    def text(self) -> str:
        return self.decode(self.token_ids)

    def speed(self, start: float) -> dict[str, float | None]:
        """Seconds from ``start`` to the first token, and tokens per second after it; None where there were too few."""
        if self.first_time is None or self.last_time is None:
            return {"ttft_s": None, "tokens_per_s": None}
        after, seconds = len(self.token_ids) - 1, self.last_time - self.first_time
        return {"ttft_s": self.first_time - start, "tokens_per_s": after / seconds if seconds > 0 else None}

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _advance(self, final: bool) -> None:
        before = self.decode(self.token_ids[self._context : self._written])
        after = self.decode(self.token_ids[self._context :])
        if len(after) > len(before) and (final or not after.endswith(INCOMPLETE)):
            self._write(after[len(before) :])
            self._context, self._written = self._written, len(self.token_ids)


@contextmanager
def stop_between_tokens(stream: Stream) -> Iterator[None]:
    """Let Ctrl-C end prefill at once, but later only when the token at hand is written; a second one ends at once."""

    def on_interrupt(*_: object) -> None:
        if stream.first_time is None or stream.interrupted:
            raise KeyboardInterrupt
        stream.interrupted = True

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else the process was started to ignore it, or is not ours alone
        signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The model's stack of decoder layers, found by its length; empty where there is no such stack."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((list(stack) for stack in stacks if len(stack) == count), [])


@contextmanager
def prefill_bar(model: Any, prompt_tokens: int, chunks: int, console: Console) -> Iterator[Callable[[], None]]:
    """A bar that advances with every decoder layer of every chunk; the function it gives ends it (first token)."""
    if not console.is_terminal:
        yield lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    layers = decoder_layers(model)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(f"Reading {prompt_tokens:,} tokens", total=len(layers) * chunks or None)
        hooks = [layer.register_forward_hook(lambda *_: progress.advance(task)) for layer in layers]

        def finish() -> None:
            for hook in hooks:
                hook.remove()
            progress.stop()

        try:
            yield finish
        finally:
            finish()
