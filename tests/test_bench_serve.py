"""What ``keysift bench serve`` does without vLLM: lists of structured prompts, arrivals, and what it refuses."""

import subprocess
import sys

import pytest
import torch

from keysift.bench.inputs import structured_qkv
from keysift.bench.serve import Row, Setup, _lines_of, highest_rates
from keysift.bench.server import StructuredPrompt, arrival_times
from keysift.cli.bench_serve import parse_rates, parse_run, print_rows
from keysift.methods import describe, parse
from keysift.types import KV, Ctx

TOKENS, CHUNK, HEADS, KV_HEADS, DIM = 1024, 512, 4, 2, 32


@pytest.mark.parametrize("chunk", [CHUNK, CHUNK + 30], ids=["of blocks", "a little more"])
@pytest.mark.parametrize("first", [0, 300, 512, 1000])
def test_any_part_of_a_prompt_gets_the_lists_of_the_structured_one(first, chunk):
    """However the server cuts it, a query block reads what it reads when the structured prompt is read in chunks."""
    inner = parse("flexprefill:dense_below=0,block=64,gamma=0.8", "prefill")
    structured = StructuredPrompt(inner, TOKENS, chunk, (HEADS, KV_HEADS, DIM), "cpu", seed=3)
    q, k, v = structured_qkv(TOKENS, HEADS, KV_HEADS, DIM, seed=3, device="cpu")
    wanted = []
    for lo in (0, CHUNK):
        kv = KV.of(k[:, : lo + CHUNK], v[:, : lo + CHUNK])
        plan = inner.plan(q[:, lo : lo + CHUNK], kv, Ctx(0, DIM**-0.5, kv.length - 1, 3))
        wanted.append(inner.mask(plan, range(lo // 64, (lo + CHUNK) // 64)).active(TOKENS // 64))
    own = torch.randn(1, TOKENS - first, HEADS, DIM)
    kv = KV.of(torch.randn(1, TOKENS, KV_HEADS, DIM), torch.randn(1, TOKENS, KV_HEADS, DIM))
    plan = structured.plan(own, kv, Ctx(0, DIM**-0.5, kv.length - 1, 3))
    mask = structured.mask(plan, range(first // 64, TOKENS // 64))
    assert (mask.first, mask.block) == (first // 64, 64)
    assert torch.equal(mask.active(TOKENS // 64), torch.cat(wanted, 2)[:, :, first // 64 :])
    assert not torch.equal(inner.mask(plan, range(first // 64, TOKENS // 64)).active(16), mask.active(16))


def test_a_run_names_methods_for_both_roles_or_one():
    options = parse_run("prefill=flexprefill:gamma=0.9;decode=quest:keep=0.1", 7)
    assert (describe(options.prefill), describe(options.decode), options.seed) == (
        "flexprefill:gamma=0.9",
        "quest:keep=0.1",
        7,
    )
    assert describe(parse_run("decode=signbits", 0).prefill) == "dense"


@pytest.mark.parametrize("text", ["quest", "decode=quest;decode=quest", "seed=3", "draft=streaming"])
def test_a_run_that_says_something_else_is_refused(text):
    with pytest.raises(ValueError, match="write prefill=SPEC;decode=SPEC"):
        parse_run(text, 0)


def test_arrivals_are_the_same_draws_at_any_rate_and_independent_of_each_other():
    at = {rate: arrival_times(2001, rate, torch.Generator().manual_seed(5)) for rate in (0.5, 2.0)}
    assert at[2.0] == pytest.approx([4**-1 * time for time in at[0.5]])
    assert arrival_times(3, None, torch.Generator()) == [0, 0, 0]
    gaps = torch.tensor(at[0.5], dtype=torch.float64).diff()
    assert at[0.5][0] == 0
    assert gaps.min() > 0
    assert float(gaps.mean()) == pytest.approx(2, rel=0.1), "as many a second as asked for"
    assert float(gaps.std()) == pytest.approx(2, rel=0.1), "of an exponential distribution, which forgets"


def rows_of(method, waits):
    """Rows of one load at some rates, by how long nine in ten wait."""
    return [Row(8, 100, 10, method, rate, first_token_90_s=wait) for rate, wait in waits.items()]


def test_the_highest_rate_is_the_last_below_which_none_was_too_much(capsys):
    rows = [
        *rows_of("vLLM alone", {0.1: 1.0, 0.2: 3.0, 0.4: 9.0}),
        *rows_of("quest", {0.1: 1.0, 0.2: 2.0, 0.4: 1.5}),
        *rows_of("slow", {0.2: 1.0, 0.4: 1.0, 0.1: 2.5}),
        *rows_of("interrupted", {0.1: 1.0, 0.2: 1.0}),
        *rows_of("failed", {0.2: 1.0, 0.4: 1.0}),
        Row(8, 100, 10, "failed", 0.1, status="failed"),
        Row(8, 100, 10, "together", first_token_90_s=1.0),
    ]
    found = highest_rates(rows, [0.1, 0.2, 0.4], 2.0)
    assert [(of["method"], of["rate"]) for of in found] == [("vLLM alone", 0.1), ("quest", 0.4), ("slow", None)]
    print_rows(rows, found, 2.0)
    shown = capsys.readouterr().out
    assert "8x100x10, quest: 0.4 a second, 9 in 10 first tokens within 2 s" in shown
    assert "slow: none of the rates" in shown
    assert "a second" in shown.splitlines()[0] and "right" not in shown.splitlines()[0]


def test_rates_are_numbers_above_zero():
    assert parse_rates("2, 0.5,2") == [0.5, 2]
    for text in ("", "fast", "0", "-1", "nan", "inf", "1,,2"):
        with pytest.raises(ValueError, match="above 0, joined by commas"):
            parse_rates(text)


def test_random_weights_answer_no_questions():
    with pytest.raises(ValueError, match="name a model"):
        Setup("tiny", None, samples=3)
    with pytest.raises(ValueError, match="samples=-1"):
        Setup(None, "pocket", samples=-1)


def test_lines_come_as_they_are_written_and_only_when_they_are_whole(tmp_path):
    """What a server has measured is on disk before it measures on, and an interrupted run keeps it."""
    file, go_on = tmp_path / "rows", tmp_path / "go-on"
    file.touch()
    program = f"""if True:
        import pathlib, time
        file, go_on = pathlib.Path({str(file)!r}), pathlib.Path({str(go_on)!r})
        with file.open("a") as out:
            print("one\\ntw", end="", file=out, flush=True)
            while not go_on.exists():
                time.sleep(0.01)
            print("o\\nthree", file=out, flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", program])
    lines = _lines_of(process, file)
    assert next(lines) == "one"
    assert process.poll() is None
    go_on.touch()
    assert list(lines) == ["two", "three"]
    assert process.wait() == 0
