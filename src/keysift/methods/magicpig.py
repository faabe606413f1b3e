"""Keys sampled by locality-sensitive hashing, with an unbiased estimate (MagicPIG)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from keysift.methods.base import DENSE_LAYERS, DecodeMethod, grown, option
from keysift.ops.codes import MAX_BITS, collision_log_probability, hash_codes, match_codes, projections
from keysift.ops.heads import group, per_query_head
from keysift.types import KV, Ctx, Selection

HASH_ROWS = 2048  # keys hashed at a time, which bounds the float products


class Shared(NamedTuple):
    """A tensor that all sequences share (no batch dimension)."""

    tensor: Tensor


class Index(NamedTuple):
    """Codes of the keys after centring.

    Attributes:
        codes: int16 ``[B, K, L, S]``, by buffer row; rows outside the middle are undefined.
        mean: what every key is centred with, ``[B, K, D]``.
        w: hash directions, ``[K, D, L * bits]``.
    """

    codes: Tensor
    mean: Tensor
    w: Shared


class CollisionLaw(NamedTuple):
    """Weight 1 / u: u the probability that a key with this angle to the query collides in at least two tables."""

    mean: Tensor
    bits: int
    tables: int
    floor: float

    def log_w(self, q_BHD: Tensor, k_BHRD: Tensor) -> Tensor:
        centred = k_BHRD - per_query_head(self.mean.float(), q_BHD.shape[1], 1)[:, :, None]
        cosine = torch.nn.functional.cosine_similarity(q_BHD.float()[:, :, None], centred, dim=-1)
        return -collision_log_probability(cosine, self.bits, self.tables, self.floor)


@dataclass(frozen=True, slots=True)
class Method(DecodeMethod):
    """MagicPIG: reads keys that share the query's code in at least two tables, weighted by 1 / probability."""

    paper: ClassVar[str] = "arXiv:2410.16179"

    dense_layers: tuple[int, ...] = option((0, 16, 32, 48, 64), DENSE_LAYERS, low=0)
    K: int = option(10, "bits a table; 0 means dense", low=0, high=MAX_BITS)
    L: int = option(150, "tables; (K, L) = (10, 150) reads about 2% of the keys, (8, 75) about 5%", low=2)
    mode: str = option(
        "default", "default, or seed: one hash for all layers, 1e-4 added to u", choices=("default", "seed")
    )

    @property
    def grows(self) -> bool:  # type: ignore[override]
        """The authors never hash generated tokens; the default does, once they leave the window."""
        return self.mode == "default"

    def build(self, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> Index | None:
        if self.K == 0:
            return None
        batch, rows, kv_heads, dim = kv.k.shape
        mean = self._mean(kv, prompt)
        hashes = (ctx.layer, kv_heads) if self.mode == "default" else (0, 1)
        w = projections(ctx.seed, *hashes, dim, self.K * self.L, kv.k.device)
        if self.mode == "seed":
            mean, w = mean.to(kv.k.dtype), w.to(kv.k.dtype)
        codes = torch.zeros(batch, kv_heads, self.L, rows, dtype=torch.int16, device=kv.k.device)
        return self.append(Index(codes, mean, Shared(w)), kv, kv.start, ctx)

    def append(self, index: Index | None, kv: KV, done: Tensor, ctx: Ctx) -> Index | None:
        if index is None:
            return None
        codes = grown(index.codes, 3, kv.k.shape[1])
        first, last = int(torch.maximum(done, kv.start).min()), int(kv.end.max())
        for lo in range(first, last, HASH_ROWS):
            rows = slice(lo, min(lo + HASH_ROWS, last))
            centred = kv.k[:, rows].transpose(1, 2) - index.mean[:, :, None].to(self._centring(kv))
            codes[..., rows] = hash_codes(centred, index.w.tensor, self.K).transpose(2, 3)
        return index._replace(codes=codes)

    def _mean(self, kv: KV, prompt: KV) -> Tensor:
        """Mean key to centre with: the authors' over the middle; ours over the prompt less its sinks (or all of it, if
        it has no more), which does not depend on when a sequence of a batch gets a middle."""
        if self.mode == "default":
            kv = prompt.between(prompt.start + torch.where(prompt.length > self.sinks, self.sinks, 0), prompt.end)
        outside = ~kv.contains()[..., None, None]
        return kv.k.float().masked_fill(outside, 0).sum(1) / kv.length.clamp(min=1)[:, None, None]

    def _centring(self, kv: KV) -> torch.dtype:
        return kv.k.dtype if self.mode == "seed" else torch.float32

    def select(self, q_BHD: Tensor, kv: KV, index: Index | None, ctx: Ctx) -> Selection | None:
        if index is None:
            return None
        q = group(q_BHD, kv.k.shape[2], 1)
        hits = match_codes(hash_codes(q, index.w.tensor, self.K).flatten(1, 2), index.codes[..., : kv.k.shape[1]])
        floor = 1e-4 if self.mode == "seed" else 0.0
        law = CollisionLaw(index.mean, self.K, self.L, floor)
        return Selection.of((hits >= 2) & kv.contains()[:, None], law)

    def scan_bytes(self, kv: KV, index: Index | None) -> int:
        """A code of every key and table, as they are stored."""
        if index is None:
            return 0
        return int(kv.length.sum()) * kv.k.shape[2] * self.L * index.codes.element_size()
