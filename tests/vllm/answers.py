"""Prompts of the pocket model, and what vLLM answers them with; as a program, in processes of its own."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from keysift import pocket

MODEL = str(pocket.path())
NAMES = [f"{a}-{b}" for a in ("eager", "lazy", "heavy", "brief", "happy") for b in ("shell", "clover", "chalk", "moth")]
ASK = "\nWhat is the special magic number for {0} mentioned in the provided text?"
BEGIN = " The special magic number for {0} mentioned in the provided text is"
DIGITS = 8  # tokens of an answer: a space and seven digits
ON_GPU = {"gpu_memory_utilization": 0.1} if torch.cuda.is_available() else {}  # where a server and an engine fit


def book() -> str:
    return (pocket.path() / "demo.txt").read_text(encoding="utf-8")


def question(number: int, lines: int) -> tuple[str, str]:
    """A text with a number in it, and a question for it; the answer."""
    filler = [line for line in book().splitlines() if not any(word in line for word in ("magic", "secret", "VAR"))]
    name, answer = NAMES[number % len(NAMES)], str(random.Random(number).randrange(10**6, 10**7))
    part = filler[number % 5 : number % 5 + lines]
    part.insert(lines // 3, f"One of the special magic numbers for {name} is: {answer}.")
    return "\n".join(part) + (ASK + BEGIN).format(name), answer


@contextlib.contextmanager
def served(model: str = MODEL, methods: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM``, with keysift's attention where ``methods`` are named."""
    import vllm

    if methods is not None:
        options = {"attention_backend": "CUSTOM", "additional_config": {"keysift": methods}} | options
    sizes = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "max_num_batched_tokens": 4096}
    llm = vllm.LLM(model, **sizes | ON_GPU | options)
    try:
        yield weakref.proxy(llm)  # a test that fails keeps its variables, and two engines in a process are one too many
    finally:
        del llm
        gc.collect()


def tokens(llm: Any, prompts: list[list[int]], new: int = 16) -> list[list[int]]:
    """The greedy tokens of each prompt, all of them in one batch."""
    import vllm

    sampling = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def log_likelihoods(llm: Any, prompts: list[list[int]], new: int = 16) -> list[float]:
    """How likely each greedy answer was, as a natural logarithm."""
    import vllm

    sampling = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [output.outputs[0].cumulative_logprob for output in outputs]


def cached(llm: Any, ids: list[int]) -> int:
    """How many tokens of a prompt are found where they have been read before."""
    import vllm

    sampling = vllm.SamplingParams(max_tokens=1, temperature=0)
    return int(llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].num_cached_tokens)


def main(request: str, file: str) -> None:
    """Write what ``{"served": ..., "prompts": ...}`` gives."""
    asked = json.loads(request)
    with served(**asked["served"]) as llm:
        Path(file).write_text(json.dumps(tokens(llm, asked["prompts"])), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
