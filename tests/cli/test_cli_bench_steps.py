"""``keysift bench steps`` from the command line."""

import json

import pytest

from tests.cli.conftest import assert_refused


def test_the_command_writes_what_it_measured(cli, tmp_path):
    done = cli("bench", "steps", "--shapes", "1x100", "--steps", 2, "--methods", "topk:keep=0.2", "--out", tmp_path)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [(r["method"], r["status"]) for r in rows] == [("dense", "ok"), ("topk:keep=0.2", "ok")]
    assert "its tokens mean nothing" in done.out
    assert_refused(cli("bench", "steps", "--shapes", "1x100", "--out", tmp_path), "holds the results of an earlier run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "1x0"], "--shapes 1x0: the context must be 1 or more"),
        (["--shapes", "16"], "--shapes 16: write BATCHxCONTEXT"),
        (["--steps", "0"], "steps=0: choose 1 or more"),
        (["--page", "100"], "page=100: choose 16"),
        (["--shape", "huge"], "shape=huge: choose"),
        (["--shape", "tiny", "--model", "x"], "--model and --shape: give one of them"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(cli, options, message):
    assert_refused(cli("bench", "steps", *options), message)
