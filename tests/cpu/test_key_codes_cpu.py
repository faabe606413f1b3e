"""Codes of a few bits a coordinate and draws by them: the CPU kernels, on every instruction set of this CPU, give what
the references give, as far as ``tests/test_key_codes.py`` asks it of the Triton kernels."""

import math

import pytest
import torch

from keysift.ops import key_codes
from keysift.ops.cpu.library import load
from keysift.ops.key_codes import LOG2E
from keysift.ops.pages import Quota
from keysift.types import KV

pytest.importorskip("triton", reason="the cases are those of the Triton kernels' tests, which need triton")
from tests.test_key_codes import (
    CASES,
    POSITIONS,
    RULES,
    Case,
    close_probes,
    hashed,
    lists_of,
    lists_of_last_head,
    same_draw,
    scored,
    world,
)

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
cpu = pytest.importorskip("keysift.ops.key_codes_cpu") if load() else None
ISAS = load().usable if load() else ("none",)

MORE = [
    Case(((0, 300), (11, 12)), planes=4, dim=128, group=7, kv_heads=2),  # two vectors a code
    Case(((5, 290),), planes=4, dim=256, group=2, page=48),
    Case(((5, 290),), planes=2, dim=256, group=5),
    Case(((2, 261),), planes=1, dim=128, group=1, page=64, kv_heads=2),
    Case(((2, 261),), planes=1, dim=40, group=4),
    Case(((2, 261),), planes=8, dim=128, group=4, page=10),
    Case(((2, 261),), planes=2, dim=7, group=3),
    Case(((2, 600),), planes=2, dim=64, group=1),
]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


@pytest.mark.parametrize("case", CASES + MORE)
def test_kernel_hashes_what_the_reference_hashes_and_nothing_else(case, isa):
    x = world(case)
    expected = hashed(x)
    codes, size = x.side()
    cpu.hash_keys(codes, size, x.kv, x.mean, x.w, x.planes, x.kv.start, x.kv.bound, isa)
    assert (codes != expected[0]).float().mean() < 1e-3  # what lies on a boundary may fall either way
    assert torch.allclose(size, expected[1], rtol=3e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_keys_of_every_dtype_are_hashed(dtype, isa):
    x = world(CASES[1])
    x = x._replace(kv=x.kv._replace(k=x.kv.k.to(dtype)))
    expected = hashed(x)
    codes, size = x.side()
    cpu.hash_keys(codes, size, x.kv, x.mean, x.w, x.planes, x.kv.start, x.kv.bound, isa)
    assert (codes != expected[0]).float().mean() < 1e-3
    assert torch.allclose(size, expected[1], rtol=3e-3, equal_nan=True)


def test_codes_of_a_growing_middle_are_those_of_all_at_once(isa):
    x = world(CASES[0])
    expected = hashed(x)
    codes, size = x.side()
    part = x.kv._replace(length=torch.tensor([95, 343]), spans=None)
    cpu.hash_keys(codes, size, part, x.mean, x.w, x.planes, part.start, 343, isa)
    for length in ([96, 356], [96, 370]):
        more = x.kv._replace(length=torch.tensor(length), spans=None)
        cpu.hash_keys(codes, size, more, x.mean, x.w, x.planes, torch.minimum(part.end, more.end), 14, isa)
        part = more
    probe = cpu.probe(x.q, x.w, x.planes, 0.1, (codes, size, x.kv, x.mean, part.end), isa)
    assert (codes != expected[0]).float().mean() < 1e-3
    assert torch.allclose(size, expected[1], rtol=2e-3, equal_nan=True)
    close_probes(probe, key_codes.project_reference(x.q, x.w, x.planes, 0.1))


@pytest.mark.parametrize("case", CASES + MORE)
def test_kernel_projects_and_scores_as_the_reference(case, isa):
    x = world(case)
    _, codes, size, expected = scored(x)
    score = cpu.estimate(x.q, codes, size, x.kv, x.w, x.planes, case.dim**-0.5, isa)
    expected = (expected / LOG2E).transpose(2, 3).flatten(1, 2)
    assert score.shape == expected.shape
    assert torch.equal(score.isinf(), expected.isinf())
    assert torch.allclose(score, expected, rtol=1e-3, atol=2e-2)  # an integer of the query may be another
    x.q[0, 0] = 0
    probe = cpu.probe(x.q, x.w, x.planes, 0.1, isa=isa)
    close_probes(probe, key_codes.project_reference(x.q, x.w, x.planes, 0.1))
    assert not probe.line[0, 0].any()


@pytest.mark.parametrize("case", CASES[:4] + MORE[4:])
def test_kernel_counts_differing_bits_as_the_reference(case, isa):
    x = world(case)
    codes, _ = hashed(x)
    q_codes, _ = key_codes.encode(x.q.float(), x.w[0], case.planes)
    expected = key_codes.hamming_distance_reference(q_codes, codes, x.kv)
    within = key_codes.inside(x.kv)[:, None, :, None].expand_as(expected)
    assert torch.equal(cpu.hamming_distance(q_codes, codes, x.kv, isa)[within], expected[within])


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], Case(((3, 9000), (40, 5000)), dim=16, group=2)])
def test_kernel_finds_the_factors_that_the_reference_finds(case, per, isa):
    x = world(case)
    probe, codes, size, score = scored(x)
    lists = codes.shape[1] if per == "kv_head" else x.q.shape[1]
    for quota in (Quota(share=0.1), Quota(keys=60)):
        row = key_codes.tokens_a_row(case.group, codes.shape[3])
        expected = key_codes.log_factors_reference(score, x.kv, quota, per, row)
        found = cpu.factors(probe, codes, size, x.kv, x.planes, quota, lists, isa)
        some = (x.kv.length > 0)[:, None].expand_as(found)
        assert torch.allclose(found[some], expected[some], rtol=1e-4, atol=1e-3)


