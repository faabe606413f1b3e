"""A prompt of two parts: the context, read by the prefill method, and the question at its end, read as asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keysift.hf import Attachment, KVCache
from keysift.methods import parse


class Batch(NamedTuple):
    """Prompts padded on the left: token ids and attention mask, ``[B, T]``."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: Any, pad: int = 0) -> Batch:
        width = max(map(len, rows))
        padded = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
        length = torch.tensor([len(row) for row in rows], device=device)
        return cls(padded, (torch.arange(width, device=device) >= width - length[:, None]).long())

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def then(self, ids: Tensor) -> Batch:
        """With further tokens ``[B, N]``, none of them padding."""
        return Batch(torch.cat([self.ids, ids], 1), torch.cat([self.mask, torch.ones_like(ids)], 1))


def read_prompt(
    model: Any,
    link: Attachment,
    input_ids: Tensor,
    attention_mask: Tensor,
    question: str = "sparse",
    question_tokens: int | None = None,
    leave: int = 0,
) -> tuple[Tensor | None, KVCache]:
    """Fill a cache with prompts ``[B, T]``, all but the last ``leave`` tokens.

    Returns:
        The logits after the last token read, ``[B, V]`` (None where nothing was to be read), and the cache.
    """
    if question == "decode" and len(input_ids) > 1 and int(attention_mask.sum(1).min()) <= (question_tokens or 0):
        raise ValueError(
            f"question=decode in a batch: every prompt needs more than question_tokens={question_tokens} tokens;"
            " pass them one at a time"
        )
    cache = KVCache(config=model.config)
    end = input_ids.shape[1] - leave
    context = end if question == "sparse" else max(0, min(end, input_ids.shape[1] - (question_tokens or 0)))
    step = 1 if question == "decode" else max(1, end - context)
    parts = [("sparse", 0, context), *((question, i, i + step) for i in range(context, end, step))]
    positions = Batch(input_ids, attention_mask).positions
    logits = None
    for how, start, stop in parts:
        if start < stop:
            with link.reading(how), torch.no_grad():
                out = model(
                    input_ids=input_ids[:, start:stop],
                    attention_mask=attention_mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            logits = out.logits[:, -1]
    return logits, cache


@contextmanager
def last_token_as(link: Attachment, question: str) -> Iterator[None]:
    """Within it, ``model.generate`` reads the prompt's last token as ``question`` says, and new ones by decode."""
    if question == "decode":
        with link.reading("decode"):
            yield
        return
    before = link.prefill
    link.prefill = parse("dense", "prefill") if question == "dense" else before
    try:
        yield
    finally:
        link.prefill = before


def repeat_cache(cache: KVCache, model: Any, kwargs: dict[str, Any]) -> None:
    """Make as many copies of each prompt in a cache as ``model.generate`` with these arguments makes of its tokens."""
    config = kwargs.get("generation_config") or model.generation_config
    asked = (kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences"))
    if (copies := max(1, *(n or 1 for n in asked))) > 1:
        cache.batch_repeat_interleave(copies)
