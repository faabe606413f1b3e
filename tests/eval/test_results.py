"""A folder of results survives kills, refuses other settings, and never counts a sample twice."""

import json
import math
import random

import pytest

from keysift.eval import report
from keysift.eval.results import Folder, Key, differences, file_name, read_records
from keysift.eval.statistics import average, mean_score, paired_difference

SETTINGS = {"tasks": ["vt"], "lengths": [1024], "runs": ["dense"], "samples": 3, "seed": 0, "versions": {"torch": "2"}}
SETTINGS |= {"model": "m", "data": {}}


def record(index, run="dense", task="vt", length=1024, score=1.0, error=None, **more):
    named = {"run": run, "task": task, "length": length, "index": index}
    return named | {"score": score, "pred": "ä\n", "outputs": ["x"], "error": error} | more


def opened(path, settings=SETTINGS, **options):
    return Folder(path, settings, **options)


def test_what_is_appended_is_on_disk_and_done_after_reopening(tmp_path):
    folder = opened(tmp_path / "new" / "deep")
    folder.append([record(0), record(1)])
    text = (tmp_path / "new" / "deep" / "dense.jsonl").read_text(encoding="utf-8")  # not closed: flushed
    assert [json.loads(line)["index"] for line in text.splitlines()] == [0, 1]
    folder.close()
    again = opened(tmp_path / "new" / "deep")
    assert again.done == {Key("dense", "vt", 1024, 0), Key("dense", "vt", 1024, 1)}
    again.append([record(1, score=0.0), record(2)])
    again.close()
    assert [(r["index"], r["score"]) for r in read_records(tmp_path / "new" / "deep")] == [(0, 1.0), (1, 1.0), (2, 1.0)]


@pytest.mark.parametrize(
    "torn", [b'{"run": "den', b"\xc3", b'{"run": "dense", "task": "vt", "length": 1024, "index": 1}']
)
def test_a_line_that_a_kill_cut_off_is_dropped_and_done_again(tmp_path, torn):
    folder = opened(tmp_path)
    folder.append([record(0)])
    folder.close()
    with (tmp_path / "dense.jsonl").open("ab") as out:
        out.write(torn)
    again = opened(tmp_path)
    assert again.done == {Key("dense", "vt", 1024, 0)}
    again.append([record(1)])
    again.close()
    lines = (tmp_path / "dense.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "dense.jsonl").write_text('{"run": "dense"}\n' + json.dumps(record(0)) + "\n")
    with pytest.raises(ValueError, match=r"dense.jsonl line 1 is damaged .* delete that line"):
        opened(tmp_path)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    opened(tmp_path).close()
    changed = SETTINGS | {"seed": 1, "samples": 5, "versions": {"torch": "3"}}
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, changed)
    text = str(caught.value)
    assert "samples: 3 there, 5 here; seed: 0 there, 1 here; versions.torch: 2 there, 3 here" in text
    assert "choose another --out" in text and "--extend" not in text
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        opened(tmp_path, changed, extend=True)


def test_a_folder_grows_only_when_asked_to(tmp_path):
    opened(tmp_path).close()
    more = SETTINGS | {"tasks": ["fwe"], "runs": ["decode=topk"], "samples": 9, "lengths": [2048]}
    with pytest.raises(ValueError, match="add --extend"):
        opened(tmp_path, more)
    grown = opened(tmp_path, more, extend=True)
    assert grown.settings["tasks"] == ["vt", "fwe"] and grown.settings["runs"] == ["dense", "decode=topk"]
    assert grown.settings["samples"] == 9 and grown.settings["lengths"] == [1024, 2048]
    grown.close()
    opened(tmp_path, grown.settings).close()


def test_differences_are_said_in_words():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == ["b.c: 2 there, 3 here"]
    assert differences({"a": list("pqrst")}, {"a": list("pqrsx")}) == ["a: now without t and with x"]
    assert differences({"a": list("pqrst")}, {"a": list("tsrqp")}) == ["a: now in another order"]
    assert differences({}, {"a": None}) == []


def test_folders_that_hold_something_else_or_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "dense.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds .jsonl files but no settings.json"):
        opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to --out"):
        opened(tmp_path / "file" / "inside")


def test_two_processes_cannot_write_one_file(tmp_path):
    first = opened(tmp_path)
    first.claim(["dense"])
    with pytest.raises(ValueError, match="another process is writing"):
        opened(tmp_path).claim(["dense"])
    opened(tmp_path, shard="1-2").claim(["dense"])  # a shard has files of its own
    first.close()
    opened(tmp_path).claim(["dense"])


def test_data_may_be_added_but_not_changed(tmp_path):
    opened(tmp_path, SETTINGS | {"data": {"squad": "1"}}).close()
    more = SETTINGS | {"data": {"essays": "2"}}
    assert opened(tmp_path, more, extend=True).settings["data"] == {"squad": "1", "essays": "2"}
    with pytest.raises(ValueError, match=r"data.squad: 1 there, 9 here"):
        opened(tmp_path, SETTINGS | {"data": {"squad": "9"}}, extend=True)


def test_failed_samples_are_not_forgotten_under_another_process(tmp_path):
    writing = opened(tmp_path, shard="0-2")
    writing.append([record(0, score=None, error="OutOfMemoryError: no")])
    with pytest.raises(ValueError, match="another process is writing"):
        opened(tmp_path).forget_failed()
    assert opened(tmp_path, shard="1-2").forget_failed() == 0  # not its own
    writing.append([record(1)])
    assert len(read_records(tmp_path)) == 2


