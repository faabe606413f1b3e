"""lm-eval's tasks a document at a time, so that a run can stop and go on anywhere; the scores are lm-eval's own."""

from __future__ import annotations

import copy
import difflib
import functools
import io
import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keysift import pocket
from keysift.eval import squad
from keysift.eval.lm import KeysiftLM

try:
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(f"keysift: evaluation needs lm-eval: pip install 'keysift[eval]' ({error})") from error

# What lm-eval seeds its generators with unless told otherwise; our seed is added to each
PYTHON_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234
MEANS = {"mean", "nanmean"}
PER_DOCUMENT = {"perplexity", "weighted_perplexity", "bits_per_byte"}  # not means, but say something of one document
OVER_ALL = {"median", "f1", "matthews_corrcoef", "bleu", "chrf", "ter", "brier_score", "bypass"}
GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
FIRST_BLOCK = 64  # documents whose prompts are made at once


class Answer(NamedTuple):
    """One document, answered.

    Attributes:
        pred: what the model wrote, or the choice that it finds likeliest.
        outputs: the references.
        score: the task's metric for this document, in [0, 1] where the metric is.
        metrics: all metrics of this document that are numbers, as ``name,filter``.
    """

    pred: str
    outputs: list[str]
    score: float
    metrics: dict[str, float]


class HarnessTask:
    """One task of lm-eval's.

    Attributes:
        name: as lm-eval knows it.
        metric: what ``Answer.score`` is: the first metric that lm-eval lists of those that a document has on its own.
        higher_is_better: whether more of it is better.
        size: number of documents.
    """

    def __init__(self, name: str, task: Any, seed: int) -> None:
        self.name, self._task, self._seed = name, task, FEWSHOT_SEED + seed
        self.size = len(task.eval_docs)
        metrics = task.aggregation()
        self.by_length = bool(metrics) and all(str(m).isdigit() for m in metrics)  # RULER: a metric for each length
        self.metric = "string_match" if self.by_length else _metric(name, task)
        self.higher_is_better = bool(task.higher_is_better().get(self.metric, True))
        self._documents: list[list[Any]] = []

    def answer(self, index: int, lm: KeysiftLM) -> Answer:
        """Have a model answer document ``index``, counted from 0 in lm-eval's order."""
        instances = self._instances(index)
        doc, requests = instances[0].doc, [i for i in instances for _ in range(i.repeats or 1)]
        _refuse_cut_prompts(requests, lm)
        run = getattr(lm, instances[0].request_type)
        for instance, response in zip(requests, run(requests, disable_tqdm=True), strict=True):
            instance.resps.append(response)
        one = copy.copy(self._task)
        one._instances = instances  # the filters then see this document alone
        one.apply_filters()
        metrics: dict[str, float] = {}
        score = None
        for key in instances[0].filtered_resps:
            values = one.process_results(doc, [i.filtered_resps[key] for i in instances])
            numbers = self._numbers(values)
            metrics |= {f"{metric},{key}": number for metric, number in numbers.items()}
            name = str(doc["max_length"]) if self.by_length else self.metric
            score = numbers.get(name) if score is None else score
        if score is None or not math.isfinite(score):
            raise ValueError(
                f"lm:{self.name}: document {index} has no {self.metric} of its own: run this task with"
                " `python -m keysift.eval.lm`"
            )
        return Answer(_prediction(instances), self._references(doc), score, metrics)

    def spelled(self) -> str:
        """All documents, and the first prompt: what a run's results depend on."""
        documents = "\n".join(repr(doc) for doc in self._task.eval_docs)
        return f"{[instance.arguments for instance in self._instances(0)]}\n{documents}"

    def _instances(self, index: int) -> list[Any]:
        """The requests of a document, with nothing answered yet.

        Prompts are made from the first document on, as lm-eval makes them: examples are drawn in that order.
        """
        if not 0 <= index < self.size:
            raise ValueError(f"lm:{self.name} has {self.size} documents: there is no document {index}")
        if index >= len(self._documents):
            block = min(self.size, max(FIRST_BLOCK, 2 * index))
            self._task.set_fewshot_seed(self._seed)
            with quiet():
                self._task.build_all_requests(limit=block, rank=0, world_size=1)
            self._documents = [[] for _ in range(block)]
            for instance in self._task.instances:
                self._documents[instance.doc_id].append(instance)
        fresh = [copy.copy(instance) for instance in self._documents[index]]
        for instance in fresh:
            instance.resps, instance.filtered_resps = [], {}
        return sorted(fresh, key=lambda instance: instance.idx)

    def _numbers(self, values: dict[str, Any]) -> dict[str, float]:
        """A document's metrics that are numbers, or become one when aggregated alone."""
        out = {}
        for metric, value in values.items():
            aggregation = self._task.aggregation().get(metric)
            if getattr(aggregation, "__name__", "") in PER_DOCUMENT:
                value = aggregation([value])
            if isinstance(value, (int, float, np.number, np.bool_)) and not (self.by_length and value == -1):
                out[str(metric)] = float(value)  # RULER marks the lengths that a document does not have by -1
        return out

    def _references(self, doc: Any) -> list[str]:
        if isinstance(doc, dict) and self.by_length:
            return [str(output) for output in doc["outputs"]]
        target = self._task.doc_to_target(doc)
        if self._task.OUTPUT_TYPE == "multiple_choice" and not self._task.multiple_input:
            choices = self._task.doc_to_choice(doc)
            target = [
                choices[t] if isinstance(t, int) else t for t in (target if isinstance(target, list) else [target])
            ]
        return [str(t) for t in target] if isinstance(target, list) else [str(target)]


