"""Quest's bounds, scores and pages: kernels against references, both against plain loops in fp64."""

import importlib
import math
from typing import NamedTuple

import pytest
import torch

from keysift.methods import quest
from keysift.ops import pages
from keysift.ops.pages import Quota
from keysift.types import KV, Ctx
from tests.devices import ANYWHERE, DEVICE, ON_GPU, QUIET
from tests.helpers import generator, poisoned_empty

pytest.importorskip("triton", reason="triton is not installed")
kernels = importlib.import_module("keysift.ops.pages_triton")
select_kernels = importlib.import_module("keysift.ops.select_triton")

pytestmark = [ANYWHERE, QUIET]
BF16 = torch.bfloat16
INF = math.inf


class Case(NamedTuple):
    """Sequences by their first token, and the rows of the view."""

    spans: tuple[tuple[int, int, int], ...]  # first token, start, end
    unit: int
    paged: int = 0
    group: int = 4
    dim: int = 64
    dtype: torch.dtype = BF16


CASES = [
    Case(((0, 4, 100), (0, 4, 63), (0, 0, 1)), 16, group=1),
    Case(((0, 4, 100), (0, 30, 30), (0, 16, 48)), 16, paged=32, group=7, dim=80),
    Case(((37, 41, 100), (0, 4, 96), (99, 99, 100)), 16, dtype=torch.float32),
    Case(((5, 9, 141), (130, 134, 134)), 4, group=1, dim=128),
    Case(((0, 3, 70), (0, 65, 66)), 64, paged=64, dim=128),
    Case(((0, 1, 40), (0, 17, 33)), 1, paged=16, group=1, dtype=torch.float16),
]


