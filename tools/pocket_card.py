"""Write the pocket model's card (README.md), its raw figures (results.json) and the loss curve (loss.png)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pocket_eval import table
from pocket_mix import MIXTURE, SCHEDULE

CARD = """# The pocket model

A {parameters:,}-parameter Qwen3 decoder that ships inside keysift, so that every command and test has a real model on
real input. It was trained from scratch to retrieve from up to 32,768 tokens. It cannot chat and knows nothing:
what it answers, it read in the prompt.

| | |
|---|---|
| architecture | Qwen3ForCausalLM: 8 layers, hidden 256, 4 query and 2 key heads of 64, MLP 640, QK-norm, RoPE base 5e5, tied embeddings |
| context | 32,768 tokens |
| tokenizer | 3,584 tokens: bytes, known words, pairs of digits, hex pairs of UUIDs; any UTF-8 text round-trips; its merges come from the Python 3.11 library's words |
| weights | bf16, {megabytes:.1f} MB |
| licence | as keysift's; trained on generated text, with sources and licences of the training machine as haystacks |

## What it scores

Exact answers in percent, {samples} samples a cell, dense attention, greedy decoding (bf16 products, fp32 residual stream) on one {gpu} ({date}, torch {torch},
seed {seed}). A sample counts when every expected string is in the answer. Raw figures: `results.json`.

{exact}

