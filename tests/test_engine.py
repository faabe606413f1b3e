"""The engine: whatever is in the batch, a request gets the tokens it gets alone, and memory comes back."""

import contextlib
import copy
import functools
import random

import pytest
import torch
from transformers import AutoTokenizer

import keysift
from keysift import LLM, SamplingParams, pocket
from keysift.eval.questions import read_prompt
from keysift.requests import QUESTIONS
from keysift.sampling import Sampler
from tests.tiny_models import MODELS, SIZES, build, tiny

PAGE, NAME = 16, "llama-llama3-rope-gqa"
ROW_BYTES = 3 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head dim, fp32
DECODE = {
    "dense": "dense",
    "signbits": "signbits:keep=0.2,window=8,dense_below=0",
    "quest": "quest:keep=0.3,page=4,window=8,dense_layers=none,dense_below=0",
    "snapkv": "snapkv:budget=30,window=8,dense_below=0",
    "magicpig": "magicpig:K=3,L=10,window=8,dense_below=0",
}
PREFILL = [
    "flexprefill:gamma=0.5,min_budget=16,block=16",
    "xattention:threshold=0.5,block=16",
    "minference:vertical=16,slash=32,block=16",
    "flashprefill:alpha=0.9,window_blocks=1,sink_blocks=1,last_rows=0,block=16",
]
NEEDS_POCKET = pytest.mark.skipif(
    not (pocket.path() / "model.safetensors").is_file(), reason="the checkpoint is not in this checkout"
)