def make(case, seed=0, poison=True, device=DEVICE):
    """A view whose buffer, and bounds, are NaN wherever nobody may read."""
    batch, longest = len(case.spans), max(end for *_, end in case.spans)
    rows = -(-longest // max(case.paged, 1)) * max(case.paged, 1)
    x = torch.randn(batch, rows, 2, case.dim, generator=generator(seed)).to(case.dtype)
    origin, start, end = (torch.tensor(x) for x in zip(*case.spans, strict=True))
    at = torch.arange(rows)
    if poison:
        x[(at < start[:, None]) | (at >= end[:, None])] = torch.nan
    table = None
    if case.paged:
        x, table = into_pages(x, case.paged, end, seed)
    bounds = torch.full(side_shape(x, case), torch.nan, dtype=case.dtype)
    kv = KV(x, x, start, end - start, None, table, origin if origin.any() else None, longest)
    return moved(kv, device), bounds.to(device)


def into_pages(x, page, end, seed):
    """Shuffled pages, one of NaN among them, to which the table points where a sequence has ended."""
    batch, count = x.shape[0], x.shape[1] // page
    order = torch.randperm(batch * count, generator=generator(seed)) + 1
    pool = torch.full((batch * count + 1, page, *x.shape[2:]), torch.nan, dtype=x.dtype)
    pool[order] = x.reshape(-1, page, *x.shape[2:])
    table = order.view(batch, count).masked_fill(torch.arange(count) * page >= end[:, None], 0)
    return pool, table.int()


def side_shape(k, case):
    return (k.shape[0], k.shape[2], -(-k.shape[1] // case.unit), 2, case.dim)


def moved(kv, device):
    return kv._replace(**{name: x.to(device) for name, x in kv._asdict().items() if isinstance(x, torch.Tensor)})


def extend(backend, bounds, kv, unit, done, most):
    function = kernels.extend if backend == "kernel" else pages.extend_bounds_reference
    function(bounds, kv, unit, done, most)


def entry(kv, unit, bounds, b, j):
    """Bounds [K, 2, D] of a sequence's page."""
    if kv.table is None:
        return bounds[b, :, j]
    per = kv.k.shape[1] // unit
    return bounds[int(kv.table[b, j // per]), :, j % per]


def by_loops(kv, unit):
    """Sequence and number of each page with a row in the view, and its rows."""
    for b, (first, start, length) in enumerate(torch.stack((kv.first, kv.start, kv.length), 1).tolist()):
        pages_of = {}
        for row in range(start, start + length):
            pages_of.setdefault((row - first) // unit, []).append(row)
        for j, rows in pages_of.items():
            yield b, j, rows


def keys(kv, b, rows):
    """[rows, K, D] in fp64."""
    whole = kv.unpaged().k
    return whole[b, rows].double()


def check_bounds(kv, unit, bounds):
    for b, j, rows in by_loops(kv, unit):
        own = keys(kv, b, rows)
        expected = torch.stack((own.amin(0), own.amax(0)), 1)
        assert torch.equal(entry(kv, unit, bounds, b, j).double(), expected), (b, j)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bounds_are_those_of_the_pages_rows_in_the_view(case):
    (kv, one), (_, other) = make(case), make(case)
    extend("kernel", one, kv, case.unit, kv.start, kv.bound)
    extend("reference", other, kv, case.unit, kv.start, kv.bound)
    check_bounds(kv, case.unit, one)
    assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))
    written = sum(1 for _ in by_loops(kv, case.unit))
    assert int((~one.isnan()).all(-1).all(-1).sum()) == written * 2  # nothing else was touched; two KV heads


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize(
    "case", [CASES[0], CASES[1], CASES[3], pytest.param(CASES[4], marks=pytest.mark.slow)], ids=str
)
def test_rows_that_come_in_pieces_give_what_they_give_at_once(case, backend):
    kv, whole = make(case)
    extend(backend, whole, kv, case.unit, kv.start, kv.bound)
    pieces = torch.full_like(whole, torch.nan)
    done = kv.start
    for size in (1, 17, 300):
        end = torch.minimum(done + size, kv.end)
        extend(backend, pieces, kv._replace(length=end - kv.start), case.unit, done, size)
        done = end
    assert torch.equal(whole.nan_to_num(77.0), pieces.nan_to_num(77.0))


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize(("case", "back"), [(CASES[0], 5), (CASES[1], 33), (CASES[3], 33), (CASES[4], 5)], ids=str)
def test_after_a_rollback_nothing_is_left_of_the_rows_taken_back(case, back, backend):
    (kv, bounds), (new, fresh) = make(case), make(case, 1)
    extend(backend, bounds, kv, case.unit, kv.start, kv.bound)
    shorter = torch.maximum(kv.end - back, kv.start)
    mixed = kv.k.clone()
    for b in range(len(case.spans)):  # other keys follow
        at = torch.arange(int(shorter[b]), int(kv.end[b]), device=DEVICE)
        here, there = (x.locate(at.expand(len(case.spans), -1)) for x in (kv, new))
        mixed[here[0][b], here[1][b]] = new.k[there[0][b], there[1][b]]
    rolled = kv._replace(length=shorter - kv.start)
    extend(backend, bounds, rolled, case.unit, shorter, 0)
    check_bounds(rolled, case.unit, bounds)
    extend(backend, bounds, kv._replace(k=mixed), case.unit, shorter, back)
    extend(backend, fresh, kv._replace(k=mixed), case.unit, kv.start, kv.bound)
    assert torch.equal(bounds.nan_to_num(77.0), fresh.nan_to_num(77.0))


def scored(case, backend, seed=0):
    kv, bounds = make(case, seed)
    extend("reference", bounds, kv, case.unit, kv.start, kv.bound)
    q = torch.randn(len(case.spans), 2 * case.group, case.dim, generator=generator(seed + 9)).to(DEVICE, case.dtype)
    if backend == "kernel":
        return q, kv, bounds, *kernels.scores(q, bounds, kv, case.unit, 0.3)
    return q, kv, bounds, *pages.page_scores_lse(q, bounds, kv, case.unit, 0.3)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_the_least_bound_that_the_bounds_allow(case, backend):
    q, kv, _, score, lse = scored(case, backend)
    expected = torch.full(score.shape, -INF, dtype=torch.float64, device=DEVICE)
    for b, j, rows in by_loops(kv, case.unit):
        own = keys(kv, b, rows).repeat_interleave(case.group, 1)  # [rows, H, D]
        low, high = own.amin(0), own.amax(0)
        x = q[b].double()
        expected[b, :, j] = torch.maximum(x * low, x * high).sum(-1) * 0.3
        assert (expected[b, :, j] >= (x * own).sum(-1).amax(0) * 0.3 - 1e-9).all()
    assert score.shape == (*q.shape[:2], -(-kv.bound // case.unit))
    last = pages._ends(kv, case.unit)[1] * (kv.length > 0)
    behind = torch.arange(score.shape[-1], device=DEVICE) >= last[:, None]  # unspecified
    score = score.masked_fill(behind[:, None], -INF)
    assert torch.equal(score == -INF, expected == -INF)
    assert torch.allclose(score.double(), expected, rtol=1e-4, atol=1e-4)
    unread = torch.arange(lse.shape[-1], device=DEVICE) * pages.LSE_PAGES >= last[:, None]
    lse = lse.masked_fill(unread[:, None], -INF)
    assert torch.allclose(lse.logsumexp(-1).double(), expected.logsumexp(-1), rtol=1e-5, atol=1e-4)


def rows_of(selection):
    assert selection.rows.dtype == selection.count.dtype == torch.int32 and selection.log_w is None
    pairs = zip(selection.rows.tolist(), selection.count.tolist(), strict=True)
    return [[row[:n] for row, n in zip(rows, count, strict=True)] for rows, count in pairs]


def expected_rows(kv, unit, score, count, per, most):
    """By plain loops over pages, heads and rows."""
    batch, heads, _ = score.shape
    group = heads // 2 if per == "kv_head" else 1
    rows = [[[] for _ in range(heads // group)] for _ in range(batch)]
    of_page = {(b, j): r for b, j, r in by_loops(kv, unit)}
    for b in range(batch):
        able = sorted(j for c, j in of_page if c == b)
        for x in range(heads // group):
            worth = dict.fromkeys(able, 0.0)
            for head in range(x * group, (x + 1) * group):
                own = score[b, head].double()
                total = sum(math.exp(own[j] - own[able].max()) for j in able)
                for j in able:
                    worth[j] += math.exp(own[j] - own[able].max()) / total if group > 1 else float(own[j])
            chosen = sorted(able, key=lambda j: (-worth[j], j))[: min(int(count[b]), most)]
            rows[b][x] = [r for j in sorted(chosen) for r in of_page[b, j]]
    return rows


LOOPING = [(CASES[5], 32), pytest.param(CASES[3], 32, marks=pytest.mark.slow)]  # more pages than that


@pytest.mark.parametrize("per", pages.PER)
@pytest.mark.parametrize(("case", "whole"), [*((case, None) for case in CASES), *LOOPING], ids=str)
def test_the_best_pages_are_read_and_only_their_rows_in_the_view(monkeypatch, case, whole, per):
    """Scores that do not fit in registers, here ``whole`` of them, are read in pieces."""
    if whole:
        monkeypatch.setattr(select_kernels, "WHOLE_ROW", whole)
    _, kv, _, score, lse = scored(case, "kernel")
    for some, most in ((1, 1), (5, 4), (1000, score.shape[2])):
        count = torch.tensor([some, some // 2, 2][: len(case.spans)], device=DEVICE)
        expected = expected_rows(kv, case.unit, score, count, per, most)
        one = kernels.top(score, kv, case.unit, count, most, per == "kv_head", lse)
        assert rows_of(one) == expected
        assert one.rows.shape == (len(case.spans), 2 if per == "kv_head" else 2 * case.group, most * case.unit)
        assert rows_of(pages.top_pages_reference(score, kv, case.unit, count, most, per)) == expected


@pytest.mark.parametrize("per", pages.PER)
@pytest.mark.parametrize("programs", [1, 8192])
def test_what_no_kernel_has_written_none_reads(monkeypatch, programs, per):
    """... however many parts of the pages a program goes through."""
    case = Case(((0, 3, 300), (0, 130, 140), (5, 5, 5), (1, 150, 255)), 2, paged=32, group=2)
    *_, expected, _ = scored(case, "reference")

    monkeypatch.setattr(kernels, "SCORE_PROGRAMS", programs)
    q, kv, bounds, *_ = scored(case, "kernel")
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    score, lse = kernels.scores(q, bounds, kv, 2, 0.3)
    count = torch.tensor([40, 40, 40, 7], device=DEVICE)
    found = rows_of(kernels.top(score, kv, 2, count, 40, per == "kv_head", lse))
    assert found == rows_of(pages.top_pages_reference(expected, kv, 2, count, 40, per))


@pytest.mark.parametrize("per", pages.PER)
@pytest.mark.parametrize("bound", [4097, pytest.param(17000, marks=pytest.mark.slow)])
def test_the_bound_of_a_step_says_nothing_of_what_is_chosen(bound, per):
    """... neither where as many pages are held as it allows for, nor where fewer are; scores behind are not read."""
    lengths = torch.tensor([1, 1024, 1025, 4097])
    k = torch.zeros(len(lengths), 1, 2, 16, device=DEVICE)
    kv = KV(k, k, torch.zeros_like(lengths).to(DEVICE), lengths.to(DEVICE), most=bound)
    score = torch.randn(len(lengths), 4, bound, generator=generator(3)).to(DEVICE)
    behind = (torch.arange(bound, device=DEVICE) >= kv.length[:, None])[:, None]
    specified, poisoned = score.masked_fill(behind, -INF), score.masked_fill(behind, torch.nan)
    count, lse = kv.length // 3 + 1, pages._lse(specified)
    expected = pages.top_pages_reference(specified, kv, 1, count, 700, per)
    lse[lse.isneginf()] = torch.nan
    assert rows_of(kernels.top(poisoned, kv, 1, count, 700, per == "kv_head", lse)) == rows_of(expected)


@pytest.mark.parametrize("per", pages.PER)
def test_everything_can_be_selected(per):
    for case in CASES[:4]:
        _, kv, _, score, lse = scored(case, "kernel")
        count = torch.full((len(case.spans),), score.shape[2], device=DEVICE)
        rows = rows_of(kernels.top(score, kv, case.unit, count, score.shape[2], per == "kv_head", lse))
        for b, (_, start, end) in enumerate(case.spans):
            assert all(own == list(range(start, end)) for own in rows[b])


def test_ties_go_to_the_earlier_page_and_scores_outside_the_view_do_not_count():
    kv, _ = make(Case(((0, 20, 150),), 16))
    score = torch.zeros(1, 8, 10, device=DEVICE)
    count = torch.tensor([3], device=DEVICE)
    for rows in (
        rows_of(kernels.top(score, kv, 16, count, 5, False, score)),
        rows_of(pages.top_pages_reference(score, kv, 16, count, 5, "query_head")),
    ):
        assert rows == [[list(range(20, 64))] * 8]


def test_heads_of_a_group_have_one_say_each():
    """A head whose scores are large does not decide for the others."""
    kv, _ = make(Case(((0, 0, 128),), 16))
    score = torch.zeros(1, 4, 8, device=DEVICE)
    score[0, 0] = torch.linspace(90, 80, 8)  # the first head wants page 0 most
    score[0, 1, 5] = 6.0  # the second wants page 5
    count = torch.tensor([2], device=DEVICE)
    expected = [*range(16), *range(80, 96)]
    lse = score.logsumexp(-1, keepdim=True)
    assert rows_of(kernels.top(score, kv, 16, count, 2, True, lse))[0][0] == expected
    assert rows_of(pages.top_pages_reference(score, kv, 16, count, 2))[0][0] == expected


@pytest.mark.parametrize("method", [quest.Method(keep=0.3, page=4), quest.Method(budget=90, page=8)], ids=str)
def test_a_quota_is_the_count_of_the_method(method):
    lengths = torch.tensor([0, 1, 3, 50, 99, 119])
    keys = torch.tensor([method.most(n) for n in lengths.tolist()])
    count = (keys // method.page).clamp(min=1)
    kv, _ = make(Case(tuple((0, 0, int(n)) for n in lengths), method.page))
    quota = method.quota(kv.k[:1, 0], kv)
    assert torch.equal(quota.pages(lengths, method.page), count)
    score = torch.randn(6, 4, -(-kv.bound // method.page), generator=generator(1)).to(DEVICE)
    lse, most = score.logsumexp(-1, keepdim=True), score.shape[2]
    one = kernels.top(score, kv, method.page, quota, most, False, lse)
    other = kernels.top(score, kv, method.page, count.to(DEVICE), most, False, lse)
    assert rows_of(one) == rows_of(other)


def test_a_unit_must_divide_the_page():
    kv, bounds = make(CASES[1])
    with pytest.raises(ValueError, match="unit=48: must be a positive number of tokens, a divisor of the 32 tokens"):
        pages.extend_bounds(bounds, kv, 48, kv.start, 1)
    with pytest.raises(ValueError, match="per=token"):
        pages.top_pages(torch.zeros(3, 14, 4), kv, 16, Quota(), 1, "token")


def stepped(method, case, seed=0):
    """What the method selects, from side data that it keeps itself."""
    kv, _ = make(case, seed)
    (name, side), *others = method.sides(case.dim, case.dtype).items()
    assert not others and (name, side.unit, side.shape, side.dtype) == ("bounds", case.unit, (2, case.dim), case.dtype)
    index = {name: torch.full(side_shape(kv.k, case), side.fill, dtype=side.dtype, device=DEVICE)}
    ctx = Ctx(0, 0.3, kv.length)
    method.extend(index, kv, kv.start, kv.bound, ctx)
    q = torch.randn(len(case.spans), 2 * case.group, case.dim, generator=generator(seed + 9)).to(DEVICE, case.dtype)
    return kv, index, method.select(q, kv, index, ctx)


@pytest.mark.parametrize("per", pages.PER)
def test_the_method_reads_its_share_of_whole_pages(per):
    for case in CASES[:4]:
        method = quest.Method(page=case.unit, keep=0.5, per=per)
        kv, index, selection = stepped(method, case)
        for b, (first, start, end) in enumerate(case.spans):
            whole = max(1, method.most(end - start) // case.unit)
            for rows in rows_of(selection)[b]:
                assert set(rows) <= set(range(start, end)) and rows == sorted(set(rows))
                used = {(r - first) // case.unit for r in rows}
                total = len(range((start - first) // case.unit, -(-(end - first) // case.unit))) if end > start else 0
                assert len(used) == min(whole, total)
        pages_read = sum(1 for _ in by_loops(kv, case.unit))
        scanned = method.scan_bytes(kv, index, 2 * case.group).sum()
        assert int(scanned) == pages_read * 2 * 2 * case.dim * case.dtype.itemsize


def test_pages_are_powers_of_two():
    with pytest.raises(ValueError, match="page=12"):
        quest.Method(page=12)


REAL = [(1, 131_072), (16, 65_536), (24, 32_768)]  # batch, context


@pytest.mark.parametrize("per", pages.PER)
@pytest.mark.parametrize(("batch", "context"), [pytest.param(*x, marks=ON_GPU) for x in REAL])
def test_a_step_in_a_cuda_graph_is_the_step_outside(batch, context, per):
    """... after lengths, queries and keys have changed in place; and it is the reference's but for close scores."""
    page, dim, heads, kv_heads, method = 128, 128, 32, 8, quest.Method(per=per)
    count = batch * context // page
    k = torch.randn(count, page, kv_heads, dim, device="cuda", dtype=BF16)
    table = torch.randperm(count, device="cuda").int().view(batch, -1)
    start = torch.full((batch,), method.sinks, device="cuda")
    length = torch.full((batch,), context - 200, device="cuda")
    kv = KV(k, k, start, length, None, table, None, context)
    side = method.sides(dim, BF16)["bounds"]
    index = {"bounds": torch.zeros(count, kv_heads, page // side.unit, *side.shape, dtype=side.dtype, device="cuda")}
    q, ctx = torch.randn(batch, heads, dim, device="cuda", dtype=BF16), Ctx(0, dim**-0.5, length)
    done = start.clone()
    method.extend(index, kv, done, kv.bound, ctx)
    done.copy_(kv.end)

    def step():
        method.extend(index, kv, done, 1, ctx)
        return method.select(q, kv, index, ctx)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for n in range(3):
        q.normal_()
        done.copy_(start + length)
        length.add_(1 + 40 * (n == 1)).sub_(torch.arange(batch, device="cuda") % 5)
        done.copy_(torch.minimum(done, start + length))
        if n == 1:
            method.extend(index, kv, done, 41, ctx)
        graph.replay()
        replayed = rows_of(captured)
        assert replayed == rows_of(step())
        score = pages.page_scores_reference(q, index["bounds"], kv, side.unit, ctx.scale)
        counts = method.quota(q, kv).pages(length, side.unit)
        most = max(1, method.most(kv.bound) // side.unit)
        reference = rows_of(pages.top_pages_reference(score, kv, side.unit, counts, most, per))
        for mine, theirs in zip(replayed, reference, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert len(set(one) ^ set(other)) <= 0.01 * len(other)
