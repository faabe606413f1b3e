"""Hugging Face decoders through keysift: dense gives torch SDPA's tokens, sparse keeps what it promises."""

import copy

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, StaticCache

import keysift
from keysift.cache import Store
from keysift.hf import SHORT_RUN
from keysift.methods import quest
from tests.helpers import close
from tests.tiny_models import HAS_FULL_ATTENTION, MODELS, SIZES, build, prompt, tiny

RAGGED = (0, 13, 41)
SPARSE_DECODE = [
    "streaming:sinks=2,window=12",
    "magicpig:K=3,L=10,window=8,dense_layers=none",
    "quest:keep=0.2,page=4,window=8,dense_layers=none",
    "topk:keep=0.1,window=8,dense_layers=none",
    "oracle:keep=0.2,window=8,dense_layers=none",
    "snapkv:budget=20,window=8",
]
SPARSE_PREFILL = [
    "streaming:sinks=2,window=16,block=16",
    "flexprefill:gamma=0.5,min_budget=16,block=16",
    "minference:vertical=16,slash=32,block=16",
    "xattention:threshold=0.5,block=16",
    "flashprefill:alpha=0.9,window_blocks=1,sink_blocks=1,last_rows=0,block=16",
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def slow_but_some(name):
    """Every model is tested; the fast ring takes one with everything, one with sliding windows and one with biases."""
    fast = name in ("llama-llama3-rope-gqa", "gemma3", "qwen2")
    return name if fast else pytest.param(name, marks=pytest.mark.slow)


SOME_FAST = [slow_but_some(name) for name in MODELS]


def generate(model, inputs, **options):
    torch.manual_seed(7)
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    return model.generate(**inputs, **options)


@pytest.mark.parametrize("name", SOME_FAST)
@pytest.mark.parametrize(
    "pads",
    [(0,), RAGGED, (13,), pytest.param((13, 13), marks=pytest.mark.slow)],
    ids=["batch-1", "ragged", "padded-1", "padded-2"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"num_beams": 3},
        {"prefill_chunk_size": 23},
        {"prefill_chunk_size": 7},
        {"use_cache": False, "max_new_tokens": 4},
    ],
    ids=["greedy", "sampling", "beams", "chunks", "chunks-of-padding", "no-cache"],
)
def test_dense_generates_the_tokens_of_sdpa(name, pads, options):
    model, inputs = tiny(name), prompt(70, pads)
    expected = generate(model, inputs, **options)
    with keysift.attach(model):
        assert model.config._attn_implementation == "keysift"
        out = generate(model, inputs, **options)
    assert torch.equal(out, expected)
    assert len(set(expected[0, 70:].tolist())) > 2  # a model that repeats one token would prove nothing
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", SOME_FAST)
def test_dense_logits_of_a_second_turn_over_the_same_cache_are_those_of_sdpa(name):
    model, inputs = tiny(name), prompt(90, RAGGED)
    first = {k: v[:, :60] for k, v in inputs.items()}

    def two_turns(cache):
        turn = generate(model, first, past_key_values=cache, max_new_tokens=6)
        ids = torch.cat([turn, inputs["input_ids"][:, 60:]], 1)
        mask = torch.cat([inputs["attention_mask"][:, :60], torch.ones(3, ids.shape[1] - 60, dtype=torch.long)], 1)
        return generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)

    expected = two_turns(DynamicCache(config=model.config))
    with keysift.attach(model):
        assert torch.equal(two_turns(DynamicCache(config=model.config)), expected)
        assert torch.equal(two_turns(keysift.KVCache(model.config)), expected)
        assert torch.equal(two_turns(DynamicCache()), expected)


@pytest.mark.parametrize("pads", [(13,), (13, 13), RAGGED])
@pytest.mark.parametrize("spec", SPARSE_PREFILL)
def test_padding_is_neither_read_nor_counted(spec, pads):
    model, inputs = tiny("qwen3"), prompt(150, pads)
    with keysift.attach(model, prefill=spec) as sift:
        logits = model(**inputs).logits
        padded = sift.stats.prefill_density
        sift.reset_stats()
        for b, p in enumerate(pads):
            assert close(logits[b, p:], model(inputs["input_ids"][b : b + 1, p:]).logits[0])
    assert sift.stats.prefill_density == pytest.approx(padded)
    assert padded < 1