def ids(tokens, seed=0):
    return torch.randint(1, SIZES["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def engine(model=None, **options):
    return LLM(model or tiny(NAME), **{"page": PAGE, "max_batch": 3, "max_length": 160, **options})


def new(tokens, **options):
    return SamplingParams(max_new_tokens=tokens, **options)


def some_fast(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def hf_greedy(model, prompt, tokens):
    """What transformers generates; of a model that is not served now."""
    inputs = torch.tensor([prompt])
    out = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@functools.cache
def expected(name, length, tokens):
    """The prompt of so many tokens, and what ``name`` generates after it."""
    prompt = ids(length, length)
    return prompt, hf_greedy(tiny(name), prompt, tokens)


def finish(llm):
    """Outputs of all submitted requests, by index."""
    done = {}
    while llm.unfinished:
        done |= {out.index: out for out in llm.step()}
    return done


def assert_all_is_free(llm):
    """Every page is free but page 0 and those of kept beginnings, which are let go."""
    assert llm.unfinished == 0
    assert llm.slots.lengths == [0] * len(llm.slots)
    if llm.prefixes is not None:
        llm.prefixes.clear()
    assert llm.slots.free_pages == llm.slots.pages - 1


def answers(outputs):
    return [(out.token_ids, out.finish_reason, out.logprobs) for out in outputs]


def some_requests(n, seed, most_new=10):
    """Prompts and settings of every kind."""
    draw = random.Random(seed)
    prompts = [ids(draw.randint(20, 120), draw.randrange(1 << 20)) for _ in range(n)]
    params = [
        SamplingParams(
            max_new_tokens=draw.randint(1, most_new),
            temperature=draw.choice([0.0, 0.0, 0.7, 1.3]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 5, 50]),
            min_p=draw.choice([0.0, 0.0, 0.1]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            seed=draw.randrange(1 << 40),
            stop_token_ids=tuple(draw.sample(range(97), draw.choice([0, 0, 3]))),
            logprobs=draw.choice([None, None, 0, 3]),
        )
        for _ in range(n)
    ]
    return prompts, params


@pytest.fixture(scope="module")
def shipped():
    """The pocket model with its tokenizer; one at a time has its attention."""
    with LLM(pocket.path(), page=PAGE, max_batch=2, max_length=256) as llm:
        yield llm


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk",
    [None, 23, pytest.param(7, marks=pytest.mark.slow)],
    ids=["whole", "chunks-of-23", "chunks-of-7"],
)
@pytest.mark.parametrize("name", some_fast(MODELS, (NAME, "qwen2", "gemma3")))
def test_greedy_tokens_are_those_of_generate(name, chunk):
    prompts, tokens = zip(*(expected(name, n, 9) for n in (1, 13, 70, 101)), strict=True)
    with engine(tiny(name), prefill_chunk=chunk) as llm:
        outputs = llm.generate(prompts, new(9))
        assert_all_is_free(llm)
    assert [out.token_ids for out in outputs] == [*tokens]
    assert {(out.finish_reason, out.text, out.logprobs) for out in outputs} == {("length", "", None)}
    assert len({token for own in tokens for token in own}) > 10


def check_any_batch(spec, n, seed, most_new, to_the_bit=True, **options):
    prompts, params = some_requests(n, seed, most_new)
    with engine(decode=spec, **options) as llm:
        together = llm.generate(prompts, params)
        assert_all_is_free(llm)
        alone = [llm.generate([prompt], x)[0] for prompt, x in zip(prompts, params, strict=True)]
        assert_all_is_free(llm)
    assert [out.index for out in together] == [*range(n)]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    if to_the_bit:
        assert answers(together) == answers(alone)


@pytest.mark.parametrize(
    ("method", "chunk"), [("dense", 19), ("signbits", None), ("signbits", 19), ("quest", 19), ("snapkv", 19)]
)
def test_requests_in_a_batch_get_the_tokens_they_get_alone(method, chunk):
    check_any_batch(DECODE[method], 9, 1, 9, prefill_chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, pytest.param(3, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "method", [m if m in ("dense", "quest") else pytest.param(m, marks=pytest.mark.soak) for m in DECODE]
)
def test_hundreds_of_requests_get_the_tokens_they_get_alone(method, seed):
    check_any_batch(DECODE[method], 200, seed, 15, max_batch=5, prefill_chunk=[None, 32][seed % 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "glm-4-9b", "mixtral"])
@pytest.mark.parametrize("method", ["dense", "quest"])
def test_requests_to_other_models_get_the_tokens_they_get_alone(name, method):
    whole = name != "mixtral"  # an expert's product is of as many rows as come to it, so its last bits may differ
    check_any_batch(DECODE[method], 30, 4, 30, whole, model=tiny(name), prefill_chunk=32)


def test_a_short_sequence_is_read_alike_beside_a_long_one():
    spec = "quest:keep=0.3,page=4,window=8,dense_layers=none,dense_below=80"
    with engine(decode=spec) as llm:
        alone = llm.generate([ids(40)], new(20, logprobs=0))[0]
        beside, _ = llm.generate([ids(40), ids(120, 1)], new(20, logprobs=0))
    assert answers([beside]) == answers([alone])
    assert beside.stats.kept_fraction == alone.stats.kept_fraction


def test_requests_wait_when_pages_are_few():
    prompts, params = some_requests(9, 5)
    with engine() as llm:
        roomy = llm.generate(prompts, params)
    with engine(kv_memory=13 * PAGE * ROW_BYTES) as llm:  # two short sequences or one that is long
        assert (llm.slots.free_pages, len(llm.slots)) == (12, 3)
        assert answers(llm.generate(prompts, params)) == answers(roomy)
        assert_all_is_free(llm)


def test_requests_submitted_late_join_the_batch():
    prompts, params = some_requests(6, 6)
    with engine() as llm:
        at_once = llm.generate(prompts, params)
        done, indices = {}, []
        for prompt, x in zip(prompts, params, strict=True):
            indices.append(llm.submit(prompt, x))
            for _ in range(4):
                done |= {out.index: out for out in llm.step()}
        done |= finish(llm)
        assert answers(done[i] for i in indices) == answers(at_once)
        assert llm.step() == []


def test_generate_leaves_the_outputs_of_submitted_requests_to_step():
    with engine() as llm:
        submitted = llm.submit(ids(20), new(2))
        llm.generate([ids(30)], new(12))
        assert [out.index for out in llm.step()] == [submitted]


# ---- the end of an answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(6))
def test_an_answer_ends_with_the_end_of_sequence_token(place, monkeypatch):
    prompt, tokens = expected(NAME, 40, 12)
    eos, place = tokens[place], tokens.index(tokens[place])
    monkeypatch.setattr(tiny(NAME).generation_config, "eos_token_id", [eos, 500])
    with engine() as llm:
        out, ignoring = llm.generate([prompt] * 2, [new(12), new(12, ignore_eos=True)])
        last = llm.generate([prompt], new(place + 1))[0]
    assert (out.token_ids, out.finish_reason) == (tokens[: place + 1], "eos")
    assert (ignoring.token_ids, ignoring.finish_reason) == (tokens, "length")
    assert (last.token_ids, last.finish_reason) == (tokens[: place + 1], "eos")


@pytest.mark.parametrize("place", [0, 1, 5])
def test_an_answer_ends_with_a_stop_token(place):
    prompt, tokens = expected(NAME, 40, 12)
    place = tokens.index(tokens[place])
    with engine() as llm:
        out = llm.generate([prompt], new(12, stop_token_ids=(tokens[place], 96), ignore_eos=True))[0]
    assert (out.token_ids, out.finish_reason) == (tokens[: place + 1], "stop")


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_an_answer_has_as_many_tokens_as_asked_for(tokens):
    with engine() as llm:
        out = llm.generate([ids(33)], new(tokens, temperature=1.0, logprobs=0))[0]
    assert (len(out.token_ids), out.finish_reason, len(out.logprobs)) == (tokens, "length", tokens)
    assert out.stats.new_tokens == tokens and out.stats.prompt_tokens == 33
    assert (out.stats.kept_fraction is None) == (tokens == 1)


def test_a_sequence_may_fill_its_room():
    prompt, tokens = expected(NAME, 52, 12)
    with engine(max_length=64) as llm:
        assert llm.generate([prompt], new(12))[0].token_ids == tokens
        assert llm.generate([prompt])[0].token_ids == tokens  # what fits


# ---- draws and logprobs ---------------------------------------------------------------------------------------------


def test_a_seed_gives_its_tokens_in_any_batch():
    prompt, seeds = ids(30), [3, 0, 1, 3, 2, 0]
    with engine() as llm:
        alone = [llm.generate([prompt], new(9, temperature=1.0, seed=seed))[0].token_ids for seed in range(4)]
        outputs = llm.generate([prompt] * 6, [new(9, temperature=1.0, seed=seed) for seed in seeds])
    assert [out.token_ids for out in outputs] == [alone[seed] for seed in seeds]
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_draws_are_the_samplers_by_seed_and_place():
    params = new(9, temperature=2.0, seed=11, repetition_penalty=1.3)
    with engine() as llm:
        tokens = llm.generate([ids(30)], params)[0].token_ids
    with torch.no_grad():
        logits = tiny(NAME)(torch.tensor([ids(30) + tokens])).logits[0, 29:-1]
    sampler = Sampler(1, SIZES["vocab_size"], torch.device("cpu"))
    sampler.begin(0, params, ids(30))
    assert [int(sampler.tokens(logits[i : i + 1], [0], [i])) for i in range(9)] == tokens


@pytest.mark.parametrize("chunk", [None, 16])
def test_logprobs_are_those_of_a_full_forward_pass(chunk):
    prompts = [ids(n, n) for n in (5, 47, 100)]
    with engine(prefill_chunk=chunk) as llm:
        outputs = llm.generate(prompts, [new(9, logprobs=k, temperature=t) for k, t in ((0, 0.0), (4, 1.5), (97, 0.0))])
    for prompt, out, top in zip(prompts, outputs, (0, 4, 97), strict=True):
        with torch.no_grad():
            logits = tiny(NAME)(torch.tensor([prompt + out.token_ids])).logits[0, len(prompt) - 1 : -1]
        for token, found, expected in zip(out.token_ids, out.logprobs, logits.log_softmax(-1), strict=True):
            assert found.token == pytest.approx(float(expected[token]), abs=1e-4)
            values, _ = expected.topk(top)
            assert [*found.top.values()] == pytest.approx(values.tolist(), abs=1e-4)
            assert [*found.top.values()] == pytest.approx([float(expected[i]) for i in found.top], abs=1e-4)


# ---- shared beginnings ----------------------------------------------------------------------------------------------


def reusing(method, **options):
    return engine(decode=DECODE[method], reuse_prefixes=True, **{"prefill_chunk": 32, **options})


@pytest.mark.parametrize("method", DECODE)
def test_a_found_beginning_gives_what_a_cold_run_gives(method):
    document = ids(70)
    prompts = [document + ids(n, n) for n in (1, 9, 30, 60)] + [document]
    params = new(8, logprobs=2)
    with reusing(method) as llm:
        cold = []
        for prompt in prompts:
            cold += llm.generate([prompt], params)
            llm.prefixes.clear()
        first = [llm.generate([prompt], params)[0] for prompt in prompts]
        again = llm.generate(prompts, params)
        assert_all_is_free(llm)
    assert answers(first) == answers(cold)
    assert answers(again) == answers(cold)
    assert [out.stats.reused_tokens for out in cold] == [0] * 5
    assert [out.stats.reused_tokens for out in first[:4]] == [0, 64, 64, 64]
    tail = 8 if method == "snapkv" else 1
    assert [out.stats.reused_tokens for out in again] == [(len(p) - tail) // 32 * 32 for p in prompts]


@pytest.mark.parametrize("method", ["dense", "quest", "snapkv"])  # the others centre keys by what may be shared
def test_reuse_chooses_keys_as_without_it(method):
    params = new(8, logprobs=0)
    with engine(decode=DECODE[method], prefill_chunk=32) as llm:
        without = llm.generate([ids(110)], params)
    with reusing(method) as llm:
        assert answers(llm.generate([ids(110)], params)) == answers(without)


def test_prompts_that_just_miss_a_beginning_are_read_whole():
    document = ids(70)
    with reusing("dense") as llm:
        llm.generate([document], new(1))
        other = [document[0] % 96 + 1, *document[1:]]
        out = llm.generate([other], new(5))[0]
    assert out.stats.reused_tokens == 0
    assert out.token_ids == hf_greedy(tiny(NAME), other, 5)


def test_a_prompt_shorter_than_its_observation_window_is_a_cold_run():
    with engine(decode="snapkv:budget=40,window=30,dense_below=0", reuse_prefixes=True, prefill_chunk=16) as llm:
        cold, again = (llm.generate([ids(28)], new(5))[0] for _ in range(2))
    assert again.stats.reused_tokens == 0
    assert again.token_ids == cold.token_ids


@pytest.mark.parametrize("method", some_fast(DECODE, ("signbits",)))
def test_beginnings_go_under_pressure_and_answers_stay(method):
    draw = random.Random(7)
    documents = [ids(100, 50 + i) for i in range(6)]
    prompts = [documents[draw.randrange(6)] + ids(draw.randint(1, 20), i) for i in range(13)]
    params = [new(draw.randint(1, 5), temperature=draw.choice([0.0, 1.0]), seed=i) for i in range(13)]
    with reusing(method, max_batch=2) as llm:  # room for two sequences: not for six documents
        cold = []
        for prompt, x in zip(prompts, params, strict=True):
            cold += llm.generate([prompt], x)
            llm.prefixes.clear()
        outputs = llm.generate(prompts, params)
        assert len(llm.prefixes) < 3 * len(documents)
        assert_all_is_free(llm)
    assert answers(outputs) == answers(cold)


def test_a_request_that_must_wait_keeps_the_beginning_it_will_use():
    document = ids(64)
    with reusing("dense", kv_memory=13 * PAGE * ROW_BYTES) as llm:
        llm.generate([[*document, 1]], new(1))
        llm.submit(ids(31, 1), new(70))
        llm.step()
        assert llm.slots.free_pages == 12 - 4 - 7
        waits = llm.submit(document + ids(30, 2), new(66))  # 10 pages, of which 4 are there
        done = finish(llm)
    assert done[waits].stats.reused_tokens == 64


def test_waiting_in_vain_drops_no_beginning():
    documents = [ids(32, 60 + i) for i in range(3)]
    with reusing("dense", kv_memory=17 * PAGE * ROW_BYTES) as llm:
        for document in documents:
            llm.generate([document], new(1))
        llm.submit(ids(31, 1), new(80))
        llm.step()
        assert llm.slots.free_pages == 16 - 6 - 7
        llm.submit(ids(20, 2), new(140))  # 10 pages: more than are free with all dropped
        llm.step()
        assert [len(llm.prefixes.find(document, 32)) for document in documents] == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "magicpig:mode=seed"}, "reuse_prefixes and mode=seed"),
        ({"prefill_chunk": 40}, "prefill_chunk=40: with reuse_prefixes, a multiple of page=16"),
        ({"page": 20}, "page=20: choose 16"),
    ],
)
def test_what_cannot_be_reused_is_refused(options, message):
    with pytest.raises(ValueError) as error:
        engine(reuse_prefixes=True, **options)
    assert message in str(error.value)
    assert tiny(NAME).config._attn_implementation == "sdpa"


