"""What ``keysift bench serve`` does without vLLM: lists of structured prompts, and what it refuses."""

import pytest
import torch

from keysift.bench.inputs import structured_qkv
from keysift.bench.serve import StructuredPrompt
from keysift.cli.bench_serve import parse_run
from keysift.methods import describe, parse
from keysift.types import KV, Ctx

TOKENS, CHUNK, HEADS, KV_HEADS, DIM = 1024, 512, 4, 2, 32


@pytest.mark.parametrize("first", [0, 300, 512, 1000])
def test_any_part_of_a_prompt_gets_the_lists_of_the_structured_one(first):
    """However the server cuts it, a query block reads what it reads when the structured prompt is read in chunks."""
    inner = parse("flexprefill:dense_below=0,block=64,gamma=0.8", "prefill")
    structured = StructuredPrompt(inner, TOKENS, CHUNK, (HEADS, KV_HEADS, DIM), "cpu", seed=3)
    q, k, v = structured_qkv(TOKENS, HEADS, KV_HEADS, DIM, seed=3, device="cpu")
    wanted = []
    for lo in (0, CHUNK):
        kv = KV.of(k[:, : lo + CHUNK], v[:, : lo + CHUNK])
        plan = inner.plan(q[:, lo : lo + CHUNK], kv, Ctx(0, DIM**-0.5, kv.length - 1, 3))
        wanted.append(inner.mask(plan, range(lo // 64, (lo + CHUNK) // 64)).active(TOKENS // 64))
    own = torch.randn(1, TOKENS - first, HEADS, DIM)
    kv = KV.of(torch.randn(1, TOKENS, KV_HEADS, DIM), torch.randn(1, TOKENS, KV_HEADS, DIM))
    plan = structured.plan(own, kv, Ctx(0, DIM**-0.5, kv.length - 1, 3))
    mask = structured.mask(plan, range(first // 64, TOKENS // 64))
    assert (mask.first, mask.block) == (first // 64, 64)
    assert torch.equal(mask.active(TOKENS // 64), torch.cat(wanted, 2)[:, :, first // 64 :])
    assert not torch.equal(inner.mask(plan, range(first // 64, TOKENS // 64)).active(16), mask.active(16))


def test_a_run_names_methods_for_both_roles_or_one():
    options = parse_run("prefill=flexprefill:gamma=0.9;decode=quest:keep=0.1", 7)
    assert (describe(options.prefill), describe(options.decode), options.seed) == (
        "flexprefill:gamma=0.9",
        "quest:keep=0.1",
        7,
    )
    assert describe(parse_run("decode=signbits", 0).prefill) == "dense"


@pytest.mark.parametrize("text", ["quest", "decode=quest;decode=quest", "seed=3", "draft=streaming"])
def test_a_run_that_says_something_else_is_refused(text):
    with pytest.raises(ValueError, match="write prefill=SPEC;decode=SPEC"):
        parse_run(text, 0)
