"""``keysift bench serve`` with vLLM: a server for each of its runs, and one alone."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_servers_are_timed_one_after_the_other(tmp_path):
    line = [Path(sys.executable).with_name("keysift"), "bench", "serve", "--shape", "tiny", "--loads", "3x700x6"]
    runs = ["prefill=flexprefill:dense_below=0,block=16;decode=quest:dense_below=0", "decode=signbits:bits=32"]
    line += ["--chunk", "512", "--out", tmp_path, *(word for run in runs for word in ("--run", run))]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2 and "bits=32" in done.stderr  # before anything is started
    line[-1] = "decode=signbits"
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "serve.json").read_text())
    assert data["versions"]["vllm"]
    alone, both, steps = data["rows"]
    assert [row["masks"] for row in data["rows"]] == ["own", "structured", "own"]
    assert (alone["method"], alone["earlier"], alone["more"]) == ("vLLM alone", 1, 1)
    for row in (alone, both, steps):
        assert row["status"] == "ok", row["reason"]
        assert 0 < row["first_token_s"] <= row["last_first_token_s"]
        assert row["total_tokens_per_s"] * row["last_first_token_s"] < 3 * 6