def test_failed_samples_can_be_forgotten(tmp_path):
    folder = opened(tmp_path)
    failed = record(1, score=None, error="OutOfMemoryError: no")
    folder.append([record(0) | {"pred": "a\u2028b\u0085\ud83d"}, failed, record(2)])
    folder.close()
    with (tmp_path / "dense.jsonl").open("a") as out:
        out.write('{"run": "de')
    again = opened(tmp_path)
    assert again.forget_failed() == 1 and Key("dense", "vt", 1024, 1) not in again.done
    again.append([record(1)])
    assert sorted(r["index"] for r in read_records(tmp_path)) == [0, 1, 2]


def test_file_names_are_plain():
    assert (
        file_name("prefill=flexprefill:gamma=0.9;decode=topk", "0-2")
        == "prefill=flexprefill-gamma=0.9-decode=topk.0-2.jsonl"
    )
    assert len(file_name("x" * 500)) < 150


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_wilsons_interval_by_hand():
    ends = mean_score([1, 1, 1, 1, 1, 1, 1, 1, 1, 0])  # 9 of 10: textbook value (.5958, .9821)
    assert ends.mean == 0.9 and ends.count == 10
    assert abs(ends.low - 0.5958) < 1e-4 and abs(ends.high - 0.9821) < 1e-4
    assert mean_score([1.0] * 20).low == pytest.approx(20 / (20 + 3.8415), abs=1e-4)
    assert mean_score([]) is None


def test_the_interval_of_a_mean_holds_95_percent_of_the_time():
    rng = random.Random(0)
    for p in (0.5, 0.9):
        inside = 0
        for _ in range(1000):
            ends = mean_score([float(rng.random() < p) for _ in range(40)])
            inside += ends.low <= p <= ends.high
        assert 920 <= inside <= 990


def test_the_interval_of_a_difference_holds_95_percent_of_the_time():
    rng = random.Random(1)
    inside = 0
    for _ in range(1000):
        pairs = [(rng.random() < 0.8, rng.random() < 0.9) for _ in range(60)]
        ends = paired_difference([float(a) for a, _ in pairs], [float(b) for _, b in pairs])
        inside += ends.low <= -0.1 <= ends.high
    assert 925 <= inside <= 985


def test_a_difference_of_equal_answers_still_leaves_room_for_doubt():
    ends = paired_difference([1.0] * 40, [1.0] * 40)
    assert ends.mean == 0 and ends.low == -ends.high and 0.02 < ends.high < 0.2


def test_an_average_joins_the_intervals_of_its_parts():
    parts = [mean_score([1.0] * 9 + [0.0]), mean_score([1.0] * 5 + [0.0] * 5)]
    joined = average(parts)
    assert joined.mean == pytest.approx(0.7) and joined.count == 20
    assert joined.low == pytest.approx(0.7 - math.hypot(*(p.mean - p.low for p in parts)) / 2)


# ---- reports --------------------------------------------------------------------------------------------------------


def study():
    settings = SETTINGS | {"tasks": ["vt", "fwe"], "runs": ["dense", "decode=topk"], "lengths": [1024]}
    settings |= {"model": "m", "dtype": "float32", "device": "cpu", "question": "sparse", "chat": False}
    dense = [record(i, score=1.0, ttft_s=float(i), bytes_per_step=8.0) for i in range(3)]
    sparse = [record(i, "decode=topk", score=s, bytes_per_step=2.0) for i, s in ((0, 0.5), (2, 1.0))]
    failed = record(1, "decode=topk", score=None, error="OutOfMemoryError: no")
    other = [record(i, run, "fwe", score=0.4) for i in range(2) for run in settings["runs"]]
    return [*dense, *sparse, failed, *other], settings


def test_pairs_are_the_samples_that_both_answered_and_failures_are_marked():
    made = {(c.run, c.task): c for c in report.cells(*study())}
    sparse = made["decode=topk", "vt"]
    assert sparse.score.mean == 0.75 and sparse.score.count == 2 and sparse.failed == 1
    assert sparse.difference.mean == pytest.approx(-0.25) and sparse.difference.count == 2
    assert made["dense", "vt"].difference is None and made["dense", "vt"].speed["ttft_s"] == 1.0
    assert made["decode=topk", "average"].score.mean == pytest.approx((0.75 + 0.4) / 2)
    assert made["decode=topk", "average"].difference.mean == pytest.approx(-0.125)
    assert made["decode=topk", "vt"].read["bytes_per_step"] == 2.0


def test_an_average_is_shown_only_over_tasks_that_every_run_has():
    records, settings = study()
    without = [r for r in records if (r["run"], r["task"]) != ("decode=topk", "fwe")]
    assert "average" not in {c.task for c in report.cells(without, settings)}


def test_table_and_csv_show_the_same_figures():
    records, settings = study()
    made = report.cells(records, settings)
    from rich.console import Console

    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(made, settings))
    text = console.export_text()
    assert "75.0 [" in text and "2, 1 failed" in text and "-25.0 [" in text and "question read by the prefill" in text
    lines = report.to_csv(made).splitlines()
    assert lines[0].startswith("run,task,length,samples,failed,score,score_low") and len(lines) == len(made) + 1
    assert any(line.startswith("decode=topk,vt,1024,2,1,0.75,") for line in lines)
