"""``keysift bench serve`` with vLLM: a server for each of its runs, and one alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from keysift import pocket
from keysift.bench.server import arrival_times


def test_servers_are_timed_one_after_the_other(tmp_path):
    line = [Path(sys.executable).with_name("keysift"), "bench", "serve", "--shape", "tiny", "--loads", "3x700x6"]
    line += ["--run", "prefill=flexprefill:dense_below=0,block=16;decode=quest:dense_below=0"]
    line += ["--chunk", "512", "--out", tmp_path]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "serve.json").read_text())
    assert data["versions"]["vllm"]
    alone, ours = data["rows"]
    assert [row["masks"] for row in data["rows"]] == ["own", "structured"]
    assert (alone["method"], alone["earlier"], alone["more"]) == ("vLLM alone", 1, 1)
    for row in (alone, ours):
        assert row["status"] == "ok", row["reason"]
        assert 0 < row["first_token_s"] <= row["last_first_token_s"]
        assert row["total_tokens_per_s"] * row["last_first_token_s"] < 3 * 6


def test_requests_arrive_at_rates_and_answers_are_counted(tmp_path):
    line = [Path(sys.executable).with_name("keysift"), "bench", "serve", "--model", "pocket", "--loads", "4x1024x8"]
    line += ["--run", "decode=quest:dense_below=0,keep=0.3"]
    line += ["--rates", "2,50", "--latency", "60", "--samples", "1", "--out", tmp_path]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "serve.json").read_text())
    assert [(row["method"] == "vLLM alone", row["rate"]) for row in data["rows"]] == [
        (True, 2),
        (True, 50),
        (False, 2),
        (False, 50),
    ]
    for row in data["rows"]:
        assert row["status"] == "ok", row["reason"]
        assert 0 < row["first_token_s"] <= row["first_token_90_s"] <= row["last_first_token_s"]
        assert row["token_ms"] > 0
    random = torch.Generator().manual_seed(0)
    torch.randint(json.loads((pocket.path() / "config.json").read_text())["vocab_size"], (4, 1024), generator=random)
    last = arrival_times(4, 2.0, random)[-1]
    assert data["rows"][0]["total_tokens_per_s"] < 4 * 8 / last, "the last request comes late"
    alone, _, ours, _ = (row["right"] for row in data["rows"])
    assert alone > 0.6 and ours > alone - 0.2
    assert [of["rate"] for of in data["highest_rates"]] == [50, 50]
