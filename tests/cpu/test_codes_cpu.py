"""Codes in bit planes by the CPU kernels, on every instruction set of this CPU, against a comparison of integers."""

import functools
from types import SimpleNamespace

import pytest
import torch

from keysift.ops import codes
from keysift.ops.cpu.library import load
from keysift.types import KV, Law
from tests.helpers import generator
from tests.test_codes import (
    CASES,
    NO_POWER_OF_TWO,
    Case,
    bits_of,
    expected_rows,
    hash_all,
    integers,
    listed,
    sixteenths,
)
from tests.test_codes import problem as problem_on

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
cpu = pytest.importorskip("keysift.ops.codes_cpu") if load() else None
tables = pytest.importorskip("keysift.ops.buckets_cpu") if load() else None
ISAS = load().usable if load() else ("none",)
problem = functools.partial(problem_on, device="cpu")


@pytest.fixture(params=ISAS)
def ops(request):
    isa = request.param
    return SimpleNamespace(
        hash_planes=lambda *args: cpu.hash_planes(*args, isa=isa),
        hash_query=lambda *args: cpu.hash_query(*args, isa=isa),
        collisions=lambda *args: cpu.collisions(*args, isa=isa),
    )


SOME = [case for case in CASES + NO_POWER_OF_TWO if case.tables < 100]  # to compare integers takes long


