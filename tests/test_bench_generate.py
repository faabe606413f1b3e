"""``keysift bench generate``: whole generations by the engine, counted and timed."""

import json
import types

import pytest
import torch

from keysift import pocket
from keysift.bench import first_token, generate, speculate
from keysift.bench.generate import Row, Shape, Subject
from keysift.bench.generate_plot import draw_generations
from keysift.bench.speculate import Accepting, Round, Run
from keysift.bench.speculate_plot import draw_speculation, lines_of
from keysift.cli import main
from keysift.hf.rounds import Rounds
from keysift.hf.served import ServedModel
from keysift.methods import describe, parse
from tests.helpers import Clock

QUEST = parse("quest:keep=0.2,dense_layers=none,dense_below=0", "decode")
STREAMING = parse("streaming:window=20", "decode")
DENSE = generate.DENSE
CPU = torch.device("cpu")
SMALL = ("bench", "generate", "--device", "cpu", "--shapes", "1x100x3")


@pytest.fixture(scope="module")
def subject():
    return Subject(first_token.random_model("tiny", 400, CPU, torch.float32).model)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setitem(generate.COPY_BYTES, "cpu", 1 << 20)


@pytest.fixture
def clock(monkeypatch):
    """A plain step takes 4 ms, drafts of a round 8 ms and its pass 5 ms; nothing else takes any time."""
    clock = Clock()
    for module in ("keysift.bench.generate", "keysift.bench.steps", "keysift.scheduler"):
        monkeypatch.setattr(f"{module}.time", clock)
    for owner, name, seconds in (
        (ServedModel, "_step", 4e-3),
        (Rounds, "draft_all", 8e-3),
        (Rounds, "verify_all", 5e-3),
    ):
        monkeypatch.setattr(owner, name, clock.slower(getattr(owner, name), seconds))
    return clock


def measured(subject, shapes, runs, **options):
    runs = [run if isinstance(run, Run) else Run(run) for run in runs]
    setup = generate.Setup(page=16, copy_gb_s=2.0, **options)
    return list(generate.measure(subject, setup, shapes, runs, lambda _: None))


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("read", [False, True])
def test_rows_say_how_fast_the_batch_is_beside_dense(subject, read):
    rows = measured(subject, [Shape(2, 200, 4), Shape(0, 100, 3)], [QUEST], read=read)
    assert [(*row.shape, row.method, row.status) for row in rows] == [
        (*shape, method, "ok") for shape in ((2, 200, 4), (1, 100, 3)) for method in ("dense", describe(QUEST))
    ]
    for dense, quest in (rows[:2], rows[2:]):
        for row in (dense, quest):
            assert row.ms_per_token == pytest.approx(1e3 / row.tokens_per_s)
            assert row.dense_floor_share == pytest.approx(row.dense_floor_ms / row.step_ms)
            assert row.speedup == pytest.approx(row.tokens_per_s / dense.tokens_per_s)
            assert row.draft is row.rounds_share is row.timed_gamma is row.assumed is None
            assert (row.ttft_s is not None) == read and row.output is None and row.peak_gib is None
        assert dense.dense_floor_ms == quest.dense_floor_ms
        assert dense.kept_fraction == 1 and 0.1 < quest.kept_fraction < 0.9


def test_the_floor_reads_the_weights_and_all_keys_and_values_once(subject):
    model, row_bytes = subject.model, 2 * 2 * 2 * 32 * 4
    read = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert generate.weight_bytes(model) == read
    assert generate.dense_floor_ms(model, row_bytes, Shape(3, 100, 20), 2.0) == pytest.approx(
        (read + 3 * 110 * row_bytes) / 2e9 * 1e3
    )
    assert measured(subject, [Shape(3, 100, 20)], [])[0].dense_floor_ms == pytest.approx(
        generate.dense_floor_ms(model, row_bytes, Shape(3, 100, 20), 2.0)
    )


