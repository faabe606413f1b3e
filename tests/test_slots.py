"""Slots and pages: whatever happens to sequences, each reads its own rows and its own side data."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keysift.cache import Store
from keysift.methods.base import KeepsNothing
from keysift.ops.rows import part_bounds, write_at_reference, write_rows_reference
from keysift.ops.rows_triton import bounds, write, write_at
from keysift.slots import Slots
from keysift.types import Ctx, Side, State

PAGE, SLOTS, PAGES_PER_SLOT, PAGES = 16, 4, 4, 11


@dataclass(frozen=True)
class Sums(KeepsNothing):
    """Keeps the sum of every five keys, a copy of every key, and the first key of the prompt."""

    sinks, window, tail, grows, dense_layers = 2, 3, 0, True, ()

    def sides(self, dim, dtype):
        return {"sums": Side(5, (dim,), dtype, fill=-1.0), "copies": Side(1, (dim,), dtype)}

    def states(self, kv_heads, dim, capacity):
        return {"first": State((kv_heads, dim), torch.float32)}

    def begin(self, index, kv, prompt, tail_q_BTHD, ctx):
        index["first"].copy_(prompt.k[prompt.locate(prompt.start[:, None])][:, 0])

    def extend(self, index, kv, done, most, ctx):
        for b in range(len(done)):
            assert int(kv.end[b] - done[b]) <= most
            # the entry of the last row that holds may have had later ones, which are gone
            for row in range(max(int(kv.start[b]), int(done[b]) - 1), int(kv.end[b])):
                page, offset = (x[0, 0] for x in kv.only(b).locate(torch.tensor([[row]])))
                index["copies"][page, :, offset] = kv.k[page, offset]
                entry, tokens = offset // 5, range(int(offset) // 5 * 5, int(offset) + 1)
                index["sums"][page, :, entry] = kv.k[page, list(tokens)].sum(0)


def keys(ids):
    """Rows ``[1, T, 1, 2]`` that tell which tokens they are."""
    return torch.tensor([[[float(i), -float(i)]] for i in ids])[None]


class AnyOrder(RuleBasedStateMachine):
    """Random appends, cuts, forks and ends against lists of numbers."""

    def __init__(self):
        super().__init__()
        self.slots = Slots(SLOTS, PAGE, PAGES_PER_SLOT, PAGES, "cpu")
        self.store = Store.in_pages(self.slots, 1, 2, 2, torch.float32)
        self.store.k[0] = torch.nan
        self.method, self.ctx = Sums(), Ctx(0, 1.0, self.slots.length)
        self.model = [[] for _ in range(SLOTS)]
        self.first = [None] * SLOTS
        self.next = 1
        self.touched = 0
        self.refusals = []  # what was free, and how long sequences were, before and after

    @initialize()
    def no_side_data_yet(self):
        self.store.begin(self.method, torch.zeros(SLOTS, 1, 1, 2), self.ctx)

    def append(self, slot, rows):
        fresh = [*range(self.next, self.next + rows)]
        before = self.slots.free_pages, [len(x) for x in self.model]
        try:
            self.slots.reserve(slot, len(self.model[slot]) + rows)
        except ValueError:
            self.refusals.append((before, (self.slots.free_pages, self.slots.lengths)))
            return
        self.next += rows
        counts = [rows if s == slot else 0 for s in range(SLOTS)]
        if rows % 2:
            self.slots.append(counts)
        else:  # as a graph does
            self.slots.append(torch.tensor(counts), most=rows)
            self.slots.note(counts)
        which = slice(slot, slot + 1)
        self.store.write(keys(fresh), keys(fresh) * 2, which)
        was_empty = not self.model[slot]
        self.model[slot] += fresh
        if was_empty:
            self.slots.end_prompt(slot)
            self.store.begin(self.method, torch.zeros(1, 1, 1, 2), self.ctx, which)
            self.first[slot] = fresh[0]
        self.touched = slot

    @rule(slot=st.integers(0, SLOTS - 1), rows=st.sampled_from([1, 1, 2, 5, 15, 16, 17, 33]))
    def append_some(self, slot, rows):
        self.append(slot, rows)

    @rule(slot=st.integers(0, SLOTS - 1), share=st.floats(0, 1))
    def truncate(self, slot, share):
        length = int(len(self.model[slot]) * share)
        before = self.slots.free_pages, [len(x) for x in self.model]
        try:
            self.slots.truncate(slot, length)
        except ValueError:
            self.refusals.append((before, (self.slots.free_pages, self.slots.lengths)))
            return
        del self.model[slot][length:]
        self.touched = slot

    @rule(slot=st.integers(0, SLOTS - 1))
    def free(self, slot):
        self.slots.free(slot)
        self.model[slot] = []
        free = set(range(PAGES)) - {p for pages in self.slots._owned for p in pages}
        for x in (self.store.k, self.store.v, self.store._index["sums"], self.store._index["copies"]):
            x[sorted(free)] = torch.nan
        self.touched = slot

    @precondition(lambda self: any(self.model) and not all(self.model))
    @rule(data=st.data())
    def fork(self, data):
        source = data.draw(st.sampled_from([s for s in range(SLOTS) if self.model[s]]))
        to = data.draw(st.sampled_from([s for s in range(SLOTS) if not self.model[s]]))
        self.slots.free(to)  # pages of a sequence cut to nothing
        self.slots.fork(source, to)
        self.model[to], self.first[to] = [*self.model[source]], self.first[source]
        self.touched = to

    @rule()
    def bring_side_data_up_to_date(self):
        index = self.store.index(self.method, torch.zeros(SLOTS, 1, 2), self.ctx)
        for slot in range(SLOTS):
            self.check_side_data(slot, index)

    def check_side_data(self, slot, index):
        ids = self.model[slot]
        if len(ids) <= self.method.sinks:
            return
        assert float(index["first"][slot, 0, 0]) == self.first[slot]
        for token in range(self.method.sinks, len(ids)):
            page, offset = int(self.slots.table[slot, token // PAGE]), token % PAGE
            assert float(index["copies"][page, 0, offset, 0]) == ids[token]
            last = min(len(ids), token // PAGE * PAGE + min(PAGE, offset // 5 * 5 + 5))
            if token == last - 1:  # the entry's newest key
                group = range(token // PAGE * PAGE + offset // 5 * 5, last)
                assert float(index["sums"][page, 0, offset // 5, 0]) == sum(ids[t] for t in group)

    @invariant()
    def sequences_read_their_own_rows(self):
        assert self.slots.lengths == [len(x) for x in self.model]
        for slot in {self.touched, self.next % SLOTS}:
            view = self.store.view(slice(slot, slot + 1))
            assert view.length.tolist() == [len(self.model[slot])]
            plain = view.unpaged()
            assert plain.k[0, : len(self.model[slot]), 0, 0].tolist() == self.model[slot]
            assert plain.v[0, : len(self.model[slot]), 0, 1].tolist() == [-2 * i for i in self.model[slot]]

    @invariant()
    def what_does_not_fit_changes_nothing(self):
        assert all(before == after for before, after in self.refusals)
        self.refusals.clear()

    @invariant()
    def no_page_is_lost(self):
        owned = {p for pages in self.slots._owned for p in pages}
        assert self.slots.free_pages == PAGES - 1 - len(owned)
        assert 0 not in owned


AnyOrder.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=500,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)
TestTenThousandSteps = pytest.mark.slow(AnyOrder.TestCase)


def paged(lengths, pages=PAGES):
    slots = Slots(len(lengths), PAGE, PAGES_PER_SLOT, pages, "cpu")
    store = Store.in_pages(slots, 1, 2, 2, torch.float32)
    for slot, rows in enumerate(lengths):
        slots.reserve(slot, rows)
    slots.append(lengths)
    for slot, rows in enumerate(lengths):
        if rows:
            store.write(keys(range(100 * slot, 100 * slot + rows)), keys(range(rows)), slice(slot, slot + 1))
    return slots, store


def test_a_fork_shares_pages_until_one_writes():
    slots, store = paged([40, 0, 0])
    free = slots.free_pages
    slots.fork(0, 1)
    assert slots.free_pages == free
    slots.reserve(1, 41)
    assert slots.free_pages == free - 1  # the page that both had begun
    slots.append([0, 1, 0])
    store.write(keys([7]), keys([7]), slice(1, 2))
    assert store.view(slice(0, 1)).unpaged().k[0, :40, 0, 0].tolist() == [*map(float, range(40))]
    assert store.view(slice(1, 2)).unpaged().k[0, :41, 0, 0].tolist() == [*map(float, range(40)), 7.0]


def test_a_slot_that_is_freed_leaves_the_others_alone():
    slots, store = paged([40, 20, 33])
    before = store.view(slice(2, 3)).unpaged().k[0, :33].clone()
    slots.free(1)
    slots.reserve(1, 30)
    slots.append([0, 30, 0])
    store.write(keys(range(30)), keys(range(30)), slice(1, 2))
    assert torch.equal(store.view(slice(2, 3)).unpaged().k[0, :33], before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s.reserve(0, 65), "65 rows: a sequence may have 64"),
        (lambda s: s.reserve(1, 64), "the store is full: 64 rows need 4 more pages of 16 and 3 are free"),
        (lambda s: s.fork(0, 2), "slot 2 holds 20 rows: free it first"),
        (lambda s: Slots(1, 20, 2, 3, "cpu"), "page=20: choose 16"),
        (lambda s: Slots(1, 16, 4, 4, "cpu"), "pages=4: a sequence may need 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    slots, _ = paged([40, 0, 20], pages=9)
    with pytest.raises(ValueError) as error:
        make(slots)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert slots.lengths == [40, 0, 20]


def test_views_promise_no_length_within_a_capture():
    slots, store = paged([40, 7])
    assert store.view().bound == 40
    with slots.unknown_lengths(64):
        kv = store.view()
        assert (kv.spans, kv.bound) == (None, 64)
        assert slots.longest_part(4, 10, True) == 50
    assert store.view().spans == ((0, 40), (0, 7))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_kernel_writes_the_rows_that_indexing_writes(tokens):
    g, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    for kv_heads, dim, v_dim in ((2, 8, 8), (3, 20, 12)):
        k, v = (torch.randn(6, 16, kv_heads, d, generator=g) for d in (dim, v_dim))
        table = torch.tensor([[3, 1], [2, 5], [0, 0]], dtype=torch.int32)
        length = torch.tensor([12 + tokens, 21, 0])
        new_k, new_v = (torch.randn(3, kv_heads, tokens, d, generator=g).transpose(1, 2) for d in (dim, v_dim))
        expected, got = [k.clone(), v.clone()], [k.to(device, copy=True), v.to(device, copy=True)]
        write_rows_reference(*expected, new_k, new_v, table, length)
        write(*got, *(x.to(device) for x in (new_k, new_v, table, length)))
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a[1:], b[1:].cpu())  # page 0 is nobody's
        assert not torch.equal(expected[0][1:], k[1:])


def test_the_kernel_writes_rows_to_the_places_that_indexing_writes():
    """Pages lie apart, and rows without a place go nowhere."""
    g, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    for kv_heads, dim, v_dim in ((2, 8, 8), (3, 20, 12)):
        raw = [torch.randn(6, 17, kv_heads, d + 1, generator=g) for d in (dim, v_dim)]
        new_k, new_v = (torch.randn(9, kv_heads, d, generator=g) for d in (dim, v_dim))
        slots = torch.tensor([5 * 16 + 15, -1, 16, 0, 3 * 16 + 7, -1, 41])
        expected, got = [x.clone() for x in raw], [x.to(device, copy=True) for x in raw]
        write_at_reference(*(x[:, :16, :, :-1] for x in expected), new_k, new_v, slots)
        write_at(*(x[:, :16, :, :-1] for x in got), *(x.to(device) for x in (new_k, new_v, slots)))
        for before, a, b in zip(raw, expected, got, strict=True):
            assert torch.equal(a, b.cpu())
            assert (before != a).any(-1).sum() == 5 * kv_heads
        assert torch.equal(expected[1][5, 15, :, :-1], new_v[0])


def test_parts_are_what_is_between_sinks_and_window():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, length = torch.tensor([0, 5, 2, 7, 0, 3]), torch.tensor([90, 60, 9, 7, 0, 80])
    prompt = torch.tensor([70, 60, 5, 7, 0, 4])
    for end, sinks, window, last in (
        (length, 4, 10, None),
        (prompt, 4, 0, None),
        (length, 0, 64, 3),
        (prompt, 2, 1, 1),
    ):
        first, rows = part_bounds(start, length, end, sinks, window, last)
        for b, (s, n, e) in enumerate(zip(start.tolist(), length.tolist(), end.tolist(), strict=True)):
            part = list(range(s, n))[sinks:]
            part = [row for row in part if row < e - window]
            part = part if last is None else part[max(0, len(part) - last) :]
            assert rows[b] == len(part) and (not part or first[b] == part[0])
        kernels = bounds(*(x.to(device) for x in (start, length, end)), sinks, window, last)
        assert all(map(torch.equal, (x.cpu() for x in kernels), (first, rows)))
