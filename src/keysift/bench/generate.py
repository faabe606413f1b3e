"""How fast the engine generates: batches of long contexts, dense and by methods, beside the time to read it all once.

Contexts are prompts that the engine reads, or noise written straight into its slots, over which a step takes as long.
MagicDec's units (arXiv:2408.11049): batch x prefix x generated tokens, and milliseconds a token and sequence. Every row
is timed in the same loop of the engine's steps, drafts (``bench.speculate``) too.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from keysift.bench import speculate, steps
from keysift.bench.prefill import failure
from keysift.bench.speculate import TIMES, Accepting, Round, Run
from keysift.bench.steps import DENSE, WARMUP, let_go, timed_ms
from keysift.engine import LLM
from keysift.hf.parallel import least, total
from keysift.meter import Totals
from keysift.methods import describe
from keysift.offload import free_device_bytes
from keysift.requests import Request
from keysift.sampling import SamplingParams
from keysift.slots import check_page
from keysift.speculate import MOST
from keysift.text import Detokenizer
from keysift.types import check_seed

CHUNK = 16384  # tokens of a prompt that are read at a time: what is computed of them fits beside a full cache
AFTER = 2 + max(TIMES, MOST)  # rows for what is timed when the window is over
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
COPIES = 7


class Shape(NamedTuple):
    """Sequences, tokens of each one's context, and tokens that each then gets at least, timed."""

    batch: int
    prefix: int
    generated: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prefix}x{self.generated}"


@dataclass(frozen=True)
class Setup:
    """What is measured, apart from shapes and decode methods.

    Attributes:
        prefill: method that prompts are read by.
        read: whether contexts are prompts that are read; otherwise they are noise.
        page: rows a page of the cache.
        seed: of noise, random prompts, and of methods that draw.
        outputs: whether rows keep what their first sequence got.
        tensor_parallel: processes that share the model, which torchrun has started.
        copy_gb_s: what ``copy_gb_s`` found; None leaves the floor out.
        acceptance: probability with which each drafted token is assumed to stand, above 0 and up to 1: over noise, and
            with random weights, what drafts and model say means nothing. None compares tokens, as the engine does.
        refresh: of drafts, as of ``LLM``.
    """

    prefill: Any = DENSE
    read: bool = False
    page: int = 128
    seed: int = 0
    outputs: bool = False
    tensor_parallel: int = 1
    copy_gb_s: float | None = None
    acceptance: float | None = None
    refresh: str = "verify"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_page(self.page)
        if self.acceptance is not None and not 0 < self.acceptance <= 1:
            raise ValueError(f"acceptance={self.acceptance}: choose more than 0 and at most 1")


@dataclass(frozen=True)
class Subject:
    """A model, and what it reads.

    Attributes:
        tokenizer: None for random weights.
        text: token ids that prompts are pieces of; None for random tokens.
        draft_model, draft_tokenizer: that draft in runs of ``other``.
    """

    model: Any
    tokenizer: Any = None
    text: Sequence[int] | None = None
    draft_model: Any = None
    draft_tokenizer: Any = None

    def prompts(self, batch: int, tokens: int, seed: int) -> list[list[int]]:
        """One prompt a sequence: consecutive pieces of the text, each with the token that texts begin with if the
        tokenizer puts one there, or random tokens.

        Raises:
            ValueError: the text is too short.
        """
        if self.text is None:
            draw, known = torch.Generator().manual_seed(seed), self.model.get_input_embeddings().num_embeddings
            drawn: list[list[int]] = torch.randint(known, (batch, tokens), generator=draw).tolist()
            return drawn
        if len(self.text) < batch * tokens:
            raise ValueError(
                f"the text has {len(self.text):,} tokens, and {batch} x {tokens:,} = {batch * tokens:,} are needed:"
                " take a longer text, or fewer or shorter prompts"
            )
        pieces = [list(self.text[i * tokens : (i + 1) * tokens]) for i in range(batch)]
        if self.text[0] == getattr(self.tokenizer, "bos_token_id", None):
            for piece in pieces:
                piece[0] = self.text[0]
        return pieces