def test_tied_embeddings_are_read_as_the_head():
    lm = torch.nn.Module()
    lm.table, lm.head = torch.nn.Embedding(7, 3), torch.nn.Linear(3, 7, bias=False)
    lm.head.weight = lm.table.weight
    lm.get_input_embeddings, lm.get_output_embeddings = lambda: lm.table, lambda: lm.head
    assert generate.weight_bytes(lm) == 7 * 3 * 4


def test_a_copy_counts_what_it_reads_and_writes(monkeypatch):
    monkeypatch.setattr(generate, "timed_ms", lambda copy, on_gpu: 0.5)
    assert generate.copy_gb_s(CPU) == pytest.approx(2 * 2**20 / 0.5e-3 / 1e9)


# ---- contexts -------------------------------------------------------------------------------------------------------


def test_contexts_hold_noise_and_their_side_data(subject):
    shape, run, setup = Shape(2, 200, 3), Run(QUEST), generate.Setup(page=16)
    with generate._engine(shape, subject, setup, run) as llm:
        requests = generate._noise(shape, llm, run, setup)
        assert llm.slots.lengths == llm.slots.prompts == [200, 200]
        for store in llm.served.stores:
            assert float(store.k[1:].std()) == pytest.approx(1, abs=0.02)
            page = int(llm.slots.table[1, 3])
            assert torch.equal(store._index["bounds"][page, :, 0, 0], store.k[page].amin(0))
        assert llm.unfinished == len(requests) == 2


def test_steps_are_timed_once_all_prompts_are_read(subject, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 64)
    shape, setup, run = Shape(3, 150, 5), generate.Setup(read=True, page=16, seed=3), Run()
    with generate._engine(shape, subject, setup, run) as llm:
        requests = generate._read(shape, llm, run, subject, setup)
        assert [len(r.text.token_ids) for r in requests] == [8, 5, 2]  # three parts of a prompt each, and one step
        window = generate._window(llm, requests, 5, 2, Accepting(None, 0))
        assert [len(r.text.token_ids) for r in requests] == [15, 12, 9]
        assert len(window.steps) == 5 and window.tokens == 15 and not window.rounds
        assert all(r.submitted < r.first_token for r in requests)
        tokens = requests[0].text.token_ids
    prompt = torch.tensor([subject.prompts(3, 150, 3)[0]])
    mask = torch.ones_like(prompt)
    expected = subject.model.generate(prompt, attention_mask=mask, max_new_tokens=15, do_sample=False)
    assert tokens == expected[0, 150:].tolist()


def test_tokens_a_second_are_of_the_engines_steps_and_step_ms_of_the_models(subject, clock, monkeypatch):
    monkeypatch.setattr(generate.LLM, "step", clock.slower(generate.LLM.step, 1e-3))
    (row,) = measured(subject, [Shape(2, 100, 4)], [])
    assert row.step_ms == pytest.approx(4, rel=0.01)
    assert row.tokens_per_s == pytest.approx(2 / 5e-3, rel=0.01) and row.ms_per_token == pytest.approx(2.5, rel=0.01)


def test_pieces_of_a_text_follow_each_other_and_begin_as_texts_do():
    book = Subject(None, types.SimpleNamespace(bos_token_id=0), [0, *range(10, 24)])
    assert book.prompts(3, 4, seed=0) == [[0, 10, 11, 12], [0, 14, 15, 16], [0, 18, 19, 20]]
    plain = Subject(None, types.SimpleNamespace(bos_token_id=None), list(range(10, 24)))
    assert plain.prompts(2, 4, seed=0) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    with pytest.raises(ValueError, match="the text has 14 tokens, and 5 x 3 = 15 are needed"):
        plain.prompts(5, 3, seed=0)


