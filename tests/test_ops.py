"""Every operation against an fp64 oracle, on odd sizes, with poison where nothing may be read."""

import math

import pytest
import torch

from keysift.ops.block_sparse import _by_query_block, block_sparse_attention, block_sparse_attention_reference
from keysift.ops.codes import collision_log_probability, projections
from keysift.ops.coverage import mass_covered
from keysift.ops.dense import dense_attention, dense_attention_reference
from keysift.ops.gather import gather_attention
from keysift.ops.merge import merge
from keysift.ops.pooling import pool
from keysift.ops.random import normal, uniform
from keysift.ops.select import cover, top_k
from keysift.ops.vertical_slash import last_queries_attention, vertical_slash_mass
from keysift.types import KV, BlockMask, Partial, Selection
from tests.helpers import close, codes_in_common, generator, oracle, structured_qkv

SHAPES = [(1, 1, 1), (1, 63, 4), (63, 63, 7), (100, 1025, 4), (37, 100, 1)]  # queries, keys, heads a group


def qkv(tokens, keys, group, kv_heads=2, dim=24, batch=2, v_dim=None, seed=0):
    g = generator(seed)
    return (
        torch.randn(batch, tokens, kv_heads * group, dim, generator=g),
        torch.randn(batch, keys, kv_heads, dim, generator=g),
        torch.randn(batch, keys, kv_heads, v_dim or dim, generator=g),
    )


def poisoned(x, before, after):
    """``x`` as a view into a buffer of NaN, and the KV bounds that hide the NaN."""
    batch, rows = x.shape[:2]
    buffer = torch.full((batch, before + rows + after, *x.shape[2:]), math.nan)
    buffer[:, before : before + rows] = x
    return buffer


@pytest.mark.parametrize(("tokens", "keys", "group"), SHAPES)
@pytest.mark.parametrize("window", [None, 17])
def test_dense_attention_is_softmax_attention_bottom_right_causal(tokens, keys, group, window):
    q, k, v = qkv(tokens, keys, group)
    position = torch.arange(keys - tokens, keys)[:, None]
    seen = None if window is None else torch.arange(keys) > position - window
    expected, lse = oracle(q, k, v, seen)
    kv = KV(poisoned(k, 3, 2), poisoned(v, 3, 2), torch.tensor([3, 3]), torch.tensor([keys, keys]))
    assert close(dense_attention(q, kv, q.shape[-1] ** -0.5, window), expected)
    part = dense_attention_reference(q, kv, q.shape[-1] ** -0.5, window)
    assert close(part.out, expected)
    assert close(part.lse, lse)


def test_dense_attention_in_chunks_of_queries_equals_whole(monkeypatch):
    q, k, v = qkv(70, 101, 2)
    whole = dense_attention(q, KV.of(k, v), 0.2)
    monkeypatch.setattr("keysift.ops.dense.MASK_ELEMENTS", 101 * 16)
    assert close(dense_attention(q, KV.of(k, v), 0.2), whole)


def test_dense_attention_of_one_query_takes_ragged_and_empty_sequences():
    q, k, v = qkv(1, 50, 4, batch=3)
    kv = KV(k, v, torch.tensor([0, 13, 50]), torch.tensor([50, 20, 0]))
    out = dense_attention(q, kv, 0.3)
    for b, rows in enumerate([slice(0, 50), slice(13, 33)]):
        assert close(out[b : b + 1], oracle(q[b : b + 1], k[b : b + 1, rows], v[b : b + 1, rows], scale=0.3)[0])
    assert not out[2].any()


