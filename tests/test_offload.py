"""A cache in host memory gives what the cache on the model's device gives, and says no before it overflows."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import keysift
import keysift.attention
from keysift.cache import Store
from keysift.offload import HOST, NEWEST, Copier, HostMemory, OffloadedStore
from keysift.ops.cpu.library import load
from tests.cpu.test_library import fail_next
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


BY_SIDES = (*SPECS[2:5], SPECS[2].replace("page=4", "page=64"))  # select without a look at keys
SELECT = [("cpu", spec) for spec in SPECS] + [("gpu", spec) for spec in BY_SIDES]  # "gpu" is where the model is


def generate(model, inputs, **options):
    options = {"max_new_tokens": 24, "do_sample": False, "min_new_tokens": 24, "pad_token_id": 0} | options
    return model.generate(**inputs, **options)


@pytest.mark.parametrize("pads", [(0,), RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize(("where", "spec"), SELECT)
def test_generation_gives_the_tokens_of_a_cache_on_the_device(where, spec, pads):
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(90, pads)
    with keysift.attach(model, decode=spec) as sift:
        expected, kept = generate(model, inputs), sift.stats.kept_fraction
    with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where) as sift:
        assert torch.equal(generate(model, inputs), expected)
        assert sift.stats.kept_fraction == pytest.approx(kept)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 23}, {"prefill_chunk_size": 89}])
def test_beams_and_chunks_too(options, where):
    model, inputs, spec = tiny("llama-llama3-rope-gqa"), prompt(90, RAGGED), SPECS[2]
    with keysift.attach(model, decode=spec):
        expected = generate(model, inputs, **options)
    with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
        assert torch.equal(generate(model, inputs, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("spec", BY_SIDES)
def test_side_data_on_the_device_are_those_beside_the_rows_and_take_no_memory_for_keys(spec):
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(90, RAGGED)
    caches = {where: keysift.KVCache(model.config) for where in ("cpu", "gpu")}
    for where, cache in caches.items():
        with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
            generate(
                model, inputs, past_key_values=cache, max_new_tokens=300, min_new_tokens=300
            )  # they outgrow a piece
    for beside, here in zip(*(cache.layers for cache in caches.values()), strict=True):
        if not hasattr(here, "offloaded"):
            continue
        host, side = beside.offloaded.host, here.offloaded.side
        assert here.offloaded.host._index == {} and beside.offloaded.side is None
        assert {side.k.untyped_storage().nbytes(), side.v.untyped_storage().nbytes()} == {side.k.element_size()}
        assert side.slots.lengths == host.slots.lengths and side.k.shape == here.offloaded.host.k.shape
        for name, x in host._index.items():
            assert torch.equal(x, side._index[name].cpu())


def test_a_method_that_ranks_keys_selects_where_they_are():
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(90, (0,))
    for spec in ("dense", *SPECS[5:]):
        with pytest.raises(ValueError, match="select_device=gpu: this method does not select by side data alone"):
            keysift.attach(model, decode=spec, kv_device="cpu", select_device="gpu")
    with keysift.attach(model, decode=SPECS[6], kv_device="cpu"):
        generate(model, inputs)


def test_a_cache_is_not_read_by_a_method_that_it_was_not_filled_for():
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(90, (0,))
    cache = keysift.KVCache(model.config)
    with keysift.attach(model, decode=SPECS[4], kv_device="cpu", select_device="gpu"):
        ids = generate(model, inputs, past_key_values=cache)
    step = {"input_ids": ids[:, -1:], "past_key_values": cache}
    for other in (SPECS[2], SPECS[4].replace("window=8", "window=40")):
        with (
            keysift.attach(model, decode=other, kv_device="cpu"),
            pytest.raises(ValueError, match="this cache was filled for another decode method"),
        ):
            model(**step)
    with keysift.attach(model, decode=SPECS[4], kv_device="cpu", seed=7):  # its codes are made anew, on the host
        model(**step)
    assert all(layer.offloaded.side is None for layer in cache.layers)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_tokens_that_were_verified_leave_pages_whole(where):
    """Several tokens at once, some of them taken back, and pages as long as what the device still holds."""
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(90, (0,))
    spec = BY_SIDES[-1]

    def verified():
        cache = DynamicCache(config=model.config)
        ids = generate(model, inputs, past_key_values=cache)
        for count in (13, 16, 9):
            more = ids[:, 5 : 5 + count]
            model(more, past_key_values=cache)
            cache.crop(-(count - 2))
        return torch.stack([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6)])

    with torch.inference_mode():
        with keysift.attach(model, decode=spec):
            expected = verified()
        with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
            assert torch.allclose(verified(), expected, atol=1e-4)


def test_caches_share_what_host_memory_they_may_take():
    memory = HostMemory(1000)
    memory.admit(600)
    with pytest.raises(MemoryError, match="host memory"):
        memory.admit(600)
    memory.give_back(600)
    memory.admit(900)


def test_where_rows_are_selected_is_one_of_three():
    model = tiny("llama-llama3-rope-gqa")
    with pytest.raises(ValueError, match="select_device=here: choose auto, gpu or cpu"):
        keysift.attach(model, kv_device="cpu", select_device="here")


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


@pytest.mark.parametrize(("where", "spec"), [("cpu", SPECS[2]), ("cpu", SPECS[5]), *(("gpu", s) for s in BY_SIDES)])
def test_rows_that_are_taken_back_are_forgotten_on_both_tiers(where, spec, monkeypatch):
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
    with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
        assert torch.equal(there_and_back(), expected)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_rows_that_left_the_window_leave_the_device(where, monkeypatch):
    monkeypatch.setattr("keysift.offload.NEWEST", 6)
    monkeypatch.setattr("keysift.offload.HELD", 8)
    model, inputs, spec = tiny("llama-llama3-rope-gqa"), prompt(90, RAGGED), SPECS[2]
    with keysift.attach(model, decode=spec):
        expected = generate(model, inputs)
    most = []
    drop_old = OffloadedStore.drop_old

    def watched(self):
        drop_old(self)
        most.append(self.near.length)

    monkeypatch.setattr(OffloadedStore, "drop_old", watched)
    with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
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


class Tracked:
    """How many stores there are."""

    def __init__(self, monkeypatch):
        self.alive = weakref.WeakSet()
        make = Store.__init__

        def noting(store, *args):
            make(store, *args)
            self.alive.add(store)

        monkeypatch.setattr(Store, "__init__", noting)

    def __len__(self):
        gc.collect()
        return len(self.alive)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_a_prompt_that_runs_out_of_memory_midway_leaves_nothing_and_harms_nobody(where, monkeypatch):
    model, inputs, spec = tiny("llama-llama3-rope-gqa"), prompt(90, RAGGED), SPECS[4]
    stores, prefill = Tracked(monkeypatch), keysift.attention.prefill
    others = [keysift.KVCache(model.config) for _ in range(2)]
    some = {"max_new_tokens": 12, "min_new_tokens": 12}

    def full(q, kv, method, ctx, *args, **options):
        if ctx.layer == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(q, kv, method, ctx, *args, **options)

    with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
        expected = generate(model, inputs)
        half, _ = (generate(model, inputs, past_key_values=other, **some) for other in others)
        rest = {"input_ids": half, "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 12).long()], 1)}
        undisturbed = generate(model, rest, past_key_values=others[0], **some)
        before = len(stores)
        with monkeypatch.context() as patch:
            patch.setattr("keysift.attention.prefill", full)
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                generate(model, inputs)
        assert len(stores) == before  # of the cache that was being made nothing is left
        assert torch.equal(generate(model, rest, past_key_values=others[1], **some), undisturbed)
        assert torch.equal(generate(model, inputs), expected)


@pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
@pytest.mark.parametrize(("kind", "error"), [(1, MemoryError), (2, RuntimeError), (3, MemoryError)])
def test_a_fault_in_a_worker_ends_one_request_with_one_error(kind, error):
    model, inputs, spec = tiny("llama-llama3-rope-gqa"), prompt(90, RAGGED), SPECS[4]
    with keysift.attach(model, decode=spec, kv_device="cpu"):
        expected = generate(model, inputs)
        cache = keysift.KVCache(model.config)
        generate(model, inputs, past_key_values=cache, max_new_tokens=2, min_new_tokens=2)
        step = {"input_ids": expected[:, 91:92], "past_key_values": cache}
        fail_next(kind)
        with pytest.raises(error, match="CPU kernels: "):
            model(**step)
        assert torch.equal(generate(model, inputs), expected)


@pytest.mark.soak
def test_memory_stays_as_it_is_over_two_thousand_requests():
    """Prompts of changing lengths and methods, each with a cache of its own; some fail midway."""
    model = tiny("llama-llama3-rope-gqa")
    sizes = []
    for request in range(2000):
        where, spec = SELECT[request % len(SELECT)]
        inputs = prompt(40 + request * 7 % 90, (0, 9))
        with keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
            if request % 10 == 3:
                with pytest.raises(ValueError, match="max_new_tokens"):
                    generate(model, inputs, max_new_tokens=-1)
            else:
                generate(model, inputs, max_new_tokens=3, min_new_tokens=3)
        if request % 100 == 99:
            gc.collect()
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
    assert max(sizes[-5:]) - max(sizes[4:8]) < 8, sizes  # MiB, once everything has been used
