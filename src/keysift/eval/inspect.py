"""What heads of a model attend to in a prompt, and what a prefill and a decode method keep of it; exact, for all rows.

Probes stand in for an attachment's methods: they pass every question on, so the model computes what it would without
them, and look at queries and keys as these come by. Maps are made at once, so that no layer's queries are kept.
Shape letters as in keysift.types.
"""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keysift.attention import LIST_BYTES
from keysift.hf.attach import DENSE, attach
from keysift.hf.cache import KVCache
from keysift.methods.base import BLOCKS
from keysift.ops.gather import gather_attention
from keysift.ops.heads import per_query_head
from keysift.ops.prune import prune
from keysift.ops.select import cover
from keysift.ops.vertical_slash import block_sum
from keysift.types import KV, Ctx, Index, Selection

SCORE_BYTES = 1 << 28  # scores and what is made of them exist for so many bytes at a time
SCORE_COPIES = 4  # the scores, their softmax, and two for padding and masking
MAP_BLOCKS = 128  # where no method says what a block is, it is the smallest with so few blocks, or the largest there is
ENOUGH = 0.95
MAX_HEADS = 64  # heads of one inspection: each is a row of the figure
DEFAULT_LAYERS, DEFAULT_HEADS = 4, 2


class PrefillView(NamedTuple):
    """One head of a prompt of T tokens, in blocks.

    Attributes:
        attention: share of a query block's attention that falls on each key block, mean over the block's rows, fp32
            ``[Q, C]``; rows sum to 1.
        kept: blocks that the method reads, bool ``[Q, C]``.
        tokens: T.
        block: tokens a block.
        dense: why the method reads everything; empty where it does not.
    """

    attention: Tensor
    kept: Tensor
    tokens: int
    block: int
    dense: str

    @property
    def rows(self) -> Tensor:
        """Query rows of each block, int64 ``[Q]``: the last block may be short."""
        start = torch.arange(self.attention.shape[0]) * self.block
        return (self.tokens - start).clamp(max=self.block)

    @property
    def density(self) -> float:
        """Share of the causal (query, key) pairs that are read."""
        return self._density(self.kept)

    @property
    def density_enough(self) -> float:
        """The same for the fewest blocks of each query block that hold ``ENOUGH`` of its attention: what a method that
        knew the attention would read."""
        return self._density(cover(self.attention, ENOUGH))

    def _density(self, blocks: Tensor) -> float:
        pairs = (self.rows[:, None] * self.block).expand(blocks.shape).tril(-1)
        pairs = pairs + torch.diag(self.rows * (self.rows + 1) // 2)
        return float((pairs * blocks).sum() / pairs.sum())

    @property
    def covered(self) -> Tensor:
        """Attention mass on the blocks read, mean over the rows of each query block, fp64 ``[Q]``."""
        mass = self.attention.double()
        return (mass * self.kept).sum(-1) / mass.sum(-1)  # exactly 1 where all is read, whatever was rounded

    @property
    def mass_covered(self) -> float:
        """The same over all query rows."""
        return float((self.covered * self.rows).sum() / self.tokens)

    @property
    def mass_covered_worst(self) -> float:
        return float(self.covered.min())


class StepFigures(NamedTuple):
    """One decode step of one head.

    Attributes:
        position: of the query.
        rows_read, rows_cached: keys read, of those cached, the query's own included.
        mass_covered: share of the true attention mass on the rows read.
        output_error: |output - dense| / |dense|.
        weighted: the method gives its rows importance weights, so that its output is an estimate of dense attention's.
        dense: all rows are read because the method chooses none here.
    """

    position: int
    rows_read: int
    rows_cached: int
    mass_covered: float
    output_error: float
    weighted: bool
    dense: bool


class StepView(NamedTuple):
    """The rows of one decode step: true softmax weights, fp32 ``[N]``; which are read, and which of them because they
    are sinks or in the window, bool ``[N]``."""

    weight: Tensor
    read: Tensor
    always: Tensor


@dataclass(eq=False)
class Head:
    """What was seen of one head: its prompt, the figures of all steps, and the rows of the last one."""

    layer: int
    head: int
    prefill: PrefillView | None = None
    steps: list[StepFigures] = field(default_factory=list)
    last_step: StepView | None = None


class Inspection(NamedTuple):
    heads: list[Head]
    token_ids: list[int]  # what the decode steps read, greedy
    prompt_tokens: int
    prefill: Any
    decode: Any | None


def attention_map(q_TD: Tensor, k_TD: Tensor, scale: float, block: int) -> Tensor:
    """Causal attention of one head pooled over blocks, fp32 ``[Q, C]``: see ``PrefillView.attention``."""
    tokens = q_TD.shape[0]
    blocks = -(-tokens // block)
    pooled = q_TD.new_zeros(blocks, blocks, dtype=torch.float32)
    k, column = k_TD.float(), torch.arange(tokens, device=q_TD.device)
    step = max(1, min(block, SCORE_BYTES // (4 * SCORE_COPIES * blocks * block)))
    for i in range(blocks):
        end = min((i + 1) * block, tokens)
        for lo in range(i * block, end, step):
            hi = min(lo + step, end)
            score = (q_TD[lo:hi].float() @ k[:hi].T).mul_(scale)
            weight = score.masked_fill_(column[:hi] > column[lo:hi, None], -torch.inf).softmax(-1)
            pooled[i, : -(-hi // block)] += block_sum(weight, block).sum(0)
        pooled[i] /= end - i * block
    return pooled


def kept_blocks(method: Any, plan: Any, heads: list[int], num_heads: int, tokens: int) -> Tensor:
    """The blocks that ``method`` reads for all query blocks of a prompt, bool ``[heads, Q, C]``."""
    blocks = -(-tokens // method.block)
    step = max(1, LIST_BYTES // (16 * num_heads * blocks))
    parts = [method.mask(plan, range(i, min(i + step, blocks))).active(blocks)[0] for i in range(0, blocks, step)]
    return torch.cat([part[heads].cpu() for part in parts], 1)


class PrefillProbe:
    """A prefill method that shows what it is asked; ``num_heads`` notes the query heads of every layer that asks."""

    dense_layers = ()

    def __init__(self, method: Any, wanted: dict[int, list[Head]]) -> None:
        self.method, self.wanted = method, wanted
        self.block = method.block
        self.num_heads: dict[int, int] = {}

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> Any | None:
        self.num_heads[ctx.layer] = q_BTHD.shape[2]
        exempt = ctx.layer in self.method.dense_layers
        plan = None if exempt else self.method.plan(q_BTHD, kv, ctx)
        if heads := self.wanted.get(ctx.layer):
            always = "dense" if self.method == DENSE else "dense layer" if exempt else ""
            self.look(heads, q_BTHD, kv.k, ctx.scale, plan, always or "the method reads all of this prompt")
        return plan

    def mask(self, plan: Any, blocks: range) -> Any:
        return self.method.mask(plan, blocks)

    def look(self, heads: list[Head], q_BTHD: Tensor, k_BTKD: Tensor, scale: float, plan: Any, why_all: str) -> None:
        """Make the heads' maps; all of the prompt is in ``q`` and ``k``, which hold one sequence."""
        tokens, num_heads = q_BTHD.shape[1:3]
        block = map_block(tokens) if self.method == DENSE else self.block
        blocks = -(-tokens // block)
        if plan is None:
            kept = torch.ones(len(heads), blocks, blocks, dtype=torch.bool).tril()
        else:
            kept = kept_blocks(self.method, plan, [head.head for head in heads], num_heads, tokens)
        for head, blocks_kept in zip(heads, kept, strict=True):
            k = k_BTKD[0, :, head.head // (num_heads // k_BTKD.shape[2])]
            pooled = attention_map(q_BTHD[0, :, head.head], k, scale, block)
            head.prefill = PrefillView(pooled.cpu(), blocks_kept, tokens, block, "" if plan is not None else why_all)


def map_block(tokens: int) -> int:
    """Tokens a block of a map that belongs to no method."""
    return next((block for block in BLOCKS if tokens <= block * MAP_BLOCKS), BLOCKS[-1])


EVER = 1 << 40  # keys: a method that covers so many reads all of them always


class DecodeProbe:
    """A decode method that shows what it is asked.

    It is asked in all layers, and says None (all rows) in those where the method is not to be asked.
    """

    dense_layers, dense_below = (), 0

    def __init__(self, method: Any, wanted: dict[int, list[Head]]) -> None:
        self.method, self.wanted = method, wanted
        self.sinks, self.window, self.tail, self.grows = method.sinks, method.window, method.tail, method.grows

    def exempt(self, ctx: Ctx) -> bool:
        return ctx.layer in self.method.dense_layers or self.method.covers(EVER)

    def __getattr__(self, name: str) -> Any:
        if name in ("sides", "states", "constants") and self.method.covers(EVER):
            return lambda *args: {}
        return getattr(self.method, name)

    def covers(self, keys: int) -> bool:
        return False  # it asks to see the query

    def begin(self, index: Index, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        if not self.exempt(ctx):
            self.method.begin(index, kv, prompt, tail_q_BTHD, ctx)

    def extend(self, index: Index, kv: KV, done: Tensor, most: int, ctx: Ctx) -> None:
        if not self.exempt(ctx):
            self.method.extend(index, kv, done, most, ctx)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection | None:
        few = kv.bound < (self.method.dense_below or 0)
        asked = not (self.exempt(ctx) or few or self.method.covers(int(kv.length.max())))
        selection = self.method.select(q_BHD, kv, index, ctx) if asked else None
        if heads := self.wanted.get(ctx.layer):
            look_at_step(heads, q_BHD, kv, self.pruned(selection, q_BHD, kv, ctx), ctx)
        return selection

    def pruned(self, selection: Selection | None, q_BHD: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        """What is left of a selection where the method's ``top_p`` drops rows, as ``attention.decode`` drops them."""
        if selection is None or self.method.top_p is None:
            return selection
        return prune(selection, q_BHD, kv, ctx.scale, self.method.top_p)


def look_at_step(heads: list[Head], q_BHD: Tensor, middle: KV, selection: Selection | None, ctx: Ctx) -> None:
    """Add to each head what it reads of the cache, which is that of one sequence without padding."""
    position = int(ctx.positions[0])
    cached = middle._replace(start=torch.zeros_like(middle.start), length=ctx.positions + 1, spans=None)
    always = cached.contains() & ~middle.contains()
    out = None if selection is None else gather_attention(q_BHD, cached, selection, ctx.scale, middle).out[0, 0]
    for head in heads:
        key_head = head.head // (q_BHD.shape[1] // cached.k.shape[2])
        k, v = (x[0, : position + 1, key_head].float() for x in (cached.k, cached.v))
        weight = (k @ q_BHD[0, head.head].float() * ctx.scale).softmax(-1)
        read, fixed = torch.ones_like(weight, dtype=torch.bool), torch.zeros_like(weight, dtype=torch.bool)
        covered, error, weighted = 1.0, 0.0, False
        if selection is not None and out is not None:
            fixed = always[0, : position + 1]
            read = fixed | chosen_rows(selection, head.head, q_BHD.shape[1], position + 1)
            dense_out = weight @ v
            covered = float(weight.double()[read].sum() / weight.double().sum())
            error = float((out[head.head] - dense_out).norm() / dense_out.norm().clamp(min=1e-30))
            weighted = selection.log_w is not None
        head.steps.append(
            StepFigures(position, int(read.sum()), position + 1, covered, error, weighted, selection is None)
        )
        head.last_step = StepView(weight.cpu(), read.cpu(), fixed.cpu())


def chosen_rows(selection: Selection, head: int, num_heads: int, cached: int) -> Tensor:
    """The rows that a query head reads by selection, bool ``[cached]``."""
    rows, used = (per_query_head(x, num_heads, 1)[0, head] for x in (selection.rows, selection.in_use()))
    return torch.zeros(cached, dtype=torch.bool, device=rows.device).index_fill_(0, rows[used].long(), True)


class Layout(NamedTuple):
    """Layers of a model, and the query heads of those that methods serve; the others have a window of their own."""

    num_layers: int
    heads: dict[int, int]

    @property
    def unserved(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if layer not in self.heads]


@torch.no_grad()
def layout(model: Any) -> Layout:
    """Which layers methods serve: one token is read to see which ask."""
    with attach(model) as link:
        link.prefill = probe = PrefillProbe(DENSE, {})
        with link.reading("sparse"):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return Layout(model.config.get_text_config().num_hidden_layers, dict(sorted(probe.num_heads.items())))


def choose(
    there: Layout, layers: Iterable[int] | str | None, heads: Iterable[int] | str | None
) -> dict[int, list[int]]:
    """Query heads by layer: those asked for ("all" for every one), or, for None, a few spread over depth and heads.

    Layers that no method serves are left out.

    Raises:
        ValueError: a layer or head that there is not, nothing left, or too many for one figure.
    """
    last = there.num_layers - 1
    served = list(there.heads)
    if not served:
        raise ValueError("every layer of this model has an attention window of its own: no method serves one")
    if layers is None:
        wanted = spread(served, DEFAULT_LAYERS)
    else:
        wanted = served if isinstance(layers, str) else list(dict.fromkeys(layers))
        if outside := [layer for layer in wanted if not 0 <= layer <= last]:
            raise ValueError(f"layer {outside[0]}: the model has layers 0 to {last}")
        if not set(wanted) & set(served):
            raise ValueError(f"{_layers(wanted)}: a window of their own, so no method; choose from {_layers(served)}")
    chosen = {layer: _heads_of(layer, there.heads[layer], heads) for layer in wanted if layer in there.heads}
    if (count := sum(map(len, chosen.values()))) > MAX_HEADS:
        raise ValueError(f"{count} heads of {len(chosen)} layers are too many: name at most {MAX_HEADS} in all")
    return chosen


def _heads_of(layer: int, count: int, heads: Iterable[int] | str | None) -> list[int]:
    if heads is None:
        return spread(range(count), DEFAULT_HEADS)
    wanted = list(range(count)) if isinstance(heads, str) else list(dict.fromkeys(heads))
    if outside := [head for head in wanted if not 0 <= head < count]:
        raise ValueError(f"head {outside[0]}: layer {layer} has query heads 0 to {count - 1}")
    return wanted


def spread(among: Iterable[int], count: int) -> list[int]:
    """``count`` of the values, first and last included, evenly apart; all where there are fewer."""
    values = list(among)
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _layers(layers: Iterable[int]) -> str:
    return "layers " + ", ".join(map(str, layers))


@torch.no_grad()
def inspect(
    model: Any,
    input_ids: Tensor,
    chosen: dict[int, list[int]],
    prefill: Any = "dense",
    decode: Any | None = None,
    *,
    steps: int = 1,
    seed: int = 0,
    on_prompt_read: Callable[[], None] = lambda: None,
) -> Inspection:
    """Read a prompt with ``prefill``, then take ``steps`` greedy steps with ``decode``, and look at the chosen heads.

    Args:
        model: what ``attach`` serves.
        input_ids: the prompt, int64 ``[1, T]``.
        chosen: query heads by layer, from ``choose``.
        prefill, decode: SPECs or methods; without ``decode`` there are no steps.
        steps: decode steps; an end token does not end them.
        seed: of the methods' draws.
        on_prompt_read: called when the prompt is read.
    """
    if input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: pass one prompt of at least one token")
    wanted = {layer: [Head(layer, head) for head in heads] for layer, heads in chosen.items()}
    token_ids: list[int] = []
    cache = KVCache(model.config)
    with attach(model, prefill, decode or "dense", seed=seed) as link:
        methods = link.prefill, None if decode is None else link.decode
        link.prefill = PrefillProbe(link.prefill, wanted)
        if decode is not None:
            link.decode = DecodeProbe(link.decode, wanted)
        with link.reading("sparse"):
            token = newest_token(model, input_ids, cache)
        on_prompt_read()
        for _ in range(steps if decode is not None else 0):
            token_ids.append(int(token))
            with link.reading("decode"):
                token = newest_token(model, token, cache)
    return Inspection([head for heads in wanted.values() for head in heads], token_ids, input_ids.shape[1], *methods)


def newest_token(model: Any, input_ids: Tensor, cache: KVCache) -> Tensor:
    """The likeliest next token, int64 ``[1, 1]``, without logits of the others where the model can do without."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in signatures.signature(model.forward).parameters else {}
    logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **few).logits
    return logits[:, -1:].argmax(-1)
