"""What every method must keep, whoever wrote it: each file in methods/ is found and checked."""

import dataclasses
import math

import pytest
import torch

import keysift
from keysift import methods
from keysift.attention import decode, prefill
from keysift.cache import Store
from keysift.meter import Meter
from keysift.methods.base import PrefillMethod
from keysift.ops.codes import collision_table, projections
from keysift.types import KV, Ctx, Law, Selection
from tests.helpers import close, codes_in_common, generator, oracle, structured_qkv

CATALOG = methods.catalog()
EVERYTHING = {  # a SPEC for each prefill and decode method whose budget is all keys
    "prefill": {
        "dense": "dense",
        "streaming": "streaming:window=100000",
        "flexprefill": "flexprefill:gamma=1",
        "minference": "minference:vertical=100000,slash=100000",
        "xattention": "xattention:threshold=1",
        "flashprefill": "flashprefill:alpha=0",
    },
    "decode": {
        "dense": "dense",
        "streaming": "streaming:window=100000",
        "magicpig": "magicpig:K=0",
        "quest": "quest:keep=1",
        "topk": "topk:keep=1",
        "oracle": "oracle:keep=1",
        "snapkv": "snapkv:budget=100000",
        "signbits": "signbits:keep=1",
        "verified": "verified:top=1",
    },
}
SPARSE = {  # a SPEC that reads part of a prompt of a few hundred tokens
    "prefill": {
        "streaming": "streaming:sinks=5,window=50,block=16",
        "flexprefill": "flexprefill:gamma=0.7,min_budget=16,block=16,dense_below=0",
        "minference": "minference:vertical=48,slash=64,block=16,last_q=20",
        "xattention": "xattention:threshold=0.6,block=16",
        "flashprefill": "flashprefill:alpha=0.3,sink_blocks=1,window_blocks=1,block=16,last_rows=1",
    },
    "decode": {
        "streaming": "streaming:sinks=5,window=50",
        "magicpig": "magicpig:K=4,L=12,window=16",
        "quest": "quest:keep=0.2,page=8,window=16",
        "topk": "topk:keep=0.1,window=16",
        "oracle": "oracle:keep=0.1,window=16",
        "snapkv": "snapkv:budget=60,window=16",
        "signbits": "signbits:keep=0.1,window=16",
        "verified": "verified:epsilon=0.4,top=0.05,base=0.1,window=16",
    },
}
SAMPLING = ("magicpig", "oracle", "signbits")  # methods whose rows are random draws with known probabilities
ONE_FAST = [name if name == "oracle" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLING]
WHOLE_PROMPT = {  # prefill methods whose choice for a query depends on later queries, with the reason
    "flexprefill": "samples of the queries at hand set the threshold",
    "minference": "the last queries at hand show the pattern",
    "flashprefill": "the last query blocks at hand are dense",
}


def named(role, table=None):
    return [name for name, cls in CATALOG.items() if role in methods.roles(cls) and (table is None or name in table)]


def sparse(role, name):
    return methods.parse(SPARSE[role][name], role)


def context(kv, seed=0, layer=-1):
    return Ctx(layer, kv.k.shape[-1] ** -0.5, kv.end - 1, seed)


