"""``keysift generate`` end to end on a tiny checkpoint; the signals and the pipe in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers

from keysift.cli.stream import Stream
from keysift.requests import Delta

from .conftest import CONTEXT, Result, byte_tokenizer, with_template

Cli = Callable[..., Result]
PROMPT = "the quick brown fox jumps over the lazy dog. " * 20
READ = {"prefill_density", "kept_fraction", "accepted_per_round"}
STATS = {"ttft_s", "tokens_per_s", "prompt_tokens", "new_tokens"} | READ


def json_of(result: Result) -> dict:
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def greedy_tokens(folder: Path, prompt: str, count: int) -> list[int]:
    """What transformers gives with its own attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    ids = byte_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


def test_dense_json_has_the_tokens_of_transformers(cli: Cli, folders: dict[str, Path]) -> None:
    out = json_of(cli("generate", "--model", folders["model"], "--prompt", PROMPT, "--max-new-tokens", 12, "--json"))
    assert out["token_ids"] == greedy_tokens(folders["model"], PROMPT, 12)
    assert out["text"] == byte_tokenizer().decode(out["token_ids"], skip_special_tokens=True)
    assert out["interrupted"] is False
    stats = out["stats"]
    assert set(stats) == STATS
    assert (stats["prompt_tokens"], stats["new_tokens"]) == (len(PROMPT), 12)
    assert (stats["prefill_density"], stats["kept_fraction"]) == (1.0, 1.0)
    assert stats["ttft_s"] > 0
    assert stats["tokens_per_s"] > 0


def test_without_a_model_the_shipped_one_answers(cli: Cli) -> None:
    text = "One of the special magic numbers for quiet-river is: 4071. " * 3
    out = json_of(cli("generate", "--prompt", text, "--max-new-tokens", 3, "--json"))
    assert out["stats"]["new_tokens"] in (1, 2, 3)
    assert 20 < out["stats"]["prompt_tokens"] < len(text)


def test_text_goes_to_stdout_and_one_closing_line_to_stderr(cli: Cli, folders: dict[str, Path]) -> None:
    args = ["generate", "--model", folders["model"], "--prompt", PROMPT, "--max-new-tokens", 9]
    result = cli(*args)
    assert result.code == 0
    assert result.out == json_of(cli(*args, "--json"))["text"].rstrip("\n") + "\n"
    assert result.err.count("\n") == 1
    for part in ("900 prompt tokens, 9 new", "first token after", "tokens/s", "density 1.000", "fraction 1.000"):
        assert part in result.err


def test_sparse_methods_report_that_they_read_less(cli: Cli, folders: dict[str, Path]) -> None:
    sparse = ["--prefill", "streaming:sinks=16,window=128,block=16", "--decode", "topk:budget=80"]
    args = ["generate", "--model", folders["model"], "--prompt", PROMPT, "--max-new-tokens", 4, "--json"]
    stats = json_of(cli(*args, *sparse))["stats"]
    assert 0.1 < stats["prefill_density"] < 0.6
    assert 0 < stats["kept_fraction"] < 1


def test_keys_in_host_memory_give_the_same_or_are_refused_in_one_line(cli: Cli, folders: dict[str, Path]) -> None:
    args = ["generate", "--model", folders["model"], "--prompt", PROMPT, "--max-new-tokens", 9, "--json"]
    sparse = ["--decode", "topk:budget=80,dense_below=0"]
    there = json_of(cli(*args, *sparse, "--kv-device", "cpu", "--host-memory", "1"))
    here = json_of(cli(*args, *sparse))
    assert there["token_ids"] == here["token_ids"]
    assert there["stats"]["kept_fraction"] == pytest.approx(here["stats"]["kept_fraction"])
    refused = cli(*args, *sparse, "--kv-device", "cpu", "--host-memory", "1e-5")
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert "GiB of host memory" in refused.err and "shorten the prompt" in refused.err


def test_one_token_has_no_speed(cli: Cli, folders: dict[str, Path]) -> None:
    out = json_of(cli("generate", "--model", folders["model"], "--prompt", "x", "--max-new-tokens", 1, "--json"))
    assert out["stats"]["tokens_per_s"] is None


def test_file_stdin_and_argument_give_the_same(cli: Cli, folders: dict[str, Path], tmp_path: Path) -> None:
    text = "na\u00efve \u65e5\u672c\r\n"
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    args = ["generate", "--model", folders["model"], "--max-new-tokens", 5, "--json"]
    outs = [
        json_of(cli(*args, "--prompt", text)),
        json_of(cli(*args, "--prompt-file", tmp_path / "prompt.txt")),
        json_of(cli(*args, "-", stdin=text.encode())),
        json_of(cli(*args, "--prompt-file", "-", stdin=text.encode())),
    ]
    assert {out["stats"]["prompt_tokens"] for out in outs} == {len(text.encode())}
    assert all(out["token_ids"] == outs[0]["token_ids"] for out in outs)