@pytest.mark.parametrize("case", SOME, ids=str)
def test_rows_are_those_whose_integer_codes_agree_in_two_tables(ops, case):
    p = problem(case)
    hash_all(ops, case, p)
    query = ops.hash_query(p.q, p.w, case.bits)
    assert query.tolist() == [
        [integers(p.q[b, h], p.w[h // case.group], case.bits) for h in range(p.q.shape[1])]
        for b in range(len(case.spans))
    ]
    selection = ops.collisions(query, p.planes, p.kv, case.bits, None)
    found = listed(selection)
    assert found == expected_rows(case, p)
    assert 0 < sum(map(len, found)) < case.group * case.kv_heads * sum(e - s for s, e in case.spans)
    assert selection.rows.dtype == selection.count.dtype == torch.int32
    assert selection.rows.shape[2] == int(selection.count.max())


ODD = [
    Case(((4, 70),), page=256, bits=10, tables=150, group=4, dim=128),
    Case(((3, 150), (0, 40)), group=3, dim=37, page=16, kv_heads=2),
    Case(((0, 130),), group=5, dim=256, bits=3, tables=11, dtype=torch.float32),
    Case(((0, 130),), group=2, dim=1, bits=1, tables=5, dtype=torch.float16),
    Case(((1, 9000), (8000, 9000)), bits=2, tables=3, page=128),
]


@pytest.mark.parametrize("case", ODD, ids=str)
def test_any_dim_group_and_length_gives_the_rows_of_the_reference(ops, case):
    p, other = problem(case), problem(case)
    hash_all(ops, case, p)
    codes.hash_planes_reference(
        other.planes, other.kv, other.mean, other.threshold, other.w, other.kv.start, p.kv.bound
    )
    query = ops.hash_query(p.q, p.w, case.bits)
    assert torch.equal(query, codes.hash_query_reference(p.q, p.w, case.bits))
    expected = codes.collisions_reference(query, other.planes, other.kv, case.bits)
    assert listed(ops.collisions(query, p.planes, p.kv, case.bits, None)) == listed(expected)
    assert torch.equal(p.planes, other.planes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_of_keys_that_no_grid_holds_differ_next_to_never(ops, dtype):
    g = generator(1)
    k = (torch.randn(1, 300, 2, 128, generator=g) * torch.rand(128, generator=g).mul(3).exp()).to(dtype)
    kv = KV.of(k, k)
    w = codes.directions(codes.projections(1, 2, 2, 128, 300, torch.device("cpu")), 10)
    mean = codes.mean_key(kv)
    threshold = codes.thresholds(mean, w)
    mine, theirs = (torch.zeros(1, 2, 3, 300, 4, dtype=torch.int32) for _ in range(2))
    ops.hash_planes(mine, kv, mean, threshold, w, kv.start, 300)
    codes.hash_planes_reference(theirs, kv, mean, threshold, w, kv.start, 300)
    differs = sum(bin(x & 0xFFFFFFFF).count("1") for x in (mine ^ theirs).flatten().tolist())
    assert differs / (2 * 300 * 300) < (1e-6 if dtype == torch.float32 else 1e-4)
    again = torch.zeros_like(mine)
    ops.hash_planes(again, kv, mean, threshold, w.bfloat16(), kv.start, 300)
    assert torch.equal(again, mine)


@pytest.mark.parametrize("page", [0, 16, 128])
def test_codes_made_step_by_step_and_after_a_rollback_equal_those_made_at_once(ops, page):
    p, whole = (problem(Case(((4, 130), (37, 130)), page=page)) for _ in range(2))
    for done, end in [(4, 4), (4, 5), (5, 6), (6, 36), (36, 69), (69, 70)]:  # at first the second has no middle
        _extend(ops, p, p.kv.k, done, end)
    other = -p.kv.k
    for done, end in [(45, 46), (46, 47), (47, 80), (80, 81), (81, 129), (129, 130)]:  # other keys from row 45 on
        _extend(ops, p, other, done, end)
    keys = other.clone()
    for b in range(2):
        at = torch.arange(45)
        where = (b, at) if page == 0 else (p.kv.table[b, at // page].long(), at % page)
        keys[where] = p.kv.k[where]
    _extend(ops, whole, keys, 4, 130)
    for b, start in enumerate((4, 37)):
        got, want = (bits_of(x.planes, x.kv, range(start, 130))[b] for x in (p, whole))
        assert torch.equal(got, want)


def _extend(ops, p, keys, done, end):
    start = torch.tensor([4, 37])
    kv = p.kv._replace(k=keys, start=start, length=(end - start).clamp(min=0))
    ops.hash_planes(p.planes, kv, p.mean, p.threshold, p.w, torch.full_like(start, done).maximum(start), end - done)


@pytest.mark.parametrize("page", [0, 32])
@pytest.mark.parametrize("new", [23, 60])
def test_bits_of_tokens_that_are_not_new_stay(ops, page, new):
    case = Case(((0, 100), (10, 70)), page=page)
    p = problem(case)
    before, done = p.planes.clone(), torch.tensor([100 - new, 70 - new // 2])
    ops.hash_planes(p.planes, p.kv, p.mean, p.threshold, p.w, done, new)
    for b, (low, high) in enumerate([(100 - new, 100), (70 - new // 2, 70)]):
        held = range(-(-case.spans[b][1] // page) * page if page else 100)
        one = p.kv._replace(start=p.kv.start[b : b + 1], table=None if page == 0 else p.kv.table[b : b + 1])
        old, got = (bits_of(x if page else x[b : b + 1], one, held)[0] for x in (before, p.planes))
        stay = [t for t in held if not low <= t < high]
        assert torch.equal(got[:, stay], old[:, stay])
        assert not torch.equal(got[:, low:high], old[:, low:high])


@pytest.mark.parametrize(("page", "dtype"), [(0, torch.float16), (16, torch.float16), (16, torch.bfloat16)])
@pytest.mark.parametrize("most", [10**6, 9])
def test_without_a_threshold_centred_keys_are_rounded_as_the_authors_code_rounds_them(ops, page, dtype, most):
    case = Case(((4, 41), (0, 20)), bits=10, tables=40, page=page, kv_heads=2, dtype=dtype)
    p = problem(case)
    kv, mean, planes = p.kv._replace(k=p.kv.k * 64), p.mean + 1 / 64, p.planes.clone()  # more bits than the dtype has
    ops.hash_planes(p.planes, kv, mean, None, p.w, kv.start, most)
    codes.hash_planes_reference(planes, kv, mean, None, p.w, kv.start, most)
    assert torch.equal(p.planes, planes)


def test_one_hash_for_all_heads_serves_every_query_of_a_batch(ops):
    g = generator(3)
    q, w = sixteenths(g, 5, 14, 80), sixteenths(g, 1, 4 * 21, 80, most=4.0)
    expected = [[integers(q[b, h], w[0], 4) for h in range(14)] for b in range(5)]
    assert ops.hash_query(q, w, 4).tolist() == expected
    assert ops.hash_query(q.bfloat16(), w.bfloat16(), 4).tolist() == expected
    case = Case(((0, 100), (30, 77)), kv_heads=2, group=2, dim=80)
    p, other = problem(case), problem(case)
    shared = p.w[:1].contiguous()
    ops.hash_planes(p.planes, p.kv, p.mean, codes.thresholds(p.mean, shared), shared, p.kv.start, 100)
    codes.hash_planes_reference(other.planes, p.kv, p.mean, codes.thresholds(p.mean, shared), shared, p.kv.start, 100)
    assert torch.equal(p.planes, other.planes)


def test_nothing_is_listed_of_an_empty_cache(ops):
    p = problem(Case(((0, 0),)), rows=1)
    kv = p.kv._replace(most=0)
    law = Law(p.mean, torch.zeros(3))
    selection = ops.collisions(ops.hash_query(p.q, p.w, 4), p.planes, kv, 4, law)
    assert selection.count.tolist() == [[0]] and selection.rows.shape == (1, 1, 0) and selection.log_w is law


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(ops, threads):
    case = Case(((3, 5000), (900, 4000)), bits=3, tables=9, page=256, kv_heads=2, group=3)
    p, other = problem(case), problem(case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        hash_all(ops, case, p)
        query = ops.hash_query(p.q, p.w, case.bits)
        found = ops.collisions(query, p.planes, p.kv, case.bits, None)
        torch.set_num_threads(2)
        hash_all(ops, case, other)
        again = ops.collisions(query, other.planes, other.kv, case.bits, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(p.planes, other.planes)
    assert listed(found) == listed(again) and found.count.min() > 0


# ---- bucket tables --------------------------------------------------------------------------------------------------

BUCKETS = [*(case for case in CASES if case.bits <= 10), NO_POWER_OF_TWO[1], ODD[1], ODD[4]]


def buckets_of(case, p, kv):
    columns = tables.columns_of(case.bits, case.tables)
    return blank_buckets(len(case.spans), case.kv_heads, case.bits, case.tables, p.kv.bound), columns


def blank_buckets(batch, *shape):
    states = tables.Buckets.states(*shape)
    return tables.Buckets.of({name: torch.zeros(batch, *x.shape, dtype=x.dtype) for name, x in states.items()})


@pytest.mark.parametrize("case", BUCKETS, ids=str)
@pytest.mark.parametrize("kept", [0, 40])
def test_buckets_and_the_planes_of_later_rows_give_the_rows_of_the_planes(case, kept):
    p = problem(case)
    hash_all(cpu, case, p)
    query = cpu.hash_query(p.q, p.w, case.bits)
    expected = cpu.collisions(query, p.planes, p.kv, case.bits, None)
    buckets, columns = buckets_of(case, p, p.kv)
    earlier = p.kv._replace(length=(p.kv.length - kept).clamp(min=0), spans=None)
    tables.build_buckets(buckets, p.planes, earlier, columns)
    found = tables.bucket_collisions(query, buckets, columns, p.planes, p.kv, None)
    assert listed(found) == listed(expected) and any(listed(expected))
    buckets.built.sub_(3)  # a rollback: rows before `built` alone are taken from the tables
    found = tables.bucket_collisions(query, buckets, columns, p.planes, p.kv, None)
    assert listed(found) == listed(expected)
    shorter = p.kv._replace(length=(p.kv.length - 50).clamp(min=0), spans=None)
    found = tables.bucket_collisions(query, buckets, columns, p.planes, shorter, None)
    assert listed(found) == listed(cpu.collisions(query, p.planes, shorter, case.bits, None))


def test_buckets_of_two_segments_hold_every_token_once():
    case = Case(((5, 70_000),), bits=3, tables=3, dim=8, group=2)
    p = problem(case)
    p.planes.random_(-(2**31), 2**31 - 1, generator=generator(2))
    query = torch.randint(8, (1, 2, 3), generator=generator(3)).int()
    buckets, columns = buckets_of(case, p, p.kv)
    tables.build_buckets(buckets, p.planes, p.kv, columns)
    found = tables.bucket_collisions(query, buckets, columns, p.planes, p.kv, None)
    assert listed(found) == listed(cpu.collisions(query, p.planes, p.kv, 3, None))
    ids = buckets.ids.long() & 0xFFFF
    for table in range(3):
        first, second = ids[0, 0, table, : tables.SEGMENT - 5], ids[0, 0, table, tables.SEGMENT : 70_000]
        assert torch.equal(first.sort().values, torch.arange(5, tables.SEGMENT))
        assert torch.equal(second.sort().values, torch.arange(70_000 - tables.SEGMENT))