def load(
    names: Sequence[str],
    tokenizer_name: str,
    lengths: Sequence[int] | None,
    seed: int,
    include_path: str | Path | None = None,
) -> dict[str, HarnessTask]:
    """Tasks by name; groups and tags become the tasks in them.

    Args:
        names: as lm-eval knows them, or as the files under ``include_path`` say.
        tokenizer_name: what synthetic tasks measure their lengths with.
        lengths: of synthetic tasks, in tokens; None leaves it to them.
        seed: of what tasks draw: 0 draws what lm-eval draws by default for a task on its own.
        include_path: folder of task files besides lm-eval's own.

    Raises:
        ValueError: unknown names, with the nearest ones; data that cannot be loaded; tasks that cannot be scored a
            document at a time.
    """
    known_names = _index(include_path)
    leaves = dict.fromkeys(leaf for name in names for leaf in _leaves(name, known_names))
    tasks: dict[str, HarnessTask] = {}
    for leaf in leaves:
        for name, task in _load(leaf, known_names, tokenizer_name, lengths, seed).items():
            tasks[name] = HarnessTask(name, task, seed)
    return tasks


def fetch(
    names: Sequence[str],
    tokenizer_name: str | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    include_path: str | Path | None = None,
) -> None:
    """Download what tasks need, by loading them once; raises ValueError as ``load`` does."""
    load(names, tokenizer_name or str(pocket.path()), lengths, seed, include_path)


def known(include_path: str | Path | None = None) -> list[str]:
    """Names of all tasks, groups and tags."""
    return list(_index(include_path).all_tasks)


def _refuse_cut_prompts(requests: list[Any], lm: KeysiftLM) -> None:
    """Raise ValueError where lm-eval would cut a prompt to the model's context and score what is left."""
    for request in requests:
        context, what = request.args[0], request.args[1] if len(request.args) > 1 else ""
        new = what.get("max_gen_toks", lm.max_gen_toks) if isinstance(what, dict) else len(lm.tok_encode(what)) - 1
        tokens = len(lm.tok_encode(context)) + (new or 0)
        if tokens > lm.max_length and request.request_type != "loglikelihood_rolling":
            raise ValueError(f"prompt and answer take {tokens:,} tokens, and the model's context is {lm.max_length:,}")


