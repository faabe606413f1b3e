"""Evaluation proper: every sample of every task under every run, each result on disk before the next begins."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import keysift
from keysift.eval import ruler
from keysift.eval.data import FILES, Data
from keysift.eval.generate import Batch, generate
from keysift.eval.results import Folder, Key, Record
from keysift.eval.runs import Run

HARNESS = "lm:"  # what the names of lm-eval's tasks begin with here
ASSUMED_TOKENS = 4096  # weight in the estimate of the time left of a sample whose length is not known


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        tasks: names of RULER tasks, or ``lm:NAME`` for lm-eval's.
        lengths: tokens of prompt and answer together; for lm-eval's tasks where they are made to a length.
        runs: what is compared.
        samples: samples of each task and length.
        seed: of the samples, and of methods that draw.
        question: how the end of a prompt from its question on is read: "sparse" (as all of it, by the prefill method),
            "dense", or "decode" (token by token, by the decode method).
        chat: apply the model's chat template.
        batch: samples generated together; batches are always the same samples, so that stopping changes no result.
        measure_error: also compare every attention output with dense attention's.
        shard: (i, n) does every n-th batch, from the i-th; several processes share a folder so.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    runs: tuple[Run, ...]
    samples: int
    seed: int = 0
    question: str = "sparse"
    chat: bool = False
    batch: int = 1
    measure_error: bool = False
    shard: tuple[int, int] = (0, 1)


class Step(NamedTuple):
    """A batch under one run: the samples that are still missing, and what they weigh in the time left."""

    run: Run
    task: str
    length: int | None
    indices: list[int]
    missing: list[int]

    @property
    def cost(self) -> int:
        return len(self.missing) * (self.length or ASSUMED_TOKENS)


def settings(plan: Plan, model: Any, tokenizer: Any, name: str, data: Data, harness: dict[str, Any]) -> dict[str, Any]:
    """All that decides results, as plain data: what a folder is begun with and compared to."""
    device = next(model.parameters()).device
    needed = {ruler.TASKS[t].needs for t in plan.tasks if t in ruler.TASKS} - {None}
    return {
        "model": name,
        "weights": fingerprint(model),
        "config": _digest(model.config.to_json_string(use_diff=False).encode()),
        "generation_config": _digest(model.generation_config.to_json_string(use_diff=False).encode()),
        "tokenizer": _digest(_spelled(tokenizer).encode()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "keysift": keysift.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "tasks": list(plan.tasks),
        "lengths": list(plan.lengths),
        "runs": [run.name for run in plan.runs],
        "samples": plan.samples,
        "seed": plan.seed,
        "question": plan.question,
        "chat": plan.chat,
        "batch": plan.batch,
        "measure_error": plan.measure_error,
        "data": {kind: _digest(data.file(kind).read_bytes()) for kind in FILES if kind in needed}
        | {f"{HARNESS}{task}": _digest(made.spelled().encode()) for task, made in harness.items()},
    }


def fingerprint(model: Any) -> str:
    """A digest of the weights: names, shapes, some values and the exact sum of the bits of every parameter."""
    digest = hashlib.sha256()
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in model.named_parameters():
        bits = weight.detach().contiguous().view(whole[weight.element_size()]).flatten()
        some = bits[:: max(1, bits.numel() // 16)][:16].tolist()
        digest.update(f"{name} {tuple(weight.shape)} {some} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()[:16]


def _spelled(tokenizer: Any) -> str:
    """Everything that decides a tokenizer's ids, as text."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return f"{rules} {tokenizer.special_tokens_map} {tokenizer.chat_template}"