def test_random_prompts_are_the_seeds(subject):
    first, again, other = (subject.prompts(2, 50, seed) for seed in (1, 1, 2))
    assert first == again != other and first[0] != first[1]


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True])
def test_what_fails_is_a_row_and_the_others_go_on(subject, monkeypatch, read):
    def broken(self, *args):
        raise RuntimeError("no such luck")

    before = subject.model.config._attn_implementation
    monkeypatch.setattr(type(QUEST), "select", broken)
    rows = measured(subject, [Shape(1, 200, 3)], [QUEST, STREAMING], read=read)
    assert [row.status for row in rows] == ["ok", "failed", "ok"]
    assert "no such luck" in rows[1].reason and rows[1].step_ms is None
    assert subject.model.config._attn_implementation == before


def test_without_a_dense_row_there_is_no_speedup(subject, monkeypatch):
    inner = generate._noise

    def only_sparse(shape, llm, run, setup):
        if run == Run():
            raise torch.OutOfMemoryError("too much. Really")
        return inner(shape, llm, run, setup)

    monkeypatch.setattr(generate, "_noise", only_sparse)
    rows = measured(subject, [Shape(1, 100, 2)], [STREAMING, Run(DENSE, STREAMING, 2)])
    assert [(row.status, row.reason, row.speedup, row.model_speedup) for row in rows] == [
        ("out of memory", "too much", None, None),
        ("ok", None, None, None),
        ("ok", None, None, None),
    ]
    assert rows[2].tokens_per_s and rows[2].verify_ms


@pytest.mark.parametrize(
    ("tokens", "reason"), [(100, "there is room for"), (300, "1 of 2 sequences of 219 tokens fit")]
)
def test_what_has_no_room_is_out_of_memory(subject, monkeypatch, tokens, reason):
    monkeypatch.setattr("keysift.capacity.free_bytes", lambda: 2 * tokens * 2 * 2 * 2 * 32 * 4)
    (row,) = measured(subject, [Shape(2, 200, 3)], [])
    assert row.status == "out of memory" and reason in row.reason


# ---- drafts ---------------------------------------------------------------------------------------------------------


def test_a_fixed_gamma_drafts_in_every_step_and_its_time_falls_into_parts(subject, clock):
    shape, run = Shape(3, 200, 40), Run(DENSE, STREAMING, 4)
    row = measured(subject, [shape], [run], acceptance=0.7, seed=5)[1]
    assert (row.method, row.draft, row.gamma, row.assumed) == (str(run), describe(STREAMING), 4, 0.7)
    assert row.rounds_share == 1 and row.timed_gamma == 4 and row.step_ms is None and 0 < row.kept_fraction < 0.3
    assert row.acceptance == pytest.approx(0.7, abs=0.2) and len(row.accepted_at) == 4
    assert (row.draft_ms, row.verify_ms) == (pytest.approx(2, rel=0.01), pytest.approx(5, rel=0.01))
    assert row.round_ms == pytest.approx(13, rel=0.01) and abs(row.rest_ms) < 0.02
    assert row.round_ms == pytest.approx(4 * row.draft_ms + row.verify_ms + row.rest_ms)
    assert row.tokens_per_s == pytest.approx(3 * row.tokens_per_round / 13e-3, rel=0.01)
    assert row.speedup == pytest.approx(row.tokens_per_round * 4 / 13, rel=0.01)


def test_the_speed_model_is_magicdecs(subject, clock):
    dense, row = measured(subject, [Shape(2, 100, 12)], [Run(DENSE, STREAMING, 3)], acceptance=0.8)
    alpha = row.acceptance
    omega = (1 - alpha**4) / (1 - alpha)
    expected = dense.step_ms / ((3 * row.draft_ms + row.verify_ms) / omega)
    assert row.model_speedup == pytest.approx(expected) == pytest.approx(4 * omega / 13, rel=0.01)
    assert speculate.model_speedup(10.0, speculate.Parts(1.0, 6.0), 4, 1.0) == pytest.approx(10 * 5 / 10)
    assert speculate.model_speedup(10.0, speculate.Parts(1.0, 6.0), 4, 0.0) == pytest.approx(1.0)