# ---- text -----------------------------------------------------------------------------------------------------------

PROMPT = "VAR ABCDE = 12345 The grass is"


@NEEDS_POCKET
def test_deltas_add_up_to_the_text(shipped):
    deltas = []
    outputs = shipped.generate([PROMPT, "The sky is", PROMPT], [new(6), new(15), new(11)], on_text=deltas.append)
    for out in outputs:
        own = [delta for delta in deltas if delta.index == out.index]
        assert "".join(delta.text for delta in own) == out.text
        assert [token for delta in own for token in delta.token_ids] == out.token_ids
        assert [delta.finished for delta in own] == [False] * (len(own) - 1) + [True]
        assert out.text == shipped.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    assert outputs[2].text.startswith(outputs[0].text)
    assert outputs[0].text.startswith(" green.")


@NEEDS_POCKET
@pytest.mark.parametrize("stop", [(".",), ("sky is",), ("een", "sky"), (" green",), ("The sun", "The")])
def test_a_stop_string_ends_an_answer(shipped, stop):
    deltas = []
    whole = shipped.generate(PROMPT, new(15))[0]
    out = shipped.generate(PROMPT, new(15, stop=stop), on_text=deltas.append)[0]
    assert out.finish_reason == "stop"
    assert out.text == whole.text[: min(whole.text.index(s) for s in stop if s in whole.text)]
    assert "".join(delta.text for delta in deltas) == out.text
    assert out.token_ids == whole.token_ids[: len(out.token_ids)] and len(out.token_ids) < 15
    upto = shipped.tokenizer.decode(out.token_ids)
    assert any(s in upto for s in stop)
    assert not any(s in shipped.tokenizer.decode(out.token_ids[:-1]) for s in stop)


