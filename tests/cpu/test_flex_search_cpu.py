"""Shares of blocks by the CPU kernel, on every instruction set of this CPU, and the search that rests on them."""

import pytest
import torch

from keysift.ops import flex_search as search
from keysift.ops import flex_search_cpu as cpu
from keysift.ops.cpu.library import load
from keysift.types import KV
from tests.helpers import generator

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
ISAS = load().usable if load() else ("none",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, queries, keys, heads, KV heads, dim, block
CASES = [
    (1, 300, 300, 4, 2, 64, 128, FP32),
    (2, 70, 333, 6, 2, 37, 16, BF16),
    (1, 1000, 1000, 8, 8, 128, 64, FP16),
    (1, 9, 500, 5, 1, 64, 32, BF16),
    (3, 130, 131, 64, 1, 256, 128, FP32),
    (1, 1, 1, 1, 1, 1, 16, FP32),
]


def inputs(batch, tokens, keys, heads, kv_heads, dim, dtype):
    g = generator(0)
    q = 3 * torch.randn(batch, tokens, heads, dim, generator=g)
    return q.to(dtype), torch.randn(batch, keys, kv_heads, dim, generator=g).to(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shares_are_those_of_the_softmax(case, isa):
    *sizes, block, dtype = case
    q, k = inputs(*sizes, dtype)
    sampling = search.Sampling.of(q.shape[1], k.shape[1], block, 200)
    position = sampling.positions(q.device)
    want = search.row_mass_reference(q, k, 0.3, sampling, position)
    got = cpu.row_mass(q, k, 0.3, block, position.flatten(), isa=isa)
    assert (got.unflatten(2, position.shape) - want).abs().max() < 1e-5
    later = torch.arange(got.shape[3]) > position.flatten()[:, None] // block
    assert not got[..., later].any()


@pytest.mark.parametrize("isa", ISAS)
def test_strided_queries_of_extreme_size_are_read_as_they_are(isa):
    q, k = inputs(2, 200, 200, 4, 2, 64, FP32)
    apart = torch.cat([q, torch.full_like(q, torch.nan)], -1)[..., :64].transpose(1, 2).contiguous().transpose(1, 2)
    position = torch.arange(0, 200, 7)
    assert torch.equal(
        cpu.row_mass(100 * apart, k, 1.0, 32, position, isa=isa), cpu.row_mass(100 * q, k, 1.0, 32, position, isa=isa)
    )
    sums = cpu.row_mass(100 * q, k, 1.0, 32, position, isa=isa).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_threads_change_nothing(monkeypatch):
    q, k = inputs(1, 700, 700, 8, 2, 64, FP32)
    found = []
    for count in (1, 3):
        monkeypatch.setattr("keysift.ops.flex_search_cpu.threads", lambda count=count: count)
        found.append(cpu.row_mass(q, k, 0.2, 64, torch.arange(0, 700, 3)))
    assert torch.equal(*found)


@pytest.mark.parametrize("position", [[-1], [3], [699, 10], [700]])
def test_positions_without_a_query_are_refused(position):
    q, k = inputs(1, 600, 700, 2, 2, 32, FP32)
    with pytest.raises(ValueError, match="position"):
        cpu.row_mass(q, k, 0.2, 64, torch.tensor(position))


def test_a_search_with_the_kernel_keeps_the_blocks_of_the_reference():
    q, k = inputs(1, 1500, 1500, 4, 2, 64, FP32)
    kv = KV.of(k, k)
    plans = [search.flex_search(q, kv, 0.125, 0.9, 1, None, 64, backend=b) for b in ("cpu", "reference", "auto")]
    blocks = range(-(-1500 // 64))
    kernel, reference, usual = (plan.active(blocks) for plan in plans)
    assert torch.equal(kernel, usual)
    assert (kernel != reference).float().mean() < 0.002  # of rounding at a threshold
    assert 0.05 < kernel.float().mean() < 0.6
