"""Hash codes in bit planes: kernels and references against a comparison of codes that are plain integers.

Keys, means and directions are multiples of 1/16, so that every product is exact and no bit depends on rounding. The
kernels' tests run on a GPU where there is one and else in Triton's interpreter.
"""

import importlib
import math
from typing import NamedTuple

import pytest
import torch

from keysift.methods import magicpig, parse
from keysift.ops import codes, pool
from keysift.types import KV, Ctx, Law
from tests.devices import CUDA, DEVICE, INTERPRETED, ON_GPU
from tests.helpers import codes_in_common, generator, poisoned_empty, structured_qkv


def _kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    if not CUDA and not INTERPRETED:
        pytest.skip("triton was imported without its interpreter")
    return importlib.import_module("keysift.ops.codes_triton")


def _pool_kernels():
    _kernels()
    return importlib.import_module("keysift.ops.pool_triton")


class Reference:
    hash_planes = staticmethod(codes.hash_planes_reference)
    hash_query = staticmethod(codes.hash_query_reference)
    collisions = staticmethod(codes.collisions_reference)


@pytest.fixture(params=["reference", "kernel"])
def pool_collisions(request):
    return Reference.collisions if request.param == "reference" else _pool_kernels().collisions


@pytest.fixture(params=["reference", "kernel"])
def ops(request, monkeypatch):
    if request.param == "reference":
        return Reference
    kernels = _kernels()
    if not CUDA:  # the interpreter takes long to merge the verdicts of many tables
        monkeypatch.setattr(kernels, "ENTRIES", 4)
        monkeypatch.setattr(kernels, "PROGRAMS", 1)
    return kernels


class Case(NamedTuple):
    spans: tuple[tuple[int, int], ...]
    bits: int = 4
    tables: int = 12
    group: int = 1
    kv_heads: int = 1
    dim: int = 64
    page: int = 0
    dtype: torch.dtype = torch.bfloat16
    origin: tuple[int, ...] | None = None


CASES = [
    Case(((0, 31), (0, 32), (0, 33), (4, 63), (4, 64), (37, 65), (9, 10), (7, 7), (0, 0))),
    Case(((4, 127), (31, 128), (0, 129), (128, 129), (100, 100)), page=128, group=4, dtype=torch.float16),
    Case(((4, 100), (0, 161)), page=16, kv_heads=2, dim=80, dtype=torch.float32),
    Case(((5, 33), (30, 100)), page=64, group=7, bits=15, tables=7),
    Case(((44, 100), (104, 163)), origin=(40, 33), bits=1, tables=2, group=4),
    Case(((4, 70),), page=256, bits=10, tables=150, group=4, dim=128),
    Case(((0, 100), (3, 290)), bits=5, tables=9, dim=24),
]
NO_POWER_OF_TWO = [
    Case(((4, 100), (0, 257)), page=48, kv_heads=2),
    Case(((10, 390), (150, 250)), page=200, group=4),
    Case(((1, 57),), page=10),
]


class Problem(NamedTuple):
    kv: KV
    planes: torch.Tensor
    mean: torch.Tensor
    threshold: torch.Tensor
    w: torch.Tensor
    q: torch.Tensor


def sixteenths(g, *shape, most=2.0):
    return torch.randint(-int(most * 16), int(most * 16) + 1, shape, generator=g) / 16


