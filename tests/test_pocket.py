"""The pocket model that ships: its tokenizer, its claims, what it retrieves, and that its trainer learns."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keysift import pocket

FOLDER = pocket.path()
TOOLS = Path(__file__).resolve().parent.parent / "tools"
LIMIT_MIB = 16

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="the checkpoint is not in this checkout"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tools():
    """The modules in tools/, importable by their plain names."""
    if not TOOLS.is_dir():
        pytest.skip("tools/ is not part of this install")
    sys.path.insert(0, str(TOOLS))
    yield TOOLS
    sys.path.remove(str(TOOLS))


def answer(model, tokenizer, ids: list[int], new_tokens: int) -> str:
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=new_tokens)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


ODD_TEXTS = [
    "",
    " ",
    "\n",
    "\r\n \r\n\r",
    "\t\t  tabs \t and   runs   ",
    "\x00NUL\x00",
    "emoji 😀👩‍👩‍👧‍👦🇫🇷",
    "日本語の文章、漢字とかな。",
    "naïve café Å e\u0301 ﬁ",
    "Здравствуй мир العربية हिन्दी",
    "1234567890" * 41 + "7",
    "3f2504e0-4f89-41d3-9a0c-0305e82c3301 and dead-beef-cafe 3F2504E0",
    "VAR ABCDE = 12345 VAR XQZKW = VAR ABCDE  The grass",
    "def f(x):\n\treturn {x: [1, 2.5e-3]}  # <|odd|>",
    "\u200b\ufeff\u2028\U0010ffff",
]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_any_text_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_random_characters_round_trip(tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [rng.randrange(0x110000) for _ in range(rng.randint(1, 40))]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_known_words_digits_and_uuids_are_cut_as_claimed(tokenizer) -> None:
    def cut(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False).input_ids]

    assert cut(" quiet-harbor is: 1234567.") == [" quiet", "-", "harbor", " is", ":", " ", "12", "34", "56", "7", "."]
    assert len(cut("3f2504e0-4f89-41d3-9a0c-0305e82c3301")) == 20
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def test_checkpoint_is_small_and_of_the_claimed_shape(model) -> None:
    assert sum(f.stat().st_size for f in FOLDER.iterdir() if f.is_file()) <= LIMIT_MIB * 2**20
    config = model.config
    assert config.model_type == "qwen3" and config.tie_word_embeddings
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 64)
    assert config.num_hidden_layers >= 4 and config.max_position_embeddings == 32768
    record = json.loads((FOLDER / "results.json").read_text())
    assert record["train"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["eval"]["gpu"] and record["train"]["command"].startswith("python tools/train_pocket.py")


@pytest.mark.slow
def test_demo_questions_are_answered(model, tokenizer) -> None:
    document = (FOLDER / "demo.txt").read_text(encoding="utf-8")
    questions = json.loads((FOLDER / "demo.json").read_text())
    assert len(tokenizer(document).input_ids) >= 8192
    with torch.no_grad():  # the document is read once, each question continues a copy of its cache
        ids = tokenizer(document).input_ids
        filled = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
        for item in questions:
            tail = tokenizer(item["question"], add_special_tokens=False).input_ids
            written, state = [], copy.deepcopy(filled)
            for _ in range(70):
                step = torch.tensor([tail if not written else written[-1:]])
                written.append(int(model(step, past_key_values=state, use_cache=True).logits[0, -1].argmax()))
                if written[-1] == tokenizer.eos_token_id:
                    break
            assert item["answer"] in tokenizer.decode(written)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["niah_multikey_2", "vt"])
def test_retrieves_at_1k(model, tokenizer, tools, task: str) -> None:
    from pocket_data import Tools
    from pocket_mix import sample
    from pocket_text import Library, Pieces

    pieces = Pieces(tokenizer.backend_tokenizer)
    source = Tools(pieces, Library([TOOLS], max_files=4), random.Random(11), 1.0)
    right = 0
    for _ in range(8):
        s = sample(source, task, 1024)
        text = answer(model, tokenizer, s.prompt, s.new_tokens)
        right += all(w in text for w in s.want)
    assert right >= 7


def test_pieces_equal_whole_tokenization(tokenizer, tools) -> None:
    from pocket_data import Tools
    from pocket_mix import EVAL_TASKS, sample
    from pocket_text import Library, Pieces

    source = Tools(Pieces(tokenizer.backend_tokenizer), Library([TOOLS], max_files=4), random.Random(3), 1.0)
    for task in EVAL_TASKS:
        ids = sample(source, task, 900).prompt[1:]
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids, task


def test_common_words_are_the_commonest(tokenizer, tools) -> None:
    from collections import Counter

    from pocket_data import Tools, common_words
    from pocket_text import Library, Pieces

    for seed, tokens in enumerate((300, 1000, 5000)):
        rng = random.Random(seed)
        source = Tools(Pieces(tokenizer.backend_tokenizer), Library([TOOLS], max_files=4), rng, 0.5)
        made = common_words(source, tokens, often=6, seldom=1, numbered=False)
        counts = Counter(tokenizer.decode(made.context).split("\n")[1].split(" "))
        top = [w for w, _ in counts.most_common(len(made.asks[0].want))]
        assert set(top) == set(made.asks[0].want)


@pytest.mark.slow
def test_training_lowers_the_loss_and_its_checkpoint_loads(tools, tmp_path) -> None:
    import train_pocket

    arguments = ["--out", str(tmp_path), "--steps", "14", "--batch-tokens", "512", "--workers", "1", "--device", "cpu"]
    extra = ["--record", "2", "--warmup", "4", "--no-eval", "--text", str(TOOLS)]
    train_pocket.main([*arguments, *extra])
    loss = json.loads((tmp_path / "train.json").read_text())["curve"]["loss"]
    assert loss[-1] < loss[0] - 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.tensor([[1, 5, 9]])).logits).all()


def test_lean_model_gives_hugging_faces_logits(model, tools) -> None:
    from pocket_model import Pocket, angles, load_checkpoint, rms

    shape, weights = load_checkpoint(FOLDER, "cpu")
    lean = Pocket(shape, weights, low=torch.float32)
    ids = torch.randint(3, shape.vocab_size, (1, 63), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = weights["model.embed_tokens.weight"][ids[0]]
        for layer in range(shape.num_hidden_layers):
            x = lean.layer(x, layer, *angles(shape, 63, "cpu"), 1)
        logits = rms(x, weights["model.norm.weight"], shape.rms_norm_eps) @ weights["model.embed_tokens.weight"].T
        torch.testing.assert_close(logits, model(ids).logits[0], atol=1e-3, rtol=1e-4)


def test_missing_tokenizer_and_checkpoint_are_named(tools, tmp_path, capsys) -> None:
    import train_pocket

    with pytest.raises(SystemExit):
        train_pocket.parse(["--out", str(tmp_path), "--tokenizer", str(tmp_path / "none.json")])
    assert "--build-tokenizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_pocket.parse(["--out", str(tmp_path), "--resume", str(tmp_path)])
    assert "no model.safetensors" in capsys.readouterr().err
