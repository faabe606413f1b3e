"""Beginnings that are kept: found only where every token is the same, and their pages are never lost or broken."""

import itertools

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from keysift.prefixes import Prefixes
from keysift.slots import Slots

PAGE, CHUNK, SLOTS, PAGES_PER_SLOT, PAGES = 16, 32, 3, 8, 20
PER_CHUNK = CHUNK // PAGE


def make(pages=PAGES, slots=SLOTS):
    slots = Slots(slots, PAGE, PAGES_PER_SLOT, pages, "cpu")
    return slots, Prefixes(slots, CHUNK)


def read(slots, prefixes, slot, tokens, tail=1):
    """Read a prompt into an empty slot as the engine does; returns the pages that were found."""
    found = prefixes.find(tokens, len(tokens) - tail)
    slots.begin_with(slot, found)
    prefixes.make_room(-(-len(tokens) // PAGE) - len(found))
    slots.reserve(slot, len(tokens))
    counts = [0] * len(slots)
    counts[slot] = len(tokens) - slots.lengths[slot]
    slots.append(counts)
    prefixes.keep(slot, tokens)
    return found


def pages_of(slots, slot, rows):
    return slots.table[slot, : rows // PAGE].tolist()


def prompt(tokens, first=0):
    return [*range(first, first + tokens)]


# ---- find and keep ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 63, 64, 100, 128])
def test_whole_chunks_are_kept_and_found(tokens):
    slots, prefixes = make()
    read(slots, prefixes, 1, prompt(tokens))
    whole = tokens // CHUNK * CHUNK
    assert len(prefixes) == tokens // CHUNK
    assert prefixes.find(prompt(tokens), tokens) == pages_of(slots, 1, whole)
    assert prefixes.find(prompt(200), 200) == pages_of(slots, 1, whole)


@pytest.mark.parametrize("most", [-5, 0, 1, 31, 32, 63, 64, 95, 96, 200])
def test_no_more_than_asked_for_is_found(most):
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(100))
    assert prefixes.find(prompt(100), most) == pages_of(slots, 0, min(max(most, 0), 100) // CHUNK * CHUNK)


@pytest.mark.parametrize("place", [0, 1, 31, 32, 40, 63, 64, 95])
def test_a_differing_token_hides_its_chunk_and_the_later_ones(place):
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(100))
    other = prompt(100)
    other[place] += 1000
    assert prefixes.find(other, 100) == pages_of(slots, 0, place // CHUNK * CHUNK)


def test_chunks_are_found_at_their_own_place_alone():
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(64))
    assert prefixes.find(prompt(64)[CHUNK:], 32) == []
    assert prefixes.find(prompt(64)[CHUNK:] + prompt(64)[:CHUNK], 64) == []


def test_tokens_are_told_apart_whatever_their_size():
    slots, prefixes = make()
    read(slots, prefixes, 0, [1] * 32)
    for other in ([257] * 32, [1 << 32] * 32, [1] * 31 + [1 + (1 << 40)], [0, 1] * 16):
        assert prefixes.find(other, 32) == []


def test_prompts_that_share_a_beginning_share_its_pages():
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(64) + prompt(36, 500))
    found = read(slots, prefixes, 1, prompt(64) + prompt(36, 700))
    assert found == pages_of(slots, 0, 64) == pages_of(slots, 1, 64)
    assert not set(pages_of(slots, 0, 112)[4:]) & set(pages_of(slots, 1, 112)[4:])
    assert len(prefixes) == 4  # two that are shared, and one of each


def test_what_is_kept_already_is_not_kept_twice():
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(100))
    before, free = prefixes.find(prompt(100), 100), slots.free_pages
    prefixes.keep(0, prompt(100))
    assert (len(prefixes), slots.free_pages, prefixes.find(prompt(100), 100)) == (3, free, before)
    slots.free(0)
    prefixes.clear()
    assert slots.free_pages == PAGES - 1


