"""Decode steps over paged slots give what the Hugging Face cache gives."""

import pytest
import torch

import keysift
from keysift.hf.paged import PagedCache, StepGraph
from keysift.slots import Slots
from keysift.types import Ctx
from tests.tiny_models import tiny

SPECS = (
    "dense",
    "streaming:sinks=2,window=12,dense_below=0",
    "quest:keep=0.3,page=4,window=8,dense_layers=none,dense_below=0",
    "magicpig:K=3,L=10,window=8,dense_layers=none,dense_below=0",
    "snapkv:budget=20,window=8,dense_below=0",
    "topk:keep=0.2,window=8,dense_layers=1,dense_below=0",
)
LENGTHS, STEPS = (70, 33, 51), 20


def paged(model, prompts, spec):
    """Slots that hold the prompts, filled by a dense prefill of each, with the method's side data."""
    method = keysift.attach(model, decode=spec)
    slots = Slots(len(prompts), 16, 8, 8 * len(prompts) + 1, model.device)
    cache = PagedCache(model, slots)
    first = []
    for slot, ids in enumerate(prompts):
        held, tails = keysift.KVCache(model.config), []
        with method.reading("dense"):
            first.append(int(model(ids, past_key_values=held).logits[0, -1].argmax()))
        slots.reserve(slot, ids.shape[1])
        slots.append([ids.shape[1] if s == slot else 0 for s in range(len(prompts))])
        slots.end_prompt(slot)
        which = slice(slot, slot + 1)
        for layer, (store, full) in enumerate(zip(cache.stores, held.layers, strict=True)):
            store.write(full.store.keys.transpose(1, 2), full.store.values.transpose(1, 2), which)
            if layer not in method.decode.dense_layers:
                tail = full.store._tail if full.store._tail is not None else torch.zeros(1, 1, 4, store.k.shape[3])
                ctx = Ctx(layer, store.k.shape[3] ** -0.5, slots.positions, 0)
                store.begin(method.decode, tail, ctx, which)
            tails.append(full)
    for slot in range(len(prompts)):
        slots.reserve(slot, slots.lengths[slot] + STEPS)
    return method, StepGraph(model, cache, 8 * 16), first


@pytest.mark.parametrize("spec", SPECS)
def test_paged_steps_of_a_ragged_batch_give_the_tokens_of_each_sequence_alone(spec):
    model = tiny("qwen3")
    prompts = [torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    with torch.no_grad():
        method, graph, first = paged(model, prompts, spec)
        with method:
            graph.ids.copy_(torch.tensor(first)[:, None])
            tokens = [graph.ids.clone()]
            for _ in range(STEPS - 1):
                graph.step()
                tokens.append(graph.ids.clone())
            together = torch.cat(tokens, 1)
    for b, ids in enumerate(prompts):
        with keysift.attach(model, decode=spec):
            alone = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False
            )
        assert together[b].tolist() == alone[0, ids.shape[1] :].tolist()


def test_paged_slots_take_one_token_a_step():
    model = tiny("qwen3")
    ids = torch.randint(3, 90, (1, 20))
    with torch.no_grad():
        method, graph, _ = paged(model, [ids], "dense")
        with method, pytest.raises(ValueError, match="paged slots take one token a step, without 2 tokens at once"):
            model(ids[:, :2], past_key_values=graph.cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("topk")])
def test_replayed_steps_give_the_tokens_of_eager_ones(spec):
    model = tiny("qwen3").cuda()
    prompts = [torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(n)).cuda() for n in LENGTHS]
    try:
        with torch.no_grad():
            method, graph, first = paged(model, prompts, spec)
            with method:
                start, found = torch.tensor(first).cuda()[:, None], []
                for step in (graph.step, graph.eager_step):
                    graph.ids.copy_(start)
                    tokens = []
                    for _ in range(STEPS - 4):
                        step()
                        tokens.append(graph.ids.clone())
                    found.append(torch.cat(tokens, 1))
                    for slot, n in enumerate(LENGTHS):
                        graph.cache.slots.truncate(slot, n)
                assert torch.equal(*found)
    finally:
        model.cpu()