@pytest.mark.parametrize("name", ["llama-llama3-rope-gqa", "gemma3"])
def test_a_registered_name_needs_no_attach(name, tmp_path):
    model, inputs = tiny(name), prompt(70, RAGGED)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="keysift", dtype=torch.float32)
    assert torch.equal(generate(loaded, inputs), generate(model, inputs))


def test_a_model_spread_by_device_map_gives_the_same_tokens(tmp_path):
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(70, RAGGED)
    model.save_pretrained(tmp_path / "model")
    spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    spread |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=spread, offload_folder=tmp_path / "off", dtype=torch.float32
    )
    assert len(set(loaded.hf_device_map.values())) > 1
    with keysift.attach(loaded):
        assert torch.equal(generate(loaded, inputs), generate(model, inputs))


@pytest.mark.parametrize("name", [slow_but_some(name) for name in HAS_FULL_ATTENTION])
@pytest.mark.parametrize("spec", ["quest:keep=0.3,page=4,window=8", "magicpig:K=3,L=10,window=8"])
def test_sparse_decode_runs_on_every_architecture_and_reads_less(name, spec):
    model, inputs = tiny(name), prompt(70, RAGGED)
    with keysift.attach(model, decode=spec + ",dense_layers=none") as sift:
        out = generate(model, inputs)
    assert out.shape == (3, 80)
    assert sift.stats.prefill_density == 1
    assert 0.1 < sift.stats.kept_fraction < 0.9


@pytest.mark.parametrize("spec", SPARSE_DECODE)
def test_sparse_decode_of_a_ragged_batch_equals_one_by_one(spec):
    model, inputs = tiny("qwen3"), prompt(70, RAGGED)
    with keysift.attach(model, decode=spec) as sift:
        together = generate(model, inputs)
        assert sift.stats.kept_fraction < 0.8
        for b, pads in enumerate(RAGGED):
            alone = generate(model, {"input_ids": inputs["input_ids"][b : b + 1, pads:]})
            assert torch.equal(together[b, 70:], alone[0, 70 - pads :])


@pytest.mark.parametrize("spec", SPARSE_PREFILL)
def test_sparse_prefill_of_a_ragged_batch_equals_one_by_one(spec):
    model, inputs = tiny("qwen3"), prompt(150, RAGGED)
    with keysift.attach(model, prefill=spec) as sift:
        together = model(**inputs).logits
        assert sift.stats.prefill_density < 0.95
        for b, pads in enumerate(RAGGED):
            assert close(together[b, pads:], model(inputs["input_ids"][b : b + 1, pads:]).logits[0])
    assert not close(together, model(**inputs).logits)  # the sparse regime differs from dense


@pytest.mark.parametrize("spec", SPARSE_PREFILL)
def test_padding_on_the_right_changes_nothing(spec):
    """A forward pass without generation, as scoring harnesses do."""
    model, inputs = tiny("qwen3"), prompt(150, RAGGED)
    flipped = {k: v.flip(1) for k, v in inputs.items()}
    with keysift.attach(model, prefill=spec):
        together = model(**flipped).logits
        for b, pads in enumerate(RAGGED):
            assert close(together[b, : 150 - pads], model(flipped["input_ids"][b : b + 1, : 150 - pads]).logits[0])


def test_dense_logits_with_padding_on_the_right_are_those_of_sdpa():
    model, inputs = tiny("gemma3"), {k: v.flip(1) for k, v in prompt(70, RAGGED).items()}
    expected = model(**inputs).logits
    with keysift.attach(model):
        out = model(**inputs).logits
    for b, pads in enumerate(RAGGED):
        assert close(out[b, : 70 - pads], expected[b, : 70 - pads])


