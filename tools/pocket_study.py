"""The study of docs/study.md: what every method costs on the pocket model, at 4K, 16K and 32K tokens.

    python tools/pocket_study.py decode --out DIR [--samples 40] [--batch 40] [--processes 2] [--minutes 60]
    python tools/pocket_study.py prefill --out DIR --batch 10 --processes 8

Several processes share the folder; after the minutes they are stopped, and the same command goes on where they were.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

PREFILL = (
    "streaming",
    "flexprefill:gamma=0.9",
    "flexprefill:gamma=0.95",
    "flexprefill:gamma=0.99",
    "flexprefill:gamma=0.95,mode=seed",
    "minference",
    "xattention",
    "flashprefill",
)
SHARES = (0.01, 0.02, 0.04, 0.08)
TABLES = ((10, 150), (9, 120), (8, 75))
DECODE = (
    "streaming",
    *(f"magicpig:K={k},L={t},dense_layers=0{mode}" for k, t in TABLES for mode in ("", ",mode=seed")),
    *(f"{method}:keep={share},dense_layers=0" for method in ("quest", "topk", "oracle") for share in SHARES),
)
PARTS = {"prefill": PREFILL, "decode": DECODE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="4k,16k,32k")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    command = [sys.executable, "-m", "keysift.cli", "eval", "--out", str(args.out), "--lengths", args.lengths]
    command += ["--samples", str(args.samples), "--batch", str(args.batch), "--measure-error"]
    for run in ("dense", *(f"{args.part}={spec}" for spec in PARTS[args.part])):
        command += ["--run", run]
    shards = [[*command, "--shard", f"{i}/{args.processes}"] for i in range(args.processes)]
    options = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    at_work = [subprocess.Popen(shard, **options) for shard in shards]
    deadline = time.monotonic() + 60 * args.minutes
    while time.monotonic() < deadline and any(process.poll() is None for process in at_work):
        time.sleep(1)
    for process in at_work:
        process.kill()
    subprocess.run([sys.executable, "-m", "keysift.cli", "eval", "--report", "--out", str(args.out)], check=False)


if __name__ == "__main__":
    main()
