"""Measurements: only right results are timed, and what is reported of them is what was read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import keysift
from keysift import attention
from keysift.bench import first_token, prefill
from keysift.bench.inputs import structured_qkv
from keysift.methods import dense, parse
from keysift.ops import coverage
from keysift.ops.cpu.library import load
from keysift.types import KV, BlockMask, Ctx
from tests.helpers import Clock

CPU = torch.device("cpu")
FLEX = parse("flexprefill:block=32", "prefill")
SETUP = prefill.Setup(
    heads=4, kv_heads=2, dim=32, batch=1, dtype=torch.float32, device=CPU, repeats=1, warmup=0, check_rows=4
)


def measured(lengths=(400,), methods=(FLEX,), backends=("auto",), **changes):
    setup = dataclasses.replace(SETUP, **changes)
    return list(prefill.measure(setup, lengths, methods, backends, lambda _: None))


# ---- prefill ------------------------------------------------------------------------------------------------------


def test_dense_comes_first_and_everything_is_measured():
    rows = measured((256, 401), (FLEX, dense.Method()), ("auto", "sdpa"))
    assert [(r.length, r.method, r.backend) for r in rows] == [
        (n, *run)
        for n in (256, 401)
        for run in (("dense", "auto"), ("flexprefill:block=32", "auto"), ("flexprefill:block=32", "sdpa"))
    ]
    for row in rows:
        sparse = "cpu" if load() is not None else "sdpa"
        kernel = sparse if (row.method, row.backend) == ("flexprefill:block=32", "auto") else "sdpa"
        assert (row.status, row.reason, row.kernel, row.peak_mib) == ("ok", None, kernel, None)
        assert row.relative_error < 1e-5
        assert min(row.attention_ms, row.total_ms, row.tflops, row.speedup, row.tflops_of_dense) > 0
        assert (row.search_ms is None) == (row.method == "dense")
        assert json.loads(json.dumps(dataclasses.asdict(row))) == dataclasses.asdict(row)
    assert all((r.density, r.mass_covered, r.speedup, r.tflops_of_dense) == (1, 1, 1, 1) for r in rows[::3])


@pytest.mark.parametrize("chunk", [None, 128, 150])
def test_density_mass_and_speed_are_of_the_pairs_that_are_read(chunk, monkeypatch):
    monkeypatch.setattr(prefill, "MASS_BLOCKS", 1000)
    row = measured((401,), chunk=chunk)[1]
    q, k, v = structured_qkv(401, 4, 2, 32, dtype=torch.float32)
    pairs = mass = rows = 0
    for lo in range(0, 401, chunk or 401):
        hi = min(401, lo + (chunk or 401))
        kv = KV.of(k[:, :hi], v[:, :hi])
        plan = FLEX.plan(q[:, lo:hi], kv, Ctx(-1, 32**-0.5, kv.length - 1))
        blocks = range(lo // 32, -(-hi // 32))
        causal = torch.arange(hi) <= torch.arange(lo, hi)[:, None]
        read = causal.expand(1, 4, -1, -1)
        active = torch.ones(1, 4, len(blocks), -(-hi // 32), dtype=torch.bool).tril(blocks.start)
        if plan is not None:
            active = FLEX.mask(plan, blocks).active(-(-hi // 32))
            token = active[:, :, torch.arange(lo, hi) // 32 - blocks.start].repeat_interleave(32, -1)
            read = token[..., :hi] & causal
        pairs += int(read.sum())
        weight = coverage.block_mass(q[:, lo:hi], kv, 32**-0.5, 32, blocks)
        mass = mass + (weight * active).sum((-1, -2))
        rows += len(blocks)
    assert row.density == pytest.approx(pairs / (4 * 401 * 402 / 2))
    assert row.tflops == pytest.approx(2 * 64 * pairs / row.attention_ms / 1e9)
    assert row.mass_covered == pytest.approx(float(mass.mean() / rows), abs=1e-5)
    assert row.mass_covered_worst_head == pytest.approx(float(mass.amin() / rows), abs=1e-5)


def test_times_are_those_of_the_parts(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(prefill, "time", clock)
    monkeypatch.setattr(type(FLEX), "plan", clock.slower(type(FLEX).plan, 0.2))
    monkeypatch.setattr(prefill, "block_sparse_attention", clock.slower(prefill.block_sparse_attention, 0.5))
    row = measured((256,))[1]
    total = 200  # through attention.prefill, whose attention is as fast as ever
    assert [row.search_ms, row.attention_ms, row.total_ms] == pytest.approx([200, 500, total], abs=0.1)


def test_a_method_that_reads_everything_says_so():
    row = measured((60,))[1]
    assert (row.status, row.density, row.mass_covered) == ("dense", 1, 1)
    assert "reads the prompt densely" in row.reason
    assert row.total_ms > 0
    chunked = measured((200,), chunk=60)[1]
    assert (chunked.status, chunked.reason) == ("ok", "the method reads 1 of 4 chunks densely")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: out * 1.001, "relative error 0.001"),
        (lambda out: out.index_fill(2, torch.tensor([3]), 0), "relative error 1 "),
        (lambda out: torch.cat([out[:, :-1], out[:, -1:] * 2], 1), "relative error"),
        (lambda out: out.index_fill(1, torch.tensor([77]), torch.nan), "NaN"),
    ],
)
def test_a_wrong_result_has_no_speed(monkeypatch, spoil, reason):
    right = attention.block_sparse_attention

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return spoil(out), lse

    for module in (attention, prefill):
        monkeypatch.setattr(module, "block_sparse_attention", wrong)
    fine, row, later = *measured((257,)), measured((60,))[1]
    assert (fine.status, later.status) == ("ok", "dense")
    assert row.status == "wrong" and reason in row.reason
    assert row.attention_ms is row.total_ms is row.search_ms is row.tflops is row.speedup is None


def test_results_that_differ_between_runs_have_no_speed(monkeypatch):
    right, runs = prefill.block_sparse_attention, []

    def noisy(*args, **kwargs):
        runs.append(0)
        out, lse = right(*args, **kwargs)
        return out + 1e-9 * len(runs), lse

    for module in (attention, prefill):
        monkeypatch.setattr(module, "block_sparse_attention", noisy)
    row = measured((256,))[1]
    assert (row.status, row.reason, row.total_ms) == ("wrong", "two runs give different outputs", None)


def test_what_fails_is_a_row_and_the_others_go_on(monkeypatch):
    right = prefill.structured_qkv

    def small_memory(tokens, *args, **kwargs):
        if tokens > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")
        return right(tokens, *args, **kwargs)

    monkeypatch.setattr(prefill, "structured_qkv", small_memory)
    rows = measured((500, 200))
    assert [(r.status, r.reason) for r in rows[:2]] == [("out of memory", "CUDA out of memory")] * 2
    assert [r.status for r in rows[2:]] == ["ok", "ok"]
    monkeypatch.setattr(type(FLEX), "mask", lambda *_: 1 / 0)
    rows = measured((200,))
    assert [r.status for r in rows] == ["ok", "failed"]
    assert rows[1].reason == "ZeroDivisionError: division by zero"


def test_the_sample_has_the_ends_and_the_blocks_in_part_filled():
    def sample(length, chunk, count):
        chunks = prefill.prompt(dataclasses.replace(SETUP, chunk=chunk), length)
        return prefill._check_sample(prefill.Work(chunks, FLEX, "auto"), count)

    assert sample(320, None, 4) == {0: [0, 3, 6, 9]}
    assert sample(321, None, 4) == {0: [0, 3, 6, 10]}
    assert sample(40, None, 8) == {0: [0, 1]}
    chosen = sample(1000, 50, 4)
    assert 0 in chosen[0] and 31 in chosen[19]
    assert {(c, i) for c, blocks in chosen.items() for i in blocks} >= {(0, 1), (19, 31)}  # in part filled
    assert sum(map(len, chosen.values())) <= 8


def test_lists_are_made_for_the_ranges_of_the_path():
    for positions, block, heads in (
        (range(0, 5000), 64, 8),
        (range(999, 200_000), 16, 32),
        (range(0, 1 << 20), 128, 32),
    ):
        ranges = prefill.list_ranges(positions, block, heads)
        assert prefill.list_ranges is attention.list_ranges
        assert [i for r in ranges for i in r] == [*range(positions.start // block, -(-positions.stop // block))]
        assert all(16 * heads * ranges[-1].stop * len(r) <= attention.LIST_BYTES for r in ranges)


@pytest.mark.parametrize(
    ("speedups", "tokens"),
    [
        ({1024: 0.5, 2048: 2.0}, 1448),  # half way between, on log scales
        ({1024: 0.25, 2048: 0.5, 4096: 1.0}, 4096),
        ({2048: 2.0, 1024: 1.5}, 1024),
        ({1024: 0.5, 2048: 0.9}, None),
        ({1024: 1.1, 2048: 0.5, 4096: 2.0, 8192: 4.0}, 2896),
    ],
)
def test_the_crossover_lies_between_the_last_loss_and_the_next_win(speedups, tokens):
    assert prefill.crossover_tokens(speedups) == tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads=5"),
        ({"dim": 30}, "dim=30"),
        ({"dim": 33}, "dim=33"),
        ({"batch": 0}, "batch=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"inputs": "real"}, "structured or random"),
        ({"dtype": torch.float64}, "float64"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_setups_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SETUP, **changes)


def test_batches_and_random_inputs():
    rows = measured((130,), batch=2, inputs="random", dim=31)
    assert [r.status for r in rows] == ["ok", "ok"]
    with pytest.raises(ValueError, match="backends=fa4: flexprefill:block=32 needs"):
        prefill.check_backends(SETUP, [FLEX], ["auto", "fa4"])


# ---- first token --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return first_token.random_model("tiny", 1024, CPU, torch.float32)


def test_random_weights_get_the_lists_of_structured_inputs(tiny, monkeypatch):
    searched, read = [], []
    plan, run = type(FLEX).plan, attention.block_sparse_attention

    def spy_plan(self, q, kv, ctx):
        searched.append((q.clone(), kv.known_spans()[0][1]))
        return plan(self, q, kv, ctx)

    def spy_run(q, kv, mask, *args):
        read.append((q.clone(), mask))
        return run(q, kv, mask, *args)

    method = first_token.StructuredMasks(FLEX)
    method.prepare(400, 150, tiny.model.config, CPU, torch.float32, seed=3)
    monkeypatch.setattr(type(FLEX), "plan", spy_plan)
    monkeypatch.setattr(attention, "block_sparse_attention", spy_run)
    with keysift.attach(tiny.model) as link:
        link.prefill = method
        first_token.first_token(tiny.model, link, tiny.prompt(400), 150)
    chunks = [(0, 150), (150, 300), (300, 400)]
    assert [(q.shape[1], keys) for q, keys in searched] == [(hi - lo, hi) for lo, hi in chunks for _ in range(2)]
    assert len(read) == 6
    q, k, v = structured_qkv(400, 4, 2, 32, seed=3, dtype=torch.float32)
    differs = False
    for (real, mask), (seen, _), (lo, hi) in zip(read, searched, [c for c in chunks for _ in range(2)], strict=True):
        assert torch.equal(real, seen)  # the search ran on the model's own queries
        kv, blocks = KV.of(k[:, :hi], v[:, :hi]), range(lo // 32, -(-hi // 32))
        ctx = Ctx(-1, 32**-0.5, kv.length - 1, 3)
        assert_same_mask(mask, FLEX.mask(plan(FLEX, q[:, lo:hi], kv, ctx), blocks))
        own = FLEX.mask(plan(FLEX, real, kv, ctx), blocks)
        differs |= not torch.equal(own.active(20), mask.active(20))
    assert differs


def assert_same_mask(a: BlockMask, b: BlockMask) -> None:
    assert (a.block, a.first) == (b.block, b.first)
    assert torch.equal(a.active(20), b.active(20))


def test_first_token_rows(tiny):
    setup = first_token.Setup(FLEX, chunk=100, repeats=2, skip_dense_above=300)
    rows = list(first_token.measure(tiny, setup, [250, 310], lambda _: None))
    assert [(r.length, r.method, r.masks, r.status) for r in rows] == [
        (250, "dense", "own", "ok"),
        (250, "flexprefill:block=32", "structured", "ok"),
        (310, "dense", "own", "skipped"),
        (310, "flexprefill:block=32", "structured", "ok"),
    ]
    assert rows[0].density == rows[0].speedup == 1
    assert 0 < rows[1].density < 1
    assert rows[1].speedup == pytest.approx(rows[0].ttft_s / rows[1].ttft_s)
    assert rows[3].speedup is rows[2].ttft_s is rows[1].same_first_token is None
    assert "300" in rows[2].reason
    for row in (rows[0], rows[1], rows[3]):
        assert 0 < row.attention_s < row.ttft_s
        assert row.attention_share == pytest.approx(row.attention_s / row.ttft_s)
    assert "_keysift" not in tiny.model.__dict__


def test_chunks_and_logits_do_not_change_the_first_token(tiny):
    with keysift.attach(tiny.model) as link:
        ids = tiny.prompt(90)
        tokens = {
            first_token.first_token(tiny.model, link, ids, chunk, keep).token
            for chunk in (20, 90)
            for keep in (True, False)
        }
    with torch.no_grad():
        assert tokens == {int(tiny.model(ids).logits[0, -1].argmax())}


def test_weights_that_are_given_keep_their_own_masks(tiny):
    rows = list(first_token.measure(tiny._replace(random=False), first_token.Setup(FLEX), [200], lambda _: None))
    assert [r.masks for r in rows] == ["own", "own"]
    assert rows[0].same_first_token is True and rows[1].same_first_token in (True, False)


def test_what_does_not_fit_is_a_row(tiny, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(first_token, "structured_qkv", full)
    rows = list(first_token.measure(tiny, first_token.Setup(FLEX), [64], lambda _: None))
    assert [(r.status, r.reason) for r in rows] == [("ok", None), ("out of memory", "CUDA out of memory")]


def test_all_logits_that_cannot_fit_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(first_token, "_free_bytes", lambda _: 100 * 2**30)
    first_token.check_logits_fit(1000, 128256, torch.bfloat16, CPU)
    words = "all logits of 524288 tokens take 125 GiB and cpu has 100 GiB free: pass logits_to_keep=1"
    with pytest.raises(ValueError, match=words):
        first_token.check_logits_fit(524288, 128256, torch.bfloat16, CPU)
    monkeypatch.setattr(first_token, "_free_bytes", lambda _: 100)
    setup = first_token.Setup(FLEX, all_logits=True)
    with pytest.raises(ValueError, match="logits_to_keep=1"):
        next(first_token.measure(tiny, setup, [64], lambda _: pytest.fail("something was measured")))
    monkeypatch.undo()
    assert first_token._free_bytes(CPU) > 2**20
    assert [r.status for r in first_token.measure(tiny, setup, [64], lambda _: None)] == ["ok", "ok"]


def test_the_shapes_are_what_they_are_called():
    with torch.device("meta"):
        import transformers

        sizes = (
            ("llama-8b", 8.0e9, 8.1e9),
            ("llama-1b", 1.2e9, 1.6e9),  # embeddings untied
            ("codellama-13b", 13.0e9, 13.1e9),
            ("codellama-34b", 33.7e9, 33.8e9),
        )
        for name, least, most in sizes:
            config = transformers.LlamaConfig(**first_token.SHAPES[name])
            count = sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())
            assert least < count < most
    with pytest.raises(ValueError, match="choose llama-8b, llama-1b, codellama-13b, codellama-34b or tiny"):
        first_token.random_model("llama-9b", 10, CPU, torch.float32)
