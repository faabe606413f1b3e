"""Attention over pages as vLLM hands them out gives what the same methods give over our own store."""

import random

import pytest
import torch

from keysift import attention as path
from keysift.cache import Store
from keysift.meter import Meter
from keysift.methods import dense, parse
from keysift.slots import Slots
from keysift.types import KV, Ctx
from keysift.vllm_plugin.batch import Batch, Batches, round_lengths
from keysift.vllm_plugin.layer import Layer, LayerAttention
from keysift.vllm_plugin.options import Options
from keysift.vllm_plugin.pages import PageLayout
from keysift.vllm_plugin.warm_up import kinds, warm_up

PAGE, HEADS, KV_HEADS, DIM, LONGEST = 128, 6, 2, 64, 1024
SCALE = DIM**-0.5
DECODES = (
    "dense",
    "streaming:sinks=4,window=40",
    "quest:keep=0.1,dense_layers=none,window=16,dense_below=0",
    "quest:budget=96,page=32,dense_layers=none,window=16,dense_below=0",
    "signbits:keep=0.1,window=16,dense_below=0",
    "signbits:keep=0.2,per=query_head,sinks=200,window=16,dense_below=0",
    "magicpig:K=4,L=20,window=16,dense_below=0",
    "magicpig:K=8,L=75,pool=128,window=16,dense_below=0",
)


