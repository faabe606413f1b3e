"""``keysift bench generate``: whole generations by the engine, counted and timed."""

import json
import types

import pytest
import torch

from keysift import pocket
from keysift.bench import first_token, generate, steps
from keysift.bench.generate import Shape, Subject
from keysift.bench.generate_plot import draw_generations
from keysift.cli import main
from keysift.methods import describe, parse

QUEST = parse("quest:keep=0.2,dense_layers=none,dense_below=0", "decode")
STREAMING = parse("streaming:window=20", "decode")
CPU = torch.device("cpu")
SMALL = ("bench", "generate", "--device", "cpu", "--shapes", "1x100x3")


@pytest.fixture(scope="module")
def subject():
    return Subject(first_token.random_model("tiny", 400, CPU, torch.float32).model)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setitem(generate.COPY_BYTES, "cpu", 1 << 20)


def measured(subject, shapes, methods, **options):
    setup = generate.Setup(page=16, copy_gb_s=2.0, **options)
    return list(generate.measure(subject, setup, shapes, methods, lambda _: None))


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True])
def test_rows_say_how_fast_the_batch_is_beside_dense(subject, read):
    rows = measured(subject, [Shape(2, 200, 4), Shape(0, 100, 3)], [QUEST], read=read)
    assert [(*row.shape, row.method, row.status) for row in rows] == [
        (*shape, method, "ok") for shape in ((2, 200, 4), (1, 100, 3)) for method in ("dense", describe(QUEST))
    ]
    for dense, quest in (rows[:2], rows[2:]):
        for row in (dense, quest):
            assert row.tokens_per_s == pytest.approx(row.batch * 1e3 / row.step_ms)
            assert row.ms_per_token == pytest.approx(row.step_ms / row.batch)
            assert row.dense_floor_share == pytest.approx(row.dense_floor_ms / row.step_ms)
            assert row.speedup == pytest.approx(dense.step_ms / row.step_ms)
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
    shape = Shape(2, 200, 3)
    with generate._engine(shape, subject, generate.Setup(page=16), QUEST) as llm:
        steps.fill(llm.model, llm.slots, llm.served.stores, 200, generate.rows_needed(shape, read=False), QUEST, 0)
        assert llm.slots.lengths == llm.slots.prompts == [200, 200]
        for store in llm.served.stores:
            assert float(store.k[1:].std()) == pytest.approx(1, abs=0.02)
            page = int(llm.slots.table[1, 3])
            assert torch.equal(store._index["bounds"][page, :, 0, 0], store.k[page].amin(0))


def test_steps_are_timed_once_all_prompts_are_read_and_all_answers_end_at_once(subject, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 64)
    shape, setup = Shape(3, 150, 5), generate.Setup(read=True, page=16, seed=3)
    with generate._engine(shape, subject, setup, generate.DENSE) as llm:
        step, ends = llm.step, []
        monkeypatch.setattr(llm, "step", lambda: ends.append(step()) or ends[-1])
        timed = generate._read(shape, llm, subject, setup)
    assert len(timed.times) == 5 and len(timed.ttft) == len(timed.kept) == 3
    assert [len(out.token_ids) for out in ends[-1]] == [13, 10, 7]
    prompt = torch.tensor([subject.prompts(3, 150, 3)[0]])
    mask = torch.ones_like(prompt)
    expected = subject.model.generate(prompt, attention_mask=mask, max_new_tokens=13, do_sample=False)
    assert timed.tokens == expected[0, 150:].tolist()


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

    def only_sparse(shape, llm, method, setup):
        if method == generate.DENSE:
            raise torch.OutOfMemoryError("too much. Really")
        return inner(shape, llm, method, setup)

    monkeypatch.setattr(generate, "_noise", only_sparse)
    rows = measured(subject, [Shape(1, 100, 2)], [STREAMING])
    assert [(row.status, row.reason, row.speedup) for row in rows] == [
        ("out of memory", "too much", None),
        ("ok", None, None),
    ]


@pytest.mark.parametrize(
    ("tokens", "reason"), [(100, "there is room for"), (300, "1 of 2 sequences of 207 tokens fit")]
)
def test_what_has_no_room_is_out_of_memory(subject, monkeypatch, tokens, reason):
    monkeypatch.setattr("keysift.capacity.free_bytes", lambda: 2 * tokens * 2 * 2 * 2 * 32 * 4)
    (row,) = measured(subject, [Shape(2, 200, 3)], [])
    assert row.status == "out of memory" and reason in row.reason


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


def test_outputs_are_printed_where_asked_for(capsys):
    code, out, _ = run(capsys, *SMALL, "--methods", "streaming", "--print-output")
    assert code == 0 and "1x100x3 dense generated: [" in out and "1x100x3 streaming generated: [" in out
    code, out, _ = run(capsys, *SMALL, "--methods", "streaming", "--print-output", "--read", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and all(len(json.loads(row["output"])) == 5 and row["ttft_s"] > 0 for row in rows)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
