"""``keysift generate``: continue a prompt with sparse attention, and say what it cost."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
from rich.console import Console
from typer import Exit
from typer import Option as option

import keysift
from keysift import pocket
from keysift.checkpoint import encode, load, pick_device, pick_dtype
from keysift.cli import options
from keysift.cli.models import open_llm
from keysift.cli.prompt import new_tokens_allowed, read_prompt
from keysift.cli.stream import Stream, prefill_bar, stop_between_tokens
from keysift.engine import COMPILED
from keysift.hf.attach import KV_DEVICES
from keysift.methods import parse
from keysift.offload import SELECT_DEVICES
from keysift.sampling import SamplingParams
from keysift.speculate import check_draft, check_refresh
from keysift.types import one_of

DEFAULT_NEW_TOKENS = 256
INTERRUPTED = 130  # the shell's code for a process that Ctrl-C ended


class Generation(NamedTuple):
    """What came out, and what it took."""

    text: str
    token_ids: list[int]
    stats: dict[str, float | int | None]
    interrupted: bool


def command(
    dash: options.Dash = None,
    model: options.Model = None,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    prefill: options.Prefill = "dense",
    decode: Annotated[str, option(metavar="SPEC", help="How new tokens read the past, likewise.")] = "dense",
    draft: options.Draft = None,
    gamma: options.Gamma = None,
    draft_model: options.DraftModel = None,
    refresh: options.Refresh = "verify",
    max_new_tokens: Annotated[
        int | None, option(metavar="N", show_default=f"{DEFAULT_NEW_TOKENS}, or what fits", help="When to stop.")
    ] = None,
    temperature: Annotated[float, option(metavar="T", help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[float, option(metavar="P", help="Sample from the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, option(metavar="N", help="Sample from the likeliest N tokens; 0 for all.")] = 0,
    min_p: Annotated[
        float, option(metavar="P", help="Sample from tokens at least this share as probable as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None, option(metavar="R", show_default="the model's, or 1", help="Make tokens seen before less likely.")
    ] = None,
    stop: Annotated[list[str] | None, option(metavar="TEXT", help="End before this text; may be repeated.")] = None,
    seed: Annotated[int, option(metavar="N", help="For sampling, and for methods that draw.")] = 0,
    chat: options.Chat = False,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    kv_device: Annotated[
        str, option(metavar="gpu|cpu", help="Where keys and values are: with the model, or in host memory.")
    ] = "gpu",
    host_memory: Annotated[
        float | None, option(metavar="GIB", show_default="what is free", help="What they may take there.")
    ] = None,
    select_device: Annotated[
        str, option(metavar="D", help="Where rows of host memory are selected: gpu, cpu or auto.")
    ] = "auto",
    tensor_parallel: options.TensorParallel = None,
    prefill_chunk: Annotated[int | None, option(metavar="N", help="Read the prompt N tokens at a time.")] = None,
    as_json: Annotated[bool, option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Continue a prompt. The text goes to standard output as it comes, all else to standard error."""
    methods = {"prefill": parse(prefill, "prefill"), "decode": parse(decode, "decode")}
    other = draft_model is not None
    drafts = None if draft is None else parse(draft, "decode")
    check_draft(drafts, methods["decode"], gamma, other)
    check_refresh(refresh, drafts, other)
    choice = sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, max_new_tokens)
    check_range("prefill_chunk", prefill_chunk, 1)
    one_of("kv_device", kv_device, KV_DEVICES)
    if kv_device == "cpu":
        refuse_beside_host(stop=stop, draft=draft, draft_model=draft_model, tensor_parallel=tensor_parallel)
    one_of("select_device", select_device, SELECT_DEVICES)
    if host_memory is not None and not 0 < host_memory < math.inf:
        raise ValueError(f"host_memory={host_memory}: choose more than 0, in GiB")
    text = read_prompt(prompt, prompt_file, dash)
    console, show = Console(stderr=True), no_text if as_json else write
    if kv_device == "cpu":
        where = pick_device(device)
        with console.status("Loading the model"):
            lm, tokenizer = load(str(pocket.path()) if model is None else model, where, pick_dtype(dtype, where))
        inputs = encode(tokenizer, text, chat, lm.get_input_embeddings().num_embeddings)
        allowed = new_tokens_allowed(lm.config, inputs["input_ids"].shape[-1], max_new_tokens, DEFAULT_NEW_TOKENS)
        limit = None if host_memory is None else max(1, int(host_memory * 2**30))
        arguments = {
            **{key: value.to(where) for key, value in inputs.items()},
            **as_transformers(choice),
            "prefill_chunk_size": prefill_chunk,
            "max_new_tokens": allowed,
        }
        torch.manual_seed(seed)
        on_host: dict[str, Any] = {"kv_device": "cpu", "host_memory": limit, "select_device": select_device}
        with keysift.attach(lm, **methods, seed=seed, **on_host) as attachment:
            out = run_attached(lm, tokenizer, arguments, attachment, console, show)
    else:
        compiles = (max_new_tokens or DEFAULT_NEW_TOKENS) >= COMPILED
        room: dict[str, Any] = {"max_batch": 1, "max_length": 1, "prefill_chunk": prefill_chunk}  # the prompt says more
        methods |= {"draft": draft, "gamma": gamma, "draft_model": draft_model, "refresh": refresh}
        how: dict[str, Any] = {**methods, "device": device, "dtype": dtype, "compile_layers": compiles, "seed": seed}
        with open_llm(model, console, tensor_parallel, **room, **how) as llm:
            known = llm.model.get_input_embeddings().num_embeddings
            ids = encode(llm.tokenizer, text, chat, known)["input_ids"][0].tolist()
            allowed = new_tokens_allowed(llm.model.config, len(ids), max_new_tokens, DEFAULT_NEW_TOKENS)
            if repetition_penalty is None:
                penalty = getattr(llm.model.generation_config, "repetition_penalty", None) or 1.0
                choice = replace(choice, repetition_penalty=penalty)
            llm.switch(max_length=len(ids) + allowed)
            out = run(llm, ids, replace(choice, max_new_tokens=allowed), console, show)
    if as_json:
        print(json.dumps(out._asdict()))
    else:
        console.print(closing_line(out), highlight=False, soft_wrap=True)
    if out.interrupted:
        raise Exit(INTERRUPTED)