def test_the_window_ends_when_the_slowest_sequence_has_its_tokens(subject):
    shape, setup, run = Shape(3, 60, 20), generate.Setup(page=16, acceptance=0.5, seed=1), Run(DENSE, STREAMING, 3)
    accepting = Accepting(0.5, 1)
    with generate._engine(shape, subject, setup, run) as llm:
        llm._work.accepted = accepting
        window = generate._window(llm, generate._noise(shape, llm, run, setup), 20, 2, accepting)
    each = [sum(r.accepted[i] + 1 for r in window.rounds) for i in range(3)]
    last = [n - window.rounds[-1].accepted[i] - 1 for i, n in enumerate(each)]
    assert window.tokens == sum(each) and min(last) < 20 <= min(each) < max(each)
    assert len(accepting) == len(window.rounds) + 2 == len(window.steps) + 2


@pytest.mark.slow
@pytest.mark.parametrize(("draft_s", "chosen"), [(1e-3, 7), (60e-3, None)])
def test_where_the_engine_chooses_the_parts_are_of_the_gamma_used_most(subject, clock, monkeypatch, draft_s, chosen):
    monkeypatch.setattr(Rounds, "draft_all", clock.slower(Rounds.draft_all, draft_s - 8e-3))
    monkeypatch.setattr("keysift.scheduler.draft_cost", lambda *_: 0.1)  # else a tiny model's drafts are not even tried
    _, row = measured(subject, [Shape(1, 100, 60)], [Run(DENSE, STREAMING)], acceptance=1.0)
    assert row.status == "ok" and row.gamma is None and row.method.endswith(";gamma=auto")
    assert row.timed_gamma == chosen
    if chosen:
        assert row.rounds_share > 0.8 and row.tokens_per_round > 6 and row.acceptance == 1
        assert row.draft_ms == pytest.approx(1 / 7, rel=0.01) and row.speedup > 3 < row.model_speedup
    else:
        assert row.rounds_share == 0 and row.speedup == pytest.approx(1, rel=0.01)
        assert row.tokens_per_round is row.acceptance is row.accepted_at is row.verify_ms is row.model_speedup is None


@pytest.mark.slow
def test_a_draft_that_reads_all_keys_is_always_accepted_where_prompts_are_read(subject):
    drafts = [Run(DENSE, DENSE, 3), Run(DENSE, QUEST, 3)]
    dense, whole, part = measured(subject, [Shape(2, 150, 9)], drafts, read=True, outputs=True)
    assert whole.assumed is None and whole.acceptance == 1 and whole.tokens_per_round == 4
    assert whole.accepted_at == [1, 1, 1] and whole.kept_fraction == 1 and whole.ttft_s > 0
    assert part.acceptance < 1 and part.tokens_per_round < 4 and part.kept_fraction < 1
    assert dense.output == whole.output == part.output and len(json.loads(dense.output)) == 9


def test_timing_parts_leaves_answers_as_they_would_be(subject):
    def continued(timed):
        shape, setup, run = Shape(2, 150, 30), generate.Setup(read=True, page=16), Run(DENSE, QUEST, 3)
        accepting = Accepting(None, 0)
        with generate._engine(shape, subject, setup, run) as llm:
            llm._work.accepted = accepting
            requests = generate._read(shape, llm, run, subject, setup)
            generate._window(llm, requests, 6, 1, accepting)
            if timed:
                speculate.time_parts(llm, 3)
            generate._window(llm, requests, 20, 0, accepting)
            return [r.text.token_ids for r in requests], accepting.since(0)

    assert continued(True) == continued(False)


