"""The question at the end of a prompt is read as asked for."""

import pytest
import torch

import keysift
from keysift.eval.questions import read_prompt
from keysift.requests import QUESTIONS
from tests.tiny_models import prompt, tiny

NARROW = "streaming:sinks=1,window=4,block=16"
RAGGED = (0, 13, 41)


def last_logits(model, inputs, question, tokens, **methods):
    with keysift.attach(model, **methods) as link:
        return read_prompt(model, link, **inputs, question=question, question_tokens=tokens)[0]


def test_only_the_context_goes_through_the_prefill_method():
    """Where the question is all of the prompt, none of it does; where it is one token, all the others do."""
    model, inputs = tiny("qwen3"), prompt(70)
    dense = last_logits(model, inputs, "sparse", None)
    sparse = last_logits(model, inputs, "sparse", None, prefill=NARROW)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    whole, last = (last_logits(model, inputs, "dense", n, prefill=NARROW) for n in (70, 1))
    assert torch.allclose(whole, dense, atol=1e-4)
    for other in (dense, sparse):
        assert not torch.allclose(last, other, atol=1e-2)


def test_the_question_is_read_densely_or_by_the_decode_method():
    model, inputs = tiny("qwen3"), prompt(70)
    methods = {"prefill": NARROW, "decode": "streaming:sinks=1,window=4"}
    sparse, dense, decode = (last_logits(model, inputs, how, 9, **methods) for how in QUESTIONS)
    assert not torch.allclose(dense, decode, atol=1e-2)
    assert not torch.allclose(dense, sparse, atol=1e-2)
    assert not torch.allclose(decode, sparse, atol=1e-2)  # the block of the prefill method reaches further back
    everything = last_logits(model, inputs, "decode", 9, prefill=NARROW, decode="streaming:sinks=1,window=70")
    assert torch.allclose(everything, dense, atol=1e-4)


def test_batch_equals_one_by_one():
    model, inputs = tiny("qwen3"), prompt(70, RAGGED)
    methods = {"prefill": NARROW, "decode": "magicpig:K=3,L=10,window=8,dense_layers=none"}
    for question in QUESTIONS:
        whole = last_logits(model, inputs, question, 20, **methods)
        for b, pads in enumerate(RAGGED):
            one = {key: value[b : b + 1, pads:] for key, value in inputs.items()}
            assert torch.allclose(last_logits(model, one, question, 20, **methods), whole[b : b + 1], atol=1e-3)


def test_prompts_that_are_all_question_are_refused_in_a_batch():
    inputs = prompt(70, RAGGED)
    with pytest.raises(ValueError, match="pass them one at a time"):
        last_logits(tiny("qwen3"), inputs, "decode", 29)
