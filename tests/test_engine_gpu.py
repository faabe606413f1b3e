"""The engine on GPUs: compiled steps in graphs round as the model's own code does, alone and together."""

import copy
import logging
import math
import random

import pytest
import torch

from keysift import LLM, SamplingParams, pocket
from tests.tiny_models import MODELS, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
NEEDS_POCKET = pytest.mark.skipif(
    not (pocket.path() / "model.safetensors").is_file(), reason="the checkpoint is not in this checkout"
)
VOCABULARY, NEW = 97, 24


@pytest.fixture(scope="module", autouse=True)
def _models_of_others_stay_on_the_cpu():
    yield
    tiny.cache_clear()  # of models that moved to the GPU


def random_prompts(count, lengths=(20, 57, 119)):
    draw = random.Random(0)
    return [[draw.randrange(1, VOCABULARY) for _ in range(draw.choice(lengths))] for _ in range(count)]


def ulp(x):
    """Of bfloat16."""
    return 2.0 ** (math.floor(math.log2(max(abs(x), 1e-9))) - 7)


def gap_where_they_part(model, prompt, tokens):
    """Between the two logits, in units in the last place, where transformers' greedy tokens part from these; None if
    they do not."""
    inputs = torch.tensor([prompt], device="cuda")
    theirs = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=len(tokens),
        min_new_tokens=len(tokens),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for token, other, logits in zip(tokens, theirs.sequences[0, len(prompt) :].tolist(), theirs.logits, strict=True):
        if token != other:
            a, b = float(logits[0, token]), float(logits[0, other])
            return abs(a - b) / ulp(max(abs(a), abs(b)))
    return None


@pytest.mark.parametrize("name", MODELS)
def test_tokens_part_from_transformers_only_where_two_logits_are_as_good_as_equal(name):
    model = tiny(name).bfloat16().cuda()
    prompts, params = random_prompts(20), SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    with LLM(model, max_batch=4, max_length=160, page=16) as llm:
        answers = llm.generate(prompts, params)
        assert llm.served.compiled and llm.served.graphed
        alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts[:5]]
    assert [x.token_ids for x in answers[:5]] == alone
    gaps = [gap_where_they_part(model, p, x.token_ids) for p, x in zip(prompts, answers, strict=True)]
    parted = sorted(gap for gap in gaps if gap is not None)
    logging.getLogger(__name__).info("%s: %d answers of %d part, at ulps of %s", name, len(parted), len(gaps), parted)
    assert len(parted) <= 8 and sum(gap > 2 for gap in parted) <= 1


@pytest.mark.parametrize("name", MODELS)
def test_drafts_part_from_plain_steps_only_where_two_logits_are_as_good_as_equal(name):
    """In bfloat16, where a pass over several tokens rounds otherwise than a step."""
    model = tiny(name).bfloat16().cuda()
    prompts, params = random_prompts(20), SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    options = {"max_batch": 4, "max_length": 160, "page": 16}
    with LLM(model, **options) as llm:
        plain = [x.token_ids for x in llm.generate(prompts, params)]
    with LLM(model, draft="quest:keep=0.3,page=4,window=8,dense_below=0", gamma=3, **options) as llm:
        drafted = [x.token_ids for x in llm.generate(prompts, params)]
    parted = []
    for prompt, tokens, others in zip(prompts, plain, drafted, strict=True):
        if (at := next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), None)) is None:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:at]], device="cuda")).logits[0, -1]
        a, b = float(logits[tokens[at]]), float(logits[others[at]])
        parted.append(abs(a - b) / ulp(max(abs(a), abs(b))))
    parted.sort()
    logging.getLogger(__name__).info("%s: %d answers of %d part, at ulps of %s", name, len(parted), len(plain), parted)
    assert len(parted) <= 8 and sum(gap > 2 for gap in parted) <= 1


@pytest.mark.parametrize("decode", ["signbits:keep=0.2,window=8,dense_below=0", "quest:keep=0.3,page=4,window=8"])
def test_sampled_requests_get_the_tokens_they_get_alone(decode):
    model, draw = tiny("qwen3").bfloat16().cuda(), random.Random(1)
    requests = [
        (p, SamplingParams(max_new_tokens=draw.randrange(5, 30), temperature=draw.choice([0, 0.8]), top_p=0.9, seed=i))
        for i, p in enumerate(random_prompts(24, (20, 57, 90, 130)))
    ]
    with LLM(model, decode=decode, max_batch=4, max_length=256, page=16) as llm:
        together = llm.generate([p for p, _ in requests], [s for _, s in requests])
        alone = [llm.generate(p, s)[0] for p, s in requests]
    assert [x.token_ids for x in together] == [x.token_ids for x in alone]


def test_every_answer_says_what_it_read_and_a_counted_step_gives_the_same_tokens():
    tiny.cache_clear()  # other tests have moved it
    prompts, params = random_prompts(9), SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    options = {"decode": "quest:keep=0.3,page=4,window=8,dense_layers=none,dense_below=0", "page": 16}
    with LLM(tiny("qwen3"), max_batch=1, max_length=160, **options) as llm:
        on_cpu = llm.generate(prompts, params)
    tiny.cache_clear()
    model, found = tiny("qwen3").cuda(), {}
    for every in (1, 64):
        with LLM(model, max_batch=3, max_length=160, count_every=every, **options) as llm:
            found[every] = llm.generate(prompts, params)
    assert [x.token_ids for x in found[1]] == [x.token_ids for x in found[64]]
    for all_steps, some, expected in zip(found[1], found[64], on_cpu, strict=True):
        assert all_steps.stats.kept_fraction == pytest.approx(expected.stats.kept_fraction, rel=1e-3)
        assert all_steps.stats.bytes_per_step == pytest.approx(expected.stats.bytes_per_step, rel=1e-3)
        assert some.stats.kept_fraction == pytest.approx(expected.stats.kept_fraction, rel=0.5)