@pytest.mark.parametrize("chunk", [16, *(pytest.param(c, marks=pytest.mark.slow) for c in (64, 69, 149))])
@pytest.mark.parametrize("decode", ["dense", *SPARSE_DECODE])
@pytest.mark.parametrize("prefill", ["dense", "streaming:sinks=2,window=16,block=16"])
def test_generation_from_chunks_equals_generation_from_the_whole_prompt(prefill, decode, chunk):
    """150 tokens in chunks of 149 leave one of a single token, which is still prompt."""
    if prefill != "dense" and chunk == 64:
        pytest.skip("covered by the other sizes")
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(150, (0, 30))
    with keysift.attach(model, prefill=prefill, decode=decode):
        whole = generate(model, inputs)
        assert torch.equal(generate(model, inputs, prefill_chunk_size=chunk), whole)


@pytest.mark.parametrize("chunk", [16, 48])
def test_xattention_in_chunks_of_whole_blocks_equals_whole(chunk):
    model, inputs = tiny("llama-llama3-rope-gqa"), prompt(150)
    with keysift.attach(model, prefill="xattention:threshold=0.5,block=16", decode="dense"):
        assert torch.equal(generate(model, inputs, prefill_chunk_size=chunk), generate(model, inputs))


@pytest.mark.parametrize("decode", SPARSE_DECODE)
@pytest.mark.slow
def test_beams_keep_their_side_data(decode, monkeypatch):
    """Long enough that beams cross and generated tokens leave the window: as if all side data were built afresh."""
    model, inputs = tiny("qwen3"), prompt(70, RAGGED)
    options = {"num_beams": 3, "max_new_tokens": 30, "do_sample": True, "temperature": 2.0}
    moved, select = [], Store.select
    monkeypatch.setattr(Store, "select", lambda store, rows: (moved.append(rows.tolist()), select(store, rows)))
    with keysift.attach(model, decode=decode):
        beams = generate(model, inputs, **options)
        if "snapkv" not in decode:  # its choice belongs to the prompt's end
            index = Store.index
            monkeypatch.setattr(Store, "index", lambda s, *a: (setattr(s, "_built_by", None), index(s, *a))[1])
        assert torch.equal(generate(model, inputs, **options), beams)
    assert any(rows != sorted(rows) for rows in moved)


@pytest.mark.parametrize("decode", SPARSE_DECODE)
def test_cache_operations_keep_side_data_in_step(decode):
    """Reorder, repeat, select, crop and copy of a cache in use give what an untouched run gives."""
    model, inputs = tiny("qwen3"), prompt(70, RAGGED)
    with keysift.attach(model, decode=decode):

        def start():
            cache = keysift.KVCache(model.config)
            model(**inputs, past_key_values=cache)
            return cache

        def step(cache, rows, token=5, more=0):
            mask = torch.cat([inputs["attention_mask"][rows], torch.ones(len(rows), 1 + more, dtype=torch.long)], 1)
            ids = torch.full((len(rows), 1), token)
            return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits

        rows = [0, 1, 2]
        plain = start()
        first = step(plain, rows)
        second = step(plain, rows, token=9, more=1)
        cache = start()
        assert close(step(cache, rows), first)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        copied = copy.deepcopy(cache)
        assert close(step(cache, [2, 0, 1], token=9, more=1), second[[2, 0, 1]])
        cache.crop(-1)
        assert cache.get_seq_length() == 71
        assert close(step(cache, [2, 0, 1], token=9, more=1), second[[2, 0, 1]])
        copied.batch_repeat_interleave(2)
        copied.batch_select_indices(torch.tensor([0, 3]))
        assert close(step(copied, [2, 0], token=9, more=1), second[[2, 0]])
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_rollback_into_the_prompt_rebuilds_side_data():
    model, inputs = tiny("qwen3"), prompt(70)
    with keysift.attach(model, decode="snapkv:budget=20,window=8"):
        cache = keysift.KVCache(model.config)
        model(**inputs, past_key_values=cache)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache.crop(-31)
        model(input_ids=inputs["input_ids"][:, 40:], past_key_values=cache)
        again = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
        fresh = keysift.KVCache(model.config)
        model(**inputs, past_key_values=fresh)
        assert close(again, model(input_ids=torch.tensor([[5]]), past_key_values=fresh).logits)


