"""Measurements of decode: only right results are timed, and what is reported of them is what was read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from keysift import attention
from keysift.bench import decode, layers, prefill
from keysift.bench.inputs import structured_qkv
from keysift.bench.layers import Inputs, Layers, NoGraph, Setup, Shape
from keysift.cache import Store
from keysift.methods import describe, parse, quest, topk
from keysift.ops.gather import gather_attention_reference
from keysift.types import KV, Law, Selection, Side
from tests.helpers import Clock

CPU, CUDA = torch.device("cpu"), torch.cuda.is_available()
SETUP = Setup(4, 2, 32, torch.float32, CPU, page=32, repeats=1, draws=2, steps=2)
TOPK, STREAMING, ORACLE, SNAPKV, QUEST, MAGICPIG, SIGNBITS = (
    parse(spec, "decode")
    for spec in "topk:keep=0.1 streaming:window=32 oracle snapkv:budget=60 quest magicpig:K=4,L=10 signbits".split()
)


@pytest.fixture(autouse=True)
def _two_caches(monkeypatch):
    """As many as it takes for them to take turns."""
    monkeypatch.setattr(decode, "CPU_CACHES", (2, 2))


def measured(methods=(STREAMING,), shapes=((1, 200),), **changes):
    setup = dataclasses.replace(SETUP, **changes)
    return list(decode.measure(setup, [Shape(*s) for s in shapes], methods, lambda _: None))


def of(method, **changes):
    return measured([method], **changes)[2]


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_dense_comes_first_and_everything_is_measured():
    rows = measured([TOPK, STREAMING, parse("dense", "decode")], [(1, 200), (3, 131)])
    names = ["dense", "dense (ours)", "topk:keep=0.1", "streaming:window=32"]
    assert [(r.batch, r.context, r.method) for r in rows] == [(*s, n) for s in ((1, 200), (3, 131)) for n in names]
    parts = ("hash_us", "select_us", "attend_us")
    for row in rows:
        assert (row.status, row.reason, row.peak_mib, row.caches, row.merge_us) == ("ok", None, None, 2, None)
        assert 0 <= row.relative_error < 1e-5
        assert min(row.total_us, row.speedup, row.tb_s, row.bytes_read, row.kept_share) > 0
        assert row.tb_s == pytest.approx(row.bytes_read / row.total_us / 1e6)
        assert row.speedup == pytest.approx(rows[0 if row.batch == 1 else 4].total_us / row.total_us)
        assert all((getattr(row, part) is None) == row.method.startswith("dense") for part in parts)
        assert json.loads(json.dumps(dataclasses.asdict(row))) == dataclasses.asdict(row)
    assert [r.kernel for r in rows] == ["sdpa", None, None, None] * 2
    assert all(r.kept_share == 1 and r.error_mean < 1e-5 for r in rows if r.method.startswith("dense"))
    assert rows[0].bytes_read == 200 * 2 * 2 * 32 * 4


def by_hand(batch, context, steps, choose, sinks, window):
    """What a method that reads ``choose(scores)`` of the middle keeps, by head and step: sets of rows, and errors."""
    kept, errors = [], []
    for b in range(batch):
        q, k, v = (x[0] for x in structured_qkv(context + steps, 4, 2, 32, seed=b, dtype=torch.float32))
        for n in range(context + 1, context + steps + 1):
            for head in range(4):
                score = k[:n, head // 2] @ q[n - 1, head] / 32**0.5
                rows = {*range(sinks), *range(n - window, n)}
                rows |= {sinks + i for i in choose(score[sinks : n - window])}
                some = torch.tensor(sorted(rows))
                out, exact = score[some].softmax(0) @ v[some, head // 2], score.softmax(0) @ v[:n, head // 2]
                kept.append((b, n, head // 2, rows))
                errors.append(float((out - exact).norm() / exact.norm()))
    return kept, torch.tensor(errors)


@pytest.mark.parametrize(
    ("method", "share", "scans"), [(TOPK, 0.1, True), (STREAMING, 0, False)], ids=["topk", "streaming"]
)
@pytest.mark.parametrize(("batch", "context"), [(1, 200), (3, 131)])
def test_what_is_read_and_how_far_off_it_is_as_calculated_by_hand(method, share, scans, batch, context):
    def choose(score):
        return score.topk(int(share * len(score))).indices.tolist() if share else ()

    row = measured([method], [(batch, context)])[2]
    kept, errors = by_hand(batch, context, 2, choose, method.sinks, method.window)
    assert row.keys_per_head == pytest.approx(sum(len(rows) for *_, rows in kept) / len(kept))
    groups: dict[tuple[int, int, int], set[int]] = {}
    for b, n, kv_head, rows in kept:
        groups.setdefault((b, n, kv_head), set()).update(rows)
    assert row.kept_share == pytest.approx(sum(len(r) / n for (_, n, _), r in groups.items()) / len(groups))
    always, row_bytes, steps = method.sinks + method.window, 2 * 32 * 4, 2
    chosen = sum(len(rows) - always for *_, rows in kept) + always * len(groups)
    scanned = sum((n - always) * row_bytes // 2 for _, n, _ in groups) if scans else 0
    assert row.bytes_read == pytest.approx((chosen * row_bytes + scanned) / steps)
    assert row.error_mean == pytest.approx(float(errors.mean()), rel=1e-4, abs=1e-5)
    assert row.error_median == pytest.approx(float(errors.median()), rel=1e-4, abs=1e-5)


def test_side_data_are_compared_with_keys_and_values():
    assert of(STREAMING).side_share == 0
    assert of(QUEST).side_share == pytest.approx(1 / 16)  # two keys of fp32 for 16 keys and 16 values
    layered = Layers(SETUP, Inputs.make(SETUP, Shape(1, 200), 1), QUEST)
    held = sum(x.nbytes for x in layered.stores[0]._index.values())
    assert held / (2 * layered.stores[0].k.nbytes) == pytest.approx(1 / 16)


def test_a_method_that_reads_everything_says_so():
    row = of(parse("topk:keep=1", "decode"))
    assert (row.status, row.reason, row.kept_share) == ("dense", "the method reads all keys", 1)
    assert row.total_us > 0 and row.hash_us is None and row.error_mean < 1e-5


def test_errors_of_methods_that_draw_are_averaged_over_seeds(monkeypatch):
    built = []
    begin = Store.begin

    def spy(self, method, tail_q, ctx, *rest):
        built.append(ctx.seed)
        begin(self, method, tail_q, ctx, *rest)

    monkeypatch.setattr(Store, "begin", spy)
    each = [of(ORACLE, draws=1, seed=s).error_mean for s in (0, 0)]
    assert each[0] == each[1] > 0
    built.clear()
    row = of(ORACLE, draws=3)
    assert built == [0, 0, 0, 1, 2, 0, 0]  # two caches of dense; the draws; again as the first; the second cache
    assert row.error_mean != each[0]
    inputs, errors = Inputs.make(SETUP, Shape(1, 200), 1), []
    for seed in range(3):
        stack = Layers(SETUP, inputs, ORACLE)
        stack.begin(seed)
        errors.append(decode.head_error(torch.stack([stack.step(i)[0] for i in range(2)]), inputs.exact))
    assert row.error_mean == pytest.approx(float(torch.stack(errors).mean()))
    built.clear()
    of(STREAMING, draws=9)
    assert built == [0, 0, 0, 1, 0, 0]  # the second seed gave the same output, so nothing is drawn


def test_the_share_of_errors_within_a_promise():
    assert of(ORACLE, draws=1).within_epsilon is None
    method = parse("verified:epsilon=0.002,risk=0.4,top=0,limit=1", "decode")
    stack = Layers(SETUP, Inputs.make(SETUP, Shape(1, 400), 1), method)
    outs = torch.stack([stack.step(i)[0] for i in range(2)])
    share = float((decode.head_error(outs, stack.inputs.exact) <= 0.002).float().mean())
    assert 0 < share < 1
    assert measured([method], [(1, 400)], draws=1)[2].within_epsilon == pytest.approx(share)


def test_times_are_those_of_the_parts(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(prefill, "time", clock)
    for holder, name, seconds in (
        (quest.Method, "extend", 0.1),
        (quest.Method, "select", 0.2),
        (attention, "gather_attention", 0.4),
    ):
        monkeypatch.setattr(holder, name, clock.slower(getattr(holder, name), seconds))
    row = of(parse("quest:keep=0.2,page=8", "decode"), draws=1, steps=1)
    parts = [row.hash_us, row.select_us, row.attend_us, row.total_us]
    assert parts == pytest.approx([1e5, 2e5, 4e5, 7e5], rel=1e-4)


# ---- what is wrong has no speed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: out * 1.001, "relative error 0.001"),
        (lambda out: out.index_fill(2, torch.tensor([3]), 0), "relative error 1 "),
        (lambda out: out.index_fill(3, torch.tensor([0]), torch.nan), "relative error nan"),
    ],
)
def test_wrong_attention_has_no_speed(monkeypatch, spoil, reason):
    right = attention.gather_attention

    def wrong(*args, **kwargs):
        part = right(*args, **kwargs)
        return part._replace(out=spoil(part.out))

    monkeypatch.setattr(attention, "gather_attention", wrong)
    dense, ours, row = measured([STREAMING])
    assert [r.status for r in (dense, ours)] == ["ok", "ok"]
    assert row.status == "wrong" and reason in row.reason and "above 0.0001" in row.reason
    assert row.total_us is row.hash_us is row.select_us is row.attend_us is row.speedup is row.tb_s is None


def test_attention_without_the_weights_of_the_sample_is_wrong(monkeypatch):
    right = attention.gather_attention
    monkeypatch.setattr(
        attention, "gather_attention", lambda q, kv, rows, *rest, **more: right(q, kv, rows._replace(log_w=None), *rest)
    )
    assert of(ORACLE).status == "wrong"
    assert of(TOPK).status == "ok"


@pytest.mark.parametrize("spoil", [lambda rows: rows * 0 + 100, lambda rows: rows - 90, lambda rows: rows + 150])
def test_a_selection_with_rows_twice_or_outside_is_wrong(monkeypatch, spoil):
    right = topk.Method.select

    def wrong(*args):
        found = right(*args)
        return found._replace(rows=spoil(found.rows))

    monkeypatch.setattr(topk.Method, "select", wrong)
    row = of(TOPK)
    assert (row.status, row.total_us) == ("wrong", None)
    assert row.reason == "a selection has a row twice, or one outside of the middle"


def test_a_wrong_baseline_has_no_speed(monkeypatch):
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(decode.F, "scaled_dot_product_attention", lambda *a, **k: right(*a, **k) * 1.01)
    dense, ours, row = measured()
    assert (dense.status, dense.total_us) == ("wrong", None)
    assert (row.status, row.speedup) == ("ok", None)
    monkeypatch.undo()
    assert ours.relative_error < 1e-5


def test_results_that_differ_between_runs_have_no_speed(monkeypatch):
    right, runs = attention.gather_attention, []

    def noisy(*args, **kwargs):
        runs.append(0)
        part = right(*args, **kwargs)
        return part._replace(out=part.out + 1e-7 * len(runs))

    monkeypatch.setattr(attention, "gather_attention", noisy)
    row = of(STREAMING)
    assert (row.status, row.reason, row.total_us) == ("wrong", "another output than the first time", None)
    assert row.error_mean > 0  # what was right before is told


def test_what_fails_is_a_row_and_the_others_go_on(monkeypatch):
    right = layers.structured_qkv

    def small_memory(tokens, *args, **kwargs):
        if tokens > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")
        return right(tokens, *args, **kwargs)

    monkeypatch.setattr(layers, "structured_qkv", small_memory)
    rows = measured(shapes=[(1, 400), (1, 200)])
    assert [(r.status, r.reason) for r in rows[:3]] == [("out of memory", "CUDA out of memory")] * 3
    assert [r.status for r in rows[3:]] == ["ok"] * 3
    monkeypatch.setattr(topk.Method, "select", lambda *_: 1 / 0)
    rows = measured([TOPK, STREAMING])
    assert [r.status for r in rows] == ["ok", "ok", "failed", "ok"]
    assert rows[2].reason == "ZeroDivisionError: division by zero"


def random_selection(kv, middle, lists, log_w, generator):
    """About a fifth of the middle's rows, in any order, with rubbish behind the count."""
    rows = torch.full((len(kv.start), lists, kv.capacity), -9)
    count = torch.zeros(rows.shape[:2], dtype=torch.int64)
    for b in range(len(rows)):
        for s in range(lists):
            lo, size = int(middle.start[b]), int(middle.length[b])
            chosen = lo + torch.randperm(size, generator=generator)[: size // 5 + s]
            rows[b, s, : len(chosen)], count[b, s] = chosen, len(chosen)
    if log_w == "given":
        return Selection(rows, count, torch.randn(rows.shape, generator=generator))
    law = Law(torch.randn(len(rows), 2, 16, generator=generator), torch.linspace(3, 0, 65))
    return Selection(rows, count, law if log_w == "law" else None)


@pytest.mark.parametrize("log_w", [None, "given", "law"])
@pytest.mark.parametrize("lists", [2, 6])
def test_the_reference_over_a_selection_is_that_of_the_operation(lists, log_w):
    g = torch.Generator().manual_seed(0)
    table = torch.randperm(12, generator=g).view(2, 6).int()
    k, v = torch.randn(2, 12, 16, 2, 16, generator=g)
    kv = KV.on(k, v, [(0, 90), (5, 61)], table)
    middle = kv.between(kv.start + 3, kv.end - 8)
    q = torch.randn(2, 6, 16, generator=g)
    selection = random_selection(kv, middle, lists, log_w, g)
    mine = decode.over_selection(q, kv, middle, selection, 0.3)
    torch.testing.assert_close(mine.out, gather_attention_reference(q, kv, selection, 0.3, middle).out[:, 0])
    counts = selection.count.float() + 11
    assert mine.keys_per_head == pytest.approx(float(counts.mean()))
    if lists == 2:
        assert mine.kept_share == pytest.approx(float((counts / torch.tensor([[90], [56]])).mean()))


# ---- caches, and graphs -------------------------------------------------------------------------------------------


def test_a_round_reads_more_than_the_l2_cache_holds(monkeypatch):
    monkeypatch.undo()
    gpu = dataclasses.replace(SETUP, device=torch.device("cuda"))
    free = [10**15]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], free[0]))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    for read in (1e6, 5e6, 4e7, 5e9):
        count = decode.caches_for(gpu, read, 1e9)
        assert count == 128 or count * read >= 4 * 60 * 2**20
        assert 8 <= count <= 128
    assert decode.caches_for(gpu, 1e4, 1e9) == 128
    free[0] = 10e9
    assert decode.caches_for(gpu, 5e6, 1e9) == 1 + 8  # four fifths of what is free
    assert decode.caches_for(SETUP, 1, 1e9) == 4 and decode.caches_for(SETUP, 1e12, 1e9) == 2