@NEEDS_POCKET
def test_a_stop_string_that_does_not_come_leaves_the_text_whole(shipped):
    whole = shipped.generate(PROMPT, new(9))[0]
    out = shipped.generate(PROMPT, new(9, stop=(whole.text[-4:] + "#", "@")))[0]
    assert (out.text, out.finish_reason) == (whole.text, "length")


@NEEDS_POCKET
def test_chat_answers_by_the_template(shipped):
    messages = [{"role": "user", "content": "The grass is"}]
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        shipped.chat(messages)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}The sky is"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped.tokenizer, "chat_template", template)
        out = shipped.chat(messages, new(8))
    ids = shipped.tokenizer("The grass is The sky is", add_special_tokens=False).input_ids
    assert out.token_ids == shipped.generate([ids], new(8))[0].token_ids


def test_chat_needs_a_tokenizer():
    with engine() as llm, pytest.raises(ValueError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "hello"}])


@NEEDS_POCKET
def test_a_loaded_model_takes_its_tokenizer(shipped):
    tokenizer = AutoTokenizer.from_pretrained(pocket.path())
    model = build("Llama", vocab_size=shipped.served.vocabulary)
    with engine(model, tokenizer=tokenizer) as llm:
        out = llm.generate("words", new(7, temperature=1.0))[0]
    assert out.text == tokenizer.decode(out.token_ids, skip_special_tokens=True)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([ids(5), ids(150)], new(11), "150 prompt tokens and max_new_tokens=11 need 161"),
        ([ids(5), ids(150)], new(11), "shorten the prompt to 149 tokens"),
        ([ids(5)], new(160), "choose fewer new tokens"),
        ([ids(5), ids(160)], None, "shorten the prompt to 159 tokens"),
        ([ids(5), []], new(1), "the prompt has no tokens"),
        ([ids(5), [3, 97, 4]], new(1), "the prompt has token 97, but the model knows 97 tokens"),
        ([ids(5), [3, -1]], new(1), "the prompt has token -1"),
        ([ids(5), ids(6)], [new(1)], "1 SamplingParams for 2 prompts"),
        ([ids(5), ids(6)], [new(1)] * 3, "3 SamplingParams for 2 prompts"),
        ([ids(5), "text"], new(1), "text needs a tokenizer"),
        ([ids(5), ids(6)], [new(1), new(1, stop=("x",))], "text needs a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_runs(prompts, params, message):
    deltas, before = [], expected(NAME, 5, 3)
    with engine() as llm:
        with pytest.raises(ValueError) as error:
            llm.generate(prompts, params, on_text=deltas.append)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert deltas == []
        assert_all_is_free(llm)
        prompt, tokens = before
        assert llm.generate([prompt], new(3))[0].token_ids == tokens


def test_no_prompts_no_answers():
    with engine() as llm:
        assert llm.generate([]) == []


def test_one_prompt_is_one_answer():
    with engine() as llm:
        assert answers(llm.generate(ids(20), new(4))) == answers(llm.generate([ids(20)], [new(4)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 161, "kv_memory": 11 * PAGE * ROW_BYTES}, "there is room for 160 tokens"),
        ({"max_length": None, "kv_memory": 2 * PAGE * ROW_BYTES - 1}, "not even one page of 16 tokens fits"),
        ({"max_length": None, "kv_memory": 0}, "not even one page"),
        ({"max_length": 0}, "max_length=0: choose 1 or more"),
        ({"max_batch": 0}, "max_batch=0: choose 1 or more"),
        ({"prefill_chunk": -1}, "prefill_chunk=-1: choose 1 or more"),
        ({"page": 8}, "page=8: choose 16"),
        ({"seed": -1}, "seed=-1"),
        ({"decode": "quest:keep=2"}, "keep=2"),
        ({"prefill": "nosuch"}, "nosuch"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError) as error:
        engine(**options)
    assert message in str(error.value)
    assert tiny(NAME).config._attn_implementation == "sdpa"


def test_sequences_are_as_long_as_memory_allows():
    with engine(max_length=None, kv_memory=11 * PAGE * ROW_BYTES) as llm:
        assert (llm.max_length, llm.slots.pages) == (160, 11)
        assert len(llm.generate([ids(150)], new(10))[0].token_ids) == 10
        assert_all_is_free(llm)
    with engine(max_length=None, kv_memory=300 * PAGE * ROW_BYTES) as llm:
        assert llm.max_length == 4096  # what the model was made for


# ---- aborts, exceptions, close --------------------------------------------------------------------------------------


def test_aborted_requests_give_memory_back_and_others_go_on():
    lengths = [90, 91, 92, 93, 94, 95]
    prompts, tokens = zip(*(expected(NAME, n, 9) for n in lengths), strict=True)
    with engine(prefill_chunk=32) as llm:
        indices = [llm.submit(prompt, new(9)) for prompt in prompts]
        for _ in range(7):
            llm.step()
        assert llm._work._reading is not None and len(llm._work.running) == 3
        gone = indices[0], llm._work.running[llm._work._reading].index, indices[5]  # running, being read, waiting
        cut = [llm.abort(i) for i in gone]
        assert [out.finish_reason for out in cut] == ["aborted"] * 3
        assert cut[0].token_ids and cut[0].token_ids == tokens[0][: len(cut[0].token_ids)]
        assert (cut[1].token_ids, cut[2].token_ids, cut[1].stats.ttft_s) == ([], [], None)
        assert [llm.abort(i) for i in (*gone, 99)] == [None] * 4
        done = finish(llm)
        assert {i: out.token_ids for i, out in done.items()} == {
            i: own for i, own in zip(indices, tokens, strict=True) if i not in gone
        }
        assert_all_is_free(llm)


@pytest.mark.parametrize("method", ["signbits", "snapkv"])
def test_a_slot_whose_prompt_was_half_read_begins_anew(method):
    with engine(decode=DECODE[method], prefill_chunk=32, max_batch=1) as llm:
        before = llm.generate([ids(100)], new(8, logprobs=0))
        aborted = llm.submit(ids(120, 1), new(8))
        llm.step()
        llm.step()
        llm.abort(aborted)
        assert answers(llm.generate([ids(100)], new(8, logprobs=0))) == answers(before)


class Hiccup(Exception):
    pass


@pytest.mark.parametrize("when", [1, 2, 5, 9])
def test_an_exception_in_on_text_leaves_the_engine_usable(when):
    calls = []

    def tell(delta):
        calls.append(delta)
        if len(calls) == when:
            raise Hiccup

    prompts = [ids(40, i) for i in range(5)]
    with engine() as llm:
        before = llm.generate(prompts, new(4))
        with pytest.raises(Hiccup):
            llm.generate(prompts, new(4), on_text=tell)
        assert_all_is_free(llm)
        assert answers(llm.generate(prompts, new(4))) == answers(before)


def test_an_on_text_that_always_raises_leaves_nothing_behind():
    def tell(delta):
        raise Hiccup

    with engine(copy.deepcopy(tiny(NAME))) as llm:
        with pytest.raises(Hiccup):
            llm.generate([ids(40, i) for i in range(5)], new(4), on_text=tell)
        assert_all_is_free(llm)


@pytest.mark.parametrize("when", [1, 2, 3, 6])
def test_an_exception_in_on_text_costs_others_no_token(when):
    calls = []

    def tell(delta):
        calls.append(delta)
        if len(calls) == when:
            raise Hiccup

    with engine() as llm:
        alone = llm.generate([ids(40)], new(9))[0].token_ids
        first = llm.submit(ids(50, 1), new(6), tell)
        other = llm.submit(ids(40), new(9))
        done = {}
        for _ in range(20):
            try:
                done |= {out.index: out for out in llm.step()}
            except Hiccup:
                llm.abort(first)
        assert done[other].token_ids == alone
        assert_all_is_free(llm)


def test_close_gives_the_model_back():
    model = copy.deepcopy(tiny(NAME))
    prompt, tokens = expected(NAME, 40, 12)
    llm = engine(model, decode=DECODE["quest"])
    assert model.config._attn_implementation != "sdpa"
    llm.submit(ids(20), new(5))
    llm.submit(ids(20), new(5))
    llm.step()
    llm.close()
    assert_all_is_free(llm)
    assert model.config._attn_implementation == "sdpa"
    assert not any("_keysift_where" in module.__dict__ for module in model.modules())
    assert hf_greedy(model, prompt, 12) == tokens
    llm.close()
    with keysift.attach(model):
        assert hf_greedy(model, prompt, 12) == tokens
    with engine(model) as again:
        assert again.generate([prompt], new(12))[0].token_ids == tokens
    assert hf_greedy(model, prompt, 12) == tokens


def test_close_gives_the_model_back_whatever_on_text_does():
    def tell(delta):
        raise Hiccup

    model = copy.deepcopy(tiny(NAME))
    llm = engine(model)
    llm.submit(ids(20), new(5), tell)
    with contextlib.suppress(Hiccup):
        llm.close()
    assert model.config._attn_implementation == "sdpa"


def test_a_closed_engine_gives_no_tokens():
    with engine() as llm:
        pass
    with pytest.raises(ValueError, match="close"):
        llm.generate([ids(20)], new(3))


def test_a_model_that_is_served_is_not_served_twice():
    model = copy.deepcopy(tiny(NAME))
    prompt, tokens = expected(NAME, 40, 12)
    with engine(model) as llm:
        with pytest.raises(ValueError):
            engine(model)
        assert llm.generate([prompt], new(12))[0].token_ids == tokens
    assert hf_greedy(model, prompt, 12) == tokens


# ---- sparse methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in DECODE if name != "dense"])
def test_sparse_decode_keeps_less_and_gives_the_tokens_of_attach(method):
    prompt, model = ids(120), tiny(NAME)
    with engine(decode=DECODE[method], seed=5) as llm:
        out = llm.generate([prompt], new(15))[0]
    with keysift.attach(model, decode=DECODE[method], seed=5) as sift:
        assert out.token_ids == hf_greedy(model, prompt, 15)
        assert out.stats.kept_fraction == pytest.approx(sift.stats.kept_fraction, rel=0.05)
    assert 0 < out.stats.kept_fraction < 0.95
    assert out.stats.prefill_density == 1


def test_dense_decode_keeps_all():
    with engine() as llm:
        out = llm.generate([ids(50)], new(5))[0]
    assert (out.stats.kept_fraction, out.stats.prefill_density) == (1, 1)


@pytest.mark.parametrize("decode", ["dense", "quest"])
@pytest.mark.parametrize("prefill", PREFILL)
def test_sparse_prefill_gives_the_tokens_of_attach(prefill, decode):
    prompts, model = [ids(150, 8), ids(90, 9)], tiny("qwen3")
    with engine(model, prefill=prefill, decode=DECODE[decode]) as llm:
        outputs = llm.generate(prompts, new(8))
    for prompt, out in zip(prompts, outputs, strict=True):
        with keysift.attach(model, prefill=prefill, decode=DECODE[decode]) as sift:
            assert out.token_ids == hf_greedy(model, prompt, 8)
            assert out.stats.prefill_density == pytest.approx(sift.stats.prefill_density)
    assert outputs[0].stats.prefill_density < 1


@pytest.mark.parametrize("prefill", ["flexprefill:block=16", "xattention", "minference", "flashprefill"])
def test_sparse_prefill_of_a_short_prompt_is_dense_or_nearly(prefill):
    with engine(prefill=prefill, decode=DECODE["signbits"], prefill_chunk=40) as llm:
        out = llm.generate([ids(120)], new(5))[0]
        assert_all_is_free(llm)
    assert 0 < out.stats.prefill_density <= 1
    assert out.stats.kept_fraction < 1


@NEEDS_POCKET
@pytest.mark.slow
@pytest.mark.parametrize(
    "prefill", ["flexprefill:block=16", "xattention", "minference:vertical=64,slash=256", "flashprefill"]
)
def test_sparse_prefill_reads_a_long_text_in_part(prefill):
    text = " ".join(f"VAR V{i} = {i * 7919 % 100_000}. The grass is green. The sky is blue." for i in range(120))
    with LLM(pocket.path(), prefill=prefill, decode="quest:dense_below=0", max_length=4096) as llm:
        out = llm.generate(text + " The grass is", new(5))[0]
    assert out.stats.prompt_tokens > 2000
    assert out.stats.prefill_density < 1
    assert out.text.startswith(" green.")


def test_stats_tell_times():
    with engine(max_batch=1) as llm:
        first, second = (out.stats for out in llm.generate([ids(40)] * 2, new(6)))
        one = llm.generate([ids(40)], new(1))[0].stats
    assert 0 < first.ttft_s < second.ttft_s  # which waited
    assert first.tokens_per_s > 0 and one.tokens_per_s is None


# ---- what goes wrong in the middle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupted_step_leaves_nothing_behind(at, monkeypatch):
    """Neither in slots that are free nor in answers that go on."""
    model = tiny("qwen2")
    prompts = [list(range(3, 3 + n)) for n in (40, 60, 25)]
    with LLM(model, max_batch=3, max_length=128, page=16) as llm:
        expected = [x.token_ids for x in llm.generate(prompts, SamplingParams(max_new_tokens=10))]
    with LLM(model, max_batch=3, max_length=128, page=16) as llm:
        survivor, calls = llm.submit(prompts[0], SamplingParams(max_new_tokens=10)), []
        attend = llm.served.attend

        def interrupted(layer, *args):
            calls.append(layer)
            if layer == 1 and sum(x == 1 for x in calls) == at:
                raise KeyboardInterrupt
            return attend(layer, *args)

        monkeypatch.setattr(llm.served, "attend", interrupted)
        out = []
        for _ in range(40):
            try:
                out += llm.step()
            except KeyboardInterrupt:
                assert llm.slots.length.tolist() == llm.slots.lengths
        assert [x.token_ids for x in out if x.index == survivor] == expected[:1]
        assert [x.token_ids for x in llm.generate(prompts, SamplingParams(max_new_tokens=10))] == expected


def test_an_answer_ends_where_its_listener_says_so():
    seen = []

    def listen(delta):
        seen.append(delta)
        return len(seen) < 4

    with LLM(tiny("qwen2"), max_batch=2, max_length=128, page=16) as llm:
        out = llm.generate([5] * 30, SamplingParams(max_new_tokens=20), on_text=listen)
        assert (out[0].finish_reason, len(out[0].token_ids)) == ("aborted", 4)
        assert [x.finished for x in seen] == [False] * 4 + [True]
        assert llm.generate([5] * 30, SamplingParams(max_new_tokens=20))[0].finish_reason == "length"


def test_rotary_embeddings_that_depend_on_the_batch_take_one_sequence_at_a_time():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("Llama", rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"\(dynamic\) depends on the longest sequence of a batch: one sequence"):
        LLM(model, max_batch=2, max_length=128, page=16)
    ids = list(range(1, 91))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 90:].tolist()
    with LLM(model, max_batch=1, max_length=128, page=16) as llm:
        assert llm.generate(ids, SamplingParams(max_new_tokens=8))[0].token_ids == expected


# ---- questions, and other methods -----------------------------------------------------------------------------------

NARROW = {"prefill": "streaming:sinks=1,window=4,block=16", "decode": "streaming:sinks=1,window=4"}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("tokens", [1, 28, 100])
@pytest.mark.parametrize("chunk", [None, 16])
def test_dense_methods_give_the_same_tokens_however_the_question_is_read(question, tokens, chunk):
    model, prompts = tiny("gemma3"), [ids(n, n) for n in (70, 57, 29)]
    expected = [hf_greedy(model, prompt, 8) for prompt in prompts]
    with engine(model, prefill_chunk=chunk) as llm:
        out = llm.generate(prompts, new(8, ignore_eos=True), question=question, question_tokens=tokens)
    assert [x.token_ids for x in out] == expected


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_the_question_is_read_as_asked_for(question, tokens):
    model, prompt = tiny("qwen3"), ids(70)
    inputs = torch.tensor([prompt])
    with keysift.attach(model, **NARROW) as link:
        logits = read_prompt(model, link, inputs, torch.ones_like(inputs), question, tokens)[0]
    with engine(model, **NARROW) as llm:
        alone = llm.generate(prompt, new(6, logprobs=97), question=question, question_tokens=tokens)[0]
        others = [llm.submit(ids(n, n), new(20)) for n in (40, 90)]
        among = llm.generate(prompt, new(6, logprobs=97), question=question, question_tokens=tokens)[0]
        assert [llm.abort(i) for i in others]
    top = alone.logprobs[0].top
    found = torch.tensor([top[i] for i in range(97)])
    assert torch.allclose(found, logits[0].log_softmax(-1), atol=1e-4)
    assert among.token_ids == alone.token_ids
    assert (alone.stats.kept_fraction < 0.2) and alone.stats.bytes_per_step > 0


def test_shared_prefixes_end_where_the_question_begins():
    document = ids(64)
    prompts = [document + ids(n, n) for n in (20, 31, 24)]
    asked = {"question": "dense", "question_tokens": 30}
    with engine(**NARROW) as llm:
        cold = [llm.generate(p, new(6), **asked)[0].token_ids for p in prompts]
        sparse = [llm.generate(p, new(6))[0].token_ids for p in prompts]
    with engine(**NARROW, reuse_prefixes=True, prefill_chunk=PAGE) as llm:
        asked_first = [llm.generate(p, new(6), **asked)[0] for p in prompts]
        assert [x.stats.reused_tokens for x in asked_first] == [0, 48, 48]
        llm.prefixes.clear()
        assert [llm.generate(p, new(6))[0].stats.reused_tokens for p in prompts] == [0, 64, 64]
        again = [llm.generate(p, new(6), **asked)[0].token_ids for p in prompts]
    assert cold != sparse and again == [x.token_ids for x in asked_first]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loud", 3), "question=loud: choose sparse, dense or decode"),
        (("dense", None), "question=dense needs question_tokens=N"),
        (("dense", 0), "question_tokens=0: choose 1 or more"),
    ],
)
def test_bad_questions_are_refused(arguments, message):
    with engine() as llm, pytest.raises(ValueError, match=message):
        llm.submit(ids(20), new(3), None, *arguments)


