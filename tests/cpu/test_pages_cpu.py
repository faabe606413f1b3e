"""Quest's bounds, scores and pages by the CPU kernels, on every instruction set of this CPU, against plain loops."""

import functools

import pytest
import torch

from keysift.ops import pages
from keysift.ops.cpu.library import load
from keysift.ops.pages import LSE_PAGES, Quota
from tests.helpers import generator

pytest.importorskip("triton", reason="the cases are those of the Triton kernels' tests, which need triton")
from tests.test_pages import BF16, CASES, INF, Case, by_loops, check_bounds, expected_rows, keys, rows_of
from tests.test_pages import make as make_on

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
cpu = pytest.importorskip("keysift.ops.pages_cpu") if load() else None
ISAS = load().usable if load() else ("none",)
make = functools.partial(make_on, device="cpu")
MORE = [
    Case(((0, 4, 100), (0, 4, 63)), 16, group=5, dim=33, dtype=torch.float32),
    Case(((0, 3, 60),), 2, paged=6, group=9, dim=256),
    Case(((2, 3, 100),), 4, group=2, dim=7, dtype=torch.float16),
]


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_bounds_are_those_of_the_pages_rows_in_the_view(case, isa):
    (kv, one), (_, other) = make(case), make(case)
    cpu.extend(one, kv, case.unit, kv.start, kv.bound, isa)
    pages.extend_bounds_reference(other, kv, case.unit, kv.start, kv.bound)
    check_bounds(kv, case.unit, one)
    assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))
    assert int((~one.isnan()).all(-1).all(-1).sum()) == 2 * sum(1 for _ in by_loops(kv, case.unit))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[4]], ids=str)
def test_rows_that_come_in_pieces_give_what_they_give_at_once(case, isa):
    kv, whole = make(case)
    cpu.extend(whole, kv, case.unit, kv.start, kv.bound, isa)
    pieces, done = torch.full_like(whole, torch.nan), kv.start
    for size in (1, 17, 300):
        end = torch.minimum(done + size, kv.end)
        cpu.extend(pieces, kv._replace(length=end - kv.start), case.unit, done, size, isa)
        done = end
    assert torch.equal(whole.nan_to_num(77.0), pieces.nan_to_num(77.0))


@pytest.mark.parametrize(("case", "back"), [(CASES[0], 5), (CASES[1], 33), (CASES[4], 5)], ids=str)
def test_after_a_rollback_nothing_is_left_of_the_rows_taken_back(case, back, isa):
    kv, bounds = make(case)
    cpu.extend(bounds, kv, case.unit, kv.start, kv.bound, isa)
    shorter = torch.maximum(kv.end - back, kv.start)
    rolled = kv._replace(length=shorter - kv.start)
    cpu.extend(bounds, rolled, case.unit, shorter, 0, isa)
    check_bounds(rolled, case.unit, bounds)


def scored(case, isa, seed=0):
    kv, bounds = make(case, seed)
    pages.extend_bounds_reference(bounds, kv, case.unit, kv.start, kv.bound)
    q = torch.randn(len(case.spans), 2 * case.group, case.dim, generator=generator(seed + 9)).to(case.dtype)
    return q, kv, *cpu.scores(q, bounds, kv, case.unit, 0.3, isa)


@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_scores_are_the_least_bound_that_the_bounds_allow(case, isa):
    q, kv, score, lse = scored(case, isa)
    expected = torch.full(score.shape, -INF, dtype=torch.float64)
    for b, j, rows in by_loops(kv, case.unit):
        own = keys(kv, b, rows).repeat_interleave(case.group, 1)  # [rows, H, D]
        x = q[b].double()
        expected[b, :, j] = torch.maximum(x * own.amin(0), x * own.amax(0)).sum(-1) * 0.3
    assert score.shape == (*q.shape[:2], -(-kv.bound // case.unit))
    assert lse.shape[2] == -(-score.shape[2] // LSE_PAGES)
    assert torch.equal(score == -INF, expected == -INF)
    assert torch.allclose(score.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(lse.logsumexp(-1).double(), expected.logsumexp(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("per", pages.PER)
@pytest.mark.parametrize("case", CASES + MORE[:1], ids=str)
def test_the_best_pages_are_read_and_only_their_rows_in_the_view(case, per, isa):
    _, kv, score, lse = scored(case, isa)
    for some, most in ((1, 1), (5, 4), (1000, score.shape[2])):
        count = torch.tensor([some, some // 2, 2][: len(case.spans)])
        expected = expected_rows(kv, case.unit, score, count, per, most)
        one = cpu.top(score, kv, case.unit, count, most, per == "kv_head", lse, isa)
        assert rows_of(one) == expected
        assert one.rows.shape == (len(case.spans), 2 if per == "kv_head" else 2 * case.group, most * case.unit)


def test_ties_go_to_the_earlier_page_and_scores_outside_the_view_do_not_count(isa):
    kv, _ = make(Case(((0, 20, 150),), 16))
    score = torch.zeros(1, 8, 10)
    found = rows_of(cpu.top(score, kv, 16, torch.tensor([3]), 5, False, score, isa))
    assert found == [[list(range(20, 64))] * 8]


def test_heads_of_a_group_have_one_say_each(isa):
    """A head whose scores are large does not decide for the others."""
    kv, _ = make(Case(((0, 0, 128),), 16))
    score = torch.zeros(1, 4, 8)
    score[0, 0] = torch.linspace(90, 80, 8)  # the first head wants page 0 most
    score[0, 1, 5] = 6.0  # the second wants page 5
    found = rows_of(cpu.top(score, kv, 16, torch.tensor([2]), 2, True, score.logsumexp(-1, keepdim=True), isa))
    assert found[0][0] == [*range(16), *range(80, 96)]


@pytest.mark.parametrize("quota", [Quota(share=0.3), Quota(keys=90)], ids=str)
def test_a_quota_is_the_count_that_it_says(quota, isa):
    lengths = torch.tensor([0, 1, 3, 50, 99, 119])
    kv, _ = make(Case(tuple((0, 0, int(n)) for n in lengths), 4))
    score = torch.randn(6, 4, -(-kv.bound // 4), generator=generator(1))
    lse, most = score.logsumexp(-1, keepdim=True), score.shape[2]
    one = cpu.top(score, kv, 4, quota, most, False, lse, isa)
    assert rows_of(one) == rows_of(cpu.top(score, kv, 4, quota.pages(lengths, 4), most, False, lse, isa))


def test_threads_change_nothing(isa):
    case, found = Case(((0, 4, 3000), (5, 40, 2000)), 16, paged=64, dtype=BF16), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            _, kv, score, lse = scored(case, isa)
            found.append((score, lse, rows_of(cpu.top(score, kv, 16, Quota(share=0.1), 30, True, lse, isa))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