def drawn(x, quota, rule, isa, most_rows=None, seed=7, side=None, new=None, positions=POSITIONS, first=0):
    codes, size = hashed(x) if side is None else side
    most_rows = x.kv.bound if most_rows is None else most_rows
    at, scale = positions[: len(x.q)], x.q.shape[2] ** -0.5
    what = (x.q, codes, size, x.kv, x.mean, x.w, x.planes, scale, quota)
    if isa is None:
        return key_codes.sample(*what, seed, 1, at, most_rows, *rule, 0, new)
    return cpu.sample(*what, key_codes.seed_state(seed, 1), at, most_rows, *rule, first, new, isa)


@pytest.mark.parametrize("rule", RULES)
def test_a_process_with_some_of_the_heads_draws_what_one_with_all_of_them_draws(rule):
    x = world(Case(((3, 700), (40, 300)), dim=16, group=2, kv_heads=2), "cpu")
    codes, size = hashed(x)
    kv = x.kv._replace(k=x.kv.k[:, :, 1:], v=x.kv.v[:, :, 1:])
    alone = x._replace(q=x.q[:, 2:], kv=kv, mean=x.mean[:, 1:], w=x.w[1:].contiguous())
    for most in (200, 40):  # of which too many are drawn
        both = drawn(x, Quota(share=0.2), rule, "auto", most, side=(codes, size))
        side = codes[:, 1:].contiguous(), size[:, 1:].contiguous()
        part = drawn(alone, Quota(share=0.2), rule, "auto", most, side=side, first=1)
        assert lists_of(part) == lists_of_last_head(both)


LONG = Case(((3, 2500), (40, 900)), dim=16, group=2, page=64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("case", "keys", "most_rows"),
    [(CASES[1], 9, 60), (CASES[2], 30, 9), (CASES[3], 1, 5), (CASES[4], 25, 90), (MORE[0], 60, 200), (LONG, 60, 50)],
)
def test_kernels_draw_as_the_reference(case, keys, most_rows, rule, isa):
    x = world(case)
    mine, theirs = (drawn(x, Quota(keys=keys), rule, i, most_rows) for i in (isa, None))
    same_draw(mine, theirs)
    rows, used = mine.selection.rows.long(), mine.selection.in_use()
    assert used.any() or keys == 1
    for b, (start, end) in enumerate(case.spans):
        assert ((rows[b] >= start) & (rows[b] < end))[used[b]].all()
    ascending = rows[..., 1:] > rows[..., :-1]
    assert ascending[used[..., 1:]].all()


@pytest.mark.parametrize("rule", RULES)
def test_all_rows_are_taken_with_weight_one_where_the_budget_allows(rule, isa):
    x = world(CASES[2])
    out = drawn(x, Quota(keys=187), rule, isa)
    for b, (start, end) in enumerate(CASES[2].spans):
        assert (out.selection.count[b] == end - start).all()
        assert (out.selection.rows[b, :, : end - start] == torch.arange(start, end)).all()
        assert not out.selection.log_w[b, :, : end - start].any()
    assert torch.equal(out.expected, x.kv.length.float()[:, None].expand_as(out.expected))


def test_the_newest_token_is_hashed_on_the_way(isa):
    x = world(CASES[0])
    codes, size = x.side()
    key_codes.hash_keys_reference(codes, size, x.kv._replace(length=x.kv.length - 1), x.mean, x.w, 2, x.kv.start, 999)
    out = drawn(x, Quota(keys=20), RULES[0], isa, side=(codes, size), new=x.kv.end - 1)
    assert (codes != hashed(x)[0]).float().mean() < 1e-3
    same_draw(out, drawn(x, Quota(keys=20), RULES[0], None))


def test_draws_do_not_depend_on_threads_or_on_where_rows_lie(isa):
    x, before = world(LONG), torch.get_num_threads()
    codes, size = hashed(x)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(lists_of(drawn(x, Quota(keys=70), RULES[2], isa, side=(codes, size))))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    side = [key_codes.by_token(s, x.kv)[1:].contiguous() for s in (codes, size)]
    rows = torch.zeros(1, x.kv.bound + 5, 1, 16)
    kv = KV(rows, rows, x.kv.start[1:] + 5, x.kv.length[1:], most=rows.shape[1])._replace(origin=torch.tensor([5]))
    side = [torch.nn.functional.pad(s, (0, 0) * (s.dim() - 3) + (0, 5)) for s in side]
    alone = x._replace(kv=kv, q=x.q[1:], mean=x.mean[1:])
    out = lists_of(drawn(alone, Quota(keys=70), RULES[2], isa, side=side, positions=POSITIONS[1:]))
    assert out == [{row + 5: w for row, w in one.items()} for one in found[0][2:]]


def test_kernels_take_empty_buffers(isa):
    x = world(Case(((0, 0),)))
    codes, size = x.side()
    cpu.hash_keys(codes, size, x.kv, x.mean, x.w, 2, x.kv.start, 0, isa)
    out = drawn(x, Quota(keys=9), RULES[0], isa, most_rows=4, side=(codes, size), new=x.kv.start)
    assert torch.equal(codes, x.codes)
    assert not out.selection.count.any() and not out.expected.any()
    assert math.isinf(cpu.estimate(x.q, codes, size, x.kv._replace(most=3), x.w, 2, 1.0, isa).amax())