def check_served(model: Any, runs: tuple[Run, ...]) -> None:
    """Raise ValueError for a model that keysift refuses, and for methods that serve none of its layers."""
    sparse = [run.name for run in runs if run.name != "dense"]
    with keysift.attach(model) as link, torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64, device=model.device), logits_to_keep=1)
        if sparse and link.stats.prefill_density is None:
            raise ValueError(
                f"--run '{sparse[0]}': every layer of this model has a sliding window of its own, which stays dense, so"
                " no method has anything to choose"
            )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def steps(plan: Plan, done: set[Key], harness: dict[str, Any]) -> Iterator[Step]:
    """What is left to do, short lengths first; all runs of a batch follow each other, so that pairs are complete."""
    spans: list[tuple[str, int | None, int]] = [
        (task, length, plan.samples) for length in plan.lengths for task in plan.tasks if task in ruler.TASKS
    ]
    spans += [(f"{HARNESS}{name}", None, min(plan.samples, task.size)) for name, task in harness.items()]
    batches = [
        (task, length, list(range(first, min(first + plan.batch, count))))
        for task, length, count in spans
        for first in range(0, count, plan.batch)
    ]
    for task, length, indices in batches[plan.shard[0] :: plan.shard[1]]:
        for run in plan.runs:
            if missing := [i for i in indices if Key(run.name, task, length, i) not in done]:
                yield Step(run, task, length, indices, missing)


def evaluate(
    plan: Plan,
    left: Sequence[Step],
    model: Any,
    tokenizer: Any,
    data: Data,
    folder: Folder,
    harness: dict[str, Any],
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Do what is left of a plan. A sample that fails is recorded with its error, and the rest goes on.

    Args:
        plan: what to do.
        left: what ``steps`` says is left of it.
        model: a causal LM, not attached.
        tokenizer: the model's.
        data: files that tasks are made of.
        folder: where results go; what is done there is not done again.
        harness: lm-eval's tasks of the plan by name, as ``harness.load`` gives them.
        on_step: called after every batch of a run.
    """
    made: tuple[Any, list[ruler.Sample], dict[int, str]] = (None, [], {})
    served: dict[str, Any] = {}
    for step in left:
        if step.task.startswith(HARNESS):
            if step.run.name not in served:
                served[step.run.name] = _harness_model(plan, step.run, model, tokenizer)
            records = _harness_records(plan, step, served[step.run.name], harness[step.task.removeprefix(HARNESS)])
        else:
            key = (step.task, step.length, step.indices[0])
            if made[0] != key:  # the runs of a batch share its samples
                made = key, *_make_batch(plan, step, tokenizer, data)
            records = _ruler_records(plan, step, model, tokenizer, made[1]) if made[1] else []
            records += [_record(step, i, (), error=reason) for i, reason in made[2].items()]
        missing = set(step.missing)
        folder.append(record for record in records if record["index"] in missing)
        on_step(step)


def make_sample(plan: Plan, task: str, length: int, index: int, tokenizer: Any, data: Data) -> ruler.Sample:
    return ruler.make_sample(task, length, index, tokenizer, data, seed=plan.seed, chat=plan.chat)


def _make_batch(plan: Plan, step: Step, tokenizer: Any, data: Data) -> tuple[list[ruler.Sample], dict[int, str]]:
    """A batch's samples, and why some cannot be made (near a task's shortest length not all of them fit)."""
    samples, reasons = [], {}
    for i in step.indices:
        try:
            samples.append(make_sample(plan, step.task, step.length or 0, i, tokenizer, data))
        except ValueError as error:
            reasons[i] = _reason(error)
    return samples, reasons


def _ruler_records(plan: Plan, step: Step, model: Any, tokenizer: Any, samples: list[ruler.Sample]) -> list[Record]:
    """Answers to a batch; one that fails (it may not fit) is tried again in halves."""
    groups = [samples] if plan.question == "sparse" else [[sample] for sample in samples]
    records = []
    for group in groups:
        try:
            records += _answer(plan, step.run, model, tokenizer, group)
        except Exception as error:  # whatever a model or a driver raises must not cost the rest of the run
            if len(group) > 1:
                _free(model)
                half = len(group) // 2
                records += _ruler_records(plan, step, model, tokenizer, group[:half])
                records += _ruler_records(plan, step, model, tokenizer, group[half:])
            else:
                records.append(_record(step, group[0].index, group[0].outputs, error=_reason(error)))
                _free(model)
    return records


def _answer(plan: Plan, run: Run, model: Any, tokenizer: Any, samples: list[ruler.Sample]) -> list[Record]:
    """Greedy answers to samples of one task, padded on the left, with what was read and how long it took."""
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.get_input_embeddings().num_embeddings:
        pad = 0  # masked, whatever it is
    prompt = Batch.of([s.ids for s in samples], model.device, pad)
    clock = Clock(model.device)
    with _greedy(model, pad), keysift.attach(model, run.prefill, run.decode, seed=plan.seed) as link:
        link.reset_stats(plan.measure_error)
        asked = samples[0].question_tokens
        options = {
            "max_new_tokens": samples[0].new_tokens,
            "stopping_criteria": transformers.StoppingCriteriaList([clock]),
        }
        out = generate(model, link, prompt.ids, prompt.mask, plan.question, asked, **options)
        measured = link.stats._asdict()
    ends = _ends(model)
    records = []
    for sample, row in zip(samples, out[:, prompt.ids.shape[1] :].tolist(), strict=True):
        new = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        pred = tokenizer.decode(row[:new], skip_special_tokens=True)
        score = ruler.grade(sample.task, pred, sample.outputs)
        record = _record(Step(run, sample.task, sample.length, [], []), sample.index, sample.outputs, pred, score)
        records.append(
            record
            | {"prompt_tokens": len(sample.ids), "question_tokens": sample.question_tokens, "new_tokens": new}
            | clock.speed()
            | {field: _rounded(value) for field, value in measured.items()}
        )
    return records


@contextmanager
def _greedy(model: Any, pad: int) -> Iterator[None]:
    """Plain greedy decoding within it: of the checkpoint's generation config (penalties, sampling, prompt lookup, no
    cache, ...) only the end tokens stay, so that runs differ by their methods alone."""
    before = model.generation_config
    kept = {"eos_token_id": before.eos_token_id, "bos_token_id": before.bos_token_id, "pad_token_id": pad}
    model.generation_config = transformers.GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = before


def _harness_model(plan: Plan, run: Run, model: Any, tokenizer: Any) -> Any:
    """The model under one run, as lm-eval's tasks ask it."""
    from keysift.eval.harness import quiet
    from keysift.eval.lm import KeysiftLM

    with quiet():
        methods = {"prefill": run.prefill, "decode": run.decode}
        return KeysiftLM(model, tokenizer=tokenizer, **methods, seed=plan.seed, batch_size=plan.batch)


