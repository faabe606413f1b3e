"""The tensor functions: shapes, dtypes, what they return, and one clear line for what does not fit."""

import math

import pytest
import torch

import keysift
from tests.helpers import close, oracle, structured_qkv

SPARSE = {"gamma": 0.7, "tau": 0.1, "min_budget": 32, "block_size": 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "dim"), [(1, 64), (3, 40), (2, 256)])
def test_flex_prefill_attention_takes_any_batch_dtype_and_head_dim(dtype, batch, dim):
    q, k, v = (x.to(dtype) for x in structured_qkv(300, heads=4, batch=batch, dim=dim))
    out, stats = keysift.flex_prefill_attention(q, k, v, gamma=1.0, return_stats=True)
    assert out.dtype == dtype
    assert out.shape == q.shape
    assert stats.density == 1
    assert close(out, oracle(q, k, v)[0], dtype)
    sparse, stats = keysift.flex_prefill_attention(q, k, v, **SPARSE, return_stats=True, measure_mass=True)
    assert 0 < stats.density < 1
    assert stats.mass_covered > stats.density
    error = (sparse.double() - oracle(q, k, v)[0]).norm() / oracle(q, k, v)[0].norm()
    assert error < 1.2 * math.sqrt(1 - stats.mass_covered) + 0.2


def test_flex_prefill_attention_of_the_last_queries_and_of_a_batch():
    q, k, v = structured_qkv(500, batch=2)
    out = keysift.flex_prefill_attention(q[:, -170:], k, v, **SPARSE)
    assert out.shape == (2, 170, 4, 32)
    for b in range(2):
        one = keysift.flex_prefill_attention(q[b : b + 1, -170:], k[b : b + 1], v[b : b + 1], **SPARSE)
        assert close(out[b : b + 1], one)


def test_gqa_interleave_pairs_heads_by_remainder():
    q, k, v = structured_qkv(300, heads=6, kv_heads=2)
    out, lse = keysift.flex_prefill_attention(q, k, v, **SPARSE, gqa_interleave=True, return_lse=True)
    order = [0, 2, 4, 1, 3, 5]
    expected, expected_lse = keysift.flex_prefill_attention(q[:, :, order], k, v, **SPARSE, return_lse=True)
    assert close(out[:, :, order], expected)
    assert close(lse[:, :, order], expected_lse)


def test_returns_come_in_the_documented_order():
    q, k, v = structured_qkv(300)
    out, lse, ratio, stats = keysift.flex_prefill_attention(
        q, k, v, **SPARSE, return_computational_ratio=True, return_lse=True, return_stats=True
    )
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert ratio == stats.density
    assert stats.kept_fraction is None
    assert stats.mass_covered is None
    out, lse, stats = keysift.decode_attention(q[:, -1:], k, v, "topk", return_lse=True, return_stats=True)
    assert out.shape == (1, 1, 4, 32)
    assert lse.shape == (1, 1, 4)
    assert stats.density is None
    assert 0 < stats.kept_fraction < 1
    assert isinstance(keysift.prefill_attention(q, k, v), torch.Tensor)
    assert isinstance(keysift.decode_attention(q[:, -1:], k, v), torch.Tensor)


@pytest.mark.parametrize("scale", [None, 0.05, 0.5])
def test_scale_reaches_search_and_attention(scale):
    """Scaling q by c and the scale by 1 / c changes nothing, the chosen blocks included."""
    q, k, v = structured_qkv(400)
    value = 32**-0.5 if scale is None else scale
    a = keysift.flex_prefill_attention(q, k, v, **SPARSE, softmax_scale=scale)
    b = keysift.flex_prefill_attention(q * value * 4, k, v, **SPARSE, softmax_scale=0.25)
    assert close(a, b)
    for spec in ("topk:keep=0.1", "oracle:keep=0.1"):
        a = keysift.decode_attention(q[:, -1:], k, v, spec, scale=scale)
        assert close(a, keysift.decode_attention(q[:, -1:] * value * 4, k, v, spec, scale=0.25))


