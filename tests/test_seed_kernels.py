"""The seed search's kernels choose what its reference does; without a CUDA device they run in Triton's interpreter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from keysift.methods import flashprefill, flexprefill, minference, streaming, xattention
from keysift.ops.flex_seed import PooledRows, flex_search_seed, flex_search_seed_reference
from keysift.ops.lists import block_lists
from keysift.ops.vertical_slash import block_sum, last_queries_attention
from keysift.types import KV, BlockMask, Ctx
from tests.devices import ANYWHERE, CUDA, DEVICE, ON_GPU, QUIET
from tests.helpers import generator, structured_qkv

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = QUIET
GOLDEN = sorted((Path(__file__).parent / "data").glob("flexprefill_*.npz"))
SHAPES = [  # tokens, heads, KV heads, head dim, block, sequences, dtype
    (40, 1, 1, 16, 64, 1, torch.float32),
    (97, 2, 2, 64, 16, 2, torch.bfloat16),
    (300, 4, 1, 16, 32, 1, torch.float16),
    (333, 7, 1, 96, 64, 1, torch.bfloat16),
    (260, 3, 1, 24, 32, 2, torch.float32),
    (500, 8, 2, 64, 128, 1, torch.bfloat16),
]
LARGE = [
    (8192, 32, 8, 128, 128, 1, torch.bfloat16),
    (20011, 8, 2, 64, 64, 2, torch.float16),
    (5003, 7, 1, 96, 32, 1, torch.bfloat16),
    (4001, 4, 1, 128, 128, 2, torch.float32),
    (9001, 4, 2, 256, 128, 1, torch.bfloat16),
    (33333, 8, 8, 128, 16, 1, torch.bfloat16),
]


def slow_but(cases, *quick):
    """Cases as parameters, all but some marked slow where they run in the interpreter."""
    return [case if i in quick or CUDA else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def inputs(shape, device=DEVICE, seed=0):
    tokens, heads, kv_heads, dim, block, batch, dtype = shape
    q, k, _ = structured_qkv(tokens, heads, kv_heads, dim, batch, seed)
    return q.to(device, dtype), k.to(device, dtype), block


def golden(path):
    arrays = np.load(path)
    case = json.loads(str(arrays["case"]))
    q, k = (torch.from_numpy(arrays[n]).view(torch.bfloat16).to(DEVICE) for n in ("q_bf16", "k_bf16"))
    least, most = (None if case[n] is None else -(-case[n] // case["block"]) for n in ("min_budget", "max_budget"))
    options = {"gamma": case["gamma"], "tau": case["tau"], "least": max(1, least or 0), "most": most}
    return q, k, {**options, "block": case["block"]}, torch.from_numpy(arrays["active"]).to(DEVICE)


def everything(plan):
    return plan.active(range(plan.vertical.shape[-1]))


def assert_same_choice(q, k, gamma, tau, least, most, block):
    """Equal to the reference, but for what 1e-5 more or less of gamma changes in it."""
    plan = flex_search_seed(q, k, gamma, tau, least, most, block, backend="triton")
    fewer, more = (flex_search_seed_reference(q, k, gamma + e, tau, least, most, block) for e in (-1e-5, 1e-5))
    assert torch.equal(plan.query_aware, more.query_aware)
    for name in ("vertical", "slash"):
        at_least, chosen, at_most = (getattr(x, name) for x in (fewer, plan, more))
        assert not (at_least & ~chosen).any() and not (chosen & ~at_most).any(), name
    at_least, chosen, at_most = (everything(x) for x in (fewer, plan, more))
    assert not (at_least & ~chosen).any() and not (chosen & ~at_most).any()
    assert (at_least != at_most).float().mean() < 1e-3
    return plan


def profiles(q, k, block):
    from keysift.ops.flex_seed_triton import Tiles, _profiles

    tiles = Tiles.of(block, q.shape[2] // k.shape[2], q.shape[3], q.dtype)
    if not CUDA:
        q, k = q.float(), k.float()
    return _profiles(q, k, block, tiles, q.shape[3] ** -0.5, None)


@ANYWHERE
@pytest.mark.parametrize("shape", slow_but(SHAPES, 0, 1, 2), ids=str)
def test_profiles_are_the_last_blocks_attention_by_column_and_by_offset(shape):
    q, k, block = inputs(shape)
    by_token, by_block = (x.unflatten(0, (k.shape[0], -1)) for x in profiles(q, k, block))
    weight = last_queries_attention(q[:, -block:], k, q.shape[3] ** -0.5)
    keys, rows = k.shape[1], weight.shape[2]
    by_offset = torch.zeros_like(weight[:, :, 0])
    for i in range(rows):
        position = keys - rows + i
        by_offset[..., : position + 1] += weight[:, :, i, : position + 1].flip(-1) / rows
    far_first = by_offset.flip(-1)
    assert torch.allclose(by_token[:, :, 0], weight.mean(2), atol=1e-6)
    assert torch.allclose(by_token[:, :, 1], far_first, atol=1e-6)
    assert torch.allclose(by_block[:, :, 0], block_sum(weight.mean(2), block), atol=1e-6)
    assert torch.allclose(by_block[:, :, 1], block_sum(far_first, block).flip(-1), atol=1e-6)


@ANYWHERE
@pytest.mark.parametrize("shape", slow_but(SHAPES, 0), ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_kernels_choose_the_references_blocks(shape, tau):
    q, k, block = inputs(shape)
    assert_same_choice(q, k, 0.9, tau, 1, None, block)


def test_shapes_cover_both_branches():
    aware = []
    for shape in SHAPES:
        q, k, block = inputs(shape, "cpu")
        aware.append(flex_search_seed_reference(q, k, 0.9, 0.2, 1, None, block).query_aware.flatten())
    share = torch.cat(aware).float().mean()
    assert 0.2 < share < 0.8


@ANYWHERE
@pytest.mark.slow
def test_budgets_hold_in_both_branches():
    q, k, block = inputs((400, 4, 2, 32, 16, 1, torch.float32))
    for tau in (0.0, 1.0):
        plan = assert_same_choice(q, k, 0.99, tau, 2, 3, block)
        assert set(plan.vertical.sum(-1).flatten().tolist()) <= {2, 3}
        assert plan.query_aware.all() == (tau == 1)


@ANYWHERE
@pytest.mark.slow
def test_an_underflow_in_the_pattern_test_means_vertical_slash():
    q, k, block = inputs((260, 2, 2, 16, 32, 1, torch.float32))
    q[:, :, 0] *= 100
    plan = flex_search_seed(q, k, 0.9, 1.0, 1, None, block, backend="triton")
    assert plan.query_aware.tolist() == [[False, True]]
    assert torch.equal(plan.query_aware, flex_search_seed_reference(q, k, 0.9, 1.0, 1, None, block).query_aware)


@ANYWHERE
@pytest.mark.slow
@pytest.mark.parametrize("path", GOLDEN[-1:], ids=lambda p: p.stem)
def test_kernels_choose_the_published_blocks(path):
    q, k, options, expected = golden(path)
    assert torch.equal(everything(flex_search_seed(q, k, **options, backend="triton"))[0], expected)


@ANYWHERE
@pytest.mark.slow
def test_strides_do_not_matter_and_runs_repeat():
    q, k, block = inputs((150, 2, 1, 32, 16, 2, torch.float32))
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    one, two = (flex_search_seed(*x, 0.9, 0.2, 1, None, block, backend="triton") for x in ((q, k), by_head))
    assert isinstance(one.rows, PooledRows)
    assert torch.equal(everything(one), everything(two))
    assert torch.equal(one.rows.threshold[one.query_aware], two.rows.threshold[two.query_aware])
    part = one.active(range(3, 8))
    assert torch.equal(part, everything(one)[:, :, 3:8])


def test_the_search_says_which_backends_there_are():
    q, k, block = inputs((40, 1, 1, 16, 16, 1, torch.float32))
    with pytest.raises(ValueError, match="backend=cuda"):
        flex_search_seed(q, k, 0.9, 0.1, 1, None, block, backend="cuda")


def assert_same_lists(active, block, first):
    from keysift.ops.lists_triton import compact

    made, expected = compact(active, block, first), BlockMask.of(active, block, first)
    assert (made.block, made.first) == (block, first)
    for name in ("full", "partial"):
        count, index = (getattr(made, f"{name}_{x}") for x in ("count", "index"))
        wanted = getattr(expected, f"{name}_index")
        assert count.dtype == index.dtype == torch.int32
        assert torch.equal(count, getattr(expected, f"{name}_count"))
        width = wanted.shape[-1]
        assert torch.equal(index[..., :width], wanted[..., : index.shape[-1]])
        assert not index[..., width:].any()
    assert torch.equal(made.active(active.shape[-1]), expected.active(active.shape[-1]))


@ANYWHERE
@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 1, 0), (5, 9, 4), (6, 6, 0), (3, 40, 20)], ids=str)
def test_lists_hold_what_block_mask_of_puts_there(rows, columns, first):
    active = torch.rand(2, 3, rows, columns, generator=generator(rows)).to(DEVICE) < 0.5
    active[0, 0, 0] = False
    active[1] = False
    assert_same_lists(active, 16, first)
    assert_same_lists(active[:1, :1].expand(2, 3, -1, -1), 16, first)
    assert_same_lists(active.mT.contiguous().mT, 16, first)
    assert_same_lists(torch.ones_like(active), 16, first)


@ANYWHERE
def test_lists_longer_than_a_tile_are_whole(monkeypatch):
    monkeypatch.setattr("keysift.ops.lists_triton.MAX_TILE", 16)
    active = torch.rand(1, 2, 4, 60, generator=generator(0)).to(DEVICE) < 0.3
    assert_same_lists(active, 16, 50)


@pytest.mark.skipif(CUDA, reason="without a CUDA device the lists are those of BlockMask.of")
def test_block_lists_on_a_cpu_are_block_mask_of():
    active = torch.rand(2, 3, 5, 9, generator=generator(0)) < 0.5
    made, expected = block_lists(active, 16, 4), BlockMask.of(active, 16, 4)
    assert all(torch.equal(a, b) for a, b in zip(made[:4], expected[:4], strict=True))


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
    def test_kernels_choose_the_published_blocks(self, path):
        q, k, options, expected = golden(path)
        assert torch.equal(everything(flex_search_seed(q, k, **options))[0], expected)

    @pytest.mark.parametrize("shape", LARGE, ids=str)
    @pytest.mark.parametrize("tau", [0.0, 0.2])
    def test_kernels_choose_the_references_blocks(self, shape, tau):
        q, k, block = inputs(shape)
        assert_same_choice(q, k, 0.9, tau, 8, None, block)

    @pytest.mark.parametrize("shape", LARGE, ids=str)
    def test_runs_repeat(self, shape):
        q, k, block = inputs(shape)
        one, two = (everything(flex_search_seed(q, k, 0.95, 0.2, 1, None, block)) for _ in range(2))
        assert torch.equal(one, two)

    @pytest.mark.parametrize(("rows", "columns", "first"), [(64, 1024, 0), (64, 8192, 8128), (7, 5000, 100)], ids=str)
    def test_lists_hold_what_block_mask_of_puts_there(self, rows, columns, first):
        active = torch.rand(1, 32, rows, columns, device="cuda") < 0.1
        active[:, ::5] = False
        assert_same_lists(active, 128, first)
        assert_same_lists(active[:, :1].expand(-1, 32, -1, -1), 128, first)

    @pytest.mark.parametrize(
        "method",
        [
            flexprefill.Method(mode="seed", tau=0.2),
            flexprefill.Method(mode="seed", tau=0.0),
            minference.Method(vertical=256, slash=512),
            xattention.Method(),
            flashprefill.Method(),
            streaming.Method(window=500),
        ],
        ids=lambda m: type(m).__module__,
    )
    def test_plans_and_masks_never_wait_for_the_device(self, method):
        q, k, _ = inputs((4001, 8, 2, 64, 128, 1, torch.bfloat16))
        kv = KV.of(k, k)
        ctx = Ctx(0, 0.125, kv.length - 1)
        method.mask(method.plan(q, kv, ctx), range(3, 9))  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            mask = method.mask(method.plan(q, kv, ctx), range(3, 9))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert mask.active(32).any()
