"""vLLM with our attention beside vLLM alone: first tokens and tokens a second of requests that arrive together or at a
rate, and how many answers are right.

Each server is a process of its own, one after the other, that reads the same prompts in the same chunks. With random
weights the search of a prefill method runs on the model's own queries and keys, and attention gets the lists of a
structured prompt of the same shape, found before the clock starts, as in ``bench.first_token``.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keysift import pocket
from keysift.bench.generate import Shape
from keysift.methods import describe
from keysift.types import check_seed
from keysift.vllm_plugin.options import Options

STOCK = "vLLM alone"
ERRORS = 2000  # characters of what a server said last, if it fails
WARM_UP_TOKENS = 8  # of an answer, before the clock starts
LOOK_S = 0.2  # between looks for what a server has measured


def longest(loads: Sequence[Shape]) -> int:
    """Tokens that a request of these loads has at most, in the warm-up too."""
    return max(load.prefix + max(load.generated, WARM_UP_TOKENS) for load in loads)


@dataclass(frozen=True)
class Setup:
    """What servers have in common.

    Attributes:
        shape: name of a shape of random weights in ``SHAPES``, or None.
        model: folder of a model, "pocket" for the one that ships with keysift, or None.
        dtype: of weights, keys and values.
        chunk: tokens that a step of the server reads at most.
        memory: share of the GPU's memory, or on a CPU GiB of keys and values.
        seed: of prompts and of methods that draw.
        eager: without compilation and CUDA graphs.
        rates: requests a second, at each of which a load's requests arrive; None for all of them together.
        samples: of each of RULER's tasks that need no file, to be answered at the length of a load's prompts.
    """

    shape: str | None
    model: str | None
    dtype: str = "bfloat16"
    chunk: int = 16384
    memory: float = 0.9
    seed: int = 0
    eager: bool = False
    rates: Sequence[float | None] = (None,)
    samples: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.samples < 0:
            raise ValueError(f"samples={self.samples}: choose 0 or more")
        if self.samples and self.model is None:
            raise ValueError(f"samples={self.samples}: random weights answer nothing, name a model")
        if self.chunk < 16:
            raise ValueError(f"chunk={self.chunk}: choose 16 or more")

    @property
    def model_name(self) -> str | None:
        """The model's folder or hub id; None with random weights."""
        return str(pocket.path()) if self.model == pocket.NAME else self.model


@dataclass
class Row:
    """One load on one server. What was not measured is None, and ``reason`` says why.

    Attributes:
        requests, prompt, new: requests, tokens of each prompt and of each answer.
        method: "vLLM alone", or the methods.
        rate: requests that arrive in a second on average, independently of each other; None if all arrive together.
        masks: where the prefill method's lists come from: "own" queries and keys, or "structured" ones.
        status: "ok" or "failed".
        first_token_s, first_token_90_s, last_first_token_s: from the arrival to the first token of a request, on
            average, of nine in ten at most, and of all.
        token_ms: from a token of an answer to the next, on average.
        step_ms: a step when all requests have their first token and none has ended, on average.
        tokens_per_s: in such steps.
        total_tokens_per_s: tokens of all answers over the time from the first arrival to the last token.
        earlier, faster, more: how many times vLLM alone takes so long to the average first token, and for a step, and
            how many times more tokens a second there are in all.
        right: share of the answers to RULER's samples that is right.
        start_s: until the server was ready.
    """

    requests: int
    prompt: int
    new: int
    method: str
    rate: float | None = None
    masks: str = "own"
    status: str = "ok"
    reason: str | None = None
    first_token_s: float | None = None
    first_token_90_s: float | None = None
    last_first_token_s: float | None = None
    token_ms: float | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    earlier: float | None = None
    faster: float | None = None
    more: float | None = None
    right: float | None = None
    start_s: float | None = None

    @property
    def shape(self) -> str:
        """The load, as one writes it."""
        rate = "" if self.rate is None else f", {self.rate:g} a second"
        return f"{self.requests}x{self.prompt}x{self.new}{rate}"


def measure(
    setup: Setup, loads: Sequence[Shape], servers: Sequence[Options], start: Callable[[str], None]
) -> Iterator[Row]:
    """Rows of vLLM alone and of each of the servers, all loads at all rates on one before the next.

    Args:
        setup: what they have in common.
        loads: requests x tokens of a prompt x tokens of an answer.
        servers: methods, beside vLLM alone.
        start: called with what begins, in words.
    """
    alone: dict[tuple[Shape, float | None], Row] = {}
    cases = list(itertools.product(loads, setup.rates))
    for options in (None, *servers):
        name = STOCK if options is None else f"prefill={describe(options.prefill)};decode={describe(options.decode)}"
        start(name)
        for case, row in zip(cases, _of_server(setup, loads, options, name), strict=True):
            base = alone.setdefault(case, row)
            if base.status == row.status == "ok":
                row.earlier, row.faster = (
                    _ratio(base.first_token_s, row.first_token_s),
                    _ratio(base.step_ms, row.step_ms),
                )
                row.more = _ratio(row.total_tokens_per_s, base.total_tokens_per_s)
            yield row


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _of_server(setup: Setup, loads: Sequence[Shape], options: Options | None, name: str) -> Iterator[Row]:
    """Rows of one server, which a process of its own measures."""
    methods = None if options is None else (describe(options.prefill), describe(options.decode), options.seed)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "rows", Path(folder) / "log"
        out.touch()
        job = {"setup": asdict(setup), "loads": loads, "name": name, "methods": methods, "out": str(out)}
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with log.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "keysift.bench.server", json.dumps(job)],
                env=environment, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        rows = 0
        try:
            for line in _lines_of(process, out):
                rows += 1
                yield Row(**json.loads(line))
        finally:
            process.terminate()
            process.wait()
        reason = log.read_text(errors="replace")[-ERRORS:].strip()
    for load, rate in [*itertools.product(loads, setup.rates)][rows:]:
        yield Row(
            *load, name, rate, status="failed", reason=reason or f"the server ended with code {process.returncode}"
        )


def _lines_of(process: subprocess.Popen[bytes], file: Path) -> Iterator[str]:
    """The lines that a process writes to a file, each as soon as it is whole, until the process ends."""
    seen = 0
    ended = False
    while not ended:
        ended = process.poll() is not None
        *lines, _ = file.read_text().split("\n")
        yield from lines[seen:]
        seen = len(lines)
        if not ended:
            time.sleep(LOOK_S)


def highest_rates(rows: Sequence[Row], rates: Sequence[float | None], latency: float) -> list[dict[str, Any]]:
    """At how many requests a second a server still gives nine in ten their first token within ``latency`` seconds.

    Returns:
        A dict a load and server that has been measured at all ``rates``: requests, prompt, new, method and the highest
        rate up to which none was too much, None if the lowest was.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.rate is not None and row.status == "ok":
            found.setdefault((row.requests, row.prompt, row.new, row.method), []).append(row)
    names = ("requests", "prompt", "new", "method", "rate")
    return [
        dict(zip(names, (*key, _highest(of, latency)), strict=True))
        for key, of in found.items()
        if len(of) == len(rates)
    ]


def _highest(rows: Sequence[Row], latency: float) -> float | None:
    in_time = itertools.takewhile(
        lambda row: row.first_token_90_s is not None and row.first_token_90_s <= latency,
        sorted(rows, key=lambda row: row.rate or 0),
    )
    return max((row.rate for row in in_time if row.rate), default=None)
