"""A smaller model drafts, over a bounded cache of its own: the tokens are those of plain decoding, whatever it says."""

import copy
import random
import re

import pytest
import torch

from keysift import LLM, SamplingParams
from keysift.hf.draft_model import DraftModel, Turner, lone_keys
from keysift.hf.served import DENSE, ServedModel
from keysift.methods import parse
from keysift.speculate import MOST, agreeing
from tests.test_speculate import all_the_same, answers, ids, requests
from tests.tiny_models import MODELS, SIZES, build, tiny

NAME, OTHER = "llama-llama3-rope-gqa", "qwen3"
CACHES = {"streaming": "streaming:sinks=4,budget=64", "snapkv": "snapkv:window=8,budget=64"}


@pytest.fixture(scope="module")
def half_right():
    """A model that often, not always, takes the same tokens."""
    model = copy.deepcopy(tiny(NAME))
    torch.manual_seed(5)
    for weight in model.parameters():
        weight.data += 0.01 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("gamma", [1, 3, MOST, None])
def test_the_tokens_are_those_of_plain_decoding(half_right, cache, gamma):
    prompts, params = requests(9, 1)
    expected = answers(tiny(NAME), prompts, params)
    found = answers(tiny(NAME), prompts, params, draft_model=half_right, draft=cache, gamma=gamma)
    all_the_same(found, expected)
    if gamma == 3:
        rates = [x.stats.accepted_per_round for x in found if x.stats.accepted_per_round is not None]
        assert 0.3 < sum(rates) / len(rates) < 3


@pytest.mark.parametrize("name", [m if m == "glm4" else pytest.param(m, marks=pytest.mark.soak) for m in MODELS])
def test_every_architecture_drafts_for_every_other(name):
    prompts, params = requests(5, 3)
    other = OTHER if name == NAME else NAME
    expected = answers(tiny(name), prompts, params)
    all_the_same(answers(tiny(name), prompts, params, draft_model=tiny(other), draft=CACHES["snapkv"]), expected)
    expected = answers(tiny(other), prompts, params)
    found = answers(tiny(other), prompts, params, draft_model=tiny(name), draft=CACHES["streaming"], gamma=3)
    all_the_same(found, expected)


@pytest.mark.parametrize("draft", ["streaming:budget=400", "snapkv:budget=400", None])
def test_a_copy_with_room_for_all_is_always_right(draft):
    prompts, params = [ids(n, n) for n in (1, 5, 60, 110)], SamplingParams(max_new_tokens=26)
    model = copy.deepcopy(tiny(NAME))
    found = answers(tiny(NAME), prompts, params, draft_model=model, draft=draft, gamma=4)
    all_the_same(found, answers(tiny(NAME), prompts, params))
    assert all(x.stats.accepted_per_round == 4 for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_contexts_may_be_many_times_what_the_draft_model_was_made_for(half_right, cache):
    """And answers that go on and on, beside ones that end."""
    short = copy.deepcopy(half_right)
    short.config.max_position_embeddings = 64
    positions = []
    short.base_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(int((args + tuple(kwargs.values()))[1].max())), with_kwargs=True
    )
    prompts = [ids(n, n) for n in (700, 300, 5, 64)]
    params = [SamplingParams(max_new_tokens=n) for n in (150, 30, 180, 100)]
    options = {"max_length": 1024, "max_batch": 3}
    expected = answers(tiny(NAME), prompts, params, **options)
    found = answers(tiny(NAME), prompts, params, draft_model=short, draft=cache, gamma=3, **options)
    all_the_same(found, expected)
    assert 50 < max(positions) < 64


@pytest.mark.slow
@pytest.mark.parametrize("cache", [*CACHES.values(), "streaming:budget=300"])
def test_plain_steps_in_between_are_caught_up_with(cache):
    """Every third step is a plain one, and once eighty in a row."""
    prompts, params = [ids(40), ids(90, 1)], SamplingParams(max_new_tokens=150)
    expected = answers(tiny(NAME), prompts, params, max_length=300)
    options, right = {"draft": cache, "gamma": 2, "max_batch": 2, "max_length": 300, "page": 16}, []
    with LLM(tiny(NAME), draft_model=copy.deepcopy(tiny(NAME)), **options) as llm:
        turns = iter([2, 2, 0] * 12 + [0] * 80 + [2, 0, 7] * 100)
        llm._work._controller.choose = lambda _: next(turns)

        def note(drafted, found):
            counts = agreeing(drafted, found)
            right.append(bool((counts == drafted.shape[1]).all()))
            return counts

        llm._work.accepted = note
        all_the_same(llm.generate(prompts, params), expected)
    assert len(right) > 20
    if "300" in cache:  # with all that was said there, the same model says the same
        assert all(right)


