"""Attention over selected rows and of a few tokens over all rows: kernels and references against an fp64 oracle.

The kernels run on a GPU where there is one and else, with the same small cases, in Triton's interpreter.
"""

import importlib
import math
from typing import NamedTuple

import pytest
import torch

from keysift.ops.gather import gather_attention, gather_attention_reference
from keysift.ops.short import short_attention, short_attention_reference
from keysift.types import KV, Law, Selection
from tests.devices import CUDA, DEVICES
from tests.helpers import close, generator, oracle

pytest.importorskip("triton", reason="triton is not installed")
kernels = importlib.import_module("keysift.ops.gather_triton")
machinery = importlib.import_module("keysift.ops.split_merge_triton")
Config = machinery.Config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINKS, WINDOW = 3, 17
STARTS, LENGTHS = (0, 7, 21, 2), (145, 63, 1, 0)
GARBAGE = 1 << 30  # in entries that nobody may use
MANY = 12  # shares, more than there are blocks of rows


class Case(NamedTuple):
    group: int
    dim: int
    v_dim: int
    dtype: torch.dtype = BF16
    page: int = 0
    per_query_head: bool = False
    weight: str = "none"  # or tensor, law
    index: torch.dtype = torch.int32
    splits: int | None = 3
    outside: bool = True


CASES = [
    Case(4, 128, 128, page=64),
    Case(4, 128, 128, page=16, weight="law"),
    Case(4, 128, 128, weight="law", per_query_head=True, splits=2),
    Case(7, 80, 80, FP16, page=32, weight="tensor", index=torch.int64),
    Case(7, 80, 64, FP16, weight="law", splits=MANY),
    Case(1, 64, 64, FP32, page=16, weight="law", splits=1),
    Case(1, 64, 128, FP32, weight="tensor", splits=MANY),
    Case(4, 64, 64, FP32, page=128, weight="tensor", per_query_head=True, index=torch.int64),
    Case(4, 64, 64, FP32, page=64, weight="law", per_query_head=True, splits=1),
    Case(7, 64, 80, outside=False, splits=None),
    Case(4, 128, 64, page=64, outside=False, weight="law", splits=MANY),
    Case(4, 256, 256, page=32, weight="law"),
    Case(20, 64, 64, FP32, page=16, splits=1),
]


class Short(NamedTuple):
    tokens: int
    group: int
    dim: int
    v_dim: int
    dtype: torch.dtype = BF16
    page: int = 0
    splits: int | None = 3
    block_n: int = 32


SHORTS = [
    Short(1, 4, 128, 128, page=64),
    Short(2, 7, 80, 80, FP16, page=16),
    Short(5, 4, 64, 128, FP32, splits=MANY),
    Short(5, 1, 128, 64, page=32, splits=2, block_n=64),
    Short(16, 4, 64, 64, FP32, page=128, splits=1),
    Short(16, 7, 64, 64, BF16, splits=None),
    Short(7, 20, 64, 64, FP32, page=32, splits=1),  # more query rows than a tile holds
    Short(1, 1, 256, 256, BF16, splits=MANY),
]


def case_id(case):
    return "-".join(str(x).removeprefix("torch.") for x in case)


@pytest.fixture(autouse=True)
def _every_element_must_be_written():
    """New buffers are full of NaN."""
    with torch.no_grad():
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


class Inputs(NamedTuple):
    q: torch.Tensor  # [B, T, H, D]
    k: torch.Tensor  # [B, S, K, D], every row finite
    v: torch.Tensor


def inputs(case, tokens=1, kv_heads=2, seed=0):
    g = generator(seed)
    rows = max(s + n for s, n in zip(STARTS, LENGTHS, strict=True)) + 30
    shapes = ((tokens, kv_heads * case.group, case.dim), (rows, kv_heads, case.dim), (rows, kv_heads, case.v_dim))
    q, k, v = (torch.randn(len(LENGTHS), *shape, generator=g) for shape in shapes)
    return Inputs(q.to(case.dtype), (k + 1).to(case.dtype), v.to(case.dtype))  # keys have a mean


def ends():
    return torch.tensor(STARTS) + torch.tensor(LENGTHS)