def test_errors_of_attention_are_measured_where_asked_for():
    with engine(**NARROW, measure_error=True) as llm:
        sparse = [x.stats for x in llm.generate([ids(70), ids(90, 1)], new(9))]
        llm.switch(prefill="dense", decode="dense")
        dense = llm.generate(ids(70), new(9))[0].stats
    with engine(**NARROW) as llm:
        unmeasured = llm.generate(ids(70), new(9))[0].stats
    model, inputs = tiny(NAME), torch.tensor([ids(70)])
    with keysift.attach(model, **NARROW) as link:
        link.reset_stats(measure_error=True)
        model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=9, do_sample=False)
        theirs = link.stats
    for field in ("prefill_density", "kept_fraction", "bytes_per_step", "prefill_error", "decode_error"):
        assert getattr(sparse[0], field) == pytest.approx(getattr(theirs, field), rel=1e-4), field
    assert dense.prefill_error == dense.decode_error == 0
    assert unmeasured.prefill_error is unmeasured.decode_error is None


def test_an_engine_switches_to_other_methods_and_lengths():
    prompts = [ids(n, n) for n in (40, 90)]

    def fresh(**options):
        with engine(**options) as llm:
            return [x.token_ids for x in llm.generate(prompts, new(9))]

    each = {"decode": DECODE["quest"]}, {"decode": DECODE["signbits"], "max_length": 120}, {}, NARROW
    expected = [fresh(**options) for options in each]
    with engine() as llm:
        for options, tokens in zip(each, expected, strict=True):
            llm.switch(**{"prefill": "dense", "decode": "dense", "max_length": 160, **options})
            assert [x.token_ids for x in llm.generate(prompts, new(9))] == tokens
        assert llm.max_length == 160
        llm.switch(max_length=200)
        assert llm.max_length == 200 and llm.served.decode_method == keysift.methods.parse(NARROW["decode"], "decode")
        index = llm.submit(prompts[0], new(9))
        with pytest.raises(ValueError, match="switch: 1 requests are at work; end them first"):
            llm.switch(decode="dense")
        llm.abort(index)
        with pytest.raises(ValueError, match="max_length=0: choose 1 or more"):
            llm.switch(max_length=0)