def test_a_lone_model_reads_what_streaming_keeps():
    """Sinks and the newest tokens, at the first positions; so the draft is the model's own word after those."""
    model, sequence = tiny(NAME), ids(500)
    drafter = DraftModel(
        copy.deepcopy(model), parse("streaming:sinks=4,budget=64", "decode"), MOST, SIZES["vocab_size"]
    )
    drafter.open(1, 16)
    drafter.follow(0, sequence)
    drafter.begin([sequence[-2]])
    tokens = torch.tensor([[sequence[-1], 0, 0, 0]])
    drafter.draft(tokens, 3, None)
    kept = drafter.rows - drafter.spare
    seen = sequence[:4] + sequence[-2 - kept + 4 :]
    for i in range(3):
        with torch.no_grad():
            assert int(tokens[0, i + 1]) == int(model(torch.tensor([seen])).logits[0, -1].argmax())
        seen.append(int(tokens[0, i + 1]))
    drafter.close()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gemma3", "mistral-sliding-window")])
def test_keys_are_turned_to_what_they_are_at_another_position(name):
    model = copy.deepcopy(tiny(name))
    served = ServedModel(model, DENSE, DENSE)
    turner = Turner(served)
    for begin, end in ((0, 900), (900, 13), (77, 76)):
        here, there = (lone_keys(served, at)[0] for at in (begin, end))
        for k, wanted in zip(here, there, strict=True):
            by = torch.full((k.shape[2], 1), end - begin)
            turned = turner.turned(k[0].transpose(0, 1), by)
            torch.testing.assert_close(turned, wanted[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
            assert begin - end == 1 or not torch.allclose(k, wanted, atol=1e-2)
    served.close()


def test_snapkv_keeps_what_the_newest_queries_attend_to_with_keys_turned_to_where_they_lie():
    drafter = DraftModel(copy.deepcopy(tiny(NAME)), parse(CACHES["snapkv"], "decode"), MOST, SIZES["vocab_size"])
    drafter.open(2, 16)
    which, length, kept = slice(1, 2), 52, drafter.rows - drafter.spare
    drafter._take_in(1, (1 + torch.randperm(96, generator=torch.Generator().manual_seed(0))[:length]).tolist())
    stores = drafter.served.stores
    before = [store.view(which).unpaged() for store in stores]
    queries = [drafter.served.newest_queries(layer)[0] for layer in range(3)]  # [8, 4, 16]
    drafter._make_room(1, votes=True)
    assert drafter.slots.lengths == [0, kept]
    for layer, (store, old) in enumerate(zip(stores, before, strict=True)):
        now = store.view(which).unpaged()
        for head in range(2):
            k, v = old.k[0, :length, head], old.v[0, :length, head]
            found = [int((v == row).all(1).nonzero()) for row in now.v[0, :kept, head]]
            q = queries[layer][:, 2 * head : 2 * head + 2].flatten(0, 1)  # two queries a head, eight tokens
            z = (q @ k.T) / 4
            z[torch.arange(length) > (torch.arange(16) // 2 + length - 8)[:, None]] = -torch.inf
            votes = torch.nn.functional.avg_pool1d(z.softmax(-1).sum(0)[None], 5, stride=1, padding=2)[0]
            votes[-8:] = torch.inf
            assert found == votes.topk(kept).indices.sort().values.tolist()
            by = torch.arange(kept) - torch.tensor(found)
            turned = drafter._turner.turned(k[found][None], by[None])[0]
            torch.testing.assert_close(now.k[0, :kept, head], turned)
    drafter.close()


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "quest"}, "a draft model's cache is streaming or snapkv, with budget=ROWS"),
        ({"draft": "streaming:window=200"}, "give the rows of a draft model's cache, budget=ROWS"),
        ({"draft": "snapkv:window=40,budget=64"}, "budget=64 is too small; choose 80 or more"),
        ({"draft": "streaming:budget=20"}, "budget=20 is too small; choose 64 or more"),
        ({"draft": "streaming:budget=5000"}, "budget=5000, and the draft model's context is 4,096 tokens; choose less"),
        ({"gamma": 0}, "gamma=0: choose 1 to 8"),
        ({"draft_model": 3}, "draft_model=3: pass a folder, a hub id or a loaded model"),
        ({"kv_memory": 1000, "max_length": None}, "kv_memory=1000: the draft model's cache needs"),
        ({"decode": "quest"}, "a draft model and decode=quest"),
        ({"draft_model": build("Llama", vocab_size=96)}, "its vocabulary (96 tokens) is not the model's (97)"),
        ({"draft_model": tiny(NAME)}, "is served already"),
        (
            {"draft_model": tiny("gemma3"), "draft": CACHES["snapkv"]},
            "have windows of their own; draft=streaming works",
        ),
    ],
)
def test_bad_drafts_are_refused_and_all_is_as_it_was(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LLM(tiny(NAME), **{"draft_model": tiny(OTHER), "max_length": 100, **options})
    with LLM(tiny(NAME), max_length=100) as llm, LLM(tiny(OTHER), max_length=100) as other:
        assert llm.generate(ids(4), SamplingParams(max_new_tokens=2))
        assert other.generate(ids(4), SamplingParams(max_new_tokens=2))


def test_a_draft_models_cache_cannot_be_switched_but_methods_can(half_right):
    with LLM(tiny(NAME), draft_model=copy.deepcopy(half_right), max_length=100) as llm:
        first = llm.generate(ids(20), SamplingParams(max_new_tokens=20))
        with pytest.raises(ValueError, match="a draft model's cache stays as it is"):
            llm.switch(draft="streaming:budget=64")
        llm.switch(max_length=120)
        all_the_same(llm.generate(ids(20), SamplingParams(max_new_tokens=20)), first)


def test_methods_cannot_be_switched_to_what_drafts_are_not_checked_against(half_right):
    with (
        LLM(tiny(NAME), draft_model=copy.deepcopy(half_right), max_length=100) as llm,
        pytest.raises(ValueError, match="a draft model and decode=quest"),
    ):
        llm.switch(decode="quest:keep=0.3,page=4,window=8")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_models_whose_rope_depends_on_the_longest_position_take_no_draft_model(rope_type, half_right):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if rope_type == "longrope" else {}
    model = build("Llama", rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(ValueError, match="depends on the longest position of a pass, drafted tokens included"):
        LLM(model, draft_model=copy.deepcopy(half_right), max_batch=1, max_length=100)


def test_tokens_that_the_draft_model_has_no_embedding_for_are_drafted_after(half_right, monkeypatch):
    """Padding of a larger table, which prompts may hold all the same."""
    big = build("Llama", vocab_size=130)
    prompts, params = [[5, 6, 120, 7, 128, 9], ids(80)], SamplingParams(max_new_tokens=30)
    expected = answers(big, prompts, params)
    options = {"draft_model": copy.deepcopy(half_right), "gamma": 3}
    with pytest.raises(ValueError, match="its vocabulary"):
        LLM(big, **options, max_length=100)
    monkeypatch.setattr("keysift.ranks.check_vocabularies", lambda *_: None)  # as of equal tokenizers
    all_the_same(answers(big, prompts, params, **options), expected)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_after_an_interrupt_in_a_round_others_go_on(half_right, cache):
    options = {"draft": cache, "gamma": 3, "max_length": 300, "page": 16}
    with LLM(tiny(NAME), draft_model=copy.deepcopy(half_right), **options) as llm:
        take, calls = llm._work._take, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 4:
                raise KeyboardInterrupt
            take(*args)

        llm._work._take = interrupted
        index = llm.submit(ids(40), SamplingParams(max_new_tokens=40))
        with pytest.raises(KeyboardInterrupt):
            list(iter(llm.step, None))
        for _ in range(60):
            llm.step()
        assert index == 0 and not llm.unfinished


def test_reading_a_prompt_is_not_taken_for_the_time_of_a_round(half_right, monkeypatch):
    """Else drafting would stop for hundreds of steps with each request that comes."""
    now, model = [0.0], copy.deepcopy(half_right)
    monkeypatch.setattr("keysift.scheduler.time.perf_counter", lambda: now[0])
    with LLM(tiny(NAME), draft_model=model, draft=CACHES["streaming"], max_batch=2, max_length=400, page=16) as llm:
        drafter, work = llm._drafter, llm._work
        work._controller.draft_cost = 0.1
        follow, step, run = drafter.follow, llm.served.step, work._rounds.run
        work.accepted = lambda drafted, found: torch.full((len(drafted),), drafted.shape[1])

        def slow_follow(*args):
            began = follow(*args)
            now[0] += 10.0 if began else 0.0
            return began

        def slow_step(*args, **kwargs):
            now[0] += 1.0
            step(*args, **kwargs)

        def slow_run(gamma, *args):
            now[0] += 1.1 + 0.1 * gamma
            return run(gamma, *args)

        drafter.follow, llm.served.step, work._rounds.run = slow_follow, slow_step, slow_run
        out = llm.generate([ids(30, n) for n in range(6)], SamplingParams(max_new_tokens=60))
        rounds = sum(1 for x in out if (x.stats.accepted_per_round or 0) > 2)
    assert rounds == 6
    assert now[0] < 6 * 10 + 6 * 60 / 2


@pytest.mark.slow
def test_requests_that_end_leave_nothing_to_those_in_their_slots(half_right):
    draw = random.Random(4)
    prompts = [ids(draw.choice([2, 30, 150]), i) for i in range(30)]
    params = [
        SamplingParams(max_new_tokens=draw.randrange(1, 40), temperature=draw.choice([0, 0.8]), seed=i)
        for i in range(30)
    ]
    expected = answers(tiny(NAME), prompts, params, max_length=256)
    options = {"draft_model": half_right, "max_length": 256, "max_batch": 4, "gamma": 4}
    all_the_same(answers(tiny(NAME), prompts, params, draft=CACHES["snapkv"], **options), expected)