def test_a_merge_that_waits_for_the_attention_takes_no_time_meanwhile():
    kernels = [
        (8, 12, "_merge"),
        (0, 10, "_gather"),
        (12, 13, "_short"),
        (14, 15, "_Merge_rows"),
        (15, 30, "MergeSort"),
    ]
    assert decode.merging_us(kernels) == 2 + 1
    assert decode.merging_us(kernels[1:2]) == 0


class Graph:
    """A CUDA graph without CUDA: the capture leaves the device's tensors as they were, a replay the host's."""

    def __init__(self, stack, run):
        self.stack, self.run = stack, run
        device = [(x, x.clone()) for x in self.on_device()]
        self.outputs = run()
        for x, before in device:
            x.copy_(before)
        for out in self.outputs:
            out.fill_(torch.nan)

    def on_device(self):
        for store in self.stack.stores:
            yield from (store.k, store.v, *store._index.values())
        yield self.stack.slots.length

    def __call__(self):
        slots, stores = self.stack.slots, self.stack.stores
        host = slots.lengths, slots.appended, [store._seen for store in stores]
        slots.lengths = [None] * len(slots)  # nobody may ask
        with slots.unknown_lengths(self.stack.limit):
            for out, new in zip(self.outputs, self.run(), strict=True):
                out.copy_(new)
        slots.lengths, slots.appended = host[:2]
        for store, seen in zip(stores, host[2], strict=True):
            store._seen = seen
        return self.outputs