class World:
    """A layer, its cache as vLLM makes it, and sequences whose queries, keys and values are known beforehand."""

    def __init__(self, prefill, decode, tokens, seed=0, page=PAGE, dtype=torch.float32, window=None, most=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.page = page
        options = Options.of({"prefill": prefill, "decode": decode, "seed": 5})
        self.layer = LayerAttention(Layer(3, KV_HEADS, DIM, DIM, SCALE, window), options)
        layout = PageLayout(page, KV_HEADS, DIM, DIM, dtype, self.layer.method)
        pages = sum(-(-n // page) for n in tokens) + 3
        self.raw = torch.full(
            (pages, layout.bytes), 0xFF, dtype=torch.uint8
        )  # not numbers, wherever nothing is written
        content = self.raw.view(dtype)[:, : 2 * page * KV_HEADS * DIM]
        self.cache = content.unflatten(1, (KV_HEADS, page, 2 * DIM))  # as vLLM sees it
        self.batches = Batches(layout, most or len(tokens), torch.device("cpu"))
        order = torch.randperm(pages - 1, generator=self.generator) + 1
        self.table = torch.zeros(len(tokens), -(-max(tokens) // page), dtype=torch.int32)
        for b, n in enumerate(tokens):
            used = -(-n // page)
            self.table[b, :used], order = order[:used].int(), order[used:]
        self.q, self.k, self.v = (
            [torch.randn(n, heads, DIM, generator=self.generator).to(dtype) for n in tokens]
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

    def slots(self, parts):
        """Where vLLM would have tokens written: ``(sequence, first, last)``."""
        rows = [(b, torch.arange(first, last)) for b, first, last in parts]
        return torch.cat([self.table[b, at // self.page].long() * self.page + at % self.page for b, at in rows])

    def metadata(self, parts, prefilling=(), longest=None):
        lengths = torch.tensor([last - first for _, first, last in parts])
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).tolist()
        ends = [last for *_, last in parts]
        still = torch.tensor([b in prefilling for b, *_ in parts])
        table = self.table[[b for b, *_ in parts]]
        if self.batches.filled is not None:
            self.layer.complete(self.cache, self.batches.filled)
            self.batches.filled = None
        return self.batches.batch(starts, ends, torch.tensor(ends).int(), table, longest or max(ends), still)

    def attend(self, parts, batch):
        """Attention of some sequences' next tokens: ``(sequence, first, last)``."""
        q, k, v = (torch.cat([x[b][first:last] for b, first, last in parts]) for x in (self.q, self.k, self.v))
        out = torch.full_like(q, torch.nan)
        self.layer.write(self.cache, k, v, self.slots(parts))
        self.layer.attend(q, self.cache, batch, out)
        pieces = out.split([last - first for _, first, last in parts])
        return {b: piece for (b, *_), piece in zip(parts, pieces, strict=True)}

    def batch(self, parts, prefilling=()):
        parts = sorted(parts, key=lambda part: part[2] - part[1])
        return self.attend(parts, self.metadata(parts, prefilling))

    def expected(self, prefill, decode, b, prompt, chunks):
        """The same sequence over our store: its prompt in the same chunks, then token by token.

        As long as its first page is not full, all keys are read where anything is kept of them.
        """
        n, method = len(self.q[b]), parse(decode, "decode")
        whole = min(max(prompt, self.page if method.sides(DIM, torch.float32) else 0), n)
        chunks = [*chunks, *((t, t + 1) for t in range(prompt, whole))]
        slots = Slots(1, self.page, -(-n // self.page), -(-n // self.page) + 1, "cpu")
        store = Store.in_pages(slots, KV_HEADS, DIM, DIM, self.q[b].dtype)
        slots.reserve(0, n)
        ctx = Ctx(3, SCALE, torch.zeros(1), 5, self.page)
        outs = []
        for first, last in chunks:
            slots.append([last - first])
            store.write(self.k[b][None, first:last], self.v[b][None, first:last])
            kv = store.view()
            at = ctx._replace(positions=kv.length - 1)
            outs.append(path.prefill(self.q[b][None, first:last], kv, parse(prefill, "prefill"), at, Meter())[0][0])
        slots.end_prompt(0, whole)
        store.begin(method, self.q[b][None, :0], ctx._replace(positions=store.view().length - 1))
        for t in range(whole, n):
            slots.append(1)
            store.write(self.k[b][None, t : t + 1], self.v[b][None, t : t + 1])
            at = ctx._replace(positions=store.view().length - 1)
            outs.append(path.decode(self.q[b][None, t], store, method, at, None)[0])
        return torch.cat(outs)


def run(world, prompts, order, sizes=(2, 30, 129, 400)):
    """All sequences to their ends, in batches of any kind; outputs, and the chunks in which prompts were read."""
    tokens = [len(q) for q in world.q]
    outs, chunks, at = [[] for _ in tokens], [[] for _ in tokens], [0] * len(tokens)
    while any(a < n for a, n in zip(at, tokens, strict=True)):
        parts = []
        for b, (a, n, prompt) in enumerate(zip(at, tokens, prompts, strict=True)):
            if a < n and order.random() < 0.8:
                parts.append((b, a, a + (1 if a >= prompt else min(order.choice(sizes), prompt - a))))
        prefilling = [b for b, first, _ in parts if first < prompts[b]]
        for b, out in (world.batch(parts, prefilling) if parts else {}).items():
            if at[b] < prompts[b]:
                chunks[b].append((at[b], at[b] + len(out)))
            at[b] += len(out)
            outs[b].append(out)
    return [torch.cat(out) for out in outs], chunks


@pytest.mark.parametrize("decode", DECODES)
def test_batches_of_any_kind_give_what_each_sequence_gives_alone(decode):
    """Chunks of all sizes beside steps of others; lengths on both sides of a page's end."""
    prompts, tokens = (300, 40, 127, 128, 700), (380, 300, 150, 200, 720)
    world = World("dense", decode, tokens)
    outs, chunks = run(world, prompts, random.Random(3))
    for b, prompt in enumerate(prompts):
        wanted = world.expected("dense", decode, b, prompt, chunks[b])
        torch.testing.assert_close(outs[b], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decode", [DECODES[0], DECODES[2], DECODES[4], DECODES[6]])
def test_steps_of_a_round_number_of_sequences_are_the_same(decode):
    """On GPUs sequences of no length are added to steps, with queries of others, or none."""
    prompts, tokens = (300, 40, 127, 128, 330), (330, 60, 150, 140, 340)
    alike, rounded = (World("dense", decode, tokens, most=8) for _ in range(2))
    rounded.batches.in_round_numbers = True
    outs, _ = run(alike, prompts, random.Random(3))
    of_rounded, _ = run(rounded, prompts, random.Random(3))
    for a, b in zip(outs, of_rounded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    steps = rounded.metadata([(0, 329, 330), (1, 59, 60), (2, 149, 150)]).steps
    assert (len(steps.length), steps.length[3], steps.table[3].sum()) == (4, 0, 0)


@pytest.mark.parametrize("prefill", ["flexprefill:dense_below=0,block=16", "streaming:sinks=16,window=64,block=16"])
def test_chunks_of_prompts_are_read_by_the_prefill_method(prefill):
    prompts, tokens = (700, 260), (704, 262)
    world = World(prefill, "dense", tokens, page=64)
    outs, chunks = run(world, prompts, random.Random(1), sizes=(200, 500))
    for b, prompt in enumerate(prompts):
        wanted = world.expected(prefill, "dense", b, prompt, chunks[b])
        torch.testing.assert_close(outs[b], wanted, rtol=1e-4, atol=1e-5)
        all_keys = world.expected("dense", "dense", b, prompt, chunks[b])
        assert (outs[b] - all_keys).abs().max() > 1e-3, "the method left nothing out"


@pytest.mark.parametrize("decode", ["quest:keep=0.1,dense_layers=none,window=16,dense_below=0", DECODES[4]])
def test_metadata_of_a_captured_step_serve_any_lengths(decode):
    """Tensors of steps keep their addresses, and what is promised of lengths is what the model can have at most."""
    prompts, tokens = (300, 150), (340, 190)
    world = World("dense", decode, tokens)
    for b, prompt in enumerate(prompts):
        world.batch([(b, 0, prompt)], [b])
    fixed = world.metadata([(0, 300, 301), (1, 150, 151)], longest=LONGEST).steps
    where = [x.data_ptr() for x in fixed if isinstance(x, torch.Tensor)][1:]  # all but vLLM's own table
    for t in range(40):
        parts = [(b, prompt + t, prompt + t + 1) for b, prompt in enumerate(prompts)]
        batch = world.metadata(parts)
        assert [x.data_ptr() for x in batch.steps if isinstance(x, torch.Tensor)][1:] == where
        out = world.attend(parts, batch)
        captured = world.attend(parts, Batch(2, fixed._replace(table=batch.steps.table), []))
        for b in range(2):
            torch.testing.assert_close(captured[b], out[b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decode", DECODES[2:])
def test_a_shared_page_gives_what_a_cold_run_gives(decode):
    """Sequence 1 begins with the pages of sequence 0, whether a prompt or steps have filled the first."""
    for prompt in (300, 60):
        world = World("dense", decode, (300, 320))
        for x in (world.q, world.k, world.v):
            x[1][:256] = x[0][:256]
        world.batch([(0, 0, prompt)], [0])
        for t in range(prompt, 256):
            world.batch([(0, t, t + 1)])
        world.table[1, :2] = world.table[0, :2]
        outs = [world.batch([(1, 256, 310)], [1])[1]]
        outs += [world.batch([(1, t, t + 1)])[1] for t in range(310, 320)]
        wanted = world.expected("dense", decode, 1, 310, [(0, 256), (256, 310)])[256:]
        torch.testing.assert_close(torch.cat(outs), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decode", DECODES[2:])
@pytest.mark.parametrize(("prompt", "source"), [(200, 256), (129, 256), (200, 128), (129, 128)])
def test_a_page_may_be_shared_in_the_batch_that_fills_it(decode, prompt, source):
    """vLLM hands pages out as soon as it knows what will be in them: the hit comes first, its source behind it."""
    world = World("dense", decode, (300, 300))
    for x in (world.q, world.k, world.v):
        x[1][:PAGE] = x[0][:PAGE]
    world.table[1, 0] = world.table[0, 0]
    if source == PAGE:  # filled by a step, the last of whose batch may be another's single token: all are steps then
        world.batch([(0, 0, PAGE - 1)], [0])
        outs = [
            world.attend(parts, world.metadata(parts, [1]))[1] for parts in [[(0, PAGE - 1, PAGE), (1, PAGE, prompt)]]
        ]
    else:
        outs = [world.batch([(0, 0, source), (1, PAGE, prompt)], [0, 1])[1]]
    outs += [world.batch([(1, t, t + 1)])[1] for t in range(prompt, 300)]
    wanted = world.expected("dense", decode, 1, prompt, [(0, PAGE), (PAGE, prompt)])[PAGE:]
    torch.testing.assert_close(torch.cat(outs), wanted, rtol=1e-4, atol=1e-5)


def test_padded_batches_may_know_less_of_who_is_in_the_prompt():
    """vLLM pads a captured batch, but not what it says of prompts."""
    world = World("dense", DECODES[2], (300, 300), most=8)
    for b in (0, 1):
        world.batch([(b, 0, 299)], [b])
    table = torch.cat([world.table, torch.zeros_like(world.table)])
    lengths = torch.tensor([300, 300, 0, 0], dtype=torch.int32)
    batch = world.batches.batch([0, 1, 2, 2, 2], lengths.tolist(), lengths, table, LONGEST, torch.tensor([True, False]))
    assert (batch.steps.middle_length > 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("prefill", ["streaming:sinks=16,window=64,block=16", "flexprefill:dense_below=0,block=16"])
def test_a_step_behind_a_prompt_is_a_step(prefill):
    """vLLM's own backends, which ``patch_model`` takes the batches of, do not put steps first."""
    world = World(prefill, "dense", (301, 300))
    world.batch([(0, 0, 300)], [0])
    parts = [(1, 0, 300), (0, 300, 301)]
    outs = world.attend(parts, world.metadata(parts, [1]))
    wanted = world.expected("dense", "dense", 0, 300, [(0, 300)])[300:]
    torch.testing.assert_close(outs[0], wanted, rtol=1e-4, atol=1e-5)
    wanted = world.expected(prefill, "dense", 1, 300, [(0, 300)])
    torch.testing.assert_close(outs[1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decode", DECODES[2:])
def test_the_last_token_of_a_prompt_reads_all_keys_when_it_comes_alone(decode):
    """As where all else of the prompt was cached: a batch of single tokens looks like a decode step."""
    world = World("dense", decode, (400, 400))
    for b in (0, 1):
        world.batch([(b, 0, 399)], [b])
    out = world.batch([(0, 399, 400), (1, 399, 400)], prefilling=[0])
    of_all = world.expected("dense", "dense", 0, 400, [(0, 400)])[399:]
    torch.testing.assert_close(out[0], of_all, rtol=1e-4, atol=1e-5)
    assert (out[1] - world.expected("dense", "dense", 1, 400, [(0, 400)])[399:]).abs().max() > 1e-3


def test_padding_writes_nothing_and_reads_nothing():
    """Captured batches are padded with sequences of no tokens, whose rows go nowhere."""
    world = World("dense", DECODES[4], (300, 200))
    world.batch([(0, 0, 299)], [0])
    before = world.raw.clone()
    table = torch.stack([world.table[0], torch.zeros_like(world.table[0])])
    steps = world.batches.steps(torch.tensor([300, 0], dtype=torch.int32), table, LONGEST)
    q, k, v = (torch.cat([x[0][299:300], x[1][:1]]) for x in (world.q, world.k, world.v))
    slot = world.slots([(0, 299, 300)])
    world.layer.write(world.cache, k, v, torch.cat([slot, -torch.ones_like(slot)]))
    out = torch.full_like(q, torch.nan)
    world.layer.attend(q, world.cache, Batch(2, steps, []), out)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    wanted = world.expected("dense", DECODES[4], 0, 299, [(0, 299)])[299:]
    torch.testing.assert_close(out[:1], wanted, rtol=1e-4, atol=1e-5)
    changed = (world.raw != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [int(world.table[0, 2])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    world = World("dense", DECODES[4], (300,), dtype=dtype)
    outs, chunks = run(world, (200,), random.Random(2))
    wanted = world.expected("dense", DECODES[4], 0, 200, chunks[0])
    torch.testing.assert_close(outs[0], wanted, rtol=2e-2, atol=2e-2)


def test_layers_with_a_window_of_their_own_stay_dense_in_it():
    world = World("flexprefill:dense_below=0,block=16", DECODES[4], (300,), window=50)
    outs, _ = run(world, (250,), random.Random(2))
    kv = KV.of(world.k[0][None], world.v[0][None])
    wanted = path.prefill(world.q[0][None], kv, dense.Method(), Ctx(0, SCALE, torch.zeros(1)), Meter(), window=50)[0][0]
    torch.testing.assert_close(outs[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ("flexprefill:dense_below=0", DECODES[2]),
        ("flexprefill:dense_below=0", DECODES[4]),
        ("minference", DECODES[6]),
        ("xattention", DECODES[1]),
        ("flashprefill", "dense"),
        ("streaming", DECODES[3]),
    ],
)
def test_warming_up_computes_every_kind_of_batch_and_leaves_pages_of_sequences_alone(prefill, decode):
    world = World(prefill, decode, (300, 90), most=6)
    world.batches.in_round_numbers = True  # as on GPUs
    world.raw[0] = 0  # as vLLM makes its cache
    rest = world.raw[1:].clone()
    warm_up([(world.layer, world.cache, HEADS)], world.batches, 1500, 160, world.table)
    assert torch.equal(world.raw[1:], rest) and world.batches.filled is None
    outs, chunks = run(world, (280, 70), random.Random(3))
    for b, prompt in enumerate((280, 70)):
        wanted = world.expected(prefill, decode, b, prompt, chunks[b])
        torch.testing.assert_close(outs[b], wanted, rtol=1e-4, atol=1e-5)


def test_kinds_of_batches_are_powers_of_two_of_sequences_tokens_and_lengths():
    world = World("dense", DECODES[2], (10,), most=6)
    made = [*kinds(world.batches, rows=2000, longest=5000, most_tokens=1500, table=world.table)]
    steps = {(batch.count, batch.steps.most) for _, batch in made if batch.steps is not None}
    lengths = (1024, 2048, 4096, 5000)
    assert steps == {(n, length) for n in (1, 2, 4, 6) for length in lengths if n == 1 or length < 2000}
    chunks = {(batch.chunks[0].new, batch.chunks[0].end) for _, batch in made if batch.chunks}
    ends = {513, 1023, 1024, 1025, 2047, 2048, 2049, 2501, 4095, 4096, 4999, 5000}
    parts = {2**i for i in range(1, 11)}
    wanted = {(min(new, end), end) for new in (*parts, 1500) for end in ends if new <= end or new in (1024, 1500)}
    assert chunks == wanted
    assert all(tokens == batch.count + sum(chunk.new for chunk in batch.chunks) for tokens, batch in made)


@pytest.mark.parametrize(("longest", "lengths"), [(1000, [1000]), (1024, [1024]), (1025, [1024, 1025])])
def test_lengths_are_rounded_up_to_powers_of_two_or_to_the_longest(longest, lengths):
    assert [*round_lengths(longest)] == lengths