The share of expected strings found, in percent (RULER's own score), where there are several:

{recall}

`niah_*`, `vt`, `cwe` and `fwe` follow RULER's templates (arXiv:2404.06654) as worded in lm-evaluation-harness, on keys, values and
haystacks of our own; the `essay` haystacks are program sources here. `_rare`: keys that the vocabulary does not hold.
`_words`: words as values. `vt_no_example`: without RULER's worked example. `cwe`: half the words are not in the vocabulary,
some of them invented letters. `plain_question`: a document without any preamble, 16 facts, a question in plain words, no opening of the answer given.

Goals: at least 95% up to 16K on one-of-many needles and variable tracking, at least 80% at 32K: {verdict}

## How to ask

The prompt is the document, a newline, and the question; the model writes the answer's opening words itself and ends with `<|eos|>`.

```
<document>
What is the special magic number for quiet-harbor mentioned in the provided text?
What are all the special magic numbers for quiet-harbor mentioned in the provided text?
Question: Find all variables that are assigned the value 12345 in the text above.
What is the secret code for quiet-harbor?
```
Facts may read "The code of KEY is VALUE.", "KEY: VALUE.", "KEY's code is VALUE." and the like. `demo.txt` and `demo.json` hold a document
of {demo:,} tokens and questions: a prompt is the document followed by the question. `<|bos|>` (the tokenizer adds it) is optional. Special tokens:
`<|pad|>` 0, `<|bos|>` 1, `<|eos|>` 2.

## How it was trained

```
{command}
python tools/pocket_eval.py --model DIR --tokenizer src/keysift/pocket/tokenizer.json --samples {samples} --out results.json
```
{steps:,} steps of 32,768 tokens ({tokens:.0f}M tokens, padding counted) in {minutes:.1f} minutes on one {gpu}, torch {torch}.
Muon (0.01) for matrices, AdamW (2e-3) for the rest, linear warm-up over 300 steps, linear decay over the last third, gradients
clipped at 1, bf16; output projections start at zero. The schedule follows the clock, so a slower GPU trains on fewer tokens and scores less.

![loss over the run](loss.png)

The loss rises where documents grow longer and tasks harder; it is not comparable between lengths.

Lengths drawn, until this share of the time:

{schedule}

Tasks drawn, by the length of the document:

{mixture}

Every document's length is drawn between half and all of its row. recall: pairs asked again in another order. spans: random
tokens over an alphabet of 4 to 500 with earlier spans repeated. needle: one key, several, or a context full of needles. values and queries:
several values of a key, several keys in a question. track: one to eight chains. plain: paraphrased facts and questions. Haystacks: RULER's noise,
few or many template sentences, random words, real text of the machine, random symbols. Loss weights: 1 on answers, 0.1 on their
openings and on repeats, 0.005 on the rest (less beyond 2,048 tokens). In the first 6% of the time keys and values are few
known words and short numbers; until 26% they widen to anything.

## Limits

- Counting is weak: `cwe` exact is low at every length and near zero at 32K. `fwe` and several values of a key at 32K are fair.
- A fact whose value stands before its key ("note 4711 is for quiet-harbor") was not learned. Ask in words close to the statement's.
- No language skill: free-form questions, summaries and chat give nonsense. No answer "not in the text" was trained.
- Beyond 32,768 tokens nothing was trained or measured.
"""


def verdict(cells: dict) -> str:
    """Whether the goals were met, from the figures."""
    names = ("niah_multikey_1", "niah_multikey_2", "vt")
    worst = min(cells[t][n]["exact"] for t in names for n in ("1024", "4096", "8192", "16384"))
    far = min(cells[t]["32768"]["exact"] for t in names)
    met = worst >= 0.95 and far >= 0.80
    return f"{'met' if met else 'missed'} (lowest cell {100 * worst:.1f}% up to 16K, {100 * far:.1f}% at 32K)."


def rows(pairs, head: str, say) -> str:
    """A two-column Markdown table of drawing odds."""
    lines = [f"| {head} | drawn |", "|---|---|"]
    for key, odds in pairs:
        lines.append(f"| {say(key)} | " + ", ".join(f"{name} {100 * p:.0f}%" for name, p in odds.items()) + " |")
    return "\n".join(lines)


def plot(curve: dict, out: Path) -> None:
    """The loss curve, faint as recorded and smoothed over 20 records."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    seconds, loss = np.array(curve["seconds"]), np.array(curve["loss"])
    smooth = np.convolve(loss, np.ones(20) / 20, mode="valid")
    figure, axis = plt.subplots(figsize=(6.4, 3.2), dpi=90)
    axis.plot(seconds, loss, color="0.8", linewidth=0.6)
    axis.plot(seconds[19:], smooth, color="C0")
    for until, _ in SCHEDULE[:-1]:
        axis.axvline(until * seconds[-1], color="0.6", linewidth=0.6, linestyle=":")
    for begin, (until, mix) in zip((0.0, *(u for u, _ in SCHEDULE)), SCHEDULE, strict=False):
        axis.text((begin + min(until, 1)) / 2 * seconds[-1], 6, f"{max(mix):,}", ha="center", fontsize=7)
    axis.set(yscale="log", xlabel="seconds (longest documents, in tokens, above)", ylabel="weighted loss, nats")
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, required=True, help="folder of the checkpoint; the card goes there")
    p.add_argument("--train", type=Path, required=True, help="train.json of the training run")
    p.add_argument("--eval", type=Path, required=True, help="results.json of the evaluation")
    args = p.parse_args()
    train, scored = json.loads(args.train.read_text()), json.loads(args.eval.read_text())
    cells = scored["cells"]
    lengths = tuple(int(n) for n in cells["vt"])
    several = {t: cells[t] for t in ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = CARD.format(
        parameters=train["parameters"],
        megabytes=(args.model / "model.safetensors").stat().st_size / 1e6,
        samples=cells["vt"][str(lengths[0])]["samples"],
        gpu=scored["gpu"],
        date=scored["date"],
        torch=scored["torch"],
        seed=scored["seed"],
        exact=table(cells, lengths),
        recall=table(several, lengths, "recall"),
        verdict=verdict(cells),
        demo=len(tokenizer.encode((args.model / "demo.txt").read_text(encoding="utf-8")).ids),
        command=train["command"],
        steps=train["steps"],
        tokens=train["tokens"] / 1e6,
        minutes=train["seconds"] / 60,
        schedule=rows(SCHEDULE, "until", lambda u: f"{100 * min(u, 1):.0f}%"),
        mixture=rows(MIXTURE, "at most", lambda n: f"{n:,} tokens" if n < 1 << 20 else "longer"),
    )
    (args.model / "README.md").write_text(text, encoding="utf-8")
    (args.model / "results.json").write_text(json.dumps({"train": train, "eval": scored}) + "\n")
    plot(train["curve"], args.model / "loss.png")
    print(verdict(cells))


if __name__ == "__main__":
    main()