def test_assisted_generation_with_dense_methods_is_greedy():
    """Another model drafts; verification reads several tokens at once and rolls back."""
    model, helper, inputs = tiny("llama-llama3-rope-gqa"), tiny("llama-linear-rope-mha"), prompt(70)
    expected = generate(model, inputs, max_new_tokens=20)
    with keysift.attach(model), keysift.attach(helper):
        assert torch.equal(generate(model, inputs, assistant_model=helper, max_new_tokens=20), expected)


def test_short_runs_outside_a_prompt_are_read_densely():
    model, inputs = tiny("qwen3"), prompt(150)
    ids = inputs["input_ids"]
    with keysift.attach(model, prefill="streaming:sinks=2,window=16,block=16") as sift:
        for tokens, dense in ((SHORT_RUN, True), (SHORT_RUN + 1, False)):
            cache = keysift.KVCache(model.config)
            model(input_ids=ids[:, :100], past_key_values=cache)
            sift.reset_stats()
            model(input_ids=ids[:, 100 : 100 + tokens], past_key_values=cache)
            assert (sift.stats.prefill_density == 1) == dense


def test_the_cache_is_preallocated():
    """Decode steps write in place: the buffer moves a few times in many steps, not at each."""
    model, inputs = tiny("qwen3"), prompt(250)
    with keysift.attach(model):
        cache = keysift.KVCache(model.config)
        model(**inputs, past_key_values=cache)
        addresses = []
        for _ in range(40):
            model(input_ids=torch.tensor([[3]]), past_key_values=cache)
            addresses.append(cache.layers[0].keys.data_ptr())
        assert len(set(addresses)) <= 2
        assert cache.layers[0].keys.shape[2] == 290


def test_attachments_nest_and_leave_the_model_as_it_was():
    model, inputs = tiny("qwen3"), prompt(70)
    plain, state = generate(model, inputs), set(model.__dict__)
    spec = "streaming:sinks=1,window=4"
    with keysift.attach(model, decode=spec):
        sparse = generate(model, inputs)
        with keysift.attach(model) as inner:
            assert torch.equal(generate(model, inputs), plain)
            assert inner.stats.kept_fraction == 1
        assert torch.equal(generate(model, inputs), sparse)
    assert not torch.equal(sparse, plain)
    outer, inner = keysift.attach(model, decode=spec), keysift.attach(model)
    outer.detach()
    outer.detach()
    inner.detach()
    assert set(model.__dict__) == state
    assert model.config._attn_implementation == "sdpa"
    assert not any("_keysift" in m.__dict__ or m._forward_pre_hooks for m in model.modules())
    keysift.attach(model, decode=spec)
    keysift.attach(model)
    keysift.detach(model)
    keysift.detach(model)
    assert set(model.__dict__) == state
    assert torch.equal(generate(model, inputs), plain)


