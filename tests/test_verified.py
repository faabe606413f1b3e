"""vAttention's promise, and what it is made of; and the pruning of selections to a share of their weights."""

import math
from statistics import NormalDist

import pytest
import torch

from keysift import methods
from keysift.attention import decode
from keysift.cache import Store
from keysift.meter import Meter
from keysift.ops.bounds import sample_size
from keysift.ops.gather import gather_attention
from keysift.ops.prune import prune
from keysift.ops.random import uniform
from keysift.types import KV, Ctx, Law, Selection
from tests.helpers import close, generator, oracle, structured_qkv

SMALL = "verified:top=0.02,base=0.05,sinks=4,window=16,dense_layers=none"


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def verified(**options):
    given = "".join(f",{name}={value}" for name, value in options.items())
    return methods.parse(SMALL + given, "decode")


def filled(k, v, start=None):
    store = Store()
    store.append(k.transpose(1, 2), v.transpose(1, 2))
    if start is not None:
        store.slots.pad(start)
    store.end_prefill(torch.zeros(len(k), 0, 4, k.shape[-1]), 0)
    return store


def context(store, seed=0, layer=3):
    kv = store.view()
    return Ctx(layer, kv.k.shape[-1] ** -0.5, kv.length - 1, seed)


def selected(method, q, store, seed=0):
    ctx = context(store, seed)
    return method.select(q, store.middle(method), store.index(method, q, ctx), ctx)


def chosen(selection, rows):
    """Log weight of every row, -inf where it is not read, [B, X, rows]."""
    out = torch.full((*selection.rows.shape[:2], rows + 1), -math.inf)
    log_w = torch.zeros(selection.rows.shape) if selection.log_w is None else selection.log_w
    return out.scatter_(-1, selection.rows.long().masked_fill(~selection.in_use(), rows), log_w)[..., :-1]


def in_pages(x, pages):
    """Rows in pages of 32, NaN after the last."""
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * 32 - len(x)), value=math.nan).unflatten(0, (pages, 32))


def inputs(tokens, **shape):
    """The last queries, keys, and values with a mean: without one the output of flat heads is next to nothing."""
    q, k, v = structured_qkv(tokens, **shape)
    return q[:, -1], k, v + 1


def errors(method, q, k, v, seeds):
    """Relative errors of heads, and the share of keys that was read."""
    meter, store, found = Meter(), filled(k, v), []
    exact = oracle(q[:, None], k, v)[0][:, 0]
    for seed in range(seeds):
        out, _ = decode(q, store, method, context(store, seed), meter)
        found.append((out - exact).norm(dim=-1) / exact.norm(dim=-1))
    return torch.stack(found).flatten(), meter.stats().kept_fraction


# ---- the promise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "delta"), [(0.05, 0.05), (0.1, 0.1), (0.2, 0.3)])
@pytest.mark.parametrize("by", ["exact", "signbits"])
def test_the_error_exceeds_epsilon_no_more_often_than_delta(epsilon, delta, by):
    error, kept = errors(verified(epsilon=epsilon, risk=delta, by=by), *inputs(2000, heads=8, batch=2), seeds=8)
    assert len(error) == 128
    assert kept < 0.75
    assert float((error > epsilon).float().mean()) <= delta + 2 * math.sqrt(delta * (1 - delta) / 128)


def test_a_smaller_epsilon_reads_more_and_errs_less():
    found = [errors(verified(epsilon=e), *inputs(2000, heads=8), seeds=4) for e in (0.05, 0.1, 0.3)]
    assert found[0][1] > found[1][1] > found[2][1]
    assert found[0][0].mean() < found[1][0].mean() < found[2][0].mean()


def test_the_larger_sample_holds_the_smaller_one():
    q, k, v = inputs(1500, heads=4)
    store = filled(k, v)
    few, many = (chosen(selected(verified(epsilon=e), q, store), 1500) > -math.inf for e in (0.5, 0.1))
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_top_keys_count_once_and_sampled_ones_for_all_that_were_not_read():
    q, k, v = inputs(1500, heads=4)
    store, method = filled(k, v), verified(epsilon=0.3)
    middle = store.middle(method)
    log_w = chosen(selected(method, q, store), 1500)
    top = int(0.02 * int(middle.length))
    assert ((log_w == 0).sum(-1) == top).all()
    assert close(log_w.exp().sum(-1), middle.length[:, None].expand(1, 4).float())


