"""Batches in flight over host memory give the tokens of ``generate``, one after the other, whatever each does."""

import pytest
import torch

import keysift
from keysift.hf import HybridSteps
from keysift.ops.cpu.library import load
from tests.devices import CUDA
from tests.test_offload import RAGGED, SELECT
from tests.tiny_models import prompt, tiny

STEPS = 12


def halves(model, spec, where="auto", device="cpu"):
    """Two batches, of one prompt and of three of other lengths, with the tokens that ``generate`` gives."""
    batches, expected = [], []
    for pads in ((0,), RAGGED):
        inputs = {name: x.to(device) for name, x in prompt(90, pads).items()}
        cache = keysift.KVCache(model.config)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        first = out.logits[:, -1].argmax(-1, keepdim=True)
        batches.append((cache, first))
        options = {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1, "do_sample": False, "pad_token_id": 0}
        with keysift.attach(model, decode=spec):
            expected.append(model.generate(**inputs, **options)[:, 90:])
    return batches, expected


@pytest.mark.parametrize(("where", "spec"), SELECT)
def test_tokens_are_those_of_generate(where, spec):
    model = tiny("llama-llama3-rope-gqa")
    with torch.inference_mode(), keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
        batches, expected = halves(model, spec)
        steps = HybridSteps(model, batches, room=STEPS)
        steps.run(5)
        steps.take_back(3)
        steps.run(STEPS - 2)
        for (_, first), tokens, wanted in zip(batches, steps.tokens, expected, strict=True):
            assert torch.equal(torch.cat([first, tokens], 1), wanted)
        with pytest.raises(ValueError, match="1 more steps: there is room for 0"):
            steps.run(1)
        with pytest.raises(ValueError, match="13 steps cannot be taken back: there were 12"):
            steps.take_back(STEPS + 1)


@pytest.mark.parametrize(("where", "spec"), [SELECT[0], SELECT[5], *SELECT[-4:]])
def test_caches_are_given_back_with_what_they_have_become(where, spec):
    model = tiny("llama-llama3-rope-gqa")
    with torch.inference_mode(), keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
        batches, expected = halves(model, spec)
        found = [[first for _, first in batches]]
        for count in (5, 3, STEPS - 8):
            steps = HybridSteps(model, batches, room=STEPS)
            with pytest.raises(ValueError, match="belongs to HybridSteps: close"):
                model(found[-1][0][:, -1:], past_key_values=batches[0][0])
            with pytest.raises(ValueError, match="belongs to other HybridSteps"):
                HybridSteps(model, batches, room=STEPS)
            steps.run(count)
            found.append([tokens.clone() for tokens in steps.tokens])
            steps.close()
            steps.close()
            batches = [(cache, tokens[:, -1:]) for (cache, _), tokens in zip(batches, found[-1], strict=True)]
        for batch, wanted in enumerate(expected):
            assert torch.equal(torch.cat([tokens[batch] for tokens in found], 1), wanted)
        assert (
            len({id(layer.offloaded.host.slots) for layer in batches[0][0].layers if hasattr(layer, "offloaded")}) > 1
        )
        last = model(batches[0][1], past_key_values=batches[0][0]).logits
        assert last.isfinite().all() and batches[0][0].get_seq_length() == 90 + STEPS + 1


@pytest.mark.skipif(load() is None, reason="the CPU kernels were not built")
def test_a_fault_in_one_batch_is_told_and_ends_the_steps(monkeypatch):
    model, spec = tiny("llama-llama3-rope-gqa"), "signbits:keep=0.3,window=8,dense_below=0"

    def broken(*args):
        raise MemoryError("no room for a layer")

    with torch.inference_mode(), keysift.attach(model, decode=spec, kv_device="cpu", select_device="cpu"):
        batches, _ = halves(model, spec)
        steps = HybridSteps(model, batches, room=STEPS)
        steps.run(1)
        with monkeypatch.context() as patch:
            patch.setattr("keysift.hf.hybrid.attend_on_host", broken)
            with pytest.raises(MemoryError, match="no room for a layer"):
                steps.run(2)
        with pytest.raises(RuntimeError, match="closed, or failed and left rows half written"):
            steps.run(1)
        batches, expected = halves(model, spec)  # others are none the worse for it
        steps = HybridSteps(model, batches, room=STEPS)
        steps.run(STEPS)
        assert torch.equal(steps.tokens[1], expected[1][:, 1:])


def test_caches_that_it_cannot_step_are_refused():
    model = tiny("llama-llama3-rope-gqa")
    one = torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match='attach the model with kv_device="cpu" first'):
        HybridSteps(model, [(keysift.KVCache(model.config), one)], room=3)
    with keysift.attach(model, decode="signbits", kv_device="cpu"):
        with pytest.raises(ValueError, match="need a cache that holds a prompt"):
            HybridSteps(model, [(keysift.KVCache(model.config), one)], room=3)
        with pytest.raises(ValueError, match="room=0: choose 1 or more steps"):
            HybridSteps(model, [(keysift.KVCache(model.config), one)], room=0)
    with torch.inference_mode():
        cache, there = keysift.KVCache(model.config), prompt(90, (0,))
        with keysift.attach(model, decode="signbits"):
            model(**there, past_key_values=cache)
        with (
            keysift.attach(model, decode="signbits", kv_device="cpu"),
            pytest.raises(ValueError, match="a cache that was filled with kv_device=cpu"),
        ):
            HybridSteps(model, [(cache, one)], room=3)
    windows = tiny("gemma3")
    with torch.inference_mode(), keysift.attach(windows, decode="signbits", kv_device="cpu"):
        cache = keysift.KVCache(windows.config)
        windows(**prompt(90, (0,)), past_key_values=cache)
        with pytest.raises(ValueError, match="do not take cache layers of type DynamicSlidingWindowLayer"):
            HybridSteps(windows, [(cache, one)], room=3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize(("where", "spec"), SELECT)
def test_graphs_cut_at_the_hosts_part_give_the_tokens_of_generate(where, spec):
    model = tiny("llama-llama3-rope-gqa").to("cuda", torch.float32)
    with torch.inference_mode(), keysift.attach(model, decode=spec, kv_device="cpu", select_device=where):
        batches, expected = halves(model, spec, device="cuda")
        steps = HybridSteps(model, batches, room=STEPS)
        steps.run(4, graphs=False)
        steps.take_back(4)
        steps.run(4)
        spans = steps.traced(STEPS - 4)
        for (_, first), tokens, wanted in zip(batches, steps.tokens, expected, strict=True):
            assert torch.equal(torch.cat([first, tokens], 1), wanted)
        assert {span.batch for span in spans} == {0, 1} and all(span.start < span.end for span in spans)
        assert {span.device for span in spans} == {"gpu", "cpu"}
