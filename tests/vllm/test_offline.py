"""keysift's attention in vLLM's own engine: tokens of stock vLLM where it is dense, of ``keysift.LLM`` where sparse."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import keysift
from keysift.vllm_plugin import versions
from tests import tiny_models
from tests.vllm.answers import DIGITS, MODEL, book, cached, log_likelihoods, question, served, tokens

ROOT = Path(__file__).resolve().parents[2]
NEW = 16
QUEST = "quest:keep=0.1,dense_layers=none,dense_below=0"
STREAMING = "streaming:sinks=4,window=256"
FLEX = "flexprefill:gamma=0.9,min_budget=128,block=64,dense_below=0"
FLEX_IN_THEIR_WORDS = {"flex_prefill_gamma": 0.5, "flex_prefill_min_budget": 128, "block_size": 64}
IN_OURS = "flexprefill:gamma=0.5,min_budget=128,block=64"
LENGTHS = (1, 9, 63, 128, 1025, 3050)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Parts of a text, of different lengths."""
    ids = tokenizer(book()).input_ids
    return [ids[100 * i : 100 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def stock(prompts):
    """What vLLM gives without us."""
    with served() as llm:
        return tokens(llm, prompts, NEW)


def ours(prompts, new=NEW, **options):
    """What our own engine gives."""
    llm = keysift.LLM(MODEL, device="cpu", dtype="float32", max_length=4096, **options)
    try:
        return [list(o.token_ids) for o in llm.generate(prompts, keysift.SamplingParams(new, ignore_eos=True))]
    finally:
        llm.close()


def same(a, b):
    """How many tokens agree, counted up to where each answer first differs."""
    pairs = [[s == t for s, t in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)]
    return sum((*pair, False).index(False) for pair in pairs)


def test_where_kernels_are_compiled_that_is_before_the_first_request(monkeypatch, prompts):
    """Here they are not; but what compiles them elsewhere is done, once, and changes no answer."""
    methods, sizes = {"prefill": FLEX, "decode": QUEST}, {"max_model_len": 1500, "max_num_seqs": 4}
    short = [ids[:1000] for ids in prompts]
    with served(methods=methods, **sizes) as llm:
        wanted = tokens(llm, short, NEW)
    backend, longest = importlib.import_module("keysift.vllm_plugin.backend"), []
    warm_up = backend.warm_up
    monkeypatch.setattr(backend, "compiles", lambda device: True)
    monkeypatch.setattr(backend, "warm_up", lambda *args: (longest.append(args[2]), warm_up(*args)))

    def run_without_a_batch(worker):  # what workers for GPUs do when they start
        worker.model_runner._dummy_run(16)

    with served(methods=methods, **sizes) as llm:
        llm.collective_rpc(run_without_a_batch)
        assert longest == [1500]
        assert tokens(llm, short, NEW) == wanted
    assert longest == [1500]


@pytest.mark.parametrize("budget", [4096, 256], ids=["whole prompts", "chunks beside steps"])
def test_dense_methods_give_the_tokens_of_stock_vllm_cold_and_from_cached_prefixes(prompts, stock, budget):
    with served(methods={}, max_num_batched_tokens=budget) as llm:
        assert tokens(llm, prompts, NEW) == stock
        assert tokens(llm, prompts, NEW) == stock


@pytest.mark.parametrize(
    "methods",
    [{"decode": QUEST}, {"decode": STREAMING}, {"prefill": FLEX}, {"prefill": FLEX, "decode": QUEST}],
    ids=["quest", "streaming", "flexprefill", "both"],
)
def test_methods_give_the_tokens_of_our_own_engine(prompts, stock, methods):
    """Prompts of a page and more: of shorter ones nothing is left out here. Alone, so that each is one chunk."""
    with served(methods=methods) as llm:
        got = [tokens(llm, [prompt], NEW)[0] for prompt in prompts[3:]]
    assert got == ours(prompts[3:], **methods)
    assert got != stock[3:], "the methods left nothing out"


@pytest.mark.parametrize("decode", ["signbits:keep=0.05,dense_below=0", "magicpig:K=8,L=75,dense_below=0"])
def test_methods_that_begin_with_a_page_agree_with_our_own_engine_in_most_tokens(prompts, decode):
    """What is kept of a sequence is made of its first page: ours reads chunks of a page where prefixes are shared.
    Those compute keys in other batches, so a key on the edge of a code may fall to its other side."""
    with served(methods={"decode": decode}) as llm:
        got = tokens(llm, prompts[3:], NEW)
        assert tokens(llm, prompts[3:], NEW) == got, "cached prefixes changed what was said"
    wanted = ours(prompts[3:], decode=decode, reuse_prefixes=True, prefill_chunk=128)
    assert same(got, wanted) >= 0.6 * NEW * len(got)


@pytest.mark.parametrize(
    "methods",
    [
        {"decode": "signbits:keep=0.05,dense_below=0"},
        {"decode": "magicpig:dense_below=0", "seed": 3},
        {"decode": QUEST, "prefill": FLEX},
    ],
    ids=["signbits", "magicpig", "quest and flexprefill"],
)
def test_questions_are_answered_in_one_batch_in_chunks_and_from_cached_prefixes(tokenizer, methods):
    asked = [question(i, 12) for i in range(8)]
    prompts = [tokenizer(text).input_ids for text, _ in asked]
    with served(methods=methods, max_num_batched_tokens=512) as llm:
        for _ in range(2):
            for (_, answer), ids in zip(asked, tokens(llm, prompts, DIGITS), strict=True):
                assert answer in tokenizer.decode(ids)


@pytest.mark.parametrize("methods", [None, {}, {"decode": QUEST}], ids=["stock", "custom", "quest"])
def test_patch_model_reads_prompts_by_another_method_until_it_is_detached(prompts, stock, methods):
    decode = {"decode": QUEST} if methods else {}
    with served(methods=methods) as llm:
        before = [tokens(llm, [prompt], NEW)[0] for prompt in prompts[3:]]
        patched = keysift.patch_model(llm, "flex_prefill", FLEX_IN_THEIR_WORDS)
        sparse = [tokens(llm, [prompt], NEW)[0] for prompt in prompts[3:]]
        patched.detach()
        after = [tokens(llm, [prompt], NEW)[0] for prompt in prompts[3:]]
        with keysift.patch_model(llm, "dense"):
            dense = [tokens(llm, [prompt], NEW)[0] for prompt in prompts[3:]]
    assert sparse == ours(prompts[3:], prefill=IN_OURS, **decode)
    assert before == after == dense != sparse
    if not decode:
        assert before == stock[3:]


def test_a_second_patch_takes_the_place_of_the_first(prompts):
    with served() as llm:
        keysift.patch_model(llm, "streaming_llm", {"global_window": 128, "local_window": 256})
        first = tokens(llm, prompts[5:], NEW)
        keysift.patch_model(llm, "flex_prefill", FLEX_IN_THEIR_WORDS)
        second = tokens(llm, prompts[5:], NEW)
    assert first == ours(prompts[5:], prefill="streaming:sinks=128,window=256")
    assert second == ours(prompts[5:], prefill=IN_OURS)


def test_patch_model_refuses_what_it_does_not_know_and_leaves_the_engine_as_it_was(prompts, stock):
    with served() as llm:
        for pattern, options, words in (
            ("flex", None, "pattern 'flex' unknown"),
            ("flex_prefill", {"gamma": 1}, "no option 'gamma'"),
            ("flex_prefill", {"flex_prefill_gamma": 2}, "gamma=2"),
        ):
            with pytest.raises(ValueError, match=words):
                keysift.patch_model(llm, pattern, options)
        assert tokens(llm, prompts, NEW) == stock


@pytest.mark.parametrize(
    ("methods", "options", "words"),
    [
        ({"decod": "quest"}, {}, ["no option 'decod'", "prefill, decode, seed"]),
        ({"decode": "quests"}, {}, ["quests", "quest"]),
        ({"decode": "quest:keep=2"}, {}, ["keep=2"]),
        ({"decode": "snapkv"}, {}, ["'snapkv' cannot serve in vLLM", "signbits"]),
        ({"decode": "magicpig:match=tables"}, {}, ["match=tables", "match=bits"]),
        ({"decode": "magicpig:mode=seed"}, {}, ["mode=seed"]),
        ({"decode": 3}, {}, ["decode=3", "SPEC"]),
        ({"seed": -1}, {}, ["seed=-1"]),
        ("quest", {}, ["keysift='quest'", "object"]),
        ({"decode": "magicpig"}, {"block_size": 16}, ["--block-size 16", "multiples of"]),
        ({"decode": "quest:keep_bytes=0.05"}, {}, ["keep_bytes=0.05", "to choose alone takes 0.062"]),
        ({}, {"kv_cache_dtype": "bfloat16"}, ["bfloat16", "--kv-cache-dtype"]),
        ({}, {"kv_cache_dtype": "fp8"}, ["fp8", "--kv-cache-dtype"]),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            ["--speculative-config"],
        ),
    ],
)
def test_options_that_cannot_be_served_are_refused_in_our_own_words(methods, options, words):
    with pytest.raises(ValueError) as refused, served(methods=methods, **options):
        pass
    for word in words:
        assert word in str(refused.value)


def test_options_without_our_attention_are_refused():
    with pytest.raises(ValueError, match="--attention-backend CUSTOM"), served(additional_config={"keysift": {}}):
        pass


def test_a_version_that_is_not_supported_is_named(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.1+cpu")
    assert versions.unsupported() is not None
    for word in ("0.99.1", *versions.SUPPORTED):
        assert word in versions.unsupported()


def test_patch_model_refuses_a_version_that_is_not_supported(monkeypatch):
    with served() as llm:
        monkeypatch.setattr("vllm.__version__", "0.99.1")
        with pytest.raises(ValueError, match=r"0\.99\.1"):
            keysift.patch_model(llm, "flex_prefill")


def test_patch_model_refuses_an_engine_whose_pages_hold_a_part_of_a_sequence(prompts, stock, monkeypatch):
    with served() as llm:
        config = llm.llm_engine.vllm_config.parallel_config
        monkeypatch.setattr(config, "decode_context_parallel_size", 2)
        with pytest.raises(ValueError, match="decode context parallelism"):
            keysift.patch_model(llm, "flex_prefill")
        monkeypatch.undo()
        assert tokens(llm, prompts, NEW) == stock


def test_an_error_within_a_patch_is_not_hidden_by_what_follows_from_it(prompts, monkeypatch):
    def fail(llm):
        with keysift.patch_model(llm, "flex_prefill"):
            monkeypatch.setattr(llm.llm_engine, "has_unfinished_requests", lambda: True)  # as it leaves them behind
            raise KeyError("mine")

    with served() as llm:
        with pytest.raises(KeyError, match="mine") as error:
            fail(llm)
        assert "still read by flexprefill" in error.value.__notes__[0]


def test_a_first_page_that_steps_fill_is_made_as_one_that_a_prompt_fills(prompts):
    """The side data of the former are made between two batches, which may be graphs."""
    methods = {"decode": "signbits:keep=0.05,window=8,sinks=4,dense_layers=none,dense_below=0"}
    ids = prompts[4][:100]
    with served(methods=methods) as llm:
        said = tokens(llm, [ids], 60)[0]
        assert cached(llm, ids + said) == 128, "the page that steps have filled"
        hit = log_likelihoods(llm, [ids + said], NEW)
    with served(methods=methods) as llm:
        assert log_likelihoods(llm, [ids + said], NEW) == pytest.approx(hit, abs=1e-3)


def random_model(folder, family, **options):
    """A small one with random weights, whose head dim vLLM has kernels for; tokens are ids."""
    model = tiny_models.build(family, **{"head_dim": 64, "max_position_embeddings": 1024, **options})
    model.save_pretrained(folder)
    return str(folder)


def random_ids(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths]


SMALL = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 1024}


def test_layers_with_a_window_of_their_own_give_the_tokens_of_stock_vllm(tmp_path):
    folder = random_model(tmp_path / "mistral", "Mistral", sliding_window=24)
    ids = random_ids(10, 100, 300)
    with served(folder, **SMALL) as llm:
        wanted = tokens(llm, ids)
    with served(folder, {"decode": "quest:keep=0.1,dense_layers=none,window=16,dense_below=0"}, **SMALL) as llm:
        assert tokens(llm, ids) == wanted


def test_a_model_of_windows_and_full_layers_is_sparse_in_these_alone(tmp_path):
    """Pages of both kinds are as large, though only one kind keeps something beside its keys."""
    layers = {"layer_types": tiny_models.MIXED, "sliding_window": 24, "query_pre_attn_scalar": 64}
    folder = random_model(tmp_path / "gemma3", "Gemma3", tie_word_embeddings=True, **layers)
    ids = random_ids(10, 100, 300)
    with served(folder, **SMALL) as llm:
        wanted = log_likelihoods(llm, ids)
    with served(folder, {}, **SMALL) as llm:
        assert log_likelihoods(llm, ids) == pytest.approx(wanted, abs=1e-3)
    with served(folder, {"decode": "quest:keep=0.1,dense_layers=none,window=16,dense_below=0"}, **SMALL) as llm:
        *short, long = log_likelihoods(llm, ids)
    assert short == pytest.approx(wanted[:2], abs=1e-3), "of so few tokens nothing is left out"
    assert long != pytest.approx(wanted[2], abs=1e-2)


def test_a_model_with_softcapped_logits_is_refused_by_what_it_has(tmp_path):
    folder = random_model(tmp_path / "gemma2", "Gemma2", query_pre_attn_scalar=64, sliding_window=24)
    with pytest.raises(ValueError, match="softcapped logits"), served(folder, {}, **SMALL):
        pass


@pytest.mark.parametrize(
    "shared",
    [
        {"tensor_parallel_size": 2},
        # without a trace, vLLM's runner for CPUs has no place for what one stage hands to the next
        {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}},
    ],
    ids=["heads", "layers"],
)
def test_two_processes_that_share_a_model_give_the_tokens_of_one(prompts, tmp_path, shared):
    """Draws are numbered by heads and layers of the whole model."""
    methods, prompts = {"decode": "magicpig:K=8,L=75,dense_below=0", "prefill": "dense"}, prompts[:5]
    with served(methods=methods) as llm:
        wanted = tokens(llm, prompts, NEW)
    file = tmp_path / "tokens.json"
    asked = {"served": {"methods": methods} | shared, "prompts": prompts}
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # vLLM would have a NUMA node for each
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | unbound
    line = [sys.executable, "-m", "tests.vllm.answers", json.dumps(asked), str(file)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert same(json.loads(file.read_text(encoding="utf-8")), wanted) >= 0.9 * NEW * len(prompts)