def test_seeds_change_draws_and_nothing_else():
    model, inputs = tiny("qwen3"), prompt(70)
    outs = []
    for seed in (1, 1, 2):
        with keysift.attach(model, decode="oracle:keep=0.1,window=4,dense_layers=none", seed=seed):
            cache = keysift.KVCache(model.config)
            model(**inputs, past_key_values=cache)
            outs.append(model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_masks_of_the_users_own_are_honoured_exactly():
    model, ids = tiny("qwen3"), prompt(40)["input_ids"]
    mask = torch.ones(40, 40, dtype=torch.bool).tril() & (torch.rand(40, 40) < 0.7) | torch.eye(40, dtype=torch.bool)
    expected = model(ids, attention_mask=mask[None, None]).logits
    with keysift.attach(model, prefill="streaming:sinks=2,window=16,block=16"):
        assert close(model(ids, attention_mask=mask[None, None]).logits, expected)


def test_packed_sequences_do_not_see_each_other():
    model, ids = tiny("qwen3"), prompt(40)["input_ids"]
    position_ids = torch.cat([torch.arange(25), torch.arange(15)])[None]
    expected = model(ids, position_ids=position_ids, use_cache=False).logits
    with keysift.attach(model):
        assert close(model(ids, position_ids=position_ids, use_cache=False).logits, expected)


def test_an_attached_assistant_drafts_sparsely_and_keeps_its_side_data(monkeypatch):
    model, helper, inputs = tiny("qwen3"), tiny("llama-linear-rope-mha"), prompt(70)
    built, begin = [], quest.Method.begin
    monkeypatch.setattr(quest.Method, "begin", lambda self, *args: (built.append(1), begin(self, *args))[1])
    expected = generate(model, inputs, max_new_tokens=20)
    with keysift.attach(helper, decode="quest:keep=0.2,page=4,window=8,dense_layers=none") as sift:
        assert torch.equal(generate(model, inputs, assistant_model=helper, max_new_tokens=20), expected)
        assert sift.stats.kept_fraction < 0.8
    assert len(built) == helper.config.num_hidden_layers


def test_a_cache_filled_before_attaching_is_read_sparsely():
    model, inputs = tiny("qwen3"), prompt(70)
    for decode in ("snapkv:budget=20,window=8", "magicpig:K=3,L=10,window=8,dense_layers=none,mode=seed"):
        kept = []
        for cache in (keysift.KVCache(model.config), DynamicCache(config=model.config)):
            model(**inputs, past_key_values=cache)
            with keysift.attach(model, decode=decode) as sift:
                model(input_ids=torch.tensor([[5]]), past_key_values=cache)
                kept.append(sift.stats.kept_fraction)
        assert kept[0] == pytest.approx(kept[1], abs=0.1)
        assert kept[0] < 0.8


def test_snapkv_without_the_prompts_queries_chooses_by_the_query_at_hand():
    """Not by position: ties of empty votes would keep the first keys."""
    model, inputs = tiny("qwen3"), prompt(70)
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    with keysift.attach(model, decode="snapkv:budget=20,window=8"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    rows = cache.layers[0].store._index["rows"]
    assert rows.shape == (1, 2, 12)
    assert rows.max() > 12


@pytest.mark.parametrize("decode", SPARSE_DECODE)
def test_a_cache_made_in_inference_mode_goes_on_in_generate(decode):
    model, inputs = tiny("qwen3"), prompt(70)
    with keysift.attach(model, decode=decode):
        cache = keysift.KVCache(model.config)
        with torch.inference_mode():
            model(input_ids=inputs["input_ids"][:, :60], past_key_values=cache)
            model(input_ids=inputs["input_ids"][:, 60:61], past_key_values=cache)
        assert generate(model, inputs, past_key_values=cache, max_new_tokens=12).shape == (1, 82)


def test_copies_of_an_attached_model_are_refused():
    model = build("Qwen3")
    with keysift.attach(model), pytest.raises(ValueError, match=r"keysift.detach\(model\) before copying"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_detach_restores_the_attention_of_every_part():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {**SIZES, "sliding_window": 24}
    model = hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision))
    model.set_attn_implementation({"vision_config": "eager"})

    def parts():
        return [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]

    before = parts()
    assert len(set(before)) == 2
    with keysift.attach(model):
        assert model.config.text_config._attn_implementation == "keysift"
    assert parts() == before


def test_values_rearranged_after_the_cache_are_refused():
    """Also where the kind of model is not known beforehand."""
    model = build("DiffLlama")
    with pytest.raises(ValueError, match="rearranges cached keys"):
        keysift.attach(model)
    model.set_attn_implementation("keysift")
    with pytest.raises(ValueError, match="rearranges cached keys or values"):
        generate(model, prompt(70), past_key_values=keysift.KVCache(model.config))


@pytest.mark.parametrize(
    ("pattern", "config", "spec"),
    [
        ("default", None, "dense"),
        ("flash", {}, "dense"),
        ("streaming_llm", {"global_window": 8, "local_window": 64}, "streaming:sinks=8,window=64"),
        ("minfer", None, "minference:vertical=1000,slash=6096"),
        ("vertical_slash", {"vertical_size": 256}, "minference:vertical=256,slash=8192"),
        (
            "flex_prefill",
            {
                "block_size": 64,
                "flex_prefill_gamma": 0.8,
                "flex_prefill_max_budget": None,
                "flex_prefill_min_budget": 512,
            },
            "flexprefill:gamma=0.8,min_budget=512,block=64",
        ),
    ],
)
def test_patch_model_takes_flexprefills_spelling(pattern, config, spec):
    model = tiny("qwen3")
    with keysift.patch_model(model, pattern, config) as sift:
        assert sift.prefill == keysift.methods.parse(spec, "prefill")


@pytest.mark.parametrize(
    ("pattern", "config", "message"),
    [
        ("flex", None, "pattern 'flex' unknown: choose default"),
        ("flex_prefill", {"gamma": 0.9}, "flex_prefill has no option 'gamma': choose block_size, flex_prefill_gamma"),
        ("flex_prefill", {"flex_prefill_gamma": 0}, "gamma=0.0: must be above 0"),
        ("flash", {"block_size": 64}, "flash has no option 'block_size': choose none"),
    ],
)
def test_patch_model_refuses_what_it_does_not_know(pattern, config, message):
    with pytest.raises(ValueError) as error:
        keysift.patch_model(tiny("qwen3"), pattern, config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def unsupported():
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    yield "softcap", lambda: build("Gemma2", attn_logit_softcapping=50.0), "softcap"
    yield "sinks", lambda: build("GptOss", num_local_experts=2, num_experts_per_tok=1), "attention sinks as parameters"
    yield (
        "bloom",
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=32, hidden_size=32, n_layer=1, n_head=2)),
        "interface",
    )
    yield "falcon", lambda: hf.FalconForCausalLM(hf.FalconConfig(**small, alibi=True)), "interface"
    yield (
        "mamba",
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1)),
        "no attention",
    )
    yield "bert", lambda: hf.BertModel(hf.BertConfig(**small, intermediate_size=32)), "encoder"
    yield (
        "t5",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        ),
        "encoder-decoder",
    )
    yield "linear", lambda: torch.nn.Linear(2, 2), "not a transformers model"


