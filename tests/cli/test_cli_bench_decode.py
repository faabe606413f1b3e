"""``keysift bench decode`` end to end at small sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keysift import attention
from keysift.bench import decode, layers
from keysift.bench.decode_plot import curve, draw_decode
from keysift.cli import bench_decode as module
from keysift.methods import parse

from .conftest import Result, assert_refused

Cli = Callable[..., Result]
SMALL = ["bench", "decode", "--device", "cpu", "--heads", 4, "--kv-heads", 2, "--dim", 32, "--page", 32]
QUICK = [*SMALL, "--repeats", 1, "--draws", 1]
METHODS = ["--methods", "topk", "--methods", "streaming:window=32"]


@pytest.fixture(autouse=True)
def _one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CPU_CACHES", (1, 1))


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_table_json_and_picture_say_the_same(cli: Cli, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "a" / "b"
    result = cli(*QUICK, *METHODS, "--shapes", "1x200,2x150", "--keep", ".05,0.1", "--out", out)
    assert result.code == 0, result.err
    data = read(out / "decode.json")
    methods = ["dense", "dense (ours)", "topk", "topk:keep=0.1", "streaming:window=32"]
    rows = [(r["batch"], r["context"], r["method"], r["status"]) for r in data["rows"]]
    assert rows == [(*shape, m, "ok") for shape in ((1, 200), (2, 150)) for m in methods]
    assert {"keysift", "torch", "python"} <= set(data["versions"])
    assert data["command"].startswith("keysift bench decode ") and (data["device"], data["gpu"]) == ("cpu", None)
    settings = {"page": 32, "dtype": "float32", "inputs": "structured", "draws": 1, "steps": 4, "heads": 4}
    assert settings.items() <= data["settings"].items()
    lines = result.out.splitlines()
    assert len(lines) == 1 + len(rows)
    for line, row in zip(lines[1:], data["rows"], strict=True):
        cells = line.replace(" (", "(").split()
        method = row["method"].replace(" (", "(") + (f"({row['kernel']})" if row["kernel"] else "")
        parts = [row[f"{part}_us"] for part in ("hash", "select", "attend", "merge", "total")]
        errors = [format(row[f"error_{kind}"], ".2g") for kind in ("median", "mean")]
        assert cells == [
            f"{row['batch']:,}",
            f"{row['context']:,}",
            method,
            f"{row['kept_share']:.1%}",
            f"{row['keys_per_head']:,.0f}",
            f"{row['side_share']:.1%}",
            f"{row['bytes_read'] / 1e6:,.2f}",
            *("-" if us is None else f"{us:,.1f}" for us in parts),
            f"{row['speedup']:.2f}",
            f"{row['tb_s']:.3g}",
            *errors,
            "-",
        ]
    pixels = image.imread(out / "decode.png")
    assert pixels[..., :3].std() > 0.05
    assert {file.name for file in out.iterdir()} == {"decode.json", "decode.png"}
    assert f"wrote {out / 'decode.json'}" in result.err and f"wrote {out / 'decode.png'}" in result.err


def test_json_goes_to_standard_output(cli: Cli) -> None:
    result = cli(
        *QUICK, "--methods", "snapkv:budget=60", "--shapes", "1x150", "--json", "--inputs", "random", "--seed", 3
    )
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert [r["method"] for r in data["rows"]] == ["dense", "dense (ours)", "snapkv:budget=60"]
    assert (data["settings"]["seed"], data["settings"]["inputs"]) == (3, "random")


def test_results_of_another_run_are_replaced_only_when_asked(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "decode.json"
    old.write_text("kept")
    args = [*QUICK, "--methods", "streaming:window=32", "--shapes", "1x100", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(decode, "measure", lambda *_: pytest.fail("something was measured"))
        assert_refused(cli(*args), str(old), "--force")
    assert old.read_text() == "kept"
    assert cli(*args, "--force").code == 0
    assert len(read(old)["rows"]) == 3


def test_a_wrong_result_ends_with_an_error_and_everything_else(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.gather_attention

    def wrong(*args: object, **kwargs: object) -> object:
        part = right(*args, **kwargs)  # type: ignore[arg-type]
        return part._replace(out=part.out * 1.5)

    monkeypatch.setattr(attention, "gather_attention", wrong)
    result = cli(*QUICK, *METHODS, "--shapes", "3x130", "--out", tmp_path)
    assert result.code == 1
    assert "2 of 4 rows have no speed, the first: 3x130 topk: relative error 0.5" in result.err
    rows = read(tmp_path / "decode.json")["rows"]
    assert [r["status"] for r in rows] == ["ok", "ok", "wrong", "wrong"]
    assert all((r["total_us"] is None) == (r["status"] == "wrong") for r in rows)
    assert "3x130 streaming:window=32: relative error 0.5 against the fp32 reference" in result.out


def test_ctrl_c_keeps_what_was_measured(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.structured_qkv

    def interrupted(tokens: int, *args: object, **kwargs: object) -> object:
        if tokens > 200:
            raise KeyboardInterrupt
        return right(tokens, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "structured_qkv", interrupted)
    args = [*QUICK, "--methods", "streaming:window=32", "--shapes", "1x150,1x250", "--out", tmp_path]
    result = cli(*args)
    assert result.code == 130 and "interrupted" in result.err
    assert [r["context"] for r in read(tmp_path / "decode.json")["rows"]] == [150] * 3
    assert len(result.out.splitlines()) == 4


def test_without_matplotlib_the_numbers_are_written(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli(*QUICK, "--methods", "streaming:window=32", "--shapes", "1x100", "--out", tmp_path)
    assert result.code == 0 and "pip install 'keysift[plot]'" in result.err
    assert [file.name for file in tmp_path.iterdir()] == ["decode.json"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--shapes", "16"], ["--shapes 16: write BATCHxCONTEXT, such as 16x65536"]),
        (["--shapes", "1x4096,x5"], ["--shapes x5: write BATCHxCONTEXT"]),
        (["--shapes", "1x1.5"], ["--shapes 1x1.5"]),
        (["--shapes", "-1x100"], ["--shapes -1x100"]),
        (["--shapes", "0x4096"], ["--shapes 0x4096: batch and context must be 1 or more"]),
        (["--shapes", "1x0"], ["--shapes 1x0"]),
        (["--shapes", ","], ["--shapes is empty"]),
        (["--shapes", "1x68"], ["--shapes 1x68: topk always reads the first 4 and the last 64 keys", "above 68"]),
        (["--methods", "quset"], ["quset", "quest"]),
        (["--methods", "flexprefill"], ["flexprefill", "cannot serve"]),
        (["--keep", "2"], ["--keep 2: write shares above 0 and at most 1"]),
        (["--keep", "a"], ["--keep a"]),
        (["--keep", "nan"], ["--keep nan"]),
        (["--keep", ","], ["--keep is empty"]),
        (["--methods", "streaming", "--keep", "0.1"], ["--keep: streaming has no option keep"]),
        (["--heads", "3"], ["heads=3", "kv_heads=2"]),
        (["--page", "100"], ["page=100: choose 16, 32"]),
        (["--dim", "33"], ["dim=33"]),
        (["--draws", "0"], ["draws=0"]),
        (["--inputs", "real"], ["inputs=real"]),
        (["--dtype", "int8"], ["dtype=int8"]),
        (["--device", "tpu"], ["device=tpu"]),
        (["--seed", "-1"], ["seed=-1"]),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path, args: list[str], words: list[str]
) -> None:
    methods = [] if "streaming" in args else ["--methods", "topk"]
    assert_refused(cli(*QUICK, *methods, "--out", tmp_path / "new", *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_shapes_may_be_written_in_thousands() -> None:
    assert module.parse_shapes("1x4k, 16x65536,1x4096") == [(1, 4096), (16, 65536)]
    assert module.parse_shares("0.1,.02,1,0.02") == [0.02, 0.1, 1]


def test_the_usual_methods_serve_at_the_usual_shapes() -> None:
    chosen = [parse(spec, "decode") for spec in module.METHODS]
    for shapes in (module.GPU_SHAPES, module.CPU_SHAPES):
        decode.check_shapes(shapes, chosen)


def test_a_promise_has_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [decode.Row(1, 100, "a"), decode.Row(1, 100, "b", within_epsilon=0.25)]
    module.print_rows(rows[:1])
    assert "epsilon" not in capsys.readouterr().out
    module.print_rows(rows)
    assert "within epsilon" in (out := capsys.readouterr().out) and "25.0%" in out


def test_a_curve_is_a_method_at_its_budgets() -> None:
    specs = ["quest", "quest:keep=0.1", "quest:keep=0.1,page=32", "snapkv:keep=0.1,budget=None"]
    assert [curve(spec) for spec in specs] == ["quest", "quest", "quest:page=32", "snapkv"]


def test_rows_without_figures_make_no_picture() -> None:
    pytest.importorskip("matplotlib")
    failed = decode.Row(1, 100, "topk", status="failed")
    assert draw_decode([failed], "") is None
    some = decode.Row(2, 100, "dense", "sdpa", total_us=5.0, bytes_read=1e6)
    assert draw_decode([failed, some], "a title") is not None


def test_bench_alone_names_decode(cli: Cli) -> None:
    result = cli("bench")
    assert result.code == 0 and "decode" in result.out
