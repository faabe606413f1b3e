"""``keysift inspect`` end to end on a tiny checkpoint: figure, table, JSON and CSV say the same."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from keysift.cli import inspect as module

from .conftest import CONTEXT, Result, assert_refused, qwen, save

Cli = Callable[..., Result]
PROMPT = "the quick brown fox jumps over the lazy dog. " * 20
SPARSE = ["--prefill", "streaming:sinks=16,window=128,block=16", "--decode", "topk:budget=80", "--steps", 3]
HEAD = {"layer", "head", "density_for_95", "density", "mass_covered", "mass_covered_worst"}
STEP = {"rows_read", "rows_cached", "decode_mass_covered", "decode_output_error"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(folders: dict[str, Path]) -> list[object]:
    return ["inspect", "--model", folders["model"], "--prompt", PROMPT]


def json_of(result: Result) -> dict:
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_json_csv_and_table_agree(cli: Cli, base: list[object], here: Path) -> None:
    out = json_of(cli(*base, *SPARSE, "--json", "--csv", "heads.csv", "--layers", "all", "--heads", "1,3"))
    assert {key: out[key] for key in ("prompt_tokens", "prefill", "decode", "layers_without_method", "seed")} == {
        "prompt_tokens": len(PROMPT),
        "prefill": "streaming:window=128,block=16",
        "decode": "topk:budget=80",
        "layers_without_method": [],
        "seed": 0,
    }
    assert [(h["layer"], h["head"]) for h in out["heads"]] == [(layer, head) for layer in range(3) for head in (1, 3)]
    assert len(out["token_ids"]) == 3
    for head in out["heads"]:
        assert set(head) == HEAD | STEP | {"block", "dense", "steps"}
        assert (head["block"], head["dense"], len(head["steps"])) == (16, None, 3)
        last = head["steps"][-1]
        assert [head[key] for key in ("rows_read", "rows_cached")] == [last["rows_read"], last["rows_cached"]]
        assert (head["rows_read"], head["rows_cached"]) == (80 if head["layer"] == 2 else 903, 903)
        assert head["decode_mass_covered"] == last["mass_covered"]
    with open("heads.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == [
        {key: head[key] for key in row} for row, head in zip(rows, out["heads"], strict=True)
    ]
    assert set(rows[0]) == HEAD | STEP
    table = cli(*base, *SPARSE, "--csv", "again.csv", "--layers", "all", "--heads", "1,3")
    assert Path("again.csv").read_bytes() == Path("heads.csv").read_bytes()
    shown = [line.split() for line in table.out.splitlines()[2:]]
    assert shown == [
        [module.cell(head[key]) for key in rows[0]] for head in out["heads"]
    ]  # digits of the same values, column by column


@pytest.mark.slow
def test_the_figure_is_a_png_that_grows_with_the_heads(cli: Cli, base: list[object], here: Path) -> None:
    image = pytest.importorskip("matplotlib.image")

    def size(*args: object) -> tuple[int, int]:
        result = cli(*base, *args, "--out", "a.png")
        assert result.code == 0
        assert result.err.endswith("wrote a.png\n")
        pixels = image.imread("a.png")
        assert pixels[..., :3].std() > 0.05  # something is drawn
        return pixels.shape[:2]

    one = size(*SPARSE, "--layers", "0", "--heads", "0")
    three = size(*SPARSE, "--layers", "all", "--heads", "0")
    maps = size("--layers", "0", "--heads", "0")
    assert three[1] == one[1]
    assert 2 * one[0] < three[0] < 3 * one[0]
    assert 300 < maps[1] < one[1] < 3000
    assert all(300 < height < 2000 for height, _ in (one, three, maps))


def test_without_an_output_the_figure_is_written_here(cli: Cli, base: list[object], here: Path) -> None:
    pytest.importorskip("matplotlib")
    result = cli(*base)
    assert result.code == 0
    assert "showing layers 0,1,2 and heads 0,3 of 3 layers with 4 query heads" in result.err
    assert [file.name for file in here.iterdir()] == ["keysift-inspect.png"]
    assert "rows read" not in result.out
    assert len(result.out.splitlines()) == 2 + 3 * 2


def test_json_and_csv_need_no_matplotlib(
    cli: Cli, base: list[object], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    assert_refused(cli(*base), "pip install 'keysift[plot]'")
    assert_refused(cli(*base, "--json", "--out", "a.png"), "pip install 'keysift[plot]'")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert json_of(cli(*base, "--json"))["decode"] is None
    assert cli(*base, "--csv", "a.csv").code == 0
    assert [file.name for file in here.iterdir()] == ["a.csv"]


def test_maps_are_added_when_asked_for(cli: Cli, base: list[object], here: Path) -> None:
    head = json_of(cli(*base, *SPARSE, "--json", "--maps", "--layers", "2", "--heads", "1"))["heads"][0]
    blocks = -(-len(PROMPT) // 16)
    assert [len(row) for row in head["attention"]] == [len(row) for row in head["kept"]] == [blocks] * blocks
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in head["attention"])
    worst = min(
        sum(a for a, k in zip(*rows, strict=True) if k) for rows in zip(head["attention"], head["kept"], strict=True)
    )
    assert head["mass_covered_worst"] == pytest.approx(worst, abs=1e-4)
    assert len(head["last_rows"]) == head["rows_read"]
    assert sum(head["last_weights"][row] for row in head["last_rows"]) == pytest.approx(head["decode_mass_covered"])


def test_the_seed_decides_the_draws(cli: Cli, base: list[object], here: Path) -> None:
    args = [*base, "--decode", "magicpig:K=5,L=20", "--json", "--maps", "--layers", "2", "--heads", "0", "--seed"]
    first, again, other = (json_of(cli(*args, seed))["heads"][0]["last_rows"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--layers", "0,3"], ["layer 3", "layers 0 to 2"]),
        (["--heads", "4"], ["head 4", "query heads 0 to 3"]),
        (["--layers", "first"], ["layers=first", "0,3"]),
        (["--heads", "1,,2"], ["heads=1,,2"]),
        (["--prefill", "flexprefil"], ["flexprefil", "flexprefill"]),
        (["--decode", "topk:bugdet=3"], ["bugdet", "budget"]),
        (["--decode", "topk", "--steps", "0"], ["steps=0"]),
        (["--steps", "2"], ["steps=2", "--decode"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--maps"], ["--maps", "--json"]),
        (["--chat"], ["--chat", "no chat template"]),
        (["--device", "tpu"], ["device=tpu"]),
        (["--out", "a.pdf"], ["a.pdf", ".png"]),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    cli: Cli, base: list[object], here: Path, args: list[str], words: list[str]
) -> None:
    result = cli(*base, *args)
    assert_refused(result, *words)
    assert list(here.iterdir()) == []


def test_an_empty_prompt_is_refused(cli: Cli, folders: dict[str, Path], here: Path) -> None:
    assert_refused(cli("inspect", "--model", folders["model"], "--prompt", " \n"), "empty")
    assert_refused(cli("inspect", "--model", folders["model"]), "--prompt TEXT")


def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(
    cli: Cli, base: list[object], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("the model was loaded"))
    (here / "folder.png").mkdir()
    (here / "old.csv").write_text("kept\n")
    assert_refused(cli(*base, "--out", "no/such/a.png"), "cannot write no/such/a.png", "No such file")
    assert_refused(cli(*base, "--out", "folder.png"), "cannot write folder.png", "directory")
    assert_refused(cli(*base, "--csv", "old.csv", "--out", "no/a.png"), "cannot write no/a.png")
    assert_refused(cli(*base, "--json", "--csv", "no/such.csv"), "cannot write no/such.csv")
    assert (here / "old.csv").read_text() == "kept\n"
    assert {file.name for file in here.iterdir()} == {"folder.png", "old.csv"}


def test_the_context_may_be_filled_but_not_exceeded(cli: Cli, folders: dict[str, Path], here: Path) -> None:
    args = ["inspect", "--model", folders["model"], "--json", "--layers", "0", "--heads", "0", "--prompt"]
    assert json_of(cli(*args, "x" * CONTEXT))["prompt_tokens"] == CONTEXT
    assert (
        json_of(cli(*args, "x" * (CONTEXT - 2), "--decode", "dense", "--steps", "2"))["heads"][0]["rows_read"] == 4096
    )
    assert_refused(cli(*args, "x" * (CONTEXT + 3)), "4,099 prompt tokens", "context of 4,096", "by 3")
    assert_refused(cli(*args, "x" * CONTEXT, "--decode", "dense"), "and 1 decode step exceed", "by 1")


def test_a_prompt_of_one_token_has_a_figure(cli: Cli, folders: dict[str, Path], here: Path) -> None:
    pytest.importorskip("matplotlib")
    args = ["inspect", "--model", folders["model"], "--prompt", "x", "--prefill", "flexprefill", "--decode", "topk"]
    result = cli(*args, "--layers", "1", "--heads", "2")
    assert result.code == 0
    assert result.out.splitlines()[2].split() == ["1", "2", *["100.0%"] * 4, "2", "2", "100.0%", "0.00%"]
    assert (here / "keysift-inspect.png").stat().st_size > 10_000


def test_sliding_layers_are_named_and_left_out(cli: Cli, tmp_path: Path, here: Path) -> None:
    kinds = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    folder = save(tmp_path / "m", transformers.Qwen3ForCausalLM, qwen(layer_types=types, **kinds))
    args = ["inspect", "--model", folder, "--prompt", PROMPT, "--json"]
    result = cli(*args, "--layers", "all", "--heads", "0")
    assert "layers 1,2 left out" in result.err
    assert json_of(result)["layers_without_method"] == [1, 2]
    assert [head["layer"] for head in json_of(result)["heads"]] == [0]
    assert_refused(cli(*args, "--layers", "2"), "layers 2: a window of their own", "choose from layers 0")