def test_sampling_follows_its_seed(cli: Cli, folders: dict[str, Path]) -> None:
    args = ["generate", "--model", folders["model"], "--prompt", "x", "--max-new-tokens", 20, "--json"]
    draws = [json_of(cli(*args, "--temperature", 1.5, "--seed", seed))["token_ids"] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    narrow = json_of(cli(*args, "--temperature", 1.5, "--top-p", 1e-6))["token_ids"]
    assert narrow == json_of(cli(*args))["token_ids"]


def test_a_chunked_prompt_gives_the_same_tokens(cli: Cli, folders: dict[str, Path]) -> None:
    args = ["generate", "--model", folders["model"], "--prompt", PROMPT, "--max-new-tokens", 6, "--json"]
    assert json_of(cli(*args, "--prefill-chunk", 128))["token_ids"] == json_of(cli(*args))["token_ids"]


def test_the_default_length_is_cut_to_what_the_context_has_left(cli: Cli, folders: dict[str, Path]) -> None:
    prompt = b"x" * (CONTEXT - 3)
    out = json_of(cli("generate", "--model", folders["model"], "--json", "-", stdin=prompt))
    assert out["stats"]["new_tokens"] == 3


def test_chat_applies_the_template(cli: Cli, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_template(folders["model"], tmp_path / "chat", "<{{ messages[0]['content'] }}>")
    args = ["generate", "--model", folder, "--max-new-tokens", 4, "--json"]
    chat = json_of(cli(*args, "--prompt", "hello", "--chat"))
    assert chat["stats"]["prompt_tokens"] == len("<hello>")
    assert chat["token_ids"] == json_of(cli(*args, "--prompt", "<hello>"))["token_ids"]


def test_an_interrupt_leaves_the_json_object_with_what_there_was(
    cli: Cli, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, seen = Stream.take, []

    def interrupted_take(self: Stream, delta: Delta) -> None:
        seen.append(delta)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        take(self, delta)

    monkeypatch.setattr(Stream, "take", interrupted_take)
    result = cli("generate", "--model", folders["model"], "--prompt", "x", "--max-new-tokens", 500, "--json")
    out = json.loads(result.out)
    assert result.code == 130
    assert out["interrupted"] is True
    assert out["stats"]["new_tokens"] == len(out["token_ids"]) == 5


def test_an_interrupt_in_prefill_ends_it_there(
    cli: Cli, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = []

    def interrupted_norm(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] > 1:  # not the token with which the engine looks at the model
            signal.raise_signal(signal.SIGINT)
            finished.append(hidden)
        return hidden

    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm.forward", interrupted_norm)
    result = cli("generate", "--model", folders["model"], "--prompt", PROMPT)
    assert (result.code, result.out, finished) == (130, "", [])
    assert result.err.startswith("interrupted; 900 prompt tokens, 0 new; first token after n/a; ")


@contextmanager
def process(folder: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "keysift.cli", "generate", "--model", str(folder), "--prompt", "x", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.slow
def test_text_streams_and_ctrl_c_keeps_what_was_printed(folders: dict[str, Path]) -> None:
    with process(folders["model"], "--max-new-tokens", "4000") as child:
        assert child.stdout is not None
        start = os.read(child.stdout.fileno(), 1)
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=60)
    assert child.returncode == 130
    text = (start + rest).decode()
    assert text.endswith("\n")
    assert err.decode().startswith("interrupted; 1 prompt tokens, ")
    assert err.count(b"\n") == 1
    shown = text.rstrip("\n\ufffd")[:40]
    assert shown
    assert byte_tokenizer().decode(greedy_tokens(folders["model"], "x", 200)).startswith(shown)


@pytest.mark.slow
def test_a_closed_pipe_ends_the_process_without_a_word(folders: dict[str, Path]) -> None:
    with process(folders["model"], "--max-new-tokens", "4000") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        os.read(child.stdout.fileno(), 1)
        child.stdout.close()
        err = child.stderr.read()
        child.wait(timeout=60)
    assert (child.returncode, err) == (1, b"")


@pytest.mark.slow
def test_drafted_text_is_that_of_dense_decoding(cli: Cli, folders: dict[str, Path]) -> None:
    args = ["generate", "--model", folders["model"], "--prompt", PROMPT, "--max-new-tokens", 30, "--json"]
    dense = json_of(cli(*args))
    for more in (["--gamma", 3], []):
        out = json_of(cli(*args, "--draft", "streaming:sinks=2,window=4,dense_below=0", *more))
        assert out["token_ids"] == dense["token_ids"] and out["text"] == dense["text"]
        assert not more or 0 <= out["stats"]["accepted_per_round"] <= 3
    assert "drafted tokens accepted a round" in cli(*args[:-1], "--draft", "dense", "--gamma", 2).err
    other = ["--draft-model", folders["model"], "--gamma", 4]
    for more in (other, ["--draft", "quest:keep=0.2,dense_below=0", "--gamma", 2, "--refresh", "never"]):
        out = json_of(cli(*args, *more))
        assert out["token_ids"] == dense["token_ids"]
        assert more != other or out["stats"]["accepted_per_round"] == 4  # by its like, which sees all of this prompt
    for wrong, message in (
        (["--gamma", 3], "gamma=3: needs a draft"),
        (["--refresh", "never"], "refresh=never: needs a draft over the model's own keys"),
        ([*other, "--refresh", "never"], "refresh=never: needs a draft over the model's own keys"),
        (["--draft", "quest", "--refresh", "often"], "refresh=often: choose verify or never"),
        (["--draft-model", "nowhere/at-all"], "model=nowhere/at-all"),
        (["--draft-model", folders["model"], "--draft", "quest"], "a draft model's cache is streaming or snapkv"),
        (["--draft-model", folders["model"], "--draft", "streaming:budget=20"], "budget=20 is too small"),
        (["--draft-model", folders["model"], "--kv-device", "cpu"], "--draft-model: not with --kv-device cpu"),
        (["--draft", "quest", "--decode", "quest"], "drafts are checked against all keys"),
        (["--draft", "quest", "--kv-device", "cpu"], "--draft: not with --kv-device cpu"),
    ):
        result = cli(*args, *wrong)
        assert result.code == 2 and message in result.err
