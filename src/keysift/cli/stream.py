"""What a terminal shows while a model generates: a bar over prefill, then the text, whole characters at a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from keysift.hf.beside import decoder_layers
from keysift.requests import Delta
from keysift.text import Detokenizer


class Stream:
    """What a terminal is shown of an answer as it comes, and when it came; a streamer for ``generate()`` too."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], on_first_token: Callable[[], None]) -> None:
        self.first_time: float | None = None
        self.last_time: float | None = None
        self.interrupted = False
        self._text = Detokenizer(tokenizer)
        self._write, self._on_first_token = write, on_first_token
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        if not self._saw_prompt:  # generate() hands over the prompt before the first new token
            self._saw_prompt = True
            return
        self._note_time()
        for token in value.flatten().tolist():
            self._show(self._text.add(token))
        if self.interrupted:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Write what was waiting; more calls do nothing."""
        self._show(self._text.end())

    def take(self, delta: Delta) -> None:
        """The same from the engine, which keeps the text itself."""
        if delta.token_ids:
            self._note_time()
        self._show(delta.text)
        if self.interrupted and not delta.finished:
            raise KeyboardInterrupt

    def _note_time(self) -> None:
        self.last_time = time.perf_counter()
        if self.first_time is None:
            self.first_time = self.last_time
            self._on_first_token()

    def _show(self, text: str) -> None:
        if text:
            self._write(text)

    @property
    def token_ids(self) -> list[int]:
        return self._text.token_ids

    @property
    def text(self) -> str:
        return self._text.text

    def speed(self, start: float) -> dict[str, float | None]:
        """Seconds from ``start`` to the first token, and tokens per second after it; None where there were too few."""
        if self.first_time is None or self.last_time is None:
            return {"ttft_s": None, "tokens_per_s": None}
        after, seconds = len(self.token_ids) - 1, self.last_time - self.first_time
        return {"ttft_s": self.first_time - start, "tokens_per_s": after / seconds if seconds > 0 else None}


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


@contextmanager
def prefill_bar(model: Any, prompt_tokens: int, chunks: int, console: Console) -> Iterator[Callable[[], None]]:
    """A bar that advances with every decoder layer of every chunk; the function it gives ends it (first token).

    When it is full nothing of it is left in the model, whose steps may then be compiled.
    """
    if not console.is_terminal:
        yield lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    layers = decoder_layers(model)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(f"Reading {prompt_tokens:,} tokens", total=len(layers) * chunks or None)

        def advance(*_: object) -> None:
            progress.advance(task)
            if progress.finished:
                unhook()

        hooks = [layer.register_forward_hook(advance) for layer in layers]

        def unhook() -> None:
            for hook in hooks:
                hook.remove()

        def finish() -> None:
            unhook()
            progress.stop()

        try:
            yield finish
        finally:
            finish()
