"""The highest scores and a uniform sample of the rest, as large as a promised accuracy needs (vAttention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.methods import signbits
from keysift.methods.base import DENSE_LAYERS, DecodeMethod, option
from keysift.methods.topk import all_keys_bytes, exact_scores
from keysift.ops.bounds import sample_size
from keysift.ops.key_codes import estimate, seed_state
from keysift.ops.random import _absorb
from keysift.ops.select import listed, top_k
from keysift.types import KV, Ctx, Index, Selection, Side, State

LEAST = 32  # keys of a first sample: fewer tell too little of a variance
BY = ("exact", "signbits")


@dataclass(frozen=True, slots=True)
class Method(DecodeMethod):
    """vAttention: reads the top keys, and so many of the others that the output is right to epsilon.

    A first sample, which the whole one contains, tells how many that must be (see ``ops.bounds.sample_size``). Each
    query head chooses by itself. The promise rests on a top that holds all keys that stand out: a first sample knows
    nothing of a few heavy keys that it missed.
    """

    paper: ClassVar[str] = "arXiv:2510.05688"

    dense_layers: tuple[int, ...] = option((0, 1), DENSE_LAYERS, low=0)
    epsilon: float = option(0.1, "relative error of a head's output that is promised", above=0)
    risk: float = option(0.1, "share of the outputs that may exceed it, the delta of the paper", above=0, high=0.5)
    top: float = option(0.02, "share of the middle keys, those with the highest scores, always read", low=0, high=1)
    base: float = option(0.02, "share of the other keys in the first sample", above=0, high=1)
    limit: float = option(0.5, "share of the other keys from which on all are read", above=0, high=1)
    by: str = option("exact", "what ranks keys: exact scores, by reading all keys first; or sign bits", choices=BY)
    bits: int = option(256, "bits a key, if those rank", choices=signbits.BITS)

    def covers(self, keys: int) -> bool:
        return keys <= 0 or self.top == 1

    def sides(self, dim: int, dtype: torch.dtype) -> dict[str, Side]:
        return signbits.sides(self.bits, dim) if self.by == "signbits" else {}

    def states(self, kv_heads: int, dim: int, capacity: int) -> dict[str, State]:
        return signbits.states(kv_heads, dim) if self.by == "signbits" else {}

    def constants(self, kv_heads: int, dim: int, device: torch.device, ctx: Ctx) -> dict[str, Tensor]:
        return signbits.constants(kv_heads, dim, device, ctx) if self.by == "signbits" else {}

    def begin(self, index: Index, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        if self.by == "signbits":
            signbits.begin(index, prompt, self.sinks, ctx)

    def extend(self, index: Index, kv: KV, done: Tensor, most: int, ctx: Ctx) -> None:
        if self.by == "signbits":
            signbits.extend(index, kv, self.bits, done, most)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        around = self._with_ends(kv)
        exact, middle = exact_scores(q_BHD, around, ctx.scale), kv.contains()[:, None]
        rank = self._by_bits(q_BHD, kv, index, ctx) if self.by == "signbits" else exact
        top = top_k(rank.masked_fill(~middle, -torch.inf), (self.top * kv.length).long()[:, None])
        rest = middle & ~top
        n = rest.sum(-1)
        u = self._uniform(rest, kv, ctx, ctx.first_head * (q_BHD.shape[1] // kv.k.shape[2]))
        first = (LEAST / n.clamp(min=1)).clamp(min=self.base)
        sure = (around.contains()[:, None] & ~middle) | top
        v = kv.unpaged().v.masked_fill(~around.contains()[..., None, None], 0)
        needed = sample_size(exact, v, sure, rest, rest & (u < first[..., None]), self.epsilon, self.risk)
        rate = torch.maximum(needed / n.clamp(min=1), first)
        rate = torch.where(rate < self.limit, rate, 2.0)
        taken = rest & (u < rate[..., None])
        log_w = torch.where(taken, -(taken.sum(-1) / n.clamp(min=1)).log()[..., None], 0.0)  # of the size it came to
        rows, count = listed(top | taken, kv.bound)
        return Selection(rows, count, log_w.gather(-1, rows.long()))

    def _with_ends(self, kv: KV) -> KV:
        """The middle, where it is not empty, with the sinks and the window around it."""
        some = kv.length > 0
        start = torch.where(some, (kv.start - self.sinks).maximum(kv.first), kv.start)
        end = torch.where(some, kv.end + self.window, kv.end)
        return kv._replace(start=start, length=end - start, spans=None, most=None)

    def _by_bits(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Tensor:
        """Scores that the sign bits estimate, fp32 ``[B, H, S]`` by row; anything outside of the middle."""
        planes = signbits.planes_of(self.bits, kv.k.shape[3])
        by_token = estimate(q_BHD, index["codes"], index["size"], kv, index["w"], planes, ctx.scale)
        row = torch.arange(kv.capacity, device=q_BHD.device)
        token = (row - kv.first[:, None]).clamp(0, max(0, by_token.shape[2] - 1))
        return by_token.gather(2, token[:, None].expand(-1, by_token.shape[1], -1)).float()

    def _uniform(self, of_row: Tensor, kv: KV, ctx: Ctx, first_head: int) -> Tensor:
        """``ops.random.uniform`` of seed, layer, head, position and token, ``[B, H, S]``; the host never waits."""
        head, row = (torch.arange(n, device=of_row.device) for n in of_row.shape[1:])
        token = (row - kv.first[:, None])[:, None]
        state = torch.tensor(seed_state(ctx.seed, ctx.layer))  # on the host, as a number
        for word in (first_head + head[:, None], ctx.positions[:, None, None], token):
            state = _absorb(state, word)
        return ((state >> 8).float() + 0.5) * 2.0**-24

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor:
        """What ranks the keys; what the first sample reads is part of the selection."""
        return signbits.scanned(kv, index) if self.by == "signbits" else all_keys_bytes(kv)
