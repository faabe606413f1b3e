"""Codes of keys, what they estimate, and draws by them: what they promise, and that kernels give what references give.

The kernels' tests run on a GPU where there is one and else, with the same small cases, in Triton's interpreter.
"""

import importlib
import math
from typing import NamedTuple

import pytest
import torch

from keysift.ops import key_codes
from keysift.ops.key_codes import BLOCK, LOG2E
from keysift.ops.pages import Quota
from keysift.types import KV
from tests.devices import CUDA, DEVICES
from tests.helpers import generator, poisoned_empty

pytest.importorskip("triton", reason="triton is not installed")
kernels = importlib.import_module("keysift.ops.key_codes_triton")
sampling = importlib.import_module("keysift.ops.key_sample_triton")


class Case(NamedTuple):
    spans: tuple[tuple[int, int], ...]
    planes: int = 2
    dim: int = 128
    group: int = 4
    page: int = 0  # 0: in one piece
    kv_heads: int = 1
    origin: tuple[int, ...] | None = None


CASES = [
    Case(((4, 100), (30, 400)), page=64, kv_heads=2),
    Case(((4, 300), (0, 1)), dim=80, group=7, origin=(3, 0)),
    Case(((70, 257), (5, 5), (63, 64)), planes=4, dim=64, group=1, page=16, kv_heads=2),
    Case(((9, 513),), planes=1, page=256, origin=(8,)),
    Case(((1, 270),), planes=1, dim=64, group=1, page=128),
    Case(((0, 257),), planes=8, dim=64, kv_heads=2),
]


class World(NamedTuple):
    """Keys in a buffer whose other rows are NaN, and side data that is nonsense until it is written."""

    kv: KV
    q: torch.Tensor
    mean: torch.Tensor
    w: torch.Tensor
    planes: int
    codes: torch.Tensor
    size: torch.Tensor

    def side(self):
        """Codes and sizes; in pages, with other data between those of one and the next."""
        more = (3, 1) if self.kv.table is not None else (0, 0)
        return tuple(apart(x, n) for x, n in zip((self.codes, self.size), more, strict=True))


