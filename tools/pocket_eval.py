"""The pocket model's table: exact answers by task and length, under greedy decoding with dense attention.

A sample counts when every expected string is in the generated text. `recall` is RULER's score, the share of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import random
import time
from functools import partial
from pathlib import Path

import torch
from pocket_data import Tools
from pocket_mix import EVAL_TASKS, Sample, sample
from pocket_model import Pocket, after, angles, attention, before, layer_names, load_checkpoint, rms
from pocket_text import Library, Pieces
from pocket_tokenizer import default_roots
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

LENGTHS = (1024, 4096, 8192, 16384, 32768)
SEED = 20_260_101  # of the test samples; training seeds are far below


def one_token(cache: Tensor, lengths: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Store each row's key and value at its length, and attend to the row so far: q [B, H, D], k and v [B, K, D] -> [B, H D]."""
    at = torch.arange(q.shape[0], device=q.device)
    cache[0, layer, at, lengths], cache[1, layer, at, lengths] = k, v
    q = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
    score = torch.einsum("bkgd,bskd->bkgs", q, cache[0, layer]).float() * q.shape[-1] ** -0.5
    slots = torch.arange(cache.shape[3], device=q.device)
    score = score.masked_fill(slots > lengths[:, None, None, None], float("-inf"))
    return torch.einsum("bkgs,bskd->bkgd", score.softmax(-1).to(q.dtype), cache[1, layer]).flatten(1)


