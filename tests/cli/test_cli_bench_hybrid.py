"""``keysift bench hybrid`` from the command line, with MagicPIG's options."""

import json

import pytest

from keysift.bench.hybrid_plot import draw_trace
from keysift.cli.bench_hybrid import spec_of
from keysift.hf.hybrid import Span
from tests.cli.conftest import assert_refused

SMALL = ("bench", "hybrid", "--B", 3, "--P", 300, "--G", 2)


def test_the_command_writes_what_it_measured(cli, tmp_path):
    done = cli(*SMALL, "--out", tmp_path)
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "hybrid.json").read_text())
    row = data["rows"][0]
    assert (row["method"], row["status"], row["batch"]) == ("signbits:keep=0.02 over host memory", "ok", 3)
    assert row["tokens_per_s"] == pytest.approx(3e3 / row["step_ms"]) and row["selects_on"] == "cpu"
    assert row["host_gib"] > 3 * 300 * 2 * 2 * 2 * 32 * 4 / 2**30
    assert data["settings"]["context"] == 300
    assert_refused(cli(*SMALL, "--out", tmp_path), "holds the results of an earlier run")


def test_magicpigs_numbers_name_a_method(cli):
    assert [spec_of(*given) for given in ((10, 150, None), (8, None, None), (None, 75, None), (0, 150, None))] == [
        "magicpig:K=10,L=150",
        "magicpig:K=8",
        "magicpig:L=75",
        "dense",
    ]
    done = cli(*SMALL, "--K", 0)
    assert done.code == 0 and "dense over host memory" in done.out


def test_side_data_are_where_they_were_asked_for(cli):
    done = cli(*SMALL, "--K", 5, "--L", 20, "--select-device", "gpu", "--json")
    assert json.loads(done.out)["rows"][0]["selects_on"] == "gpu"
    done = cli(*SMALL, "--decode", "topk:keep=0.1", "--select-device", "gpu", "--json")
    row = json.loads(done.out)["rows"][0]
    assert row["status"] == "failed" and "does not select by side data alone" in row["reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--P", "-1"], "context=-1: choose 1 or more"),
        (["--P", "100", "--M", "110"], "--M 110: 129 are needed"),
        (["--G", "0"], "steps=0: choose 1 or more"),
        (["--K", "-2"], "K=-2: choose 0 or more"),
        (["--K", "4", "--decode", "quest"], "--decode and --K, --L: give the one or the others"),
        (["--gpu-memory", "24"], "--gpu-memory 24: the device is cpu"),
        (["--host-memory", "0"], "host_memory=0.0: choose more than 0, in GiB"),
        (["--select-device", "disk"], "select_device=disk: choose auto"),
        (["--shape", "huge"], "shape=huge: choose"),
        (["--shape", "tiny", "--model", "x"], "--model and --shape: give one of them"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(cli, options, message):
    assert_refused(cli("bench", "hybrid", "--device", "cpu", *options), message)


def test_what_has_no_room_is_a_row_with_the_reason(cli):
    done = cli(*SMALL, "--host-memory", "1e-4")
    assert done.code == 1
    assert "3x300 signbits:keep=0.02 over host memory: " in done.out and "GiB of host memory" in done.out


def test_the_trace_has_a_bar_for_each_span():
    pytest.importorskip("matplotlib")
    spans = [Span(b, 0, device, b + at, b + at + 0.5) for b in (0, 1) for at, device in ((0.0, "gpu"), (0.5, "cpu"))]
    assert draw_trace(spans, "two parts").startswith(b"\x89PNG")
    assert draw_trace([], "nothing") is None
