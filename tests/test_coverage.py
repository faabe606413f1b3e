"""How much attention a mask covers, and how few blocks could have, against brute force."""

import itertools
import math

import pytest
import torch

from keysift.ops.coverage import COVERAGE_ROWS, block_mass, fewest_blocks, mass_covered
from keysift.types import KV, BlockMask
from tests.helpers import generator, structured_qkv


def weights(q, k, scale):
    """Attention of every query in fp64, ``[B, H, T, N]``."""
    tokens, keys = q.shape[1], k.shape[1]
    score = torch.einsum("bthd,bnhd->bhtn", q.double(), k.double().repeat_interleave(q.shape[2] // k.shape[2], 2))
    seen = torch.arange(keys) <= torch.arange(keys - tokens, keys)[:, None]
    return (score * scale).masked_fill(~seen, -math.inf).softmax(-1)


@pytest.mark.parametrize(("tokens", "keys"), [(150, 150), (57, 150), (1, 63), (1, 1), (100, 128)])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_block_mass_is_the_mean_attention_of_all_rows(tokens, keys, group):
    q, k, v = structured_qkv(keys, 2 * group, 2, batch=2)
    q, block = q[:, -tokens:], 16
    first, columns = (keys - tokens) // block, math.ceil(keys / block)
    weight = torch.nn.functional.pad(weights(q, k, 0.2), (0, columns * block - keys))
    by_block = weight.unflatten(-1, (columns, block)).sum(-1)
    at = torch.arange(keys - tokens, keys) // block
    expected = torch.stack([by_block[:, :, at == i].mean(2) for i in range(first, columns)], 2)
    mass = block_mass(q, KV.of(k, v), 0.2, block, range(first, columns))
    assert torch.allclose(mass.double(), expected, atol=1e-5)
    assert torch.allclose(mass.sum(-1), torch.ones(mass.shape[:-1]), atol=1e-5)
    some = block_mass(q, KV.of(k, v), 0.2, block, [columns - 1])
    assert torch.allclose(some, mass[:, :, -1:], atol=1e-6)


@pytest.mark.parametrize(("tokens", "keys", "most"), [(150, 150, 64), (150, 150, 3), (57, 150, 2), (70, 150, 1)])
def test_mass_covered_is_the_masked_share_of_rows_spread_over_the_query_blocks(tokens, keys, most):
    q, k, v = structured_qkv(keys)
    q, block, first = q[:, -tokens:], 16, (keys - tokens) // 16
    blocks = 10 - first
    active = torch.rand(1, 4, blocks, 10, generator=generator(0)) < 0.5
    covered = mass_covered(q, KV.of(k, v), BlockMask.of(active, block, first), 0.2, most)
    assert covered.shape == (1, 4, min(most, blocks))
    weight = weights(q, k, 0.2)
    for i in range(covered.shape[-1]):
        at = (2 * i + 1) * blocks // (2 * covered.shape[-1])  # middle of the i-th part of the query blocks
        rows = range(max((first + at) * block, keys - tokens), min((first + at + 1) * block, keys))
        row = rows[-1] if i == covered.shape[-1] - 1 else rows[len(rows) // 2]
        seen = active[:, :, at].repeat_interleave(block, -1)[..., :keys]
        expected = (weight[:, :, row - keys + tokens] * seen).sum(-1)
        assert torch.allclose(covered[..., i].double(), expected, atol=1e-5)


def test_mass_covered_looks_at_few_rows_of_a_long_prompt():
    q, k, v = structured_qkv(16 * 90)
    mask = BlockMask.of(torch.ones(1, 4, 90, 90, dtype=torch.bool), 16, 0)
    covered = mass_covered(q, KV.of(k, v), mask, 0.2)
    assert covered.shape == (1, 4, COVERAGE_ROWS)
    assert torch.allclose(covered, torch.ones(1, 4, COVERAGE_ROWS), atol=1e-5)


def by_hand(mass, share):
    """Blocks of the smallest share at which every row, cut off there, covers ``share`` in the mean."""
    for level in sorted({0.0, *(sum(r[:n]) for r in mass for n in range(len(r) + 1))}):
        taken = [next(n for n in range(len(r) + 1) if sum(r[:n]) >= level - 1e-9 or n == len(r)) for r in mass]
        if sum(sum(r[:n]) for r, n in zip(mass, taken, strict=True)) / len(mass) >= share - 1e-9:
            return sum(taken)
    raise AssertionError


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77, 0.9, 1.0])
def test_fewest_blocks_take_each_rows_heaviest_up_to_one_share(share):
    mass = torch.rand(3, 2, 7, 9, generator=generator(1), dtype=torch.float64) ** 3
    mass[..., 5:] *= torch.arange(7)[:, None] > 3  # rows of different lengths
    mass /= mass.sum(-1, keepdim=True)
    got = fewest_blocks(mass, torch.full((3, 2), share, dtype=torch.float64))
    for a, b in itertools.product(range(3), range(2)):
        rows = [sorted(row, reverse=True) for row in mass[a, b].tolist()]
        assert abs(int(got[a, b]) - by_hand(rows, share)) <= (share in (0.0, 1.0)) * 7  # its ends are rounding's


def test_fewest_blocks_is_a_limit():
    """No choice row by row with as much in every row takes fewer; the mean's is between."""
    mass = torch.rand(1, 1, 4, 6, generator=generator(2)) ** 2
    mass /= mass.sum(-1, keepdim=True)
    best = {}
    for taken in itertools.product(range(7), repeat=4):
        rows = [mass[0, 0, i].sort(descending=True).values[:n].sum() for i, n in enumerate(taken)]
        covered = float(sum(rows)) / 4
        for share in (0.5, 0.8, 0.95):
            if covered >= share:
                best[share] = min(best.get(share, 99), sum(taken))
    for share, fewest in best.items():
        got = int(fewest_blocks(mass, torch.full((1, 1), share)))
        assert fewest <= got <= fewest + 4