def test_an_impossible_promise_reads_everything():
    q, k, v = structured_qkv(700, heads=4, batch=2)
    out, _ = decode(q[:, -1], (store := filled(k, v)), verified(epsilon=1e-6), context(store), meter := Meter())
    assert meter.stats().kept_fraction == 1
    assert close(out, oracle(q[:, -1:], k, v)[0][:, 0])


def test_draws_differ_by_seed_and_layer_and_not_by_batch_or_padding():
    q, k, v = structured_qkv(900, heads=4, batch=3)
    method = verified()
    start = [0, 37, 0]
    both = chosen(selected(method, q[:, -1], filled(k, v, start)), 900)
    for b in range(3):
        alone = filled(k[b : b + 1, start[b] :], v[b : b + 1, start[b] :])
        assert torch.equal(both[b, :, start[b] :], chosen(selected(method, q[b : b + 1, -1], alone), 900 - start[b])[0])
    store = filled(k, v, start)
    assert not torch.equal(both, chosen(selected(method, q[:, -1], store, seed=1), 900))
    ctx = context(store, layer=4)
    assert not torch.equal(both, chosen(method.select(q[:, -1], store.middle(method), {}, ctx), 900))


@pytest.mark.parametrize("by", ["exact", "signbits"])
def test_pages_give_what_one_piece_gives_and_rows_outside_are_never_read(by):
    q, k, v = structured_qkv(500, heads=4, batch=2)
    method, page = verified(by=by), 32
    spans, ctx = [(4, 484), (40, 300)], Ctx(3, 0.2, torch.tensor([499, 279]))
    origin = torch.tensor([0, 36])
    ends = [(0, 500), (36, 316)]
    whole = KV.on(*(x.clone() for x in (k, v)), spans)._replace(origin=origin)
    table = torch.randperm(40, generator=generator(5))[:32].view(2, 16).int()
    paged = [torch.full((40, page, *x.shape[2:]), math.nan) for x in (k, v)]
    for b, (start, end) in enumerate(ends):
        for x, y in zip((whole.k, whole.v), paged, strict=True):
            x[b, :start], x[b, end:] = math.nan, math.nan
            y[table[b].long()] = torch.nn.functional.pad(x[b], (0, 0, 0, 0, 0, 12), value=math.nan).unflatten(
                0, (16, -1)
            )
    views = whole, KV.on(*paged, spans, table)._replace(origin=origin)
    rows = []
    for kv in views:
        shape = (len(kv.k), 2, kv.k.shape[1])
        index = {name: torch.zeros(*shape, *s.shape, dtype=s.dtype) for name, s in method.sides(32, k.dtype).items()}
        index |= {name: torch.zeros(2, *s.shape, dtype=s.dtype) for name, s in method.states(2, 32, 500).items()}
        index |= method.constants(2, 32, k.device, ctx)
        method.begin(index, kv, kv, q[:, :0], ctx)
        method.extend(index, kv, kv.start, kv.bound, ctx)
        rows.append(chosen(method.select(q[:, -1], kv, index, ctx), 512))
        assert int(method.scan_bytes(kv, index, q.shape[1]).sum()) == 740 * 2 * (34 if by == "signbits" else 32 * 4)
    assert torch.equal(*rows)
    assert rows[0].isfinite().any()


def test_its_numbers_are_those_of_their_addresses():
    _, k, v = inputs(300, heads=4, batch=2)
    method, store = verified(), filled(k, v, [0, 7])
    ctx, token = context(store, seed=5), torch.arange(512) - torch.tensor([[0], [7]])
    for first in (0, 3):
        found = method._uniform(torch.zeros(2, 4, 512), store.middle(method), ctx, first)
        head = torch.arange(first, first + 4)[:, None]
        assert torch.equal(found, uniform(5, 3, head, ctx.positions[:, None, None], token[:, None]))