def test_values_may_have_another_width():
    q, k, v = structured_qkv(300)
    v = torch.cat([v, v], -1)
    for spec in ("dense", "flexprefill:gamma=0.6,min_budget=16,block=16"):
        assert keysift.prefill_attention(q, k, v, spec).shape == (1, 300, 4, 64)
    assert keysift.decode_attention(q[:, -1:], k, v, "magicpig:K=4,L=10").shape == (1, 1, 4, 64)


def test_inputs_are_left_as_they_were_and_may_have_any_strides():
    q, k, v = structured_qkv(300)
    before = [x.clone() for x in (q, k, v)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    plain = keysift.flex_prefill_attention(q, k, v, **SPARSE)
    assert torch.equal(keysift.flex_prefill_attention(*strided, **SPARSE), plain)
    keysift.decode_attention(q[:, -1:], k, v, "quest:keep=0.1")
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


Q, K, V = structured_qkv(40)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (Q[0], K, V, "q is (40, 4, 32): pass a tensor [batch, tokens, heads, head_dim]"),
        (Q, [1], V, "k is list: pass a tensor"),
        (Q.double(), K, V, "q is torch.float64: pass float32, bfloat16 or float16"),
        (Q.bfloat16(), K, V, "q, k, v differ in dtype: torch.bfloat16, torch.float32, torch.float32"),
        (Q, K.to("meta"), V, "q, k, v differ in device: cpu, meta, cpu"),
        (Q, K, V[:, :39], "batch, tokens and heads must agree"),
        (Q, K[..., :16], V, "batch and head_dim must agree"),
        (Q.expand(2, -1, -1, -1), K, V, "batch and head_dim must agree"),
        (Q, K[:, :30], V[:, :30], "q has 40 tokens and k only 30"),
        (Q[:, :, :3], K, V, "3 query heads are not divisible by 2 key/value heads"),
        (Q[:, :0], K, V, "no dimension may be empty"),
        (Q * math.nan, K, V, "q holds NaN or inf"),
        (Q, K * math.inf, V, "k holds NaN or inf"),
    ],
)
@pytest.mark.parametrize("function", [keysift.prefill_attention, keysift.flex_prefill_attention])
def test_tensors_that_do_not_fit_are_refused_in_one_line(function, q, k, v, message):
    with pytest.raises(ValueError) as error:
        function(q, k, v)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


RAGGED = [(90, 90), (1, 40), (37, 130), (0, 5), (64, 64)]  # queries and keys of the sequences
VARLEN = ("dense", "flexprefill:gamma=.7,block=16", "streaming:sinks=5,window=30,block=16", "xattention:block=16")


def packed(**sizes):
    """Sequences of those lengths one behind the other, and where they begin."""
    cu_q, cu_k, parts = [0], [0], []
    for b, (tokens, keys) in enumerate(RAGGED):
        q, k, v = structured_qkv(keys, seed=b, **sizes)
        parts.append((q[0, keys - tokens :], k[0], v[0]))
        cu_q.append(cu_q[-1] + tokens)
        cu_k.append(cu_k[-1] + keys)
    return [torch.cat(x) for x in zip(*parts, strict=True)], cu_q, cu_k


@pytest.mark.parametrize("spec", [*VARLEN, "flexprefill:mode=seed,block=16"])
def test_packed_sequences_are_read_as_one_by_one(spec):
    seed = "mode=seed" in spec
    if seed:  # as many queries as keys
        q, k, v = (x[0] for x in structured_qkv(154))
        cu_q = cu_k = [0, 90, 154]
    else:
        (q, k, v), cu_q, cu_k = packed()
    options = {"return_lse": True, "return_stats": True, "measure_mass": True, "scale": 0.3}
    out, lse, stats = keysift.prefill_attention_varlen(q, k, v, cu_q, cu_k, spec, **options)
    assert out.shape == q.shape and lse.shape == q.shape[:2]
    read = pairs = 0
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        if rows.start == rows.stop:
            continue
        one = keysift.prefill_attention(q[None, rows], k[None, keys], v[None, keys], spec, **options)
        assert close(out[rows], one[0][0])
        assert close(lse[rows], one[1][0])
        tokens, number = rows.stop - rows.start, keys.stop - keys.start
        pairs += tokens * (2 * number - tokens + 1) / 2
        read += one[2].density * tokens * (2 * number - tokens + 1) / 2
    assert stats.density == pytest.approx(read / pairs, rel=1e-6)
    assert (stats.density < 1) == (spec != "dense") and stats.density <= stats.mass_covered <= 1 + 1e-6


def test_packed_sequences_return_what_is_asked_for_in_their_dtype():
    (q, k, v), cu_q, cu_k = packed(heads=6, dim=16)
    out = keysift.prefill_attention_varlen(q.bfloat16(), k.bfloat16(), v.bfloat16(), torch.tensor(cu_q), tuple(cu_k))
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16 and out.shape == (192, 6, 16)
    out, stats = keysift.prefill_attention_varlen(q, k, v, cu_q, cu_k, "dense", return_stats=True, backend="sdpa")
    assert stats.density == 1 and stats.mass_covered is None
    start = cu_k[2]
    assert close(
        out[cu_q[2] : cu_q[3]],
        oracle(*(x[None] for x in (q[91:128], k[start : start + 130], v[start : start + 130])))[0][0],
    )


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [
        ([0, 40, 39], [0, 50, 100], "cu_seqlens_q=[0, 40, 39]: must rise from 0 to the 80 tokens of q"),
        ([0, 90, 80], [0, 50, 100], "cu_seqlens_q=[0, 90, 80]: must rise"),
        ([1, 40, 80], [0, 50, 100], "must rise from 0"),
        ([0], [0, 50, 100], "cu_seqlens_q=[0]: must rise"),
        ([0, 40, 80], [0, 50, 99], "cu_seqlens_k=[0, 50, 99]: must rise from 0 to the 100 tokens of k"),
        ([0, 80], [0, 50, 100], "cu_seqlens_q is of 1 sequences and cu_seqlens_k of 2"),
        ([0, 60, 80], [0, 50, 100], "sequence 0 has 60 queries and 50 keys: queries are the last tokens of the keys"),
    ],
)
def test_boundaries_of_packed_sequences_are_checked(cu_q, cu_k, message):
    q, k, v = (x[0] for x in structured_qkv(100))
    with pytest.raises(ValueError) as error:
        keysift.prefill_attention_varlen(q[:80], k, v, cu_q, cu_k)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_packed_tensors_are_checked_like_batches():
    q, k, v = (x[0] for x in structured_qkv(40))
    for bad, message in (
        ((q * math.nan, k, v), "q holds NaN"),
        ((q, k.double(), v), "k is torch.float64"),
        ((q, k, v[:, :1]), "batch, tokens and heads must agree"),
        ((q[:, :3], k, v), "3 query heads are not divisible by 2"),
    ):
        with pytest.raises(ValueError, match=message):
            keysift.prefill_attention_varlen(*bad, [0, 40], [0, 40])


@pytest.mark.parametrize("function", [keysift.prefill_attention, keysift.flex_prefill_attention])
def test_backends_are_checked_and_give_the_same(function):
    options = {"method": "flexprefill:gamma=.7,block=16"} if function is keysift.prefill_attention else SPARSE
    expected = function(Q, K, V, **options)
    assert close(function(Q, K, V, **options, backend="sdpa"), expected)
    for backend, message in (
        ("cuda", "backend=cuda: choose auto, fa4, triton, cpu or sdpa"),
        ("fa4", "backend=fa4: needs "),
    ):
        q, k, v = structured_qkv(300)
        with pytest.raises(ValueError, match=message):
            function(q, k, v, **options, backend=backend)


def test_flex_prefill_attention_passes_its_arguments_on():
    q, k, v = structured_qkv(500)
    for arguments, spec in (
        ({"gamma": 0.8, "block_size": 16}, "gamma=.8,block=16"),
        (
            {"gamma": 0.8, "block_size": 32, "min_budget": 90, "max_budget": 150},
            "gamma=.8,block=32,min_budget=90,max_budget=150",
        ),
        ({"gamma": 0.8, "block_size": 32, "dense_below": 501}, "gamma=.8,block=32,dense_below=501"),
        ({"gamma": 0.8, "block_size": 32, "tau": 0.2, "mode": "seed"}, "gamma=.8,block=32,tau=.2,mode=seed"),
    ):
        out, stats = keysift.flex_prefill_attention(q, k, v, **arguments, return_stats=True)
        expected, wanted = keysift.prefill_attention(q, k, v, f"flexprefill:{spec}", return_stats=True)
        assert torch.equal(out, expected) and stats == wanted
        assert (stats.density == 1) == ("dense_below" in arguments)


def test_decode_takes_one_query():
    with pytest.raises(ValueError, match="q has 40 tokens: decode takes 1"):
        keysift.decode_attention(Q, K, V)


def test_tail_queries_are_checked_like_queries():
    for tail_q, message in (
        (Q[:, -8:, :2], "tail_q has 2 heads and q has 4"),
        (Q[:, -8:] * math.nan, "tail_q holds NaN"),
        ([1], "tail_q is list"),  # no tensor
        (Q[:, -8:].bfloat16(), "differ in dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            keysift.decode_attention(Q[:, -1:], K, V, "snapkv:budget=20,window=8", tail_q=tail_q)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": "x"}, "seed='x'"), ({"seed": -1}, "seed=-1"), ({"seed": 2**63}, "seed="), ({"layer": "a"}, "layer='a'")],
)
def test_seeds_and_layers_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        keysift.decode_attention(Q[:, -1:], K, V, "oracle", **options)


def test_arrays_are_not_tensors():
    with pytest.raises(ValueError, match="q is ndarray: pass a tensor"):
        keysift.prefill_attention(Q.numpy(), K, V)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, "a"])
def test_a_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        keysift.prefill_attention(Q, K, V, scale=scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": None}, "gamma=None: must be of type float"),
        ({"gamma": "0.9"}, "gamma='0.9': must be of type float"),
        ({"min_budget": 10.5}, "min_budget=10.5: must be of type int"),
        ({"block_size": True}, "block=True: must be of type int"),
    ],
)
def test_options_of_the_wrong_type_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        keysift.flex_prefill_attention(Q, K, V, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(("gamma", "block"), [(0, 128), (1.5, 128), (-0.1, 128), (0.9, 48)])
def test_flexprefill_options_out_of_bounds_are_refused(gamma, block):
    with pytest.raises(ValueError, match=f"{'gamma' if block == 128 else 'block'}="):
        keysift.flex_prefill_attention(Q, K, V, gamma=gamma, block_size=block)


def test_packed_sequences_may_be_empty():
    q, k, v = (x[0] for x in structured_qkv(300))
    out = keysift.prefill_attention_varlen(q, k, v, [0, 0, 300], [0, 0, 300], "flexprefill:gamma=0.8,block=16")
    assert torch.equal(out, keysift.prefill_attention(q[None], k[None], v[None], "flexprefill:gamma=0.8,block=16")[0])


@pytest.mark.parametrize("rows", [5, [0, None, 300], ["a", "b"], [0, 100.7, 300], torch.tensor(300)], ids=str)
def test_boundaries_that_are_no_integers_are_refused(rows):
    q, k, v = (x[0] for x in structured_qkv(300))
    with pytest.raises(ValueError, match="cu_seqlens_q="):
        keysift.prefill_attention_varlen(q, k, v, rows, [0, 300])