@pytest.mark.parametrize(
    "draft", ["dense", "quest:keep=0.3,page=4,window=8,dense_below=0", "snapkv:budget=30,window=8"]
)
def test_rounds_of_speculation_are_graphs_and_give_greedy_tokens_of_plain_steps(draft):
    tiny.cache_clear()
    model, prompts = tiny("qwen3").cuda(), random_prompts(12)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 5, NEW, 60) * 3]
    with LLM(model, max_batch=4, max_length=200, page=16) as llm:
        expected = [x.token_ids for x in llm.generate(prompts, params)]
    for gamma, refresh in ((3, "verify"), (None, "verify"), (3, "never")):
        with LLM(model, draft=draft, gamma=gamma, refresh=refresh, max_batch=4, max_length=200, page=16) as llm:
            assert [x.token_ids for x in llm.generate(prompts, params)] == expected
            assert llm.served.compiled and llm.served.graphed
            assert gamma is None or any(name[0] == "round" for name in llm.served._graphs)


@pytest.mark.parametrize("cache", ["streaming:budget=64", "snapkv:window=8,budget=64"])
def test_a_draft_model_is_part_of_the_graph_and_gives_greedy_tokens_of_plain_steps(cache):
    tiny.cache_clear()
    model, other, prompts = tiny("qwen3").cuda(), tiny("llama-llama3-rope-gqa").cuda(), random_prompts(12)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 5, NEW, 60) * 3]
    with LLM(model, max_batch=4, max_length=200, page=16) as llm:
        expected = [x.token_ids for x in llm.generate(prompts, params)]
    for draft_model in (other, copy.deepcopy(model)):
        options = {"draft": cache, "max_batch": 4, "max_length": 200, "page": 16}
        for gamma in (3, None):
            with LLM(model, draft_model=draft_model, gamma=gamma, **options) as llm:
                out = llm.generate(prompts, params)
                assert [x.token_ids for x in out] == expected
                assert llm.served.compiled and llm.served.graphed
                if gamma is not None:
                    assert llm._drafter.served.compiled
                    assert any(name[0] == "round" for name in llm.served._graphs)
                rates = [x.stats.accepted_per_round for x in out if x.stats.new_tokens > 5]
            assert gamma is None or draft_model is other or sum(rates) / len(rates) > 1


def test_an_engine_switches_methods_and_lengths_between_graphs():
    model, prompts = tiny("qwen3").bfloat16().cuda(), random_prompts(5)
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    each = [
        {"decode": "quest:keep=0.3,page=4,window=8,dense_below=0"},
        {"decode": "dense", "max_length": 150},
        {"decode": "signbits:keep=0.3,window=8,dense_below=0"},
    ]
    fresh = []
    for options in each:
        with LLM(model, **{"max_batch": 3, "max_length": 160, "page": 16, **options}) as llm:
            fresh.append([x.token_ids for x in llm.generate(prompts, params)])
    with LLM(model, max_batch=3, max_length=160, page=16) as llm:
        for options, tokens in zip(each, fresh, strict=True):
            llm.switch(**{"max_length": 160, **options})
            assert [x.token_ids for x in llm.generate(prompts, params)] == tokens
            assert llm.served.compiled and llm.served.graphed


@NEEDS_POCKET
def test_eight_thousand_tokens_after_a_long_context_are_those_of_transformers():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pocket.path(), dtype=torch.float32).cuda()
    prompt = [random.Random(2).randrange(5, 400) for _ in range(8000)]
    with LLM(model, max_batch=2, max_length=16_400) as llm:
        tokens = llm.generate(prompt, SamplingParams(max_new_tokens=8192, ignore_eos=True))[0].token_ids
    inputs = torch.tensor([prompt + tokens[:-1]], device="cuda")
    with torch.no_grad():
        logits = model(inputs, logits_to_keep=len(tokens)).logits[0]
    best, chosen = logits.max(-1).values, logits.gather(-1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
    assert float((best - chosen).max()) < 1e-3  # one pass over all of it takes each token for the likeliest


@NEEDS_TWO
@NEEDS_POCKET
@pytest.mark.parametrize("decode", ["dense", "signbits:keep=0.2,dense_below=0", "quest:keep=0.2,dense_below=0"])
def test_two_gpus_give_the_tokens_of_one(decode):
    path, prompts = str(pocket.path()), [p * 9 for p in random_prompts(4)]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=1)
    found = []
    for ranks in (1, 2):
        options = {"max_batch": 2, "max_length": 2048, "dtype": "float32", "tensor_parallel": ranks}
        with LLM(path, decode=decode, **options) as llm:
            found.append(llm.generate(prompts, params))
    same = [a.token_ids == b.token_ids for a, b in zip(*found, strict=True)]
    assert sum(same) >= len(same) - 1  # a sum in another order may turn one
    kept = [[x.stats.kept_fraction for x in each] for each in found]
    assert kept[0] == pytest.approx(kept[1], rel=1e-2)
