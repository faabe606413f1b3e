"""Caches that take turns, and the steps that read them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from keysift.bench import layers
from keysift.bench.inputs import structured_qkv
from keysift.bench.layers import Inputs, Layers, NoGraph, Setup, Shape
from keysift.methods import parse

SETUP = Setup(4, 2, 32, torch.float32, torch.device("cpu"), page=32, steps=2)
QUEST, MAGICPIG = (parse(spec, "decode") for spec in ("quest", "magicpig:K=4,L=10"))


def test_caches_take_turns_with_the_same_rows_in_places_of_their_own():
    stack = Layers(SETUP, Inputs.make(SETUP, Shape(2, 100), 1), QUEST)
    stack.add()
    first, second = stack.step(1)
    assert torch.equal(first, second)
    a, b = stack.stores
    assert a.k.data_ptr() != b.k.data_ptr() and a._index["bounds"].data_ptr() != b._index["bounds"].data_ptr()
    assert torch.equal(a.k, b.k) and torch.equal(a._index["bounds"], b._index["bounds"])
    assert stack.slots.lengths == [101, 101]
    assert torch.equal(a.view().unpaged().k[:, 100:101], stack.inputs.k[:, 101:102])  # the row of step 1


def test_caches_have_hash_directions_of_their_own():
    stack = Layers(SETUP, Inputs.make(SETUP, Shape(1, 100), 1), MAGICPIG)
    stack.add()
    first, second = (store._index["w"] for store in stack.stores)
    assert first.shape == second.shape and not torch.equal(first, second)


def test_sequences_have_seeds_of_their_own_and_steps_follow_the_prompt():
    inputs = Inputs.make(dataclasses.replace(SETUP, seed=5), Shape(2, 90), 7)
    for b in range(2):
        q, k, v = structured_qkv(92, 4, 2, 32, seed=5 + b, dtype=torch.float32)
        assert torch.equal(inputs.k[b], k[0]) and torch.equal(inputs.v[b], v[0])
        assert torch.equal(inputs.prompt_q[b], q[0, 83:90])
        for step in range(2):
            assert torch.equal(inputs.query(step)[b], q[0, 90 + step])
            assert torch.equal(inputs.newest(step)[0][b, 0], k[0, 90 + step])


def test_a_repeated_step_begins_again_when_the_cache_is_full():
    stack = Layers(SETUP, Inputs.make(SETUP, Shape(1, 100), 1), QUEST)
    stack.limit = 103
    once = stack.recorded()
    outs = [once()[0] for _ in range(7)]
    assert all(torch.equal(outs[i], outs[i + 3]) for i in range(4))
    assert not torch.equal(outs[0], outs[1])
    assert stack.slots.lengths == [101]


def test_waiting_is_found_out_before_the_capture(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run(message):
        raise RuntimeError(message)

    with pytest.raises(NoGraph, match="waits for the device"):
        layers._refuse_waiting(lambda: run("called a synchronizing CUDA operation"))
    with pytest.raises(RuntimeError, match="too hot"):
        layers._refuse_waiting(lambda: run("too hot"))
    layers._refuse_waiting(lambda: None)
    assert modes == ["error", "default"] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads=5"),
        ({"dim": 30}, "dim=30"),
        ({"page": 8}, "page=8"),
        ({"page": 48}, "page=48"),
        ({"draws": 0}, "draws=0"),
        ({"steps": 0}, "steps=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"inputs": "real"}, "structured or random"),
        ({"dtype": torch.float64}, "float64"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_setups_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SETUP, **changes)


def test_flatter_queries_are_put_back():
    half = dataclasses.replace(SETUP, dtype=torch.float16)
    stack = Layers(half, Inputs.make(half, Shape(1, 100), 1), QUEST)
    q = stack.inputs.q.clone()
    with stack.flatter():
        assert torch.equal(stack.inputs.q, q / 16)
    assert torch.equal(stack.inputs.q, q)
