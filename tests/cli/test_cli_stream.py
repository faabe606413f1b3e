"""Text comes as soon as it is certain, whole characters at a time, and adds up to what the tokens decode to."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from keysift.cli.stream import Stream, prefill_bar
from keysift.hf.beside import decoder_layers

from .conftest import byte_tokenizer, qwen


def pieces_of(tokenizer: Any, token_ids: list[int]) -> tuple[list[str], str]:
    """What is written at each token, and what the end adds."""
    written: list[str] = []
    stream = Stream(tokenizer, written.append, on_first_token=lambda: None)
    stream.put(torch.tensor([[7, 7, 7]]))
    pieces = []
    for token in token_ids:
        before = len(written)
        stream.put(torch.tensor([token]))
        pieces.append("".join(written[before:]))
    before = len(written)
    stream.end()
    stream.end()
    assert stream.token_ids == token_ids
    return pieces, "".join(written[before:])


def spaced_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """In SentencePiece's manner: pieces carry their space in front, unknown characters fall back to bytes."""
    words = ["<s>", "</s>", "\u2581", "\u2581the", "\u2581sun", "s", "."] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", ["plain", "na\u00efve \u65e5\u672c \U0001f600!", "\U0001f468\u200d\U0001f469 e\u0301"])
def test_a_character_is_written_when_its_last_byte_is_there(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces, rest = pieces_of(tokenizer, tokenizer(text)["input_ids"])
    expected = [piece for char in text for piece in [""] * (len(char.encode()) - 1) + [char]]
    assert pieces == expected
    assert rest == ""


def test_spaces_between_pieces_survive_and_no_space_comes_first() -> None:
    tokenizer = spaced_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["\u2581the", "\u2581sun", "s", "<0xC3>", "<0xA9>", "\u2581the", "."])
    pieces, rest = pieces_of(tokenizer, ids)
    assert pieces == ["the", " sun", "s", "", "\u00e9", " the", "."]
    assert rest == ""


def test_special_tokens_are_counted_but_not_written() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab")["input_ids"]
    assert pieces_of(tokenizer, [ids[0], 0, ids[1], 0]) == (["a", "", "b", ""], "")


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = byte_tokenizer()
    pieces, rest = pieces_of(tokenizer, tokenizer("a\u65e5")["input_ids"][:-1])
    assert pieces == ["a", "", ""]
    assert rest == "\ufffd"


def test_speed_counts_the_tokens_after_the_first() -> None:
    stream = Stream(byte_tokenizer(), lambda text: None, on_first_token=lambda: None)
    assert stream.speed(start=0.0) == {"ttft_s": None, "tokens_per_s": None}
    stream.first_time, stream.last_time = 12.0, 14.0
    stream.token_ids.extend([1, 2, 3, 4, 5])
    assert stream.speed(start=10.0) == {"ttft_s": 2.0, "tokens_per_s": 2.0}


@pytest.mark.parametrize(("tokens", "chunk"), [(63, None), (63, 10)])
def test_the_bar_ends_full_at_the_first_token_and_leaves_no_hooks(tokens: int, chunk: int | None) -> None:
    model = transformers.Qwen3ForCausalLM(qwen())
    screen = io.StringIO()
    shown_at_first_token = []
    chunks = -(-tokens // (chunk or tokens))
    with prefill_bar(model, tokens, chunks, Console(file=screen, force_terminal=True, width=120)) as end_bar:

        def first() -> None:
            end_bar()
            shown_at_first_token.append(screen.getvalue())

        stream = Stream(byte_tokenizer(), lambda text: None, on_first_token=first)
        prompt = torch.ones(1, tokens, dtype=torch.int64)
        model.generate(prompt, max_new_tokens=4, do_sample=False, prefill_chunk_size=chunk, streamer=stream)
    assert len(shown_at_first_token) == 1
    assert "Reading 63 tokens" in shown_at_first_token[0]
    assert "100%" in shown_at_first_token[0]
    assert len(decoder_layers(model)) == 3
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


def test_no_bar_without_a_terminal() -> None:
    screen = io.StringIO()
    with prefill_bar(torch.nn.Linear(1, 1), 5, 1, Console(file=screen)) as end_bar:
        end_bar()
    assert screen.getvalue() == ""
