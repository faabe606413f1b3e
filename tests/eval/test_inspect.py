"""What is shown of a head, against transformers' own eager attention, brute force, and what an unwatched run reads."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import keysift
from keysift import pocket
from keysift.checkpoint import load
from keysift.eval import inspect as module
from keysift.eval.inspect import Inspection, attention_map, choose, inspect, layout, spread
from keysift.meter import Meter
from keysift.methods import catalog, roles
from keysift.ops.heads import per_query_head

from ..tiny_models import build, prompt, tiny

LENGTHS = (1, 63, 130, 257)
STREAMING = "streaming:sinks=16,window=32,block=16"


def ids(tokens: int) -> torch.Tensor:
    return prompt(tokens)["input_ids"]


@functools.cache
def with_group(group: int):
    return build("Llama", num_key_value_heads=4 // group)


@functools.cache
def pocket_model():
    return load(str(pocket.path()), torch.device("cpu"), torch.float32)


def pocket_ids(tokens: int) -> torch.Tensor:
    text = (pocket.path() / "demo.txt").read_text(encoding="utf-8")[: 8 * tokens]
    return pocket_model()[1](text, return_tensors="pt")["input_ids"][:, :tokens]


def everything(model) -> dict[int, list[int]]:
    return choose(layout(model), "all", "all")


@torch.no_grad()
def eager(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Attention weights as transformers computes them, ``[H, T, T]`` for each layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return [layer[0] for layer in model(tokens, output_attentions=True).attentions]
    finally:
        model.set_attn_implementation(before)


def greedy(model, tokens: torch.Tensor, steps: int) -> list[int]:
    arguments = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **arguments)[0, tokens.shape[1] :].tolist()


class Ledger(Meter):
    """A meter that keeps what an unwatched run read."""

    def __init__(self) -> None:
        super().__init__(measure_error=True)
        self.masks, self.steps = [], []

    def add_mask(self, mask, tokens, heads, batch) -> None:
        self.masks.append(mask)
        super().add_mask(mask, tokens, heads, batch)

    def add_step(self, kv, heads, layer, middle, selection, scanned) -> None:
        sets = None
        if selection is not None:
            outside = set((kv.contains() & ~middle.contains())[0].nonzero()[:, 0].tolist())
            rows, used = (per_query_head(x, heads, 1)[0] for x in (selection.rows, selection.in_use()))
            sets = [[outside, set(rows[h][used[h]].tolist())] for h in range(heads)]
        self.steps.append((layer, int(kv.length[0]), sets))
        super().add_step(kv, heads, layer, middle, selection, scanned)


def unwatched(model, tokens: torch.Tensor, steps: int, prefill: str, decode: str, seed: int = 0):
    """Tokens of a run without probes, and its ledger."""
    with keysift.attach(model, prefill, decode, seed=seed) as link:
        link.meter = ledger = Ledger()
        return greedy(model, tokens, steps + 1), ledger


def pairs_of_fewest(row: torch.Tensor, causal: torch.Tensor, block_of: torch.Tensor) -> int:
    """Causal pairs of the fewest blocks that hold 95% of a row of blocks."""
    taken: list[int] = []
    for block in row.argsort(descending=True).tolist():
        if float(row[taken].sum()) < 0.95:
            taken.append(block)
    return int(causal[:, torch.isin(block_of, torch.tensor(taken))].sum())


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_maps_and_figures_equal_brute_force_over_all_pairs(tokens: int, group: int) -> None:
    model = with_group(group)
    seen = inspect(model, ids(tokens), everything(model), STREAMING)
    block_of = torch.arange(tokens) // 16
    blocks = int(block_of[-1]) + 1
    position = torch.arange(tokens)
    causal = position <= position[:, None]
    near = (position[:, None] - position < 32) & causal
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    for q, k in (near | (causal & (position < 16))).nonzero().tolist():
        kept[block_of[q], block_of[k]] = True
    if tokens <= 48:
        kept = torch.ones(blocks, blocks).tril().bool()
    read = kept[block_of][:, block_of] & causal
    # sparse prefill changes what deeper layers see, so only the first one's attention is transformers' own
    weights = eager(model, ids(tokens))[0].double()
    for head in [head for head in seen.heads if head.layer == 0]:
        view, weight = head.prefill, weights[head.head]
        onto = torch.nn.functional.one_hot(block_of, blocks).double()
        pooled = onto.T @ (weight @ onto) / onto.sum(0)[:, None]
        covered = (weight * read).sum(-1)
        assert (view.attention - pooled).abs().max() < 1e-5
        assert torch.equal(view.kept, kept)
        assert view.density == pytest.approx(float(read.sum() / causal.sum()))
        assert view.mass_covered == pytest.approx(float(covered.mean()), abs=1e-5)
        worst = min(float(covered[block_of == i].mean()) for i in range(blocks))
        assert view.mass_covered_worst == pytest.approx(worst, abs=1e-5)
        assert (view.mass_covered < 0.99) == (tokens > 63)
        fewest = sum(pairs_of_fewest(pooled[i], causal[block_of == i], block_of) for i in range(blocks))
        assert view.density_enough == pytest.approx(fewest / float(causal.sum()))


def test_every_layer_of_a_dense_prompt_has_transformers_attention() -> None:
    model = tiny("qwen3")
    seen = inspect(model, ids(130), everything(model))
    weights = eager(model, ids(130))
    assert [(h.layer, h.head) for h in seen.heads] == [(layer, head) for layer in range(3) for head in range(4)]
    for head in seen.heads:
        view = head.prefill
        pooled = module.block_sum(weights[head.layer][head.head], view.block)
        rows = [part.mean(0) for part in pooled.split(view.block)]
        assert (view.attention - torch.stack(rows)).abs().max() < 1e-5
        assert (view.block, view.dense, view.density, view.mass_covered_worst) == (16, "dense", 1.0, 1.0)


@pytest.mark.parametrize(
    "prefill",
    [
        "flexprefill:gamma=0.5,min_budget=16,block=16",
        "minference:vertical=32,slash=48,block=16",
        "xattention:threshold=0.5,block=16,dense_layers=1",
        STREAMING,
    ],
)
def test_kept_blocks_are_those_that_an_unwatched_run_reads(prefill: str) -> None:
    model = tiny("qwen3")
    seen = inspect(model, ids(257), everything(model), prefill)
    _, ledger = unwatched(model, ids(257), 0, prefill, "dense")
    masks = iter(ledger.masks)
    exempt = (1,) if "dense_layers=1" in prefill else ()
    active = {layer: next(masks).active(17)[0] for layer in range(3) if layer not in exempt}
    for head in seen.heads:
        if head.layer in exempt:
            assert (head.prefill.dense, head.prefill.density) == ("dense layer", 1.0)
        else:
            assert torch.equal(head.prefill.kept, active[head.layer][head.head])
            assert head.prefill.density < 1
    mean = sum(head.prefill.density for head in seen.heads) / len(seen.heads)
    assert mean == pytest.approx(ledger.stats().density)


def test_scores_stay_within_their_bound_and_do_not_change_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (torch.randn(600, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    whole = attention_map(q, k, 0.25, 128)
    monkeypatch.setattr(module, "SCORE_BYTES", 1 << 18)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    with Largest() as largest:
        chunked = attention_map(q, k, 0.25, 128)
    assert largest.elements * 4 * module.SCORE_COPIES <= 1 << 18
    assert (whole - chunked).abs().max() < 1e-6
    assert (whole.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("prefill", ["flexprefill:gamma=1", "streaming:window=300", "streaming:sinks=16,window=100"])
def test_a_full_prefill_budget_covers_everything(prefill: str) -> None:
    model = tiny("qwen3")
    for head in inspect(model, ids(130), {1: [0, 3]}, prefill).heads:  # two blocks, which the last method names
        assert bool(head.prefill.dense) == ("window=100" not in prefill)
        assert (head.prefill.density, head.prefill.mass_covered, head.prefill.mass_covered_worst) == (1, 1, 1)


@pytest.mark.parametrize("decode", ["dense", "topk:keep=1", "magicpig:K=0"])
def test_a_full_decode_budget_reads_everything_without_error(decode: str) -> None:
    model = tiny("qwen3")
    seen = inspect(model, ids(130), everything(model), decode=decode, steps=2)
    for head in seen.heads:
        assert [step.rows_read for step in head.steps] == [131, 132] == [step.rows_cached for step in head.steps]
        assert {(step.mass_covered, step.output_error, step.dense) for step in head.steps} == {(1.0, 0.0, True)}
        assert bool(head.last_step.read.all())


DECODES = [
    "streaming:sinks=3,window=20",
    "topk:budget=30,sinks=2,window=9,dense_layers=none",
    "oracle:keep=0.2,sinks=0,window=9,dense_layers=0",
    "quest:budget=40,sinks=2,window=9",
    "snapkv:budget=40,sinks=2,window=9",
    "magicpig:K=4,L=8,sinks=0,window=9,dense_layers=1",
    "topk:keep=0.5,sinks=2,window=9,top_p=0.6,dense_layers=none",
    "quest:keep=0.5,page=4,sinks=2,window=9,top_p=0.6,dense_layers=none",
    "topk:budget=30,sinks=2,window=9,dense_below=132,dense_layers=none",
]


@pytest.mark.parametrize("decode", DECODES)
def test_rows_read_and_errors_are_those_of_an_unwatched_run(decode: str) -> None:
    model, steps = tiny("qwen3"), 3
    seen = inspect(model, ids(130), everything(model), STREAMING, decode, steps=steps, seed=5)
    tokens, ledger = unwatched(model, ids(130), steps, STREAMING, decode, seed=5)
    assert seen.token_ids == tokens[:steps]
    assert len(ledger.steps) == 3 * steps
    for (layer, cached, sets), errors, at in zip(ledger.steps, ledger.errors["decode"], range(3 * steps), strict=True):
        for head in [head for head in seen.heads if head.layer == layer]:
            step = head.steps[at // 3]
            assert (step.rows_cached, step.position, step.dense) == (cached, cached - 1, sets is None)
            assert step.output_error == pytest.approx(float(errors[head.head]), abs=1e-5)
            exact, chosen = sets[head.head] if sets else (set(), set(range(cached)))
            assert step.rows_read == len(exact) + len(chosen)
            if at // 3 == steps - 1:
                assert set(head.last_step.read.nonzero()[:, 0].tolist()) == exact | chosen
                assert set(head.last_step.always.nonzero()[:, 0].tolist()) == exact
    figures = [head.steps[-1] for head in seen.heads if not head.steps[-1].dense]
    assert figures and all(0 < step.mass_covered < 1 and step.output_error > 0 for step in figures)
    assert {step.weighted for step in figures} == {decode.startswith(("magicpig", "oracle"))}


@pytest.mark.parametrize("name", ["qwen3", "glm-4-9b"])
def test_true_weights_are_transformers_and_their_read_share_is_the_mass_covered(name: str) -> None:
    model, tokens = tiny(name), ids(63)
    seen = inspect(model, tokens, everything(model), decode="topk:budget=20,sinks=2,window=5,dense_layers=none")
    weights = eager(model, torch.cat([tokens, torch.tensor([seen.token_ids])], 1))
    for head in [head for head in seen.heads if head.layer == 0]:  # deeper layers see what the first one read
        last, expected = head.last_step, weights[0][head.head, -1]
        assert float(last.weight.sum()) == pytest.approx(1, abs=1e-5)
        assert (last.weight - expected).abs().max() < 1e-5
        middle = expected[2:-5].topk(13).indices + 2
        rows = torch.cat([torch.tensor([0, 1, 59, 60, 61, 62, 63]), middle]).sort().values
        assert last.read.nonzero()[:, 0].tolist() == rows.tolist()
        assert head.steps[0].mass_covered == pytest.approx(float(expected[rows].sum()), abs=1e-5)


@pytest.mark.parametrize(
    ("decode", "all_read"),  # steps, after a prompt of 60 tokens, in which the last layer reads everything
    [
        ("topk:budget=70", 10),  # sinks and window are 68 keys, and the budget is all of a middle of two
        ("magicpig:K=4,L=8", 8),
        ("snapkv:budget=40", 0),
        ("snapkv:window=65,budget=70", 14),  # chooses from the prompt only, which its window covers
    ],
)
def test_methods_are_watched_before_and_after_they_have_a_middle(decode: str, all_read: int) -> None:
    model, steps = tiny("qwen3"), 14
    seen = inspect(model, ids(60), everything(model), decode=decode, steps=steps)
    tokens, ledger = unwatched(model, ids(60), steps, "dense", decode)
    assert seen.token_ids == tokens[:steps]
    dense = {layer: [sets is None for at, _, sets in ledger.steps if at == layer] for layer in range(3)}
    for head in seen.heads:
        assert [step.dense for step in head.steps] == dense[head.layer]
    assert dense[2] == [True] * all_read + [False] * (steps - all_read)


def test_a_prompt_of_one_token_is_watched_from_the_first_step() -> None:
    seen = inspect(tiny("qwen3"), ids(1), {2: [1]}, STREAMING, "topk", steps=7)
    assert seen.heads[0].prefill.attention.tolist() == [[1.0]]
    assert [step.rows_read for step in seen.heads[0].steps] == list(range(2, 9))


@pytest.mark.parametrize("name", [name for name, cls in catalog().items() if "prefill" in roles(cls)])
def test_every_prefill_method_goes_through(name: str) -> None:
    lm, tokens = pocket_model()[0], pocket_ids(400)
    options = {"minference": ":vertical=128,slash=128", "streaming": ":window=128", "flexprefill": ":min_budget=128"}
    seen = inspect(lm, tokens, {0: [0, 3], 7: [1]}, name + options.get(name, ""), "dense")
    assert seen.token_ids == unwatched(lm, tokens, 1, name + options.get(name, ""), "dense")[0][:1]
    for head in seen.heads:
        view = head.prefill
        assert (view.attention.sum(-1) - 1).abs().max() < 1e-4
        assert 0 < view.mass_covered_worst <= view.mass_covered <= 1
        assert view.kept.diagonal().all()


@pytest.mark.parametrize("name", [name for name, cls in catalog().items() if "decode" in roles(cls)])
def test_every_decode_method_goes_through(name: str) -> None:
    lm, tokens = pocket_model()[0], pocket_ids(400)
    options = {"streaming": ":window=128", "snapkv": ":budget=128", "verified": ":epsilon=0.5"}
    seen = inspect(lm, tokens, {0: [0], 7: [1, 2]}, "dense", name + options.get(name, ""), steps=3)
    assert seen.token_ids == unwatched(lm, tokens, 3, "dense", name + options.get(name, ""))[0][:3]
    for head in seen.heads[1:]:
        step = head.steps[-1]
        assert (step.rows_cached, step.dense) == (403, name == "dense")
        assert (step.rows_read < 403) == (name != "dense")
        assert float(head.last_step.weight[head.last_step.read].sum()) == pytest.approx(step.mass_covered, abs=1e-5)


def test_layers_with_a_window_of_their_own_are_left_out() -> None:
    mixed = layout(tiny("gemma3"))
    assert (mixed.num_layers, mixed.heads, mixed.unserved) == (3, {1: 4}, [0, 2])
    assert choose(mixed, "all", [2]) == choose(mixed, [0, 1], [2]) == {1: [2]}
    with pytest.raises(ValueError, match=r"layers 0, 2: a window of their own.*layers 1"):
        choose(mixed, [0, 2], None)
    with pytest.raises(ValueError, match="every layer of this model has an attention window"):
        choose(layout(tiny("mistral-sliding-window")), None, None)
    seen = inspect(tiny("gemma3"), ids(130), {1: [2]}, STREAMING, "topk:budget=30,sinks=2,window=9,dense_layers=none")
    assert seen.heads[0].steps[0].rows_read == 30


def test_choice_of_layers_and_heads() -> None:
    there = module.Layout(8, dict.fromkeys(range(8), 16))
    assert choose(there, None, None) == {layer: [0, 15] for layer in (0, 2, 5, 7)}
    assert choose(there, [3, 0, 3], [1, 1]) == {3: [1], 0: [1]}
    assert choose(there, [5], "all") == {5: list(range(16))}
    for layers, heads, words in (
        ([8], None, "layer 8: the model has layers 0 to 7"),
        ([-1], None, "layer -1"),
        ([0], [16], "head 16: layer 0 has query heads 0 to 15"),
        ("all", "all", "128 heads of 8 layers are too many: name at most 64"),
    ):
        with pytest.raises(ValueError, match=words):
            choose(there, layers, heads)
    assert [spread(range(n), 3) for n in (1, 3, 4, 9)] == [[0], [0, 1, 2], [0, 2, 3], [0, 4, 8]]


def test_the_model_is_given_back_as_it_was() -> None:
    model = tiny("qwen3")
    before = model(ids(63)).logits
    inspect(model, ids(63), everything(model), STREAMING, "topk:budget=30,sinks=2,window=9")
    with pytest.raises(ValueError, match="one prompt"):
        inspect(model, ids(63).repeat(2, 1), {0: [0]})
    with pytest.raises(ValueError, match="unknown"):
        inspect(model, ids(63), {0: [0]}, "no-such-method")
    assert "_keysift" not in vars(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids(63)).logits, before)


def test_decode_is_left_out_where_there_is_no_method() -> None:
    seen = inspect(tiny("qwen3"), ids(63), {0: [0]}, steps=3)
    assert isinstance(seen, Inspection)
    assert (seen.token_ids, seen.decode, seen.heads[0].steps, seen.heads[0].last_step) == ([], None, [], None)
