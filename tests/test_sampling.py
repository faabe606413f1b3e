"""Logits to tokens: the distributions are transformers', and a draw depends on its own request alone."""

from dataclasses import fields

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from keysift.sampling import MOST_LOGPROBS, Sampler, SamplingParams, drawn, likeliest, logprobs_of, penalised
from tests.helpers import generator

CPU = torch.device("cpu")
NEVER = 1e-14  # no draw of 24 bits gets there; sums of probabilities in fp64 do not tell
SETTINGS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (2.5, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 63, 1.0, 0.0),
    (1.0, 64, 0.99, 0.0),
    (1.0, 1000, 0.7, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 0.5, 0.0),
    (1.7, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.03),
    (1.0, 0, 1.0, 1.0),
    (0.7, 5, 0.9, 0.0),
    (0.7, 5, 0.5, 0.2),
    (1.3, 31, 0.95, 0.01),
    (1.3, 31, 0.3, 0.4),
]


def hf_probabilities(logits, temperature, top_k, top_p, min_p, penalty=1.0, prompt=None):
    """What transformers' processors make of fp32 logits ``[B, V]``, in its order and in fp64."""
    temperature, top_p, min_p, penalty = torch.tensor([temperature, top_p, min_p, penalty]).tolist()  # fp32's
    chain = LogitsProcessorList()
    if penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty))
    chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    prompt = torch.zeros(len(logits), 0, dtype=torch.int64) if prompt is None else prompt
    return chain(prompt, logits.double()).softmax(-1)


def columns(settings):
    """Arguments of ``likeliest``, a row for each setting."""
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    return torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p)


def by_token(p, token):
    return torch.zeros_like(p).scatter(-1, token, p)


def same_distribution(got, expected, rtol=1e-9):
    assert torch.equal(got > NEVER, expected > NEVER)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=NEVER)


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 1025])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_likeliest_gives_the_distributions_of_transformers(vocabulary, spread):
    rows = [x for x in SETTINGS for _ in range(5)]
    logits = torch.randn(len(rows), vocabulary, generator=generator(vocabulary)) * spread
    p, token = likeliest(logits, *columns(rows))
    expected = torch.cat([hf_probabilities(logits[i : i + 1], *rows[i]) for i in range(len(rows))])
    got = by_token(p, token)
    same_distribution(got, expected)


@pytest.mark.parametrize("penalty", [0.5, 1.01, 1.3, 5.0])
def test_penalties_are_those_of_transformers(penalty):
    logits = torch.randn(4, 63, generator=generator(0)) * 3
    prompt = torch.randint(63, (4, 29), generator=generator(1))
    seen = torch.zeros(4, 63, dtype=torch.bool).scatter(1, prompt, True)
    for setting in SETTINGS:
        after = penalised(logits, seen, torch.full((4,), penalty))
        got = by_token(*likeliest(after, *columns([setting] * 4)))
        expected = hf_probabilities(logits, *setting, penalty, prompt)
        same_distribution(got, expected, rtol=1e-5)  # fp32 logits, fp64 ones


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_of_tied_tokens_the_first_are_a_hair_likelier(setting):
    temperature, top_k, top_p, min_p = setting
    logits = torch.randint(-3, 3, (9, 63), generator=generator(2)).float()
    p, token = likeliest(logits, *columns([setting] * 9))
    apart = logits.double() - torch.arange(63) * 1e-9
    if min_p == 1:  # where a hair decides
        apart, min_p = logits.double(), 1 - 1e-6
    expected = hf_probabilities(apart, temperature, top_k, top_p, min_p)
    got = by_token(p, token)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_exact_shares_are_cut_as_transformers_cuts_them():
    logits = torch.zeros(4, 8)
    settings = [(1.0, 0, top_p, 0.0) for top_p in (0.125, 0.25, 0.5, 0.75)]
    p, _ = likeliest(logits, *columns(settings))
    assert (p > 0).sum(-1).tolist() == [1, 2, 4, 6]
    assert [int((hf_probabilities(logits[:1], *x) > 0).sum()) for x in settings] == [1, 2, 4, 6]


