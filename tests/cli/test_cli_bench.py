"""``keysift bench`` end to end at small sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keysift import attention
from keysift.bench import first_token, prefill
from keysift.cli import bench as module

from .conftest import CONTEXT, Result, assert_refused

Cli = Callable[..., Result]
SMALL = ["bench", "prefill", "--device", "cpu", "--dim", 32, "--repeats", 1, "--warmup", 0, "--check-rows", 3]
STREAMING = "streaming:sinks=8,window=64,block=16"
METHODS = ["--methods", "flexprefill:block=32", "--methods", STREAMING]
TOKEN = ["bench", "first-token", "--device", "cpu", "--shape", "tiny", "--chunk", 128]


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_prefill_writes_table_json_and_picture(cli: Cli, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "a" / "b"
    result = cli(*SMALL, *METHODS, "--lengths", "256,300", "--backends", "auto,sdpa", "--out", out)
    assert result.code == 0, result.err
    data = read(out / "prefill.json")
    rows = [(r["length"], r["method"], r["backend"], r["status"]) for r in data["rows"]]
    methods = ("flexprefill:block=32", STREAMING)
    runs = [("dense", "auto"), *((m, b) for m in methods for b in ("auto", "sdpa"))]
    assert rows == [(n, *run, "ok") for n in (256, 300) for run in runs]
    assert {"keysift", "torch", "triton", "flash-attn-4", "transformers", "python"} <= set(data["versions"])
    assert (data["device"], data["gpu"]) == ("cpu", None)
    assert data["command"].startswith("keysift bench prefill --device cpu ")
    assert data["settings"]["dim"] == 32 and data["settings"]["dtype"] == "float32"
    lines = result.out.splitlines()
    assert len(lines) == 1 + len(rows)
    assert [line.split()[0] for line in lines[1:]] == [str(r[0]) for r in rows]
    pixels = image.imread(out / "prefill.png")
    assert pixels[..., :3].std() > 0.05
    assert {file.name for file in out.iterdir()} == {"prefill.json", "prefill.png"}
    assert f"wrote {out / 'prefill.json'}" in result.err and f"wrote {out / 'prefill.png'}" in result.err


def test_prefill_json_goes_to_standard_output(cli: Cli, tmp_path: Path) -> None:
    result = cli(*SMALL, "--lengths", "200", "--chunk", 70, "--batch", 2, "--json", "--inputs", "random")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert [r["method"] for r in data["rows"]] == ["dense", "flexprefill"]
    assert (data["settings"]["chunk"], data["settings"]["batch"], data["settings"]["inputs"]) == (70, 2, "random")


def test_results_of_another_run_are_replaced_only_when_asked(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "prefill.json"
    old.write_text("kept")
    with monkeypatch.context() as patch:
        patch.setattr(prefill, "measure", lambda *_: pytest.fail("something was measured"))
        assert_refused(cli(*SMALL, "--out", tmp_path), str(old), "--force")
        (tmp_path / "first-token.json").write_text("kept too")
        assert_refused(cli(*TOKEN, "--out", tmp_path), "first-token.json", "--force")
        assert_refused(cli(*SMALL, "--out", old), "cannot write to --out")
    assert old.read_text() == "kept"
    assert cli(*SMALL, "--lengths", "100", "--out", tmp_path, "--force").code == 0
    assert len(read(old)["rows"]) == 2


def test_a_wrong_result_ends_with_an_error_and_everything_else(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.block_sparse_attention

    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        out, _ = right(*args, **kwargs)  # type: ignore[arg-type]
        return out * (1.5 if out.shape[1] > 250 else 1), None

    for holder in (attention, prefill):
        monkeypatch.setattr(holder, "block_sparse_attention", wrong)
    result = cli(*SMALL, *METHODS, "--lengths", "200,300", "--out", tmp_path)
    assert result.code == 1
    assert "2 of 6 rows have no speed" in result.err and "relative error 0.5" in result.err
    rows = read(tmp_path / "prefill.json")["rows"]
    assert [r["status"] for r in rows] == ["ok"] * 4 + ["wrong"] * 2
    assert all((r["total_ms"] is None) == (r["status"] == "wrong") for r in rows)
    assert f"300 {STREAMING}: relative error 0.5 against the fp32 reference" in result.out


def test_ctrl_c_keeps_what_was_measured(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = prefill.structured_qkv

    def interrupted(tokens: int, *args: object, **kwargs: object) -> object:
        if tokens > 200:
            raise KeyboardInterrupt
        return right(tokens, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(prefill, "structured_qkv", interrupted)
    result = cli(*SMALL, "--lengths", "150,250", "--out", tmp_path)
    assert result.code == 130 and "interrupted" in result.err
    assert [r["length"] for r in read(tmp_path / "prefill.json")["rows"]] == [150, 150]
    assert [line.split()[0] for line in result.out.splitlines()[1:3]] == ["150", "150"]


def test_without_matplotlib_the_numbers_are_written(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli(*SMALL, "--lengths", "100", "--out", tmp_path)
    assert result.code == 0 and "pip install 'keysift[plot]'" in result.err
    assert [file.name for file in tmp_path.iterdir()] == ["prefill.json"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--methods", "flexprefil"], ["flexprefil", "flexprefill"]),
        (["--methods", "quest"], ["quest", "cannot serve"]),
        (["--backends", "fa5"], ["backends=fa5", "sdpa"]),
        (["--backends", "sdpa,fa4"], ["backends=fa4", "needs"]),
        (["--backends", "triton"], ["backends=triton", "needs"]),
        (["--lengths", "0"], ["--lengths 0"]),
        (["--lengths", "1.5"], ["--lengths 1.5"]),
        (["--lengths", "-4"], ["--lengths -4"]),
        (["--lengths", ","], ["--lengths is empty"]),
        (["--heads", "3"], ["heads=3", "kv_heads=2"]),
        (["--kv-heads", "0"], ["kv_heads=0"]),
        (["--dim", "33"], ["dim=33"]),
        (["--inputs", "real"], ["inputs=real"]),
        (["--dtype", "int8"], ["dtype=int8"]),
        (["--device", "tpu"], ["device=tpu"]),
        (["--batch", "0"], ["batch=0"]),
        (["--check-rows", "0"], ["check_rows=0"]),
        (["--save-crossover"], ["--save-crossover", "GPU"]),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path, args: list[str], words: list[str]
) -> None:
    assert_refused(cli(*SMALL, "--out", tmp_path / "new", *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_the_crossover_is_stored(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, with measurements made up: nothing here needs one but the clock."""
    speed = {n: n / 5000 for n in module.CROSSOVER_LENGTHS}

    def measure(setup: prefill.Setup, lengths: list[int], methods: list[object], *_: object) -> object:
        assert setup.chunk is None and [m.dense_below for m in methods] == [0]  # type: ignore[attr-defined]
        for n in lengths:
            yield prefill.Row(n, "dense", "auto", speedup=1.0)
            yield prefill.Row(n, "flexprefill", "auto", speedup=speed[n])

    monkeypatch.setattr(prefill, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    setup = prefill.Setup(32, 8, 128, 2, torch.bfloat16, torch.device("cuda"), chunk=100)
    found = module.remember_crossover(setup, module.Console(stderr=True))
    stored = read(tmp_path / "keysift" / "crossover.json")
    assert stored == {"NVIDIA Test": {"64/16x128": found["tokens"]}}
    assert 4950 < found["tokens"] < 5050
    speed = dict.fromkeys(speed, 0.5)
    assert module.remember_crossover(setup, module.Console(stderr=True))["tokens"] is None
    assert read(tmp_path / "keysift" / "crossover.json") == stored


def test_first_token_of_random_weights(cli: Cli, tmp_path: Path) -> None:
    args = [*TOKEN, "--prefill", "flexprefill:block=32", "--lengths", "200,300", "--skip-dense-above", 250]
    result = cli(*args, "--out", tmp_path)
    assert result.code == 0, result.err
    data = read(tmp_path / "first-token.json")
    assert [(r["length"], r["masks"], r["status"]) for r in data["rows"]] == [
        (200, "own", "ok"),
        (200, "structured", "ok"),
        (300, "own", "skipped"),
        (300, "structured", "ok"),
    ]
    assert data["settings"]["shape"] == "tiny" and data["settings"]["method"] == "flexprefill:block=32"
    assert "random weights" in data["note"] and "structured inputs" in data["note"]
    assert data["note"] in result.out
    assert f"density {data['rows'][1]['density']:.1%} at 200" in data["note"]
    assert "not measured above 250 tokens" in result.out


def test_first_token_of_a_checkpoint(cli: Cli, folders: dict[str, Path], tmp_path: Path) -> None:
    args = ["bench", "first-token", "--model", folders["model"], "--device", "cpu", "--chunk", 100, "--json"]
    text = tmp_path / "text"
    text.write_text("the quick brown fox ")
    result = cli(*args, "--lengths", "210", "--prefill", "flexprefill:block=32", "--prompt-file", text)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert [r["masks"] for r in data["rows"]] == ["own", "own"]
    assert data["rows"][0]["same_first_token"] is True
    assert "note" not in data
    assert_refused(cli(*args, "--lengths", CONTEXT + 1), str(CONTEXT + 1), "4,096")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--shape", "llama-9b"], ["shape=llama-9b", "llama-8b"]),
        (["--model", "x"], ["--model", "--shape"]),
        (["--prompt-file", "x"], ["--prompt-file", "--model"]),
        (["--chunk", "0"], ["chunk=0"]),
        (["--repeats", "0"], ["repeats=0"]),
        (["--prefill", "topk"], ["topk", "cannot serve"]),
        (["--lengths", "a"], ["--lengths a"]),
        (["--seed", "-1"], ["seed=-1"]),
    ],
)
def test_first_token_refuses(cli: Cli, tmp_path: Path, args: list[str], words: list[str]) -> None:
    assert_refused(cli(*TOKEN, "--out", tmp_path / "new", *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_all_logits_that_cannot_fit_are_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_token, "_free_bytes", lambda _: 2**10)
    result = cli(*TOKEN, "--lengths", "256", "--all-logits")
    assert_refused(result, "all logits of 256 tokens", "pass logits_to_keep=1")


def test_bench_alone_shows_what_there_is(cli: Cli) -> None:
    result = cli("bench")
    assert result.code == 0 and "prefill" in result.out and "first-token" in result.out