def _harness_records(plan: Plan, step: Step, lm: Any, task: Any) -> list[Record]:
    """lm-eval's documents, one by one."""
    records = []
    for index in step.missing:
        try:
            lm.reset_stats(plan.measure_error)
            answer = task.answer(index, lm)
            measured = {field: _rounded(value) for field, value in lm.stats._asdict().items()}
            record = _record(step, index, tuple(answer.outputs), answer.pred, answer.score)
            records.append(record | {"metrics": answer.metrics} | measured)
        except Exception as error:  # as above
            records.append(_record(step, index, (), error=_reason(error)))
            _free(lm.model)
    return records


def _record(
    step: Step, index: int, outputs: tuple[str, ...], pred: str = "", score: float | None = None, error: str = ""
) -> Record:
    named = {"run": step.run.name, "task": step.task, "length": step.length, "index": index}
    return named | {"score": score, "pred": pred, "outputs": list(outputs), "error": error or None}


def _reason(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def _free(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


class Clock(transformers.StoppingCriteria):
    """Notes when tokens come; never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self._times: list[float] = []

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._times.append(self._now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def speed(self) -> Record:
        """Seconds to the first token, and tokens per second of each sequence after it."""
        if not self._times:
            return {"ttft_s": None, "tokens_per_s": None}
        seconds, after = self._times[-1] - self._times[0], len(self._times) - 1
        rate = _rounded(after / seconds) if seconds > 0 and after else None
        return {"ttft_s": _rounded(self._times[0] - self._start), "tokens_per_s": rate}
