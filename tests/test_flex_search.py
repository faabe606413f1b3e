"""The default search of flexprefill: gamma is kept, at a low price, and the kernels choose what the reference does."""

import importlib
import math
from importlib.util import find_spec

import pytest
import torch

from keysift import methods
from keysift.attention import prefill
from keysift.bench.inputs import structured_qkv as bench_qkv
from keysift.meter import Meter
from keysift.ops import flex_search as search
from keysift.ops.block_sparse import block_sparse_attention
from keysift.ops.coverage import block_mass, fewest_blocks
from keysift.ops.dense import keys_values
from keysift.ops.flex_search import ROW_SLACK, FlexPlan, Sampling, flex_search
from keysift.types import KV, BlockMask, Ctx
from tests.devices import DEVICE, ON_GPU, QUIET
from tests.helpers import TOLERANCE, generator, pocket_queries_keys, relative_error, structured_qkv

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
pytestmark = QUIET


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def query_blocks(sampling):
    """Positions of the blocks that hold queries."""
    return range(sampling.first // sampling.block, sampling.blocks)


def heads_of(*keys_and_queries):
    """Heads that attend where they are told: of each, the topics of its keys and of its queries."""
    table = 40 * torch.eye(64)
    k, q = (torch.stack([table[x[i]] for x in keys_and_queries], 1)[None] for i in range(2))
    return q, k


# ---- which rows are looked at ----------------------------------------------------------------------------------------

LENGTHS = [
    (1, 1, 128),
    (3, 3, 16),
    (129, 129, 128),
    (1, 5000, 64),
    (130, 5000, 64),
    (2048, 2048, 128),
    (60_001, 60_001, 64),
    (11_265, 11_265, 16),
    (70_000, 131_072, 128),
    (1 << 20, 1 << 20, 128),
    ((1 << 20) - 77, (1 << 20) + 5, 16),
]


@pytest.mark.parametrize(("tokens", "keys", "block"), LENGTHS)
def test_every_strip_of_queries_is_sampled_within_itself(tokens, keys, block):
    sampling = Sampling.of(tokens, keys, block)
    position, number = sampling.positions(CPU), torch.tensor(sampling.strips)
    assert position.shape == (len(number), sampling.per)
    assert (position // sampling.strip == number[:, None]).all()
    assert keys - tokens <= position.min() and position.max() < keys
    assert (position.diff(dim=1) >= 0).all()
    assert torch.equal(sampling.row_blocks(CPU), position[:, -1] // block)
    assert sampling.strips[0] * sampling.strip <= keys - tokens < keys <= (sampling.strips[-1] + 1) * sampling.strip


@pytest.mark.parametrize(("tokens", "keys", "block"), LENGTHS)
def test_samples_are_about_as_many_as_asked_for(tokens, keys, block):
    sampling = Sampling.of(tokens, keys, block)
    rows = len(sampling.strips) * sampling.per
    assert sampling.per & (sampling.per - 1) == 0 < sampling.per <= search.MOST_ROWS
    assert sampling.strip == block or sampling.per == 1
    assert len(sampling.strips) <= search.MOST_STRIPS and rows <= max(search.ROWS, search.MOST_STRIPS)
    assert rows > 500 or sampling.per == search.MOST_ROWS
    assert rows * keys <= max(search.ROWS * search.FULL_KEYS, len(sampling.strips) * keys)
    held_out = -(-len(sampling.strips) // sampling.stride) * min(sampling.per, 2)
    assert held_out <= 2 * search.CALIBRATING_ROWS + 2


@pytest.mark.parametrize(("tokens", "keys", "block"), LENGTHS)
def test_a_block_belongs_to_the_strip_that_holds_its_middle(tokens, keys, block):
    sampling = Sampling.of(tokens, keys, block)
    blocks = torch.tensor(query_blocks(sampling))
    strip = sampling.strip_of(blocks) + sampling.strips.start
    middle = (blocks * block + block // 2).clamp(keys - tokens, keys - 1)
    assert torch.equal(strip, middle // sampling.strip)
    assert strip.min() >= sampling.strips.start and strip.max() < sampling.strips.stop


# ---- what the reference computes -------------------------------------------------------------------------------------


def by_hand(q, k, scale, gamma, sampling, least=1, most=None):
    """Threshold and blocks of one query head, row by row in fp64: q ``[T, D]``, k ``[N, D]``."""
    block, columns = sampling.block, range(sampling.blocks)

    def row(p):
        weight = (k[: p + 1].double() @ q[p - sampling.first].double() * scale).softmax(0)
        return [float(weight[c * block : (c + 1) * block].sum()) for c in columns]

    rows = [[row(p) for p in strip] for strip in sampling.positions(CPU).tolist()]
    at = sampling.row_blocks(CPU).tolist()
    tail = [row(p) for p in range(max(sampling.first, sampling.keys - search.LAST_ROWS), sampling.keys)]
    last = [max(x) for x in zip(*tail, strict=True)]
    striking = {c for c in columns if last[c] >= sampling.striking}

    def mean(xs):
        return [sum(x) / len(xs) for x in zip(*xs, strict=True)]

    def seen_from(x, there, here):
        column = [x[c] if c <= there else 0.0 for c in columns]
        moved = [x[c - here + there] if 0 <= c - here + there <= there else 0.0 for c in columns]
        return [(column[c] + moved[c]) / 2 if c > here - search.NEAR else column[c] for c in columns]

    def estimate(own, number, s, here):
        own = seen_from(own, at[s], here)
        beside = [seen_from(mean(rows[t]), at[t], here) for t in (s - 1, s + 1) if 0 <= t < len(rows)]
        if not beside:
            return own
        return [(number * a + 0.5 * b) / (number + 0.5) for a, b in zip(own, mean(beside), strict=True)]

    thresholds = []
    for fold in range(min(sampling.per, 2)):
        for k_ in range(8 * search.OCTAVES + 2):
            t, covered = 2.0 ** (-k_ / 8) if k_ <= 8 * search.OCTAVES else 0.0, []
            for s in range(0, len(rows), sampling.stride):
                if sampling.per == 1:
                    held, guess = rows[s][0], estimate(rows[s][0], 0, s, at[s])
                else:
                    held = mean(rows[s][1 - fold :: 2])
                    guess = estimate(mean(rows[s][fold::2]), sampling.per // 2, s, at[s])
                covered.append(
                    sum(m for c, m in enumerate(held) if c == at[s] or guess[c] >= t or (c in striking and c < at[s]))
                )
            if sum(covered) / len(covered) >= gamma:
                break
        thresholds.append(t)
    active = torch.zeros(len(query_blocks(sampling)), sampling.blocks, dtype=torch.bool)
    for i, here in enumerate(query_blocks(sampling)):
        middle = min(max(here * block + block // 2, sampling.first), sampling.keys - 1)
        s = middle // sampling.strip - sampling.strips.start
        guess = estimate(mean(rows[s]), sampling.per, s, here)[: here + 1]
        score = [1 + last[c] if c in striking else guess[c] for c in range(here)]
        order = [here, *sorted(range(here), key=lambda c: -score[c])]
        enough = next(
            n for n in range(1, here + 2) if sum(guess[c] for c in order[:n]) >= (gamma - ROW_SLACK) * sum(guess)
        )
        kept = order[: max(enough, min(least, here + 1))]
        floor = min(score[c] for c in kept[1:]) if len(kept) > 1 else 1.0
        mantissa, exponent = math.frexp(floor)  # 7 bits behind the first are left
        cutoff = min(*thresholds, math.floor(mantissa * 256) / 256 * 2.0**exponent, 2)
        ranked = [here, *(c for c in order[1:] if score[c] >= cutoff)]
        active[i, ranked[:most]] = True
    return min(thresholds), active


@pytest.mark.parametrize(
    ("tokens", "keys", "settings", "least", "most"),
    [
        (150, 150, {}, 1, None),
        (70, 150, {}, 3, 5),
        (150, 150, {"MOST_STRIPS": 5}, 1, None),
        (99, 150, {"ROWS": 16}, 2, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("gamma", [0.6, 0.9])
def test_the_reference_does_what_it_says(monkeypatch, tokens, keys, settings, least, most, gamma):
    for name, value in settings.items():
        monkeypatch.setattr(search, name, value)
    q, k, v = structured_qkv(keys, heads=2, kv_heads=1)
    q = q[:, -tokens:]
    plan = flex_search(q, KV.of(k, v), 0.2, gamma, least, most, 16, backend="reference")
    active = plan.active(query_blocks(plan.sampling))
    for h in range(2):
        threshold, expected = by_hand(q[0, :, h], k[0, :, 0], 0.2, gamma, plan.sampling, least, most)
        assert float(plan.threshold[0, h]) == pytest.approx(threshold, rel=1e-6)
        assert torch.equal(active[0, h], expected)


def test_a_head_that_looks_at_the_sink_reads_the_sink_and_itself():
    topic = torch.zeros(600, dtype=torch.long)
    keys = topic + 1
    keys[:4] = 0
    q, k = heads_of((keys, topic))
    active = flex_search(q, KV.of(k, k), 1.0, 0.95, 1, None, 32).active(range(19))[0, 0]
    expected = torch.eye(19, dtype=torch.bool)
    expected[:, 0] = True
    assert torch.equal(active, expected)


def test_a_block_that_a_single_row_of_blocks_needs_is_kept():
    """All queries look at the sink but those of block 14, which look at one key of block 3."""
    keys, queries = torch.ones(600, dtype=torch.long), torch.zeros(600, dtype=torch.long)
    keys[:4], keys[100], queries[14 * 32 : 15 * 32] = 0, 2, 2
    q, k = heads_of((keys, queries))
    for gamma in (0.5, 0.9, 0.95):
        active = flex_search(q, KV.of(k, k), 1.0, gamma, 1, None, 32).active(range(19))[0, 0]
        assert active[14, 3]
        assert not active[[5, 10, 18], 3].any()


def test_blocks_that_the_last_rows_look_at_are_kept_for_all():
    """The question comes last: what one of its tokens looks at may be read by every block of queries before."""
    keys, queries = torch.ones(600, dtype=torch.long), torch.zeros(600, dtype=torch.long)
    keys[:4], keys[100], queries[585] = 0, 2, 2
    q, k = heads_of((keys, queries))
    plan = flex_search(q, KV.of(k, k), 1.0, 0.9, 1, None, 32)
    active = plan.active(range(19))[0, 0]
    assert float(plan.last[0, 0, 3]) == pytest.approx(1, abs=1e-3)
    assert (
        active[4:, 3].all()
        and active[:, 0].all()
        and not active[4:, 5].masked_fill(torch.arange(4, 19) == 5, False).any()
    )
    assert plan._replace(most=2).active(range(19)).sum(-1).max() == 2
    queries[585], queries[560] = 0, 2  # not among the last 32
    q, k = heads_of((keys, queries))
    active = flex_search(q, KV.of(k, k), 1.0, 0.9, 1, None, 32).active(range(19))[0, 0]
    assert not active[5:16, 3].any()


def test_flat_attention_needs_as_many_blocks_as_gamma_says():
    q, k = torch.zeros(1, 2000, 2, 16), torch.randn(1, 2000, 1, 16, generator=generator(0))
    causal = torch.ones(63, 63).tril().bool()
    for gamma in (0.5, 0.9, 0.999):
        plan = flex_search(q, KV.of(k, k), 0.25, gamma, 1, None, 32)
        density = (plan.active(range(63)) & causal).sum() / (2 * causal.sum())
        assert gamma - 0.05 < density
    everything = plan._replace(threshold=torch.zeros_like(plan.threshold)).active(range(63))
    assert torch.equal(everything, causal.expand(1, 2, 63, 63))


def test_a_threshold_that_no_step_is_low_enough_for_is_zero():
    held_out = torch.full((1, 1, 1, 4), 0.25)
    estimate, block = torch.full((1, 1, 1, 4), 2.0**-20), torch.tensor([3])
    striking = torch.zeros(1, 1, 4, dtype=torch.bool)
    assert search._threshold(estimate, held_out, block, striking, 0.9) == 0
    assert search._threshold(estimate, held_out, block, striking, 0.2) == 1
    assert search._threshold(estimate + 0.1, held_out, block, striking, 0.9) == 2 ** (-27 / 8)
    assert search._threshold(estimate, held_out, block, ~striking, 0.9) == 1  # all kept anyway


# ---- gamma is kept, and at what price --------------------------------------------------------------------------------


class Layer:
    """Queries and keys with the exact mass of their blocks."""

    def __init__(self, q, k, block):
        self.q, self.kv, self.block, self.scale = q, KV.of(k, k), block, q.shape[-1] ** -0.5
        self.mass = block_mass(q, self.kv, self.scale, block, range(math.ceil(k.shape[1] / block)))

    def choose(self, gamma, least=1, most=None):
        plan = flex_search(self.q, self.kv, self.scale, gamma, least, most, self.block)
        active = plan.active(range(self.mass.shape[-1]))
        return plan, active, (self.mass * active).sum(-1)


_KEPT = {}


def layers(name):
    """Inputs by name (tokens/seed/block, or pocket), made once."""
    if name not in _KEPT:
        if name == "pocket":
            _KEPT[name] = [Layer(q, k, 128) for q, k in pocket_queries_keys(4096)]
        else:
            tokens, seed, block = map(int, name.split("/"))
            _KEPT[name] = [Layer(*bench_qkv(tokens, 8, 4, 128, seed=seed)[:2], block)]
    return _KEPT[name]


INPUTS = [
    "2048/0/128",
    "2048/1/128",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("4096/0/128", "4096/1/128", "pocket")),
]
# Blocks read, times the fewest with which a choice row by row by the true mass covers as much. Seen with gamma=0.9 (and
# 0.95): 1.09, 1.13, 1.19 (1.15), 1.00, 1.04
PRICE = {"2048/0/128": 1.15, "2048/1/128": 1.15, "4096/0/128": 1.22, "4096/1/128": 1.15, "pocket": 1.15}
PRICE_OF_GAMMA = 1.7  # ... with which it covers gamma: what covering more costs is in it. Seen: 1.1 to 1.57


@pytest.mark.parametrize("gamma", [0.9, 0.95])
@pytest.mark.parametrize("name", INPUTS)
def test_gamma_is_kept_by_every_head_at_nearly_the_lowest_price(name, gamma):
    """Over all query rows, not those that the search looked at."""
    read = limit = needed = 0
    for layer in layers(name):
        plan, active, share = layer.choose(gamma)
        assert (share.mean(-1) >= gamma - 0.02).all()
        assert (
            share >= gamma - 0.2
        ).all()  # of all rows together; of what was sampled of them no more than ROW_SLACK less
        assert active.diagonal(dim1=-2, dim2=-1).all()
        blocks = torch.arange(active.shape[-1])
        own = search._estimate(plan.mass, plan.mass, plan.sampling.per, plan.sampling, blocks, blocks).tril()
        assert ((own * active).sum(-1) >= (gamma - ROW_SLACK) * own.sum(-1) - 1e-5).all()
        read += int(active.sum())
        limit += int(fewest_blocks(layer.mass, share.mean(-1)).sum())
        needed += int(fewest_blocks(layer.mass, torch.full_like(share.mean(-1), gamma)).sum())
    assert read <= PRICE[name] * limit
    assert read <= PRICE_OF_GAMMA * needed
    assert read < 0.85 * layers(name)[0].mass.shape[-1] ** 2 / 2 * len(layers(name)) * active.shape[1]


@pytest.mark.parametrize("settings", [{"ROWS": 128}, {"MOST_STRIPS": 86}, {"MOST_STRIPS": 64}], ids=str)
@pytest.mark.parametrize("gamma", [0.9, 0.95])
def test_gamma_is_kept_where_one_row_a_strip_is_looked_at(monkeypatch, settings, gamma):
    """Strips of one block, of one and a half, and of two."""
    for key, value in settings.items():
        monkeypatch.setattr(search, key, value)
    plan, _, share = layers("2048/0/16")[0].choose(gamma)
    assert plan.sampling.per == 1
    assert (share.mean(-1) >= gamma - 0.02).all()


def test_more_gamma_reads_more():
    layer = layers("2048/1/128")[0]
    read = [float(layer.choose(gamma)[1].float().mean()) for gamma in (0.5, 0.7, 0.9, 0.99)]
    assert read == sorted(read)
    assert read[0] < 0.75 * read[3]  # blocks that the last rows look at are kept for any gamma


def test_budgets_bound_every_row_of_blocks():
    layer = layers("2048/1/128")[0]
    _, free, _ = layer.choose(0.98)
    _, active, _ = layer.choose(0.98, least=5, most=7)
    count, possible = active.sum(-1), torch.arange(1, 17)
    assert (count >= possible.clamp(max=5)).all() and (count <= possible.clamp(max=7)).all()
    assert active.diagonal(dim1=-2, dim2=-1).all()
    between = (free.sum(-1) >= 5) & (free.sum(-1) <= 7)
    assert between.any() and torch.equal(active[between], free[between])
    assert (count == 5).any() and (count == 7).any()


# ---- the kernels choose what the reference does ----------------------------------------------------------------------

SHAPES = [  # tokens, keys, heads, KV heads, head dim, block, sequences, gamma, least, most
    (1, 1, 1, 1, 16, 16, 1, 0.9, 1, None),
    (40, 40, 4, 1, 24, 64, 1, 0.9, 1, None),
    (97, 97, 2, 2, 16, 16, 1, 0.7, 1, None),
    (30, 150, 1, 1, 64, 32, 2, 0.9, 2, 3),
    (1, 150, 7, 1, 24, 32, 1, 0.8, 3, None),
    (137, 137, 7, 1, 96, 32, 1, 0.95, 1, None),
    (50, 131, 1, 1, 64, 16, 1, 0.6, 3, 4),
    (200, 201, 4, 1, 64, 64, 1, 0.9, 1, 3),
    (300, 300, 1, 1, 64, 128, 1, 0.9, 1, None),
]
QUICK = (1, 3, 4)  # of them
LARGE = [
    (8192, 8192, 32, 8, 128, 128, 1, 0.95, 1, None),
    (8190, 8190, 28, 4, 128, 64, 2, 0.9, 4, 40),
    (5003, 5003, 7, 1, 96, 32, 1, 0.9, 1, None),
    (3001, 9007, 8, 2, 64, 16, 2, 0.8, 1, None),
    (40_007, 40_007, 8, 2, 128, 128, 1, 0.95, 1, None),
    (39_999, 40_011, 4, 1, 256, 32, 1, 0.9, 8, 100),
]


def of_shape(shape, dtype=torch.float32, device=DEVICE):
    tokens, keys, heads, kv_heads, dim, block, batch, gamma, least, most = shape
    q, k, _ = structured_qkv(keys, heads, kv_heads, dim, batch)
    options = {"scale": dim**-0.5, "gamma": gamma, "least": least, "most": most, "block": block}
    return q[:, -tokens:].to(device, dtype), k.to(device, dtype), options


def by_kernels(q, kv, options):
    """The plan and the blocks of all queries."""
    plan = flex_search(q, kv, **options, backend="triton")
    return plan, plan.lists(query_blocks(plan.sampling))


def assert_same_choice(q, kv, options, plain=None):
    """Equal to the reference, but for blocks whose mass is within 1e-5 of the threshold; ``plain``: contiguous keys."""
    plan, mask = by_kernels(q, kv, options)
    expected = flex_search(q, kv if plain is None else KV.of(plain, plain), **options, backend="reference")
    assert plan.sampling == expected.sampling
    blocks, columns = query_blocks(plan.sampling), plan.sampling.blocks
    known = torch.arange(columns, device=q.device) <= plan.sampling.row_blocks(q.device)[:, None]
    assert torch.allclose(plan.mass * known, expected.mass * known, atol=1e-6)
    assert torch.allclose(plan.last, expected.last, atol=1e-6)
    sets = [expected.active(blocks)]
    for sign in (-1, 1):
        again = flex_search(
            q,
            kv if plain is None else KV.of(plain, plain),
            **options | {"gamma": options["gamma"] + sign * 1e-5},
            backend="reference",
        )
        sets.append(again._replace(threshold=again.threshold * (1 - sign * 1e-5)).active(blocks))
    chosen, (exact, fewer, more) = mask.active(columns), sets
    assert not (fewer & ~chosen).any() and not (chosen & ~more).any()
    assert (fewer != more).float().mean() < 2e-3
    assert torch.equal(chosen, exact) or (chosen != exact).float().mean() < 1e-3
    assert_lists_hold(mask, chosen)
    return plan, mask


def assert_lists_hold(mask, active):
    """Ascending lists, the diagonal apart and always there, as ``BlockMask.of`` makes them."""
    expected = BlockMask.of(active, mask.block, mask.first)
    assert (mask.partial_count == 1).all()
    for name in ("full", "partial"):
        count, index = getattr(mask, f"{name}_count"), getattr(mask, f"{name}_index")
        assert torch.equal(count, getattr(expected, f"{name}_count"))
        wanted = getattr(expected, f"{name}_index")
        used = torch.arange(wanted.shape[-1], device=count.device) < count[..., None]
        assert torch.equal(index[..., : wanted.shape[-1]][used], wanted[used])


def slow_but(items, quick):
    return [x if i in quick else pytest.param(x, marks=pytest.mark.slow) for i, x in enumerate(items)]


@pytest.mark.parametrize("shape", slow_but(SHAPES, QUICK), ids=str)
@needs_triton
def test_kernels_choose_the_references_blocks(shape):
    q, k, options = of_shape(shape)
    assert_same_choice(q, KV.of(k, k), options)


@pytest.mark.slow
@needs_triton
def test_kernels_choose_the_references_blocks_in_half_precision():
    """Triton's interpreter cannot multiply bfloat16; ``TestOnGpu`` does."""
    q, k, options = of_shape(SHAPES[7], torch.float16)
    assert_same_choice(q, KV.of(k, k), options)


@pytest.mark.parametrize(
    "settings",
    slow_but([{"MOST_STRIPS": 6}, {"MOST_STRIPS": 4}, {"MOST_STRIPS": 3}, {"ROWS": 8}, {"ROWS": 32}], [0]),
    ids=str,
)
@pytest.mark.parametrize("tokens", slow_but([150, 115], [1]))
@needs_triton
def test_kernels_choose_the_references_blocks_from_few_rows(monkeypatch, settings, tokens):
    for name, value in settings.items():
        monkeypatch.setattr(search, name, value)
    q, k, options = of_shape((tokens, 150, 2, 1, 16, 16, 1, 0.8, 1, None))
    plan, _ = assert_same_choice(q, KV.of(k, k), options)
    assert plan.sampling.per == (1 if settings != {"ROWS": 32} else 2 if tokens == 150 else 4)


@pytest.mark.slow
@needs_triton
def test_every_few_strips_are_calibrated_on(monkeypatch):
    monkeypatch.setattr(search, "CALIBRATING_ROWS", 6)
    q, k, options = of_shape((150, 150, 1, 1, 16, 16, 1, 0.8, 1, None))
    plan, _ = assert_same_choice(q, KV.of(k, k), options)
    assert plan.sampling.stride == 3


def in_poison(k, starts, after=70):
    """The same keys as rows of a buffer of NaN, from another row on in each sequence."""
    keys = k.shape[1]
    buffer = k.new_full((k.shape[0], max(starts) + keys + after, *k.shape[2:]), math.nan)
    for b, start in enumerate(starts):
        buffer[b, start : start + keys] = k[b]
    return KV.on(buffer, buffer, [(start, start + keys) for start in starts])


def in_pages(k, starts, page, spare=2):
    """The same keys in shuffled pages between pages of NaN."""
    batch, keys = k.shape[:2]
    each = math.ceil((max(starts) + keys) / page)
    table = torch.randperm(batch * each + 3, generator=generator(7))[: batch * each].view(batch, each)
    pool = k.new_full((batch * each + 3, page, *k.shape[2:]), math.nan)
    for b, start in enumerate(starts):
        row = torch.arange(start, start + keys)
        pool[table[b, row // page].to(k.device), (row % page).to(k.device)] = k[b]
    table = torch.cat([table, torch.full((batch, spare), 10**6)], 1)  # entries that nothing may follow
    return KV.on(pool, pool, [(start, start + keys) for start in starts], table.int().to(k.device))


@pytest.mark.slow
@needs_triton
def test_keys_are_read_where_they_lie():
    """Behind NaN, in pages, from other rows in each sequence: the same plan, bit for bit."""
    q, k, options = of_shape((40, 90, 2, 1, 24, 32, 2, 0.8, 1, None))
    plan, mask = by_kernels(q, KV.of(k, k), options)
    for kv in (in_poison(k, (0, 37)), in_pages(k, (5, 40), 24)):
        again, lists = by_kernels(q, kv, options)
        assert torch.equal(again.threshold, plan.threshold)
        assert torch.equal(lists.active(3), mask.active(3))


@pytest.mark.slow
@pytest.mark.parametrize("page", [16, 24, 64])
@needs_triton
def test_paged_keys_give_the_references_choice(page):
    q, k, options = of_shape((40, 101, 2, 1, 64, 32, 2, 0.9, 1, None))
    assert_same_choice(q, in_pages(k, (3, 3), page), options)
    assert_same_choice(q, in_pages(k, (5, 40), page), options, plain=k)


@pytest.mark.slow
@needs_triton
def test_strides_do_not_matter_and_runs_repeat():
    q, k, options = of_shape((50, 70, 2, 2, 64, 32, 1, 0.8, 1, None))
    plan, mask = by_kernels(q, KV.of(k, k), options)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    odd = [torch.cat([x, x[..., :1]], -1)[..., :64] for x in (q, k)]  # rows off any 16-byte boundary
    dim_first = [x.mT.contiguous().mT for x in (q, k)]
    fused = (q, torch.cat([k, k * math.nan], 2)[:, :, :2])
    for q_, k_ in ((q, k), heads_first, odd, dim_first, fused):
        again, lists = by_kernels(q_, KV.of(k_, k_), options)
        assert torch.equal(again.threshold, plan.threshold)
        assert torch.equal(lists.active(3), mask.active(3))


@needs_triton
def test_chunks_of_the_lists_make_up_the_whole():
    q, k, options = of_shape((70, 120, 1, 1, 16, 16, 1, 0.8, 2, 5))
    plan, mask = by_kernels(q, KV.of(k, k), options)
    blocks, whole = query_blocks(plan.sampling), mask.active(8)
    for step in (1, 3):
        parts = [plan.lists(range(i, min(i + step, blocks.stop))) for i in range(blocks.start, blocks.stop, step)]
        assert [part.first for part in parts] == list(blocks)[::step]
        assert torch.equal(torch.cat([part.active(8) for part in parts], 2), whole)


@pytest.mark.slow
@needs_triton
def test_many_rows_of_blocks_are_listed_several_at_a_time():
    """From 256 rows on, a program makes the lists of four."""
    sampling = Sampling.of(263 * 16 - 3, 263 * 16, 16)
    mass = torch.rand(1, 1, len(sampling.strips), sampling.blocks, generator=generator(0)).to(DEVICE) ** 8
    mass = mass / mass.sum(-1, keepdim=True)
    last = torch.rand(1, 1, 263, generator=generator(1)).to(DEVICE) / 15
    plan = FlexPlan(mass, last, torch.full((1, 1), 1e-3, device=DEVICE), sampling, 0.9, 1, None, "triton")
    whole = plan.lists(range(263)).active(263)
    assert torch.equal(whole, plan.active(range(263)))
    assert torch.equal(
        torch.cat([plan.lists(range(i, i + 1)).active(263) for i in (0, 130, 262)], 2), whole[:, :, [0, 130, 262]]
    )


def test_the_plan_of_a_method_is_the_searchs():
    q, k, _ = structured_qkv(403, heads=8)
    kv = KV.of(k, k)
    method = methods.parse("flexprefill:gamma=0.8,min_budget=40,max_budget=100,block=16", "prefill")
    plan = method.plan(q, kv, Ctx(0, 0.3, kv.length - 1))
    expected = flex_search(q, kv, 0.3, 0.8, 3, 7, 16)
    assert plan[3:] == expected[3:]
    assert torch.equal(method.mask(plan, range(3, 9)).active(26), expected.active(range(3, 9)))


def test_gamma_one_and_short_prompts_are_dense():
    q, k, _ = structured_qkv(256)
    for spec, tokens, dense in (
        ("flexprefill:gamma=1,block=16", 256, True),
        ("flexprefill:block=16", 1, True),
        ("flexprefill:block=128", 256, True),
        ("flexprefill:block=64", 256, False),
        ("flexprefill:block=64,min_budget=256", 256, True),
        ("flexprefill:block=16,dense_below=257", 256, True),
        ("flexprefill:block=16,dense_below=256", 256, False),
        ("flexprefill:block=16,dense_below=100", 20, True),  # 20 * (2 * 256 - 20) pairs are fewer than 100 * 100
        ("flexprefill:block=16,dense_below=99", 20, False),
    ):
        kv = KV.of(k, k)
        plan = methods.parse(spec, "prefill").plan(q[:, -tokens:], kv, Ctx(0, 0.2, kv.length - 1))
        assert (plan is None) == dense, spec


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [1, 4])
@needs_triton
def test_of_blocks_that_tie_at_the_bound_the_first_are_kept(least):
    q, k = torch.zeros(1, 150, 1, 16), torch.ones(1, 150, 1, 16)
    lists = [
        flex_search(q, KV.of(k, k), 1.0, 0.9, least, 6, 16, backend=backend).lists(range(10)).active(10)
        for backend in ("reference", "triton")
    ]
    assert torch.equal(*lists)
    assert (lists[0].sum(-1) == torch.arange(1, 11).clamp(max=6)).all()


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
    def test_kernels_choose_the_references_blocks(self, shape, dtype):
        q, k, options = of_shape(shape, dtype)
        assert_same_choice(q, KV.of(k, k), options)

    @pytest.mark.parametrize("shape", LARGE, ids=str)
    def test_runs_repeat_and_chunks_make_up_the_whole(self, shape):
        q, k, options = of_shape(shape, torch.bfloat16)
        plan, mask = by_kernels(q, KV.of(k, k), options)
        again, lists = by_kernels(q, KV.of(k, k), options)
        assert torch.equal(again.threshold, plan.threshold)
        assert torch.equal(again.mass, plan.mass) and torch.equal(again.last, plan.last)
        whole, blocks = mask.active(plan.sampling.blocks), query_blocks(plan.sampling)
        assert torch.equal(lists.active(plan.sampling.blocks), whole)
        step = -(-len(blocks) // 3)
        parts = [plan.lists(range(i, min(i + step, blocks.stop))) for i in range(blocks.start, blocks.stop, step)]
        assert torch.equal(torch.cat([part.active(plan.sampling.blocks) for part in parts], 2), whole)

    @pytest.mark.parametrize("page", [16, 64, 256])
    def test_keys_are_read_where_they_lie(self, page):
        q, k, options = of_shape((4001, 6007, 8, 2, 128, 128, 2, 0.9, 1, None), torch.bfloat16)
        _, mask = by_kernels(q, KV.of(k, k), options)
        for kv in (in_poison(k, (9, 9)), in_poison(k, (0, 200)), in_pages(k, (0, 0), page), in_pages(k, (5, 77), page)):
            assert_same_choice(q, kv, options, plain=k)
            assert torch.equal(by_kernels(q, kv, options)[1].active(47), mask.active(47))

    def test_strides_do_not_matter(self):
        q, k, options = of_shape((4001, 6007, 8, 2, 64, 64, 2, 0.9, 1, None), torch.bfloat16)
        heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
        odd = [torch.cat([x, x[..., :1]], -1)[..., :64] for x in (q, k)]
        fused = (q, torch.cat([k, k * math.nan], 2)[:, :, :2])
        for q_, k_ in (heads_first, odd, fused):
            assert_same_choice(q_, KV.of(k_, k_), options)

    def test_heads_further_apart_than_32_bits_reach(self):
        """A million tokens, head by head, as models give them; only the last of them are looked at."""
        q, k, options = of_shape((1000, 2000, 32, 32, 128, 128, 1, 0.9, 1, None), torch.bfloat16)
        far = torch.empty(32, 1 << 20, 128, dtype=q.dtype, device=q.device)
        views = []
        for x in (q, k):
            views.append(far[:, : x.shape[1]].transpose(0, 1)[None])
            views[-1].copy_(x)
            far = far.clone()
        assert_same_choice(views[0], KV.of(views[1], views[1]), options)
        odd = torch.empty(32 * (1 << 20) * 128 + 1, dtype=q.dtype, device=q.device)[1:]  # out of TMA's reach
        keys = odd.view(32, 1 << 20, 128)[:, :2000].transpose(0, 1)[None]
        keys.copy_(k)
        assert_same_choice(q, KV.of(keys, keys), options)

    @pytest.mark.parametrize("backend", ["auto", "triton"])
    def test_nothing_waits_for_the_device(self, backend):
        q, k, options = of_shape((6001, 9001, 8, 2, 128, 128, 1, 0.95, 1, None), torch.bfloat16)
        kv = KV.of(k, k)

        def run():
            plan = flex_search(q, kv, **options)
            return block_sparse_attention(
                q, kv, plan.lists(query_blocks(plan.sampling)), options["scale"], True, backend
            )

        run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, _ = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert out.isfinite().all()

    def test_the_path_waits_for_nothing_but_the_meter(self):
        q, k, v = (x.to("cuda", torch.bfloat16) for x in structured_qkv(6001, 8, 2, 128))
        kv, meter = KV.of(k, v), Meter(measure_mass=True)
        ctx = Ctx(0, 128**-0.5, torch.tensor([6000]))
        method = methods.parse("flexprefill:dense_below=0", "prefill")
        prefill(q, kv, method, ctx, meter)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            prefill(q, kv, method, ctx, meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert 0 < meter.stats().density < 1

    @pytest.mark.parametrize("starts", [(0, 150, 1900), (0, 0, 0)])
    def test_a_ragged_batch_is_read_as_one_by_one(self, starts):
        q, k, v = (x.to("cuda", torch.bfloat16) for x in structured_qkv(6001, 8, 2, 128, 3))
        kv = KV.on(k, v, [(start, 6001) for start in starts])
        method = methods.parse("flexprefill:gamma=0.8,dense_below=0", "prefill")
        positions = kv.end - 1 - kv.start
        out, lse = prefill(q, kv, method, Ctx(0, 0.1, positions), Meter(), with_lse=True)
        for b, start in enumerate(starts):
            one = KV.of(*(x[b : b + 1, start:] for x in keys_values(KV.of(k, v))))
            ctx = Ctx(0, 0.1, positions[b : b + 1])
            alone, alone_lse = prefill(q[b : b + 1, start:], one, method, ctx, Meter(), with_lse=True)
            assert relative_error(out[b : b + 1, start:], alone) < TOLERANCE[torch.bfloat16]
            assert relative_error(lse[b : b + 1, start:], alone_lse) < 1e-3


def test_numbers_that_differ_from_prompt_to_prompt_are_arguments_of_the_kernels():
    """Triton passes over a name that no argument has."""
    pytest.importorskip("triton", reason="triton is not installed")
    of_search, of_lists = (importlib.import_module(f"keysift.ops.flex_{name}_triton") for name in ("search", "lists"))
    kernels = [x for module in (of_search, of_lists) for x in vars(module).values() if hasattr(x, "arg_names")]
    assert {*of_search.OF_A_PROMPT} <= {name for kernel in kernels for name in kernel.arg_names}
