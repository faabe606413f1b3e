"""Lists of the highest entries of rows: the kernel against the reference, both against plain loops."""

import importlib
import math

import pytest
import torch

from keysift.ops.select import select_mass, select_mass_reference, select_top, select_top_reference
from tests.devices import ANYWHERE, DEVICE, ON_GPU, QUIET
from tests.helpers import generator

pytest.importorskip("triton", reason="triton is not installed")
kernels = importlib.import_module("keysift.ops.select_triton")

pytestmark = [ANYWHERE, QUIET]
INF, NAN = math.inf, math.nan
BACKENDS = ["kernel", "reference"]


def top(backend, score, count, most):
    function = kernels.chosen_lists if backend == "kernel" else select_top_reference
    return lists(*function(score.to(DEVICE), count.to(DEVICE) if isinstance(count, torch.Tensor) else count, most))


def mass(backend, score, share, at_most, most):
    at_most = at_most.to(DEVICE) if isinstance(at_most, torch.Tensor) else at_most
    if backend == "kernel":
        return lists(*kernels.chosen_lists(score.to(DEVICE), at_most, most, share))
    return lists(*select_mass_reference(score.to(DEVICE), share, at_most, most))


def lists(index, count):
    """Chosen entries of each row."""
    assert index.dtype == count.dtype == torch.int32
    index, count = index.tolist(), count.tolist()
    return [[x[:n] for x, n in zip(*pair, strict=True)] for pair in zip(index, count, strict=True)]


def best(row, count):
    """By a plain loop: the highest first, then the earlier."""
    able = [i for i, x in enumerate(row) if x > -INF]
    return sorted(sorted(able, key=lambda i: (-row[i], i))[: max(count, 0)])


def scores(batch, rows, n, seed=0, kind="normal"):
    x = torch.randn(batch, rows, n, generator=generator(seed)) * 3
    if kind == "ties":
        x = x.round().clamp(-2, 2)
    if kind == "wide":
        x = torch.exp2(20 * x) * x.sign()
    if kind == "holes":
        x[torch.rand(x.shape, generator=generator(seed + 1)) < 0.4] = -INF
    return x


KINDS = ["normal", "ties", "wide", "holes"]
LOOPING = [(150, "ties", 128), *(pytest.param(257, kind, 128, marks=pytest.mark.slow) for kind in KINDS)]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["registers", "looping"])
def small_rows(request, monkeypatch):
    """Rows that do not fit in registers are read in pieces; pieces of 128 here."""
    if request.param:
        monkeypatch.setattr(kernels, "WHOLE_ROW", 128)