def test_what_is_assumed_is_the_seeds_and_stands_as_often_as_asked():
    def counts(share, seed):
        accepting = Accepting(share, seed)
        drafted, found = torch.zeros(500, 3, dtype=torch.int64), torch.ones(500, 4, dtype=torch.int64)
        assert accepting(drafted, found).tolist() == accepting.since(0)[0].accepted
        return accepting.since(0)

    assert counts(0.7, 1) == counts(0.7, 1) != counts(0.7, 2)
    assert counts(1.0, 0)[0].accepted == [3] * 500 and counts(None, 0)[0].accepted == [0] * 500
    assert speculate.acceptance(counts(0.7, 3)) == pytest.approx(0.7, abs=0.06)
    assert speculate.accepted_at(counts(0.7, 3)) == [pytest.approx(0.7, abs=0.1)] * 3


def test_tokens_after_the_first_wrong_one_say_nothing():
    rounds = [Round(2, [0, 2]), Round(4, [1, 2])]
    assert speculate.tokens_per_round(rounds) == (1 + 3 + 2 + 3) / 4
    assert speculate.acceptance(rounds) == 5 / (1 + 2 + 2 + 3)
    assert speculate.accepted_at(rounds) == [3 / 4, 2 / 3, 0, None]
    assert speculate.acceptance([]) is speculate.accepted_at([]) is speculate.tokens_per_round([]) is None


def test_drafts_are_run_with_every_budget_and_gamma():
    runs = speculate.sweep(["streaming:sinks=4", "snapkv", "snapkv"], [64, 96], [2, None])
    assert [str(run) for run in runs] == [
        *(f"draft=streaming:sinks=4,window={b - 4},budget={b};gamma={g}" for b in (64, 96) for g in (2, "auto")),
        *(f"draft=snapkv:budget={b};gamma={g}" for b in (64, 96) for g in (2, "auto")),
    ]
    assert [run.draft.budget for run in runs] == [64, 64, 96, 96] * 2
    assert speculate.sweep(["magicpig"], [], [4]) == [Run(DENSE, parse("magicpig", "decode"), 4)]


def test_a_draft_that_fails_is_a_row_without_figures(subject, monkeypatch):
    def broken(self, *args):
        raise torch.OutOfMemoryError("too much. Really")

    monkeypatch.setattr(speculate, "time_parts", broken)
    dense, row, last = measured(subject, [Shape(1, 100, 3)], [Run(DENSE, STREAMING, 2), STREAMING], acceptance=0.5)
    assert (row.status, row.reason, row.draft, row.gamma) == ("out of memory", "too much", describe(STREAMING), 2)
    assert row.tokens_per_s is row.tokens_per_round is row.speedup is None and dense.status == last.status == "ok"


# ---- the command ----------------------------------------------------------------------------------------------------


def run(capsys, *args):
    capsys.readouterr()
    return main([str(x) for x in args]), *capsys.readouterr()


def test_the_command_writes_what_it_measured(capsys, tmp_path):
    command = (*SMALL, "--methods", "topk:keep=0.2", "--out", tmp_path)
    code, out, err = run(capsys, *command)
    assert code == 0, err
    data = json.loads((tmp_path / "generate.json").read_text())
    assert [(r["method"], r["status"]) for r in data["rows"]] == [("dense", "ok"), ("topk:keep=0.2", "ok")]
    assert data["settings"]["copy_gb_s"] > 0 and data["settings"]["shape"] == "tiny"
    assert "its tokens mean nothing" in out and "generated:" not in out
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = run(capsys, *command)
    assert code == 2 and "holds the results of an earlier run" in err
    assert run(capsys, *command, "--force")[0] == 0