def token_mask(method, q, kv):
    """What ``method`` lets each query read, bool [B, H, Tq, Tk]; None for dense."""
    plan = method.plan(q, kv, context(kv))
    if plan is None:
        return None
    keys, tokens = kv.k.shape[1], q.shape[1]
    first, blocks = (keys - tokens) // method.block, math.ceil(keys / method.block)
    active = method.mask(plan, range(first, blocks)).active(blocks)
    at = torch.arange(keys)
    return active[:, :, at[keys - tokens :] // method.block - first][..., at // method.block]


def filled(k, v, tail_q=None, start=None):
    """A store that holds a prompt."""
    store = Store()
    store.append(k.transpose(1, 2), v.transpose(1, 2))
    if start is not None:
        store.slots.pad(start)
    if tail_q is not None:
        store.end_prefill(tail_q, tail_q.shape[1])
    return store


def rows_read(method, q, store, seed=0):
    """The middle and the selection of one decode step, as log weight per row: -inf where not selected, [B, H, S]."""
    middle = store.middle(method)
    ctx = context(store.view(), seed)
    selection = method.select(q, middle, store.index(method, q, ctx), ctx)
    assert selection is not None, "nothing is left out: not the sparse regime"
    return middle, selection, weights(selection, q, store.view())


def weights(selection: Selection, q, kv):
    heads = q.shape[1]
    rows = selection.rows.repeat_interleave(heads // selection.rows.shape[1], 1)
    used = selection.in_use().repeat_interleave(heads // selection.rows.shape[1], 1)
    if selection.log_w is None:
        log_w = torch.zeros(rows.shape)
    elif isinstance(selection.log_w, torch.Tensor):
        log_w = selection.log_w.repeat_interleave(heads // selection.log_w.shape[1], 1)
    else:
        b = torch.arange(len(q))[:, None, None]
        group = torch.arange(heads)[:, None] // (heads // kv.k.shape[2])
        keys = kv.k[b, rows.masked_fill(~used, 0), group].float().masked_fill(~used[..., None], 0)
        log_w = selection.log_w.log_w(q, keys)
    out = torch.full((*rows.shape[:2], kv.k.shape[1] + 1), -math.inf)
    return out.scatter_(-1, rows.long().masked_fill(~used, kv.k.shape[1]), log_w)[..., :-1]


def test_every_method_is_checked_here():
    assert set(named("prefill")) == set(EVERYTHING["prefill"])
    assert set(named("decode")) == set(EVERYTHING["decode"])
    assert set(named("prefill")) == set(SPARSE["prefill"]) | {"dense"}
    assert set(named("decode")) == set(SPARSE["decode"]) | {"dense"}


@pytest.mark.parametrize("name", CATALOG)
def test_a_method_cites_its_source_and_explains_its_options(name):
    cls = CATALOG[name]
    assert cls.paper.startswith("arXiv:")
    assert cls.__doc__.strip()
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    for option in dataclasses.fields(cls):
        assert option.metadata["doc"], option.name
    assert methods.parse(methods.describe(cls()), methods.roles(cls)[0]) == cls()


@pytest.mark.parametrize("tokens", [1, 63, 100, pytest.param(1025, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("name", named("prefill"))
def test_full_budget_prefill_equals_dense(name, tokens, group):
    q, k, v = structured_qkv(tokens, heads=2 * group, batch=1, dim=16)
    out, stats = keysift.prefill_attention(q, k, v, EVERYTHING["prefill"][name], return_stats=True)
    assert close(out, oracle(q, k, v)[0])
    assert stats.density == 1


@pytest.mark.parametrize("name", ["quest", "topk", "oracle", "snapkv"])
def test_keep_is_obeyed_and_all_of_it_is_dense(name):
    q, k, v = structured_qkv(3000, heads=4)
    out, stats = keysift.decode_attention(q[:, -1:], k, v, f"{name}:keep=1", return_stats=True)
    assert stats.kept_fraction == 1
    assert torch.equal(out, keysift.decode_attention(q[:, -1:], k, v, "dense"))
    kept = [
        keysift.decode_attention(q[:, -1:], k, v, f"{name}:keep={keep}", return_stats=True)[1].kept_fraction
        for keep in (0.02, 0.05, 0.2)
    ]
    assert kept[0] < kept[1] < kept[2] < 0.4


@pytest.mark.parametrize("tokens", [1, 63, 100, 1025])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("name", named("decode"))
def test_full_budget_decode_equals_dense(name, tokens, group):
    q, k, v = structured_qkv(tokens, heads=2 * group, batch=2, dim=16)
    out, stats = keysift.decode_attention(q[:, -1:], k, v, EVERYTHING["decode"][name], return_stats=True)
    assert close(out, oracle(q[:, -1:], k, v)[0])
    assert stats.kept_fraction == 1


@pytest.mark.parametrize(("tokens", "keys"), [(403, 403), (130, 403)])
@pytest.mark.parametrize("name", named("prefill", SPARSE["prefill"]))
def test_sparse_prefill_equals_the_masked_dense_oracle(name, tokens, keys):
    q, k, v = structured_qkv(keys, heads=8)
    q, method = q[:, -tokens:], sparse("prefill", name)
    seen = token_mask(method, q, KV.of(k, v))
    assert seen is not None
    expected, lse = oracle(q, k, v, seen)
    out, got_lse, stats = keysift.prefill_attention(
        q, k, v, method, return_lse=True, return_stats=True, measure_mass=True
    )
    assert close(out, expected)
    assert close(got_lse, lse)
    causal = torch.ones(tokens, keys).tril(keys - tokens).bool()
    assert stats.density == pytest.approx(float((seen & causal).sum() / (causal.sum() * 8)), rel=1e-6)
    assert 0.02 < stats.density < 0.95
    assert stats.density < stats.mass_covered <= 1 + 1e-5


@pytest.mark.parametrize("name", named("prefill", SPARSE["prefill"]))
def test_every_query_reads_its_own_block_and_the_first(name):
    q, k, v = structured_qkv(403, heads=8)
    seen = token_mask(sparse("prefill", name), q, KV.of(k, v))
    assert seen[:, :, range(403), range(403)].all()
    assert seen[..., 0].all() or name == "flexprefill"  # which looks whether the sink has mass


@pytest.mark.parametrize("name", named("decode", SPARSE["decode"]))
def test_sparse_decode_equals_the_weighted_oracle(name):
    q, k, v = structured_qkv(403, heads=8, batch=2)
    method, one = sparse("decode", name), q[:, -1]
    store = filled(k, v, q[:, -20:])
    middle, _, log_w = rows_read(method, one, store)
    inside = middle.contains()[:, None]
    score = torch.einsum("bhd,bshd->bhs", one.double(), k.double().repeat_interleave(4, 2)) * 32**-0.5
    rows = k.shape[1]
    score = score + torch.where(inside[..., :rows], log_w[..., :rows], 0)
    expected = torch.einsum("bhs,bshe->bhe", score.softmax(-1), v.double().repeat_interleave(4, 2))
    meter = Meter()
    out, lse = decode(one, store, method, context(store.view()), meter, with_lse=True)
    assert close(out, expected)
    assert close(lse, score.logsumexp(-1))
    assert 0.01 < meter.stats().kept_fraction < 0.9
    read = (~inside[..., :rows] | (log_w[..., :rows] > -math.inf)).sum()
    assert meter.stats().kept_fraction == pytest.approx(float(read / (2 * 8 * 403)))


@pytest.mark.parametrize("name", named("decode", SPARSE["decode"]))
def test_selected_rows_are_unique_in_the_middle_and_never_a_neighbours(name):
    """A ragged batch in a poisoned buffer: rows come from each sequence's own middle, each at most once."""
    q, k, v = structured_qkv(403, heads=8, batch=3)
    starts = [0, 150, 395]  # the last sequence has no middle
    for b, start in enumerate(starts):
        k[b, :start] = v[b, :start] = math.nan
    store, method = filled(k, v, q[:, -20:], starts), sparse("decode", name)
    middle, selection, log_w = rows_read(method, q[:, -1], store)
    for b in range(3):
        for h in range(selection.rows.shape[1]):
            rows = selection.rows[b, h, : selection.count[b, h]].tolist()
            assert len(set(rows)) == len(rows)
            assert all(int(middle.start[b]) <= r < int(middle.end[b]) for r in rows)
    assert not torch.isnan(log_w).any()
    assert not selection.count[2].any()
    out = decode(q[:, -1], store, method, context(store.view()), Meter())[0]
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", named("decode", SPARSE["decode"]))
def test_decode_in_a_ragged_batch_equals_one_by_one(name):
    q, k, v = structured_qkv(403, heads=8, batch=3)
    starts, method = [0, 150, 395], sparse("decode", name)
    store = filled(k, v, q[:, -20:], starts)
    ctx = context(store.view())._replace(positions=torch.tensor([402 - s for s in starts]))
    together = decode(q[:, -1], store, method, ctx, Meter())[0]
    for b, start in enumerate(starts):
        alone = filled(k[b : b + 1, start:], v[b : b + 1, start:], q[b : b + 1, max(start, 383) :])
        out = decode(q[b : b + 1, -1], alone, method, ctx._replace(positions=ctx.positions[b : b + 1]), Meter())[0]
        assert close(together[b : b + 1], out)


@pytest.mark.parametrize("name", named("prefill", SPARSE["prefill"]))
def test_prefill_in_a_ragged_batch_equals_one_by_one(name):
    q, k, v = structured_qkv(403, heads=8, batch=3)
    starts, method = [0, 150, 403], sparse("prefill", name)
    kv = KV(k, v, torch.tensor(starts), 403 - torch.tensor(starts))
    together, lse = prefill(q, kv, method, context(kv), Meter(), with_lse=True)
    for b, start in enumerate(starts[:2]):
        one = KV.of(k[b : b + 1, start:], v[b : b + 1, start:])
        out, one_lse = prefill(q[b : b + 1, start:], one, method, context(one), Meter(), with_lse=True)
        assert close(together[b : b + 1, start:], out)
        assert close(lse[b : b + 1, start:], one_lse)
        assert not together[b, :start].any()
    assert not together[2].any()


@pytest.mark.parametrize("chunk", [16, 48, 100, 402])
@pytest.mark.parametrize("name", named("prefill", SPARSE["prefill"]))
def test_chunked_prefill_equals_whole_where_the_definition_allows(name, chunk):
    """XAttention scores whole query blocks, so it needs chunks of whole blocks; streaming takes any."""
    if name in WHOLE_PROMPT:
        pytest.skip(WHOLE_PROMPT[name])
    method = sparse("prefill", name)
    if name == "xattention" and chunk % method.block:
        pytest.skip("scores are sums over whole query blocks")
    q, k, v = structured_qkv(403, heads=8)
    whole = keysift.prefill_attention(q, k, v, method)
    for lo in range(0, 403, chunk):
        hi = min(lo + chunk, 403)
        part = keysift.prefill_attention(q[:, lo:hi], k[:, :hi], v[:, :hi], method)
        assert close(part, whole[:, lo:hi])


@pytest.mark.parametrize("name", named("prefill", SPARSE["prefill"]))
def test_block_lists_in_pieces_equal_whole(name, monkeypatch):
    q, k, v = structured_qkv(403, heads=8)
    method = sparse("prefill", name)
    whole = keysift.prefill_attention(q, k, v, method)
    monkeypatch.setattr("keysift.attention.LIST_BYTES", 16 * 8 * 26 * 4)  # four query blocks at a time
    assert close(keysift.prefill_attention(q, k, v, method), whole)


@pytest.mark.parametrize("name", named("decode", SPARSE["decode"]))
def test_side_data_kept_through_decode_equals_side_data_built_afresh(name):
    """Ragged batch, single and several new tokens, and a rollback: what append keeps is what build would give."""
    q, k, v = structured_qkv(500, heads=8, batch=2)
    method, starts = sparse("decode", name), [0, 37]
    if not method.grows:
        pytest.skip("chosen once after prefill by definition: later tokens are all read")
    store = filled(k[:, :390], v[:, :390], q[:, 370:390], starts)
    store.index(method, q[:, 389], context(store.view()))
    steps = [1] * 20 + [5, 3]
    for step, rollback in [(s, 0) for s in steps] + [(30, 30), (40, 0)]:
        end = store.length + step
        store.append(
            k[:, store.length : end].transpose(1, 2) + (9.0 if rollback else 0),
            v[:, store.length : end].transpose(1, 2),
        )
        rows_read(method, q[:, end - 1], store)
        store.truncate(end - rollback)
    fresh = filled(k[:, : store.length], v[:, : store.length], q[:, 370:390], starts)
    if name in ("magicpig", "signbits"):  # the mean is fixed when the prompt is complete
        fresh = filled(k[:, :390], v[:, :390], q[:, 370:390], starts)
        fresh.index(method, q[:, 389], context(fresh.view()))
        fresh.append(k[:, 390 : store.length].transpose(1, 2), v[:, 390 : store.length].transpose(1, 2))
    newest = q[:, store.length - 1]
    assert torch.equal(rows_read(method, newest, store)[2][..., :400], rows_read(method, newest, fresh)[2][..., :400])


@pytest.mark.parametrize("name", ONE_FAST)
def test_inclusion_frequency_over_seeds_equals_the_weights(name):
    """The mean weight of a row over many seeds, 0 where it is not drawn, is 1: weight = 1 / probability."""
    q, k, v = structured_qkv(120, heads=4, dim=8)
    method = dataclasses.replace(sparse("decode", name), window=8)
    trials, total, squares, largest = 600, 0.0, 0.0, torch.zeros(())
    for seed in range(trials):
        store = filled(k, v, q[:, -1:])
        middle, _, log_w = rows_read(method, q[:, -1], store, seed)
        w = log_w.double().exp()
        total, squares, largest = total + w, squares + w**2, torch.maximum(largest, w)
    inside = middle.contains()[:, None].expand_as(total)
    mean = (total / trials)[inside]
    variance = ((squares / trials)[inside] - mean**2).clamp(min=0)
    # a row drawn every time shows no spread; the variance of a 0-or-w draw with mean 1 is w - 1
    error = (torch.maximum(variance, (largest[inside] - 1).clamp(min=1e-7)) / trials).sqrt()
    seen = mean > 6 * error  # rows drawn so rarely that no interval is known stand aside
    assert seen.sum() > 50
    z = ((mean - 1) / error)[seen]
    assert z.abs().max() < 6
    assert abs(z.mean()) < 0.8


@pytest.mark.parametrize("name", ONE_FAST)
def test_estimator_is_unbiased(name):
    """exp(lse) * out and exp(lse), averaged over seeds, meet the exact sums over the keys."""
    q, k, v = structured_qkv(150, heads=4, dim=8)
    q = q * 0.7
    method, trials = dataclasses.replace(sparse("decode", name), window=8), 800
    exact_out, exact_lse = oracle(q[:, -1:], k, v)
    sums = []
    for seed in range(trials):
        store = filled(k, v, q[:, -1:])
        out, lse = decode(q[:, -1], store, method, context(store.view(), seed), Meter(), with_lse=True)
        ratio = (lse.double() - exact_lse[:, 0]).exp()
        sums.append(torch.cat([ratio[..., None], ratio[..., None] * out.double()], -1))
    sums = torch.stack(sums)
    expected = torch.cat([torch.ones_like(exact_lse[:, 0, :, None]), exact_out[:, 0]], -1)
    error = sums.std(0) / math.sqrt(trials)
    z = (sums.mean(0) - expected) / error.clamp(min=1e-6)  # fp32 rounding
    assert error.max() < 0.2 * expected.abs().max()
    assert z.abs().max() < 5.5
    assert error.max() > 1e-4  # it is a sample, not the exact sum


@pytest.mark.parametrize("name", SAMPLING)
def test_draws_follow_the_seed(name):
    q, k, v = structured_qkv(300, heads=4)
    outs = [keysift.decode_attention(q[:, -1:], k, v, SPARSE["decode"][name], seed=s) for s in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_dense_layers_read_everything():
    q, k, v = structured_qkv(300, heads=4)
    for layer, dense in ((0, True), (1, False), (16, True)):
        _, stats = keysift.decode_attention(q[:, -1:], k, v, "magicpig:K=6,L=10", layer=layer, return_stats=True)
        assert (stats.kept_fraction == 1) == dense
        spec = "flexprefill:gamma=.5,min_budget=16,block=16,dense_layers=0+16"
        _, stats = keysift.prefill_attention(q, k, v, spec, layer=layer, return_stats=True)
        assert (stats.density == 1) == dense


def test_more_keys_give_a_smaller_error():
    """Exact top-k and the oracle approach the dense output as the budget grows; streaming is worst of all."""
    q, k, v = structured_qkv(1025, heads=8)
    exact = oracle(q[:, -1:], k, v)[0]

    def error(spec):
        errors = []
        for seed in range(20):
            out = keysift.decode_attention(q[:, -1:], k, v, spec, seed=seed)
            errors.append(float((out.double() - exact).norm() / exact.norm()))
        return sum(errors) / len(errors)

    for name in ("topk", "oracle"):
        errors = [error(f"{name}:keep={keep},window=8") for keep in (0.01, 0.1, 0.6)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.2
        assert errors[1] < error("streaming:sinks=4,window=8")


def test_snapkv_keeps_what_its_window_of_queries_attended_to():
    """A key that only the observation window cares about is kept, for the group as a whole."""
    q, k, v = structured_qkv(400, heads=4)
    q, k = q * 0.01, k.clone()
    q[:, -16:, 2:, 3] += 9
    k[:, 123, 1, 3] += 20
    store = filled(k, v, q[:, -16:])
    method = methods.parse("snapkv:budget=24,window=16,kernel=3", "decode")
    _, selection, _ = rows_read(method, q[:, -1], store)
    assert selection.rows.shape == (1, 2, 8)
    assert {122, 123, 124} <= set(selection.rows[0, 1].tolist())


def blocks_of(spec, q, k):
    """The block set of a prefill SPEC, bool [H, Q, C], computed as the method does."""
    method = methods.parse(spec, "prefill")
    kv = KV.of(k, k)
    first, blocks = (k.shape[1] - q.shape[1]) // method.block, -(-k.shape[1] // method.block)
    return method.mask(method.plan(q, kv, context(kv)), range(first, blocks)).active(blocks)[0]


def test_xattention_takes_the_blocks_of_the_highest_antidiagonal_sums():
    """Pair by pair: strided row r and column c meet where offsets in the stride add up to stride - 1."""
    q, k = (2.5 * torch.randn(1, 160, heads, 16, generator=generator(0)) for heads in (2, 1))  # no smooth structure
    stride, block, threshold = 4, 32, 0.7
    active = blocks_of(f"xattention:threshold={threshold},stride={stride},block={block}", q, k)
    scale = 16**-0.5 / stride
    for h in range(2):
        for i in range(5):
            mass = torch.zeros(i + 1, dtype=torch.float64)
            for r in range(i * block // stride, (i + 1) * block // stride):
                logits = []
                for c in range(r + 1):
                    pairs = [(r * stride + stride - 1 - s, c * stride + s) for s in range(stride)]
                    logits.append(sum(float(q[0, t, h].double() @ k[0, u, 0].double()) for t, u in pairs) * scale)
                for c, w in enumerate(torch.tensor(logits, dtype=torch.float64).softmax(0)):
                    mass[c * stride // block] += w
            expected, total = {0, i}, 0.0
            for c in mass.argsort(descending=True).tolist():
                if total >= threshold * float(mass.sum()):
                    break
                expected.add(c)
                total += float(mass[c])
            assert set(active[h, i].nonzero()[:, 0].tolist()) == expected


def test_flashprefill_keeps_blocks_within_alpha_of_the_rows_best():
    q, k, _ = structured_qkv(320, heads=2, kv_heads=1, dim=16)
    active = blocks_of("flashprefill:alpha=0.5,sink_blocks=1,window_blocks=1,last_rows=1,block=32", q, k)
    pooled = k[0, :, 0].double().unflatten(0, (10, 32)).mean(1)
    differs = 0
    for h in range(2):
        for i in range(1, 9):
            logits = q[0, i * 32 : (i + 1) * 32, h].double() @ pooled[:i].T * 16**-0.5
            score = (logits - logits.max()).exp().sum(0)
            expected = {0, i} | {c for c in range(i) if score[c] >= 0.5 * score.max()}
            assert set(active[h, i].nonzero()[:, 0].tolist()) == expected
            differs += len(expected) < i + 1
    assert differs > 4
    assert active[:, 9].all()


def test_minference_keeps_the_columns_and_diagonals_that_the_last_queries_attend_to():
    q, k, _ = structured_qkv(320, heads=2, kv_heads=1, dim=16)
    active = blocks_of("minference:vertical=64,slash=96,last_q=40,block=32", q, k)
    for h in range(2):
        score = q[0, -40:, h].double() @ k[0, :, 0].double().T * 16**-0.5
        weight = score.masked_fill(torch.arange(320) > torch.arange(280, 320)[:, None], -math.inf).softmax(-1)
        columns, diagonals = torch.zeros(10), torch.zeros(10)
        for row in range(40):
            for c in range(10):
                share = float(weight[row, c * 32 : (c + 1) * 32].sum())
                columns[c] += share
                diagonals[(280 + row) // 32 - c] += share
        columns = {0, *columns.topk(2).indices.tolist()}
        diagonals = {0, *diagonals.topk(3).indices.tolist()}
        for i in range(10):
            expected = {c for c in range(i + 1) if c in columns or i - c in diagonals}
            assert set(active[h, i].nonzero()[:, 0].tolist()) == expected


def test_quest_reads_the_pages_of_the_highest_bounds():
    q, k, v = structured_qkv(200, heads=4, kv_heads=2)
    method = methods.parse("quest:budget=64,page=8,sinks=4,window=20,per=query_head", "decode")
    _, _, log_w = rows_read(method, q[:, -1], filled(k, v))
    for h in range(4):
        bounds = []
        for page in range(23):
            keys = k[0, max(4, page * 8) : (page + 1) * 8, h // 2]  # the last page reaches into the window
            query = q[0, -1, h]
            bounds.append(float(torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum()))
        best = torch.tensor(bounds).topk(5).indices.tolist()
        rows = {p * 8 + r for p in best for r in range(8)} & {*range(4, 180)}
        assert set((log_w[0, h] == 0).nonzero()[:, 0].tolist()) == rows


def test_topk_reads_the_keys_of_the_highest_scores():
    q, k, v = structured_qkv(200, heads=4, kv_heads=2)
    method = methods.parse("topk:budget=40,sinks=4,window=20", "decode")
    _, _, log_w = rows_read(method, q[:, -1], filled(k, v))
    for h in range(4):
        best = (k[0, 4:180, h // 2] @ q[0, -1, h]).topk(16).indices + 4
        assert set((log_w[0, h] == 0).nonzero()[:, 0].tolist()) == set(best.tolist())


def test_snapkv_votes_are_the_windows_exact_attention():
    q, k, v = structured_qkv(200, heads=4, kv_heads=2)
    method = methods.parse("snapkv:budget=40,window=16,kernel=5", "decode")
    _, selection, _ = rows_read(method, q[:, -1], filled(k, v, q[:, -16:]))
    score = torch.einsum("thd,shd->hts", q[0, -16:].double(), k[0].double().repeat_interleave(2, 1)) * 32**-0.5
    weight = score.masked_fill(torch.arange(200) > torch.arange(184, 200)[:, None], -math.inf).softmax(-1)
    votes = weight.sum(1).unflatten(0, (2, 2)).sum(1)[:, :184]
    for kv_head in range(2):
        padded = torch.nn.functional.pad(votes[kv_head], (2, 2))
        pooled = torch.stack([padded[i : i + 5].mean() for i in range(184)])
        assert set(selection.rows[0, kv_head].tolist()) == set(pooled.topk(24).indices.tolist())


def test_magicpig_weighs_by_the_unbiased_probability_in_default_mode_and_adds_the_floor_in_seed_mode():
    q, k, v = structured_qkv(300, heads=4, kv_heads=2)
    for mode, floor in (("default", 0.0), ("seed", 1e-4)):
        method = methods.parse(f"magicpig:K=5,L=20,mode={mode}", "decode")
        _, selection, log_w = rows_read(method, q[:, -1], filled(k, v, q[:, -1:]))
        mean = k[0, 4 : 300 - 64 if mode == "seed" else 300].mean(0)
        read = 0
        for h in range(4):
            for row in (log_w[0, h] > -math.inf).nonzero()[:, 0].tolist():
                cosine = torch.cosine_similarity(q[0, -1, h], k[0, row, h // 2] - mean[h // 2], dim=0)
                r = (1 - math.acos(float(cosine)) / math.pi) ** 5
                u = 1 - (1 - r) ** 20 - 20 * r * (1 - r) ** 19
                assert float(log_w[0, h, row]) == pytest.approx(-math.log(u + floor), abs=2e-3)
                read += 1
        assert read == int(selection.count.sum()) > 20


def test_magicpig_weighs_rare_keys_without_bias():
    """A key nearly opposite to the query: drawn once in thousands of hashes, and then it must count in full."""
    angle, bits, tables, trials = math.radians(125), 3, 3, 60_000
    q, k = torch.tensor([1.0, 0, 0, 0]), torch.tensor([math.cos(angle), math.sin(angle), 0, 0])
    w = projections(1, 0, trials, 4, bits * tables, torch.device("cpu"))
    hits = codes_in_common(q[None, None], k[None, None], w, bits)
    drawn = (hits >= 2).double().mean()
    weight = Law(torch.zeros(1, 1, 4), collision_table(bits, tables)).log_w(q[None, None], k[None, None, None]).exp()
    assert 0.0005 < drawn < 0.02
    assert abs(float(drawn * weight) - 1) < 5 / math.sqrt(float(drawn) * trials)


@pytest.mark.parametrize("name", named("decode", SPARSE["decode"]))
def test_a_short_sequence_in_a_batch_keeps_up_with_itself_alone(name):
    """Forty steps: the short sequence gets its middle long after the batch got its side data."""
    q, k, v = structured_qkv(300, heads=4, batch=2)
    method, starts = sparse("decode", name), [0, 250]
    store = filled(k[:, :260], v[:, :260], q[:, 240:260], starts)
    alone = filled(k[1:, 250:260], v[1:, 250:260], q[1:, 250:260])
    for t in range(260, 300):
        for s, b in ((store, slice(0, 2)), (alone, slice(1, 2))):
            s.append(k[b, t : t + 1].transpose(1, 2), v[b, t : t + 1].transpose(1, 2))
        ctx = context(store.view())._replace(positions=torch.tensor([t, t - 250]))
        together = decode(q[:, t], store, method, ctx, Meter())[0]
        one = decode(q[1:, t], alone, method, ctx._replace(positions=ctx.positions[1:]), Meter())[0]
        assert close(together[1:], one)


def test_streaming_budget_is_the_number_of_keys_read():
    q, k, v = structured_qkv(300)
    _, stats = keysift.decode_attention(q[:, -1:], k, v, "streaming:sinks=4,budget=60", return_stats=True)
    assert stats.kept_fraction == pytest.approx(60 / 300)


@pytest.mark.parametrize("name", ["quest", "topk"])
def test_budget_in_keys_is_kept(name):
    q, k, v = structured_qkv(600)
    _, stats = keysift.decode_attention(q[:, -1:], k, v, f"{name}:budget=132,sinks=4,window=64", return_stats=True)
    assert stats.kept_fraction <= 132 / 600 + 1e-6
    assert stats.kept_fraction > (132 - 16) / 600 - 1e-6  # the first page or the last may reach out of the middle


@pytest.mark.parametrize(
    ("spec", "role", "message"),
    [
        ("nonesuch", "prefill", "prefill method 'nonesuch' unknown: choose dense, flashprefill"),
        ("quest", "prefill", "prefill method 'quest' cannot serve here: choose"),
        ("flexprefill", "decode", "decode method 'flexprefill' cannot serve here: choose"),
        ("flexprefill:gama=1", "prefill", "flexprefill has no option 'gama': choose block"),
        ("flexprefill:gamma", "prefill", "write gamma=VALUE, once"),
        ("flexprefill:gamma=.5,gamma=.6", "prefill", "write gamma=VALUE, once"),
        ("flexprefill:gamma=much", "prefill", "gamma=much: must be of type float"),
        ("flexprefill:gamma=0", "prefill", "gamma=0.0: must be above 0 and at most 1"),
        ("flexprefill:gamma=1.01", "prefill", "must be above 0 and at most 1"),
        ("flexprefill:gamma=nan", "prefill", "gamma=nan: must be finite"),
        ("flexprefill:block=100", "prefill", "block=100: choose 16, 32, 64 or 128"),
        ("flexprefill:min_budget=512,max_budget=256", "prefill", "max_budget=256: must be at least min_budget=512"),
        ("flexprefill:mode=fast", "prefill", "mode=fast: choose default or seed"),
        ("flexprefill:dense_layers=a", "prefill", "must be layer numbers joined by +"),
        ("quest:keep=0", "decode", "keep=0.0: must be above 0 and at most 1"),
        ("quest:keep=1.5", "decode", "must be above 0 and at most 1"),
        ("quest:budget=68", "decode", "budget=68: must exceed sinks + window = 4 + 64"),
        ("streaming:budget=16", "decode", "budget=16: must exceed sinks=16"),
        ("streaming:budget=100,window=400", "decode", "window=400 and budget=100: give one of them"),
        ("quest:keep=0.1,budget=200", "decode", "keep=0.1 and budget=200: give one of them"),
        ("snapkv:keep=0.1,budget=200", "decode", "keep=0.1 and budget=200: give one of them"),
        ("snapkv:budget=none", "decode", "keep and budget are both none"),
        ("dense:x=1", "prefill", "dense has no option 'x': it has none"),
        ("snapkv:budget=32", "decode", "budget=32: must exceed"),
        ("snapkv:kernel=4", "decode", "kernel=4: must be odd"),
        ("magicpig:K=16", "decode", "K=16: must be at least 0 and at most 15"),
        ("magicpig:window=0", "decode", "window=0: must be at least 1"),
        (3, "decode", "decode=3: pass a SPEC string or a method"),
    ],
)
def test_bad_specs_say_what_there_is(spec, role, message):
    with pytest.raises(ValueError) as error:
        methods.parse(spec, role)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_specs_give_the_methods_they_name():
    method = methods.parse("magicpig: K=8, L=75, dense_layers=0+2, sinks=0", "decode")
    assert (method.K, method.L, method.dense_layers, method.sinks) == (8, 75, (0, 2), 0)
    assert methods.parse(method, "decode") is method
    assert methods.describe(method) == "magicpig:sinks=0,dense_layers=0+2,K=8,L=75"
    assert methods.parse("flexprefill:max_budget=none,min_budget=none", "prefill").min_budget is None
    assert methods.parse("magicpig:dense_layers=none", "decode").dense_layers == ()
    assert isinstance(methods.parse("xattention", "prefill"), PrefillMethod)