def test_it_says_what_it_cannot_do():
    for options in ("epsilon=0", "risk=0.6", "base=0", "top=2", "by=quest", "bits=100"):
        with pytest.raises(ValueError, match=options.partition("=")[0]):
            methods.parse(f"verified:{options}", "decode")


# ---- the size of a sample -------------------------------------------------------------------------------------------


def population(n, dim=8, spread=1.0, seed=0):
    g = generator(seed)
    score = torch.randn(1, 1, n, generator=g) * spread
    return score, 1 + torch.randn(1, n, 1, dim, generator=g), torch.zeros(1, 1, n, dtype=torch.bool)


def test_a_full_first_sample_gives_the_formula_of_the_true_variance():
    n, epsilon, delta = 4000, 0.05, 0.1
    score, v, none = population(n)
    e, x = score[0, 0].double().exp(), v[0, :, 0].double()
    out = (e[:, None] * x).sum(0) / e.sum()
    residual = e[:, None] * (x - out)
    z = NormalDist().inv_cdf(1 - delta / 2)
    of_out = residual.var(0).sum() / (out.norm() * e.sum()) ** 2
    of_d = e.var() / e.sum() ** 2
    b = max(of_out, of_d) * (z * n / epsilon) ** 2
    found = sample_size(score, v, none, ~none, ~none, epsilon, delta)
    assert float(found) == pytest.approx(float(b / (1 + b / n)), rel=1e-3)


def test_the_size_that_is_found_keeps_the_denominator_and_the_output():
    n, epsilon, delta, seeds = 5000, 0.1, 0.2, 400
    score, v, none = population(n, dim=1)
    g = generator(1)
    first = torch.rand(seeds, n, generator=g) < 0.1
    b = sample_size(*(x.expand(seeds, *x.shape[1:]) for x in (score, v, none, ~none)), first[:, None], epsilon, delta)
    e, x = score[0, 0].exp(), v[0, :, 0, 0]
    exact = float((e * x).sum() / e.sum()), float(e.sum())
    missed = torch.zeros(2)
    for size in b.flatten().round().int().tolist():
        rows = torch.randperm(n, generator=g)[:size]
        d = float(e[rows].mean()) * n
        o = float((e[rows] * x[rows]).mean()) * n / d
        missed += torch.tensor([abs(o / exact[0] - 1), abs(d / exact[1] - 1)]) > epsilon
    assert 100 < b.mean() < 2500
    assert (missed / seeds <= delta + 3 * math.sqrt(delta * (1 - delta) / seeds)).all()
    assert float((missed / seeds).amax()) > 0.3 * delta, "the larger of the two needs is no more than it must be"


def test_keys_that_are_alike_need_no_sample_and_unknown_ones_all():
    n = 1000
    score, v, none = population(n, spread=0)
    v = torch.ones_like(v)
    half = torch.arange(n).expand_as(none) < 500
    assert float(sample_size(score, v, none, ~none, half, 0.01, 0.1)) < 1
    one = torch.arange(n).expand_as(none) == 7
    assert float(sample_size(score, v, none, ~none, one, 0.5, 0.1)) == n
    assert float(sample_size(score, v, none, none, none, 0.5, 0.1)) == 0


def test_what_is_surely_read_shortens_the_sample():
    score, v, none = population(3000)
    first = torch.rand(none.shape, generator=generator(2)) < 0.2
    alone = sample_size(score, v, none, ~none, first, 0.05, 0.1)
    score, v, none = (
        torch.cat([x, y], d) for x, y, d in ((score, score[..., :5] + 9, 2), (v, v[:, :5], 1), (none, none[..., :5], 2))
    )
    sure = torch.arange(3005).expand_as(none) >= 3000
    beside = sample_size(score, v, sure, ~sure, torch.nn.functional.pad(first, (0, 5)), 0.05, 0.1)
    assert float(beside) < 0.5 * float(alone)