@contextmanager
def quiet() -> Iterator[None]:
    """What lm-eval prints and logs within it goes nowhere, errors excepted."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@functools.cache
def _index(include_path: str | Path | None) -> Any:
    """lm-eval's table of tasks, which takes seconds to make."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path}: no such folder")
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _leaves(name: str, index: Any) -> list[str]:
    """The tasks in a group or tag; the name itself for a task, and for a group that changes its tasks."""
    entry = index.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, index.all_tasks, n=3, cutoff=0.5)
        raise ValueError(f"lm-eval has no task '{name}'" + (f": did you mean {' or '.join(near)}?" if near else ""))
    if name in index.all_tags:
        return sorted(entry.tags)
    if name not in index.all_groups:
        return [name]
    members = _members(entry.cfg)
    return [name] if members is None else [leaf for member in members for leaf in _leaves(member, index)]


def _members(group: dict[str, Any]) -> list[str] | None:
    """Names in a group's table, its own subgroups included; None where it sets options of its tasks."""
    if set(group) - GROUP_KEYS:
        return None
    names: list[str] = []
    for item in group["task"]:
        inner = [item] if isinstance(item, str) else _members(item) if isinstance(item.get("task"), list) else None
        if inner is None:
            return None
        names += inner
    return names


def _load(name: str, index: Any, tokenizer_name: str, lengths: Sequence[int] | None, seed: int) -> dict[str, Any]:
    """lm-eval's task objects of one name, the same whatever was loaded before."""
    metadata: dict[str, Any] = {"tokenizer": tokenizer_name, "pretrained": tokenizer_name}
    if lengths:
        metadata["max_seq_lengths"] = _babilong_length(lengths) if name.startswith("babilong") else list(lengths)
    path = index.task_index[name].yaml_path
    alone = path is not None and name not in index.all_groups
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # it draws from a generator that every load moves on
    squad.provide()
    try:
        with seeded(seed), redirect_stdout(sys.stderr):
            folder = None if alone else index.include_path
            manager = TaskManager(include_path=folder, include_defaults=not alone, metadata=metadata)
            tasks = manager.load([str(path) if alone else name])["tasks"]
    except Exception as error:  # whatever a task's own code and its data's loader raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = (
            f"run `keysift eval --fetch --tasks lm:{name}` where there is a network, or point --include-path to a task"
            " file with local data"
        )
        if isinstance(error, ImportError):
            remedy = "install what it lacks"
        raise ValueError(f"lm:{name}: cannot load it: {reason}; {remedy}") from error
    for task_name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that a model wrote" if getattr(task, "UNSAFE_CODE", False) else "needs more than text"
            raise ValueError(f"lm:{task_name} {what}: keysift eval does not run it")
    return tasks


def _babilong_length(lengths: Sequence[int]) -> str:
    """BABILong's name for a length: its data set has one part for each."""
    if len(lengths) != 1:
        raise ValueError("lm:babilong tasks take one length at a time")
    return "1M" if lengths[0] >= 1_000_000 else f"{round(lengths[0] / 1024)}k"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's and NumPy's generators as lm-eval seeds them; afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED + seed)
    np.random.seed((NUMPY_SEED + seed) % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _metric(name: str, task: Any) -> str:
    """The first metric whose mean over documents is what lm-eval reports, or else one that a document has alone."""
    kinds = {metric: getattr(function, "__name__", "") for metric, function in task.aggregation().items()}
    means = [metric for metric, kind in kinds.items() if kind in MEANS]
    own = [metric for metric, kind in kinds.items() if kind not in MEANS | PER_DOCUMENT | OVER_ALL]  # the task's code
    alone = [metric for metric, kind in kinds.items() if kind in PER_DOCUMENT]
    if found := means or own or alone:
        return str(found[0])
    raise ValueError(
        f"lm:{name}: its metric ({', '.join(kinds)}) is computed over all documents at once: run it with"
        " `python -m keysift.eval.lm`"
    )


def _prediction(instances: list[Any]) -> str:
    """The text written; of several texts to choose from the likeliest; a single one if greedy decoding writes it."""
    first = instances[0]
    if first.request_type != "loglikelihood":
        return str(first.resps[0]) if first.request_type == "generate_until" else ""
    if len(instances) == 1:
        return first.args[1].strip() if first.resps[0][1] else ""
    asked = [i for i in instances if i.args[0]] or instances  # those without a context only normalise the others
    best = max(asked, key=lambda i: i.resps[0][0])
    return best.args[len({i.args[1] for i in asked}) > 1].strip()