class Decoder:
    """Greedy generation for ragged rows: prompts padded on the right, caches written at each row's own length."""

    def __init__(self, model: Pocket, max_tokens: int) -> None:
        self.model = model
        self.cos, self.sin = angles(model.shape, max_tokens + 256, model.device)

    def _pass(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        m = self.model
        for layer in range(m.shape.num_hidden_layers):
            w = [m.weights[n] for n in layer_names(layer)]
            q, k, v = before(x, cos, sin, *w[:6], m.shape.rms_norm_eps, m.low)
            x = after(x, attend(layer, q, k, v), *w[6:], m.shape.rms_norm_eps, m.low)
        return x

    def _next(self, x: Tensor) -> Tensor:
        m = self.model
        h = rms(x, m.weights["model.norm.weight"], m.shape.rms_norm_eps).to(m.low)
        return F.linear(h, m.weights["model.embed_tokens.weight"].to(m.low)).float().argmax(-1)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], new_tokens: int, eos: int) -> list[list[int]]:
        """Up to `new_tokens` tokens after each prompt, cut at `eos`."""
        m, device = self.model, self.model.device
        rows, lengths = len(prompts), torch.tensor([len(p) for p in prompts], device=device)
        width = max(map(len, prompts))
        tokens = torch.zeros(rows, width, dtype=torch.int64)
        for r, p in enumerate(prompts):
            tokens[r, : len(p)] = torch.tensor(p)
        embed = m.weights["model.embed_tokens.weight"]
        room = width + new_tokens
        cache = torch.zeros(
            2,
            m.shape.num_hidden_layers,
            rows,
            room,
            m.shape.num_key_value_heads,
            m.shape.head_dim,
            dtype=m.low,
            device=device,
        )

        def whole(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache[0, layer, :, :width] = k.view(rows, width, *k.shape[1:])
            cache[1, layer, :, :width] = v.view(rows, width, *v.shape[1:])
            return attention(q, k, v, rows)

        x = self._pass(
            F.embedding(tokens.to(device).flatten(), embed).float(),
            self.cos[:width].repeat(rows, 1),
            self.sin[:width].repeat(rows, 1),
            whole,
        )
        at = torch.arange(rows, device=device)
        current = self._next(x.view(rows, width, -1)[at, lengths - 1])
        out, ended = [current], current == eos
        for _ in range(new_tokens - 1):
            if bool(ended.all()):
                break
            current = self._next(
                self._pass(
                    F.embedding(current, embed).float(),
                    self.cos[lengths],
                    self.sin[lengths],
                    partial(one_token, cache, lengths),
                )
            )
            out.append(current)
            ended, lengths = ended | (current == eos), lengths + 1
        rows_out = torch.stack(out, 1).tolist()
        return [r[: r.index(eos)] if eos in r else r for r in rows_out]


def _make(job: tuple[str, list[Path], str, int, int]) -> list[Sample]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, roots, task, length, count = job
    pieces, library = Pieces(Tokenizer.from_file(tokenizer)), Library(roots, seed=99, max_files=60)
    rng = random.Random(f"{SEED} {task} {length}")
    return [sample(Tools(pieces, library, rng, 1.0), task, length) for _ in range(count)]


def score(decoder: Decoder, tokenizer: Tokenizer, samples: list[Sample], rows: int) -> dict:
    """Exact share and recall of one cell."""
    exact = found = wanted = 0
    eos = tokenizer.token_to_id("<|eos|>")
    for i in range(0, len(samples), rows):
        part = samples[i : i + rows]
        for s, ids in zip(
            part, decoder.generate([s.prompt for s in part], max(s.new_tokens for s in part), eos), strict=True
        ):
            text = tokenizer.decode(ids)
            hits = sum(w in text for w in s.want)
            exact, found, wanted = exact + (hits == len(s.want)), found + hits, wanted + len(s.want)
    return {"exact": exact / len(samples), "recall": found / wanted, "samples": len(samples)}


def table(cells: dict[str, dict[str, dict]], lengths: tuple[int, ...], key: str = "exact") -> str:
    """Markdown: a row per task, a column per length, percent."""
    lines = ["| task | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---|" + "---:|" * len(lengths)]
    for task, row in cells.items():
        lines.append(
            f"| {task} | "
            + " | ".join(f"{100 * row[str(n)][key]:.0f}" if str(n) in row else "" for n in lengths)
            + " |"
        )
    return "\n".join(lines)


def evaluate(
    folder: Path,
    tokenizer_file: Path,
    roots: list[Path],
    out: Path,
    *,
    device: str,
    samples: int = 100,
    lengths: tuple[int, ...] = LENGTHS,
    tasks: tuple[str, ...] = tuple(EVAL_TASKS),
    workers: int = 8,
    seconds: float = 0.0,
) -> dict:
    """Score every task at every length, shortest first, and write the figures to `out` after each cell."""
    cuda = device == "cuda"
    low = torch.bfloat16 if cuda else torch.float32
    shape, weights = load_checkpoint(folder, device)
    decoder = Decoder(Pocket(shape, weights, low=low), max(lengths))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    begin = time.monotonic()
    result = {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "dtype": str(low),
        "decoding": "greedy",
        "seed": SEED,
        "cells": {t: {} for t in tasks},
    }
    jobs = [(str(tokenizer_file), roots, task, length, samples) for length in lengths for task in tasks]
    with mp.get_context("spawn").Pool(workers) as pool:
        for (_, _, task, length, _), made in zip(jobs, pool.imap(_make, jobs), strict=True):
            result["cells"][task][str(length)] = score(
                decoder, tokenizer, made, max(1, (1 << 19 if cuda else 1 << 14) // length)
            )
            result["seconds"] = round(time.monotonic() - begin, 1)
            out.write_text(json.dumps(result, indent=1) + "\n")
            if task == tasks[-1]:
                print(f"length {length}: {result['seconds']} s", flush=True)
            if seconds and result["seconds"] > seconds:
                break
    print(table(result["cells"], lengths), flush=True)
    print(
        "recall\n"
        + table(
            {t: result["cells"][t] for t in tasks if t in ("niah_multivalue", "niah_multiquery", "cwe", "fwe", "vt")},
            lengths,
            "recall",
        ),
        flush=True,
    )
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    p.add_argument("--tokenizer", type=Path, help="default: tokenizer.json in --model")
    p.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    p.add_argument("--text", type=Path, nargs="*", help="folders of text for haystacks")
    p.add_argument("--samples", type=int, default=100)
    p.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    p.add_argument("--tasks", nargs="+", default=list(EVAL_TASKS), choices=list(EVAL_TASKS))
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    args = p.parse_args()
    evaluate(
        args.model,
        args.tokenizer or args.model / "tokenizer.json",
        args.text or default_roots(),
        args.out,
        device=args.device,
        samples=args.samples,
        lengths=tuple(args.lengths),
        tasks=tuple(args.tasks),
        workers=args.workers,
    )


if __name__ == "__main__":
    main()