def refuse_beside_host(**options: Any) -> None:
    """Raise ValueError for what the engine alone does."""
    for name, value in options.items():
        if value not in (None, []):
            raise ValueError(f"--{name.replace('_', '-')}: not with --kv-device cpu")


def check_range(name: str, value: int | None, low: int, high: float = math.inf) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name}={value}: choose {low} or more" + (f", up to {high}" if high < math.inf else ""))


def sampling(
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float | None,
    seed: int,
    stop: list[str] | None,
    max_new_tokens: int | None,
) -> SamplingParams:
    """The options checked, each by its own name."""
    given: dict[str, Any] = {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
    given |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=tuple(stop or ()), **given
    )


def as_transformers(params: SamplingParams) -> dict[str, Any]:
    """Arguments of ``generate()``; what they do not name stays as the model's own generation config has it."""
    arguments: dict[str, Any] = {"num_beams": 1, "do_sample": params.temperature > 0}
    if params.repetition_penalty != 1:
        arguments["repetition_penalty"] = params.repetition_penalty
    if params.temperature > 0:
        arguments |= {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return arguments


def run(
    llm: keysift.LLM,
    ids: list[int],
    params: SamplingParams,
    console: Console,
    write: Callable[[str], None],
) -> Generation:
    """Generate, with a bar over prefill and the text as it comes; Ctrl-C ends it early and keeps what there is."""
    chunks, interrupted = math.ceil(len(ids) / (llm.prefill_chunk or len(ids))), False
    with prefill_bar(llm.model, len(ids), chunks, console) as end_bar:
        stream = Stream(None, write, on_first_token=end_bar)
        index, done = llm.submit(ids, params, stream.take), list[keysift.RequestOutput]()
        try:
            with stop_between_tokens(stream):
                while not done:
                    done = llm.step()
        except KeyboardInterrupt:
            interrupted = True
            done = [x for x in [llm.abort(index)] if x is not None]
    out = done[0]
    if out.text and not out.text.endswith("\n"):
        write("\n")
    stats = {
        "ttft_s": out.stats.ttft_s,
        "tokens_per_s": out.stats.tokens_per_s,
        "prefill_density": out.stats.prefill_density,
        "kept_fraction": out.stats.kept_fraction,
        "accepted_per_round": out.stats.accepted_per_round,
        "prompt_tokens": len(ids),
        "new_tokens": len(out.token_ids),
    }
    return Generation(out.text, out.token_ids, stats, interrupted)


def run_attached(
    lm: Any,
    tokenizer: Any,
    arguments: dict[str, Any],
    attachment: keysift.Attachment,
    console: Console,
    write: Callable[[str], None],
) -> Generation:
    """The same by transformers' ``generate()``, which keys and values in host memory need."""
    prompt_tokens = arguments["input_ids"].shape[-1]
    chunks = math.ceil(prompt_tokens / (arguments["prefill_chunk_size"] or prompt_tokens))
    interrupted = False
    start = time.perf_counter()
    with prefill_bar(lm, prompt_tokens, chunks, console) as end_bar:
        stream = Stream(tokenizer, write, on_first_token=end_bar)
        try:
            with stop_between_tokens(stream):
                lm.generate(**arguments, streamer=stream)
        except KeyboardInterrupt:
            interrupted = True
    stream.end()
    text = stream.text
    if text and not text.endswith("\n"):
        write("\n")
    measured = attachment.stats
    stats = {
        **stream.speed(start),
        "prefill_density": measured.prefill_density,
        "kept_fraction": measured.kept_fraction,
        "accepted_per_round": None,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(stream.token_ids),
    }
    return Generation(text, stream.token_ids, stats, interrupted)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def no_text(text: str) -> None:
    """In place of `write`: the JSON object carries the text."""


def closing_line(out: Generation) -> str:
    stats = out.stats

    def show(key: str, form: str) -> str:
        return "n/a" if stats[key] is None else form.format(stats[key])

    parts = [
        f"{stats['prompt_tokens']:,} prompt tokens, {stats['new_tokens']:,} new",
        f"first token after {show('ttft_s', '{:.2f} s')}",
        f"{show('tokens_per_s', '{:.1f}')} tokens/s",
        f"prefill density {show('prefill_density', '{:.3f}')}",
        f"kept fraction {show('kept_fraction', '{:.3f}')}",
    ]
    if stats["accepted_per_round"] is not None:
        parts.append(f"{stats['accepted_per_round']:.2f} drafted tokens accepted a round")
    return "; ".join((["interrupted"] if out.interrupted else []) + parts)
