"""lm-eval's tasks a document at a time give what lm-eval gives for all of them."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import yaml

from keysift import pocket

pytest.importorskip("lm_eval", reason="needs keysift[eval]")

import lm_eval
from lm_eval.tasks import TaskManager

from keysift.eval import harness, squad
from keysift.eval.lm import KeysiftLM

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"
STOCK = Path(lm_eval.__file__).parent / "tasks"
RULER = "niah_single_1 niah_multikey_2 niah_multikey_3 ruler_vt ruler_cwe ruler_fwe".split()
SPARSE = {"prefill": "streaming:sinks=4,window=128,block=32", "decode": "quest:keep=0.3,page=4,window=16"}
SHORT = {"do_sample": False, "until": ["\n\n"], "max_gen_toks": 6}
# name: the stock task whose format it has, its data by split, and settings of its own
LOCAL = {
    "longbench_hotpotqa": ("longbench/hotpotqa.yaml", {"test": "hotpotqa"}, {}),
    "longbench_trec": ("longbench/trec.yaml", {"test": "trec"}, {}),
    "longbench2_govt_single": ("longbench2/govt_single_doc.yaml", {"train": "longbench2"}, {}),
    "infinitebench_passkey": ("infinitebench/infinitebench_passkey.yaml", {"passkey": "infinitebench"}, {}),
    "babilong_qa1": ("babilong/babilong_qa1.yaml", {"qa1": "babilong"}, {"custom_dataset": None}),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml", {"test": "gsm8k"}, {}),
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", {"test": "mmlu_test", "dev": "mmlu_dev"}, {"num_fewshot": 5}),
    "mmlu_flan_cot_fewshot_anatomy": (
        "mmlu/flan_cot_fewshot/mmlu_anatomy.yaml",
        {"test": "mmlu_test", "validation": "mmlu_dev"},
        {},
    ),
    "coqa": ("coqa/default.yaml", {"train": "coqa", "validation": "coqa"}, {}),
    "sampled": (  # examples drawn at random, as many tasks do
        "gsm8k/gsm8k.yaml",
        {"test": "gsm8k", "train": "gsm8k"},
        {"num_fewshot": 2},
    ),
    "wikitext": (
        "wikitext/wikitext.yaml",
        {"test": "text"},
        {"process_results": None, "doc_to_target": "{{text}}", "training_split": None, "validation_split": None},
    ),
}
SLOW = {"mmlu_flan_cot_fewshot_anatomy", "sampled"}
NEEDS = {"longbench_hotpotqa": "jieba", "longbench_trec": "jieba"}
METRIC = {
    "longbench_hotpotqa": "score",
    "longbench_trec": "score",
    "longbench2_govt_single": "acc",
    "infinitebench_passkey": "score",
    "babilong_qa1": "acc",
    "gsm8k_cot": "exact_match",
    "mmlu_anatomy": "acc",
    "mmlu_flan_cot_fewshot_anatomy": "exact_match",
    "coqa": "em",
    "sampled": "exact_match",
    "wikitext": "word_perplexity",
}
LENGTHS = """
def process_docs(docs):
    return docs.map(lambda doc: {"max_length": 512 if "Edda" in doc["question"] else 4096, "outputs": ["seven"]})

def process_results(doc, results):
    return {"4096": -1.0, str(doc["max_length"]): 0.5}

def aggregate(values):
    return sum(v for v in values if v != -1) / max(1, sum(v != -1 for v in values))