def apart(side, heads):
    """The same side data, of which each page begins so many heads later."""
    larger = torch.full_like(side[:, :1], 77).repeat(1, side.shape[1] + heads, *(1,) * (side.dim() - 2))
    larger[:, : side.shape[1]] = side
    return larger[:, : side.shape[1]]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def world(case, device="cpu", seed=0):
    g = generator(seed)
    batch, rows = len(case.spans), max(end for _, end in case.spans) + 7
    k = torch.full((batch, rows, case.kv_heads, case.dim), math.nan)
    for b, (start, end) in enumerate(case.spans):
        k[b, start:end] = 0.5 + torch.randn(end - start, case.kv_heads, case.dim, generator=g) * 1.5
    table, shape = None, (batch, case.kv_heads, rows)
    if case.page:
        per = -(-rows // case.page)
        table = torch.randperm(batch * per + 3, generator=g)[: batch * per].view(batch, per).int()
        paged = torch.full((batch * per + 3, case.page, case.kv_heads, case.dim), math.nan)
        padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, per * case.page - rows), value=math.nan)
        paged[table.long()] = padded.unflatten(1, (per, case.page))
        k, shape = paged, (batch * per + 3, case.kv_heads, case.page)
        for b, (start, end) in enumerate(case.spans):  # pages that do not exist
            table[b, -(-end // case.page) :] = 10**6
            table[b, : start // case.page] = 10**6
    k = k.bfloat16().to(device)
    kv = KV.on(k, k, case.spans, None if table is None else table.to(device))
    if case.origin is not None:
        kv = kv._replace(origin=torch.tensor(case.origin, device=device))
    q = torch.randn(batch, case.kv_heads * case.group, case.dim, generator=g).bfloat16() * 2
    mean = 0.5 + torch.randn(batch, case.kv_heads, case.dim, generator=g) * 0.1
    w = key_codes.rotation(3, 5, case.kv_heads, case.dim, device)
    width = key_codes.code_bytes(case.dim, case.planes)
    codes = torch.randint(0, 256, (*shape, width), generator=g, dtype=torch.uint8).to(device)
    size = torch.full(shape, math.nan, dtype=torch.float16, device=device)
    return World(kv, q.to(device), mean.to(device), w, case.planes, codes, size)


def hashed(x):
    codes, size = x.side()
    key_codes.hash_keys_reference(codes, size, x.kv, x.mean, x.w, x.planes, x.kv.start, x.kv.bound)
    return codes, size


def scored(x):
    """Probe, codes, sizes and scores by the references."""
    probe = key_codes.project_reference(x.q, x.w, x.planes, x.q.shape[2] ** -0.5)
    codes, size = hashed(x)
    return probe, codes, size, key_codes.scores_reference(probe, codes, size, x.kv, x.planes)


def test_rotations_are_orthonormal_and_differ_by_layer_and_head():
    w = key_codes.rotation(1, 2, 2, 80, "cpu").float()
    assert torch.allclose(w.transpose(1, 2) @ w, torch.eye(80).expand(2, -1, -1), atol=0.02)  # bf16
    other = key_codes.rotation(1, 3, 2, 80, "cpu").float()
    for a, b in ((w[0], w[1]), (w[0], other[0])):
        assert (a * b).sum(0).abs().mean() < 0.2


def test_side_data_of_a_page_lie_in_one_piece():
    codes = torch.zeros(3, 2, 4, 8, dtype=torch.uint8)
    assert key_codes.pitch_of(codes) == 2
    assert key_codes.pitch_of(apart(codes, 3)) == 5
    for wrong in (codes.transpose(1, 2), torch.zeros(3, 70)[:, :64].view(3, 2, 4, 8)):
        with pytest.raises(ValueError, match="in one piece"):
            key_codes.pitch_of(wrong)


def test_field_f_of_byte_j_is_the_level_of_coordinate_f_times_bytes_plus_j():
    x = world(CASES[0])
    codes, size = (key_codes.by_token(side, x.kv) for side in hashed(x))
    page, slot = (int(at[1, 0]) for at in x.kv.locate(torch.tensor([[0], [200]])))
    key = x.kv.k[page, slot, 1].float() - x.mean[1, 1]
    y = key.bfloat16().float() @ x.w[1].float()
    level = (y * math.sqrt(128) / key.norm() / 0.9957 + 2).floor().clamp(0, 3)
    for f, j in ((0, 0), (1, 17), (3, 31)):
        assert ((int(codes[1, 1, 200, j]) ^ 0x80) >> 2 * f & 3) == int(level[f * 32 + j])
    assert torch.equal(key_codes.levels(codes[1, 1, 200], 2).float(), level)
    along = (y * (level - 1.5) * 0.9957).sum()
    assert float(size[1, 1, 200]) == pytest.approx(float(key.square().sum() / along), rel=1e-3)


@pytest.mark.parametrize("planes", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [64, 80])
def test_scores_are_unbiased_and_exact_along_a_key(dim, planes):
    """Regression of the scores on what they estimate, over queries and keys of several norms."""
    g = generator(planes + dim)
    k = torch.randn(1, 2000, 1, dim, generator=g) * torch.rand(1, 2000, 1, 1, generator=g).add(0.5)
    q = torch.randn(1, 24, dim, generator=g) * 2
    q[0, 0] = 0
    kv = KV.of(k, k)
    w = key_codes.rotation(0, 0, 1, dim, "cpu")
    codes = torch.zeros(1, 1, 2000, key_codes.code_bytes(dim, planes), dtype=torch.uint8)
    size = torch.zeros(1, 1, 2000, dtype=torch.float16)
    key_codes.hash_keys_reference(codes, size, kv, torch.zeros(1, 1, dim), w, planes, kv.start, 2000)
    score = key_codes.estimate(q, codes, size, kv, w, planes, dim**-0.5)[0].double()
    truth = (q[0].double() @ k[0, :, 0].double().T) * dim**-0.5
    assert not score[0].any()
    assert float((score * truth).sum() / truth.square().sum()) == pytest.approx(1, rel=0.02)
    noise = {1: 0.76, 2: 0.38, 4: 0.12, 8: 0.03}[planes]  # a stack of signs has sqrt(pi / 2 - 1) / sqrt(planes)
    assert float((score - truth).std() / truth.std()) < noise
    own = key_codes.estimate(k[:, :8, 0], codes, size, kv, w, planes, 1.0)[0, :, :8].diagonal()
    assert torch.allclose(own, k[0, :8, 0].square().sum(-1), rtol=0.03)


def test_planes_other_than_powers_of_two_are_refused():
    with pytest.raises(ValueError, match="planes=3"):
        key_codes.code_bytes(64, 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_hashes_what_the_reference_hashes_and_nothing_else(case, device):
    x = world(case, device)
    expected = hashed(x)
    codes, size = x.side()
    kernels.hash_keys(codes, size, x.kv, x.mean, x.w, x.planes, x.kv.start, x.kv.bound)
    assert (codes != expected[0]).float().mean() < 1e-3  # what lies on a boundary may fall either way
    assert torch.allclose(size, expected[1], rtol=3e-3, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_codes_of_a_growing_middle_are_those_of_all_at_once(device):
    x = world(CASES[0], device)
    expected = hashed(x)
    codes, size = x.side()
    part = x.kv._replace(length=torch.tensor([95, 343], device=device), spans=None)
    kernels.hash_keys(codes, size, part, x.mean, x.w, x.planes, part.start, 343)
    for length in ([96, 356], [96, 370]):
        more = x.kv._replace(length=torch.tensor(length, device=device), spans=None)
        kernels.hash_keys(codes, size, more, x.mean, x.w, x.planes, torch.minimum(part.end, more.end), 14)
        part = more
    probe = kernels.probe(x.q, x.w, x.planes, 0.1, (codes, size, x.kv, x.mean, part.end))
    assert torch.equal(codes, expected[0])
    assert torch.allclose(size, expected[1], rtol=2e-3, equal_nan=True)
    close_probes(probe, key_codes.project_reference(x.q, x.w, x.planes, 0.1))


def close_probes(a, b):
    assert (a.weights.int() - b.weights.int()).abs().max() <= 1  # what lies between two integers may fall either way
    assert (a.weights != b.weights).float().mean() < 1e-3
    assert torch.allclose(a.line[..., 0], b.line[..., 0], rtol=1e-3)
    assert torch.allclose(a.line[..., 1], b.line[..., 1], rtol=1e-2, atol=3e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_projects_as_the_reference(case, device):
    x = world(case, device)
    x.q[0, 0] = 0
    probe = kernels.probe(x.q, x.w, x.planes, 0.1)
    close_probes(probe, key_codes.project_reference(x.q, x.w, x.planes, 0.1))
    assert not probe.line[0, 0].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_scores_as_the_reference(case, device):
    x = world(case, device)
    _, codes, size, expected = scored(x)
    score = sampling.estimate(x.q, codes, size, x.kv, x.w, x.planes, case.dim**-0.5)
    expected = (expected / LOG2E).transpose(2, 3).flatten(1, 2)
    assert score.shape == expected.shape
    assert torch.equal(score.isinf(), expected.isinf())
    assert torch.allclose(score, expected, rtol=1e-3, atol=2e-2)  # an integer of the query may be another


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES[:4])
def test_kernel_counts_differing_bits_as_the_reference(case, device):
    x = world(case, device)
    codes, _ = hashed(x)
    q_codes, _ = key_codes.encode(x.q.float(), x.w[0], case.planes)
    expected = key_codes.hamming_distance_reference(q_codes, codes, x.kv)
    within = key_codes.inside(x.kv)[:, None, :, None].expand_as(expected)
    assert torch.equal(kernels.hamming_distance(q_codes, codes, x.kv)[within], expected[within])
    if case.planes == 1:
        other, _ = key_codes.encode(-x.q.float(), x.w[0], 1)
        sum_of_both = expected + key_codes.hamming_distance_reference(other, codes, x.kv)
        assert (sum_of_both[within] == case.dim).float().mean() > 0.9


RULES = [("kv_head", False), ("kv_head", True), ("query_head", False)]
POSITIONS = torch.tensor([257, 1000, 3])


def factors(probe, codes, size, kv, planes, quota, per):
    heads = probe.weights.shape[1]
    lists = codes.shape[1] if per == "kv_head" else heads
    return sampling.factors(probe, codes, size, kv, planes, quota, lists)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("case", "per"),
    [
        (CASES[1], "kv_head"),
        pytest.param(CASES[1], "query_head", marks=pytest.mark.soak),
        pytest.param(CASES[2], "kv_head", marks=pytest.mark.slow),
        (CASES[2], "query_head"),
    ],
)
def test_kernel_finds_the_factors_that_the_reference_finds(case, per, device):
    x = world(case, device)
    probe, codes, size, score = scored(x)
    for quota in (Quota(share=0.1), Quota(keys=60)):
        row = key_codes.tokens_a_row(case.group, codes.shape[3])
        expected = key_codes.log_factors_reference(score, x.kv, quota, per, row)
        found = factors(probe, codes, size, x.kv, x.planes, quota, per)
        some = (x.kv.length > 0)[:, None].expand_as(found)
        assert torch.allclose(found[some], expected[some], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_factors_of_long_middles_are_found_from_a_scattered_sample(device):
    x = world(Case(((3, 9000),), dim=16, group=2), device)
    probe, codes, size, score = scored(x)
    known = key_codes.sampled(x.kv, key_codes.tokens_a_row(2, codes.shape[3]))
    assert 1500 < int(known.sum()) <= key_codes.SAMPLE
    quota = Quota(share=0.05)
    found = factors(probe, codes, size, x.kv, x.planes, quota, "kv_head")
    row = key_codes.tokens_a_row(2, codes.shape[3])
    expected = key_codes.log_factors_reference(score, x.kv, quota, "kv_head", row)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    u = (score + found.view(1, 1, 1, 2)).exp2().sum(-1).clamp(max=1)
    assert float(u.sum()) == pytest.approx(0.05 * 8997, rel=0.1)


def drawn(x, quota, rule, most_rows=None, kernel=True, positions=POSITIONS, seed=7, side=None, new=None, first=0):
    codes, size = hashed(x) if side is None else side
    most_rows = x.kv.bound if most_rows is None else most_rows
    at, scale = positions[: len(x.q)].to(x.q.device), x.q.shape[2] ** -0.5
    what = (x.q, codes, size, x.kv, x.mean, x.w, x.planes, scale, quota)
    if kernel:
        return sampling.sample(*what, key_codes.seed_state(seed, 1), at, most_rows, *rule, first, new)
    return key_codes.sample(*what, seed, 1, at, most_rows, *rule, first, new)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [RULES[0], *(pytest.param(rule, marks=pytest.mark.soak) for rule in RULES[1:])])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_process_with_some_of_the_heads_draws_what_one_with_all_of_them_draws(rule, kernel, device):
    x = world(Case(((3, 300), (40, 200)), dim=16, group=2, kv_heads=2), device)
    codes, size = hashed(x)
    kv = x.kv._replace(k=x.kv.k[:, :, 1:], v=x.kv.v[:, :, 1:])
    alone = x._replace(q=x.q[:, 2:], kv=kv, mean=x.mean[:, 1:], w=x.w[1:].contiguous())
    side = codes[:, 1:].contiguous(), size[:, 1:].contiguous()
    for most in (25,) if kernel else (100, 25):  # of which too many are drawn
        both = drawn(x, Quota(share=0.2), rule, most, kernel, side=(codes, size))
        part = drawn(alone, Quota(share=0.2), rule, most, kernel, side=side, first=1)
        assert lists_of(part) == lists_of_last_head(both)
        assert lists_of(drawn(alone, Quota(share=0.2), rule, most, kernel, side=side)) != lists_of(part)


def same_draw(a, b):
    """Up to one row in fifty where the running sum passes a whole number."""
    assert (a.selection.count - b.selection.count).abs().max() <= 1
    for mine, theirs in zip(lists_of(a), lists_of(b), strict=True):
        common = mine.keys() & theirs.keys()
        assert len(common) >= 0.98 * max(len(mine), len(theirs)) - 1e-9
        assert all(mine[row] == pytest.approx(theirs[row], rel=2e-3, abs=5e-3) for row in common)
    assert torch.allclose(a.expected, b.expected, rtol=1e-3)
    assert not a.overflow.any() and not b.overflow.any()


DRAWS = [  # every rule and every case once; the rest is slow
    pytest.param(*draw, rule, marks=[] if i % len(RULES) == j else pytest.mark.slow)
    for i, draw in enumerate([(1, 9, 60), (2, 30, 9), (3, 1, 5), (4, 25, 90)])
    for j, rule in enumerate(RULES)
]


def lists_of_last_head(draw):
    own = draw.selection.count.shape[1] // 2
    return lists_of(draw._replace(selection=type(draw.selection)(*(x[:, own:] for x in draw.selection))))


def lists_of(draw):
    rows, count, log_w = (x.flatten(0, 1).tolist() for x in draw.selection)
    return [dict(zip(r[:n], w[:n], strict=True)) for r, n, w in zip(rows, count, log_w, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "keys", "most_rows", "rule"), DRAWS)
def test_kernels_draw_as_the_reference(case, keys, most_rows, rule, device):
    x = world(CASES[case], device)
    mine, theirs = (drawn(x, Quota(keys=keys), rule, most_rows, kernel) for kernel in (True, False))
    same_draw(mine, theirs)
    rows, used = mine.selection.rows.long(), mine.selection.in_use()
    assert used.any() or keys == 1
    for b, (start, end) in enumerate(CASES[case].spans):
        assert ((rows[b] >= start) & (rows[b] < end))[used[b]].all()
    ascending = rows[..., 1:] > rows[..., :-1]
    assert ascending[used[..., 1:]].all()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [*(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES[:2]), RULES[2]])
def test_all_rows_are_taken_with_weight_one_where_the_budget_allows(rule, device):
    x = world(CASES[2], device)
    out = drawn(x, Quota(keys=187), rule)
    for b, (start, end) in enumerate(CASES[2].spans):
        assert (out.selection.count[b] == end - start).all()
        assert (out.selection.rows[b, :, : end - start] == torch.arange(start, end, device=device)).all()
        assert not out.selection.log_w[b, :, : end - start].any()
    assert torch.equal(out.expected, x.kv.length.float()[:, None].expand_as(out.expected))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [RULES[0], *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES[1:])])
def test_a_known_middle_gives_the_expected_rows_that_the_budget_says(rule, device):
    x = world(CASES[0], device)
    out = drawn(x, Quota(share=0.1), rule)
    wanted = torch.tensor([9.0, 37.0], device=device)[:, None].expand_as(out.expected)
    assert torch.allclose(out.expected, wanted, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_keys_that_stand_out_are_always_taken(device):
    x = world(Case(((4, 300),), page=64), device)
    page, slot = x.kv.locate(torch.tensor([[99]], device=device))
    x.kv.k[page[0, 0], slot[0, 0], 0] = x.q[0, 0] * 8
    side = hashed(x)
    for seed in range(5):
        found = lists_of(drawn(x, Quota(keys=9), RULES[0], seed=seed, side=side))[0]
        assert found[99] == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_newest_token_is_hashed_on_the_way(device):
    x = world(CASES[0], device)
    expected = hashed(x)
    codes, size = x.side()
    key_codes.hash_keys_reference(codes, size, x.kv._replace(length=x.kv.length - 1), x.mean, x.w, 2, x.kv.start, 999)
    out = drawn(x, Quota(keys=20), RULES[0], side=(codes, size), new=x.kv.end - 1)
    assert torch.equal(codes, expected[0])
    same_draw(out, drawn(x, Quota(keys=20), RULES[0], kernel=False))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_draws_of_a_batch_are_those_of_each_sequence_wherever_its_rows_lie(device):
    x = world(CASES[0], device)
    codes, size = hashed(x)
    together = lists_of(drawn(x, Quota(keys=20), RULES[0], side=(codes, size)))
    for b in range(2):
        side = [key_codes.by_token(s, x.kv)[b : b + 1] for s in (codes, size)]
        side = [torch.nn.functional.pad(s, (0, 0) * (s.dim() - 3) + (0, 13)) for s in side]
        shift = 5 if b else 0
        rows = torch.zeros(1, side[0].shape[2] + shift, 2, 128, device=device)
        kv = KV(rows, rows, x.kv.start[b : b + 1] + shift, x.kv.length[b : b + 1], most=rows.shape[1])
        kv = kv._replace(origin=torch.tensor([shift], device=device))
        alone = x._replace(kv=kv, q=x.q[b : b + 1], mean=x.mean[b : b + 1])
        out = lists_of(drawn(alone, Quota(keys=20), RULES[0], side=side, positions=POSITIONS[b:]))
        assert out == [{row + shift: w for row, w in found.items()} for found in together[2 * b : 2 * b + 2]]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_few_programs_draw_what_many_do_however_much_a_bound_allows_for(monkeypatch, rule, device):
    """... and none reads what no other wrote."""
    x = world(Case(((270, 800), (900, 900)), dim=16, group=2, page=128), device)
    side = hashed(x)
    expected = drawn(x, Quota(share=0.2), rule, 130, side=side)
    for name, most in (("MOST_TAKING", 1), ("MOST_CLOSING", 1), ("CLOSED_TILE", 32)):
        monkeypatch.setattr(sampling, name, most)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    table = torch.nn.functional.pad(x.kv.table, (0, 20), value=10**6)
    found = drawn(
        x._replace(kv=x.kv._replace(table=table, spans=None, most=2500)), Quota(share=0.2), rule, 130, side=side
    )
    assert lists_of(found) == lists_of(expected) and found.selection.count[0].min() > 50
    assert torch.equal(found.expected, expected.expected)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_take_empty_buffers(device):
    x = world(Case(((0, 0),)), device)
    codes, size = x.side()
    kernels.hash_keys(codes, size, x.kv, x.mean, x.w, 2, x.kv.start, 0)
    out = drawn(x, Quota(keys=9), RULES[0], most_rows=4, side=(codes, size), new=x.kv.start)
    assert torch.equal(codes, x.codes)
    assert not out.selection.count.any() and not out.expected.any()
    kv = x.kv._replace(start=x.kv.start[:0], length=x.kv.length[:0], spans=())
    nobody = x._replace(kv=kv, q=x.q[:0], mean=x.mean[:0])
    assert drawn(nobody, Quota(keys=9), RULES[0], most_rows=4, side=(codes, size)).selection.rows.shape == (0, 1, 4)


def many_draws(keys, most_rows, rule, draws=2000, tokens=600):
    """One sequence's scores as a batch of many queries at different positions."""
    g = generator(5)
    score = torch.randn(1, 1, tokens, 3, generator=g) * 3
    score[0, 0, 200:206] += 18  # some are certain
    rows = torch.zeros(1, tokens, 1, 1)
    kv = KV(rows, rows, torch.tensor([4]), torch.tensor([tokens - 14]), most=tokens)
    score = score.masked_fill(~key_codes.inside(kv)[:, None, :, None], -math.inf)
    log_c = key_codes.log_factors_reference(score, kv, Quota(keys=keys), rule[0], 1)
    many = KV(rows.expand(draws, -1, -1, -1), rows, kv.start.expand(draws), kv.length.expand(draws), most=tokens)
    return key_codes.draw_reference(
        *(score.expand(draws, -1, -1, -1), log_c.expand(draws, -1), many, 11, torch.arange(draws), most_rows, *rule)
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("most_rows", [600, 14])
def test_rows_are_included_with_the_probability_that_their_weight_says(rule, most_rows):
    draws, tokens = 2000, 600
    out = many_draws(30, most_rows, rule)
    used, rows = out.selection.in_use(), out.selection.rows.long()
    lists = rows.shape[1]
    taken = torch.zeros(draws, lists, tokens + 1).scatter_(2, torch.where(used, rows, tokens), 1.0)[..., :-1]
    frequency = taken.mean(0)
    weight = torch.zeros(lists, tokens)
    weight[torch.where(used)[1], rows[used]] = out.selection.log_w[used]
    seen = frequency > 0
    u = (-weight).exp()
    deviation = (frequency - u) / (u * (1 - u) / draws).sqrt().clamp(min=1 / draws)
    assert deviation[seen].abs().max() < 5 and deviation[seen].square().mean() < 1.25
    certain = frequency[:, 200:206]
    assert (certain == 1).all() if most_rows == 600 else (certain < 1).all()
    number = torch.where(used, out.selection.log_w, -math.inf).exp().sum(-1)  # of tokens, as each draw estimates it
    assert ((number.mean(0) - (tokens - 14)).abs() < 4 * number.std(0) / math.sqrt(draws)).all()
    assert not out.overflow.any() and (out.selection.count <= most_rows).all()


@pytest.mark.parametrize("rule", RULES)
def test_draws_have_the_rows_that_the_budget_says(rule):
    for keys in (1, 30, 300, 560):
        out = many_draws(keys, 600, rule, draws=300)
        assert torch.allclose(out.selection.count.float().mean(0), out.expected[0], rtol=0.02, atol=0.1)
        assert torch.allclose(out.expected, torch.tensor(float(keys)), rtol=0.005)


def test_systematic_draws_vary_by_less_than_a_row_a_block():
    systematic, independent = (many_draws(60, 600, ("kv_head", x), draws=500) for x in (False, True))
    blocks = -(-600 // BLOCK)
    assert systematic.selection.count.float().std() < math.sqrt(blocks) / 2 + 0.1
    assert independent.selection.count.float().std() > 2 * systematic.selection.count.float().std()


def test_room_is_never_more_than_there_are_rows():
    assert key_codes.room(100.0, 90) == 90
    assert key_codes.room(1000.0, 10**6) > 1300


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("rule", RULES)
def test_a_captured_step_replays_what_it_gives_outside_of_a_graph(rule):
    x = world(Case(((4, 5000), (4, 1000)), page=256, kv_heads=8), "cuda")
    codes, size = hashed(x)
    positions = torch.tensor([6000, 2000], device="cuda")

    def step():
        return drawn(x, Quota(share=0.05), rule, 400, positions=positions, side=(codes, size), new=x.kv.end - 1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.q.copy_(torch.randn_like(x.q))
        positions += 1
        eager = step()
        graph.replay()
        assert lists_of(captured) == lists_of(eager)