@dataclass
class Row:
    """One shape and way of decoding. What was not measured is None, and ``reason`` says why.

    Attributes:
        batch, prefix, generated: sequences, tokens of each one's context, and tokens that each got at least while the
            engine's steps were timed.
        method: of decode; with a draft ``draft=SPEC;gamma=N``, checked by dense attention.
        status: "ok", "out of memory" or "failed".
        reason: also where steps could not be compiled or captured, and are slower for it.
        ttft_s: from handing over all prompts to a sequence's first token, mean over sequences; None for noise.
        step_ms: median time of a step of the model alone, the whole batch; None with a draft.
        ms_per_token: time of the engine's steps over the tokens of all sequences that came of them.
        tokens_per_s: of the whole batch, by the engine's steps with all that they do between two tokens.
        dense_floor_ms: time to read weights and, whatever the method, all keys and values once, at the speed of a copy.
        dense_floor_share: of the step's time; a sparse method may come to more than 1.
        speedup: in tokens a second, over the dense row of the same shape.
        kept_fraction: share of the cached keys that counted steps read, mean over sequences; with a draft, of what
            drafts selected.
        peak_gib: memory at most, weights included; None on a CPU.
        output: the first ``generated`` tokens of the first sequence, if asked for: text, or token ids for random
            weights.
        draft: SPEC of the method that drafts, or of a draft model's cache; this and all below are None where nothing is
            drafted.
        gamma: tokens drafted at a time; None where the engine chooses.
        assumed: probability with which each drafted token was assumed to stand; None where tokens were compared.
        tokens_per_round: that a round gave a sequence, the pass's own included, mean; plain steps are no rounds.
        rounds_share: of the engine's steps, those that were rounds and not plain steps.
        acceptance: accepted tokens over drafted ones that were looked at; after the first wrong one none is.
        accepted_at: by position in a draft, of the drafts whose earlier tokens were all accepted the share whose token
            there was; None where no draft came so far.
        timed_gamma: gamma that all times below are of: where the engine chooses, the one it used most; None where it
            drafted nothing.
        round_ms: engine's time of a round, mean: ``timed_gamma * draft_ms + verify_ms + rest_ms``.
        draft_ms: of a drafted token, median, and ``verify_ms``: of a pass over ``timed_gamma + 1`` tokens, median; both
            timed alone, when the window was over.
        rest_ms: of a round, what is neither: sampling, the host's work.
        model_speedup: what MagicDec's speed model makes of the dense row's ``step_ms``, of ``draft_ms``, ``verify_ms``
            and ``acceptance``.
    """

    batch: int
    prefix: int
    generated: int
    method: str
    status: str = "ok"
    reason: str | None = None
    ttft_s: float | None = None
    step_ms: float | None = None
    ms_per_token: float | None = None
    tokens_per_s: float | None = None
    dense_floor_ms: float | None = None
    dense_floor_share: float | None = None
    speedup: float | None = None
    kept_fraction: float | None = None
    peak_gib: float | None = None
    output: str | None = None
    draft: str | None = None
    gamma: int | None = None
    assumed: float | None = None
    tokens_per_round: float | None = None
    rounds_share: float | None = None
    acceptance: float | None = None
    accepted_at: list[float | None] | None = None
    timed_gamma: int | None = None
    round_ms: float | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None
    rest_ms: float | None = None
    model_speedup: float | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.prefix, self.generated)


class Step(NamedTuple):
    """Of the engine: its time in ms, and how many tokens it drafted, 0 for a plain one."""

    ms: float
    gamma: int


class Window(NamedTuple):
    """Steps of the engine that were timed: seconds in all, tokens of all sequences, and the rounds among the steps."""

    seconds: float
    tokens: int
    steps: list[Step]
    rounds: list[Round]