def problem(case, seed=0, rows=None, device=DEVICE):
    """Keys, some of them like a query, in pages in any order; what is not in a view is NaN, codes are anything."""
    g, batch = generator(seed), len(case.spans)
    heads, kv_heads, dim = case.group * case.kv_heads, case.kv_heads, case.dim
    rows = max(1, max(end for _, end in case.spans)) if rows is None else rows
    pages = -(-rows // case.page) if case.page else 1
    page = case.page or rows
    columns = case.bits * case.tables
    w, mean = sixteenths(g, kv_heads, columns, dim, most=4.0), sixteenths(g, batch, kv_heads, dim, most=0.25)
    q = sixteenths(g, batch, heads, dim)
    k = torch.full((batch * pages + 1, page, kv_heads, dim), math.nan)
    order = torch.randperm(batch * pages, generator=g) + 1 if case.page else torch.arange(batch)
    table = order.view(batch, pages)
    for b, (start, end) in enumerate(case.spans):
        at = torch.arange(start, end)
        new = sixteenths(g, end - start, kv_heads, dim)
        like = torch.rand(end - start, generator=g) < 0.3
        new[like] = q[b, torch.randint(heads, (int(like.sum()),), generator=g)][:, None]
        k[table[b, at // page], at % page] = new
        table[b, -(-end // page) :] = 10**6  # a page that does not exist
    anything = torch.randint(-(2**31), 2**31, (len(k), kv_heads, -(-page // 128), columns, 4), generator=g).int()
    if not case.page:
        k, anything = k[:batch], anything[:batch]
    k = k.to(device, case.dtype)
    kv = KV.on(k, k, case.spans, table.int().to(device) if case.page else None)
    origin = None if case.origin is None else torch.tensor(case.origin, device=device)
    kv = kv._replace(origin=origin, spans=None, most=rows)
    mean, w, q = mean.to(device), w.to(device), q.to(device, case.dtype)
    return Problem(kv, anything.to(device), mean, codes.thresholds(mean, w), w, q)


def integers(x, w, bits):
    """Codes of vectors ``[..., D]`` as nested lists of Python integers, one for each table."""
    positive = (x.double() @ w.double().mT > 0).unflatten(-1, (bits, -1)).mT
    return (positive.long() * 2 ** torch.arange(bits, device=x.device)).sum(-1).tolist()


def expected_rows(case, p):
    """Rows that share at least two tables with each query head, found one by one."""
    found = []
    page = case.page or p.kv.k.shape[1]
    for b, (start, end) in enumerate(case.spans):
        for h in range(case.group * case.kv_heads):
            kv_head = h // case.group
            query = integers(p.q[b, h], p.w[kv_head], case.bits)
            rows = []
            for row in range(start, end):
                at = (b, row) if p.kv.table is None else (int(p.kv.table[b, row // page]), row % page)
                key = integers(p.kv.k[at][kv_head].double() - p.mean[b, kv_head], p.w[kv_head], case.bits)
                if sum(a == c for a, c in zip(query, key, strict=True)) >= 2:
                    rows.append(row)
            found.append(rows)
    return found


def listed(selection):
    rows, count = selection.rows.flatten(0, 1).tolist(), selection.count.flatten().tolist()
    return [r[:n] for r, n in zip(rows, count, strict=True)]


def bits_of(planes, kv, tokens):
    """The bits of tokens, bool ``[B, K, len(tokens), columns]``, taken out one by one."""
    batch, page = len(kv.start), kv.k.shape[1]
    out = []
    for b in range(batch):
        for t in tokens:
            at, within = (b, t) if kv.table is None else (int(kv.table[b, t // page]), t % page)
            word = planes[at, :, within // 128, :, within % 128 // 32]
            out.append((word >> within % 32) & 1)
    return torch.stack(out).unflatten(0, (batch, -1)).transpose(1, 2).bool()


def hash_all(ops, case, p):
    ops.hash_planes(p.planes, p.kv, p.mean, p.threshold, p.w, p.kv.start, p.kv.bound)


@pytest.mark.parametrize("case", CASES, ids=str)
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


@pytest.mark.parametrize("case", NO_POWER_OF_TWO, ids=str)
def test_the_reference_takes_pages_of_any_size(case):
    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, case.bits)
    found = listed(codes.collisions_reference(query, p.planes, p.kv, case.bits))
    assert found == expected_rows(case, p) and any(found)


@pytest.mark.parametrize("programs", [1, 10**6])
def test_tables_may_be_split_over_programs(monkeypatch, programs):
    kernels, case = _kernels(), Case(((4, 140), (130, 137)), bits=3, tables=67)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    p = problem(case)
    hash_all(kernels, case, p)
    query = codes.hash_query_reference(p.q, p.w, case.bits)
    selection = kernels.collisions(query, p.planes, p.kv, case.bits, None)
    assert listed(selection) == listed(codes.collisions_reference(query, p.planes, p.kv, case.bits))
    assert selection.rows.shape[2] == p.kv.bound


def test_many_words_are_listed_in_order_by_several_programs(monkeypatch):
    kernels, case = _kernels(), Case(((70, 1500), (1300, 1400)), bits=2, tables=8)
    for name, size in (("WORD_TILE", 16), ("WORDS_BEFORE", 32), ("ENTRIES", 2)):
        monkeypatch.setattr(kernels, name, size)
    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, case.bits)
    found = listed(kernels.collisions(query, p.planes, p.kv, case.bits, None))
    assert found == listed(codes.collisions_reference(query, p.planes, p.kv, case.bits))
    assert len(found[0]) > 100 and found[0] == sorted(set(found[0]))


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
        at = torch.arange(45, device=DEVICE)
        where = (b, at) if page == 0 else (p.kv.table[b, at // page].long(), at % page)
        keys[where] = p.kv.k[where]
    _extend(ops, whole, keys, 4, 130)
    for b, start in enumerate((4, 37)):
        got, want = (bits_of(x.planes, x.kv, range(start, 130))[b] for x in (p, whole))
        assert torch.equal(got, want)
    at_first = problem(Case(((4, 130), (37, 130)), page=page))
    _extend(ops, at_first, p.kv.k, 4, 130)
    got, want = (bits_of(x.planes, x.kv, range(45, 130)) for x in (p, at_first))
    assert not torch.equal(got, want)


def _extend(ops, p, keys, done, end):
    start = torch.tensor([4, 37], device=DEVICE)
    kv = p.kv._replace(k=keys, start=start, length=(end - start).clamp(min=0))
    ops.hash_planes(p.planes, kv, p.mean, p.threshold, p.w, torch.full_like(start, done).maximum(start), end - done)


@pytest.mark.parametrize("page", [0, 32])
def test_bits_of_tokens_that_are_not_new_stay(ops, page):
    case = Case(((0, 100), (40, 70)), page=page)
    p = problem(case)
    before, done = p.planes.clone(), torch.tensor([77, 61], device=DEVICE)
    ops.hash_planes(p.planes, p.kv, p.mean, p.threshold, p.w, done, 23)
    for b, (low, high) in enumerate([(77, 100), (61, 70)]):
        held = range(-(-case.spans[b][1] // page) * page if page else 100)
        one = p.kv._replace(start=p.kv.start[b : b + 1], table=None if page == 0 else p.kv.table[b : b + 1])
        old, new = (bits_of(x if page else x[b : b + 1], one, held)[0] for x in (before, p.planes))
        stay = [t for t in held if not low <= t < high]
        assert torch.equal(new[:, stay], old[:, stay])
        assert not torch.equal(new[:, low:high], old[:, low:high])


@pytest.mark.parametrize(("page", "dtype"), [(0, torch.float16), (16, torch.float16), (16, torch.bfloat16)])
def test_without_a_threshold_centred_keys_are_rounded_as_the_authors_code_rounds_them(ops, page, dtype):
    if dtype == torch.bfloat16 and ops is not Reference and not CUDA:
        pytest.skip("the interpreter does not round to bf16, it cuts")
    case = Case(((4, 41), (0, 20)), bits=10, tables=40, page=page, kv_heads=2, dtype=dtype)
    p = problem(case)
    k, mean = p.kv.k * 64, p.mean + 1 / 64  # their difference needs more bits than the dtype has
    kv = p.kv._replace(k=k)
    ops.hash_planes(p.planes, kv, mean, None, p.w, kv.start, kv.bound)
    differs = 0
    for b, (start, end) in enumerate(case.spans):
        for t in range(start, end):
            at = (b, t) if page == 0 else (int(kv.table[b, t // page]), t % page)
            centred = k[at] - mean[b].to(dtype)
            bits = (centred.double()[:, None] @ p.w.double().mT > 0)[:, 0]
            one = kv._replace(start=kv.start[b : b + 1], table=None if page == 0 else kv.table[b : b + 1])
            assert torch.equal(bits_of(p.planes if page else p.planes[b : b + 1], one, [t])[0, :, 0], bits)
            exact = ((k[at].double() - mean[b].double())[:, None] @ p.w.double().mT > 0)[:, 0]
            differs += int((bits != exact).sum())
    assert differs > 0


def test_one_hash_for_all_heads_serves_every_query_of_a_batch(ops):
    g = generator(3)
    q, w = sixteenths(g, 5, 14, 80).to(DEVICE), sixteenths(g, 1, 4 * 21, 80, most=4.0).to(DEVICE)
    assert ops.hash_query(q, w, 4).tolist() == [[integers(q[b, h], w[0], 4) for h in range(14)] for b in range(5)]


def test_nothing_is_listed_of_an_empty_cache(ops):
    p = problem(Case(((0, 0),)), rows=1)
    kv = p.kv._replace(most=0)
    selection = ops.collisions(ops.hash_query(p.q, p.w, 4), p.planes, kv, 4, None)
    assert selection.count.tolist() == [[0]] and selection.rows.shape == (1, 1, 0)


@pytest.mark.parametrize(("bits", "tables"), [*magicpig.KEPT, (4, 12), (15, 7), (15, 300)])
@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_weights_read_from_the_table_are_within_a_thousandth_of_the_law(bits, tables, floor):
    table = codes.collision_table(bits, tables, floor)
    assert len(table) <= 8193
    g = generator(1)
    angle = torch.rand(4000, generator=g, dtype=torch.float64) * math.acos(-0.95)
    angle[:1000] *= 1e-3
    q, k = torch.zeros(2), torch.stack([angle.cos(), angle.sin()], -1).float() * 3
    q[0] = 1
    law = Law(torch.zeros(1, 1, 2), table).log_w(q[None, None], k[None, None])[0, 0]
    exact = -codes.collision_log_probability(angle.cos(), bits, tables, floor)
    assert float((law - exact).abs().max()) < 1e-3


def test_directions_are_the_projections_in_the_order_of_the_planes():
    w = codes.projections(3, 1, 2, 8, 15, torch.device("cpu"))
    rows = codes.directions(w, 3)
    assert torch.equal(rows[1, 2 * 5 + 4], w[1, :, 4 * 3 + 2].bfloat16().float())
    assert rows.shape == (2, 15, 8)


def test_the_mean_key_is_that_of_the_view_alone():
    case = Case(((5, 70), (0, 33), (20, 20)), page=16, kv_heads=2, dtype=torch.float32)
    p = problem(case)
    mean = codes.mean_key(p.kv)
    for b, (start, end) in enumerate(case.spans[:2]):
        keys = torch.stack([p.kv.k[p.kv.table[b, t // 16], t % 16] for t in range(start, end)])
        assert torch.allclose(mean[b], keys.mean(0), atol=1e-6)
    assert (mean[2] == 0).all()


# ---- pools ----------------------------------------------------------------------------------------------------------

POOLS = [  # of Case.tables words; and K and L
    (Case(((0, 31), (4, 100), (7, 7)), bits=32, tables=2), 4, 15),
    (Case(((4, 127), (31, 290)), bits=32, tables=3, group=4, page=128, dtype=torch.float16), 5, 20),
    (Case(((4, 100), (0, 161)), bits=32, tables=2, group=7, page=16, dim=80, dtype=torch.float32), 3, 8),
    (Case(((44, 100), (104, 163)), bits=32, tables=1, kv_heads=2, origin=(40, 33)), 6, 2),
    (Case(((4, 70),), bits=32, tables=16, group=4, page=256, dim=128), 10, 150),
]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("programs", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_few_programs_go_through_all_that_a_view_has_and_none_reads_what_no_other_wrote(monkeypatch, programs, pooled):
    """A bound that allows for far more changes nothing."""
    kernels, of_pool = _kernels(), _pool_kernels()
    for name, size in (("MOST_PROGRAMS", programs), ("WORD_TILE", 16), ("WORDS_BEFORE", 32), ("ENTRIES", 2)):
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(of_pool, "ENTRIES", 1)
    case = Case(((70, 1300), (1100, 1200), (9, 9)), bits=32 if pooled else 2, tables=8, page=64 if pooled else 0)
    bits, tables = (4, [16]) if pooled else (2, [])
    p = problem(case, rows=4000)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, case.bits)
    expected = listed(codes.collisions_reference(query, p.planes, p.kv, bits, None, *tables))
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    found = (of_pool if pooled else kernels).collisions(query, p.planes, p.kv, bits, None, *tables)
    assert listed(found) == expected and len(expected[0]) > 20


def expected_of_pool(case, p, bits, tables):
    """As ``expected_rows``: table l looks at some of the bits of word l % words."""
    found, words = [], case.tables
    page = case.page or p.kv.k.shape[1]
    masks = pool.tables_of_word(bits, -(-tables // words))
    for b, (start, end) in enumerate(case.spans):
        for h in range(case.group * case.kv_heads):
            kv_head = h // case.group
            query = integers(p.q[b, h], p.w[kv_head], 32)
            rows = []
            for row in range(start, end):
                at = (b, row) if p.kv.table is None else (int(p.kv.table[b, row // page]), row % page)
                key = integers(p.kv.k[at][kv_head].double() - p.mean[b, kv_head], p.w[kv_head], 32)
                differs = [a ^ c for a, c in zip(query, key, strict=True)]
                if sum(differs[t % words] & masks[t // words] == 0 for t in range(tables)) >= 2:
                    rows.append(row)
            found.append(rows)
    return found


@pytest.mark.parametrize(("case", "bits", "tables"), POOLS, ids=str)
def test_rows_of_a_pool_are_those_whose_words_agree_in_the_bits_of_two_tables(pool_collisions, case, bits, tables):
    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, 32)
    found = listed(pool_collisions(query, p.planes, p.kv, bits, None, tables))
    assert found == expected_of_pool(case, p, bits, tables)
    assert 0 < sum(map(len, found)) < case.group * case.kv_heads * sum(e - s for s, e in case.spans)


@pytest.mark.parametrize(("lanes", "wide", "entries"), [(8, 4, 1), (4, 1, 2)])
def test_how_a_pool_is_shared_out_changes_no_rows(monkeypatch, lanes, wide, entries):
    kernels = _pool_kernels()
    for name, value in (("LANES", lanes), ("WIDE", wide), ("ENTRIES", entries)):
        monkeypatch.setattr(kernels, name, value)
    case, bits, tables = Case(((4, 300),), bits=32, tables=9, group=2), 4, 60
    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, 32)
    found = listed(kernels.collisions(query, p.planes, p.kv, bits, None, tables))
    assert found == listed(codes.collisions_reference(query, p.planes, p.kv, bits, None, tables)) and any(found)


def test_words_of_a_pool_are_hashed_bit_by_bit(ops):
    case = Case(((4, 70), (0, 33)), bits=32, tables=3, group=4, kv_heads=2, dim=80)
    p = problem(case)
    hash_all(ops, case, p)
    query = ops.hash_query(p.q, p.w, 32)
    want = [[integers(p.q[b, h], p.w[h // 4], 32) for h in range(8)] for b in range(2)]
    assert [[[x % 2**32 for x in h] for h in b] for b in query.tolist()] == want
    clean = problem(case)
    hash_all(Reference, case, clean)
    for b, (start, end) in enumerate(case.spans):
        got, other = (bits_of(x.planes, x.kv, range(start, end))[b] for x in (p, clean))
        assert torch.equal(got, other)


@pytest.mark.parametrize(("bits", "count"), [(10, 10), (9, 8), (8, 5), (7, 20), (15, 20), (2, 3), (1, 16)])
def test_tables_of_a_word_share_few_bits(bits, count):
    masks = pool.tables_of_word(bits, count)
    assert len(set(masks)) == len(masks) == count
    assert all(mask.bit_count() == bits and 0 < mask < 2**32 for mask in masks)
    common = [(a & b).bit_count() for i, a in enumerate(masks) for b in masks[:i]]
    assert sum(common) / len(common) <= 1.05 * bits**2 / 32
    if bits <= 10:
        assert max(common) <= bits - 4 or bits < 4


@pytest.mark.parametrize(("bits", "tables", "size"), [(4, 9, 32), (10, 10, 32), (6, 14, 64)])
def test_the_law_of_a_pool_is_that_of_all_patterns_of_its_bits(bits, tables, size):
    """Bits come in pairs here, so that 2 ** 16 patterns of a word are all there are."""
    words, angle = size // 32, torch.tensor([5.0, 30, 60, 80, 90, 110, 150]).double().deg2rad()
    p = (1 - angle / math.pi) ** 2
    pairs = torch.arange(2**16)
    right = sum(pairs >> i & 1 for i in range(16))
    by_count = torch.stack([p**n * (1 - p) ** (16 - n) for n in range(17)])
    total = torch.zeros(3, len(p), dtype=torch.float64)
    total[0] = 1
    for word in range(words):
        masks = pool.tables_of_word(bits, -(-tables // words))[: len(range(word, tables, words))]
        needs = [sum(1 << i for i in range(16) if mask >> (2 * i) & 1) for mask in masks]
        hits = sum((pairs & need == need).long() for need in needs).clamp(max=2)
        share = torch.stack([(by_count[right] * (hits == n)[:, None]).sum(0) for n in range(3)])
        total = torch.stack(
            [
                total[0] * share[0],
                total[1] * share[0] + total[0] * share[1],
                total[2] + total[1] * (share[1] + share[2]) + total[0] * share[2],
            ]
        )
    law = pool.collision_log_probability(angle.cos(), bits, tables, size).double()
    assert torch.allclose(law, total[2].log(), rtol=0, atol=1e-6 * 20)


@pytest.mark.slow
def test_the_law_of_a_pool_is_how_often_its_tables_collide():
    """Over many pools, as tables with bits of their own do by theirs; an odd number of bits, some pairs in halves."""
    bits, tables, size, dim, trials = 5, 30, 96, 8, 8000
    angles = torch.tensor([20.0, 45, 70, 90, 120]).deg2rad()
    q = torch.zeros(dim)
    q[0] = 1
    k = torch.zeros(5, dim)
    k[:, 0], k[:, 1] = angles.cos(), angles.sin()
    w = codes.projections(0, 0, trials, dim, size, torch.device("cpu"))
    agree = ((k @ w) > 0) == ((q @ w) > 0)[:, None]
    hits = agree[..., pool.table_columns(bits, tables, size)].all(-1).sum(-1)
    rate = (hits >= 2).double().mean(0)
    law = pool.collision_log_probability(angles.cos(), bits, tables, size).double().exp()
    assert ((rate - law).abs() < 4.5 * (law * (1 - law) / trials).sqrt() + 1e-9).all()
    assert law[0] > 0.9 > 0.1 > law[-1] > 1e-3
    own = codes.collision_log_probability(angles.cos(), bits, tables).double().exp()
    assert ((rate - own).abs() > 4.5 * (law * (1 - law) / trials).sqrt()).any()  # which would be a wrong law


@pytest.mark.parametrize(("bits", "tables", "size"), [(10, 150, 512), (9, 120, 512), (7, 75, 384), (10, 300, 512)])
def test_weights_of_a_pool_read_from_the_table_are_within_a_thousandth_of_the_law(bits, tables, size):
    table = codes.collision_table(bits, tables, pool=size)
    angle = torch.rand(4000, generator=generator(1), dtype=torch.float64) * math.acos(-0.95)
    k = torch.stack([angle.cos(), angle.sin()], -1).float() * 3
    law = Law(torch.zeros(1, 1, 2), table).log_w(torch.tensor([[[1.0, 0]]]), k[None, None])[0, 0]
    assert float((law + pool.collision_log_probability(angle.cos(), bits, tables, size)).abs().max()) < 1e-3


# ---- the method -----------------------------------------------------------------------------------------------------


def index_of(method, kv, prompt, ctx):
    """What a store would allocate for a plain buffer, filled with codes up to the end of ``kv``."""
    batch, rows, kv_heads, dim = kv.k.shape
    index = {**method.constants(kv_heads, dim, kv.k.device, ctx)}
    for name, side in method.sides(dim, kv.k.dtype).items():
        shape = (batch, kv_heads, -(-rows // side.unit), *side.shape)
        index[name] = torch.full(shape, side.fill, dtype=side.dtype, device=kv.k.device)
    for name, state in method.states(kv_heads, dim, rows).items():
        index[name] = torch.zeros(batch, *state.shape, dtype=state.dtype, device=kv.k.device)
    method.begin(index, kv, prompt, kv.k[:, :0], ctx)
    method.extend(index, kv, kv.start, kv.bound, ctx)
    return index


@pytest.mark.parametrize("mode", ["default", "seed"])
def test_magicpig_selects_what_codes_of_centred_keys_agree_on(mode):
    q, k, v = (x.bfloat16() for x in structured_qkv(300, heads=4, kv_heads=2))
    method = magicpig.Method(K=5, L=20, mode=mode)
    kv = KV.of(k, v)
    middle, ctx = kv.between(kv.start + 4, kv.end - 64), Ctx(2, 1.0, kv.length, seed=3)
    index = index_of(method, middle, kv, ctx)
    chosen = method.select(q[:, -1], middle, index, ctx)
    layer, heads = (2, 2) if mode == "default" else (0, 1)
    w = codes.projections(3, layer, heads, 32, 100, torch.device("cpu")).bfloat16()
    mean = k[:, 4:-64].float().mean(1).bfloat16() if mode == "seed" else k[:, 4:].float().mean(1)
    centred = (k - mean[:, None] if mode == "seed" else k.float() - mean[:, None]).transpose(1, 2)
    hits = codes_in_common(q[:, -1].unflatten(1, (2, 2)), centred, w, 5).flatten(1, 2)
    expected = [[r for r in range(4, 236) if hits[0, h, r] >= 2] for h in range(4)]
    assert listed(chosen) == expected and 0 < len(expected[0]) < 232
    assert torch.allclose(index["mean"], mean.float(), atol=1e-6)
    assert torch.equal(chosen.log_w.mean, index["mean"])
    assert int(method.scan_bytes(middle, index, q.shape[1])) == 232 * 2 * 100 // 8
    assert method.grows == (mode == "default")


def test_magicpig_hashes_each_layer_on_its_own_except_in_seed_mode():
    for mode, same in (("default", False), ("seed", True)):
        method = magicpig.Method(K=3, L=4, mode=mode)
        one, two, other = (
            method.constants(2, 8, torch.device("cpu"), Ctx(layer, 1.0, torch.zeros(1), seed))["w"]
            for layer, seed in ((1, 0), (2, 0), (1, 1))
        )
        assert torch.equal(one, two) == same
        assert not torch.equal(one, other)
        assert one is method.constants(2, 8, torch.device("cpu"), Ctx(1, 1.0, torch.zeros(1), 0))["w"]


@pytest.mark.parametrize("spec", ["magicpig:K=5,L=50,pool=96", "magicpig:K=5,L=40,pool=64,window=20"])
def test_magicpig_with_a_pool_selects_by_the_bits_that_its_tables_share(spec):
    q, k = (x.bfloat16() for x in structured_qkv(300, heads=4, kv_heads=2)[:2])
    method = parse(spec, "decode")
    kv = KV.of(k, k)
    middle, ctx = kv.between(kv.start + 4, kv.end - method.window), Ctx(2, 1.0, kv.length, seed=3)
    index = index_of(method, middle, kv, ctx)
    chosen = method.select(q[:, -1], middle, index, ctx)
    w = codes.projections(3, 2, 2, 32, method.pool, torch.device("cpu")).bfloat16().float()
    w = w.unflatten(-1, (-1, 32)).mT.flatten(2)  # a bit's words side by side, as planes lie
    centred = k[0].float().transpose(0, 1) - k[0, 4:].float().mean(0)[:, None]
    agree = (centred @ w > 0)[:, None] == (q[0, -1].float().unflatten(0, (2, 2)) @ w > 0)[:, :, None]
    hits = agree[..., pool.table_columns(5, method.L, method.pool)].all(-1).sum(-1).flatten(0, 1)
    end = 300 - method.window
    expected = [[r for r in range(4, end) if hits[h, r] >= 2] for h in range(4)]
    assert listed(chosen) == expected and 0 < len(expected[0]) < end - 4
    assert int(method.scan_bytes(middle, index, q.shape[1])) == (end - 4) * 2 * method.pool // 8
    law = codes.collision_table(5, method.L, pool=method.pool)
    assert torch.equal(chosen.log_w.table, law)


@pytest.mark.slow
def test_over_seeds_a_pools_keys_are_drawn_as_often_as_their_weights_say():
    """The mean weight of a key, 0 where it is not drawn, is 1; another layer's hashes are as good as another seed's."""
    q, k = structured_qkv(200, heads=1, kv_heads=1, dim=8)[:2]
    method, kv, trials = parse("magicpig:K=5,L=36,pool=64", "decode"), KV.of(k, k), 800
    middle = kv.between(kv.start + 4, kv.end - 64)
    drawn = torch.zeros(200, dtype=torch.float64)
    for layer in range(trials):
        ctx = Ctx(layer, 1.0, kv.length)
        chosen = method.select(q[:, -1], middle, index_of(method, middle, kv, ctx), ctx)
        drawn[chosen.rows[0, 0].long()] += 1
    weight = chosen.log_w.log_w(q[:, -1], k.transpose(1, 2))[0, 0].double().exp()  # the mean key is that of any layer
    error = ((weight - 1).clamp(min=1e-6) / trials).sqrt()  # the variance of a 0-or-w draw with mean 1 is w - 1
    z = ((drawn * weight / trials - 1) / error)[4:136][(weight < trials / 30)[4:136]]
    assert len(z) > 90 and z.abs().max() < 5
    assert (weight[4:136] > 2).sum() > 50


@pytest.mark.parametrize(
    ("spec", "pooled"),
    [
        ("magicpig", 512),
        ("magicpig:keep=0.05", 512),
        ("magicpig:pool=none", None),
        ("magicpig:mode=seed", None),
        ("magicpig:K=8,L=64", None),  # 512 bits are no more
        ("magicpig:K=8,L=65", 512),
        ("magicpig:K=8,L=400", None),  # more tables of a word than their law can be found of
        ("magicpig:K=8,L=400,pool=640", 640),
    ],
)
def test_tables_draw_from_a_pool_where_that_saves_bits(spec, pooled):
    method = parse(spec, "decode")
    assert method.pooled == pooled
    bits = method.hashes[0] * method.hashes[1] if pooled is None else pooled
    assert method.sides(8, torch.float32)["planes"].shape == (bits, 4)


def test_a_pool_is_made_of_words():
    with pytest.raises(ValueError, match="pool=100: must be a multiple of 32"):
        parse("magicpig:pool=100", "decode")


@pytest.mark.parametrize(
    ("keep", "setting"), [(0.001, (10, 150)), (0.02, (10, 150)), (0.046, (8, 75)), (0.1, (10, 300)), (1, (7, 75))]
)
def test_keep_takes_the_nearest_of_the_authors_settings(keep, setting):
    method = parse(f"magicpig:keep={keep},pool=none", "decode")
    assert method.hashes == setting
    assert method.sides(8, torch.float32)["planes"].shape == (setting[0] * setting[1], 4)


@pytest.mark.parametrize("given", ["K=8", "L=75", "K=0"])
def test_keep_beside_k_or_l_is_refused(given):
    with pytest.raises(ValueError, match="give keep, or K and L"):
        parse(f"magicpig:keep=0.05,{given}", "decode")


def test_no_bits_a_table_mean_dense():
    assert magicpig.Method(K=0).covers(10**6)
    assert not magicpig.Method().covers(1)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize(("bits", "tables", "words"), [(10, 150, 16), (10, 300, 16), (9, 40, 5), (8, 75, 8)])
def test_a_pool_on_real_shapes_finds_what_the_reference_does(bits, tables, words, device):
    case = Case(((4, 9000), (100, 7001), (0, 130)), 32, words, group=4, kv_heads=8, dim=128, page=128)
    p = problem(case)
    table = p.kv.table.clamp(max=len(p.kv.k) - 1)
    kv = p.kv._replace(table=table, k=p.kv.k.nan_to_num())
    codes.hash_planes(p.planes, kv, p.mean, p.threshold, p.w, kv.start, kv.bound)
    query = codes.hash_query(p.q, p.w, 32)
    found = listed(codes.collisions(query, p.planes, kv, bits, None, tables))
    assert found == listed(codes.collisions_reference(query, p.planes, kv, bits, None, tables))
    assert sum(map(len, found)) > 100


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_a_captured_step_follows_the_lengths_it_is_replayed_at(device):
    case = Case(((4, 3000), (100, 2000)), page=128, group=4, kv_heads=2, bits=6, tables=30, dim=128)
    p = problem(case)
    table = p.kv.table.clamp(max=len(p.kv.k) - 1)
    kv = p.kv._replace(table=table, k=p.kv.k.nan_to_num())
    done = kv.start.clone()

    def step():
        codes.hash_planes(p.planes, kv, p.mean, p.threshold, p.w, done, kv.bound)
        return codes.collisions(codes.hash_query(p.q, p.w, case.bits), p.planes, kv, case.bits)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ((2996, 1900), (1, 0), (2000, 1777)):
        kv.length.copy_(torch.tensor(lengths, device=device))
        graph.replay()
        found = listed(captured)
        assert found == listed(codes.collisions_reference(codes.hash_query_reference(p.q, p.w, 6), p.planes, kv, 6))
        assert found == listed(step())
