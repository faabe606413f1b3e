"""``keysift bench steps``: a model's decode steps, counted and timed."""

import pytest
import torch

from keysift.bench import first_token, steps
from keysift.bench.layers import Shape
from keysift.methods import describe, parse

QUEST = parse("quest:keep=0.2,dense_layers=none", "decode")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return first_token.random_model("tiny", 400, CPU, torch.float32).model


def measured(model, shapes, methods, **setup):
    return list(steps.measure(model, steps.Setup(steps=3, page=16, **setup), shapes, methods, lambda _: None))


def test_rows_say_how_fast_the_batch_is_beside_dense(model):
    rows = measured(model, [Shape(2, 200), Shape(0, 100)], [QUEST])
    assert [(r.batch, r.context, r.method, r.status) for r in rows] == [
        (batch, context, method, "ok")
        for batch, context in ((2, 200), (1, 100))
        for method in ("dense", describe(QUEST))
    ]
    for dense, quest in (rows[:2], rows[2:]):
        assert quest.tokens_per_s == pytest.approx(quest.batch * 1e3 / quest.step_ms)
        assert (dense.speedup, quest.speedup) == (1, pytest.approx(dense.step_ms / quest.step_ms))
        assert (dense.side_share, quest.side_share) == (0, pytest.approx(1 / 16))


def test_contexts_hold_noise_and_their_side_data(model):
    cache = steps.filled(model, steps.Setup(steps=3, page=16), 2, 200, QUEST)
    assert cache.slots.lengths == cache.slots.prompts == [200, 200]
    assert all(float(store.k[1:].std()) == pytest.approx(1, abs=0.02) for store in cache.stores)
    bounds = cache.stores[0]._index["bounds"]
    page = int(cache.slots.table[1, 3])
    assert torch.equal(bounds[page, :, 0, 0], cache.stores[0].k[page].amin(0))


def test_what_fails_is_a_row_and_the_others_go_on(model, monkeypatch):
    def broken(self, *args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(type(QUEST), "select", broken)
    rows = measured(model, [Shape(1, 200)], [QUEST, parse("streaming:window=20", "decode")])
    assert [r.status for r in rows] == ["ok", "failed", "ok"]
    assert "no such luck" in rows[1].reason