def test_two_that_were_read_at_once_keep_one_copy():
    slots, prefixes = make()
    for slot in (0, 1):
        slots.reserve(slot, 64)
    slots.append([64, 64, 0])
    prefixes.keep(0, prompt(64))
    prefixes.keep(1, prompt(64))
    assert prefixes.find(prompt(64), 64) == pages_of(slots, 0, 64)
    slots.free(1)
    assert slots.free_pages == PAGES - 1 - 4


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_pages_outlive_their_slot():
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(100))
    pages = pages_of(slots, 0, 96)
    slots.free(0)
    assert slots.free_pages == PAGES - 1 - 6
    assert prefixes.find(prompt(100), 100) == pages
    slots.reserve(1, PAGES_PER_SLOT * PAGE)
    assert not set(slots.table[1].tolist()) & set(pages)


def test_a_slot_that_begins_with_pages_owns_their_rows():
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(100))
    pages = prefixes.find(prompt(100), 64)
    slots.begin_with(1, pages)
    assert (slots.lengths[1], slots.starts[1], slots.prompts[1]) == (64, 0, 0)
    assert int(slots.length[1]) == 64 and pages_of(slots, 1, 64) == pages
    slots.reserve(1, 70)
    assert pages_of(slots, 1, 64) == pages  # nothing of them is written, so nothing is copied


def test_a_slot_in_use_cannot_begin_with_pages():
    slots, prefixes = make()
    read(slots, prefixes, 0, prompt(64))
    pages, free = prefixes.find(prompt(64), 64), slots.free_pages
    with pytest.raises(ValueError, match="slot 0 holds 64 rows: free it first"):
        slots.begin_with(0, pages)
    assert slots.free_pages == free


def test_pinned_pages_are_free_when_nobody_holds_them():
    slots, _ = make()
    slots.reserve(0, 80)
    slots.append([80, 0, 0])
    pages = slots.pin(0, 48)
    again = slots.pin(0, 16)
    assert pages == pages_of(slots, 0, 48) and again == pages[:1]
    slots.free(0)
    assert slots.free_pages == PAGES - 1 - 3
    slots.unpin(pages)
    assert slots.free_pages == PAGES - 1 - 1
    slots.unpin(again)
    assert slots.free_pages == PAGES - 1


def test_a_pinned_page_is_copied_before_it_is_written():
    slots, _ = make()
    slots.reserve(0, 40)
    slots.append([40, 0, 0])
    pages = slots.pin(0, 32)
    slots.truncate(0, 20)
    slots.reserve(0, 33)
    assert pages_of(slots, 0, 32)[0] == pages[0]
    assert pages_of(slots, 0, 32)[1] not in pages


# ---- room ------------------------------------------------------------------------------------------------------------


def three_documents():
    """Three documents of two chunks that are kept, oldest first, and nothing else."""
    slots, prefixes = make(pages=15)
    documents = [prompt(64, 1000 * i) for i in range(3)]
    for document in documents:
        read(slots, prefixes, 0, document)
        slots.free(0)
    assert slots.free_pages == 2
    return slots, prefixes, documents