# ---- pruning --------------------------------------------------------------------------------------------------------


def selection_of(slots, room=97, batch=2, seed=0, log_w=True):
    g = generator(seed)
    rows = torch.stack([torch.randperm(400, generator=g)[:room].sort().values for _ in range(batch * slots)])
    count = torch.randint(room // 2, room + 1, (batch, slots), generator=g).int()
    count[0, 0] = 0
    weight = torch.rand(batch, slots, room, generator=g) * 3 if log_w else None
    return Selection(rows.view(batch, slots, room).int(), count, weight)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("log_w", [True, False])
def test_pruning_keeps_the_fewest_rows_that_reach_the_share(slots, top_p, log_w):
    q, k, v = structured_qkv(400, heads=8, kv_heads=2, batch=2)
    q, kv, selection = q[:, -1], KV.of(k, v), selection_of(slots, log_w=log_w)
    pruned = prune(selection, q, kv, 0.3, top_p)
    before, after = chosen(selection, 400), chosen(pruned, 400)
    assert pruned.rows.dtype == selection.rows.dtype and pruned.count.dtype == selection.count.dtype
    assert ((after == before) | (after == -math.inf)).all()
    assert (pruned.rows.diff(dim=-1) > 0)[pruned.in_use()[..., 1:]].all()
    score = torch.einsum("bhd,bshd->bhs", q.double(), k.double().repeat_interleave(4, 2)) * 0.3
    weight = (score + before.double().repeat_interleave(8 // slots, 1)).softmax(-1).nan_to_num(0)
    ordered, order = weight.sort(-1, descending=True)
    needed = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(-1) - ordered < top_p)
    needed = (needed & (weight > 0)).unflatten(1, (slots, 8 // slots)).any(2)
    assert torch.equal(after > -math.inf, needed)
    assert (pruned.count < selection.count).any()


def test_pruning_to_everything_changes_nothing():
    q, k, v = structured_qkv(400, heads=8, kv_heads=2, batch=2)
    selection = selection_of(2)
    assert prune(selection, q[:, -1], KV.of(k, v), 0.3, 1.0) is selection
    with pytest.raises(ValueError, match="top_p=0"):
        prune(selection, q[:, -1], KV.of(k, v), 0.3, 0.0)


def test_a_law_goes_with_the_rows_that_are_left():
    q, k, v = structured_qkv(400, heads=4, kv_heads=2, batch=2)
    q, kv = q[:, -1], KV.of(k, v)
    law = Law(k.mean(1), torch.linspace(3, 0, 65))
    selection = selection_of(4, log_w=False)._replace(log_w=law)
    pruned = prune(selection, q, kv, 0.3, 0.95)
    assert pruned.log_w is law
    all_of_it, most_of_it = (gather_attention(q, kv, s, 0.3).lse[:, 0] for s in (selection, pruned))
    share = (most_of_it - all_of_it).exp()[selection.count > 0]
    assert (share >= 0.95 - 1e-5).all() and (share < 1).any()


def test_pages_are_pruned_like_one_piece_and_unused_rows_are_never_read():
    q, k, v = structured_qkv(400, heads=8, kv_heads=2, batch=2)
    q, selection = q[:, -1], selection_of(2)
    expected = prune(selection, q, KV.of(k, v), 0.3, 0.8)
    table = torch.randperm(30, generator=generator(3))[:26].view(2, 13).int()
    paged = [torch.full((30, 32, *x.shape[2:]), math.nan) for x in (k, v)]
    for b in range(2):
        for x, y in zip((k, v), paged, strict=True):
            y[table[b].long()] = torch.nn.functional.pad(x[b], (0, 0, 0, 0, 0, 16), value=math.nan).unflatten(
                0, (13, 32)
            )
    rows = selection.rows.masked_fill(~selection.in_use(), 1 << 20)
    found = prune(selection._replace(rows=rows), q, KV.on(*paged, [(0, 400)] * 2, table), 0.3, 0.8)
    assert torch.equal(chosen(expected, 400), chosen(found, 400))
