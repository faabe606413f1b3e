"""Keys sampled by locality-sensitive hashing, with an unbiased estimate (MagicPIG)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.methods.base import DENSE_LAYERS, DecodeMethod, centring, check, option
from keysift.ops.buckets_cpu import Buckets, bucket_collisions, columns_of, update_buckets
from keysift.ops.codes import (
    MAX_BITS,
    UNIT,
    WORDS,
    collision_table,
    collisions,
    directions,
    hash_planes,
    hash_query,
    mean_key,
    projections,
    thresholds,
)
from keysift.ops.lists import on_cpu
from keysift.ops.pool import WORD, words_of
from keysift.types import KV, Ctx, Index, Law, Selection, Side, State

KEPT = {  # share of the keys that the authors' settings of K and L read
    (10, 150): 0.02,
    (10, 170): 0.025,
    (10, 200): 0.03,
    (9, 120): 0.04,
    (8, 75): 0.05,
    (10, 300): 0.06,
    (7, 75): 0.14,
}
MATCH = ("bits", "tables")
LAYERS = 128  # whose directions are remembered from one run to the next


@functools.lru_cache(maxsize=LAYERS)
def _directions(
    seed: int, layer: int, kv_heads: int, dim: int, bits: int, count: int, device: torch.device, first_head: int
) -> Tensor:
    with torch.inference_mode(False):
        return directions(projections(seed, layer, kv_heads, dim, bits * count, device, first_head), bits)


@dataclass(frozen=True, slots=True)
class Method(DecodeMethod):
    """MagicPIG: reads keys that share the query's code in at least two tables, weighted by 1 / probability."""

    paper: ClassVar[str] = "arXiv:2410.16179"
    reads_sides_alone: ClassVar[bool] = True

    dense_layers: tuple[int, ...] = option((0, 16, 32, 48, 64), DENSE_LAYERS, low=0)
    K: int = option(10, "bits a table; 0 means dense", low=0, high=MAX_BITS)
    L: int = option(150, "tables; (K, L) = (10, 150) reads about 2% of the keys, (8, 75) about 5%", low=2)
    keep: float | None = option(
        None, "share of the keys to read, by the nearest of the authors' settings, instead of K and L", above=0, high=1
    )
    pool: int | None = option(
        512,
        "bits that the tables draw theirs from, a multiple of 32; none, and mode=seed, give each table bits of its own,"
        " and so does a pool of K * L bits or more, or of less than 8/5 L",
        low=WORD,
    )
    match: str = option(
        "bits",
        "bits of all keys or, on a CPU, tables of keys by code: faster, for 2 L bytes a key",
        choices=MATCH,
    )
    mode: str = option(
        "default", "default, or seed: one hash for all layers, 1e-4 added to u", choices=("default", "seed")
    )

    def __post_init__(self) -> None:
        check(self)
        if self.keep is not None and (self.K, self.L) != (10, 150):
            raise ValueError(f"keep={self.keep} and K={self.K},L={self.L}: give keep, or K and L")
        if self.pool is not None and self.pool % WORD:
            raise ValueError(f"pool={self.pool}: must be a multiple of {WORD}")

    @property
    def hashes(self) -> tuple[int, int]:
        """Bits a table, and tables."""
        if self.keep is None:
            return self.K, self.L
        share = self.keep
        return min(KEPT, key=lambda setting: abs(KEPT[setting] - share))

    @property
    def pooled(self) -> int | None:
        """Bits of the pool, where there is one."""
        bits, tables = self.hashes
        if self.pool is None or self.mode == "seed" or self.pool >= bits * tables:
            return None
        return self.pool if words_of(tables, self.pool) else None

    @property
    def codes(self) -> tuple[int, int]:
        """Bits of a code, and codes: those of the tables, or the words of the pool."""
        pool = self.pooled
        return self.hashes if pool is None else (WORD, pool // WORD)

    @property
    def grows(self) -> bool:  # type: ignore[override]
        """The authors never hash generated tokens; the default does, once they leave the window."""
        return self.mode == "default"

    def covers(self, keys: int) -> bool:
        return self.K == 0 or keys <= 0

    def sides(self, dim: int, dtype: torch.dtype) -> dict[str, Side]:
        """The codes, in bit planes."""
        bits, count = self.codes
        return {"planes": Side(UNIT, (bits * count, WORDS), torch.int32)}

    def states(self, kv_heads: int, dim: int, capacity: int) -> dict[str, State]:
        """The mean key, what it hashes to, and the tables if there are any."""
        bits, count = self.codes
        states = {
            "mean": State((kv_heads, dim), torch.float32),
            "threshold": State((kv_heads, bits * count), torch.float32),
        }
        return states | (Buckets.states(kv_heads, *self.hashes, capacity) if self.match == "tables" else {})

    def constants(self, kv_heads: int, dim: int, device: torch.device, ctx: Ctx) -> dict[str, Tensor]:
        """Directions of the layer's hashes, and the weights of keys by their angle to the query.

        Raises:
            ValueError: tables for keys that are not on a CPU.
        """
        if self.match == "tables" and device.type != "cpu":
            raise ValueError(f"match=tables: side data are on {device.type}; use match=bits, or select_device=cpu")
        layer, heads, first = (ctx.layer, kv_heads, ctx.first_head) if self.mode == "default" else (0, 1, 0)
        law = collision_table(*self.hashes, floor=0.0 if self.mode == "default" else 1e-4, pool=self.pooled)
        constants = {"w": _directions(ctx.seed, layer, heads, dim, *self.codes, device, first), "law": law.to(device)}
        return constants | ({"columns": columns_of(*self.hashes, self.pooled)} if self.match == "tables" else {})

    def begin(self, index: Index, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        """Fix the mean key to centre with: the authors' over the middle; ours over the prompt less its sinks (or all
        of it, if it has no more), which does not depend on when a sequence of a batch gets a middle."""
        if self.mode == "default":
            kv = centring(prompt, self.sinks, ctx)
        mean = mean_key(kv)
        index["mean"].copy_(mean if self.mode == "default" else mean.to(kv.k.dtype))
        index["threshold"].copy_(thresholds(index["mean"], index["w"]))
        if self.match == "tables":
            index["built"].zero_()

    def extend(self, index: Index, kv: KV, done: Tensor, most: int, ctx: Ctx) -> None:
        threshold = index["threshold"] if self.mode == "default" else None
        hash_planes(index["planes"], kv, index["mean"], threshold, index["w"], done, most)
        if self.match == "tables" and on_cpu(index["planes"]):
            update_buckets(Buckets.of(index), index["planes"], kv, index["columns"], done)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        codes = hash_query(q_BHD, index["w"], self.codes[0])
        law = Law(index["mean"], index["law"])
        if self.match == "tables" and on_cpu(index["planes"]):
            tables = Buckets.of(index), index["columns"], index["planes"]
            return bucket_collisions(codes, *tables, kv, law, self.pooled is not None)
        bits, count = self.hashes
        return collisions(codes, index["planes"], kv, bits, law, None if self.pooled is None else count)

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor:
        """The bits of every key, as they are stored; of tables, the keys that have the query's codes if all codes are
        as frequent."""
        _, kv_heads, _, columns, _ = index["planes"].shape
        bits = kv_heads * columns
        if self.match == "bits":
            return kv.length * bits // 8
        later = (kv.end - torch.maximum(kv.start, index["built"])).clamp(min=0)
        width, tables = self.hashes
        return (later * bits // 8) + ((kv.length - later) * (heads * tables * 2) >> width)