def measure(
    subject: Subject, setup: Setup, shapes: Sequence[Shape], runs: Sequence[Run], start: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of every shape, the dense one first; what fails is a row with its reason, and the others go on.

    A batch of 0 stands for the largest whose keys, values and side data fit, with the method that needs most.
    """
    runs = [Run(), *(run for run in runs if run != Run())]
    for shape in shapes:
        dense: Row | None = None
        if not shape.batch:
            shape = shape._replace(batch=most_sequences(subject.model, setup, shape, runs))
        for run in runs:
            row = _row(shape, run, setup)
            start(f"{shape}, {row.method}")
            try:
                if not shape.batch:
                    raise torch.OutOfMemoryError("not even one sequence fits")
                _measure(row, subject, setup, run)
                dense = row if run == Run() else dense
                if dense is not None:
                    _compare(row, dense)
            except Exception as error:  # kernels fail in many ways, and one row must not end the others
                row = _row(shape, run, setup)  # without what was measured before
                row.status, row.reason = failure(error)
            let_go(subject.model.device)
            yield row


def _row(shape: Shape, run: Run, setup: Setup) -> Row:
    if not run.drafts:
        return Row(*shape, str(run))
    return Row(*shape, str(run), draft=describe(run.draft), gamma=run.gamma, assumed=setup.acceptance)


def rows_needed(shape: Shape, read: bool, run: Run) -> int:
    """Rows that the longest sequence of a batch may come to, those of untimed steps included."""
    return shape.prefix + _new_tokens(shape, run, 0 if read else None)


def _new_tokens(shape: Shape, run: Run, i: int | None) -> int:
    """Tokens that a sequence may get at most before the window is over, and rows for what is timed then.

    Args:
        i: of prompts that are read, which one it is: earlier ones get tokens while later ones are read, and two in the
            step that reads their own end. None for noise.
    """
    beside = 0 if i is None else 2 + -(-shape.prefix // CHUNK) * (max(1, shape.batch) - 1 - i)
    return (beside + run.warmup + shape.generated) * run.most + AFTER


def most_sequences(model: Any, setup: Setup, shape: Shape, runs: Sequence[Run]) -> int:
    """Sequences of a shape that the memory of a GPU has room for; 1 on a CPU."""
    keepers = [run.keeps_for for run in runs]

    def most(batch: int) -> int:
        new = max(rows_needed(shape._replace(batch=batch), setup.read, run) for run in runs) - shape.prefix
        return least(steps.most_sequences(model, steps.Setup(new, setup.page, setup.seed), shape.prefix, keepers))

    batch = most(1)
    return most(batch) if setup.read and batch > 1 else batch  # the more, the longer the first one gets


# ---- a row ----------------------------------------------------------------------------------------------------------


def _measure(row: Row, subject: Subject, setup: Setup, run: Run) -> None:
    device = subject.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _engine(row.shape, subject, setup, run) as llm:
        accepting = Accepting(setup.acceptance, setup.seed)
        llm._work.accepted = accepting
        if setup.read:
            requests = _read(row.shape, llm, run, subject, setup)
            row.ttft_s = statistics.mean((r.first_token or r.submitted) - r.submitted for r in requests)
        else:
            requests = _noise(row.shape, llm, run, setup)
        window = _window(llm, requests, row.generated, run.warmup, accepting)
        row.tokens_per_s, row.ms_per_token = window.tokens / window.seconds, window.seconds * 1e3 / window.tokens
        row.kept_fraction = _kept(llm)
        if run.drafts:
            _note_rounds(row, llm, window)
        else:
            row.step_ms = _step_ms(llm)
        if setup.outputs:
            tokens = requests[0].text.token_ids[: row.generated]
            row.output = str(tokens) if subject.tokenizer is None else subject.tokenizer.decode(tokens)
        served, row_bytes = llm.served, sum(shape.row_bytes for shape in llm.served.shapes)
        if device.type == "cuda" and not (served.graphed and served.compiled and served._tried <= {*served._graphs}):
            row.reason = "a step could not be compiled or captured, and is slower: the log says why"
    if setup.copy_gb_s is not None:
        row.dense_floor_ms = dense_floor_ms(subject.model, row_bytes, row.shape, setup.copy_gb_s)
        row.dense_floor_share = row.dense_floor_ms / row.step_ms if row.step_ms else None
    if device.type == "cuda":
        row.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30


def _engine(shape: Shape, subject: Subject, setup: Setup, run: Run) -> LLM:
    """An engine with room for all sequences of a shape at once.

    Raises:
        OutOfMemoryError: it has not; says for how many.
    """
    device, rows = subject.model.device, rows_needed(shape, setup.read, run)
    try:
        llm = LLM(
            subject.model,
            prefill=setup.prefill,
            decode=run.method,
            tokenizer=subject.tokenizer,
            max_batch=shape.batch,
            max_length=rows,
            kv_memory=max(0, free_device_bytes(device)) if device.type == "cuda" else None,
            page=setup.page,
            tensor_parallel=setup.tensor_parallel,
            prefill_chunk=CHUNK if setup.read else None,
            seed=setup.seed,
            draft=run.draft,
            gamma=run.gamma,
            draft_model=subject.draft_model if run.other else None,
            draft_tokenizer=subject.draft_tokenizer,
            refresh=setup.refresh if run.drafts else "verify",
        )
    except ValueError as error:
        if str(error).startswith(f"max_length={rows}:"):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
    fit = (llm.slots.pages - 1) // -(-rows // setup.page)
    if fit < shape.batch:
        llm.close()
        raise torch.OutOfMemoryError(f"{fit} of {shape.batch} sequences of {rows:,} tokens fit")
    return llm


def _noise(shape: Shape, llm: LLM, run: Run, setup: Setup) -> list[Request]:
    """Have requests go on with contexts of noise, as if these were their prompts, read, and had given a first token."""
    served, work, rows = llm.served, llm._work, rows_needed(shape, False, run)
    steps.fill(llm.model, llm.slots, served.stores, shape.prefix, rows, served.keeps_for, setup.seed)
    speculate.prepare(llm, run)
    params = SamplingParams(max_new_tokens=rows - shape.prefix, ignore_eos=True)
    for slot in range(shape.batch):
        text = Detokenizer(llm.tokenizer)
        text.add(0)
        request = Request(slot, [0] * shape.prefix, params, text, None, time.perf_counter())
        work.running[slot] = request
        served.meter.begin(slot)
        work.sampler.begin(slot, params, request.prompt)
        served.activate(slot, 0)
    return [work.running[slot] for slot in range(shape.batch)]


def _read(shape: Shape, llm: LLM, run: Run, subject: Subject, setup: Setup) -> list[Request]:
    """Have prompts read one after another; all have been when this returns.

    The first prompt is read before, and a few tokens generated: kernels are compiled, steps and rounds captured.
    """
    prompts = subject.prompts(shape.batch, shape.prefix, setup.seed)
    llm.generate([prompts[0]], SamplingParams(max_new_tokens=WARMUP, ignore_eos=True))
    speculate.prepare(llm, run)
    for i, prompt in enumerate(prompts):
        llm.submit(prompt, SamplingParams(max_new_tokens=_new_tokens(shape, run, i), ignore_eos=True))
    requests = list(llm._work.waiting)
    while not all(request.text.token_ids for request in requests):
        llm.step()
    return requests


def _window(llm: LLM, requests: Sequence[Request], generated: int, warmup: int, accepting: Accepting) -> Window:
    """The engine's steps, after some untimed ones, until every sequence has got so many more tokens."""
    for _ in range(warmup):
        llm.step()
    before, first, timed = [len(request.text.token_ids) for request in requests], len(accepting), list[Step]()

    def came() -> list[int]:
        return [len(request.text.token_ids) - n for request, n in zip(requests, before, strict=True)]

    begin = end = time.perf_counter()  # every step ends with tokens that the host has waited for
    while min(came()) < generated:
        rounds, at = len(accepting), end
        done = llm.step()
        assert not done  # nobody's answer ends before
        end = time.perf_counter()
        timed.append(Step((end - at) * 1e3, accepting.newest_gamma if len(accepting) > rounds else 0))
    return Window(end - begin, sum(came()), timed, accepting.since(first))


def _kept(llm: LLM) -> float | None:
    """Share of the cached keys that counted steps read, by all processes, mean over sequences; None if none was."""
    totals = [llm.served.meter.totals(slot) for slot in sorted(llm._work.running)]
    shares = [Totals(*total(each)).stats().kept_fraction for each in totals]
    known = [share for share in shares if share is not None]
    return statistics.mean(known) if known else None


def _step_ms(llm: LLM) -> float:
    """Median time of a step of the model alone; answers cannot go on afterwards."""
    on_gpu = llm.model.device.type == "cuda"
    times = [timed_ms(lambda: llm.served.step(metered=not on_gpu), on_gpu) for _ in range(1 + TIMES)]
    return statistics.median(times[1:])


def _note_rounds(row: Row, llm: LLM, window: Window) -> None:
    """What came of drafting, and what the parts of a round take."""
    row.rounds_share = len(window.rounds) / len(window.steps)
    row.tokens_per_round = speculate.tokens_per_round(window.rounds)
    row.acceptance = speculate.acceptance(window.rounds)
    row.accepted_at = speculate.accepted_at(window.rounds)
    used = Counter(each.gamma for each in window.rounds).most_common(1)
    if not used:
        return
    row.timed_gamma = gamma = used[0][0]
    row.draft_ms, row.verify_ms = speculate.time_parts(llm, gamma)
    row.round_ms = statistics.mean(step.ms for step in window.steps if step.gamma == gamma)
    row.rest_ms = row.round_ms - gamma * row.draft_ms - row.verify_ms


def _compare(row: Row, dense: Row) -> None:
    """A row with the dense one of its shape."""
    if dense.tokens_per_s and row.tokens_per_s:
        row.speedup = row.tokens_per_s / dense.tokens_per_s
    if dense.step_ms and row.timed_gamma and row.draft_ms and row.verify_ms and row.acceptance is not None:
        parts = speculate.Parts(row.draft_ms, row.verify_ms)
        row.model_speedup = speculate.model_speedup(dense.step_ms, parts, row.timed_gamma, row.acceptance)


# ---- what a step could take at least --------------------------------------------------------------------------------


def copy_gb_s(device: torch.device) -> float:
    """At how many GB/s (1e9 bytes, read and written) a device copies a large tensor; the median of several times."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    to = torch.empty_like(source)

    def copy() -> None:
        to.copy_(source)

    times = [timed_ms(copy, device.type == "cuda") for _ in range(1 + COPIES)][1:]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def weight_bytes(model: Any) -> int:
    """Bytes of all weights that a step reads: a table of embeddings, if it serves nothing else, is not among them."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    total = sum(x.nbytes for x in model.parameters())
    return total if head is not None and head.weight is table else total - table.nbytes


def dense_floor_ms(model: Any, row_bytes: int, shape: Shape, rate_gb_s: float) -> float:
    """Time to read a model's weights once, and keys and values (``row_bytes`` a token) of contexts as long as they are
    on average over the generation."""
    context = shape.prefix + shape.generated / 2
    return (weight_bytes(model) + shape.batch * context * row_bytes) / rate_gb_s / 1e6
