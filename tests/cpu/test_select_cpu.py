"""Lists of the highest entries of rows by the CPU kernels, on every instruction set of this CPU."""

import math

import pytest
import torch

from keysift.ops.cpu.library import load
from keysift.ops.select import select_mass_reference, select_top_reference

pytest.importorskip("triton", reason="the cases are those of the Triton kernels' tests, which need triton")
from tests.test_select import KINDS, best, lists, scores

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
cpu = pytest.importorskip("keysift.ops.select_cpu") if load() else None
ISAS = load().usable if load() else ("none",)
INF, NAN = math.inf, math.nan


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 63, 257, 1025])
def test_the_highest_entries_are_chosen_ties_by_lower_index(n, kind, isa):
    score = scores(3, 1, n, n, kind)
    count = torch.tensor([1, n // 3 + 1, n + 5])
    expected = [[best(row, int(c)) for row in rows] for rows, c in zip(score.tolist(), count, strict=True)]
    assert lists(*cpu.chosen_lists(score, count, n, isa=isa)) == expected


def test_counts_of_none_one_and_all_and_lists_never_outgrow_their_size(isa):
    score = scores(1, 4, 37)
    count = torch.tensor([[0, 1, 37, -3]])
    expected = [[best(row, int(c)) for row, c in zip(score[0].tolist(), count[0], strict=True)]]
    assert lists(*cpu.chosen_lists(score, count, 37, isa=isa)) == expected
    for count in (20, torch.tensor([20]), torch.full((1, 4), 20, dtype=torch.int32)):
        assert lists(*cpu.chosen_lists(score, count, 6, isa=isa)) == [[best(row, 6) for row in score[0].tolist()]]


def test_odd_floats(isa):
    tiny, huge = 1e-45, 3.4028235e38
    row = [0.0, -0.0, NAN, -INF, INF, huge, -huge, tiny, -tiny, -0.0, INF, 1.0] * 11
    counts = [1, 22, 30, 40, 60, 80, 99, 121, 132]
    expected = [best([-INF if x != x else x for x in row], k) for k in counts]
    score = torch.tensor(row).repeat(1, len(counts), 1)
    assert lists(*cpu.chosen_lists(score, torch.tensor(counts)[None], len(row), isa=isa)) == [expected]


def test_rows_of_nothing_choose_nothing(isa):
    for share in (None, 0.9):
        assert lists(*cpu.chosen_lists(torch.full((1, 2, 30), -INF), 5, 5, share, isa)) == [[[], []]]
        assert lists(*cpu.chosen_lists(torch.zeros(2, 1, 0), 5, 5, share, isa)) == [[[]], [[]]]


@pytest.mark.parametrize("kind", ["normal", "ties", "holes"])
@pytest.mark.parametrize("n", [1, 150, 3000])
def test_top_p_is_minimal_reaches_the_share_and_is_that_of_the_reference(n, kind, isa):
    score = scores(1, 2, n, n + 7, kind)
    score[0, :, 0] = 0.5  # a row is never all -inf
    score[0, 1, n // 2] = NAN if n > 1 else 0.5
    weight = score.nan_to_num(-INF).double().softmax(-1)[0]
    before = [[]] * 2
    for share in (0.0, 0.3, 0.95):
        (chosen,) = lists(*cpu.chosen_lists(score, n, n, share, isa))
        (expected,) = lists(*select_mass_reference(score, share, n, n))
        for x, mine, theirs, smaller in zip(range(2), chosen, expected, before, strict=True):
            assert mine == best([-INF if y != y else y for y in score[0, x].tolist()], len(mine))
            got = weight[x, mine]
            assert got.sum() >= share - 1e-6
            assert not mine or got.sum() - got.min() < share + 1e-6  # without the smallest it falls short
            assert set(smaller) <= set(mine)
            assert abs(len(mine) - len(theirs)) <= n // 1000
        before = chosen


def test_top_p_of_equal_weights_counts_them(isa):
    score = torch.full((1, 1, 64), -3.0)
    for share, need in ((0.5, 32), (0.25, 16), (0.26, 17), (1.0, 64)):
        assert lists(*cpu.chosen_lists(score, 64, 64, share, isa)) == [[list(range(need))]]


def test_top_p_stops_at_its_limit(isa):
    score = scores(2, 1, 90)
    chosen = lists(*cpu.chosen_lists(score, torch.tensor([3, 0]), 90, 0.999, isa))
    assert chosen == [[best(score[0, 0].tolist(), 3)], [[]]]


def test_strides_and_length_do_not_matter(isa):
    score = scores(2, 50, 3).transpose(1, 2)
    assert lists(*cpu.chosen_lists(score, 9, 9, isa=isa)) == lists(*select_top_reference(score, 9, 9))
    score = scores(1, 2, 20_000)
    assert lists(*cpu.chosen_lists(score, 777, 800, isa=isa)) == lists(*select_top_reference(score, 777, 800))