def view_of(data, page, read, device):
    """The view of ``data`` in which all rows that are not ``read`` (bool ``[B, S, K]``) are NaN; pages are shuffled."""
    k, v = (x.masked_fill(~read[..., None], math.nan) for x in (data.k, data.v))
    start, length = torch.tensor(STARTS), torch.tensor(LENGTHS)
    if not page:
        return KV(*(x.to(device) for x in (k, v, start, length)))
    batch, rows = k.shape[:2]
    pages = -(-rows // page)
    where = torch.randperm(batch * pages, generator=generator(3)).view(batch, pages)
    buffers = []
    for x in (k, v):
        buffer = x.new_full((batch * pages + 1, page, *x.shape[2:]), math.nan)
        x = torch.cat([x, x.new_full((batch, pages * page - rows, *x.shape[2:]), math.nan)], 1)
        buffer[where.flatten()] = x.unflatten(1, (pages, page)).flatten(0, 1)
        buffers.append(buffer)
    held = (torch.arange(pages) * page < ends()[:, None]) & ((torch.arange(pages) + 1) * page > start[:, None])
    table = torch.where(held, where, batch * pages).int()  # a page of NaN
    return KV(*(x.to(device) for x in (*buffers, start, length)), None, table.to(device))


def middle_of(kv):
    middle = kv.between(kv.start + SINKS, kv.end - WINDOW)
    return middle._replace(start=torch.where(middle.length > 0, middle.start, 0))  # the start of nothing says nothing


def in_middle(rows):
    start = torch.tensor(STARTS) + SINKS
    return (torch.arange(rows) >= start[:, None]) & (torch.arange(rows) < (ends() - WINDOW)[:, None])


def in_view(rows):
    return (torch.arange(rows) >= torch.tensor(STARTS)[:, None]) & (torch.arange(rows) < ends()[:, None])


def chosen_rows(case, data, density=0.4, seed=1):
    """Which rows of the middle are selected, bool ``[B, heads, S]``; nothing by one head."""
    heads = data.q.shape[2] if case.per_query_head else data.k.shape[2]
    batch, rows = data.k.shape[:2]
    chosen = torch.rand(batch, heads, rows, generator=generator(seed)) < density
    chosen[0, -1] = False
    return chosen & in_middle(rows)[:, None]


def selection_of(case, data, chosen):
    """The selection, in no order, with garbage behind its count, and its weights by row, fp64 ``[B, H, S]``."""
    heads = data.q.shape[2]
    group = heads // chosen.shape[1]
    order = torch.rand(chosen.shape, generator=generator(2)).masked_fill(~chosen, 2).argsort(-1)
    count = chosen.sum(-1)
    used = torch.arange(chosen.shape[-1]) < count[..., None]
    log_w, dense = None, torch.zeros(len(LENGTHS), heads, chosen.shape[-1], dtype=torch.float64)
    if case.weight == "tensor":
        by_row = torch.rand(chosen.shape, generator=generator(4)) * 3
        dense = by_row.double().repeat_interleave(group, 1)
        log_w = by_row.gather(-1, order).masked_fill(~used, math.nan)
    elif case.weight == "law":
        mean = data.k.float().mean(1)
        log_w = Law(mean, torch.linspace(6, 0, 33) ** 1.5 + torch.rand(33, generator=generator(5)))
        dense = by_law(data, log_w)
    return Selection(order.masked_fill(~used, GARBAGE).to(case.index), count.to(case.index), log_w), dense


def by_law(data, law):
    repeats = data.q.shape[2] // data.k.shape[2]
    centred = (data.k.double() - law.mean.double()[:, None]).repeat_interleave(repeats, 2)
    q = data.q[:, 0].double()
    cosine = torch.einsum("bhd,bshd->bhs", q, centred)
    cosine = cosine / (q.norm(dim=-1)[..., None] * centred.norm(dim=-1).transpose(1, 2))
    at = (cosine + 1) / 2 * (len(law.table) - 1)
    left = at.long().clamp(max=len(law.table) - 2)
    table = law.table.double()
    return table[left] + (table[left + 1] - table[left]) * (at - left)


def expected(data, seen, log_w, scale):
    """fp64, ``[B, H, Dv]`` and ``[B, H]``, over the rows ``seen`` ``[B, H, S]``."""
    k, v = (x.double().repeat_interleave(data.q.shape[2] // x.shape[2], 2) for x in (data.k, data.v))
    score = torch.einsum("bhd,bshd->bhs", data.q[:, 0].double(), k) * scale + log_w
    score = score.masked_fill(~seen, -math.inf)
    return torch.einsum("bhs,bshe->bhe", score.softmax(-1).nan_to_num(0), v), score.logsumexp(-1)


def everything_of(case):
    """Inputs, rows read exactly ``[B, S]``, rows chosen, selection, and the expected result."""
    data = inputs(case)
    rows, heads = data.k.shape[1], data.q.shape[2]
    chosen = chosen_rows(case, data)
    exact = in_view(rows) & ~in_middle(rows) if case.outside else torch.zeros(len(LENGTHS), rows, dtype=torch.bool)
    selection, log_w = selection_of(case, data, chosen)
    by_head = chosen.repeat_interleave(heads // chosen.shape[1], 1)
    seen = by_head | exact[:, None]
    want = expected(data, seen, log_w.masked_fill(~by_head, 0), case.dim**-0.5)
    read = seen.unflatten(1, (data.k.shape[2], -1)).any(2).transpose(1, 2)
    return data, read, selection, want


def on(device, x):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return type(x)(*(on(device, y) for y in x)) if isinstance(x, tuple) else x


def agree(got, want, dtype):
    out, lse = got.out.cpu(), got.lse.cpu()
    assert close(out, want[0], dtype)
    assert torch.equal(lse == -math.inf, want[1] == -math.inf)
    assert (out[lse == -math.inf] == 0).all()
    finite = want[1] != -math.inf
    assert float((lse - want[1])[finite].abs().max()) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_kernel_weighs_selected_rows_and_reads_no_others_but_those_outside(case, device):
    data, read, selection, want = everything_of(case)
    kv = view_of(data, case.page, read, device)
    middle, config = middle_of(kv) if case.outside else None, Config(16 if case.splits == MANY else 32, 4, 3)
    q, selection = data.q[:, 0].to(device), on(device, selection)
    arguments = (q, kv, selection, case.dim**-0.5, middle, torch.float32, case.splits)
    got = kernels.gather(*arguments, config)
    agree(got, [x[:, None] for x in want], case.dtype)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_reference_weighs_selected_rows_and_reads_no_others_but_those_outside(case):
    data, read, selection, want = everything_of(case)
    kv = view_of(data, case.page, read, "cpu")
    middle = middle_of(kv) if case.outside else None
    got = gather_attention_reference(data.q[:, 0], kv, selection, case.dim**-0.5, middle, case.dtype)
    assert got.out.dtype == case.dtype
    agree(got, [x[:, None] for x in want], case.dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_s_values_may_be_merged_a_few_at_a_time(device, monkeypatch):
    case = Case(1, 64, 64, FP32, splits=MANY)
    data, read, selection, want = everything_of(case)
    kv = view_of(data, 0, read, device)
    monkeypatch.setattr(machinery, "MERGED_ELEMENTS", 256)
    arguments = (data.q[:, 0].to(device), kv, on(device, selection), case.dim**-0.5, middle_of(kv), FP32)
    agree(kernels.gather(*arguments, MANY, Config(16, 4, 3)), [x[:, None] for x in want], FP32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [0, 32])
def test_selecting_the_whole_middle_is_dense_attention(page, device):
    case = Case(4, 64, 64, FP32, page, splits=2)
    data = inputs(case)
    whole = in_middle(data.k.shape[1])[:, None].expand(-1, 2, -1)
    selection, log_w = selection_of(case, data, whole)
    seen = in_view(data.k.shape[1])
    kv = view_of(data, page, seen[..., None].expand(-1, -1, 2), device)
    want = expected(data, seen[:, None].expand(-1, 8, -1), log_w, 0.2)
    q = data.q.to(device)
    got = kernels.gather(q[:, 0], kv, on(device, selection), 0.2, middle_of(kv), splits=2)
    agree(got, [x[:, None] for x in want], FP32)
    agree(kernels.short(q, kv, 0.2, splits=2), [x[:, None] for x in want], FP32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [0, 40])
def test_an_empty_selection_reads_sinks_and_window_alone(width, device):
    case = Case(4, 64, 64, FP32, 16)
    data = inputs(case)
    exact = in_view(data.k.shape[1]) & ~in_middle(data.k.shape[1])
    kv = view_of(data, 16, exact[..., None].expand(-1, -1, 2), device)
    rows = torch.full((len(LENGTHS), 2, width), GARBAGE, dtype=torch.int32, device=device)
    selection = Selection(rows, torch.zeros(len(LENGTHS), 2, dtype=torch.int32, device=device))
    want = expected(data, exact[:, None].expand(-1, 8, -1), 0, 0.2)
    for run in (kernels.gather, gather_attention_reference):
        agree(run(data.q[:, 0].to(device), kv, selection, 0.2, middle_of(kv)), [x[:, None] for x in want], FP32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_key_that_is_the_mean_has_no_angle(device):
    q, k, v = (x.to(BF16) * 50 for x in torch.randn(3, 1, 1, 2, 128, generator=generator(0)))
    kv = KV.of(k.to(device), v.to(device))
    law = Law(k[:, 0].float().to(device), torch.tensor([9.0, 1.0, -9.0], device=device))
    rows = torch.zeros(1, 2, 1, dtype=torch.int64, device=device)
    selection = Selection(rows, torch.ones_like(rows[..., 0]), law)
    want = (q[:, 0].float() * k[:, 0].float()).sum(-1) * 1e-3 + 1
    for run in (kernels.gather, gather_attention_reference):
        got = run(q[:, 0].to(device), kv, selection, 1e-3)
        assert torch.allclose(got.lse[:, 0].cpu(), want, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_keys_and_queries_may_differ_in_type_and_out_has_the_type_asked_for(dtype, device):
    case = CASES[0]._replace(page=0)
    data, read, selection, want = everything_of(case)
    kv = view_of(data, 0, read, device)
    q = data.q[:, 0].to(device, FP32)
    for splits in (1, 2):
        got = kernels.gather(q, kv, on(device, selection), case.dim**-0.5, middle_of(kv), dtype, splits)
        assert got.out.dtype == dtype
        agree(got, [x[:, None] for x in want], dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_counts_beyond_the_width_stop_at_it_and_lists_may_be_strided(device):
    case = Case(4, 64, 64, FP32)
    data = inputs(case)
    kv = KV.of(data.k.to(device), data.v.to(device))
    rows = torch.arange(40, device=device).expand(len(LENGTHS), 2, 80 // 2)  # no strides over sequences and heads
    got = [
        kernels.gather(data.q[:, 0].to(device), kv, Selection(rows, torch.full((4, 2), n, device=device)), 0.2)
        for n in (40, 1000)
    ]
    spread = torch.stack([rows, rows * 0 - 1], -1)[..., 0]
    strided = Selection(spread, torch.full((2, 4), 40, device=device).T)
    got.append(kernels.gather(data.q[:, 0].to(device), kv, strided, 0.2))
    assert all(torch.equal(x.out, got[0].out) and torch.equal(x.lse, got[0].lse) for x in got[1:])


def short_case(case):
    data = inputs(case, case.tokens)
    seen = in_view(data.k.shape[1])
    outs, lses = [], []
    for b, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        spare = max(0, case.tokens - length)  # queries before the first key
        q = data.q[b : b + 1, spare:]
        out, lse = oracle(q, *(x[b : b + 1, start : start + length] for x in (data.k, data.v)))
        outs.append(torch.cat([out.new_zeros(1, spare, *out.shape[2:]), out], 1))
        lses.append(torch.cat([lse.new_full((1, spare, lse.shape[2]), -math.inf), lse], 1))
    return data, seen[..., None].expand(-1, -1, 2), (torch.cat(outs), torch.cat(lses))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SHORTS, ids=case_id)
def test_short_attention_is_causal_attention_of_the_last_tokens_of_ragged_sequences(case, device):
    data, read, want = short_case(case)
    kv = view_of(data, case.page, read, device)
    arguments = (data.q.to(device), kv, case.dim**-0.5, torch.float32, case.splits)
    got = kernels.short(*arguments, Config(case.block_n, 4, 3))
    agree(got, want, case.dtype)


@pytest.mark.parametrize("case", SHORTS, ids=case_id)
def test_short_reference_is_causal_attention_of_the_last_tokens_of_ragged_sequences(case):
    data, read, want = short_case(case)
    kv = view_of(data, case.page, read, "cpu")
    got = short_attention_reference(data.q, kv, case.dim**-0.5, case.dtype)
    assert got.out.dtype == case.dtype
    agree(got, want, case.dtype)


def test_on_a_cpu_the_same_is_answered():
    case = CASES[3]
    data, read, selection, want = everything_of(case)
    kv = view_of(data, case.page, read, "cpu")
    got = gather_attention(data.q[:, 0], kv, selection, case.dim**-0.5, middle_of(kv), case.dtype, splits=3)
    assert got.out.dtype == case.dtype
    agree(got, [x[:, None] for x in want], case.dtype)
    data, read, want = short_case(SHORTS[1])
    kv = view_of(data, SHORTS[1].page, read, "cpu")
    agree(short_attention(data.q, kv, SHORTS[1].dim ** -0.5, splits=3), want, SHORTS[1].dtype)


def paged_cache(lengths, page, capacity, kv_heads=8, dim=128, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    pages = -(-capacity // page)
    shape = (len(lengths) * pages, page, kv_heads, dim)
    k, v = (torch.randn(shape, generator=g, device="cuda", dtype=BF16) for _ in range(2))
    table = torch.randperm(shape[0], generator=g, device="cuda").int().view(len(lengths), pages)
    length = torch.tensor(lengths, device="cuda")
    return KV(k + 0.5, v, torch.zeros_like(length), length, None, table)


def drawn(kv, heads, width, counts, seed=0):
    """``counts`` different rows of each middle, per head."""
    g = torch.Generator("cuda").manual_seed(seed)
    middle = middle_of(kv)
    keys = torch.rand(kv.start.shape[0], heads, kv.capacity, generator=g, device="cuda")
    inside = (torch.arange(kv.capacity, device="cuda") >= middle.start[:, None]) & (
        torch.arange(kv.capacity, device="cuda") < middle.end[:, None]
    )
    rows = keys.masked_fill(~inside[:, None], 2).topk(width, largest=False).indices
    return rows.int(), torch.minimum(counts[:, None], middle.length[:, None]).expand(-1, heads).int().contiguous()


def nearly(got, want):
    assert close(got.out.float(), want.out, BF16)
    assert torch.allclose(got.lse, want.lse, rtol=0, atol=1e-3)  # -inf where there is no key


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("weight", ["none", "tensor", "law"])
@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("lengths", [(131_072,), (65_536, 33, 4097, 30_001) * 4])
def test_gather_on_real_shapes_and_its_graph_follow_the_reference(lengths, per_query_head, weight):
    kv = paged_cache(lengths, 64, max(lengths))
    heads = 32 if per_query_head else 8
    rows, count = drawn(kv, heads, 5000, torch.full((len(lengths),), 5000, device="cuda"))
    q = torch.randn(len(lengths), 32, 128, device="cuda", dtype=BF16)
    log_w = {
        "none": None,
        "tensor": torch.rand(rows.shape, device="cuda") * 3,
        "law": Law(torch.full((len(lengths), 8, 128), 0.5, device="cuda"), torch.linspace(5, 0, 1025, device="cuda")),
    }[weight]
    selection = Selection(rows, count, log_w)

    def run():
        return gather_attention(q, kv, selection, 128**-0.5, middle_of(kv), BF16)

    def reference():
        return gather_attention_reference(q, kv, selection, 128**-0.5, middle_of(kv))

    nearly(run(), reference())
    replay(run, reference, kv, rows, count)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("page", [64, 128, 16])
def test_short_attention_on_real_shapes_and_its_graph_follow_the_reference(page, tokens):
    kv = paged_cache((65_536, 33, 4097, 30_001), page, 65_536)
    q = torch.randn(4, tokens, 32, 128, device="cuda", dtype=BF16)

    def run():
        return short_attention(q, kv, 128**-0.5, BF16)

    nearly(run(), short_attention_reference(q, kv, 128**-0.5))
    replay(run, lambda: short_attention_reference(q, kv, 128**-0.5), kv)


def replay(run, reference, kv, rows=None, count=None):
    """A graph of ``run`` gives what ``run`` gives, also when lengths, rows and counts have changed in place."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run()
    before = kv.length.clone()
    for step, change in enumerate((0, 1, -29)):
        kv.length.copy_((before + change).clamp(max=kv.capacity))
        if rows is not None and count is not None:
            asked = torch.full((len(before),), (5000, 1234, 0)[step], device="cuda")
            new_rows, new_count = drawn(kv, rows.shape[1], rows.shape[2], asked, step)
            rows.copy_(new_rows)
            count.copy_(new_count)
        graph.replay()
        eager = run()
        assert torch.equal(captured.out, eager.out) and torch.equal(captured.lse, eager.lse)
        nearly(eager, reference())