def chunks_found(prefixes, documents):
    return [len(prefixes.find(document, 64)) // PER_CHUNK for document in documents]


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_what_was_used_longest_ago_goes_first(order):
    slots, prefixes, documents = three_documents()
    for i in order:
        prefixes.find(documents[i], 64)
    for rank in range(3):
        prefixes.make_room(2 + 4 * (rank + 1))
        left = [documents[i] for i in order[rank + 1 :]]
        assert len(prefixes) == 2 * len(left)
        assert [len(prefixes.find(x, 64)) for x in left] == [4] * len(left)  # in the same order, which stays
    assert slots.free_pages == 14


def test_keeping_again_is_a_use():
    slots, prefixes, documents = three_documents()
    slots.begin_with(0, prefixes.find(documents[0], 64))
    prefixes.find(documents[1], 64)
    prefixes.find(documents[2], 64)
    prefixes.keep(0, documents[0])
    slots.free(0)
    prefixes.make_room(6)
    assert chunks_found(prefixes, documents) == [2, 0, 2]


@pytest.mark.parametrize(("wanted", "left"), [(0, 6), (2, 6), (3, 5), (4, 5), (5, 4), (6, 4), (13, 0), (14, 0)])
def test_no_more_is_dropped_than_is_needed(wanted, left):
    slots, prefixes, _ = three_documents()
    prefixes.make_room(wanted)
    assert len(prefixes) == left
    assert slots.free_pages == 14 - 2 * left


def test_nothing_is_dropped_where_that_would_not_do():
    slots, prefixes, _ = three_documents()
    assert not prefixes.make_room(99)
    assert (len(prefixes), slots.free_pages) == (6, 2)


def test_a_beginning_loses_its_end_first():
    _, prefixes, documents = three_documents()
    prefixes.make_room(4)
    assert chunks_found(prefixes, documents) == [1, 2, 2]


def test_pages_that_a_slot_uses_outlive_their_being_dropped():
    slots, prefixes, documents = three_documents()
    pages = prefixes.find(documents[1], 64)
    slots.begin_with(2, pages)
    prefixes.clear()
    assert len(prefixes) == 0 and slots.free_pages == 10
    assert pages_of(slots, 2, 64) == pages
    slots.reserve(0, PAGES_PER_SLOT * PAGE)
    assert not set(slots.table[0].tolist()) & set(pages)
    slots.free(2)
    slots.free(0)
    assert slots.free_pages == 14


def test_what_a_slot_uses_is_not_dropped_in_vain():
    slots, prefixes, documents = three_documents()
    slots.begin_with(2, prefixes.find(documents[0], 64))
    for document in documents[1:]:
        prefixes.find(document, 64)
    prefixes.make_room(4)  # the oldest are in use: to drop them frees nothing
    assert chunks_found(prefixes, documents)[0] == 2
    assert len(prefixes) == 5


# ---- anything, in any order ------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Prompts that begin alike, read, ended and dropped at random; a page is what was last written to it."""

    def __init__(self):
        super().__init__()
        self.slots, self.prefixes = make()
        self.holds = [None] * SLOTS
        self.written = {}

    @precondition(lambda self: None in self.holds)
    @rule(data=st.data(), chunks=st.lists(st.sampled_from("ab"), max_size=3), more=st.integers(1, 31))
    def read(self, data, chunks, more):
        slot = data.draw(st.sampled_from([s for s in range(SLOTS) if self.holds[s] is None]))
        tokens = [ord(x) * 100 + i for x in chunks for i in range(CHUNK)] + [7] * more
        pages = -(-len(tokens) // PAGE)
        in_use = {p for s in range(SLOTS) for p in self.pages(s)}
        if pages > PAGES - 1 - len(in_use):
            return
        found = read(self.slots, self.prefixes, slot, tokens)
        assert all(self.written[p] == tokens[i * PAGE : (i + 1) * PAGE] for i, p in enumerate(found))
        self.holds[slot] = tokens
        for i, page in enumerate(self.pages(slot)[len(found) :], len(found)):
            self.written[page] = tokens[i * PAGE : (i + 1) * PAGE]
        kept = self.prefixes.find(tokens, len(tokens))
        assert len(kept) == len(chunks) * PER_CHUNK

    @rule(slot=st.integers(0, SLOTS - 1))
    def end(self, slot):
        self.slots.free(slot)
        self.holds[slot] = None

    @rule(pages=st.integers(0, PAGES))
    def make_room(self, pages):
        before = len(self.prefixes), self.slots.free_pages
        assert self.prefixes.make_room(pages) == (self.slots.free_pages >= pages)
        assert self.slots.free_pages >= pages or (len(self.prefixes), self.slots.free_pages) == before

    def pages(self, slot):
        rows = 0 if self.holds[slot] is None else len(self.holds[slot])
        return self.slots.table[slot, : -(-rows // PAGE)].tolist()

    @invariant()
    def sequences_have_their_own_rows(self):
        for slot in range(SLOTS):
            rows = [token for page in self.pages(slot) for token in self.written[page]]
            assert rows == (self.holds[slot] or [])
            assert 0 not in self.pages(slot)

    @invariant()
    def pages_are_free_or_in_use_or_kept(self):
        in_use = {p for slot in range(SLOTS) for p in self.pages(slot)}
        free = self.slots.free_pages
        assert PAGES - 1 - len(in_use) - PER_CHUNK * len(self.prefixes) <= free <= PAGES - 1 - len(in_use)

    def teardown(self):
        for slot in range(SLOTS):
            self.slots.free(slot)
        self.prefixes.clear()
        assert self.slots.free_pages == PAGES - 1
        assert len(self.prefixes) == 0


AnyOrder.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)
TestAnyOrder = AnyOrder.TestCase
