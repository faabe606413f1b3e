"""The CPU kernels of decode against the fp32 references, on every path that this CPU has."""

import math

import pytest
import torch

from keysift.ops.attention_cpu import gather, repeated_gather, short, takes
from keysift.ops.cpu.library import load
from keysift.ops.gather import gather_attention_reference
from keysift.ops.short import short_attention_reference
from keysift.types import KV, Law, Partial, Selection
from tests.helpers import generator, relative_error

library = load()
pytestmark = pytest.mark.skipif(library is None, reason="the CPU kernels were not built")
ISAS = library.usable if library else ()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ERROR = 5e-3  # of any path; those that round nothing but their inputs stay below EXACT
EXACT = 2e-5
SIZES = (0, 1, 63, 100, 1025)
GARBAGE = 1 << 30  # in entries that nobody may use


def keys_values(batch, rows, kv_heads, dim, dtype, seed=0, v_dim=None):
    g = generator(seed)
    return tuple(torch.randn(batch, rows, kv_heads, d, generator=g).to(dtype) for d in (dim, v_dim or dim))


def queries(shape, dtype, seed=1):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def paged(k, v, spans, page, seed=2):
    """The same rows in pages in a random order, with a page of NaN among them that no sequence has."""
    batch, rows = k.shape[:2]
    per = -(-rows // page)
    order = torch.randperm(batch * per + 1, generator=generator(seed))[1:].int().view(batch, per)
    pages = []
    for x in (k, v):
        filled = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, per * page - rows), value=math.nan)
        out = torch.full((batch * per + 1, page, *x.shape[2:]), math.nan, dtype=x.dtype)
        out[order.long()] = filled.view(batch, per, page, *x.shape[2:])
        pages.append(out)
    return KV.on(*pages, spans, order)


def poison(kv, rows, heads_apart=True):
    """NaN in every row of ``kv`` that is not in ``rows`` (bool ``[B, K, S]``)."""
    outside = ~rows.transpose(1, 2)[..., None]
    return kv._replace(k=kv.k.masked_fill(outside, math.nan), v=kv.v.masked_fill(outside, math.nan))


def agree(got, want, limit):
    assert torch.equal(got.lse == -math.inf, want.lse == -math.inf)
    assert not got.out[want.lse == -math.inf].any()
    finite = want.lse > -math.inf
    assert relative_error(got.out.float(), want.out) <= limit
    assert (got.lse[finite] - want.lse[finite]).abs().max().item() <= limit * 10 if finite.any() else True


def limit_of(isa, *dtypes):
    return ERROR if isa == "avx512_bf16" and all(dtype == BF16 for dtype in dtypes) else EXACT


# ---- selected rows