@pytest.mark.parametrize(("n", "kind", "whole"), [*((n, kind, None) for n in (1, 63, 257) for kind in KINDS), *LOOPING])
def test_the_highest_entries_are_chosen_ties_by_lower_index(monkeypatch, n, kind, whole):
    if whole:
        monkeypatch.setattr(kernels, "WHOLE_ROW", whole)
    score = scores(3, 1, n, n, kind)
    count = torch.tensor([1, n // 3 + 1, n + 5])
    expected = [[best(row, int(c)) for row in rows] for rows, c in zip(score.tolist(), count, strict=True)]
    for backend in BACKENDS:
        assert top(backend, score, count, n) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_of_none_one_and_all(backend):
    score = scores(1, 4, 37)
    count = torch.tensor([[0, 1, 37, -3]])
    expected = [[best(row, int(c)) for row, c in zip(score[0].tolist(), count[0], strict=True)]]
    assert top(backend, score, count, 37) == expected
    assert [len(x) for x in expected[0]] == [0, 1, 37, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_is_one_number_or_one_a_sequence_or_one_a_row(backend):
    score = scores(2, 3, 50)
    for count in (7, torch.tensor([7, 7]), torch.full((2, 3), 7, dtype=torch.int32)):
        assert top(backend, score, count, 10) == [[best(row, 7) for row in rows] for rows in score.tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_never_outgrow_their_size(backend):
    score = scores(1, 2, 50)
    assert top(backend, score, 20, 6) == [[best(row, 6) for row in score[0].tolist()]]


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_floats(backend):
    tiny, huge = 1e-45, 3.4028235e38
    row = [0.0, -0.0, NAN, -INF, INF, huge, -huge, tiny, -tiny, -0.0, INF, 1.0] * 11
    counts = [1, 22, 30, 40, 60, 80, 99, 121, 132]
    expected = [best([-INF if x != x else x for x in row], k) for k in counts]
    score = torch.tensor(row).repeat(1, len(counts), 1)
    assert top(backend, score, torch.tensor(counts)[None], len(row)) == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_nothing_choose_nothing(backend):
    assert top(backend, torch.full((1, 2, 30), -INF), 5, 5) == [[[], []]]
    assert mass(backend, torch.full((1, 2, 30), -INF), 0.9, 5, 5) == [[[], []]]
    assert top(backend, torch.zeros(2, 1, 0), 5, 5) == [[[]], [[]]]


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("kind", ["normal", "ties", "holes"])
@pytest.mark.parametrize("n", [1, 150])
@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_is_minimal_reaches_the_share_and_grows_with_it(backend, n, kind):
    score = scores(1, 2, n, n + 7, kind)
    score[0, :, 0] = 0.5  # a row is never all -inf
    weight = score.double().softmax(-1)[0]
    before = [[]] * 2
    for share in (0.0, 0.3, 0.95):
        (chosen,) = mass(backend, score, share, n, n)
        for x, mine, smaller in zip(range(2), chosen, before, strict=True):
            assert mine == best(score[0, x].tolist(), len(mine))
            got = weight[x, mine]
            assert got.sum() >= share - 1e-6
            assert not mine or got.sum() - got.min() < share + 1e-6  # without the smallest it falls short
            assert set(smaller) <= set(mine)
        before = chosen


@pytest.mark.slow
@pytest.mark.usefixtures("small_rows")
def test_top_p_of_the_kernel_is_that_of_the_reference():
    for kind in ("normal", "ties", "holes"):
        score, at_most = scores(2, 1, 201, 3, kind), torch.tensor([11, 201])
        for share in (0.2, 0.9):
            assert mass("kernel", score, share, at_most, 201) == mass("reference", score, share, at_most, 201)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_of_equal_weights_counts_them(backend):
    score = torch.full((1, 1, 64), -3.0)
    for share, need in ((0.5, 32), (0.25, 16), (0.26, 17), (1.0, 64)):
        assert mass(backend, score, share, 64, 64) == [[list(range(need))]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_stops_at_its_limit(backend):
    score = scores(2, 1, 90)
    chosen = mass(backend, score, 0.999, torch.tensor([3, 0]), 90)
    assert chosen == [[best(score[0, 0].tolist(), 3)], [[]]]


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"share=1\.5"):
        select_mass(torch.zeros(1, 1, 4), 1.5, 4, 4)


def test_strides_do_not_matter():
    score = scores(2, 50, 3).transpose(1, 2)
    assert top("kernel", score, 9, 9) == top("reference", score, 9, 9)


@pytest.mark.parametrize("n", [pytest.param(x, marks=ON_GPU) for x in (4096, 8195, 16384, 131_072)])
def test_long_rows_on_a_gpu(n):
    for kind in ("normal", "ties", "wide", "holes"):
        score, count = scores(2, 8, n, 5, kind), torch.tensor([n // 20, n // 2])
        assert lists(*select_top(score.cuda(), count.cuda(), n)) == lists(*select_top_reference(score, count, n))
    score = scores(2, 8, n, 6) * 2
    index, count = select_mass(score.cuda(), 0.95, n, n)
    again = select_mass(score.cuda(), 0.95, n, n)
    assert torch.equal(count, again[1]) and lists(index, count) == lists(*again)
    reference = select_mass_reference(score, 0.95, n, n)[1]
    assert (count.cpu() - reference).abs().max() <= 1 + n // 10_000  # sums in fp32