def test_tokens_that_cannot_come_keep_no_probability():
    logits = torch.full((len(SETTINGS), 63), -torch.inf)
    logits[:, 5], logits[:, 40] = 1.0, 0.5
    p, token = likeliest(logits, *columns(SETTINGS))
    assert set(by_token(p, token).sum(0).nonzero().flatten().tolist()) == {5, 40}
    assert p.sum(-1) == pytest.approx(torch.ones(len(SETTINGS)))


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.5, 5, 0.9, 0.0), (1.2, 6, 0.95, 0.1)])
def test_draws_follow_their_probabilities(setting):
    draws, vocabulary = 20_000, 9
    temperature, top_k, top_p, min_p = setting
    logits = torch.randn(1, vocabulary, generator=generator(3)) * 1.5
    sampler = Sampler(draws, vocabulary, CPU)
    for slot in range(draws):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=slot // 5)
        sampler.begin(slot, params, [0])
    tokens = sampler.tokens(logits.expand(draws, -1), range(draws), [slot % 5 for slot in range(draws)])
    expected = hf_probabilities(logits, *setting)[0] * draws
    count = torch.bincount(tokens, minlength=vocabulary)
    possible = expected > 0
    assert count[~possible].sum() == 0
    chi_squared = float(((count - expected) ** 2 / expected)[possible].sum())
    freedom = int(possible.sum()) - 1
    assert freedom >= 3
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_token_of_probability_0_is_drawn_at_the_ends(setting):
    ends = torch.tensor([0.0, 1e-45, 2.0**-25, 0.5, 1 - 2.0**-24, 1.0])
    for vocabulary in (1, 63, 1025):
        logits = torch.randn(1, vocabulary, generator=generator(4)).expand(len(ends), -1) * 4
        p, token = likeliest(logits, *columns([setting] * len(ends)))
        got = drawn(p, token, ends)
        assert (by_token(p, token).gather(1, got[:, None]) > 0).all()
        assert got[0] == logits[0].argmax()


def test_the_last_number_draws_the_last_token_that_may_be():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0]], dtype=torch.float64)
    token = torch.tensor([[4, 2, 0, 1, 3]])
    assert [int(drawn(p, token, torch.tensor([u]))) for u in (0.1, 0.49, 0.51, 0.79, 0.81, 1.0)] == [4, 4, 2, 2, 0, 0]


def settings_of_many(n, seed):
    g = generator(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=g))]

    return [
        SamplingParams(
            temperature=pick(0.0, 0.7, 1.5),
            top_k=pick(0, 3, 40),
            top_p=pick(1.0, 0.8),
            min_p=pick(0.0, 0.05),
            repetition_penalty=pick(1.0, 1.0, 1.4),
            seed=pick(0, 1, 2**63 - 1),
        )
        for _ in range(n)
    ]


def continued(slots_of, params, logits, prompts, together, slots=8):
    """Tokens of sequences, 12 of each, that lie in these slots, a step of all at once or of one at a time."""
    sampler, n, steps = Sampler(slots, logits.shape[-1], CPU), len(params), logits.shape[0]
    for slot, x, prompt in zip(slots_of, params, prompts, strict=True):
        sampler.begin(slot, x, prompt)
    got = torch.zeros(steps, n, dtype=torch.int64)
    for step in range(steps):
        for part in [range(n)] if together else [[i] for i in reversed(range(n))]:
            slots_now = [slots_of[i] for i in part]
            got[step, list(part)] = sampler.tokens(logits[step, list(part)], slots_now, [step] * len(slots_now))
    return got


@pytest.mark.parametrize("seed", range(6))
def test_a_token_depends_on_its_own_request_alone(seed):
    params = settings_of_many(7, seed)
    logits = torch.randn(12, 7, 63, generator=generator(seed)) * 2
    prompts = torch.randint(63, (7, 20), generator=generator(seed)).tolist()
    whole = continued([*range(7)], params, logits, prompts, together=True)
    assert torch.equal(continued([*range(7)], params, logits, prompts, together=False), whole)
    assert torch.equal(continued([5, 0, 7, 2, 6, 1, 3], params, logits, prompts, together=True), whole)
    backwards = continued([*range(7)], params[::-1], logits.flip(1), prompts[::-1], together=True)
    assert torch.equal(backwards.flip(1), whole)


def test_a_draw_depends_on_seed_and_place():
    logits = torch.zeros(40, 63)
    params = SamplingParams(temperature=1.0)
    by_seed, by_place = Sampler(40, 63, CPU), Sampler(1, 63, CPU)
    for slot in range(40):
        by_seed.begin(slot, SamplingParams(temperature=1.0, seed=slot), [1])
    by_place.begin(0, params, [1])
    seeds = by_seed.tokens(logits, range(40), [0] * 40)
    places = torch.cat([by_place.tokens(logits[:1], [0], [place]) for place in range(40)])
    assert len(set(seeds.tolist())) > 20 and len(set(places.tolist())) > 20
    assert not torch.equal(seeds, places)
    assert seeds[0] == places[0]


def test_a_penalty_sees_prompt_and_answer():
    logits = torch.arange(9.0).repeat(1, 1) + 1  # the likeliest are 8, 7, ...
    sampler = Sampler(2, 9, CPU)
    sampler.begin(1, SamplingParams(repetition_penalty=100.0), [8, 6])
    assert [int(sampler.tokens(logits, [1], [i])) for i in range(5)] == [7, 5, 4, 3, 2]


