"""Tables of a pool by the CPU kernel, on every instruction set of this CPU."""

import pytest
import torch

from keysift import methods
from keysift.cache import Store
from keysift.ops import codes, pool
from keysift.ops.cpu.library import load
from keysift.types import Ctx
from tests.cpu.test_codes_cpu import blank_buckets, problem
from tests.helpers import structured_qkv
from tests.test_codes import POOLS, Case, Reference, expected_of_pool, hash_all, listed

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
cpu = pytest.importorskip("keysift.ops.pool_cpu") if load() else None
buckets = pytest.importorskip("keysift.ops.buckets_cpu") if load() else None
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
    p = problem(case)
    hash_all(Reference, case, p)
    query = codes.hash_query_reference(p.q, p.w, 32)
    expected = listed(codes.collisions_reference(query, p.planes, p.kv, bits, None, tables))
    columns = buckets.columns_of(bits, tables, p.planes.shape[3])
    made = blank_buckets(len(case.spans), case.kv_heads, bits, tables, p.kv.bound)
    buckets.build_buckets(made, p.planes, p.kv._replace(length=p.kv.length // 2, spans=None), columns)
    found = buckets.bucket_collisions(query, made, columns, p.planes, p.kv, None, pooled=True)
    assert listed(found) == expected and any(expected)


@pytest.mark.parametrize("hashes", ["K=4,L=40", "K=4,L=40,pool=64", "K=4,L=40,mode=seed"])
def test_a_cache_with_tables_reads_what_one_without_reads_whatever_happens_to_it(hashes, monkeypatch):
    """Prompts of two lengths, tokens that come in ones and in many, some that are taken back, sequences that swap."""
    monkeypatch.setattr(buckets, "LATER", 100)
    q, k, v = structured_qkv(900, heads=4, kv_heads=2, dim=32, batch=2)
    pairs = [(methods.parse(f"magicpig:{hashes},match={how}", "decode"), Store()) for how in ("bits", "tables")]
    built = []

    def both_agree():
        found = []
        for method, store in pairs:
            ctx = Ctx(1, 1.0, store.view().length - 1, 0)
            index = store.index(method, q[:, store.length - 1], ctx)
            middle = store.middle(method)
            found.append(listed(method.select(q[:, store.length - 1], middle, index, ctx)))
            read = int(method.scan_bytes(middle, index, 4).sum())
        assert found[0] == found[1] and any(found[0])
        assert read < int(middle.length.sum()) * 2 * 64 // 8 * (3 if "pool" not in hashes else 6)
        built.append(index["built"].tolist())

    def append(rows):
        for _, store in pairs:
            store.append(*(x[:, store.length : store.length + rows].transpose(1, 2) for x in (k, v)))

    append(500)
    for _, store in pairs:
        store.slots.pad([0, 130])
        store.end_prefill(torch.zeros(2, 0, 4, 32), 0)
    both_agree()
    for rows in (1, 1, 40):
        append(rows)
        both_agree()
    append(200)
    both_agree()
    for _, store in pairs:
        store.truncate(560)
    both_agree()
    append(70)
    both_agree()
    for _, store in pairs:
        store.select(torch.tensor([1, 0]))
    both_agree()
    if "seed" in hashes:  # generated tokens are not hashed
        assert built[0] == [500, 500] and max(built) == [500, 500]
    else:
        assert built[0] == [500, 500] == built[3] and built[4] == [742, 742] and built[5] == [559, 559] == built[-1]


def test_tables_of_keys_on_a_gpu_are_refused():
    method = methods.parse("magicpig:match=tables", "decode")
    with pytest.raises(ValueError, match="match=tables: side data are on cuda; use match=bits, or select_device=cpu"):
        method.constants(2, 32, torch.device("cuda"), Ctx(0, 1.0, torch.zeros(1), 0))
