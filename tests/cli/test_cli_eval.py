"""``keysift eval`` from outside: fresh, killed, resumed, refused."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
import transformers

from keysift import pocket, ranks
from keysift.cli import main
from keysift.eval import ruler, runner
from keysift.eval.data import Data
from keysift.eval.results import read_records
from keysift.eval.runs import parse_run, preset

from ..tiny_models import tiny

pytestmark = pytest.mark.slow

QUICK = ["eval", "--tasks", "niah_single_1,vt", "--lengths", "1k", "--samples", "3"]
SPARSE = "prefill=flexprefill:block=32,min_budget=64;decode=magicpig:K=8,L=75"


def run(args, capsys):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("eval") / "out"
    command = [sys.executable, "-m", "keysift.cli", *QUICK, "--run", "dense", "--run", SPARSE, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def scores(folder):
    return sorted((r["run"], r["task"], r["length"], r["index"], r["score"], r["pred"]) for r in read_records(folder))


def test_a_run_writes_lines_tables_and_pictures(finished):
    folder, out, err = finished
    assert {p.name for p in folder.iterdir()} >= {
        "settings.json", "report.json", "report.csv", "accuracy.png", "heatmap.png", "speed.png", "dense.jsonl",
    }  # fmt: skip
    records = read_records(folder)
    assert len(records) == 12 and {r["index"] for r in records} == {0, 1, 2}
    assert all((folder / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in ("accuracy", "heatmap", "speed"))
    for words in ("score %", "less dense", "niah_single_1", "average", "MB/step", "tokens/s", "question read by"):
        assert words in out
    assert "vt 1024 done: 100%" in err and "report.csv" in err
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["question"] == "sparse" and settings["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{16}", settings["weights"])


def test_scores_are_the_predictions_graded_and_cells_their_means(finished):
    folder, _, _ = finished
    records = read_records(folder)
    assert all(r["score"] == ruler.grade(r["task"], r["pred"], tuple(r["outputs"])) for r in records)
    for cell in json.loads((folder / "report.json").read_text())["cells"]:
        if cell["task"] != "average":
            mine = [r for r in records if (r["run"], r["task"]) == (cell["run"], cell["task"])]
            assert cell["score"] == pytest.approx(sum(r["score"] for r in mine) / len(mine))
            assert cell["samples"] == len(mine) == 3
            kept = [r["kept_fraction"] for r in mine]
            assert cell["kept_fraction"] == pytest.approx(sum(kept) / 3)
    sparse = [r for r in records if r["run"] != "dense"]
    assert all(r["kept_fraction"] < 0.5 and r["prefill_density"] < 0.95 for r in sparse)
    assert all(r["bytes_per_step"] > 0 and r["ttft_s"] > 0 for r in records)


def test_dense_answers_are_those_of_plain_transformers(finished):
    folder, _, _ = finished
    path = pocket.path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for r in read_records(folder):
        if r["run"] == "dense":
            sample = ruler.make_sample(r["task"], r["length"], r["index"], tokenizer, Data())
            ids = torch.tensor([sample.ids])
            out = model.generate(ids, max_new_tokens=sample.new_tokens, do_sample=False)
            assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == r["pred"]


def test_the_same_command_again_does_nothing_twice(finished, capsys):
    folder, out, _ = finished
    before = {p.name: p.read_bytes() for p in folder.glob("*.jsonl")}
    code, again, _ = run([*QUICK, "--run", "dense", "--run", SPARSE, "--out", folder], capsys)
    assert code == 0 and again == out
    assert {p.name: p.read_bytes() for p in folder.glob("*.jsonl")} == before


def test_json_and_csv_say_what_the_report_says(finished, capsys):
    folder, _, _ = finished
    code, out, _ = run(["eval", "--report", "--out", folder, "--json"], capsys)
    assert code == 0 and json.loads(out) == json.loads((folder / "report.json").read_text())
    code, out, _ = run(["eval", "--report", "--out", folder, "--csv"], capsys)
    rows = list(csv.DictReader(io.StringIO(out)))
    cells = json.loads((folder / "report.json").read_text())["cells"]
    assert code == 0 and [float(r["score"]) for r in rows] == [c["score"] for c in cells]


def test_changed_settings_are_refused_and_growing_is_asked_for(finished, capsys):
    folder, _, _ = finished
    before = (folder / "settings.json").read_bytes()
    command = [*QUICK, "--run", "dense", "--run", SPARSE, "--out", folder]
    code, _, err = run([*command, "--seed", 7], capsys)
    assert code == 2 and "seed: 0 there, 7 here" in err and "choose another --out" in err
    code, _, err = run([*command, "--question", "dense"], capsys)
    assert code == 2 and "question: sparse there, dense here" in err
    code, _, err = run([*command[:-4], "--run", "decode=topk", "--out", folder], capsys)
    assert code == 2 and "--extend" in err
    assert (folder / "settings.json").read_bytes() == before


def test_a_changed_model_is_noticed(tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(pocket.path(), copy)
    args = [*QUICK, "--model", copy, "--out", tmp_path / "out"]
    assert run(args, capsys)[0] == 0
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1000.0
    (copy / "config.json").write_text(json.dumps(config))
    code, _, err = run(args, capsys)
    assert code == 2 and "config: " in err and "weights" not in err
    shutil.copyfile(pocket.path() / "config.json", copy / "config.json")
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    next(iter(weights.values()))[3, 5] += 1
    safetensors.torch.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(args, capsys)
    assert code == 2 and "weights: " in err and "config: " not in err


def test_extending_starts_from_what_the_folder_has(tmp_path, capsys):
    assert run(["eval", "--tasks", "vt", "--lengths", "1k", "--samples", "1", "--out", tmp_path], capsys)[0] == 0
    code, _, _ = run(["eval", "--extend", "--run", "decode=topk", "--out", tmp_path], capsys)
    done = sorted((r["run"], r["task"], r["length"], r["index"]) for r in read_records(tmp_path))
    assert code == 0 and done == [("decode=topk", "vt", 1024, 0), ("dense", "vt", 1024, 0)]


def test_a_checkpoints_generation_config_changes_no_answer(tmp_path, finished, capsys, monkeypatch):
    loaded = ranks.load

    def peculiar(*args):
        model, tokenizer = loaded(*args)
        model.generation_config.update(use_cache=False, no_repeat_ngram_size=3, do_sample=True, temperature=9.0)
        return model, tokenizer

    monkeypatch.setattr(ranks, "load", peculiar)
    assert run([*QUICK, "--run", "dense", "--run", SPARSE, "--out", tmp_path], capsys)[0] == 0
    assert scores(tmp_path) == scores(finished[0])


def test_samples_that_do_not_fit_are_marked_and_the_rest_goes_on(tmp_path, capsys):
    args = ["eval", "--tasks", "niah_single_1", "--samples", "6", "--out", tmp_path]
    code, out, err = run([*args, "--lengths", "240"], capsys)
    assert code == 1 and "failed" in out and "needs at least" in err
    assert len(read_records(tmp_path)) == 6 and 0 < sum(bool(r["error"]) for r in read_records(tmp_path)) < 6


def test_methods_on_a_model_that_they_cannot_serve_are_refused(tmp_path, capsys, monkeypatch):
    model, tokenizer = tiny("mistral-sliding-window"), transformers.AutoTokenizer.from_pretrained(pocket.path())
    monkeypatch.setattr(ranks, "load", lambda *args: (model, tokenizer))
    code, _, err = run([*QUICK, "--run", "decode=topk", "--out", tmp_path / "out"], capsys)
    assert code == 2 and "every layer of this model has a sliding window" in err and not (tmp_path / "out").exists()


@pytest.mark.soak
def test_a_run_killed_many_times_ends_as_an_uninterrupted_one(finished, tmp_path):
    folder, _, _ = finished
    out = tmp_path / "out"
    command = [sys.executable, "-m", "keysift.cli", *QUICK, "--run", "dense", "--run", SPARSE, "--out", str(out)]
    kills = 0
    while kills < 3:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(read_records(out))
        while process.poll() is None and len(read_records(out)) < before + 2:
            time.sleep(0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if len(read_records(out)) >= 9:
            break
    assert kills >= 2 and len(read_records(out)) < 12
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and scores(out) == scores(folder)
    cells = [json.loads((p / "report.json").read_text())["cells"] for p in (out, folder)]
    timed = ("ttft_s", "tokens_per_s")
    assert [{k: v for k, v in c.items() if k not in timed} for c in cells[0]] == [
        {k: v for k, v in c.items() if k not in timed} for c in cells[1]
    ]


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    answered = runner._answer
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answered(*args)

    monkeypatch.setattr(runner, "_answer", interrupted)
    code, out, err = run([*QUICK, "--out", tmp_path], capsys)
    assert code == 130 and "interrupted" in err and "same command continues" in err and out == ""
    assert len(read_records(tmp_path)) == 2


def test_a_sample_that_fails_is_marked_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    answered = runner._answer

    def short_of_memory(plan, chosen, llm, samples):
        if any(s.task == "vt" and s.index == 1 for s in samples):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return answered(plan, chosen, llm, samples)

    command = [*QUICK, "--batch", "3", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_answer", short_of_memory)
        code, out, err = run(command, capsys)
    assert code == 1 and "2, 1 failed" in out
    assert "1 of 6 samples failed" in err and "OutOfMemoryError" in err and "--retry-failed" in err
    failed = [r for r in read_records(tmp_path) if r["error"]]
    assert [(r["task"], r["index"], r["score"]) for r in failed] == [("vt", 1, None)]
    code, _, err = run(command, capsys)  # not done again unless asked for
    assert code == 1
    code, out, err = run([*command, "--retry-failed"], capsys)
    assert code == 0 and "failed" not in out
    assert len(read_records(tmp_path)) == 6


def test_two_processes_that_share_the_model_give_the_results_of_one(tmp_path, finished, capsys):
    both = [*QUICK, "--run", "dense", "--run", SPARSE, "--tensor-parallel", "2", "--device", "cpu", "--out", tmp_path]
    assert run(both, capsys)[0] == 0
    assert scores(tmp_path) == scores(finished[0])
    one, two = ({(r["run"], r["task"], r["index"]): r for r in read_records(x)} for x in (finished[0], tmp_path))
    for key, record in one.items():
        for field in ("prefill_density", "kept_fraction", "bytes_per_step"):
            assert two[key][field] == pytest.approx(record[field], rel=1e-3), (key, field)
    code, _, err = run([*QUICK, "--run", "dense", "--run", SPARSE, "--out", tmp_path], capsys)
    assert code == 2 and "tensor_parallel: 2 there, None here" in err


def test_drafts_answer_as_dense_decoding_does(tmp_path, finished, capsys):
    assert run([*QUICK, "--run", "draft=snapkv:budget=256", "--out", tmp_path], capsys)[0] == 0
    found = [x[1:] for x in scores(tmp_path)]
    assert found == [x[1:] for x in scores(finished[0]) if x[0] == "dense"]
    assert {r["run"] for r in read_records(tmp_path)} == {"draft=snapkv:budget=256"}


def test_shards_share_a_folder_and_do_everything_once(tmp_path, finished, capsys):
    folder, _, _ = finished
    for i in range(2):
        assert run([*QUICK, "--run", "dense", "--run", SPARSE, "--shard", f"{i}/2", "--out", tmp_path], capsys)[0] == 0
    assert scores(tmp_path) == scores(folder)
    assert sum(len(p.read_text().splitlines()) for p in tmp_path.glob("*.jsonl")) == 12


def test_lm_evals_tasks_are_samples_like_any_other(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    args = ["eval", "--tasks", "lm:ruler_vt", "--lengths", "1k", "--samples", "2", "--out", tmp_path, "--json"]
    code, out, _ = run([*args, "--run", "dense", "--run", SPARSE], capsys)
    assert code == 0
    cells = {(c["run"], c["task"]): c for c in json.loads(out)["cells"]}
    assert cells["dense", "lm:ruler_vt"]["score"] == 1 and cells["dense", "lm:ruler_vt"]["samples"] == 2
    assert cells[parse_run(SPARSE).name, "lm:ruler_vt"]["kept_fraction"] < 0.5
    records = read_records(tmp_path)
    assert all(len(r["outputs"]) == 5 and r["metrics"] for r in records)
    code, again, _ = run([*args, "--run", "dense", "--run", SPARSE], capsys)
    assert code == 0 and read_records(tmp_path) == records and again == out


@pytest.mark.parametrize("how", ["dense", "decode"])
def test_how_the_question_is_read_is_recorded_and_matters(how, tmp_path, finished, capsys):
    window = "prefill=streaming:sinks=16,window=64,block=16;decode=streaming:sinks=16,window=64"
    args = ["eval", "--tasks", "niah_single_1", "--lengths", "1k", "--samples", "4"]
    code, out, _ = run([*args, "--run", "dense", "--run", window, "--question", how, "--out", tmp_path], capsys)
    assert code == 0 and f"question read {'densely' if how == 'dense' else 'by the decode method'}" in out
    dense = {r["index"]: r["pred"] for r in read_records(tmp_path) if r["run"] == "dense"}
    sparse = {
        r["index"]: r["pred"] for r in read_records(finished[0]) if (r["run"], r["task"]) == ("dense", "niah_single_1")
    }
    assert {i: dense[i] for i in range(3)} == sparse  # dense methods read it alike in all three ways
    read = {r["prefill_density"] for r in read_records(tmp_path) if r["run"] != "dense"}
    assert all(0.1 < density < 0.4 for density in read)


def test_batches_answer_as_single_samples_do(tmp_path, finished, capsys):
    code, _, _ = run([*QUICK, "--run", "dense", "--run", SPARSE, "--batch", "3", "--out", tmp_path], capsys)
    same = sum(a == b for a, b in zip(scores(tmp_path), scores(finished[0]), strict=True))
    assert code == 0 and same >= 11  # padding moves the last bits, which may turn one answer


BAD = [
    (["--tasks", "niah_singel_1"], "unknown task 'niah_singel_1': did you mean niah_single_"),
    (["--tasks", ","], "--tasks is empty"),
    (["--lengths", "64"], "length=64: niah_single_1 needs at least"),
    (["--lengths", "65536"], "length=65536: the model's context is 32,768 tokens"),
    (["--lengths", "4x"], "--lengths 4x: write numbers"),
    (["--samples", "0"], "--samples 0: choose 1 or more"),
    (["--batch", "0"], "--batch 0: choose 1 or more"),
    (["--seed", "-1"], "seed=-1"),
    (["--shard", "2/2"], "--shard 2/2: write I/N"),
    (["--question", "maybe"], "question=maybe: choose sparse, dense or decode"),
    (["--run", "prefill=flexprefil"], "prefill method 'flexprefil' unknown"),
    (["--run", "decode=topk;decode=topk"], "decode stands there twice"),
    (["--run", "speed=fast"], "write prefill=SPEC;decode=SPEC;draft=SPEC"),
    (["--run", "draft=snapkv;decode=quest"], "drafts are checked against all keys"),
    (["--run", "draft=nothing"], "decode method 'nothing' unknown"),
    (["--tasks", "lm:ruler_vt", "--question", "dense"], "--question dense is for RULER's own tasks"),
    (["--tasks", "lm:ruler_tv"], "ruler_vt"),
    (["--preset", "papers"], "preset=papers: choose magicpig or flexprefill"),
    (["--chat"], "no chat template"),
    (["--tasks", "niah_single_2"], "task niah_single_2: no essays file: pass --essays FILE"),
    (["--tasks", "qa_1", "--squad", "nowhere.json"], "task qa_1: nowhere.json is no file: pass --squad FILE"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = ["eval", "--tasks", "niah_single_1", "--lengths", "1k", "--samples", "1", "--out", tmp_path / "out"]
    code, out, err = run([*base, *args], capsys)
    assert code == 2 and out == "" and message in err
    assert len([line for line in err.splitlines() if line.startswith("keysift: ")]) == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_the_output_folder_is_asked_for_and_must_be_writable(tmp_path, capsys):
    assert "--out DIR is missing" in run(["eval"], capsys)[2]
    (tmp_path / "file").write_text("")
    code, _, err = run([*QUICK, "--out", tmp_path / "file"], capsys)
    assert code == 2 and "cannot write to --out" in err
    code, _, err = run(["eval", "--report", "--out", tmp_path / "none"], capsys)
    assert code == 2 and "holds no results" in err


# ---- runs and presets ----------------------------------------------------------------------------------------------


def test_runs_are_spelled_canonically():
    assert parse_run("").name == parse_run("dense").name == parse_run("prefill=dense").name == "dense"
    assert parse_run(" decode = topk:keep=0.05 ; prefill=flexprefill ").name == "prefill=flexprefill;decode=topk"
    assert parse_run("decode=magicpig:K=9,mode=seed").methods == "magicpig mode=seed decode"
    assert parse_run("prefill=flexprefill:gamma=0.9;decode=quest").methods == "flexprefill prefill + quest decode"


def test_magicpigs_protocol():
    shape = {"model_type": "llama", "model_name": "meta-llama/Llama-3.1-8B-Instruct", "layers": 32}
    long = preset("magicpig", None, **shape)
    assert set(long.tasks) == set(ruler.TASKS) and long.samples == 50 and long.runs[0] == "dense"
    made = [parse_run(r).decode for r in long.runs[1:]]
    assert {m.window for m in made} == {64}
    assert all(m.dense_layers == (0, 16) for m in made if hasattr(m, "L"))
    assert {m.page for m in made if hasattr(m, "page")} == {16, 32, 64}
    short = preset("magicpig", ["lm:gsm8k_cot", "lm:coqa"], **shape)
    assert {parse_run(r).decode.window for r in short.runs[1:]} == {24}
    with pytest.raises(ValueError, match="window of 24 for lm:coqa and of 64"):
        preset("magicpig", ["lm:coqa", "vt"], **shape)
    deep = preset("magicpig", None, **shape | {"layers": 80})
    assert any(getattr(parse_run(r).decode, "dense_layers", ()) == (0, 16, 32, 48, 64) for r in deep.runs)


@pytest.mark.parametrize(
    ("model_type", "name", "gammas"),
    [("llama", "a/Llama-3", {0.95}), ("glm", "glm-4-9b", {0.95}), ("llama", "01-ai/Yi-9B-200K", {0.9}),
     ("qwen2", "x/", {0.9}), ("mistral", "m", {0.9, 0.95})],
)  # fmt: skip
def test_flexprefills_protocol(model_type, name, gammas):
    made = [parse_run(r).prefill for r in preset("flexprefill", None, model_type, name, 32).runs]
    flex = [m for m in made if hasattr(m, "gamma")]
    assert {m.gamma for m in flex} == gammas and {m.tau for m in flex} == {0.1}
    assert {m.min_budget for m in flex} == {1024} and {m.mode for m in flex} == {"default", "seed"}


def test_a_preset_takes_the_lengths_that_the_model_can(tmp_path, capsys, monkeypatch):
    planned = []
    monkeypatch.setattr(runner, "evaluate", lambda plan, *args: planned.append(plan))
    code, _, err = run(["eval", "--preset", "magicpig", "--tasks", "vt", "--out", tmp_path], capsys)
    assert code == 0 and "window 64, dense layers 0" in err
    assert planned[0].lengths == (16384, 32768) and planned[0].samples == 50
    assert planned[0].runs[0].name == "dense" and len(planned[0].runs) == 9