def test_a_penalty_forgets_the_request_before():
    logits = torch.arange(9.0)[None] + 1
    sampler = Sampler(2, 9, CPU)
    sampler.begin(0, SamplingParams(repetition_penalty=100.0), [8, 7])
    assert int(sampler.tokens(logits, [0], [0])) == 6
    sampler.end(0)
    sampler.begin(0, SamplingParams(repetition_penalty=100.0), [7])
    assert int(sampler.tokens(logits, [0], [0])) == 8
    sampler.begin(0, SamplingParams(), [8])
    assert int(sampler.tokens(logits, [0], [0])) == 8


def test_a_penalty_does_not_reach_other_requests():
    logits = torch.arange(9.0).repeat(2, 1) + 1
    sampler = Sampler(2, 9, CPU)
    sampler.begin(0, SamplingParams(temperature=1e-6), [8])  # before anybody had a penalty
    sampler.begin(1, SamplingParams(repetition_penalty=100.0), [8])
    for place in range(3):
        assert sampler.tokens(logits, [0, 1], [place, place]).tolist() == [8, 7 - place]


@pytest.mark.parametrize("penalty", [0.7, 1.2, 3.0])
def test_cold_with_a_penalty_is_the_penalised_argmax(penalty):
    logits = 1 + torch.randn(5, 63, generator=generator(5)) * 0.05  # so alike that any penalty decides
    prompts = torch.randint(63, (5, 21), generator=generator(6))
    sampler = Sampler(5, 63, CPU)
    for slot in range(5):
        sampler.begin(slot, SamplingParams(repetition_penalty=penalty, top_k=2, top_p=0.5), prompts[slot].tolist())
    expected = RepetitionPenaltyLogitsProcessor(penalty)(prompts, logits.clone()).argmax(-1)
    assert torch.equal(sampler.tokens(logits, range(5), [0] * 5), expected)
    assert not torch.equal(expected, logits.argmax(-1))


def test_greedy_takes_the_argmax_beside_requests_that_draw():
    logits = torch.randn(7, 63, generator=generator(7))
    sampler = Sampler(7, 63, CPU)
    for slot in range(7):
        sampler.begin(slot, SamplingParams(temperature=0.0 if slot % 2 else 5.0, seed=slot), [1])
    tokens = sampler.tokens(logits, range(7), [3] * 7)
    assert torch.equal(tokens[1::2], logits.argmax(-1)[1::2])
    assert not torch.equal(tokens[::2], logits.argmax(-1)[::2])


@pytest.mark.parametrize("top", [0, 1, 5, 63])
def test_logprobs_are_those_of_log_softmax(top):
    logits = torch.randn(63, generator=generator(8)) * 3
    expected = logits.double().log_softmax(-1)
    got = logprobs_of(logits, 17, top)
    assert got.token == pytest.approx(float(expected[17]))
    assert [*got.top] == logits.argsort(descending=True)[:top].tolist()
    assert [*got.top.values()] == pytest.approx([float(expected[i]) for i in got.top])


def test_more_logprobs_than_tokens_are_all_of_them():
    assert len(logprobs_of(torch.randn(63, generator=generator(9)), 3, MOST_LOGPROBS).top) == 63


BAD = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -3),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
    ("top_k", -1),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("min_p", float("nan")),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", float("inf")),
    ("repetition_penalty", float("nan")),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 1.5),
    ("seed", True),
    ("stop", "END"),
    ("stop", ["END"]),
    ("stop", ("END", "")),
    ("logprobs", -1),
    ("logprobs", MOST_LOGPROBS + 1),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_bad_setting_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name}=")
    assert "\n" not in str(error.value)


def test_every_field_with_a_range_was_refused_something():
    free = {"stop_token_ids", "ignore_eos"}
    assert {name for name, _ in BAD} | free == {x.name for x in fields(SamplingParams)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("temperature", 1e-6),
        ("top_p", 1.0),
        ("min_p", 1.0),
        ("seed", 2**63 - 1),
        ("stop", ("END", "\n")),
        ("logprobs", 0),
        ("logprobs", MOST_LOGPROBS),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_settings_too_small_for_fp32_still_give_a_token(name):
    sampler = Sampler(1, 63, CPU)
    sampler.begin(0, SamplingParams(**{"temperature": 1.0, name: 1e-6 if name == "temperature" else 1e-50}), [1, 2])
    logits = torch.randn(1, 63, generator=generator(10))
    assert 0 <= int(sampler.tokens(logits, [0], [0])) < 63
