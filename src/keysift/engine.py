"""The engine: many requests through one model, with keys read sparsely."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from keysift.checkpoint import chat_text, context_tokens, eos_tokens
from keysift.hf.parallel import is_dealt_out, least
from keysift.hf.served import ServedModel
from keysift.methods import parse
from keysift.offload import free_bytes, free_device_bytes
from keysift.prefixes import Prefixes
from keysift.ranks import Ranks, deal_out_once
from keysift.requests import Delta, GenerationStats, OnText, Request, RequestOutput
from keysift.sampling import Sampler, SamplingParams, logprobs_of
from keysift.slots import Slots, check_page
from keysift.text import Detokenizer
from keysift.types import check_seed
from keysift.workers import serve

MAX_BATCH = {"cuda": 16, "cpu": 1}
CHUNK = 2048  # tokens of a prompt that are read at a time where beginnings are shared
SPARE_BYTES = 4 << 30  # of a GPU, for what is computed and for what CUDA graphs keep
HOST_SHARE = 0.5  # of free memory, on a CPU
METERED = 256  # on a GPU one step of so many is counted

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

        Raises:
            ValueError: a model, method, option or size that cannot be served; says what could.
        """
        check_seed(seed)
        check_page(page)
        for name, value in (("max_batch", max_batch), ("max_length", max_length), ("prefill_chunk", prefill_chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: choose 1 or more")
        if reuse_prefixes:
            prefill_chunk = prefill_chunk or CHUNK
            if prefill_chunk % page:
                raise ValueError(f"prefill_chunk={prefill_chunk}: with reuse_prefixes, a multiple of page={page}")
        methods = parse(prefill, "prefill"), parse(decode, "decode")
        if reuse_prefixes and getattr(methods[1], "mode", None) == "seed":
            raise ValueError(
                "reuse_prefixes and mode=seed, which hashes keys by the mean of the whole prompt: choose one"
            )
        self._ranks: Ranks | None = None
        if isinstance(model, (str, Path)):
            options = {name: x for name, x in locals().items() if name in _OF_WORKERS}
            self._ranks = Ranks(str(model), device, dtype, tensor_parallel, PROGRAM, options)
            self.model, self.tokenizer = self._ranks.model, self._ranks.tokenizer
        elif (tensor_parallel or 1) > 1:
            deal_out_once(model, tensor_parallel)
            self.model, self.tokenizer = model, tokenizer
        else:
            self.model, self.tokenizer = model, tokenizer
        self.prefill_chunk, self.max_batch = prefill_chunk, max_batch or MAX_BATCH.get(self.model.device.type, 1)
        try:
            self.served = ServedModel(
                self.model, *methods, seed, compile_layers, prefill_chunk if reuse_prefixes else None
            )
            self.max_length = self._make_slots(page, max_length, kv_memory)
        except BaseException:
            if hasattr(self, "served"):
                self.served.close()
            self._end_ranks()
            raise
        self.prefixes = Prefixes(self.slots, prefill_chunk) if reuse_prefixes and prefill_chunk else None
        self.sampler = Sampler(self.max_batch, self.served.vocabulary, self.model.device)
        self._eos = eos_tokens(self.model, self.tokenizer)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}  # by slot, the one that is being read included
        self._reading: int | None = None
        self._submitted = self._steps = 0
        self._done: list[RequestOutput] = []  # which nobody was told of yet
        self._news: list[tuple[Request, Delta]] = []  # likewise, of the step at hand
        self._generating: set[int] = set()  # requests of calls of `generate`
        self._closed = False

    def _end_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.close()

    def _tell(self, *call: Any) -> None:
        """Have the other processes do what this one is about to."""
        if self._ranks is not None:
            self._ranks.tell(*call)

    def _make_slots(self, page: int, max_length: int | None, kv_memory: int | None) -> int:
        """Slots within the memory there is; returns how long sequences may be."""
        device, method = self.model.device, self.served.decode_method
        row = sum(shape.row_bytes for shape in self.served.shapes)
        sides = sum(
            shape.kv_heads * side.token_bytes
            for layer, shape in enumerate(self.served.shapes)
            if layer not in method.dense_layers
            for side in method.sides(shape.dim, shape.dtype).values()
        )
        if kv_memory is None:
            on_gpu = device.type == "cuda"
            free = free_device_bytes(device) if on_gpu else int(HOST_SHARE * free_bytes())
            kv_memory = free - min(SPARE_BYTES, free // 4) if on_gpu else free
        pages = int(kv_memory / (page * (row + sides)))
        pages = least(pages) if is_dealt_out(self.model) else pages
        known = context_tokens(self.model.config)
        wanted = max_length or known or (pages - 1) * page
        per_slot = -(-wanted // page)
        if pages - 1 < per_slot and max_length is not None:
            raise ValueError(
                f"max_length={max_length}: one sequence needs {per_slot * page * (row + sides) / 2**30:.2f} GiB and"
                f" there is room for {max(0, pages - 1) * page:,} tokens; choose less, or more kv_memory"
            )
        per_slot = min(per_slot, pages - 1)
        if per_slot < 1:
            raise ValueError(f"kv_memory={kv_memory}: not even one page of {page} tokens fits")
        self.slots = Slots(self.max_batch, page, per_slot, min(pages, self.max_batch * per_slot + 1), device)
        self.served.open(self.slots)
        return min(wanted, per_slot * page)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; answers come in the order of the prompts.

        Args:
            prompts: a string or token ids, or several.
            params: for all of them, or one for each; None is greedy, up to 256 tokens or what fits.
            on_text: called with a ``Delta`` whenever an answer grows, whose ``index`` is that of the prompt; where it
                returns False, the answer ends.

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
        requests = [self._request(prompt, p, tell) for prompt, p in zip(several, each, strict=True)]
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
            self._done = of_others + [out for out in self._done if out.index not in wanted]
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

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, on_text: OnText | None = None) -> int:
        """Add a request for ``step`` to work at; returns its index. Raises as ``generate``."""
        self._check_open()
        request = self._request(prompt, params, on_text)
        self._submit(request)
        return request.index

    def follow(self, prompt: list[int], params: SamplingParams) -> None:
        """What a worker does when a request is submitted to the first process."""
        self._submit(self._request(prompt, params, None))

    def _submit(self, request: Request) -> None:
        self._tell("follow", request.prompt, request.params)
        request.index = self._submitted
        self._submitted += 1
        self._waiting.append(request)

    def _request(self, prompt: Prompt, params: SamplingParams | None, on_text: OnText | None) -> Request:
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
        request = Request(-1, ids, params, text, on_text, time.perf_counter())
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
        for request in list(self._waiting):
            if request.index == index:
                self._waiting.remove(request)
                return self._aborted(request, None)
        for slot, request in list(self._running.items()):
            if request.index == index:
                return self._aborted(request, slot)
        return None

    def _aborted(self, request: Request, slot: int | None) -> RequestOutput:
        out, delta = self._finish(request, "aborted", slot)
        if request.index in self._generating:  # where somebody waits for it
            self._done.append(out)
        self._tell_listeners([(request, delta)])
        return out

    @property
    def unfinished(self) -> int:
        """Requests that are waiting or running, or whose answers ``step`` has not returned yet."""
        return len(self._waiting) + len(self._running) + len(self._done)

    def close(self) -> None:
        """Give the model back as it was, and the memory; requests that are at work end. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for request in [*self._waiting, *self._running.values()]:
            request.on_text = None
            self.abort(request.index)
        self.served.close()
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
        try:
            self._step()
        except BaseException as error:
            self._news.clear()
            if self._ranks is not None:
                self._end_others(error)
            raise
        news, self._news = self._news, []
        self._tell_listeners(news)  # when all is computed: other processes have nobody to listen
        done, self._done = sorted(self._done, key=lambda out: out.index), []
        return done

    def _step(self) -> None:
        if self._reading is not None or self._admit():
            self._read()
        answering = [slot for slot in self._running if slot != self._reading]
        if answering:
            self._answer(sorted(answering))

    def _end_others(self, error: BaseException) -> None:
        """Name the process that died, if one did; else end those that wait for what will not come."""
        assert self._ranks is not None
        if isinstance(error, RuntimeError) and self._ranks.died():
            raise RuntimeError(self._ranks.broken) from error
        self._ranks.give_up()

    def _admit(self) -> bool:
        """Give the first request that waits a slot, if it fits now."""
        slot = next((s for s in range(self.max_batch) if s not in self._running), None)
        if not self._waiting or slot is None:
            return False
        request, slots = self._waiting[0], self.slots
        pages = -(-request.rows // slots.page)
        if self.prefixes is not None:
            tail = max(1, self.served.decode_method.tail)  # of which the decode method wants to see the queries
            found = self.prefixes.find(request.prompt, len(request.prompt) - tail)
            slots.begin_with(slot, found)  # theirs now, whatever has to make room
            pages -= len(found)
            fits = self.prefixes.make_room(pages)
        else:
            fits = pages <= slots.free_pages
        if not fits:
            slots.free(slot)
            return False
        slots.reserve(slot, request.rows)
        request.reused = slots.lengths[slot]
        self._waiting.popleft()
        self._running[slot], self._reading = request, slot
        self.served.meter.begin(slot)
        self.sampler.begin(slot, request.params, request.prompt)
        return True

    def _read(self) -> None:
        """Read the next part of a prompt; the last gives the first token."""
        slot = self._reading
        assert slot is not None
        request = self._running[slot]
        done = self.slots.lengths[slot]
        end = min(len(request.prompt), done + (self.prefill_chunk or len(request.prompt)))
        last = end == len(request.prompt)
        logits = self.served.read(slot, request.prompt[done:end], request.meter, last)
        if not last:
            return
        self._reading = None
        if self.prefixes is not None:
            self.prefixes.keep(slot, request.prompt)
        token = self.sampler.tokens(logits[None], [slot], [0])
        self.served.activate(slot, token[0])
        self._take([slot], token.tolist(), logits[None])

    def _answer(self, slots: list[int]) -> None:
        """A decode step."""
        on_cpu = self.model.device.type == "cpu"
        self.served.step(metered=on_cpu or self._steps % METERED == 0)
        self._steps += 1
        requests = [self._running[slot] for slot in slots]
        asked = any(not r.params.greedy or r.params.logprobs is not None for r in requests)
        logits = self.served.logits[slots] if asked else None
        if logits is not None and any(not r.params.greedy for r in requests):
            tokens = self.sampler.tokens(logits, slots, [len(r.text.token_ids) for r in requests])
            self.served.ids[slots, 0] = tokens
            known = tokens.tolist()
        else:
            all_known = self.served.ids[:, 0].tolist()
            known = [all_known[slot] for slot in slots]
        self._take(slots, known, logits)

    def _take(self, slots: list[int], tokens: list[int], logits: Tensor | None) -> None:
        """Give requests their new tokens, and end those whose last ones these are."""
        now = time.perf_counter()
        for i, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            request = self._running[slot]
            request.first_token = request.first_token or now
            request.last_token = now
            if request.params.logprobs is not None and logits is not None:
                request.logprobs.append(logprobs_of(logits[i], token, request.params.logprobs))
            new = request.text.add(token)
            reason = self._reason(request, token)
            if reason is None:
                self._news.append((request, Delta(request.index, new, [token], False)))
            else:
                out, delta = self._finish(request, reason, slot, new)
                self._done.append(out)
                self._news.append((request, delta))

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

    def _reason(self, request: Request, token: int) -> str | None:
        """Why an answer ends with a token, if it does."""
        params = request.params
        if request.text.stopped or token in params.stop_token_ids:
            return "stop"
        if token in self._eos and not params.ignore_eos:
            return "eos"
        return "length" if len(request.text.token_ids) >= params.max_new_tokens else None

    def _finish(self, request: Request, reason: str, slot: int | None, new: str = "") -> tuple[RequestOutput, Delta]:
        """Let go of a request's slot; what came of it, and the last of its text."""
        new += request.text.end()
        kept = None
        if slot is not None:
            kept = self.served.meter.kept(slot)
            self.served.deactivate(slot)
            self.sampler.end(slot)
            self.slots.free(slot)
            del self._running[slot]
            if self._reading == slot:
                self._reading = None
        ids = request.text.token_ids
        came = ids[-1:] if reason != "aborted" else []
        ttft, rate = None, None
        if request.first_token is not None and request.last_token is not None:
            ttft, seconds = request.first_token - request.submitted, request.last_token - request.first_token
            rate = (len(ids) - 1) / seconds if seconds > 0 else None
        density = request.meter.stats().density
        stats = GenerationStats(len(request.prompt), len(ids), request.reused, ttft, rate, density, kept)
        logprobs = None if request.params.logprobs is None else request.logprobs
        out = RequestOutput(request.index, request.text.text, ids, reason, logprobs, stats)
        return out, Delta(request.index, new, came, True)


def work() -> None:
    """What the processes of ``LLM(tensor_parallel=N)`` run."""
    serve(lambda options: LLM(**options))


_OF_WORKERS = (
    *("model", "prefill", "decode", "device", "dtype", "max_batch", "max_length", "kv_memory", "page"),
    *("prefill_chunk", "reuse_prefixes", "compile_layers", "seed"),
)