"""


@pytest.fixture(autouse=True, scope="module")
def _less_talk():
    """lm-eval warns at every step; what must not be missed is asserted."""
    logger = logging.getLogger("lm_eval")
    before, logger.level = logger.level, logging.ERROR
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files with the formats of lm-eval's own, and data that is here."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (stock, splits, settings) in LOCAL.items():
        files = {split: str(DATA / f"{file}.jsonl") for split, file in splits.items()}
        config = {
            "include": str(STOCK / stock),
            "task": f"local_{name}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            **({"generation_kwargs": SHORT} if name != "mmlu_anatomy" else {}),
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    plain = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(DATA / "gsm8k.jsonl")}}}
    plain |= {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    plain |= {"output_type": "generate_until", "generation_kwargs": SHORT}
    (folder / "lengths.py").write_text(LENGTHS, encoding="utf-8")
    ours = {name: f"!function lengths.{name}" for name in ("process_docs", "process_results")}
    metrics = [{"metric": m, "aggregation": "!function lengths.aggregate", "higher_is_better": True} for m in ("4096",)]
    codes = {**plain, "dataset_kwargs": {"data_files": {"test": str(DATA / "hotpotqa.jsonl")}}}
    codes |= {"generation_kwargs": {**SHORT, "max_gen_toks": 24}}
    codes |= {"doc_to_text": "{{context}}\n{{question}}", "doc_to_target": "{{answers[0]}}"}
    codes |= {"filter_list": [{"name": "code", "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}]}]}
    codes["filter_list"][0]["filter"].append({"function": "take_first"})
    others = {
        "local_codes": {**codes, "metric_list": [{"metric": "exact_match"}]},
        "local_lengths": {**plain, **ours, "metric_list": metrics},
        "local_translation": {**plain, "metric_list": [{"metric": "bleu"}, {"metric": "ter"}]},
        "local_missing": {**plain, "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}},
        "local_code": {**plain, "unsafe_code": True},
    }
    for name, config in others.items():
        text = yaml.safe_dump({"task": name, **config}).replace("'!function", "!function")
        text = "\n".join(line.rstrip("'") if "!function" in line else line for line in text.splitlines())
        (folder / f"{name}.yaml").write_text(text + "\n", encoding="utf-8")
    groups = {
        "local_group": ["local_coqa", {"group": "inner", "task": ["local_mmlu_anatomy"]}],
        "local_overriding": [{"task": "local_mmlu_anatomy", "num_fewshot": 0}],
    }
    for name, members in groups.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": members}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sparse(pocket_model):
    model, tokenizer = pocket_model
    return KeysiftLM(pretrained=model, tokenizer=tokenizer, batch_size=2, **SPARSE)


def load(names, folder, lengths=None, seed=0):
    return harness.load(names, str(pocket.path()), lengths, seed, folder)


def aggregate(name, lm, folder, **metadata):
    """What lm-eval itself reports for a task: ``{"metric,filter": number}``."""
    metadata |= {"tokenizer": str(pocket.path())}
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # every load moves its generator on
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    limit = 3 if "max_seq_lengths" in metadata else None
    found = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0, limit=limit)
    return {k: v for k, v in found["results"][name].items() if isinstance(v, float) and "stderr" not in k}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LOCAL])
def test_documents_one_by_one_average_to_what_lm_eval_reports(name, sparse, folder):
    if (module := NEEDS.get(name)) and importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}, of lm-eval's extra longbench")
    task = load([f"local_{name}"], folder)[f"local_{name}"]
    assert task.metric == METRIC[name]
    order = [*range(task.size)][::-1]  # no document depends on those before it
    answers = [task.answer(i, sparse) for i in order]
    expected = aggregate(f"local_{name}", sparse, folder)
    assert {*answers[0].metrics} == {*expected} - ({"sample_len"} if "sample_len" in expected else set())
    if name == "wikitext":  # a perplexity of all is no mean of perplexities
        assert all(a.score > 1 and a.metrics["word_perplexity,none"] == a.score for a in answers)
        return
    for key, value in expected.items():
        assert sum(a.metrics[key] for a in answers) / task.size == pytest.approx(value, abs=1e-6)
    first = next(key for key in answers[0].metrics if key.split(",")[0] == task.metric)
    assert all(a.score == a.metrics[first] for a in answers)
    assert all(a.outputs and all(a.outputs) for a in answers)
    assert 0 <= min(a.score for a in answers) <= max(a.score for a in answers) <= 1


def test_right_answers_score_and_wrong_ones_do_not(pocket_model, folder):
    """The comparison above would hold for zeros too."""
    model, tokenizer = pocket_model
    scores = []
    blind = {"prefill": "streaming:sinks=1,window=16,block=16", "decode": "streaming:sinks=1,window=8"}
    for methods in ({"decode": SPARSE["decode"]}, blind):
        lm = KeysiftLM(pretrained=model, tokenizer=tokenizer, **methods)
        task = load(["local_codes"], folder)["local_codes"]
        scores.append([task.answer(i, lm).score for i in range(task.size)])
    assert scores == [[1, 0, 1], [0, 0, 0]]  # no code in the second document; none within the window


def test_answers_of_squad_are_compared_by_their_words():
    assert squad.compute_exact("The red  boat!", "red boat") == 1
    assert squad.compute_exact("red boat", "boat") == 0
    assert squad.compute_f1("a red boat", "the boat and bread") == pytest.approx(2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2))
    assert (squad.compute_f1("the", "an"), squad.compute_f1("the", "boat")) == (1, 0)


def test_an_answer_says_what_was_chosen_and_what_was_right(sparse, folder):
    task = load(["local_mmlu_anatomy"], folder)["local_mmlu_anatomy"]
    answers = [task.answer(i, sparse) for i in range(task.size)]
    assert [a.outputs for a in answers] == [["B"], ["C"], ["A"]]
    assert all((a.pred == a.outputs[0]) == bool(a.score) for a in answers)
    assert {a.pred for a in answers} <= {*"ABCD"}
    assert load(["local_gsm8k_cot"], folder)["local_gsm8k_cot"].answer(1, sparse).outputs == ["7"]


def test_asking_again_gives_the_same_answer(sparse, folder):
    """Nothing of an answer stays behind in the task; another seed draws other examples."""
    task, other = (load(["local_sampled"], folder, seed=seed)["local_sampled"] for seed in (0, 5))
    assert task.answer(2, sparse) == task.answer(2, sparse)
    first, second = (t._instances(2)[0].args[0] for t in (task, other))
    assert first != second
    with pytest.raises(ValueError, match="lm:local_sampled has 3 documents: there is no document 3"):
        task.answer(3, sparse)


def test_a_metric_for_each_length_is_one_metric(sparse, folder):
    task = load(["local_lengths"], folder)["local_lengths"]
    answers = [task.answer(i, sparse) for i in range(3)]
    assert task.metric == "string_match"
    assert [a.metrics for a in answers] == [{"4096,none": 0.5}, {"512,none": 0.5}, {"4096,none": 0.5}]
    assert [(a.score, a.outputs) for a in answers] == [(0.5, ["seven"])] * 3


def test_groups_and_tags_become_their_tasks(folder):
    assert [*load(["local_group"], folder)] == ["local_coqa", "local_mmlu_anatomy"]
    index = harness._index(folder)
    assert len(harness._leaves("mmlu_flan_cot_fewshot", index)) == 57
    assert len(harness._leaves("longbench", index)) == 21
    assert harness._leaves("ruler", index)[:2] == ["niah_single_1", "niah_single_2"]
    assert "longbench_hotpotqa" in harness._leaves("longbench_multi_tasks", index)
    assert {"gsm8k_cot", "ruler", "local_coqa"} <= {*harness.known(folder)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local_coqq", "lm-eval has no task 'local_coqq': did you mean .*local_coqa"),
        ("local_translation", "lm:local_translation: its metric .bleu, ter. is computed over all documents at once"),
        ("local_missing", "lm:local_missing: cannot load it: .*nowhere.jsonl.*; run `keysift eval --fetch --tasks"),
        ("local_code", "lm:local_code runs code that a model wrote"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(name, message, folder):
    for use in (lambda: load([name], folder), lambda: harness.fetch([name], include_path=folder)):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"include_path=.*gone: no such folder"):
        harness.known(tmp_path / "gone")


def test_babilong_takes_one_length():
    assert [harness._babilong_length([n]) for n in (4096, 131072, 1_000_000)] == ["4k", "128k", "1M"]
    with pytest.raises(ValueError, match="one length at a time"):
        harness._babilong_length([4096, 8192])


@pytest.mark.slow
def test_a_group_that_changes_its_tasks_is_loaded_as_a_whole(folder):
    task = load(["local_overriding"], folder)["local_mmlu_anatomy"]
    plain = load(["local_mmlu_anatomy"], folder)["local_mmlu_anatomy"]
    assert len(task._instances(0)[0].args[0]) < len(plain._instances(0)[0].args[0]) / 2  # without examples


@pytest.mark.slow
@pytest.mark.parametrize("name", RULER)
def test_ruler_is_lm_evals(name, sparse):
    """The same documents whatever was loaded before, and the same scores."""
    pytest.importorskip("wonderwords", reason="needs lm-eval's extra ruler")
    tasks = [harness.load([name], str(pocket.path()), [1024], 0)[name] for _ in range(2)]
    assert tasks[0].size == 500
    assert tasks[0]._instances(70)[0].args == tasks[1]._instances(70)[0].args
    answers = [tasks[0].answer(i, sparse) for i in range(3)]
    expected = aggregate(name, sparse, STOCK / "ruler", max_seq_lengths=[1024])
    assert sum(a.score for a in answers) / 3 == pytest.approx(expected["1024,none"], abs=1e-6)
    assert answers[0].metrics.keys() == {"1024,none"}