def test_a_switch_to_what_does_not_fit_leaves_all_as_it_was():
    with engine(kv_memory=20 * PAGE * ROW_BYTES, max_length=100) as llm:
        before = llm.generate(ids(80), new(9))[0].token_ids
        with pytest.raises(ValueError, match="max_length=400: one sequence needs"):
            llm.switch(decode=DECODE["signbits"], max_length=400)
        assert llm.max_length == 100
        assert llm.generate(ids(80), new(9))[0].token_ids == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_switch_that_is_interrupted_can_be_made_again(error, monkeypatch):
    with engine() as llm:
        expected = llm.generate(ids(80), new(9))[0].token_ids
        opened = llm.served.open
        with monkeypatch.context() as patch:
            calls = []

            def once(slots, **more):
                calls.append(slots)
                if len(calls) == 1:
                    raise error("not now")
                opened(slots, **more)

            patch.setattr(llm.served, "open", once)
            with pytest.raises(error):
                llm.switch(decode=DECODE["quest"])
        assert llm.generate(ids(80), new(9))[0].token_ids == expected
        llm.switch(decode=DECODE["quest"])
        assert llm.generate(ids(80), new(9))[0].stats.kept_fraction < 0.9


@pytest.mark.parametrize("method", ["signbits", "quest", "snapkv"])
def test_what_an_answer_read_does_not_depend_on_steps_while_its_prompt_was_read(method):
    found = []
    for others in (0, 1):
        with engine(decode=DECODE[method], prefill_chunk=PAGE, max_batch=2, measure_error=True) as llm:
            for i in range(others):
                llm.submit(ids(30, i + 1), new(40))
            found.append(llm.generate(ids(90), new(9))[0].stats)
    for field in ("kept_fraction", "bytes_per_step", "decode_error"):
        assert getattr(found[0], field) == pytest.approx(getattr(found[1], field), rel=1e-4), field
