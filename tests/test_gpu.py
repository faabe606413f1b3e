"""On a CUDA device everything gives what it gives on the CPU."""

import pytest
import torch
import transformers as hf

import keysift
from keysift.ops.random import normal, uniform
from tests.helpers import TOLERANCE, relative_error, structured_qkv
from tests.test_hf import SPARSE_DECODE, generate
from tests.test_methods import SPARSE
from tests.tiny_models import MODELS, prompt, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
RAGGED = (0, 13, 41)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def on_gpu(inputs):
    return {k: v.cuda() for k, v in inputs.items()}


def test_draws_are_those_of_the_cpu():
    address = torch.arange(10_000)
    assert torch.equal(uniform(3, address.cuda()).cpu(), uniform(3, address))
    assert torch.allclose(normal(3, address.cuda()).cpu(), normal(3, address), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("role", "name"), [(r, n) for r in SPARSE for n in ("dense", *SPARSE[r])])
def test_methods_give_what_they_give_on_the_cpu(role, name, dtype):
    q, k, v = (x.to(dtype) for x in structured_qkv(403, heads=8, batch=2))
    spec = SPARSE[role].get(name, name)
    if role == "decode":
        q = q[:, -1:]
        spec = spec if name == "dense" else f"{spec},dense_below=0"  # so few keys are read densely otherwise
    function = keysift.prefill_attention if role == "prefill" else keysift.decode_attention
    out, stats = function(q, k, v, spec, return_stats=True)
    gpu_out, gpu_stats = function(q.cuda(), k.cuda(), v.cuda(), spec, return_stats=True)
    assert gpu_out.device.type == "cuda"
    read = next(x for x in (stats.density, stats.kept_fraction) if x is not None)
    gpu_read = next(x for x in (gpu_stats.density, gpu_stats.kept_fraction) if x is not None)
    assert gpu_read == pytest.approx(read, rel=0.02)  # a score within rounding of a threshold may fall either way
    error = relative_error(gpu_out.cpu(), out)
    assert error < (0.1 if name == "magicpig" else max(TOLERANCE[dtype], 1e-3) * 2)


@pytest.mark.parametrize("name", MODELS)
def test_dense_generates_the_tokens_of_sdpa(name):
    model, inputs = tiny(name).cuda(), on_gpu(prompt(70, RAGGED))
    try:
        expected = generate(model, inputs)
        with keysift.attach(model):
            assert torch.equal(generate(model, inputs), expected)
            assert torch.equal(generate(model, inputs, prefill_chunk_size=23), expected)
    finally:
        model.cpu()


@pytest.mark.parametrize("spec", [f"{spec},dense_below=0" for spec in SPARSE_DECODE])
def test_sparse_decode_of_a_ragged_batch_equals_one_by_one(spec):
    model, inputs = tiny("qwen3").cuda(), on_gpu(prompt(70, RAGGED))
    try:
        with keysift.attach(model, decode=spec):
            together = generate(model, inputs)
            for b, pads in enumerate(RAGGED):
                alone = generate(model, {"input_ids": inputs["input_ids"][b : b + 1, pads:]})
                assert torch.equal(together[b, 70:], alone[0, 70 - pads :])
    finally:
        model.cpu()


def test_a_model_on_gpu_and_cpu_gives_the_same_tokens(tmp_path):
    model, inputs = tiny("qwen3"), prompt(70, RAGGED)
    model.save_pretrained(tmp_path)
    spread = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    spread |= {f"model.layers.{i}": "cpu" if i == 1 else 0 for i in range(3)}
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=spread, dtype=torch.float32)
    with keysift.attach(loaded):
        assert torch.equal(generate(loaded, on_gpu(inputs)).cpu(), generate(model, inputs))


def test_check_finds_nan_on_the_device():
    q, k, v = (x.cuda() for x in structured_qkv(40))
    q[0, 3, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="q holds NaN"):
        keysift.prefill_attention(q, k, v, check=True)