@pytest.mark.parametrize(("tokens", "keys", "group"), SHAPES)
@pytest.mark.parametrize("block", [16, 64])
def test_block_sparse_attention_reads_exactly_the_masked_blocks(tokens, keys, group, block):
    q, k, v = qkv(tokens, keys, group, v_dim=20)
    blocks, first = math.ceil(keys / block), (keys - tokens) // block
    active = torch.rand(2, q.shape[2], blocks - first, blocks, generator=generator(1)) < 0.4
    active[0, 0, 0] = False  # a row without any block
    mask = BlockMask.of(active, block, first)
    position = torch.arange(keys)
    token_seen = active[:, :, position[keys - tokens :] // block - first][..., position // block]
    expected, lse = oracle(q, k, v, token_seen)
    kv = KV(poisoned(k, 5, 60), poisoned(v, 5, 60), torch.tensor([5, 5]), torch.tensor([keys, keys]))
    out, nothing = block_sparse_attention(q, kv, mask, q.shape[-1] ** -0.5)
    assert close(out, expected)
    assert nothing is None
    assert close(_by_query_block(q, kv, mask, q.shape[-1] ** -0.5), expected)  # what GPUs take
    part = block_sparse_attention_reference(q, kv, mask, q.shape[-1] ** -0.5)
    assert close(part.out, expected)
    assert torch.equal(part.lse == -math.inf, lse == -math.inf)
    finite = lse != -math.inf
    assert close(part.lse[finite], lse[finite])


def test_block_sparse_attention_computes_only_the_masks_query_blocks():
    q, k, v = qkv(90, 200, 2)
    everything = torch.ones(2, 4, 7, 7, dtype=torch.bool)
    out, _ = block_sparse_attention(q, KV.of(k, v), BlockMask.of(everything[:, :, 4:6], 32, 4), 0.2)
    expected = oracle(q, k, v, scale=0.2)[0]
    assert close(out, expected[:, 128 - 110 : 192 - 110])


def test_block_mask_lists_hold_the_set_that_made_them():
    active = torch.rand(2, 3, 5, 9, generator=generator(0)) < 0.5
    causal = torch.arange(9) <= torch.arange(4, 9)[:, None]
    mask = BlockMask.of(active, 16, first=4)
    assert torch.equal(mask.active(9), active & causal)
    assert not (mask.full_index.long() == torch.arange(4, 9)[:, None])[mask.full_index > 0].any()
    assert mask.rows() == range(64, 144)


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_gather_attention_equals_weighted_attention_over_the_rows(group, per_query_head):
    q, k, v = qkv(1, 101, group, v_dim=20)
    heads = q.shape[2] if per_query_head else 2
    chosen = torch.rand(2, heads, 101, generator=generator(1)) < 0.3
    chosen[0, 0] = False
    log_w = torch.rand(2, heads, 101, generator=generator(2)) * 3
    poison = ~chosen.any(1)  # rows that nobody selects
    kv = KV.of(k.masked_fill(poison[..., None, None], math.nan), v.masked_fill(poison[..., None, None], math.nan))
    part = gather_attention(q[:, 0], kv, Selection.of(chosen, log_w), 0.3)
    full = chosen if per_query_head else chosen.repeat_interleave(group, 1)
    weight = log_w if per_query_head else log_w.repeat_interleave(group, 1)
    score = torch.einsum("bhd,bshd->bhs", q[:, 0].double(), k.double().repeat_interleave(group, 2)) * 0.3 + weight
    score = score.masked_fill(~full, -math.inf)
    lse = score.logsumexp(-1)
    out = torch.einsum("bhs,bshe->bhe", score.softmax(-1).nan_to_num(0), v.double().repeat_interleave(group, 2))
    assert close(part.out[:, 0], out)
    assert torch.equal(part.lse[:, 0] == -math.inf, lse == -math.inf)
    assert close(part.lse[:, 0][lse != -math.inf], lse[lse != -math.inf])


def test_merging_parts_over_disjoint_keys_gives_the_whole():
    q, k, v = qkv(5, 60, 2)
    half = torch.arange(60) < 23
    parts = [Partial(*(x.float() for x in oracle(q, k, v, seen))) for seen in (half, ~half)]
    out, lse = oracle(q, k, v)
    assert close(merge(*parts).out, out)
    assert close(merge(*parts).lse, lse)
    nothing = Partial(torch.zeros_like(parts[0].out), torch.full_like(parts[0].lse, -math.inf))
    assert close(merge(parts[0], nothing).out, parts[0].out)
    assert torch.equal(merge(nothing, nothing).out, nothing.out)
    assert torch.equal(merge(nothing, nothing).lse, nothing.lse)


def test_uniform_draws_are_uniform_and_independent_of_their_neighbours():
    n = 200_000
    u = uniform(3, 1, torch.arange(n))
    assert u.min() > 0
    assert u.max() < 1
    histogram = torch.histc(u, 64, 0, 1)
    chi_square = ((histogram - n / 64) ** 2 / (n / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    for other in (
        uniform(3, 1, torch.arange(1, n + 1)),
        uniform(3, 2, torch.arange(n)),
        uniform(4, 1, torch.arange(n)),
    ):
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 5 / math.sqrt(n)


def test_draws_depend_on_their_address_alone():
    grid = uniform(9, torch.arange(5)[:, None], torch.arange(7))
    assert torch.equal(grid[3, 4], uniform(9, 3, 4))
    assert uniform(2**40) != uniform(2**41)
    assert uniform(-1) != uniform(1)


def test_normal_draws_have_the_moments_of_a_normal():
    x = normal(5, torch.arange(200_000)).double()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((x**power).mean() - moment) < 6 * math.sqrt(math.factorial(2 * power) / 2**power) / math.sqrt(len(x))


def test_magicpig_law_matches_collision_rate():
    """Over many hashes, keys at a known angle collide in two of L tables as often as the law says."""
    bits, tables, dim, trials = 4, 12, 8, 4000
    angles = torch.tensor([20.0, 45, 70, 90, 120]).deg2rad()
    q = torch.zeros(dim)
    q[0] = 1
    k = torch.zeros(5, dim)
    k[:, 0], k[:, 1] = angles.cos(), angles.sin()
    w = projections(0, 0, trials, dim, bits * tables, torch.device("cpu"))
    hits = codes_in_common(q[None, None], k[None], w, bits)
    rate = (hits[:, 0] >= 2).double().mean(0)
    law = collision_log_probability(angles.cos(), bits, tables).double().exp()
    assert ((rate - law).abs() < 4.5 * (law * (1 - law) / trials).sqrt() + 1e-3).all()
    assert law[0] > 0.9 > 0.1 > law[-1]


@pytest.mark.parametrize(("degrees", "u"), [(45, 0.998), (60, 0.736), (70, 0.297), (80, 0.067), (90, 0.0097)])
def test_collision_probability_of_the_papers_setting(degrees, u):
    got = collision_log_probability(torch.tensor(math.radians(degrees)).cos(), 10, 150).exp()
    assert abs(got - u) < 0.006 * max(u, 0.05)


def test_collision_probability_keeps_its_digits_where_it_is_tiny():
    """Against exact arithmetic: at small r, u = L (L - 1) / 2 r^2 to first order."""
    cosine = torch.tensor(math.cos(math.pi * (1 - 1e-3)))
    r = (1 - math.acos(float(cosine)) / math.pi) ** 10
    assert math.isclose(
        collision_log_probability(cosine, 10, 150), math.log(150 * 149 / 2) + 2 * math.log(r), rel_tol=1e-3
    )
    assert torch.isfinite(collision_log_probability(torch.tensor([-1.0, 1.0, 1.0001]), 10, 150)).all()


def test_cover_takes_the_fewest_that_reach_the_share():
    mass = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert cover(mass, 0.7).tolist() == [[False, True, False, True], [True, True, True, False]]
    assert cover(mass, 0.65).sum(-1).tolist() == [2, 3]
    assert cover(mass, 1.0).all()
    assert cover(mass, 0.1, at_least=2).sum(-1).tolist() == [2, 2]
    assert cover(mass, 0.99, at_most=2).sum(-1).tolist() == [2, 2]


def test_top_k_takes_the_highest_and_never_minus_infinity():
    score = torch.tensor([[1.0, 5, 3, -math.inf], [2, 2, 2, 9]])
    assert top_k(score, torch.tensor([2, 2])).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert top_k(score, 4).sum(-1).tolist() == [3, 4]
    assert not top_k(score, 0).any()


def test_pool_divides_ragged_blocks_by_what_they_hold():
    x = torch.randn(1, 21, 2, 4, generator=generator(0))
    pooled = pool(x, 8, skip=3)
    assert torch.allclose(pooled[:, 0], x[:, :5].mean(1), atol=1e-6)
    assert torch.allclose(pooled[:, 1], x[:, 5:13].mean(1), atol=1e-6)
    assert torch.allclose(pooled[:, 2], x[:, 13:].mean(1), atol=1e-6)
    assert pooled.shape[1] == 3


def test_vertical_and_slash_mass_are_the_attention_summed_by_block_and_by_block_diagonal():
    q, k, _ = structured_qkv(150)
    vertical, slash = vertical_slash_mass(q[:, -40:], k, 0.2, 16)
    weight = last_queries_attention(q[:, -40:], k, 0.2)
    expected = torch.zeros_like(slash)
    for row, position in enumerate(range(110, 150)):
        for key in range(150):
            expected[:, :, position // 16 - key // 16 if key <= position else 0] += weight[:, :, row, key] / 40
    assert torch.allclose(slash, expected, atol=1e-5)
    assert torch.allclose(vertical.sum(-1), torch.ones_like(vertical.sum(-1)), atol=1e-5)
    assert torch.allclose(vertical[..., 2], weight[..., 32:48].sum((-1, -2)) / 40, atol=1e-6)


def test_mass_covered_is_one_for_everything_and_the_masked_share_otherwise():
    q, k, v = structured_qkv(200)
    kv = KV.of(k, v)
    everything = BlockMask.of(torch.ones(1, 4, 7, 7, dtype=torch.bool), 32, 0)
    assert torch.allclose(mass_covered(q, kv, everything, 0.2), torch.ones(1, 4, 7), atol=1e-6)
    diagonal = BlockMask.of(torch.eye(7, dtype=torch.bool).expand(1, 4, 7, 7), 32, 0)
    last = last_queries_attention(q, k, 0.2)[:, :, -1, 192:].sum(-1)
    assert torch.allclose(mass_covered(q, kv, diagonal, 0.2)[..., -1], last, atol=1e-5)
