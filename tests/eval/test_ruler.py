"""RULER's tasks: the wording, the references, the lengths, and the official grading."""

import json
import random
import re
import string

import pytest
from transformers import AutoTokenizer

from keysift import pocket
from keysift.eval import data as sources
from keysift.eval import ruler
from keysift.eval.data import Data

ALL = tuple(ruler.TASKS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pocket.path())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files in the formats of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def sentence():
        return " ".join(rng.choice(ruler.words("noun")) for _ in range(8)).capitalize() + "."

    (folder / "essays.txt").write_text("\n\n".join(" ".join(sentence() for _ in range(9)) for _ in range(12)))
    articles = []
    for a in range(6):
        paragraphs = []
        for p in range(4):
            asked = [
                {
                    "question": f"Who is {a}-{p}?",
                    "is_impossible": False,
                    "answers": [{"text": f"answer{a}{p}"}, {"text": f"reply{a}{p}"}],
                }
            ]
            asked.append({"question": "Impossible?", "is_impossible": True, "answers": []})
            paragraphs.append({"context": f"Here answer{a}{p} stands. {sentence()}", "qas": asked})
        articles.append({"paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Which {i}?",
            "answer": f"gold{i}",
            "context": [[f"Title {i} {j}", [f"gold{i}. ", sentence()]] for j in range(3)],
        }
        for i in range(9)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return Data(folder / "essays.txt", folder / "squad.json", folder / "hotpot.json")


def make(task, length, tokenizer, data, index=0, **options):
    return ruler.make_sample(task, length, index, tokenizer, data, **options)


@pytest.mark.parametrize("length", [4096, 6007, 16384])
@pytest.mark.parametrize("task", ALL)
def test_a_sample_fills_its_length_and_no_more(task, length, tokenizer, data):
    sample = make(task, length, tokenizer, data)
    used = len(sample.ids) + sample.new_tokens
    most = 0.9 if task.startswith("qa") else 0.985
    enough = used >= most * length or task.startswith("qa")  # the few documents of the test may not fill it
    assert used <= length and enough
    assert sample.new_tokens == {"n": 128, "v": 30, "c": 120, "f": 50, "q": 32}[task[0]]


@pytest.mark.parametrize("task", ALL)
def test_samples_depend_on_nothing_but_seed_task_length_and_index(task, tokenizer, data):
    first = make(task, 4096, tokenizer, data, index=3)
    make(task, 4096, tokenizer, data, index=1)
    random.seed(5)
    assert make(task, 4096, tokenizer, data, index=3) == first
    assert make(task, 4096, tokenizer, data, index=4).ids != first.ids
    assert make(task, 4096, tokenizer, data, index=3, seed=1).ids != first.ids


@pytest.mark.parametrize("task", ALL)
def test_the_prompt_holds_every_reference_before_the_question(task, tokenizer, data):
    sample = make(task, 4096, tokenizer, data)
    context = tokenizer.decode(sample.ids[: -sample.question_tokens])
    question = tokenizer.decode(sample.ids[-sample.question_tokens :])
    wanted = any if task == "qa_1" else all  # SQuAD's references are spellings of one answer
    assert sample.outputs and wanted(reference in context for reference in sample.outputs)
    assert re.search(r"What (is|are)|Question:", question)
    assert not any(reference in question for reference in sample.outputs)


WORDING = {  # what follows the context, to the letter (RULER's synthetic/constants.py), and the count of references
    "niah_single_1": (
        r"What is the special magic number for [a-z]+-[a-z]+ mentioned in the provided text\?"
        r" The special magic number for [a-z]+-[a-z]+ mentioned in the provided text is", 1),
    "niah_multikey_3": (
        r"What is the special magic uuid for [0-9a-f-]{36} mentioned in the provided text\?"
        r" The special magic uuid for [0-9a-f-]{36} mentioned in the provided text is", 1),
    "niah_multivalue": (
        r"What are all the special magic numbers for [a-z]+-[a-z]+ mentioned in the provided text\?"
        r" The special magic numbers for [a-z]+-[a-z]+ mentioned in the provided text are", 4),
    "niah_multiquery": (
        r"What are all the special magic numbers for ([a-z-]+, ){3}and [a-z-]+ mentioned in the provided text\?"
        r" The special magic numbers for ([a-z-]+, ){3}and [a-z-]+ mentioned in the provided text are", 4),
    "vt": (
        r"Question: Find all variables that are assigned the value \d{5} in the text above\."
        r" Answer: According to the chain\(s\) of variable assignment in the text above,"
        r" 5 variables are assgined the value \d{5}, they are:", 5),
    "cwe": (
        r"Question: What are the 10 most common words in the above list\?"
        r" Answer: The top 10 words that appear most often in the list are:", 10),
    "fwe": (
        r"Question: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\."
        r" What are the three most frequently appeared words in the above coded text\?"
        r" Answer: According to the coded text above, the three most frequently appeared words are:", 3),
    "qa_1": (r"Question: Who is \d-\d\? Answer:", 2),
    "qa_2": (r"Question: Which \d\? Answer:", 1),
}  # fmt: skip


@pytest.mark.parametrize("task", WORDING)
def test_question_and_answer_prefix_are_the_benchmarks(task, tokenizer, data):
    sample = make(task, 4096, tokenizer, data)
    pattern, references = WORDING[task]
    assert re.fullmatch(pattern, tokenizer.decode(sample.ids[-sample.question_tokens :]).strip())
    assert len(sample.outputs) == references


def text_of(task, tokenizer, data, length=4096):
    return tokenizer.decode(make(task, length, tokenizer, data).ids)


def test_needles_are_hidden_as_many_as_the_task_says_and_keys_never_repeat(tokenizer, data):
    needle = r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\."
    for task, keys, values in (
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multiquery", 4, 1),
        ("niah_multivalue", 1, 4),
    ):
        found = re.findall(needle, text_of(task, tokenizer, data))
        assert len(found) == keys * values and len({k for k, _ in found}) == keys
        assert len({v for _, v in found}) == len(found)
    found = re.findall(needle, text_of("niah_multikey_2", tokenizer, data))
    assert len(found) > 50 and len({k for k, _ in found}) == len(found)


def test_a_needle_lies_anywhere_between_the_first_and_the_last_token(tokenizer, data):
    depths = []
    for i in range(60):
        sample = make("niah_single_1", 1024, tokenizer, data, index=i)
        text = tokenizer.decode(sample.ids)
        depths.append(text.index(sample.outputs[0]) / len(text))
    assert min(depths) < 0.25 and max(depths) > 0.75 and 0.4 < sum(depths) / 60 < 0.65


def test_the_chain_leads_to_the_value_in_order(tokenizer, data):
    sample = make("vt", 2048, tokenizer, data)
    text = tokenizer.decode(sample.ids)
    example, _, task = text.rpartition("Memorize and track")
    assert example.count("VAR") == 9 and "assgined the value" in example  # five assignments, four of a variable
    lines = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", task)
    assert tuple(name for name, _ in lines) == sample.outputs
    assert [source for _, source in lines[1:]] == list(sample.outputs[:-1])
    assert f"the value {lines[0][1]} in the text above" in task


def test_common_words_are_the_most_common(tokenizer, data):
    for length, often, seldom in ((4096, 30, 3), (2048, 6, 1)):
        sample = make("cwe", length, tokenizer, data)
        listed = tokenizer.decode(sample.ids).rpartition("Memorize the ones")[2]
        words = re.findall(r"\d+\. ([a-z]+)", listed)
        counts = {w: words.count(w) for w in set(words)}
        assert {counts[w] for w in sample.outputs} == {often}
        assert {n for w, n in counts.items() if w not in sample.outputs} == {seldom}


def test_long_lists_of_words_go_beyond_the_vocabulary(tokenizer, data):
    assert len(make("cwe", 131072, tokenizer, data).ids) > 0.98 * (131072 - 120)


def test_coded_words_follow_the_zeta_law(tokenizer, data):
    sample = make("fwe", 16384, tokenizer, data)
    body = tokenizer.decode(sample.ids).partition("coded words. ")[2].partition("\n")[0].split()
    counts = sorted(((body.count(w), w) for w in set(body)), reverse=True)
    assert counts[0][1] == "..." and tuple(w for _, w in counts[1:4]) == sample.outputs
    assert all(abs(counts[0][0] / counts[k - 1][0] / k**2 - 1) < 0.05 for k in (2, 3, 4))
    assert all(len(w) == 6 and set(w) <= set(string.ascii_lowercase) for _, w in counts[1:])


def test_questions_come_with_their_documents_among_others(tokenizer, data):
    sample = make("qa_1", 1024, tokenizer, data, index=5)
    text = tokenizer.decode(sample.ids)
    assert sample.outputs == ("answer11", "reply11") and "Who is 1-1?" in text and "answer11 stands" in text
    assert text.count("Document ") >= 8 and "answer10 stands" in text  # the same article's paragraphs come first
    places = [make("qa_1", 1024, tokenizer, data, index=i).ids for i in range(8)]
    shown = {tokenizer.decode(ids).index(f"answer{i // 4}{i % 4} stands") // 800 for i, ids in enumerate(places)}
    assert len(shown) > 2  # not always at the same place
    with pytest.raises(ValueError, match="24 questions"):
        make("qa_1", 1024, tokenizer, data, index=24)


@pytest.mark.parametrize("task", ALL)
def test_the_shortest_length_is_named_and_is_enough(task, tokenizer, data):
    with pytest.raises(ValueError, match=rf"length=64: {task} needs at least (\d+) tokens") as caught:
        make(task, 64, tokenizer, data)
    least = int(re.search(r"least (\d+)", str(caught.value))[1])
    assert len(make(task, least + 40, tokenizer, data).ids) <= least + 40


def test_the_chat_template_goes_around_the_message_and_the_prefix_after_it(tokenizer, data):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "<|bos|>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    sample = make("niah_single_1", 1024, chatty, data, chat=True)
    text = chatty.decode(sample.ids)
    assert text.startswith("<|bos|>[user] A special magic") and text.count("<|bos|>") == 1
    assert re.search(r"provided text\? \[end\]\[assistant\] The special magic number for \S+ mentioned .* is$", text)
    assert chatty.decode(sample.ids[-sample.question_tokens :]).startswith("What is the special")


@pytest.mark.parametrize(
    ("task", "pred", "outputs", "score"),
    [
        ("vt", " abcde FGHIJ\x00KLMNO", ("ABCDE", "FGHIJ", "KLMNO", "PQRST"), 0.75),
        ("niah_single_1", "the number is 1234567.", ("1234567",), 1.0),
        ("niah_multivalue", "1 2", ("1", "2", "3", "4"), 0.5),
        ("qa_1", "It was the second ANSWER", ("first", "second answer"), 1.0),
        ("qa_2", "neither", ("first", "second answer"), 0.0),
        ("niah_single_1", "", ("1234567",), 0.0),
    ],
)
def test_grading_by_hand(task, pred, outputs, score):
    assert ruler.grade(task, pred, outputs) == score


def official(task, preds, refs):
    """The scorer of the benchmark's evaluation, transcribed: over all samples, in percent, rounded."""
    if task.startswith("qa"):
        score = sum(
            max(1.0 if r.lower() in p.lower() else 0.0 for r in ref) for p, ref in zip(preds, refs, strict=True)
        )
    else:
        score = sum(
            sum(1.0 if r.lower() in p.lower() else 0.0 for r in ref) / len(ref)
            for p, ref in zip(preds, refs, strict=True)
        )
    return round(score / len(preds) * 100, 2)


@pytest.mark.parametrize("task", ["cwe", "qa_1"])
def test_grading_is_the_official_scorers(task):
    rng = random.Random(1)
    letters = "abCD 12\n\t\x01"
    preds = ["".join(rng.choices(letters, k=12)) for _ in range(400)]
    refs = [tuple("".join(rng.choices("abcd12", k=rng.randint(1, 2))) for _ in range(rng.randint(1, 5))) for _ in preds]
    ours = sum(ruler.grade(task, p, r) for p, r in zip(preds, refs, strict=True)) / len(preds)
    cleaned = [re.sub(r"[\x00-\x1f]", "\n", p.strip()).strip() for p in preds]
    assert round(100 * ours, 2) == official(task, cleaned, refs)
    assert 10 < 100 * ours < 95  # neither all right nor all wrong


def test_unknown_tasks_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="niah_single_1"):
        ruler.check_tasks(["niah_singel_1"])
    with pytest.raises(ValueError, match=r"choose from niah_single_1, .*qa_2"):
        ruler.check_tasks(["zzzz"])


def test_missing_and_wrong_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kind in ("essays", "squad", "hotpot"):
        with pytest.raises(ValueError, match=rf"no {kind} file: pass --{kind} FILE .* --fetch"):
            getattr(Data(), kind)
        (tmp_path / "wrong.json").write_text('{"nothing": 1}')
        with pytest.raises(ValueError, match=rf"--{kind}: .*wrong.json is not"):
            getattr(Data(**{f"{kind}_file": tmp_path / "wrong.json"}), kind)
        with pytest.raises(ValueError, match=f"{tmp_path}/none is no file"):
            getattr(Data(**{f"{kind}_file": tmp_path / "none"}), kind)


def test_fetching_fills_the_cache_once_and_never_with_something_else(tmp_path, data, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page = tmp_path / "page.html"
    page.write_text("<html>not found</html>")
    monkeypatch.setattr(sources, "SQUAD_URL", page.as_uri())
    with pytest.raises(ValueError, match=r"cannot fetch SQuAD's dev-v2.0.json: .* pass --squad FILE"):
        sources.fetch(["squad"])
    assert not list(sources.cache_folder().iterdir())
    monkeypatch.setattr(sources, "SQUAD_URL", data.squad_file.as_uri())
    assert sources.fetch(["squad"]) == [sources.cache_folder() / "squad-dev-v2.0.json"]
    assert Data().squad == data.squad
    monkeypatch.setattr(sources, "SQUAD_URL", "file:///nowhere")  # not asked again
    assert sources.fetch(["squad"]) == [sources.cache_folder() / "squad-dev-v2.0.json"]


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl"])
def test_essays_come_in_three_forms(suffix, tmp_path):
    text = "One sentence here. And another one!  A third\n one? " * 8
    file = tmp_path / f"essays.{suffix}"
    file.write_text({"txt": text, "json": json.dumps({"text": text}), "jsonl": json.dumps({"text": text})}[suffix])
    assert Data(file).essays[:4] == ["One sentence here.", "And another one!", "A third one?", "One sentence here."]
