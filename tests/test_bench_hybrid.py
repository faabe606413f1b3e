"""The hybrid benchmark: what it calls busy, what it says fits, and what it refuses."""

import pytest
import torch

from keysift.bench import first_token, hybrid
from keysift.hf.hybrid import Span
from keysift.methods import parse

METHOD = parse("signbits:keep=0.1,dense_below=0", "decode")


@pytest.fixture(scope="module")
def model():
    return first_token.random_model("tiny", 1000, torch.device("cpu"), torch.float32).model


def test_a_side_is_busy_while_any_of_its_spans_lasts():
    spans = [
        Span(0, 0, "gpu", 0.0, 1.0),
        Span(1, 0, "gpu", 0.5, 2.0),
        Span(0, 0, "cpu", 1.0, 4.0),
        Span(1, 0, "cpu", 3.0, 3.5),
        Span(0, None, "gpu", 6.0, 8.0),
    ]
    assert hybrid.busy(spans) == pytest.approx((4 / 8, 3 / 8))


def test_as_many_sequences_as_the_memory_holds(model):
    setup = hybrid.Setup(METHOD, 500, host_memory=10_000_000)
    row = 2 * 32 * 4 + METHOD.sides(32, torch.float32)["codes"].token_bytes + 2  # keys and values, codes and a size
    assert hybrid.most_sequences(model, setup) == int(10_000_000 / (2 * 2 * (500 + setup.room) * row))


def test_parts_of_a_batch_hold_noise_and_are_as_large_as_each_other(model):
    setup = hybrid.Setup(METHOD, 300, 5, batches=2)
    row = next(iter(hybrid.measure(model, setup, hybrid.Traced(), lambda _: None)))
    assert (row.status, row.batch, row.context) == ("ok", 5, 300) and row.fill_s > 0
    with hybrid.attach(model, decode=METHOD, kv_device="cpu"):
        parts = hybrid.filled(model, setup, 5, hybrid.HostMemory())
    assert [len(ids) for _, ids in parts] == [3, 2]
    for cache, _ in parts:
        for layer in cache.layers:
            assert float(layer.offloaded.host.keys.std()) == pytest.approx(1, abs=0.02)
            assert layer.offloaded.host.slots.prompts == [300] * len(layer.offloaded.host.slots)


def test_tokens_of_graphs_that_differ_are_told(model, monkeypatch):
    monkeypatch.setattr(hybrid, "_as_eager", lambda run: False)
    row = next(iter(hybrid.measure(model, hybrid.Setup(METHOD, 300, 2), hybrid.Traced(), lambda _: None)))
    assert (row.status, row.step_ms) == ("wrong", None) and "other tokens" in row.reason
