"""The lm-eval model: dense gives what lm-eval's own model gives, sparse measures what generation would do."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers as hf

import keysift
from keysift import pocket
from keysift.methods import catalog
from tests.tiny_models import build, prompt, tiny

pytest.importorskip("lm_eval", reason="needs keysift[eval]")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from keysift.eval import lm as lm_module
from keysift.eval.lm import KeysiftLM, main
from keysift.eval.model_args import glue, glue_pairs, prepare

pytestmark = pytest.mark.slow

DOCUMENT = (pocket.path() / "demo.txt").read_text(encoding="utf-8")
QUESTION = "What is the secret code for heavy-chalk?"
STREAMING = "streaming:sinks=4,window=48,block=16"
DECODES = [
    "magicpig:K=4,L=20,window=16,dense_layers=none",
    "quest:keep=0.2,page=4,window=8,dense_layers=none",
    "snapkv:budget=20,window=8",
    "streaming:sinks=2,window=12",
]
PAIRS = [  # context, continuation
    ("", " The code"),
    ("", DOCUMENT[:300]),
    ("A short one", " is here"),
    (DOCUMENT[:500], " green"),
    (DOCUMENT[:500], " green and blue, said the fox."),
    (DOCUMENT[:500], DOCUMENT[500:900]),
    (DOCUMENT[:500], " green"),
    (DOCUMENT[:700], " x"),
    (DOCUMENT[:650] + " ", "and more of this"),
    (DOCUMENT[:100], DOCUMENT[100:160]),
]


def ask(lm, kind, arguments):
    """Answers to requests of one kind, in their order."""
    return getattr(lm, kind)([Instance(kind, {}, a, 0, ("task", 0, 1)) for a in arguments], disable_tqdm=True)


def tokens_of(lm, context, continuation):
    """Score token ids."""
    return lm._loglikelihood_tokens([(("", ""), list(context), list(continuation))], disable_tqdm=True)[0]


@pytest.fixture(scope="module")
def make(pocket_model):
    model, tokenizer = pocket_model
    return lambda cls=KeysiftLM, **options: cls(pretrained=model, tokenizer=tokenizer, **options)


@pytest.fixture(params=[1 << 28, 4 * 3584 * 11], ids=["whole", "pieces"])
def logits_bytes(request, monkeypatch):
    """All logits at once, and so few that every text goes in pieces."""
    monkeypatch.setattr(lm_module, "LOGITS_BYTES", request.param)


@pytest.mark.parametrize(("batch", "max_length"), [(1, None), (4, None), (4, 150)])
@pytest.mark.usefixtures("logits_bytes")
def test_dense_loglikelihood_is_that_of_lm_eval(make, batch, max_length):
    options = {"batch_size": batch, "max_length": max_length}
    expected = ask(make(HFLM, **options), "loglikelihood", PAIRS)
    answers = ask(make(**options), "loglikelihood", PAIRS)
    for (score, greedy), (theirs, their_greedy) in zip(answers, expected, strict=True):
        assert score == pytest.approx(theirs, abs=1e-4)
        assert greedy == their_greedy


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.usefixtures("logits_bytes")
def test_dense_rolling_loglikelihood_is_that_of_lm_eval(make, batch):
    options = {"batch_size": batch, "max_length": 200}
    texts = [(DOCUMENT[:n],) for n in (10, 100, 350, 1500)]  # the last one takes several windows
    expected = ask(make(HFLM, **options), "loglikelihood_rolling", texts)
    assert ask(make(**options), "loglikelihood_rolling", texts) == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_dense_generation_is_that_of_lm_eval(make, batch):
    limits = {"until": ["\n\n", " owls"], "max_gen_toks": 11}
    prompts = [(DOCUMENT[:n] + "\n" + QUESTION, limits) for n in (0, 300, 1200, 777)]
    prompts += [(DOCUMENT[:900] + QUESTION, {"until": [], "max_gen_toks": 9})]
    expected = ask(make(HFLM, batch_size=batch), "generate_until", prompts)
    assert len({*expected}) > 2
    for options in ({}, {"question": "dense", "question_tokens": 9}, {"question": "decode", "question_tokens": 9}):
        assert ask(make(batch_size=batch, **options), "generate_until", prompts) == expected


@pytest.mark.parametrize(
    ("decode", "question"), [*((d, {}) for d in DECODES), (DECODES[0], {"question": "dense", "question_tokens": 9})]
)
def test_loglikelihood_measures_what_generation_would_do(make, decode, question):
    """The log-probability of the tokens that greedy generation writes, by the logits that it chose them from."""
    lm = make(prefill=STREAMING, decode=decode, **question)
    context = lm.tokenizer(DOCUMENT[:1500] + QUESTION)["input_ids"]
    with keysift.LLM(lm.model, prefill=STREAMING, decode=decode, max_batch=1, max_length=len(context) + 6) as llm:
        params = keysift.SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=2)
        out = llm.generate(context, params, **question)[0]
    expected = sum(x.token for x in out.logprobs)
    assert tokens_of(lm, context, out.token_ids) == (pytest.approx(expected, abs=1e-3), True)
    score, greedy = tokens_of(lm, context, [*out.token_ids[:-1], list(out.logprobs[-1].top)[1]])
    assert score < expected
    assert not greedy


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])  # a cache that can be cropped, and one that cannot
@pytest.mark.parametrize("decode", ["dense", *DECODES])
def test_shared_contexts_and_batches_change_no_score(pocket_model, name, decode):
    lengths = [(60, 3), (60, 1), (60, 6), (60, 2), (41, 4), (41, 4), (70, 1), (70, 5)]
    draw = torch.Generator().manual_seed(0)
    requests = []
    for context, continuation in lengths:
        tail = torch.randint(1, 97, (continuation,), generator=draw).tolist()
        requests.append((("", ""), prompt(context)["input_ids"][0].tolist(), tail))
    methods = {"prefill": "streaming:sinks=2,window=16,block=16", "decode": decode}
    scores = {}
    for batch in (1, 2, 8):
        lm = KeysiftLM(pretrained=tiny(name), tokenizer=pocket_model[1], batch_size=batch, **methods)
        scores[batch] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    alone = [tokens_of(lm, context, tail) for _, context, tail in requests]
    for found in scores.values():
        assert [s for s, _ in found] == pytest.approx([s for s, _ in alone], abs=2e-3)
        assert [g for _, g in found] == [g for _, g in alone]


def test_contexts_are_read_once_and_continuations_step_by_step(make):
    lm = make(decode="topk:keep=0.1,window=8,dense_layers=none", batch_size=2)
    shapes = []
    hook = lm.model.model.embed_tokens.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    context = list(range(300, 380))
    lm._loglikelihood_tokens([(("", ""), context, tail) for tail in ([5], [6], [7, 8, 9, 10], [8, 9])], True)
    hook.remove()
    assert [tuple(s) for s in shapes] == [(1, 80), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_a_rolling_text_is_a_prompt_for_the_prefill_method(make):
    text = DOCUMENT[:1500]
    lm = make(prefill=STREAMING, decode="streaming:sinks=1,window=1")
    found = ask(lm, "loglikelihood_rolling", [(text,)])[0]
    ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
    with keysift.attach(lm.model, prefill=STREAMING), torch.no_grad():
        logits = lm.model(ids[:, :-1]).logits[0]
    expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert found == pytest.approx(float(expected), abs=1e-2)
    assert abs(found - ask(make(), "loglikelihood_rolling", [(text,)])[0]) > 1


def test_logits_of_long_texts_are_made_in_pieces(make, monkeypatch):
    monkeypatch.setattr(lm_module, "LOGITS_BYTES", 4 * 3584 * 20)
    lm, rows = make(batch_size=2), []
    hook = lm.model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0] * out.shape[1]))
    ask(lm, "loglikelihood_rolling", [(DOCUMENT[:2000],), (DOCUMENT[:1900],)])
    ask(lm, "loglikelihood", [(DOCUMENT[:2000], DOCUMENT[2000:2400]), (DOCUMENT[:1900], DOCUMENT[1900:2200])])
    hook.remove()
    assert max(rows) == 20


def test_the_head_is_the_models_own(pocket_model):
    """Granite divides its logits: a head applied by hand would miss that."""
    model = build("Granite", logits_scaling=7.0)
    ids, options = prompt(50)["input_ids"], {"tokenizer": pocket_model[1]}
    window = (None, ids[0, :1].tolist(), ids[0, 1:].tolist())
    expected = HFLM(pretrained=model, **options)._loglikelihood_tokens([window], disable_tqdm=True)[0]
    found = KeysiftLM(pretrained=model, **options)._loglikelihood_tokens([window], disable_tqdm=True)[0]
    assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert "forward" not in vars(model.get_decoder())


def test_a_model_is_as_it_was_between_requests_and_serves_several_lms(make, pocket_model):
    model = pocket_model[0]
    sparse, dense = make(prefill=STREAMING), make()
    before = ask(sparse, "loglikelihood", PAIRS[7:8])
    assert model.config._attn_implementation == "sdpa"
    assert ask(dense, "loglikelihood", PAIRS[7:8]) != before
    assert ask(sparse, "loglikelihood", PAIRS[7:8]) == before
    assert sparse.stats.prefill_density < 0.9
    assert dense.stats.prefill_density == 1
    sparse.reset_stats(measure_error=True)
    ask(sparse, "loglikelihood", PAIRS[7:8])
    assert sparse.stats.prefill_error > 0


def test_auto_batch_size_is_found_without_all_logits(make):
    lm = make(batch_size="auto", max_batch_size=2, max_length=48)
    expected = ask(make(batch_size=2, max_length=48), "loglikelihood", PAIRS[2:5])
    assert ask(lm, "loglikelihood", PAIRS[2:5]) == [(pytest.approx(s, abs=1e-4), g) for s, g in expected]
    assert lm.batch_sizes == {0: 2}
    assert lm._model_call(torch.ones(2, 30, dtype=torch.int64)).shape == (2, 1, 3584)


def test_adapters_of_peft_are_attached_to(pocket_model):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(build("Qwen3"), peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    ids = prompt(40)["input_ids"]
    options = {"pretrained": model.eval(), "tokenizer": pocket_model[1]}
    expected = tokens_of(HFLM(**options), ids[0, :30].tolist(), ids[0, 30:].tolist())
    lm = KeysiftLM(**options)
    assert tokens_of(lm, ids[0, :30].tolist(), ids[0, 30:].tolist())[0] == pytest.approx(expected[0], abs=1e-4)
    out = lm._model_generate(ids, 44, [], attention_mask=torch.ones_like(ids))
    assert torch.equal(out, model.generate(input_ids=ids, max_length=44, do_sample=False))


# ---- arguments ----

KNOWN = KeysiftLM.arguments()


def test_no_method_option_is_an_argument_too():
    """Or it could not be told what follows a SPEC."""
    assert not {f.name for cls in catalog().values() for f in fields(cls)} & KNOWN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decode=magicpig:K=10,L=150", "decode=magicpig:K=10;L=150"),
        ("decode=magicpig:K=10,L=150,dtype=float32", "decode=magicpig:K=10;L=150,dtype=float32"),
        (
            "pretrained=a,prefill=streaming:sinks=1,window=2,decode=streaming:sinks=3,window=4,seed=1",
            "pretrained=a,prefill=streaming:sinks=1;window=2,decode=streaming:sinks=3;window=4,seed=1",
        ),
        ("dtype=float32,x=1,prefill=dense", "dtype=float32,x=1,prefill=dense"),
        ("decode=magicpig:K=10,M=3", "decode=magicpig:K=10;M=3"),  # which magicpig refuses by name
        ("chat_template_args={'a':1,'b':2},decode=quest", "chat_template_args={'a':1,'b':2},decode=quest"),
    ],
)
def test_commas_of_a_spec_are_told_from_those_between_arguments(text, expected):
    assert glue(text, KNOWN) == expected


def test_pieces_of_a_spec_in_a_dict_are_put_back():
    pairs = {"pretrained": "a", "decode": "magicpig:K=10", "L": 150, "dtype": "float32"}
    assert glue_pairs(pairs, KNOWN) == {"pretrained": "a", "decode": "magicpig:K=10;L=150", "dtype": "float32"}
    whole = {"decode": "magicpig:K=10,L=150", "low_cpu_mem_usage": True}
    assert glue_pairs(whole, KNOWN) == whole
    lost = {"prefill": "streaming:sinks=1", "window": 4, "decode": "streaming:sinks=3"}
    with pytest.raises(ValueError, match="write ; for , between the options of a SPEC"):
        glue_pairs(lost, KNOWN)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model_args", "pretrained=pocket,prefill=streaming:sinks=1,window=64,decode=magicpig:K=9,L=50,seed=3"],
        ["--model_args", "prefill=streaming:sinks=1,window=64", "decode=magicpig:K=9,L=50", "seed=3"],
        ["--model_args=prefill=streaming:sinks=1;window=64,seed=3,decode=magicpig:K=9;L=50"],
        ["-a", "seed=3", "prefill=streaming:sinks=1,window=64", "-a", "decode=magicpig:K=9,L=50"],
        ["-a", json.dumps({"prefill": "streaming:sinks=1,window=64", "decode": "magicpig:K=9,L=50", "seed": 3})],
    ],
    ids=["string", "words", "equals", "twice", "json"],
)
def test_plain_specs_work_on_the_command_line(arguments, monkeypatch):
    """As lm-eval parses them, and the model gets them."""
    from lm_eval._cli import HarnessCLI

    command = ["--model", "keysift", *arguments, "--tasks", "some_task", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *prepare(command, KNOWN)])
    parsed = HarnessCLI().parse_args()
    assert (parsed.model, parsed.tasks, parsed.limit) == ("keysift", ["some_task"], 2)
    assert parsed.model_args["pretrained"] == str(pocket.path())
    lm = get_model("keysift").create_from_arg_obj(parsed.model_args, {"device": "cpu"})
    assert lm.methods["prefill"] == keysift.methods.parse("streaming:sinks=1,window=64", "prefill")
    assert lm.methods["decode"] == keysift.methods.parse("magicpig:K=9,L=50", "decode")
    assert lm.seed == 3


def test_plain_specs_work_in_model_args_of_simple_evaluate():
    lm = get_model("keysift").create_from_arg_string("decode=magicpig:K=9,L=50,dtype=float32,max_length=99")
    assert lm.methods["decode"] == keysift.methods.parse("magicpig:K=9,L=50", "decode")
    assert (lm.model.dtype, lm.max_length) == (torch.float32, 99)


def test_other_models_keep_their_arguments():
    command = ["--model", "hf", "--model_args", "pretrained=a,L=150", "--tasks", "t"]
    assert prepare(command, KNOWN) == command
    command = ["run", "--model", "keysift", "--config", "file.yaml"]
    assert prepare(command, KNOWN) == command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "magicpig:K=9,M=3"}, "magicpig has no option 'M': choose"),
        ({"prefill": "fast"}, "prefill method 'fast' unknown: choose"),
        ({"draft": "fast"}, "decode method 'fast' unknown: choose"),
        ({"draft": "snapkv:budget=512"}, "draft=snapkv:budget=512: lm-eval's tasks are answered without drafts"),
        ({"question": "dense"}, "question=dense needs question_tokens=N"),
        ({"seed": -1}, "seed=-1"),
        ({"pretrained": "bart"}, "bart is an encoder-decoder: keysift serves decoders only"),
        ({"pretrained": "gemma2"}, "it caps attention scores"),
    ],
)
def test_what_cannot_work_is_one_clear_line(options, message, pocket_model):
    models = {"bart": ("Bart", {}), "gemma2": ("Gemma2", {"attn_logit_softcapping": 5.0})}
    family, settings = models.get(options.get("pretrained"), ("Qwen3", {}))
    config = getattr(hf, f"{family}Config")(**{"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, **settings})
    kind = "ForConditionalGeneration" if family == "Bart" else "ForCausalLM"
    model = getattr(hf, family + kind)(config)
    with pytest.raises(ValueError, match=message) as caught:
        KeysiftLM(**{**options, "pretrained": model}, tokenizer=pocket_model[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("draft", [None, "", "none", "dense"])
def test_no_draft_is_no_error(make, draft):
    assert make(draft=draft).methods["decode"] == keysift.methods.parse("dense", "decode")


# ---- the command line ----


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    """A folder with one task, and lm-eval without the thousands of its own."""
    tasks = pytest.importorskip("lm_eval.tasks")
    data = Path(__file__).parent / "data" / "gsm8k.jsonl"
    (tmp_path / "plums.yaml").write_text(
        f"task: plums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: 1\n"
        "doc_to_choice: ['seven', 'twenty eight']\nmetric_list: [{metric: acc}]\n",
        encoding="utf-8",
    )
    own = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: own(**options, include_defaults=False))
    return tmp_path


@pytest.mark.parametrize("subcommand", [[], ["run"]])
def test_the_command_evaluates(local_tasks, subcommand, capsys):
    method = "magicpig:K=9,L=50,window=8"
    command = [*subcommand, "--model", "keysift", "--model_args", f"decode={method},dtype=float32", "--device", "cpu"]
    assert main([*command, "--tasks", "plums", "--include_path", str(local_tasks), "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert "|plums|" in out
    assert method.replace(",", ";") in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_args", "decode=magicpig:K=9,M=3"], "keysift: magicpig has no option 'M': choose"),
        (["--model_args", "draft=snapkv"], "keysift: draft=snapkv: lm-eval's tasks are answered without drafts"),
        (["--model_args", "pretrained=./no/such/folder"], "keysift: "),
        (["--tasks", "no_such_task"], "keysift: Tasks not found: no_such_task"),
    ],
)
def test_errors_of_the_command_are_one_line(local_tasks, arguments, message, capsys):
    command = ["--model", "keysift", "--device", "cpu", "--include_path", str(local_tasks)]
    assert main([*command, "--tasks", "plums", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.slow
def test_without_lm_eval_the_command_says_what_to_install(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "keysift.eval.lm", "--model", "keysift", "--tasks", "x"]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines() == ["keysift: evaluation needs lm-eval: pip install 'keysift[eval]' (not here)"]
