"""The CPU kernel of prefill against the fp32 references, on every path that this CPU has."""

import math

import pytest
import torch

from keysift.ops.block_sparse import block_sparse_attention_reference
from keysift.ops.block_sparse_cpu import block_sparse, block_sparse_varlen, dense, unsupported
from keysift.ops.cpu.library import load
from keysift.ops.dense import dense_attention_reference
from keysift.types import KV, BlockMask
from tests.cpu.test_attention_cpu import BF16, ERROR, FP16, FP32, ISAS, keys_values, paged, queries
from tests.helpers import TOLERANCE, generator, relative_error

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")


def mask_of(batch, heads, tokens, keys, block, seed=3, share=0.5):
    first = (keys - tokens) // block
    blocks = -(-keys // block)
    active = torch.rand(batch, heads, blocks - first, blocks, generator=generator(seed)) < share
    active[:, 0, -1] = False  # queries without a key
    return BlockMask.of(active, block, first)


def agree(out, lse, want, dtype):
    assert relative_error(out.float(), want.out) <= min(ERROR, TOLERANCE[dtype])
    assert torch.equal(lse == -math.inf, want.lse == -math.inf)
    assert not out[want.lse == -math.inf].any()
    finite = want.lse > -math.inf
    assert (lse[finite] - want.lse[finite]).abs().max() <= 1e-2 if dtype == BF16 else 1e-4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 4), (96, 7), (128, 4), (256, 1), (40, 7), (13, 4)])
def test_block_lists_agree_with_the_reference(isa, dtype, dim, group):
    for tokens, keys, block in ((100, 100, 16), (63, 150, 64), (1, 63, 32)):
        k, v = keys_values(1, keys, 2, dim, dtype)
        q, kv = queries((1, tokens, 2 * group, dim), dtype), KV.of(k, v)
        mask = mask_of(1, 2 * group, tokens, keys, block)
        want = block_sparse_attention_reference(q, kv, mask, dim**-0.5)
        agree(*block_sparse(q, kv, mask, dim**-0.5, True, isa=isa), want, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [16, 24, 64, 128, 200])
@pytest.mark.parametrize("page", [None, 16, 20])
def test_any_block_in_pages_with_poison_outside_the_view(isa, block, page):
    k, v = keys_values(2, 420, 2, 64, BF16)
    spans = [(9, 404)] * 2
    for x in (k, v):
        x[:, :9] = x[:, 404:] = math.nan
    kv = KV.on(k, v, spans) if page is None else paged(k, v, spans, page)
    q, mask = queries((2, 301, 8, 64), BF16), mask_of(2, 8, 301, 395, block)
    want = block_sparse_attention_reference(q, KV.on(k, v, spans), mask, 0.125)
    agree(*block_sparse(q, kv, mask, 0.125, True, isa=isa), want, BF16)


def test_a_mask_of_some_query_blocks_computes_those():
    k, v = keys_values(1, 333, 2, 64, FP32)
    q, kv = queries((1, 250, 4, 64), FP32), KV.of(k, v)
    active = torch.ones(1, 4, 3, 21, dtype=torch.bool)
    mask = BlockMask.of(active, 16, 9)
    want = block_sparse_attention_reference(q, kv, mask, 0.1)
    out, lse = block_sparse(q, kv, mask, 0.1, True)
    assert out.shape == (1, 48, 4, 64)
    agree(out, lse, want, FP32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_all_blocks_are_dense_attention(isa, dtype):
    k, v = keys_values(2, 1025, 1, 64, dtype)
    for tokens in (1025, 300, 1, 0):
        q, kv = queries((2, tokens, 4, 64), dtype), KV.of(k, v)
        out, lse = dense(q, kv, 0.125, True, block=64, isa=isa)
        if tokens:
            agree(out, lse, dense_attention_reference(q, kv, 0.125), dtype)
        assert out.shape == q.shape


def test_packed_sequences_of_any_length():
    lengths, tokens = (100, 63, 1, 200), (100, 20, 0, 150)
    spans = [(2, 2 + n) for n in lengths]
    k, v = keys_values(4, 210, 2, 64, BF16)
    kv, ends = KV.on(k, v, spans), [0, *torch.tensor(tokens).cumsum(0).tolist()]
    q = queries((sum(tokens), 4, 64), BF16)
    masks = [mask_of(1, 4, t, n, 16) for t, n in zip(tokens, lengths, strict=True)]
    out, lse = block_sparse_varlen(q, ends, kv, masks, 0.125, True)
    for b, mask in enumerate(masks):
        rows = slice(ends[b], ends[b + 1])
        if tokens[b]:
            want = block_sparse_attention_reference(q[None, rows], kv.only(b), mask, 0.125)
            agree(out[None, rows], lse[None, rows], want, BF16)
    assert block_sparse_varlen(q, ends, kv, masks, 0.125)[1] is None


@pytest.mark.parametrize("isa", ISAS)
def test_the_number_of_threads_does_not_change_a_bit(isa):
    k, v = keys_values(1, 700, 2, 64, BF16)
    q, kv, mask = queries((1, 700, 4, 64), BF16), KV.of(k, v), mask_of(1, 4, 700, 700, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(block_sparse(q, kv, mask, 0.1, True, isa=isa))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_does_not_exist_is_refused():
    k, v = keys_values(1, 100, 2, 64, FP32)
    q, kv = queries((1, 100, 4, 64), FP32), KV.of(k, v)
    mask = mask_of(1, 4, 100, 100, 16, share=1.0)
    mask.full_index[0, 1, 3, 0] = 7
    with pytest.raises(ValueError, match="a key block of the mask"):
        block_sparse(q, kv, mask, 0.1)
    mask.full_index[0, 1, 3, 0] = 0
    mask.full_count[0, 2, 1] = 99
    with pytest.raises(ValueError, match="count of key blocks"):
        block_sparse(q, kv, mask, 0.1)
    with pytest.raises(ValueError, match="different lengths"):
        dense(queries((2, 5, 4, 64), FP32), KV.on(*keys_values(2, 9, 2, 64, FP32), [(0, 9), (0, 8)]), 0.1)


def test_unsupported_says_what_is_needed():
    k, v = keys_values(1, 10, 2, 64, BF16)
    q, kv = queries((1, 10, 4, 64), BF16), KV.of(k, v)
    assert unsupported(q, kv, 128, 1.0) is None
    assert "k and v alike" in unsupported(q, KV.of(k, v.float()), 128, 1.0)
    assert "no_grad" in unsupported(q.clone().requires_grad_(), kv, 128, 1.0)
    assert "on a CPU" in unsupported(q.to("meta"), kv, 128, 1.0)


def test_it_compiles_without_a_graph_break():
    k, v = keys_values(1, 100, 2, 64, BF16)
    q, kv, mask = queries((1, 100, 4, 64), BF16), KV.of(k, v), mask_of(1, 4, 100, 100, 16)

    def attend(q, kv, mask):
        return block_sparse(q, kv, mask, 0.1, True)

    want, got = attend(q, kv, mask), torch.compile(attend, fullgraph=True, backend="eager")(q, kv, mask)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
