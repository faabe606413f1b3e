"""Tiny checkpoints with random weights, written once, and a way to run the command line in this process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from keysift.cli import main

CONTEXT = 4096


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``keysift ARGS`` with ``stdin`` as standard input."""

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "argv", ["keysift", *map(str, args)])
        capsys.readouterr()
        return Result(main(sys.argv[1:]), *capsys.readouterr())

    return run


def assert_refused(result: Result, *words: str) -> None:
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("keysift: ")
    for word in words:
        assert word in result.err


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save(folder: Path, model_class: type, config: transformers.PreTrainedConfig, tokenizer: bool = True) -> Path:
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def qwen(**changes: object) -> transformers.Qwen3Config:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    return transformers.Qwen3Config(**sizes | heads | {"eos_token_id": None, "pad_token_id": 0} | changes)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by what they are: ``model`` is sound, each of the others has one fault."""
    root = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=257, **small)
    t5 = transformers.T5Config(vocab_size=257, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    folders = {
        "model": save(root / "model", transformers.Qwen3ForCausalLM, qwen()),
        "no tokenizer": save(root / "no-tokenizer", transformers.Qwen3ForCausalLM, qwen(), tokenizer=False),
        "small vocabulary": save(root / "small-vocabulary", transformers.Qwen3ForCausalLM, qwen(vocab_size=50)),
        "base": save(root / "base", transformers.Qwen3Model, qwen()),
        "bert": save(root / "bert", transformers.BertModel, bert),
        "t5": save(root / "t5", transformers.T5ForConditionalGeneration, t5),
        "broken weights": save(root / "broken-weights", transformers.Qwen3ForCausalLM, qwen()),
        "missing weights": save(root / "missing-weights", transformers.Qwen3ForCausalLM, qwen()),
        "empty": root / "empty",
    }
    folders["empty"].mkdir()
    os.truncate(folders["broken weights"] / "model.safetensors", 100)
    drop_layer(folders["missing weights"] / "model.safetensors")
    return folders


def drop_layer(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for name, tensor in load_file(file).items() if ".layers.2." not in name}
    save_file(tensors, file, metadata={"format": "pt"})


def with_template(model: Path, folder: Path, template: str) -> Path:
    """A copy of a model folder, with a chat template."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder
