"""What the meter counts is what was read, and its errors are those of the outputs."""

import pytest
import torch

from keysift import attach
from keysift.attention import decode, prefill
from keysift.cache import Store
from keysift.meter import Meter
from keysift.methods import parse
from keysift.ops.dense import dense_attention
from keysift.types import KV, Ctx

from .helpers import structured_qkv
from .tiny_models import tiny

SPECS = ("streaming:sinks=4,window=16", "topk:keep=0.1,window=16", "quest:keep=0.2,page=8", "snapkv:budget=40")


def filled(tokens=300, heads=8, kv_heads=2, dim=32, dtype=torch.float32):
    q, k, v = structured_qkv(tokens, heads, kv_heads, dim)
    store = Store()
    store.append(k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype))
    store.end_prefill(q.to(dtype), 32)
    return q.to(dtype), store


def context(store, layer=3):
    return Ctx(layer, 32**-0.5, store.view().length - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_reads_every_byte_of_the_cache(dtype):
    q, store = filled(dtype=dtype)
    meter = Meter()
    decode(q[:, -1], store, parse("dense", "decode"), context(store), meter)
    size = torch.finfo(dtype).bits // 8
    assert meter.stats().bytes_per_step == 300 * 2 * (32 + 32) * size
    assert meter.stats().kept_fraction == 1


def test_bytes_are_rows_read_and_what_was_scanned_to_choose_them():
    q, store = filled()
    row, middle = (32 + 32) * 4, 300 - 4 - 16
    expected = {
        "streaming:sinks=4,window=16": 2 * 20 * row,
        "topk:keep=0.1,window=16,dense_layers=none": 2 * 20 * row + 8 * round(0.1 * middle) * row + middle * 2 * 32 * 4,
        "quest:keep=0.2,window=16,page=4,per=query_head,dense_layers=none": 2 * 20 * row
        + 8 * 56 * row
        + 2 * (middle // 4) * 2 * 32 * 4,
        "quest:keep=0.2,window=16,page=4,dense_layers=none": 2 * 20 * row
        + 2 * 56 * row
        + 2 * (middle // 4) * 2 * 32 * 4,
    }
    for spec, size in expected.items():
        meter = Meter()
        decode(q[:, -1], store, parse(spec, "decode"), context(store), meter)
        assert meter.stats().bytes_per_step == size, spec


def test_magicpigs_codes_count_as_they_are_stored():
    q, store = filled()
    method, meter = parse("magicpig:K=6,L=20,window=16,dense_layers=none", "decode"), Meter()
    decode(q[:, -1], store, method, context(store), meter)
    middle = store.middle(method)
    kept = method.select(q[:, -1], middle, store.index(method, q[:, -1], context(store)), context(store))
    rows = int(kept.count.sum()) + 2 * 20
    assert meter.stats().bytes_per_step == rows * 64 * 4 + 280 * 2 * 20 * 6 // 8


def test_a_step_is_one_token_of_one_sequence_over_all_layers():
    model = tiny("qwen3")
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    width = model.config.head_dim
    ids = torch.arange(1, 41).reshape(2, 20)  # none of them the padding token
    with attach(model) as sift:
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        cached = sum(20 + i for i in (1, 2, 3)) / 3
        assert sift.stats.bytes_per_step == layers * cached * heads * 2 * width * 4


@pytest.mark.parametrize("spec", SPECS)
def test_a_decode_error_is_that_of_the_output(spec):
    q, store = filled()
    meter = Meter(measure_error=True)
    out, _ = decode(q[:, -1], store, parse(spec, "decode"), context(store), meter)
    dense = dense_attention(q[:, -1:], store.view(), 32**-0.5)[:, 0]
    expected = ((out - dense).norm(dim=-1) / dense.norm(dim=-1)).mean()
    assert meter.stats().decode_error == pytest.approx(float(expected), rel=1e-4) and meter.stats().decode_error > 1e-3


def test_a_prefill_error_is_that_of_all_rows_and_zero_for_dense():
    q, store = filled()
    kv = KV.of(store.keys.transpose(1, 2), store.values.transpose(1, 2))
    dense = prefill(q, kv, parse("dense", "prefill"), context(store), meter := Meter(measure_error=True))[0]
    assert meter.stats().prefill_error == 0
    sparse = parse("streaming:sinks=16,window=16,block=16", "prefill")
    out = prefill(q, kv, sparse, context(store), meter := Meter(measure_error=True))[0]
    by_head = (out - dense).norm(dim=(1, 3)) / dense.norm(dim=(1, 3))
    assert (
        meter.stats().prefill_error == pytest.approx(float(by_head.mean()), rel=1e-4) and float(by_head.mean()) > 0.01
    )
    assert Meter().stats().prefill_error is None


# ---- how tokens are read ---------------------------------------------------------------------------------------------


def density(model, how, ids, cut, step):
    """Share of the triangle that prefill read when a prompt comes in two parts, the second as ``how`` says."""
    window = "streaming:sinks=16,window=16,block=16"
    with attach(model, prefill=window, decode="streaming:sinks=4,window=8") as sift:
        with sift.reading("sparse"):
            out = model(ids[:, :cut], use_cache=True)
        with sift.reading(how):
            for i in range(cut, ids.shape[1], step):
                out = model(ids[:, i : i + step], past_key_values=out.past_key_values, use_cache=True)
        return sift.stats, out.past_key_values.layers[0].store.prompt


def test_reading_says_what_is_prompt_and_which_method_reads_it():
    model = tiny("qwen3")
    ids = torch.randint(0, 64, (1, 160), generator=torch.Generator().manual_seed(0))
    sparse, prompt = density(model, "sparse", ids, 80, 80)
    assert prompt == 160 and sparse.prefill_density < 0.5 and sparse.kept_fraction is None
    dense, prompt = density(model, "dense", ids, 80, 80)
    assert prompt == 160 and dense.prefill_density > sparse.prefill_density + 0.3
    decoded, prompt = density(model, "decode", ids, 80, 1)
    assert prompt == 80 and decoded.kept_fraction < 0.2
    verified, prompt = density(model, "decode", ids, 80, 80)  # several at once: all keys
    assert prompt == 80 and verified.kept_fraction is None and verified.prefill_density == dense.prefill_density


def test_reading_ends_where_it_ends_and_refuses_other_words():
    model = tiny("qwen3")
    with attach(model) as sift:
        with pytest.raises(RuntimeError), sift.reading("decode"):
            raise RuntimeError
        assert sift.how is None
        with pytest.raises(ValueError, match="how=fast: choose sparse, dense or decode"), sift.reading("fast"):
            pass