@pytest.fixture
def graphs(monkeypatch):
    """The path of a GPU, where graphs are made up: nothing else in it needs one."""
    monkeypatch.setattr(Setup, "on_gpu", True)
    monkeypatch.setattr(layers, "_refuse_waiting", lambda run: run())
    monkeypatch.setattr(decode, "_merge_us", lambda *_: 0.125)
    monkeypatch.setattr(decode, "_peak_mib", lambda *_: 3.0)
    monkeypatch.setattr(decode, "caches_for", lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    made = []
    graph = Layers._graph

    def capture(self, part, pool):
        monkeypatch.setattr(layers, "captured", lambda run, _: made.append(Graph(self, run)) or made[-1])
        return graph(self, part, pool)

    monkeypatch.setattr(Layers, "_graph", capture)
    return made


@pytest.mark.parametrize("method", [QUEST, SNAPKV, MAGICPIG, SIGNBITS], ids=describe)
def test_steps_are_captured_checked_and_replayed(method, graphs):
    setup = dataclasses.replace(SETUP, repeats=3)
    row = decode.Row(2, 131, describe(method))
    stack = Layers(setup, Inputs.make(setup, Shape(2, 131), method.tail), method)
    decode._fill(row, setup, stack)
    assert len(graphs) == 3  # a whole step, and two that end earlier
    assert (row.status, row.caches, row.peak_mib, row.merge_us) == ("ok", 2, 3.0, 0.0625)
    assert row.total_us > 0 and min(row.hash_us, row.select_us, row.attend_us) >= 0
    assert "L2" in row.reason  # so few bytes stay there
    assert stack.slots.lengths == stack.slots.length.tolist()


def test_a_graph_that_replays_another_output_has_no_speed(graphs, monkeypatch):
    replay = Graph.__call__

    def forgetful(self):
        self.stack.slots.length -= 1  # as if the capture had kept the length
        out = replay(self)
        self.stack.slots.length += 1
        return out

    monkeypatch.setattr(Graph, "__call__", forgetful)
    stack = Layers(SETUP, Inputs.make(SETUP, Shape(1, 100), 1), QUEST)
    row = decode.Row(1, 100, "quest")
    with pytest.raises(decode.WrongResult, match="a CUDA graph replays another output"):
        decode._fill(row, SETUP, stack)
    assert row.total_us is None


def test_a_step_that_waits_for_the_device_has_figures_but_no_speed(monkeypatch):
    def refuse(*_, **__):
        raise NoGraph("a step waits")

    monkeypatch.setattr(Layers, "recorded", refuse)
    row = of(STREAMING)
    assert (row.status, row.reason, row.total_us) == ("no graph", "a step waits", None)
    assert row.error_mean > 0 and row.bytes_read > 0


GPU = [
    parse(spec, "decode")
    for spec in ("quest:dense_below=0", "signbits:dense_below=0", "magicpig:dense_below=0", "streaming:dense_below=0")
]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("method", GPU, ids=describe)
def test_on_a_gpu_everything_is_captured_and_measured(method):
    setup = Setup(32, 8, 128, torch.bfloat16, torch.device("cuda"), repeats=20)
    rows = list(decode.measure(setup, [Shape(1, 4096), Shape(3, 5001)], [method, TOPK], lambda _: None))
    assert [r.status for r in rows if r.method != describe(TOPK)] == ["ok"] * 6, [r.reason for r in rows]
    assert {r.status for r in rows[3::4]} <= {"ok", "no graph", "dense"}
    for row in rows[2::4]:
        assert row.merge_us is not None and row.peak_mib is not None
        assert row.hash_us + row.select_us + row.attend_us + row.merge_us == pytest.approx(row.total_us, rel=0.2)


# ---- what is asked for --------------------------------------------------------------------------------------------


def test_budgets_are_swept_where_a_method_has_one():
    made = decode.swept([TOPK, STREAMING, SNAPKV], [0.01, 0.1])
    assert [describe(m).split(",")[0] for m in made] == [
        "topk:keep=0.01",
        "topk:keep=0.1",
        "streaming:window=32",
        "snapkv:keep=0.01",
        "snapkv:keep=0.1",
    ]
    assert made[3].budget is None
    with pytest.raises(ValueError, match="--keep: streaming:window=32 has no option keep"):
        decode.swept([STREAMING], [0.1])


@pytest.mark.parametrize(
    ("shape", "words"),
    [((0, 100), "--shapes 0x100: batch and context must be 1 or more"), ((2, 48), "first 16 and the last 32 keys")],
)
def test_shapes_without_a_middle_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        decode.check_shapes([Shape(*shape)], [STREAMING])
    decode.check_shapes([Shape(1, 49)], [STREAMING])


def test_noise_odd_dims_and_one_kv_head_a_head():
    rows = measured([TOPK, STREAMING], [(2, 77)], inputs="random", dim=30, kv_heads=4, heads=4)
    assert [r.status for r in rows] == ["ok"] * 4


def test_side_data_of_several_tokens_count_once_for_them():
    assert Side(16, (2, 64), torch.bfloat16).token_bytes == 16
    assert Side(1, (), torch.float16).token_bytes == 2
    assert prefill.DENSE.sides(64, torch.float32) == {}
