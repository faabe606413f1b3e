"""Self-speculation: whatever is drafted, the tokens are those of plain decoding."""

import random

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria

import keysift
from keysift import LLM, SamplingParams
from keysift.methods import parse
from keysift.sampling import likeliest
from keysift.speculate import MOST, Acceptance, Controller, tokens_of_round
from tests.tiny_models import MODELS, SIZES, prompt, tiny

DRAFTS = {
    "dense": "dense",
    "streaming": "streaming:sinks=2,window=8,dense_below=0",
    "snapkv": "snapkv:budget=30,window=8,dense_below=0",
    "quest": "quest:keep=0.3,page=4,window=8,dense_layers=none,dense_below=0",
    "magicpig": "magicpig:K=3,L=10,window=8,dense_layers=none,dense_below=0",
    "signbits": "signbits:keep=0.2,window=8,dense_below=0",
    "topk": "topk:keep=0.3,window=8,dense_layers=none,dense_below=0",
}
NAME = "llama-llama3-rope-gqa"


def ids(tokens, seed=0):
    return torch.randint(1, SIZES["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(count, seed):
    """Ragged prompts, some shorter than the window, greedy and sampled ones, with ends of every kind."""
    draw = random.Random(seed)
    prompts = [ids(draw.choice([1, 3, 20, 57, 119]), seed * 100 + i) for i in range(count)]
    params = [
        SamplingParams(
            max_new_tokens=draw.choice([1, 2, 9, 30]),
            temperature=draw.choice([0, 0, 0.7, 1.5]),
            top_p=draw.choice([1.0, 0.9]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
            seed=i,
            stop_token_ids=tuple(draw.sample(range(97), draw.choice([0, 0, 3]))),
            logprobs=draw.choice([None, 2]),
        )
        for i in range(count)
    ]
    return prompts, params


def answers(model, prompts, params, **options):
    with LLM(model, **{"max_batch": 3, "max_length": 160, "page": 16, **options}) as llm:
        return llm.generate(prompts, params)


def all_the_same(found, expected):
    assert [x.token_ids for x in found] == [x.token_ids for x in expected]
    assert [x.finish_reason for x in found] == [x.finish_reason for x in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine.logprobs or (), theirs.logprobs or (), strict=True):
            assert a.token == pytest.approx(b.token, abs=1e-4)
            assert list(a.top.values()) == pytest.approx(list(b.top.values()), abs=1e-4)


# ---- equality -------------------------------------------------------------------------------------------------------

SOME = ("snapkv", "quest")


OTHERS = [m for m in MODELS if m != "gemma3"]
CASES = [
    *(("gemma3", draft) for draft in SOME),
    *(pytest.param("gemma3", draft, marks=pytest.mark.slow) for draft in DRAFTS if draft not in SOME),
    *(pytest.param(name, draft, marks=pytest.mark.slow) for name in OTHERS for draft in SOME),
    *(pytest.param(name, draft, marks=pytest.mark.soak) for name in OTHERS for draft in DRAFTS if draft not in SOME),
]


@pytest.mark.parametrize(("name", "draft"), CASES)
def test_every_draft_gives_the_tokens_of_plain_decoding(name, draft):
    model, (prompts, params) = tiny(name), requests(9, 1)
    expected = answers(model, prompts, params)
    for gamma in (1, 3):
        found = answers(model, prompts, params, draft=DRAFTS[draft], gamma=gamma)
        all_the_same(found, expected)
    if draft == "dense":  # of which penalties, that drafts leave out, let some be refused
        several = [(x.stats, p) for x, p in zip(found, params, strict=True) if x.stats.new_tokens > 1]
        accepted = [stats.accepted_per_round for stats, p in several if p.repetition_penalty == 1]
        assert accepted == [3] * len(accepted) and len(several) > len(accepted) > 2


@pytest.mark.parametrize("gamma", [None, *range(1, MOST + 1)])
def test_however_many_are_drafted(gamma):
    prompts, params = requests(12, 2)
    expected = answers(tiny(NAME), prompts, params)
    all_the_same(answers(tiny(NAME), prompts, params, draft=DRAFTS["quest"], gamma=gamma), expected)


@pytest.mark.parametrize("draft", [d for d in DRAFTS if d != "dense"])
def test_drafts_that_are_never_selected_anew_give_the_same_tokens(draft):
    prompts, params = requests(12, 5)
    expected = answers(tiny(NAME), prompts, params)
    for gamma in (2, None):
        found = answers(tiny(NAME), prompts, params, draft=DRAFTS[draft], gamma=gamma, refresh="never")
        all_the_same(found, expected)


def test_a_frozen_draft_selects_once_an_answer_and_reads_all_that_came_since():
    """Selections of the first round, of slots whose first it is; afterwards rows from then on are all read."""
    counts, prompts = [], [ids(90, n) for n in range(3)]
    method = parse("quest:budget=24,page=4,window=8,dense_layers=none,dense_below=0", "decode")
    with LLM(tiny(NAME), draft=method, gamma=2, refresh="never", max_batch=2, max_length=160, page=16) as llm:
        drafter = llm._work._rounds.drafter
        keep = drafter.keep

        def note(rows):
            kept = drafter._kept[0]
            counts.append((drafter.selects, (kept.start + kept.length).tolist()))
            keep(rows)

        drafter.keep = note
        llm.generate(prompts, [SamplingParams(max_new_tokens=n) for n in (40, 50, 20)])
    assert sum(selects for selects, _ in counts) == 3 and len(counts) > 20  # two begin one after another, one later
    ends = [end for _, end in counts]
    assert {end for pair in ends for end in pair} <= {0, 83, 84, 85, 86}  # what was before the window at first
    assert counts[0][0] and not counts[-1][0]


@pytest.mark.parametrize("place", range(1, 14))
def test_an_end_at_any_place_of_a_round_ends_the_answer_there(place):
    """Drafted and accepted, or the pass's own."""
    whole = answers(tiny(NAME), ids(40), SamplingParams(max_new_tokens=14))[0].token_ids
    params = SamplingParams(max_new_tokens=30, stop_token_ids=(whole[place],))
    expected = whole[: whole.index(whole[place]) + 1]
    others = [ids(30, 8), ids(50, 9)]
    with LLM(tiny(NAME), draft="dense", gamma=4, max_batch=3, max_length=160, page=16) as llm:
        for other in others:
            llm.submit(other, SamplingParams(max_new_tokens=60))
        told = []
        found = llm.generate(ids(40), params, on_text=told.append)[0]
        assert found.token_ids == expected and found.finish_reason == "stop"
        assert [token for delta in told for token in delta.token_ids] == expected
        assert [delta.finished for delta in told] == [False] * (len(told) - 1) + [True]


@pytest.mark.parametrize("draft", ["snapkv:budget=400,window=8", "streaming:sinks=4,window=200", "quest:keep=1.0"])
def test_budgets_above_the_prompt_draft_what_dense_decoding_gives(draft):
    prompts, params = [ids(n, n) for n in (5, 60, 110)], SamplingParams(max_new_tokens=21)
    found = answers(tiny(NAME), prompts, params, draft=draft, gamma=4)
    all_the_same(found, answers(tiny(NAME), prompts, params))
    assert all(x.stats.accepted_per_round == 4 for x in found)


@pytest.mark.slow
def test_hundreds_of_tokens_fill_their_slots_to_the_last_row():
    prompts, params = [ids(40, n) for n in range(2)], SamplingParams(max_new_tokens=320)
    options = {"max_length": 360, "max_batch": 2}
    expected = answers(tiny(NAME), prompts, params, **options)
    all_the_same(answers(tiny(NAME), prompts, params, draft=DRAFTS["quest"], gamma=8, **options), expected)


@pytest.mark.parametrize("draft", ["quest", "signbits", "snapkv"])
def test_chunks_of_prompts_and_shared_beginnings_go_with_rounds(draft):
    document = ids(64)
    prompts = [document + ids(n, n) for n in (20, 31, 24, 40)]
    params = SamplingParams(max_new_tokens=18)
    expected = answers(tiny(NAME), prompts, params)
    options = {"draft": DRAFTS[draft], "gamma": 3}
    all_the_same(answers(tiny(NAME), prompts, params, prefill_chunk=16, **options), expected)
    all_the_same(answers(tiny(NAME), prompts, params, prefill_chunk=16, reuse_prefixes=True, **options), expected)


def test_questions_are_read_before_anything_is_drafted():
    asked = {"question": "decode", "question_tokens": 9}
    with LLM(tiny(NAME), max_batch=2, max_length=160, page=16) as llm:
        expected = llm.generate([ids(50), ids(70, 1)], SamplingParams(max_new_tokens=9), **asked)
    with LLM(tiny(NAME), draft=DRAFTS["quest"], gamma=3, max_batch=2, max_length=160, page=16) as llm:
        all_the_same(llm.generate([ids(50), ids(70, 1)], SamplingParams(max_new_tokens=9), **asked), expected)


def test_an_engine_switches_drafting_on_and_off():
    prompts, params = requests(6, 3)
    expected = answers(tiny(NAME), prompts, params)
    with LLM(tiny(NAME), max_batch=3, max_length=160, page=16) as llm:
        for draft in ("streaming:window=8", "none", DRAFTS["signbits"]):
            llm.switch(draft=draft)
            assert (llm.served.draft_method is None) == (draft == "none")
            all_the_same(llm.generate(prompts, params), expected)
        with pytest.raises(ValueError, match="drafts are checked against all keys; leave decode out"):
            llm.switch(decode=DRAFTS["quest"])


@pytest.mark.slow
def test_sampled_tokens_have_the_models_distribution():
    """Chi-squared of the second and third token together, over seeds, against exact probabilities."""
    model, prompt, count = tiny(NAME), ids(30), 800
    options = {"temperature": 0.5, "top_k": 4, "top_p": 0.95}
    params = [SamplingParams(max_new_tokens=3, seed=i, **options) for i in range(count)]
    found = answers(model, [prompt] * count, params, draft=DRAFTS["quest"], gamma=2, max_batch=16)
    assert any(x.stats.accepted_per_round for x in found)

    def likely(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        settings = (torch.tensor([options[name]]) for name in ("temperature", "top_k", "top_p"))
        p, token = likeliest(logits[None], *settings, torch.zeros(1))
        return {int(t): float(x) for t, x in zip(token[0], p[0], strict=True) if x > 0}

    exact = {}
    for a, pa in likely([]).items():
        for b, pb in likely([a]).items():
            for c, pc in likely([a, b]).items():
                exact[b, c] = exact.get((b, c), 0.0) + pa * pb * pc
    seen = dict.fromkeys(exact, 0)
    for x in found:
        seen[tuple(x.token_ids[1:])] += 1
    common = [key for key, p in exact.items() if p * count >= 5]
    rest = sum(exact[key] for key in exact if key not in common) * count
    chi = sum((seen[key] - exact[key] * count) ** 2 / (exact[key] * count) for key in common)
    if rest >= 5:
        chi += (sum(seen[key] for key in exact if key not in common) - rest) ** 2 / rest
    freedom = len(common) - 1 + (rest >= 5)
    assert freedom > 8 and chi < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


# ---- how many to draft ----------------------------------------------------------------------------------------------


def used(controller, acceptance, steps, seconds):
    """Choices of a controller for one sequence, with rounds that take what ``seconds`` says, and its tokens a second as
    a multiple of plain decoding's."""
    draw, known, chosen, tokens, time = random.Random(0), Acceptance(), [], 0, 0.0
    for _ in range(steps):
        gamma = controller.choose([known])
        accepted = next((i for i in range(gamma) if draw.random() >= acceptance), gamma)
        if gamma:
            known.note(accepted, gamma)
        controller.note(gamma, seconds(gamma))
        chosen.append(gamma)
        tokens, time = tokens + accepted + 1, time + seconds(gamma)
    return chosen, tokens / time * seconds(0)


def cheap(gamma):
    return gamma * 0.3 + 1.1 if gamma else 1.0


@pytest.mark.parametrize("acceptance", [0.6, 0.8, 0.95, 1.0])
def test_drafting_pays_where_drafts_are_cheap_and_accepted(acceptance):
    chosen, speed = used(Controller(0.3, "cuda"), acceptance, 4000, cheap)
    best = max(tokens_of_round(g, acceptance) / cheap(g) for g in range(1, MOST + 1))
    assert speed > 0.93 * best and 10 < chosen.count(0) < 800  # now and then a plain step is timed again


@pytest.mark.parametrize("acceptance", [0.0, 0.3])
def test_drafts_that_are_refused_cost_next_to_nothing(acceptance):
    assert used(Controller(0.3, "cuda"), acceptance, 3000, cheap)[1] > 0.98


def test_where_a_draft_costs_as_much_as_a_step_none_is_made():
    assert used(Controller(0.97, "cuda"), 0.9, 2000, lambda gamma: 1.0 + gamma)[0] == [0] * 2000


def test_what_was_assumed_gives_way_to_what_is_measured():
    assert used(Controller(0.2, "cuda"), 1.0, 1000, lambda gamma: 3.0 * gamma or 1.0)[1] > 0.98


def test_a_round_that_was_slow_by_chance_is_tried_again():
    slow = [True]

    def seconds(gamma):
        return cheap(gamma) * (10 if gamma and slow and slow.pop() else 1)

    chosen, speed = used(Controller(0.3, "cuda"), 0.95, 4000, seconds)
    assert chosen.count(0) < 500 and speed > 1.4


def test_drafts_count_what_they_read_and_plain_steps_do_not():
    prompts, params = [ids(90, n) for n in range(3)], SamplingParams(max_new_tokens=30)
    for every in (1, 64):
        found = answers(
            tiny(NAME), prompts, params, draft=DRAFTS["quest"], gamma=3, count_every=every, measure_error=True
        )
        assert all(0.2 < x.stats.kept_fraction < 0.8 and x.stats.decode_error is None for x in found)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_longest_position_is_refused(kind):
    model = tiny(NAME)
    config = model.config.get_text_config()
    before = config.rope_parameters
    config.rope_parameters = {**before, "rope_type": kind}
    try:
        with LLM(model, max_batch=1, max_length=160) as llm, pytest.raises(ValueError, match="leave draft out"):
            llm.switch(draft="streaming")
    finally:
        config.rope_parameters = before


def test_a_fixed_number_is_always_drafted():
    assert used(Controller(1.0, "cpu", fixed=5), 0.0, 9, lambda gamma: 9.0)[0] == [5] * 9


def test_tokens_of_a_round():
    assert tokens_of_round(4, 0.0) == 1 and tokens_of_round(4, 1.0) == 5
    assert tokens_of_round(4, 0.8) == pytest.approx(1 + 0.8 + 0.64 + 0.512 + 0.4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "quest", "gamma": 0}, "gamma=0: choose 1 to 8"),
        ({"draft": "quest", "gamma": 9}, "gamma=9: choose 1 to 8"),
        ({"gamma": 4}, "gamma=4: needs a draft, such as draft=streaming:budget=512"),
        ({"draft": "quest", "decode": "quest"}, "drafts are checked against all keys; leave decode out"),
        ({"draft": "nothing"}, "decode method 'nothing' unknown"),
        ({"draft": "snapkv:budget=20"}, "budget=20: must exceed sinks"),
        ({"draft": "streaming:budget=16"}, "budget=16: must exceed sinks=16"),
    ],
)
def test_bad_drafts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LLM(tiny(NAME), **options)
    with keysift.attach(tiny(NAME)):
        pass  # the model is free again


# ---- generate() of transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"eos_token_id": [5, 17, 33], "pad_token_id": 2}])
def test_custom_generate_gives_what_generate_gives(name, options):
    model, inputs = tiny(name), prompt(70, (0, 13, 41))
    greedy = {"max_new_tokens": 19, "do_sample": False, **options}
    expected = model.generate(**inputs, **greedy)
    for extra in ({}, {"draft": DRAFTS["quest"], "gamma": 3}):
        found = model.generate(**inputs, **greedy, custom_generate=keysift.self_speculate, **extra)
        assert torch.equal(found, expected)
    assert model.config._attn_implementation != "keysift-slots"


def test_custom_generate_samples_by_torchs_seed_and_streams():
    model, inputs = tiny("qwen3"), prompt(40)
    arguments = {**inputs, "max_new_tokens": 12, "do_sample": True, "temperature": 1.3, "top_k": 20}
    told = []

    class Streamer:
        def put(self, tokens):
            told.append(tokens.flatten().tolist())

        def end(self):
            told.append("end")

    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(**arguments, custom_generate=keysift.self_speculate, gamma=2)[0].tolist())
    assert found[0] == found[1] != found[2]
    config = GenerationConfig(max_length=52, do_sample=True, temperature=1.3, top_k=20, eos_token_id=None)
    torch.manual_seed(1)
    keysift.self_speculate(model, inputs["input_ids"], generation_config=config, gamma=2, streamer=Streamer())
    assert told[-1] == "end" and [token for part in told[:-1] for token in part] == found[0][40:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "does not take num_beams=2"),
        ({"no_repeat_ngram_size": 2}, "does not take NoRepeatNGramLogitsProcessor"),
        ({"max_time": 1.0}, "does not take MaxTimeCriteria"),
        ({"return_dict_in_generate": True}, "does not take return_dict_in_generate"),
        ({"gamma": 0}, "gamma=0: choose 1 to 8"),
        ({"stopping_criteria": [EosTokenCriteria(7)]}, "does not take EosTokenCriteria"),
        ({"logits_processor": [RepetitionPenaltyLogitsProcessor(3.0)]}, "does not take RepetitionPenaltyLogits"),
        ({"do_sample": True, "top_k": 0, "logits_processor": [TopKLogitsWarper(1)]}, "does not take TopKLogitsWarper"),
    ],
)
def test_custom_generate_refuses_what_it_cannot_do(options, message):
    model = tiny("qwen3")
    with pytest.raises(ValueError, match=message):
        model.generate(**prompt(20), max_new_tokens=3, custom_generate=keysift.self_speculate, **options)
