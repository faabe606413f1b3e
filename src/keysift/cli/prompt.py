"""A prompt from outside, checked before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from keysift.hf.config import context_tokens


def read_prompt(text: str | None, file: Path | None, dash: str | None) -> str:
    """The prompt from the one source that was given, exactly as it stands there, less a byte order mark."""
    if sum(source is not None for source in (text, file, dash)) != 1:
        raise ValueError("give one prompt: --prompt TEXT, --prompt-file FILE, or - for standard input")
    if dash is not None and dash != "-":
        raise ValueError(f"unexpected argument {dash!r}: pass text with --prompt, or - for standard input")
    if dash is not None or file == Path("-"):
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        source, data = "standard input", sys.stdin.buffer.read()
    elif file is not None:
        source, data = str(file), read_bytes(file)
    else:
        assert text is not None
        source, data = "--prompt", text.encode("utf-8", errors="surrogateescape")
    try:
        prompt = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
    if not prompt.strip():
        raise ValueError(f"the prompt from {source} is empty")
    return prompt


def read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def new_tokens_allowed(config: Any, prompt_tokens: int, asked: int | None, default: int) -> int:
    """``asked``, or ``default`` cut to what fits; an error that says by how much the context is exceeded."""
    limit = context_tokens(config)
    if limit is None:
        return asked or default
    room = limit - prompt_tokens
    if room < 1:
        over = prompt_tokens + 1 - limit
        raise ValueError(
            f"the prompt has {prompt_tokens:,} tokens, and the model's context of {limit:,} must hold a new one too:"
            f" shorten the prompt by {over:,}"
        )
    if asked is not None and asked > room:
        raise ValueError(
            f"{prompt_tokens:,} prompt tokens and {asked:,} new ones exceed the model's context of {limit:,} by"
            f" {asked - room:,}: ask for at most {room:,} with --max-new-tokens"
        )
    return asked or min(default, room)