def selection_of(lists, rows, width, generator_, kind=torch.int32):
    """Random rows in random order, garbage behind the count."""
    out = torch.full((*lists, width + 3), GARBAGE, dtype=kind)
    for b in range(lists[0]):
        for h in range(lists[1]):
            out[b, h, :width] = torch.randperm(rows, generator=generator_)[:width]
    return Selection(out, torch.full(lists, width, dtype=kind))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 40, 13])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_selected_rows_agree_with_the_reference(isa, dtype, dim, group):
    k, v = keys_values(2, 150, 2, dim, dtype)
    q, kv, g = queries((2, 2 * group, dim), dtype), KV.of(k, v), generator(3)
    for lists in {2, 2 * group}:
        selection = selection_of((2, lists), 150, 101, g)
        weights = torch.randn(2, lists, 104, generator=g)
        law = Law(0.3 * torch.randn(2, 2, dim, generator=g), torch.linspace(3, 0, 129) ** 2)
        for log_w in (None, weights, law):
            chosen = selection._replace(log_w=log_w)
            want = gather_attention_reference(q, kv, chosen, dim**-0.5)
            agree(gather(q, kv, chosen, dim**-0.5, isa=isa), want, limit_of(isa, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", SIZES)
def test_lists_of_any_length_agree_and_only_their_rows_are_read(isa, count):
    k, v = keys_values(2, 1100, 2, 64, BF16)
    q, g = queries((2, 8, 64), BF16), generator(4)
    selection = selection_of((2, 2), 1100, count, g, torch.int64)
    selection.count[1, 0] = count // 2
    used = torch.zeros(2, 2, 1101, dtype=torch.bool)
    used.scatter_(2, selection.rows.masked_fill(~selection.in_use(), 1100), True)
    kv = poison(KV.of(k, v), used[..., :1100])
    want = gather_attention_reference(q, kv, selection, 0.125)
    agree(gather(q, kv, selection, 0.125, isa=isa), want, limit_of(isa, BF16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("page", [None, 16, 20])
@pytest.mark.parametrize("weights", ["none", "given", "law"])
@pytest.mark.parametrize("per_head", [False, True])
def test_rows_outside_the_middle_are_read_with_weight_1(isa, page, weights, per_head):
    k, v = keys_values(3, 1100, 2, 64, BF16)
    spans, middles = [(3, 1100), (0, 900), (40, 700)], [(20, 1000), (0, 0), (40, 680)]
    kv = KV.on(k, v, spans) if page is None else paged(k, v, spans, page)
    q, g, lists = queries((3, 8, 64), BF16), generator(5), 8 if per_head else 2
    rows = torch.stack([torch.randperm(600, generator=g)[:70] + 45 for _ in range(3 * lists)]).view(3, lists, 70)
    selection = Selection(rows, torch.randint(0, 71, (3, lists), generator=g))
    selection.count[1] = 0
    if weights == "given":
        selection = selection._replace(log_w=torch.randn(3, lists, 70, generator=g))
    if weights == "law":
        law = Law(torch.randn(3, 2, 64, generator=g).to(BF16) * 0.1, torch.linspace(4, 0, 65))
        selection = selection._replace(log_w=law)
    middle = kv._replace(start=torch.tensor([s for s, _ in middles]), length=torch.tensor([e - s for s, e in middles]))
    want = gather_attention_reference(q, kv, selection, 0.125, middle)
    agree(gather(q, kv, selection, 0.125, middle, isa=isa), want, limit_of(isa, BF16))


@pytest.mark.parametrize("isa", ISAS)
def test_a_law_is_right_for_keys_that_are_the_mean_or_the_query(isa):
    q = queries((1, 2, 64), FP32)
    mean = torch.randn(1, 1, 64, generator=generator(6))
    k = (
        torch.cat([mean, mean + q[:, :1], mean - q[:, :1], mean + q[:, 1:]])[None, :, 0]
        .transpose(0, 1)
        .view(1, 4, 1, 64)
    )
    kv = KV.of(k, torch.eye(4, 64).view(1, 4, 1, 64))
    table = torch.linspace(2, -1, 33)
    selection = Selection(torch.arange(4).view(1, 1, 4), torch.tensor([[4]]), Law(mean, table))
    want = gather_attention_reference(q, kv, selection, 0.1)
    agree(gather(q, kv, selection, 0.1, isa=isa), want, EXACT)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_output_has_the_dtype_asked_for(isa, dtype):
    k, v = keys_values(1, 80, 2, 64, BF16, v_dim=48)
    q, kv = queries((1, 4, 64), FP32), KV.of(k, v)
    selection = selection_of((1, 2), 80, 40, generator(7))
    got = gather(q, kv, selection, 0.125, dtype=dtype, isa=isa)
    want = gather_attention_reference(q, kv, selection, 0.125, dtype=dtype)
    assert got.out.dtype == dtype and got.out.shape == (1, 1, 4, 48) and got.lse.dtype == FP32
    agree(Partial(got.out.float(), got.lse), Partial(want.out.float(), want.lse), ERROR)


def test_a_row_a_count_or_a_page_that_does_not_exist_is_refused():
    k, v = keys_values(1, 100, 2, 64, FP32)
    q, kv = queries((1, 4, 64), FP32), KV.of(k, v)
    rows, count = torch.arange(10).repeat(1, 2, 1), torch.full((1, 2), 10)
    for wrong in (100, -1):
        bad = rows.clone()
        bad[0, 1, 7] = wrong
        with pytest.raises(ValueError, match="a selected row is not in the buffer"):
            gather(q, kv, Selection(bad, count), 0.1)
    with pytest.raises(ValueError, match="count of selected rows"):
        gather(q, kv, Selection(rows, count + 1), 0.1)
    pages = paged(k, v, [(0, 100)], 16)
    pages.table[0, 3] = 8
    with pytest.raises(ValueError, match="page"):
        gather(q, pages, Selection(rows + 45, count), 0.1)
    with pytest.raises(ValueError, match="page of the table"):
        short(q[:, None], pages, 0.1)
    with pytest.raises(ValueError, match="reaches past the rows"):
        short(q[:, None], KV.on(k, v, [(50, 101)]), 0.1)


def test_a_key_of_nan_gives_nan():
    k, v = keys_values(1, 70, 1, 64, FP32)
    k[0, 69, 0, 3] = math.nan
    q = queries((1, 1, 64), FP32)
    for isa in ISAS:
        assert short(q[:, None], KV.of(k, v), 0.1, isa=isa).out.isnan().all()


# ---- all rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 40, 13])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_few_tokens_agree_with_the_reference(isa, dtype, dim, group):
    k, v = keys_values(2, 120, 2, dim, dtype)
    for tokens, spans in ((1, [(0, 120), (17, 80)]), (3, [(1, 101), (5, 7)])):
        q, kv = queries((2, tokens, 2 * group, dim), dtype), KV.on(k, v, spans)
        want = short_attention_reference(q, kv, dim**-0.5)
        agree(short(q, kv, dim**-0.5, isa=isa), want, limit_of(isa, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("page", [None, 16, 20])
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_ragged_views_and_pages_agree_and_only_the_view_is_read(isa, page, tokens):
    spans = [(5, 5 + size) for size in SIZES]
    k, v = keys_values(5, 1040, 2, 64, BF16)
    inside = torch.stack([(torch.arange(1040) >= s) & (torch.arange(1040) < e) for s, e in spans])
    clean = poison(KV.on(k, v, spans), inside[:, None].expand(-1, 2, -1))
    kv = clean if page is None else paged(clean.k, clean.v, spans, page)
    q = queries((5, tokens, 8, 64), BF16)
    agree(short(q, kv, 0.125, isa=isa), short_attention_reference(q, kv, 0.125), limit_of(isa, BF16))


@pytest.mark.parametrize("isa", ISAS)
def test_heads_that_lie_apart_are_read_as_well(isa):
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in keys_values(2, 300, 3, 64, BF16))
    q = queries((2, 4, 6, 64), BF16)[:, ::2]
    agree(short(q, KV.of(k, v), 0.1, isa=isa), short_attention_reference(q, KV.of(k, v), 0.1), limit_of(isa, BF16))


@pytest.mark.parametrize("isa", ISAS)
def test_the_number_of_threads_does_not_change_a_bit(isa):
    k, v = keys_values(2, 3000, 2, 64, BF16)
    q, kv, g = queries((2, 4, 8, 64), BF16), KV.on(k, v, [(0, 3000), (100, 2000)]), generator(8)
    selection = selection_of((2, 2), 3000, 2500, g)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*short(q, kv, 0.1, isa=isa), *gather(q[:, 0], kv, selection, 0.1, isa=isa)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("weights", ["none", "given", "law"])
def test_a_repeated_call_reads_what_its_tensors_hold_by_then(weights):
    k, v = keys_values(2, 300, 2, 64, BF16)
    q, kv = queries((2, 8, 64), BF16), KV.of(k, v)
    rows = torch.randint(300, (2, 2, 50), generator=generator(1)).int()
    count = torch.full((2, 2), 50, dtype=torch.int32)
    law = Law(torch.zeros(2, 2, 64), torch.linspace(3, 0, 9))
    log_w = {"none": None, "given": torch.rand(2, 2, 50, generator=generator(2)), "law": law}[weights]
    selection = Selection(rows, count, log_w)
    out, lse = torch.empty(2, 1, 8, 64), torch.empty(2, 1, 8)
    again = repeated_gather(q, kv, selection, 0.2, out, lse)
    for seed in range(3):
        again()
        want = gather(q, kv, selection, 0.2)
        assert torch.equal(out, want.out) and torch.equal(lse, want.lse)
        q.copy_(queries((2, 8, 64), BF16) * (seed + 2))
        rows.copy_(torch.randint(300, rows.shape, generator=generator(seed + 5)))
        count.sub_(7)
    assert repeated_gather(q.double(), kv, selection, 0.2, out, lse) is None


def test_large_logits_do_not_overflow():
    k, v = keys_values(1, 100, 1, 64, FP32)
    q, kv = 300 * queries((1, 1, 1, 64), FP32), KV.of(300 * k, v)
    for isa in ISAS:
        got, want = short(q, kv, 1.0, isa=isa), short_attention_reference(q, kv, 1.0)
        assert relative_error(got.out, want.out) <= EXACT
        assert got.lse.item() == pytest.approx(want.lse.item(), rel=1e-6)  # of two million


def test_a_batch_of_none_is_none():
    k, v = keys_values(0, 10, 2, 64, BF16)
    out = short(queries((0, 1, 4, 64), BF16), KV.of(k, v), 0.1)
    assert out.out.shape == (0, 1, 4, 64) and out.lse.shape == (0, 1, 4)


def test_the_kernels_take_what_they_can():
    k, v = keys_values(1, 10, 2, 64, BF16)
    q = queries((1, 4, 64), FP32)
    assert takes(q, KV.of(k, v)) and takes(q.to(BF16), KV.of(k, v))
    assert not takes(q.double(), KV.of(k, v)) and not takes(q, KV.of(k, v.float()))
    assert not takes(q.clone().requires_grad_(), KV.of(k, v))
    assert not takes(q.to("meta"), KV.of(k, v))


def test_both_compile_without_a_graph_break():
    k, v = keys_values(1, 200, 2, 64, BF16)
    q, kv = queries((1, 4, 64), BF16), KV.of(k, v)
    selection = selection_of((1, 2), 200, 50, generator(9))
    law = selection._replace(log_w=Law(torch.zeros(1, 2, 64), torch.linspace(1, 0, 9)))
    middle = kv._replace(start=kv.start + 3, length=kv.length - 9, spans=None)

    def both(q, kv, selection, middle):
        return (*gather(q, kv, selection, 0.1, middle), *short(q[:, None], kv, 0.1, torch.bfloat16))

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for chosen in (selection, law):
        want, got = both(q, kv, chosen, middle), compiled(q, kv, chosen, middle)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_the_registered_operators_are_sound():
    k, v = keys_values(1, 20, 2, 64, BF16)
    start, length = torch.tensor([2]), torch.tensor([17])
    options = ("test_schema", "test_faketensor")
    args = (queries((1, 2, 4, 64), BF16), k, v, None, start, length, 0.1, FP32, "auto")
    torch.library.opcheck(torch.ops.keysift.short_cpu.default, args, test_utils=options)
    rows, count = torch.arange(6).view(1, 2, 3), torch.full((1, 2), 3)
    args = (queries((1, 4, 64), BF16), k, v, None, rows, count, None, None, None, [], 0.1, FP32, "auto")
    torch.library.opcheck(torch.ops.keysift.gather_cpu.default, args, test_utils=options)
