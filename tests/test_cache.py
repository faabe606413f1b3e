"""The store: rows in, rows out, whatever happens to the sequences."""

import torch

from keysift.cache import ROOM, Store
from keysift.methods import parse
from keysift.types import Ctx

QUEST = parse("quest:page=4,window=8", "decode")


def rows(n, batch=2, seed=0):
    return torch.randn(batch, 2, n, 6, generator=torch.Generator().manual_seed(seed))


def test_rows_come_back_in_order_through_growth():
    store, parts = Store(), [rows(n, seed=n) for n in (100, 1, ROOM, 3, 5 * ROOM)]
    for part in parts:
        store.append(part, part + 1)
    assert torch.equal(store.keys, torch.cat(parts, 2))
    assert torch.equal(store.values, torch.cat(parts, 2) + 1)
    assert store.view().length.tolist() == [store.length] * 2


def test_there_is_room_for_the_first_step_after_a_prompt_of_any_length():
    for n in (ROOM - 1, ROOM, 4 * ROOM):
        store = Store()
        store.append(rows(n), rows(n))
        address = store.keys.data_ptr()
        store.append(rows(1), rows(1))
        assert store.keys.data_ptr() == address


def test_truncated_rows_are_overwritten():
    store = Store()
    store.append(rows(20), rows(20))
    store.truncate(12)
    store.append(rows(3, seed=1), rows(3, seed=1))
    assert store.length == 15
    assert torch.equal(store.keys, torch.cat([rows(20)[:, :, :12], rows(3, seed=1)], 2))
    store.truncate(99)
    assert store.length == 15


def test_selecting_sequences_takes_everything_along():
    store = Store()
    store.append(rows(60, 3), rows(60, 3))
    store.start = torch.tensor([0, 5, 9])
    store.end_prefill(torch.randn(3, 60, 4, 6), 7)
    ctx = Ctx(0, 1.0, store.view().length)
    before = store.index(QUEST, store.middle(QUEST), ctx)
    store.select(torch.tensor([2, 2, 0, 1]))
    after = store.index(QUEST, store.middle(QUEST), ctx)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(b, a[[2, 2, 0, 1]])
    assert store.start.tolist() == [9, 9, 0, 5]
    assert torch.equal(store.keys, rows(60, 3)[[2, 2, 0, 1]])


def test_the_middle_leaves_out_padding_sinks_and_window():
    store = Store()
    store.append(rows(60), rows(60))
    store.start = torch.tensor([0, 50])
    middle = store.middle(QUEST)
    assert middle.start.tolist()[0] == QUEST.sinks
    assert middle.end.tolist()[0] == 60 - QUEST.window
    assert middle.length.tolist() == [60 - 8 - 4, 0]


def test_another_method_or_seed_builds_side_data_of_its_own():
    store = Store()
    store.append(rows(60), rows(60))
    store.end_prefill(torch.randn(2, 60, 4, 6), 0)
    ctx = Ctx(1, 1.0, store.view().length)
    pig = parse("magicpig:K=3,L=4,window=8", "decode")
    first = store.index(pig, store.middle(pig), ctx)
    assert store.index(pig, store.middle(pig), ctx) is first
    assert not torch.equal(store.index(pig, store.middle(pig), ctx._replace(seed=1)).codes, first.codes)
    assert type(store.index(QUEST, store.middle(QUEST), ctx)) is not type(first)


def test_the_last_queries_of_a_prompt_are_kept_across_chunks():
    store, q = Store(), torch.randn(2, 50, 4, 6)
    method, seen = parse("snapkv:window=8,budget=20", "decode"), []
    for lo, hi in ((0, 30), (30, 47), (47, 50)):
        store.append(rows(hi - lo, seed=lo), rows(hi - lo, seed=lo))
        store.end_prefill(q[:, lo:hi], method.tail)
        seen.append(store.index(method, store.middle(method), Ctx(0, 1.0, store.view().length)))
    whole = Store()
    whole.append(store.keys, store.values)
    whole.end_prefill(q, method.tail)
    assert torch.equal(seen[-1].rows, whole.index(method, whole.middle(method), Ctx(0, 1.0, store.view().length)).rows)
