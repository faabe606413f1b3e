"""The engine: many requests through one model, with keys read sparsely."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keysift.checkpoint import chat_text, eos_tokens
from keysift.hf.draft_model import DraftModel, Elsewhere
from keysift.hf.served import ServedModel
from keysift.methods import parse
from keysift.prefixes import Prefixes
from keysift.ranks import Ranks, check_draft_folder, deal_out_once, load_draft
from keysift.requests import Delta, OnText, Request, RequestOutput, check_question
from keysift.sampling import SamplingParams
from keysift.scheduler import Room, Scheduler
from keysift.slots import Slots, check_page
from keysift.speculate import REFRESHES, check_draft, check_refresh
from keysift.text import Detokenizer
from keysift.types import check_seed
from keysift.workers import serve

MAX_BATCH = {"cuda": 16, "cpu": 1}
CHUNK = 2048  # tokens of a prompt that are read at a time where beginnings are shared
NO_DRAFT = "none"
ELSEWHERE = "(of the first process)"  # a draft model, as the others hear of it
COMPILED = 2048  # new tokens of one answer from which on compiling a GPU's steps pays, which takes some 15 seconds
COUNT_EVERY = {"cuda": 64}  # steps; elsewhere every one

Prompt = str | Sequence[int]
PROGRAM = "from keysift.engine import work; work()"  # of the other processes


class LLM:
    """A model that continues any number of prompts, as many at a time as it has slots for.

    A finished answer's slot is given to the next prompt at once. On a GPU a decode step of all slots is one CUDA graph
    of compiled layers. The tokens of a request do not depend on what else is in the batch.

    Attributes:
        model, tokenizer: the tokenizer may be None, for prompts of token ids.
        max_batch: sequences at a time.
        max_length: tokens that a sequence may have, prompt and answer.
        slots: where sequences are.
        prefixes: what prompts may share; None without ``reuse_prefixes``.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        prefill: Any = "dense",
        decode: Any = "dense",
        tokenizer: Any = None,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int | None = None,
        max_length: int | None = None,
        kv_memory: int | None = None,
        page: int = 128,
        prefill_chunk: int | None = None,
        reuse_prefixes: bool = False,
        compile_layers: bool = True,
        tensor_parallel: int | None = None,
        seed: int = 0,
        count_every: int | None = None,
        measure_error: bool = False,
        draft: Any = None,
        gamma: int | None = None,
        draft_model: str | Path | PreTrainedModel | None = None,
        refresh: str = "verify",
        draft_tokenizer: Any = None,
    ) -> None:
        """Load a model and make room for its sequences.

        Args:
            model: folder or hub id of a Hugging Face decoder with safetensors, or a loaded model.
            prefill, decode: SPECs such as "flexprefill:gamma=0.95" and "signbits", or method objects.
            tokenizer: for a loaded model.
            device, dtype: "auto", or where and as what to load the model; not for a loaded one.
            max_batch: sequences at a time; default 16 on a GPU and 1 on a CPU.
            max_length: tokens of a sequence, prompt and answer; default what the model was made for, or what fits.
            kv_memory: bytes for keys, values and side data; default what is free, on a CPU half of that.
            page: rows a page of the cache, a power of two from 16 on.
            prefill_chunk: read prompts so many tokens at a time, with a step of the others after each; default whole
                prompts, with ``reuse_prefixes`` 2,048.
            reuse_prefixes: keep what was read, in whole chunks, for prompts that begin alike. A hit gives what a cold
                run gives, to the bit.
            compile_layers: on a GPU, compile decode steps.
            tensor_parallel: processes that share the model, a GPU each, started here; under torchrun those it has
                started, which all make the same calls. A loaded model is dealt out under torchrun alone.
            seed: of the methods' draws.
            count_every: what is read is counted in each answer's first step, and in one step of so many; default 64 on
                a GPU, where a step that is counted takes a little longer, and 1 on a CPU.
            measure_error: also compute dense attention beside the methods', for ``prefill_error`` and ``decode_error``
                (slow).
            draft: self-speculation: a decode SPEC or method that drafts tokens over the same keys, which one pass over
                all keys then checks; the tokens are those of dense decoding. None drafts nothing.
            gamma: tokens drafted at a time, 1 to 8; None has it chosen as it goes, 0 included.
            draft_model: folder, hub id or loaded model of the same vocabulary that drafts instead. ``draft``, streaming
                or snapkv, then says what its own cache keeps and by ``budget`` how many rows of a sequence, whatever
                the context; default streaming, 1,024 or what it was made for. Of several processes the first has it.
            refresh: "verify" has the draft method select in each round, by the query of the token that the pass before
                gave; "never" once an answer, after which all later rows are read too (MagicDec's; acceptance falls).
            draft_tokenizer: of a loaded draft model; without, as many tokens as the model has are taken for the same.

        Raises:
            ValueError: a model, method, option or size that cannot be served; says what could.
        """
        check_seed(seed)
        check_page(page)
        at_least_one(max_batch=max_batch, max_length=max_length, prefill_chunk=prefill_chunk, count_every=count_every)
        if reuse_prefixes:
            prefill_chunk = prefill_chunk or CHUNK
            if prefill_chunk % page:
                raise ValueError(f"prefill_chunk={prefill_chunk}: with reuse_prefixes, a multiple of page={page}")
        methods = parse(prefill, "prefill"), parse(decode, "decode")
        drafts = None if draft is None else parse(draft, "decode")
        check_shares(reuse_prefixes, methods[1] if drafts is None or draft_model is not None else drafts)
        check_draft(drafts, methods[1], gamma, draft_model is not None)
        check_refresh(refresh, drafts, draft_model is not None)
        if draft_model != ELSEWHERE:
            check_draft_folder(draft_model, drafts)
        self._ranks: Ranks | None = None
        self._drafter: DraftModel | Elsewhere | None = None
        if isinstance(model, (str, Path)):
            options = {name: x for name, x in locals().items() if name in _OF_WORKERS}
            options["draft_model"] = None if draft_model is None else ELSEWHERE
            self._ranks = Ranks(str(model), device, dtype, tensor_parallel, PROGRAM, options)
            self.model, self.tokenizer = self._ranks.model, self._ranks.tokenizer
        elif (tensor_parallel or 1) > 1:
            deal_out_once(model, tensor_parallel)
            self.model, self.tokenizer = model, tokenizer
        else:
            self.model, self.tokenizer = model, tokenizer
        where = self.model.device.type
        self.prefill_chunk, self.max_batch = prefill_chunk, max_batch or MAX_BATCH.get(where, 1)
        every = count_every or COUNT_EVERY.get(where, 1)
        try:
            shared = prefill_chunk if reuse_prefixes else None
            own = drafts if draft_model is None else None
            self.served = ServedModel(self.model, *methods, seed, compile_layers, shared, measure_error, own)
            if draft_model is not None:
                what = draft_model, draft_tokenizer, self.served, self.tokenizer
                self._drafter = load_draft(*what, drafts, dtype, compile_layers)
            room, ends = Room(page, max_length, kv_memory), eos_tokens(self.model, self.tokenizer)
            alone = prefill_chunk, reuse_prefixes, every, gamma, self._drafter, refresh == REFRESHES[0]
            self._work = Scheduler(self.served, room, self.max_batch, ends, *alone)
        except BaseException:
            if hasattr(self, "served"):
                self.served.close()
            if self._drafter is not None:
                self._drafter.close()
            self._end_ranks()
            raise
        self._submitted = 0
        self._generating: set[int] = set()  # requests of calls of `generate`
        self._closed = False

    def _end_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.close()

    def _tell(self, *call: Any) -> None:
        """Have the other processes do what this one is about to."""
        if self._ranks is not None:
            self._ranks.tell(*call)

    def switch(
        self, *, prefill: Any = None, decode: Any = None, draft: Any = None, max_length: int | None = None
    ) -> None:
        """Have the requests that come read by other methods, or give them other room; what is None stays as it is, and
        ``draft="none"`` drafts nothing.

        Raises:
            ValueError: requests are at work, or as when an LLM is made; all but shared prefixes is as it was then.
        """
        self._check_open()
        if self.unfinished:
            raise ValueError(f"switch: {self.unfinished} requests are at work; end them first")
        at_least_one(max_length=max_length)
        methods = (
            self.served.prefill_method if prefill is None else parse(prefill, "prefill"),
            self.served.decode_method if decode is None else parse(decode, "decode"),
        )
        drafts = self.served.draft_method
        if draft is not None and self._drafter is not None:
            raise ValueError(f"switch: draft={draft}: a draft model's cache stays as it is; make another LLM")
        if draft is not None:
            drafts = None if draft == NO_DRAFT else parse(draft, "decode")
        check_shares(self.prefixes is not None, methods[1] if drafts is None else drafts)
        check_draft(drafts, methods[1], None, self._drafter is not None)
        room = self._work.room if max_length is None else self._work.room._replace(max_length=max_length)
        self._tell("follow_switch", *methods, drafts, room)
        try:
            self._work.switch(*methods, drafts, room)
        except ValueError:  # which all processes raise
            raise
        except BaseException as error:
            if self._ranks is not None:
                self._end_others(error)
            raise

    def follow_switch(self, *to: Any) -> None:
        """What a worker does when the first process switches."""
        with contextlib.suppress(ValueError):  # which the first process raises too
            self._work.switch(*to)

    @property
    def max_length(self) -> int:
        return self._work.max_length

    @property
    def slots(self) -> Slots:
        return self._work.slots

    @property
    def prefixes(self) -> Prefixes | None:
        return self._work.prefixes

    # ---- requests ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        on_text: OnText | None = None,
        question: str = "sparse",
        question_tokens: int | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; answers come in the order of the prompts.

        Args:
            prompts: a string or token ids, or several.
            params: for all of them, or one for each; None is greedy, up to 256 tokens or what fits.
            on_text: called with a ``Delta`` whenever an answer grows, whose ``index`` is that of the prompt; where it
                returns False, the answer ends.
            question: how the end of a prompt is read: "sparse", as all of it, by the prefill method; "dense", by dense
                attention; "decode", a token at a time by the decode method.
            question_tokens: how many tokens that end has; all but the first of a shorter prompt.

        Raises:
            ValueError: a prompt that can never fit, or whose tokens the model does not know; nothing has run then.
        """
        self._check_open()
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        several: list[Any] = [prompts] if one else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(several)
        if len(each) != len(several):
            raise ValueError(f"{len(each)} SamplingParams for {len(several)} prompts: pass one, or one for each")
        begin = self._submitted
        tell = None if on_text is None else lambda delta: on_text(replace(delta, index=delta.index - begin))
        how = question, question_tokens
        requests = [self._request(prompt, p, tell, *how) for prompt, p in zip(several, each, strict=True)]
        for request in requests:
            self._submit(request)
        done: dict[int, RequestOutput] = {}
        wanted, of_others = {request.index for request in requests}, list[RequestOutput]()
        self._generating |= wanted
        try:
            while wanted - done.keys():
                for out in self.step():
                    if out.index in wanted:
                        done[out.index] = out
                    else:
                        of_others.append(out)
        except BaseException:
            for request in requests:
                request.on_text = None
                self.abort(request.index)
            raise
        finally:
            self._generating -= wanted
            self._work.done = of_others + [out for out in self._work.done if out.index not in wanted]
        return [replace(done[request.index], index=request.index - begin) for request in requests]

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        params: SamplingParams | None = None,
        *,
        on_text: OnText | None = None,
    ) -> RequestOutput:
        """The next turn of a conversation: messages such as ``{"role": "user", "content": "..."}``, by the model's
        chat template.

        Raises:
            ValueError: no tokenizer, or one without a chat template.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("chat needs a tokenizer with a chat template: pass such a tokenizer=, or use generate")
        ids = self.tokenizer(chat_text(self.tokenizer, messages), add_special_tokens=False).input_ids
        return self.generate([ids], params, on_text=on_text)[0]

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        on_text: OnText | None = None,
        question: str = "sparse",
        question_tokens: int | None = None,
    ) -> int:
        """Add a request for ``step`` to work at; returns its index. Arguments and errors are those of ``generate``."""
        self._check_open()
        request = self._request(prompt, params, on_text, question, question_tokens)
        self._submit(request)
        return request.index

    def follow(self, *request: Any) -> None:
        """What a worker does when a request is submitted to the first process."""
        self._submit(self._request(*request))

    def _submit(self, request: Request) -> None:
        self._tell("follow", request.prompt, request.params, None, request.question, request.question_tokens)
        request.index = self._submitted
        self._submitted += 1
        self._work.waiting.append(request)

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        on_text: OnText | None,
        question: str,
        question_tokens: int | None,
    ) -> Request:
        check_question(question, question_tokens)
        if self.tokenizer is None and (isinstance(prompt, str) or (params and params.stop)):
            raise ValueError("text needs a tokenizer: pass tokenizer=, or token ids and no stop strings")
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else [int(x) for x in prompt]
        if not ids:
            raise ValueError("the prompt has no tokens")
        if not 0 <= min(ids) <= max(ids) < self.served.vocabulary:
            wrong = next(x for x in ids if not 0 <= x < self.served.vocabulary)
            raise ValueError(f"the prompt has token {wrong}, but the model knows {self.served.vocabulary} tokens")
        if params is None:
            params = SamplingParams()
            params = replace(params, max_new_tokens=max(1, min(params.max_new_tokens, self.max_length - len(ids))))
        text = Detokenizer(self.tokenizer, params.stop)
        request = Request(-1, ids, params, text, on_text, time.perf_counter(), question, question_tokens)
        request.meter.measure_error = self.served.measure_error
        if request.rows > self.max_length:
            left = self.max_length - params.max_new_tokens
            raise ValueError(
                f"{len(ids)} prompt tokens and max_new_tokens={params.max_new_tokens} need {request.rows}, and"
                f" sequences may have max_length={self.max_length}: "
                + (f"shorten the prompt to {left} tokens" if left > 0 else "choose fewer new tokens")
                + ", or make the LLM with more"
            )
        return request

    def abort(self, index: int) -> RequestOutput | None:
        """End a request now; its answer so far, or None if it is not at work.

        What ``on_text`` raises is raised again when all is done.
        """
        if self._ranks is None or not self._ranks.broken:
            self._tell("abort", index)
        aborted = self._work.abort(index)
        if aborted is None:
            return None
        request, out, delta = aborted
        if index in self._generating:  # where somebody waits for it
            self._work.done.append(out)
        self._tell_listeners([(request, delta)])
        return out

    @property
    def broken(self) -> str | None:
        """Why nothing can be generated any more, if a process that shared the model is gone."""
        return None if self._ranks is None else self._ranks.broken

    @property
    def unfinished(self) -> int:
        """Requests that are waiting or running, or whose answers ``step`` has not returned yet."""
        return self._work.unfinished

    def close(self) -> None:
        """Give the model back as it was, and the memory; requests that are at work end. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for request in [*self._work.waiting, *self._work.running.values()]:
            request.on_text = None
            self.abort(request.index)
        self.served.close()
        if self._drafter is not None:
            self._drafter.close()
        self._end_ranks()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this LLM is closed: make a new one")

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- work -------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Read a part of a prompt if one waits and a slot is free, and have one more token of every answer; returns
        the answers that were finished."""
        self._check_open()
        self._tell("step")
        work = self._work
        try:
            work.step()
        except BaseException as error:
            work.news.clear()
            if self._ranks is not None:
                self._end_others(error)
            raise
        news, work.news = work.news, []
        self._tell_listeners(news)  # when all is computed: other processes have nobody to listen
        done, work.done = sorted(work.done, key=lambda out: out.index), []
        return done

    def _end_others(self, error: BaseException) -> None:
        """Name the process that died, if one did; else end those that wait for what will not come."""
        assert self._ranks is not None
        if isinstance(error, RuntimeError) and self._ranks.died():
            raise RuntimeError(self._ranks.broken) from error
        self._ranks.give_up()

    def _tell_listeners(self, news: list[tuple[Request, Delta]]) -> None:
        """Call all ``on_text``; what one raises is raised when all were called."""
        wrong: BaseException | None = None
        for request, delta in news:
            try:
                if request.on_text is not None and not request.told_end:
                    request.told_end = delta.finished
                    if request.on_text(delta) is False and not delta.finished:
                        self.abort(request.index)
            except BaseException as error:
                wrong = wrong or error
        if wrong is not None:
            raise wrong


def at_least_one(**values: int | None) -> None:
    """Raise ValueError for a number below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: choose 1 or more")


def check_shares(reuse_prefixes: bool, decode: Any) -> None:
    """Raise ValueError for a decode method whose side data depend on more than what prompts share."""
    if reuse_prefixes and getattr(decode, "mode", None) == "seed":
        raise ValueError("reuse_prefixes and mode=seed, which hashes keys by the mean of the whole prompt: choose one")


def work() -> None:
    """What the processes of ``LLM(tensor_parallel=N)`` run."""
    serve(lambda options: LLM(**options))


_OF_WORKERS = (
    *("model", "prefill", "decode", "device", "dtype", "max_batch", "max_length", "kv_memory", "page"),
    *("prefill_chunk", "reuse_prefixes", "compile_layers", "seed", "count_every", "measure_error", "draft", "gamma"),
    *("draft_model", "refresh"),
)
