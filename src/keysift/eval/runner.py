"""Evaluation proper: every sample of every task under every run, each result on disk before the next begins."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers

import keysift
from keysift.engine import LLM, NO_DRAFT
from keysift.eval import ruler
from keysift.eval.data import FILES, Data
from keysift.eval.report import READ
from keysift.eval.results import Folder, Key, Record
from keysift.eval.runs import Run
from keysift.hf.parallel import local_part
from keysift.requests import RequestOutput
from keysift.sampling import SamplingParams

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
        batch: samples answered together; batches are always the same samples, so that stopping changes no result.
        measure_error: also compare every attention output with dense attention's.
        shard: (i, n) does every n-th batch, from the i-th; several processes share a folder so.
        tensor_parallel: processes that share the model.
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
    tensor_parallel: int = 1


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
        # weights are those of the first process then
        **({"tensor_parallel": plan.tensor_parallel} if plan.tensor_parallel > 1 else {}),
    }


def fingerprint(model: Any) -> str:
    """A digest of the weights here: names, shapes, some values and the exact sum of the bits of every parameter."""
    digest = hashlib.sha256()
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in model.named_parameters():
        bits = local_part(weight).contiguous().view(whole[weight.element_size()]).flatten()
        some = bits[:: max(1, bits.numel() // 16)][:16].tolist()
        digest.update(f"{name} {tuple(weight.shape)} {some} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()[:16]


def _spelled(tokenizer: Any) -> str:
    """Everything that decides a tokenizer's ids, as text."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return f"{rules} {tokenizer.special_tokens_map} {tokenizer.chat_template}"


def check_served(llm: LLM, runs: tuple[Run, ...]) -> None:
    """Raise ValueError for methods that serve none of a model's layers."""
    sparse = [run.name for run in runs if run.name != "dense"]
    if sparse and not llm.served.chooses:
        raise ValueError(
            f"--run '{sparse[0]}': every layer of this model has a sliding window of its own, which stays dense, so no"
            " method has anything to choose"
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
    llm: LLM,
    data: Data,
    folder: Folder,
    harness: dict[str, Any],
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Do what is left of a plan. A sample that fails is recorded with its error, and the rest goes on.

    Args:
        plan: what to do.
        left: what ``steps`` says is left of it.
        llm: that answers, as many at a time as ``plan.batch``; it is closed before lm-eval's tasks begin.
        data: files that tasks are made of.
        folder: where results go; what is done there is not done again.
        harness: lm-eval's tasks of the plan by name, as ``harness.load`` gives them.
        on_step: called after every batch of a run.
    """
    made: tuple[Any, list[ruler.Sample], dict[int, str]] = (None, [], {})
    served: dict[str, Any] = {}
    for step in left:
        if step.task.startswith(HARNESS):
            llm.close()
            if step.run.name not in served:
                served[step.run.name] = _harness_model(plan, step.run, llm.model, llm.tokenizer)
            records = _harness_records(plan, step, served[step.run.name], harness[step.task.removeprefix(HARNESS)])
        else:
            key = (step.task, step.length, step.indices[0])
            if made[0] != key:  # the runs of a batch share its samples
                made = key, *_make_batch(plan, step, llm.tokenizer, data)
            records = _ruler_records(plan, step, llm, made[1]) if made[1] else []
            records += [_record(step, i, (), error=reason) for i, reason in made[2].items()]
        missing = set(step.missing)
        folder.append(record for record in records if record["index"] in missing)
        if llm.broken:
            raise ValueError(
                f"{step.task} failed and has ended the processes that share the model: {records[0]['error']}; it is"
                " recorded, and the same command goes on behind it"
            )
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


def _ruler_records(plan: Plan, step: Step, llm: LLM, samples: list[ruler.Sample]) -> list[Record]:
    """Answers to a batch; if one fails (it may not fit), they are tried again in halves."""
    try:
        return _answer(plan, step.run, llm, samples)
    except Exception as error:  # whatever a model or a driver raises must not cost the rest of the run
        if llm.broken:  # the processes that share the model are gone: `evaluate` ends
            return [_record(step, sample.index, sample.outputs, error=_reason(error)) for sample in samples]
        _free(llm.model)
        if len(samples) > 1:
            half = len(samples) // 2
            return [x for part in (samples[:half], samples[half:]) for x in _ruler_records(plan, step, llm, part)]
        return [_record(step, samples[0].index, samples[0].outputs, error=_reason(error))]


def _answer(plan: Plan, run: Run, llm: LLM, samples: list[ruler.Sample]) -> list[Record]:
    """Greedy answers to samples of one task, with what was read and how long it took."""
    draft = NO_DRAFT if run.draft is None else run.draft
    llm.switch(prefill=run.prefill, decode=run.decode, draft=draft, max_length=samples[0].length)
    records = []
    # a question has as many tokens as its own sample says
    groups = [samples] if plan.question == "sparse" else [[sample] for sample in samples]
    for group in groups:
        params = SamplingParams(max_new_tokens=group[0].new_tokens)
        asked = None if plan.question == "sparse" else group[0].question_tokens
        prompts = [sample.ids for sample in group]
        answers = llm.generate(prompts, params, question=plan.question, question_tokens=asked)
        records += [_answered(run, sample, out) for sample, out in zip(group, answers, strict=True)]
    return records


def _answered(run: Run, sample: ruler.Sample, out: RequestOutput) -> Record:
    pred, stats = out.text, out.stats._asdict()
    score = ruler.grade(sample.task, pred, sample.outputs)
    record = _record(Step(run, sample.task, sample.length, [], []), sample.index, sample.outputs, pred, score)
    counts = {"prompt_tokens": len(sample.ids), "question_tokens": sample.question_tokens}
    measured = {field: _rounded(stats[field]) for field in ("ttft_s", "tokens_per_s", *READ)}
    return record | counts | {"new_tokens": len(out.token_ids)} | measured


def _harness_model(plan: Plan, run: Run, model: Any, tokenizer: Any) -> Any:
    """The model under one run, as lm-eval's tasks ask it, which generate without drafts."""
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


def _free(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