@pytest.mark.slow
def test_outputs_are_printed_where_asked_for(capsys):
    code, out, _ = run(capsys, *SMALL, "--methods", "streaming", "--print-output")
    assert code == 0 and "1x100x3 dense generated: [" in out and "1x100x3 streaming generated: [" in out
    code, out, _ = run(capsys, *SMALL, "--methods", "streaming", "--print-output", "--read", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and all(len(json.loads(row["output"])) == 3 and row["ttft_s"] > 0 for row in rows)


@pytest.mark.slow
def test_a_model_reads_pieces_of_a_text(capsys, tmp_path):
    command = ("bench", "generate", "--device", "cpu", "--model", pocket.path(), "--methods", "streaming")
    code, out, err = run(
        *(capsys, *command, "--shapes", "2x100x3", "--text", pocket.path() / "demo.txt"),
        *("--prefill", "flexprefill", "--print-output", "--json"),
    )
    assert code == 0, err
    data = json.loads(out)
    assert (data["settings"]["text"], data["settings"]["model"]) == ("demo.txt", "pocket")
    assert (data["settings"]["prefill"], data["settings"]["read"]) == ("flexprefill", True)
    assert all(row["ttft_s"] > 0 and row["output"].strip() for row in data["rows"])
    short = tmp_path / "short.txt"
    short.write_text("It was the best of times.")
    code, out, err = run(capsys, *command, "--shapes", "0x1kx4", "--text", short)
    assert (code, out) == (2, "") and "1 x 1,024 = 1,024 are needed" in err


@pytest.mark.slow
def test_the_command_sweeps_drafts_and_says_what_is_assumed(capsys, tmp_path):
    command = (*SMALL, "--draft", "streaming:sinks=4", "--draft", "snapkv:window=8", "--gamma", "3,auto")
    code, out, err = run(capsys, *command, "--budget", "30,60", "--acceptance", "0.9", "--out", tmp_path)
    assert code == 0, err
    data = json.loads((tmp_path / "generate.json").read_text())
    rows = [Row(**row) for row in data["rows"]]
    budgets = [(parse(row.draft, "decode").budget, row.gamma) for row in rows[1:]]
    assert rows[0].method == "dense" and budgets == [(b, g) for b in (30, 60) for g in (3, None)] * 2
    assert all(row.status == "ok" and row.assumed == 0.9 and row.speedup > 0 for row in rows[1:])
    assert data["settings"]["acceptance"] == 0.9 and "acceptance assumed: 0.9" in data["note"] in out
    assert "by the speed model" in out and "snapkv:window=8,budget=30" in out
    assert (tmp_path / "speculate.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "generate.png").exists()


@pytest.mark.slow
def test_acceptance_is_measured_where_a_model_reads_a_text(capsys, tmp_path):
    command = ("bench", "generate", "--device", "cpu", "--model", pocket.path(), "--text", pocket.path() / "demo.txt")
    options = ("--shapes", "2x100x8", "--draft", "dense", "--gamma", "3", "--methods", "streaming")
    code, out, err = run(capsys, *command, *options, "--json", "--out", tmp_path)
    assert code == 0, err
    data = json.loads(out)
    assert [row["method"] for row in data["rows"]] == ["dense", "streaming", "draft=dense;gamma=3"]
    row = data["rows"][2]
    assert (row["acceptance"], row["tokens_per_round"], row["assumed"]) == (1, 4, None)
    assert data["settings"]["acceptance"] is None and "assumed" not in data["note"]


def test_where_nothing_is_drafted_there_is_one_table_and_one_picture(capsys, tmp_path):
    code, out, _ = run(capsys, *SMALL, "--methods", "streaming", "--out", tmp_path)
    assert code == 0 and "speed model" not in out and "assumed" not in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generate.json", "generate.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gamma", "4"], "--gamma 4: needs a draft"),
        (["--budget", "64"], "--budget 64: needs a draft"),
        (["--acceptance", "0.5"], "--acceptance 0.5: needs a draft"),
        (["--refresh", "never"], "refresh=never: needs a draft over the model's own keys"),
        (["--draft", "quest", "--refresh", "often"], "refresh=often: choose verify or never"),
        (["--draft-shape", "tiny", "--refresh", "never"], "refresh=never: needs a draft over the model's own keys"),
        (["--draft", "streaming", "--gamma", "0"], "--gamma 0: choose 1 to 8 or auto"),
        (["--draft", "streaming", "--gamma", "2,9"], "--gamma 2,9: choose 1 to 8 or auto"),
        (["--draft", "streaming", "--gamma", ""], "choose 1 to 8 or auto"),
        (["--draft", "streaming", "--budget", "64,x"], "--budget 64,x: write numbers of keys"),
        (["--draft", "streaming", "--budget", "0"], "--budget 0: write numbers of keys"),
        (
            ["--draft", "streaming", "--budget", "3"],
            "--draft streaming with --budget: streaming: budget=3: must exceed",
        ),
        (["--draft", "streaming:budget=64", "--budget", "32"], "--draft streaming:budget=64 and --budget: give"),
        (["--draft", "magicpig", "--budget", "64"], "the draft magicpig has no budget"),
        (["--draft", "flexprefill"], "decode method 'flexprefill' cannot serve here"),
        (["--draft", "streaming", "--acceptance", "0"], "acceptance=0.0: choose more than 0 and at most 1"),
        (["--draft", "streaming", "--acceptance", "1.5"], "acceptance=1.5: choose more than 0 and at most 1"),
        (
            ["--draft", "streaming", "--model", "x", "--read", "--acceptance", "0.5"],
            "--acceptance 0.5: where a model reads prompts it is measured",
        ),
        (["--shapes", "1x100"], "--shapes 1x100: write BATCHxPREFIXxGENERATED"),
        (["--shapes", "1x0x4"], "--shapes 1x0x4: prefix and generated tokens must be 1 or more"),
        (["--shapes", ""], "--shapes is empty"),
        (["--page", "100"], "page=100: choose 16"),
        (["--text", "book.txt"], "--text needs --model"),
        (["--model", "x", "--text", "book.txt", "--fill"], "--text and --fill"),
        (["--model", "x", "--text", "no-such-book.txt"], "cannot read no-such-book.txt"),
        (["--prefill", "flexprefill"], "--prefill flexprefill: nothing is read where contexts are noise"),
        (["--shape", "tiny", "--model", "x"], "--model and --shape: give one of them"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, options, message):
    code, out, err = run(capsys, "bench", "generate", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_the_picture_has_a_bar_for_each_row_that_was_measured():
    pytest.importorskip("matplotlib")
    rows = [
        generate.Row(batch, 1000, 10, method, step_ms=2.0, tokens_per_s=batch * 500.0, dense_floor_ms=1.0 * batch)
        for batch in (1, 4)
        for method in ("dense", "quest")
    ]
    rows[3].tokens_per_s = rows[3].step_ms = None
    assert draw_generations(rows, "two shapes").startswith(b"\x89PNG")
    assert draw_generations(rows[3:], "nothing") is None


def of_draft(draft, batch, prefix, gamma=4, **options):
    return Row(batch, prefix, 10, "", tokens_per_s=1.0, draft=draft, gamma=gamma, **{"speedup": 1.5, **options})


def test_speedups_are_drawn_against_the_batch_or_the_context_if_only_that_varies():
    rows = [of_draft(draft, b, p) for draft in "ab" for b in (4, 1) for p in (10, 20)]
    against, lines = lines_of(rows)
    assert against == "batch" and [key for key in lines if key[0] == "a"] == [
        ("a", f"gamma 4, {p} tokens") for p in (10, 20)
    ]
    assert all([row.batch for row in points] == [1, 4] for points in lines.values())
    against, lines = lines_of([row for row in rows if row.batch == 4])
    assert against == "prefix" and [*lines] == [("a", "gamma 4"), ("b", "gamma 4")]
    assert [row.prefix for row in lines["b", "gamma 4"]] == [10, 20]


def test_the_picture_of_drafts_needs_a_draft_that_was_timed():
    pytest.importorskip("matplotlib")
    rows = [
        Row(1, 1000, 10, "dense", speedup=1.0),
        of_draft("a", 1, 1000, model_speedup=1.7, accepted_at=[0.9, None], assumed=0.8),
        of_draft("a", 2, 1000, gamma=None),
    ]
    assert draw_speculation(rows, "drafts").startswith(b"\x89PNG")
    assert draw_speculation(rows[:1], "nothing") is None
