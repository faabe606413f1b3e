"""Tokens to text: whole characters as they come, and nothing of a stop string."""

import itertools
import random

import pytest
from transformers import AutoTokenizer

from keysift import pocket
from keysift.text import INCOMPLETE, Detokenizer

FOLDER = pocket.path()
TEXTS = [
    "plain words, and 1234567.",
    "  two  spaces\t\n\n and lines \r\n",
    "naïve café Å e\u0301 ﬁ",
    "日本語の文章、漢字とかな。",
    "😀👩‍👩‍👧‍👦🇫🇷 \U0010ffff",
    "a real \ufffd, and one at the end \ufffd",
]


class Pieces:
    """A tokenizer whose token ``i`` is the ``i``-th of some byte strings; None is a special token."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, token_ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return b"".join(self.pieces[i] or b"" for i in token_ids).decode(errors="replace")

    def whole(self):
        return self.decode(range(len(self.pieces)), True, False)


class LeadingSpaces(Pieces):
    """As SentencePiece has it: the space before the first word is not text."""

    def decode(self, token_ids, skip_special_tokens, clean_up_tokenization_spaces):
        return super().decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces).removeprefix(" ")


@pytest.fixture(scope="module")
def tokenizer():
    if not (FOLDER / "tokenizer.json").is_file():
        pytest.skip("the checkpoint is not in this checkout")
    return AutoTokenizer.from_pretrained(FOLDER)


def cut(text, *points):
    """The bytes of a text, cut at these points."""
    data = text.encode()
    return [data[a:b] for a, b in itertools.pairwise([0, *points, len(data)])]


def streamed(tokenizer, token_ids, stop=()):
    """What each token gave, what the end gave, and the detokenizer."""
    text = Detokenizer(tokenizer, stop)
    parts = [text.add(token) for token in token_ids]
    return parts, text.end(), text


def answer(pieces, stop=()):
    """The text of an answer that comes in these pieces, which stops when told; emitted parts and text agree."""
    text, parts = Detokenizer(Pieces(pieces), stop), []
    for token in range(len(pieces)):
        parts.append(text.add(token))
        assert "".join(parts) == text.text
        if text.stopped:
            break
    parts.append(text.end())
    assert "".join(parts) == text.text
    return text.text, text.stopped, parts


def first_stop(text, stop):
    """Where the stop string begins that ends first, if one does."""
    for end in range(len(text) + 1):
        if found := [end - len(s) for s in stop if text[:end].endswith(s)]:
            return min(found)
    return None


# ---- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_of_the_pocket_tokenizer_add_up(tokenizer, text):
    ids = tokenizer(text).input_ids
    parts, end, detokenizer = streamed(tokenizer, ids)
    assert "".join([*parts, end]) == detokenizer.text == text
    assert detokenizer.token_ids == ids


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_any_tokens_add_up_to_their_decoding(tokenizer, seed):
    draw = random.Random(seed)
    ids = [draw.randrange(len(tokenizer)) for _ in range(201)]  # special tokens and broken characters among them
    parts, end, _ = streamed(tokenizer, ids)
    assert "".join([*parts, end]) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_bytes_add_up_to_their_decoding(seed):
    draw = random.Random(seed)
    some = [*"añ漢😀".encode(), 0xFF, 0xC0, 0x80]
    pieces = [bytes(draw.choices(some, k=draw.randint(0, 3))) if draw.random() < 0.9 else None for _ in range(101)]
    tokens = Pieces(pieces)
    parts, end, _ = streamed(tokens, range(len(pieces)))
    assert "".join([*parts, end]) == tokens.whole()


@pytest.mark.parametrize("text", TEXTS[2:5], ids=range(3))
def test_no_character_comes_half(text):
    size = len(text.encode())
    for points in itertools.combinations(range(1, size), 2) if size < 50 else [(i, i + 2) for i in range(1, size - 2)]:
        parts, end, _ = streamed(Pieces(cut(text, *points)), range(3))
        assert "".join(parts) == text and end == ""
        assert not any(INCOMPLETE in part for part in parts)
    parts, end, _ = streamed(Pieces([bytes([b]) for b in text.encode()]), range(size))
    assert [part for part in parts if part] == [*text] and end == ""


def test_half_a_character_comes_at_the_end():
    parts, end, text = streamed(Pieces(["é".encode(), b"\xf0\x9f"]), range(2))
    assert (parts, end) == (["é", ""], INCOMPLETE)
    assert text.text == "é" + INCOMPLETE


def test_spaces_between_words_come_where_a_tokenizer_swallows_the_first():
    words = [b" one", b" two", None, b"s", b" three", None, None, b" four"]
    parts, end, _ = streamed(LeadingSpaces(words), range(len(words)))
    assert (parts, end) == (["one", " two", "", "s", " three", "", "", " four"], "")


def test_special_tokens_give_no_text(tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer("some text", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    parts, end, _ = streamed(tokenizer, ids)
    assert (parts[0], parts[-1], end) == ("", "", "") and "".join(parts) == "some text"


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_without_a_tokenizer_there_is_no_text(stop):
    parts, end, text = streamed(None, [5, 6, 7], stop)
    assert (parts, end, text.text, text.stopped) == (["", "", ""], "", "", False)
    assert text.token_ids == [5, 6, 7]


# ---- stop strings ----------------------------------------------------------------------------------------------------

STOPS = {
    "one": ("say <end> more", ("<end>",)),
    "at-0": ("<end> more", ("<end>",)),
    "at-the-end": ("say <end>", ("<end>",)),
    "all-of-it": ("<end>", ("<end>",)),
    "a-character": ("say.", (".",)),
    "none": ("say <en", ("<end>",)),
    "begins-twice": ("say <<end>", ("<end>",)),
    "begins-within": ("aabaabaac", ("aabaac",)),
    "repeats": ("xaaaay", ("aaa",)),
    "prefix-of-another": ("say <end> more", ("<end> mo", "<end>")),
    "another-is-longer": ("say <en> more", ("<end>", "<en")),
    "suffix-of-another": ("say <end> more", ("d>", "<end>")),
    "overlapping": ("say abcdef", ("cde", "bcd")),
    "overlapping-in-turn": ("say abcdef", ("bcd", "cde", "def")),
    "two-apart": ("one STOP two HALT three", ("HALT", "STOP")),
    "whole-characters": ("café 漢字 more", ("漢字",)),
    "half-a-stop-and-another": ("ab abd", ("abc", "d")),
    "newlines": ("a\n\n\nb", ("\n\n",)),
}


@pytest.mark.parametrize(("text", "stop"), STOPS.values(), ids=STOPS)
def test_a_text_ends_before_its_stop_string_wherever_tokens_are_cut(text, stop):
    place = first_stop(text, stop)
    expected = text if place is None else text[:place]
    size = len(text.encode())
    for points in [(), *((i,) for i in range(1, size)), *itertools.combinations(range(1, size), 2), range(1, size)]:
        got, stopped, parts = answer(cut(text, *points), stop)
        assert (got, stopped) == (expected, place is not None), points
        assert "".join(parts) == expected


@pytest.mark.parametrize("text", ["say abcd", "say abce"])
def test_a_stop_string_within_another_ends_the_text_wherever_tokens_are_cut(text):
    ends = {answer(cut(text, *points), ("abcd", "bc"))[0] for points in itertools.combinations(range(1, len(text)), 2)}
    ends.add(answer([text.encode()], ("abcd", "bc"))[0])
    assert len(ends) == 1


@pytest.mark.parametrize("seed", range(8))
def test_random_stop_strings_are_never_seen(seed):
    draw = random.Random(seed)

    def word(most):
        return "".join(draw.choices("abc", k=draw.randint(1, most)))

    def within(s, t):
        return t.find(s, 1, -1) >= 0

    stopped_some = 0
    for _ in range(200):
        stop = tuple(word(5) for _ in range(draw.randint(1, 3)))
        if any(within(s, t) for s in stop for t in stop):
            continue
        text = word(30)
        points = sorted(draw.sample(range(1, 31), draw.randint(0, 12)))
        got, stopped, _ = answer(cut(text, *(p for p in points if p < len(text))), stop)
        place = first_stop(text, stop)
        assert got == (text if place is None else text[:place]), (text, stop, points)
        assert stopped == (place is not None)
        assert not any(s in got for s in stop)
        stopped_some += stopped
    assert stopped_some > 20


def test_only_what_may_begin_a_stop_string_waits():
    parts, end, _ = streamed(Pieces([b"say ", b"<e", b"n", b"x", b" <end", b"."]), range(6), ("<end>",))
    assert (parts, end) == (["say ", "", "", "<enx", " ", "<end."], "")


def test_the_beginning_of_a_stop_string_comes_at_the_end():
    parts, end, text = streamed(Pieces([b"say ", b"<en"]), range(2), ("<end>",))
    assert (parts, end, text.stopped) == (["say ", ""], "<en", False)


def test_the_longest_beginning_waits():
    parts, end, _ = streamed(Pieces([b"aab", b"aa", b"b", b"!"]), range(4), ("aabaac", "b!?"))
    assert (parts, end) == (["", "", "aab", "aa"], "b!")


def test_nothing_comes_after_a_stop_string():
    parts, end, text = streamed(Pieces([b"one STOP", b" two", b" three"]), range(3), ("STOP",))
    assert (parts, end) == (["one ", "", ""], "")
    assert text.stopped and text.text == "one " and text.token_ids == [0, 1, 2]


@pytest.mark.parametrize("stop", ["漢字", "d", " and", "1234567"])
def test_stop_strings_across_tokens_of_the_pocket_model(tokenizer, stop):
    text = "words and 漢字 and 12345678."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts, end, _ = streamed(tokenizer, ids, (stop,))
    assert "".join([*parts, end]) == text[: text.index(stop)]
