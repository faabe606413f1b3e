"""What a user gets wrong is one line on standard error that names it, nothing on standard output, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from keysift.hf.config import context_tokens

from .conftest import CONTEXT, Result, assert_refused, qwen, with_template

Cli = Callable[..., Result]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generat"], ["generat"]),
        (["generate", "--promt", "x"], ["--promt"]),
        (["generate"], ["--prompt TEXT", "--prompt-file FILE", "standard input"]),
        (["generate", "--prompt", "x", "-"], ["one prompt"]),
        (["generate", "words without an option"], ["--prompt", "words without an option"]),
        (["generate", "--prompt", ""], ["empty"]),
        (["generate", "--prompt", " \n\t"], ["empty"]),
        (["generate", "--prompt", "caf\udce9"], ["--prompt", "not UTF-8", "0xe9", "offset 3"]),
        (["generate", "--prompt-file", "no/such/file"], ["no/such/file", "No such file"]),
        (["generate", "--prompt", "x", "--prefill", "flexprefil"], ["flexprefil", "flexprefill"]),
        (["generate", "--prompt", "x", "--prefill", "flexprefill:gama=1"], ["gama", "gamma"]),
        (["generate", "--prompt", "x", "--prefill", "flexprefill:gamma=much"], ["gamma=much"]),
        (["generate", "--prompt", "x", "--prefill", "flexprefill:gamma=1.5"], ["gamma=1.5"]),
        (["generate", "--prompt", "x", "--prefill", "magicpig"], ["magicpig", "flexprefill"]),
        (["generate", "--prompt", "x", "--decode", "magicpig:K=100"], ["K=100"]),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens=0"]),
        (["generate", "--prompt", "x", "--kv-device", "disk"], ["kv_device=disk", "gpu", "cpu"]),
        (["generate", "--prompt", "x", "--host-memory", "0"], ["host_memory=0", "GiB"]),
        (["generate", "--prompt", "x", "--max-new-tokens", "many"], ["--max-new-tokens", "integer"]),
        (["generate", "--prompt", "x", "--prefill-chunk", "-1"], ["prefill_chunk=-1"]),
        (["generate", "--prompt", "x", "--temperature", "-1"], ["temperature=-1"]),
        (["generate", "--prompt", "x", "--temperature", "nan"], ["temperature=nan"]),
        (["generate", "--prompt", "x", "--top-p", "0"], ["top_p=0"]),
        (["generate", "--prompt", "x", "--seed", "-1"], ["seed=-1"]),
        (["generate", "--prompt", "x", "--device", "tpu"], ["device=tpu", "cuda"]),
        (["generate", "--prompt", "x", "--device", "cuda:99"], ["device=cuda:99"]),
        (["generate", "--prompt", "x", "--dtype", "int8"], ["dtype=int8", "bfloat16"]),
        (["generate", "--prompt", "x", "--model", "./no-such-folder"], ["./no-such-folder", "no such folder"]),
        (["methods", "magicpigs"], ["magicpigs", "magicpig, "]),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(cli: Cli, args: list[str], words: list[str]) -> None:
    assert_refused(cli(*args), *words)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("no tokenizer", ["no tokenizer"]),
        ("small vocabulary", ["tokenizer and model do not match", "50"]),
        ("base", ["not a causal language model", "Qwen3Model"]),
        ("bert", ["not a causal language model", "BertModel"]),
        ("t5", ["not a causal language model", "T5ForConditionalGeneration"]),
        ("empty", ["no config.json"]),
        ("broken weights", ["cannot load the weights"]),
        ("missing weights", ["lacks", "model.layers.2."]),
    ],
)
def test_folders_that_cannot_generate_are_refused_by_what_they_lack(
    cli: Cli, folders: dict[str, Path], folder: str, words: list[str]
) -> None:
    assert_refused(cli("generate", "--model", folders[folder], "--prompt", "x"), *words)


def test_a_file_is_not_a_model_folder(cli: Cli, folders: dict[str, Path]) -> None:
    assert_refused(cli("generate", "--model", folders["model"] / "config.json", "--prompt", "x"), "is a file")


def test_an_unknown_hub_model_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(cli("generate", "--model", "nobody/nothing", "--prompt", "x"), "nobody/nothing", "Hugging Face hub")


def test_a_prompt_file_that_is_not_utf8_is_refused_with_the_place(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("déjà".encode("latin-1"))
    result = cli("generate", "--prompt-file", tmp_path / "latin1.txt")
    assert_refused(result, "latin1.txt", "not UTF-8", "0xe9", "offset 1")


def test_empty_files_and_empty_input_are_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert_refused(cli("generate", "--prompt-file", tmp_path / "empty.txt"), "empty.txt", "empty")
    assert_refused(cli("generate", "-", stdin=b""), "standard input", "empty")


def test_a_prompt_beyond_the_context_is_refused_with_the_excess(cli: Cli, folders: dict[str, Path]) -> None:
    model = ["generate", "--model", folders["model"]]
    long = cli(*model, "-", stdin=b"x" * (CONTEXT + 4))
    assert_refused(long, f"{CONTEXT + 4:,} tokens", f"{CONTEXT:,}", "shorten the prompt by 5")
    both = cli(*model, "--max-new-tokens", 100, "-", stdin=b"x" * (CONTEXT - 90))
    assert_refused(both, "by 10:", "at most 90")


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "linear", "factor": 4.0}, 4000),
        ({"rope_type": "dynamic", "factor": 2.0}, 2000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 125}, 1000),
    ],
)
def test_the_context_includes_rope_scaling(rope: dict[str, object], expected: int) -> None:
    config = qwen(max_position_embeddings=1000)
    config.rope_parameters = {"rope_theta": 1e4} | rope
    assert context_tokens(config) == expected


def test_running_out_of_memory_is_one_line_with_its_own_code(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12")

    monkeypatch.setattr("keysift.ranks.load", allocate)
    assert cli("generate", "--prompt", "x") == Result(
        1, "", "keysift: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\n"
    )


def test_a_fault_of_ours_is_not_hidden(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("keysift.ranks.load", fault)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("generate", "--prompt", "x")


def test_chat_without_a_template_is_refused(cli: Cli, folders: dict[str, Path]) -> None:
    assert_refused(cli("generate", "--model", folders["model"], "--prompt", "x", "--chat"), "--chat", "template")


def test_a_chat_template_that_fails_is_refused(cli: Cli, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_template(folders["model"], tmp_path / "chat", "{{ raise_exception('a system message comes first') }}")
    result = cli("generate", "--model", folder, "--prompt", "x", "--chat")
    assert_refused(result, "--chat", "a system message comes first")
