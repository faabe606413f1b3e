"""The main job on the shipped model and document: sparse methods answer what dense answers, and read less."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keysift
from keysift import pocket

pytestmark = pytest.mark.slow
RUNS = {
    "dense": ("dense", "dense"),
    "flexprefill": ("flexprefill", "dense"),
    "magicpig": ("dense", "magicpig"),
    "both": ("flexprefill", "magicpig"),
    "both-seed": ("flexprefill:mode=seed", "magicpig:mode=seed"),
    "topk": ("dense", "topk:keep=0.02"),
}


@pytest.fixture(scope="module")
def pocket_model():
    folder = pocket.path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("run", RUNS)
def test_the_demo_is_answered_from_fewer_keys(pocket_model, run):
    model, tokenizer = pocket_model
    document = (pocket.path() / "demo.txt").read_text(encoding="utf-8")
    item = json.loads((pocket.path() / "demo.json").read_text(encoding="utf-8"))[0]
    inputs = tokenizer(document + item["question"], return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 8192
    prefill, decode = RUNS[run]
    with keysift.attach(model, prefill=prefill, decode=decode) as sift:
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert item["answer"] in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert (sift.stats.prefill_density < 0.9) == (prefill != "dense")
    assert (sift.stats.kept_fraction < 0.4) == (decode != "dense")


def test_a_method_that_cannot_see_the_answer_does_not_give_it(pocket_model):
    """The check above can fail: sinks and a window hold no needle."""
    model, tokenizer = pocket_model
    document = (pocket.path() / "demo.txt").read_text(encoding="utf-8")
    item = json.loads((pocket.path() / "demo.json").read_text(encoding="utf-8"))[0]
    inputs = tokenizer(document + item["question"], return_tensors="pt")
    streaming = "streaming:sinks=4,window=128"
    with keysift.attach(model, prefill=streaming, decode=streaming):
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert item["answer"] not in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
