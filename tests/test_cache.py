"""The store: rows in, rows out, whatever happens to the sequences."""

import torch

from keysift.cache import ROOM, Store
from keysift.methods import parse
from keysift.types import Ctx

QUEST = parse("quest:page=4,window=8", "decode")
Q = torch.randn(2, 4, 6)


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
    store.slots.pad([0, 5, 9])
    store.end_prefill(torch.randn(3, 60, 4, 6), 7)
    ctx = Ctx(0, 1.0, store.view().length)
    before = {**store.index(QUEST, Q, ctx)}
    store.select(torch.tensor([2, 2, 0, 1]))
    after = store.index(QUEST, Q, ctx)
    for name in before:
        assert torch.equal(after[name], before[name][[2, 2, 0, 1]])
    assert store.slots.start.tolist() == store.slots.starts == [9, 9, 0, 5]
    assert torch.equal(store.keys, rows(60, 3)[[2, 2, 0, 1]])


def test_the_middle_leaves_out_padding_sinks_and_window():
    store = Store()
    store.append(rows(60), rows(60))
    store.slots.pad([0, 50])
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
    first = store.index(pig, Q, ctx)
    assert store.index(pig, Q, ctx) is first
    assert not torch.equal(store.index(pig, Q, ctx._replace(seed=1))["planes"], first["planes"])
    assert store.index(QUEST, Q, ctx).keys() != first.keys()


def test_the_last_queries_of_a_prompt_are_kept_across_chunks():
    store, q = Store(), torch.randn(2, 50, 4, 6)
    method, seen = parse("snapkv:window=8,budget=20", "decode"), []
    for lo, hi in ((0, 30), (30, 47), (47, 50)):
        store.append(rows(hi - lo, seed=lo), rows(hi - lo, seed=lo))
        store.end_prefill(q[:, lo:hi], method.tail)
        seen.append(store.index(method, q[:, -1], Ctx(0, 1.0, store.view().length)))
    whole = Store()
    whole.append(store.keys, store.values)
    whole.end_prefill(q, method.tail)
    assert torch.equal(seen[-1]["rows"], whole.index(method, q[:, -1], Ctx(0, 1.0, store.view().length))["rows"])


def test_queries_of_an_earlier_turn_do_not_pass_for_the_last_of_the_prompt():
    """Generated tokens lie between two turns: only the new turn's queries are the prompt's last rows."""
    store, q = Store(), torch.randn(2, 40, 4, 6)
    store.append(rows(30), rows(30))
    store.end_prefill(q[:, :30], 8)
    store.append(rows(4), rows(4))  # generated
    store.append(rows(3), rows(3))
    store.end_prefill(q[:, 30:33], 8)
    assert torch.equal(store._tail, q[:, 30:33])
    store.append(rows(7), rows(7))
    store.end_prefill(q[:, 33:], 8)
    assert torch.equal(store._tail, q[:, 32:])


def test_the_kept_queries_do_not_hold_the_whole_prompts_memory():
    store = Store()
    store.append(rows(500), rows(500))
    store.end_prefill(torch.randn(2, 500, 4, 6), 8)
    assert store._tail.untyped_storage().nbytes() == 2 * 8 * 4 * 6 * 4


def test_a_store_filled_in_inference_mode_works_outside_of_it():
    pig = parse("magicpig:K=3,L=4,window=8", "decode")
    for method in (QUEST, pig):
        store, ctx = Store(), Ctx(1, 1.0, torch.tensor([60, 60]))
        with torch.inference_mode():
            store.append(rows(60), rows(60))
            store.end_prefill(torch.randn(2, 60, 4, 6), 0)
            store.index(method, Q, ctx)
        for _ in range(3):
            store.append(rows(1), rows(1))
            store.index(method, Q, ctx)
        store.append(rows(2000), rows(2000))
        store.index(method, Q, ctx)


def test_rows_that_no_prefill_wrote_are_prompt_but_the_newest():
    store, snapkv = Store(), parse("snapkv:window=8,budget=20", "decode")
    store.append(rows(60), rows(60))
    assert store.middle(snapkv).end.tolist() == [59 - 8] * 2
