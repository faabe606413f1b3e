"""``model.generate(custom_generate=keysift.self_speculate)``: self-speculation for plain transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from keysift.engine import COMPILED, LLM
from keysift.requests import Delta
from keysift.sampling import SamplingParams

SETTINGS = {  # the number of each, and what the config calls it
    logits_process.TemperatureLogitsWarper: ("temperature", "temperature"),
    logits_process.TopKLogitsWarper: ("top_k", "top_k"),
    logits_process.TopPLogitsWarper: ("top_p", "top_p"),
    logits_process.MinPLogitsWarper: ("min_p", "min_p"),
    logits_process.RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
}


def self_speculate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generation_config: GenerationConfig | None = None,
    *,
    draft: Any = "streaming:budget=512",
    gamma: int | None = None,
    prefill: Any = "dense",
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor:
    """What ``generate`` calls; its greedy tokens are those of ``generate`` without it, sampled ones have their
    distribution (arXiv:2408.11049).

    Args:
        model: a decoder, not attached.
        input_ids: ``[B, T]``, padded on the left.
        logits_processor, stopping_criteria: those that ``generate`` makes of temperature, top_k, top_p, min_p,
            repetition_penalty, lengths and end tokens.
        generation_config: resolved by ``generate``.
        draft: SPEC of a decode method that drafts.
        gamma: tokens drafted at a time, 1 to 8; None has it chosen.
        prefill: SPEC of how prompts are read.
        streamer: of transformers, for one prompt, which ``generate`` has told it; up to 5.23 it does not pass it on.
        **kwargs: of the model; ``attention_mask``, int64 ``[B, T]``, is 0 for padding.

    Returns:
        Prompts and answers, int64 ``[B, T + new tokens]``, answers padded on the right.

    Raises:
        ValueError: what the engine cannot do: beams, other processors and criteria, a cache that holds something.
    """
    config = generation_config or model.generation_config
    _refuse(config, logits_processor, stopping_criteria, kwargs.get("past_key_values"))
    batch, width = input_ids.shape
    if streamer is not None and batch > 1:
        raise ValueError("self_speculate: a streamer takes one prompt; leave it out")
    given = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if given is None else given
    prompts = [row[keep > 0].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    ends = config.eos_token_id
    params = _params(config, _longest(config, stopping_criteria, width) - width, ends)
    seeds = torch.randint(2**62, (batch,)).tolist()
    each = [SamplingParams(**params, seed=seed) for seed in seeds]

    def stream(delta: Delta) -> None:
        streamer.put(torch.tensor(delta.token_ids))

    new = params["max_new_tokens"]
    room: dict[str, Any] = {"max_batch": batch, "max_length": width + new, "compile_layers": new >= COMPILED}
    with LLM(model, prefill=prefill, draft=draft, gamma=gamma, **room) as llm:
        answers = llm.generate(prompts, each, on_text=None if streamer is None else stream)
    if streamer is not None:
        streamer.end()
    longest = max(len(x.token_ids) for x in answers)
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if isinstance(ends, list) else ends) or 0
    rows = [x.token_ids + [int(pad)] * (longest - len(x.token_ids)) for x in answers]
    return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], 1)


def _refuse(config: GenerationConfig, processors: Any, criteria: Any, cache: Any) -> None:
    wrong = [type(x).__name__ for x in processors if not _says(x, config)]
    wrong += [type(x).__name__ for x in criteria if not _ends(x, config)]
    wrong += [f"{name}={x}" for name in ("num_beams", "num_return_sequences") if (x := getattr(config, name) or 1) != 1]
    wrong += ["return_dict_in_generate"] if config.return_dict_in_generate else []
    wrong += ["past_key_values with tokens in them"] if cache is not None and cache.get_seq_length() else []
    if wrong:
        raise ValueError(f"self_speculate does not take {', '.join(wrong)}: leave that out, or custom_generate")


def _says(processor: Any, config: GenerationConfig) -> bool:
    """Whether the config says what a processor does."""
    ignored = getattr(processor, "prompt_ignore_length", None)  # a tensor is the padding, which we leave out anyway
    if type(processor) not in SETTINGS or isinstance(ignored, int):
        return False
    own, name = SETTINGS[type(processor)]
    return bool(getattr(processor, own) == getattr(config, name, None))


def _ends(criterion: Any, config: GenerationConfig) -> bool:
    """Whether the config says when a criterion ends answers."""
    if isinstance(criterion, EosTokenCriteria):
        ends = config.eos_token_id
        return {*criterion.eos_token_id.tolist()} == {*(ends if isinstance(ends, list) else [ends])}
    return isinstance(criterion, MaxLengthCriteria)


def _longest(config: GenerationConfig, criteria: Any, width: int) -> int:
    """Tokens of a row, the prompt's ``width`` included."""
    known = [x.max_length for x in criteria if isinstance(x, MaxLengthCriteria)]
    if not known and config.max_new_tokens is not None:
        known = [width + config.max_new_tokens]
    if not known and config.max_length is None:
        raise ValueError("self_speculate: how many tokens? give max_new_tokens")
    return int(min(known) if known else config.max_length)


def _params(config: GenerationConfig, new_tokens: int, ends: Any) -> dict[str, Any]:
    """What ``SamplingParams`` is made of."""
    of_all: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "repetition_penalty": config.repetition_penalty or 1.0,
        "stop_token_ids": tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]),
        "ignore_eos": True,  # of the checkpoint: those that are asked for count
    }
    if not config.do_sample:
        return of_all
    sampled = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    given = {name: getattr(config, name, None) for name in sampled}
    return of_all | {name: default if given[name] is None else given[name] for name, default in sampled.items()}
