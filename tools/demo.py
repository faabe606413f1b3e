"""`make demo`: questions about a long document, answered by the pocket model with dense and with sparse attention.

The model, the document (demo.txt) and the questions (demo.json) ship with the package.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import keysift
from keysift import pocket

RUNS = {
    "dense": {},
    "FlexPrefill": {"prefill": "flexprefill"},
    "MagicPIG": {"decode": "magicpig"},
    "both": {"prefill": "flexprefill", "decode": "magicpig"},
}
MAX_NEW_TOKENS = 64
NOTES = """
Prefill density: share of the (query, key) pairs that reading the prompt took. Kept fraction: share of the cached keys
that a new token read.
Try your own: .venv/bin/keysift generate --prompt-file FILE --prefill flexprefill --decode magicpig"""


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False, markup=False)
    folder = pocket.path()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    document = (folder / "demo.txt").read_text(encoding="utf-8")
    questions = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"The pocket model ({parameters / 1e6:.1f}M parameters, on {device}) reads a document of"
        f" {len(tokenizer(document)['input_ids']):,} tokens: {folder / 'demo.txt'}",
        soft_wrap=True,
    )
    for item in questions:
        question, expected = item["question"], item["answer"]
        console.print(f"\nQuestion: {question.removeprefix('Question: ')}\nExpected: {expected}", soft_wrap=True)
        for name, methods in RUNS.items():
            with console.status(name):
                text, cost = answer(model, tokenizer, document + question, methods)
            right = all(part in text for part in re.findall(r"[\w-]+", expected))
            console.print(f"{name:>14}  {text}\n{'':16}{cost}; {'right' if right else 'wrong'}", soft_wrap=True)
    console.print(NOTES, soft_wrap=True)


def answer(model: Any, tokenizer: Any, prompt: str, methods: dict[str, str]) -> tuple[str, str]:
    """The text that the model continues the prompt with, and what that took."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    start = time.perf_counter()
    with keysift.attach(model, **methods) as attachment:
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        stats = attachment.stats
    seconds = time.perf_counter() - start
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    read = {"prefill density": stats.prefill_density, "kept fraction": stats.kept_fraction}
    shares = [f"{name} {'n/a' if share is None else f'{share:.3f}'}" for name, share in read.items()]
    return text, "; ".join([*shares, f"{seconds:.1f} s"])


if __name__ == "__main__":
    main()
