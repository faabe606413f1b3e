"""Tables of a pool by the CPU kernel, on every instruction set of this CPU."""

import pytest
import torch

from keysift.ops import codes, pool
from keysift.ops.cpu.library import load
from tests.cpu.test_codes_cpu import problem
from tests.test_codes import POOLS, Case, Reference, expected_of_pool, hash_all, listed

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
cpu = pytest.importorskip("keysift.ops.pool_cpu") if load() else None
ISAS = load().usable if load() else ("none",)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("case", "bits", "tables"), POOLS[:4], ids=str)
def test_rows_of_a_pool_are_those_whose_words_agree_in_the_bits_of_two_tables(case, bits, tables, isa):
    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, 32)
    found = listed(cpu.collisions(query, p.planes, p.kv, bits, None, tables, isa))
    assert found == expected_of_pool(case, p, bits, tables)
    assert 0 < sum(map(len, found)) < case.group * case.kv_heads * sum(e - s for s, e in case.spans)


MANY = [
    (Case(((4, 70),), bits=32, tables=16, group=4, page=256, dim=128), 10, 150),
    (Case(((4, 300), (17, 18)), bits=32, tables=9, group=2), 4, 60),
    (Case(((4, 5000),), bits=32, tables=3, group=3, page=128), 5, 41),
    (Case(((4, 300),), bits=32, tables=5, group=1, page=48), 7, 11),
    (Case(((4, 300),), bits=32, tables=2, group=4), 15, 2),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("case", "bits", "tables"), MANY, ids=str)
def test_pools_of_any_number_of_words_give_the_rows_of_the_reference(case, bits, tables, isa):
    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, 32)
    expected = listed(codes.collisions_reference(query, p.planes, p.kv, bits, None, tables))
    assert listed(cpu.collisions(query, p.planes, p.kv, bits, None, tables, isa)) == expected
    assert any(expected) or bits == 15


def test_the_masks_that_kernels_get_are_those_of_the_tables():
    assert (cpu.masks_of(10, 150, 16).long() & 0xFFFFFFFF).tolist() == list(pool.tables_of_word(10, 10))
    assert cpu.masks_of(10, 150, 16).dtype == torch.int32


@pytest.mark.parametrize(("case", "bits", "tables"), [*POOLS[:4], MANY[2]], ids=str)
def test_buckets_of_a_pool_give_the_rows_of_its_planes(case, bits, tables):
    from keysift.ops import codes_cpu

    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, 32)
    expected = listed(codes.collisions_reference(query, p.planes, p.kv, bits, None, tables))
    columns = codes_cpu.columns_of(bits, tables, p.planes.shape[3])
    buckets = codes_cpu.Buckets.empty(len(case.spans), case.kv_heads, tables, bits, p.kv.bound)
    codes_cpu.build_buckets(buckets, p.planes, p.kv._replace(length=p.kv.length // 2, spans=None), columns)
    masks = cpu.masks_of(bits, tables, query.shape[2])
    found = codes_cpu.bucket_collisions(query, buckets, columns, p.planes, p.kv, masks, None)
    assert listed(found) == expected and any(expected)
