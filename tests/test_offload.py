"""A cache in host memory gives what the cache on the model's device gives, and says no before it overflows."""

import pytest
import torch
from transformers import DynamicCache

import keysift
from keysift.offload import HOST, NEWEST, Copier, HostMemory, OffloadedStore
from tests.devices import CUDA
from tests.tiny_models import prompt, tiny

RAGGED = (0, 9, 31)
SPECS = (
    "dense",
    "streaming:sinks=2,window=12,dense_below=0",
    "quest:keep=0.3,page=4,window=8,dense_layers=0,dense_below=0",
    "magicpig:K=3,L=10,window=8,dense_layers=1,dense_below=0",
    "signbits:keep=0.3,window=8,dense_layers=none,dense_below=0",
    "snapkv:budget=20,window=8,dense_below=0",
    "topk:keep=0.2,window=8,dense_layers=none,dense_below=0,top_p=0.9",
)


def generate(model, inputs, **options):
    options = {"max_new_tokens": 24, "do_sample": False, "min_new_tokens": 24, "pad_token_id": 0} | options
    return model.generate(**inputs, **options)


@pytest.mark.parametrize("pads", [(0,), RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("spec", SPECS)
def test_generation_gives_the_tokens_of_a_cache_on_the_device(spec, pads):
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(90, pads)
    with keysift.attach(model, decode=spec) as sift:
        expected, kept = generate(model, inputs), sift.stats.kept_fraction
    with keysift.attach(model, decode=spec, kv_device="cpu") as sift:
        assert torch.equal(generate(model, inputs), expected)
        assert sift.stats.kept_fraction == pytest.approx(kept)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 23}, {"prefill_chunk_size": 89}])
def test_beams_and_chunks_too(options):
    model, inputs, spec = tiny("llama-llama3-rope-gqa"), prompt(90, RAGGED), SPECS[2]
    with keysift.attach(model, decode=spec):
        expected = generate(model, inputs, **options)
    with keysift.attach(model, decode=spec, kv_device="cpu"):
        assert torch.equal(generate(model, inputs, **options), expected)


def test_layers_with_a_window_of_their_own_stay_where_they_are():
    model, inputs, spec = tiny("gemma3"), prompt(90, RAGGED), "quest:keep=0.3,page=4,window=8,dense_below=0"
    with keysift.attach(model, decode=spec):
        expected = generate(model, inputs)
    with keysift.attach(model, decode=spec, kv_device="cpu"):
        assert torch.equal(generate(model, inputs), expected)


def test_a_second_turn_reads_the_first():
    model, inputs, spec = tiny("qwen3"), prompt(90, (0,)), "quest:keep=0.5,page=4,window=8,dense_below=0"

    def two_turns(cache):
        first = generate(model, {k: v[:, :60] for k, v in inputs.items()}, past_key_values=cache, max_new_tokens=6)
        ids = torch.cat([first, inputs["input_ids"][:, 60:]], 1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, both, past_key_values=cache)

    with keysift.attach(model, decode=spec):
        expected = two_turns(keysift.KVCache(model.config))
        filled = keysift.KVCache(model.config)
        generate(model, inputs, past_key_values=filled, max_new_tokens=1)
    with keysift.attach(model, decode=spec, kv_device="cpu"):
        assert torch.equal(two_turns(DynamicCache(config=model.config)), expected)
        assert torch.equal(two_turns(keysift.KVCache(model.config)), expected)
        twice = {name: torch.cat([x, x], 1) for name, x in inputs.items()}
        with pytest.raises(ValueError, match="kv_device=cpu: the cache holds rows already; begin with an empty one"):
            generate(model, twice, past_key_values=filled, max_new_tokens=1)
        assert [layer.get_seq_length() for layer in filled.layers] == [90] * len(filled.layers)  # nothing is lost
        with pytest.raises(ValueError, match=r"kv_device=cpu: make the cache with the model's config"):
            generate(model, inputs, past_key_values=DynamicCache())


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[5]])
def test_rows_that_are_taken_back_are_forgotten_on_both_tiers(spec, monkeypatch):
    monkeypatch.setattr("keysift.offload.NEWEST", 6)
    model, inputs = tiny("qwen3"), prompt(90, (0,))

    def there_and_back():
        cache = DynamicCache(config=model.config)
        ids = generate(model, inputs, past_key_values=cache)
        cache.crop(-19)
        again = ids[:, : cache.get_seq_length() + 1]
        return generate(model, {"input_ids": again, "attention_mask": torch.ones_like(again)}, past_key_values=cache)

    with keysift.attach(model, decode=spec):
        expected = there_and_back()
    with keysift.attach(model, decode=spec, kv_device="cpu"):
        assert torch.equal(there_and_back(), expected)


def test_rows_that_left_the_window_leave_the_device(monkeypatch):
    monkeypatch.setattr("keysift.offload.NEWEST", 6)
    model, inputs, spec = tiny("llama-llama3-rope-gqa"), prompt(90, RAGGED), SPECS[2]
    with keysift.attach(model, decode=spec):
        expected = generate(model, inputs)
    most = []
    drop_old = OffloadedStore.drop_old

    def watched(self, method):
        drop_old(self, method)
        most.append(self.near.length)

    monkeypatch.setattr(OffloadedStore, "drop_old", watched)
    with keysift.attach(model, decode=spec, kv_device="cpu"):
        assert torch.equal(generate(model, inputs), expected)
    assert min(most) >= 12 and max(most) <= 4 + 8 + 6 and NEWEST > 6


def test_a_prompt_that_has_no_room_is_refused_before_it_is_read():
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(90, (0,))
    with keysift.attach(model, decode=SPECS[2], kv_device="cpu", host_memory=10_000) as sift:
        with pytest.raises(MemoryError, match=r"need 0\.00 GiB of host memory, and 0\.00 GiB may be used: shorten"):
            generate(model, inputs)
        assert sift.stats.prefill_density is None
    with keysift.attach(model, decode=SPECS[2], kv_device="cpu", host_memory=10_000_000):
        generate(model, inputs)


def test_what_cannot_be_meant_is_refused():
    model = tiny("llama-llama3-rope-gqa")
    with pytest.raises(ValueError, match="kv_device=disk: choose gpu or cpu"):
        keysift.attach(model, kv_device="disk")
    with pytest.raises(ValueError, match="host memory of 0 bytes: choose 1 or more"):
        keysift.attach(model, kv_device="cpu", host_memory=0)
    assert HostMemory().limit > 0 if HostMemory().limit else True


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
def test_copies_arrive_whole_however_large(monkeypatch):
    monkeypatch.setattr("keysift.offload.STAGED_BYTES", 1 << 12)
    copier = Copier()
    tensors = [torch.randn(n, 33, device="cuda") for n in (1, 500, 3000)]
    copies = [copier.copy(x) for x in tensors]
    copier.mark()
    copier.wait()
    for x, y in zip(tensors, copies, strict=True):
        assert y.device == HOST and torch.equal(x.cpu(), y)
