"""The question at the end of a prompt is read as asked for."""

import pytest
import torch

import keysift
from keysift.eval.generate import generate, read_prompt
from keysift.requests import QUESTIONS
from tests.tiny_models import prompt, tiny

NARROW = "streaming:sinks=1,window=4,block=16"
RAGGED = (0, 13, 41)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("tokens", [1, 28])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_dense_methods_give_the_tokens_of_generate_however_the_question_is_read(name, question, tokens, options):
    model, inputs = tiny(name), prompt(70, RAGGED)
    expected = model.generate(**inputs, **GREEDY, **options)
    with keysift.attach(model) as link:
        out = generate(model, link, **inputs, question=question, question_tokens=tokens, **GREEDY, **options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_longer_than_the_prompt_is_all_of_it(question):
    model, inputs = tiny("qwen3"), prompt(30)
    expected = model.generate(**inputs, **GREEDY)
    with keysift.attach(model) as link:
        out = generate(model, link, inputs["input_ids"], None, question, 100, **GREEDY)
    assert torch.equal(out, expected)


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


@pytest.mark.parametrize("question", QUESTIONS)
def test_generate_continues_from_what_read_prompt_read(question):
    """The last token of the prompt is part of the question too: the first new token comes from its logits."""
    model, inputs = tiny("qwen3"), prompt(70)
    methods = {"prefill": NARROW, "decode": "streaming:sinks=1,window=4"}
    logits = last_logits(model, inputs, question, 9, **methods)
    with keysift.attach(model, **methods) as link:
        options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = generate(model, link, **inputs, question=question, question_tokens=9, **options)
        assert link.prefill == keysift.methods.parse(NARROW, "prefill")  # as it was
    assert torch.allclose(out.logits[0], logits, atol=1e-4)


@pytest.mark.parametrize("question", ["dense", "decode"])
def test_new_tokens_are_read_by_the_decode_method(question):
    model, inputs = tiny("qwen3"), prompt(70)
    with keysift.attach(model, decode="streaming:sinks=1,window=4") as link:
        generate(model, link, **inputs, question=question, question_tokens=1, **GREEDY)
        steps = 7 + (question == "decode")  # the last new token is not read
        assert link.meter.queries[1] == steps
        assert link.stats.kept_fraction == pytest.approx(sum(5 / (71 + i) for i in range(7)) / 7, rel=0.1)


def test_batch_equals_one_by_one():
    model, inputs = tiny("qwen3"), prompt(70, RAGGED)
    methods = {"prefill": NARROW, "decode": "magicpig:K=3,L=10,window=8,dense_layers=none"}
    for question in QUESTIONS:
        whole = last_logits(model, inputs, question, 20, **methods)
        for b, pads in enumerate(RAGGED):
            one = {key: value[b : b + 1, pads:] for key, value in inputs.items()}
            assert torch.allclose(last_logits(model, one, question, 20, **methods), whole[b : b + 1], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loud", 3), "question=loud: choose sparse, dense or decode"),
        (("dense", None), "question=dense needs question_tokens=N"),
        (("dense", 0), "question_tokens=0: choose 1 or more"),
        (("decode", 29), "pass them one at a time"),
    ],
)
def test_bad_questions_are_refused(arguments, message):
    model, inputs = tiny("qwen3"), prompt(70, RAGGED)
    with keysift.attach(model) as link, pytest.raises(ValueError, match=message):
        generate(model, link, inputs["input_ids"], inputs["attention_mask"], *arguments, **GREEDY)