@pytest.mark.parametrize(("make", "reason"), [u[1:] for u in unsupported()], ids=[u[0] for u in unsupported()])
def test_unsupported_models_are_refused_by_name_when_attaching(make, reason):
    model = make()
    with pytest.raises(ValueError, match=reason) as error:
        keysift.attach(model)
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)
    assert "_keysift" not in model.__dict__


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"cache_implementation": "offloaded"}, "offloaded cache"),
        ({"past_key_values": "static"}, "StaticCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
    ids=["static", "offloaded", "static-object", "attentions"],
)
def test_unsupported_caches_and_outputs_are_refused_by_name(options, reason):
    model = tiny("qwen3")
    if options.get("past_key_values") == "static":
        options = {"past_key_values": StaticCache(config=model.config, max_cache_len=90)}
    with keysift.attach(model), pytest.raises(ValueError, match=reason):
        generate(model, prompt(70), **options)


def test_a_generation_config_that_asks_for_a_static_cache_is_refused_when_attaching():
    model = build("Llama")
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="static cache"):
        keysift.attach(model)


def test_softcap_and_sink_arguments_are_refused_without_attach_too():
    for family, reason in (("Gemma2", "softcap"), ("GptOss", "s_aux")):
        options = {} if family == "Gemma2" else {"num_local_experts": 2, "num_experts_per_tok": 1}
        model = build(family, **options)
        model.set_attn_implementation("keysift")
        with pytest.raises(ValueError, match=reason):
            model(prompt(20)["input_ids"])


def test_a_hole_in_the_attention_mask_is_refused():
    model, inputs = tiny("qwen3"), prompt(40)
    inputs["attention_mask"][0, 20] = 0
    with keysift.attach(model), pytest.raises(ValueError, match="sequence 0 has a hole"):
        model(**inputs)
    padded = {k: v.flip(1) for k, v in prompt(40, (5,)).items()}
    with keysift.attach(model), pytest.raises(ValueError, match="pad on the left"):
        generate(model, padded)


def test_training_dropout_is_refused():
    model = build("Qwen3", attention_dropout=0.1).train()
    with keysift.attach(model), pytest.raises(ValueError, match="for inference"):
        model(prompt(20)["input_ids"])


def test_wrong_methods_are_refused_and_leave_the_model_alone():
    model = tiny("qwen3")
    with pytest.raises(ValueError, match="unknown: choose"):
        keysift.attach(model, decode="nonesuch")
    with pytest.raises(ValueError, match="seed='x'"):
        keysift.attach(model, seed="x")
    assert "_keysift" not in model.__dict__
