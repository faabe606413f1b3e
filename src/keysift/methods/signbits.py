"""Keys sampled by codes of a few bits a coordinate, which tell how likely each key is to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.methods.base import BudgetedDecode, centring, option
from keysift.ops.codes import mean_key
from keysift.ops.key_codes import PER, STEPS, code_bytes, code_dim, hash_keys, room, rotation, sample
from keysift.types import KV, Ctx, Index, Selection, Side, State

BITS = (64, 128, 256, 512)
DRAWS = ("systematic", "independent")
USUAL = 256  # bits, where none are given: sampling by them errs little more than by the exact weights


def planes_of(bits: int | None, dim: int) -> int:
    """Bits a coordinate.

    Raises:
        ValueError: where they are not 1, 2, 4 or 8.
    """
    width = code_dim(dim)
    if bits is None:
        return max(2, min(4, USUAL // width))
    if bits % width or bits // width not in STEPS:
        able = [str(n) for n in BITS if n % width == 0 and n // width in STEPS]
        raise ValueError(f"bits={bits}: keys of head dim {dim} can have {' or '.join(able) or 'the default only'}")
    return bits // width


def sides(bits: int | None, dim: int) -> dict[str, Side]:
    """Code and size of every key."""
    width = code_bytes(dim, planes_of(bits, dim))
    return {"codes": Side(1, (width,), torch.uint8), "size": Side(1, (), torch.float16)}


def states(kv_heads: int, dim: int) -> dict[str, State]:
    """The mean key."""
    return {"mean": State((kv_heads, dim), torch.float32)}


def constants(kv_heads: int, dim: int, device: torch.device, ctx: Ctx) -> dict[str, Tensor]:
    """The rotations of a layer's heads."""
    return {"w": rotation(ctx.seed, ctx.layer, kv_heads, dim, device, ctx.first_head)}


def begin(index: Index, prompt: KV, sinks: int, ctx: Ctx) -> None:
    """Fix what keys are centred with."""
    index["mean"].copy_(mean_key(centring(prompt, sinks, ctx)))


def extend(index: Index, kv: KV, bits: int | None, done: Tensor, most: int) -> None:
    """Codes of new keys."""
    planes = planes_of(bits, kv.k.shape[3])
    hash_keys(index["codes"], index["size"], kv, index["mean"], index["w"], planes, done, most)


def scanned(kv: KV, index: Index) -> Tensor:
    """Bytes of the codes and sizes of a middle, ``[B]``."""
    kept = (index[name] for name in ("codes", "size"))
    return kv.length * sum(x[0, :, 0].numel() * x.element_size() for x in kept)


@dataclass(frozen=True, slots=True)
class Method(BudgetedDecode):
    """Bits: reads each key with a probability by its score, which its bits estimate, weighted by 1 / that.

    As in MagicPIG the estimate is unbiased, whatever the bits are wrong about; unlike in MagicPIG the budget is free,
    a key costs a few bytes, and its score follows q.k as closely as those allow.
    """

    paper: ClassVar[str] = "arXiv:2410.16179"
    reads_sides_alone: ClassVar[bool] = True

    bits: int | None = option(None, "bits a key; none: 256, but two to four a coordinate", choices=BITS)
    per: str = option("kv_head", "whose heads choose rows: all that share keys together, or each its own", choices=PER)
    draws: str = option("systematic", "systematic in blocks of 256 tokens, or independent", choices=DRAWS)

    def lists(self, group: int) -> int:
        return group if self.per == "query_head" else 1

    def sides(self, dim: int, dtype: torch.dtype) -> dict[str, Side]:
        return sides(self.bits, dim)

    def states(self, kv_heads: int, dim: int, capacity: int) -> dict[str, State]:
        return states(kv_heads, dim)

    def constants(self, kv_heads: int, dim: int, device: torch.device, ctx: Ctx) -> dict[str, Tensor]:
        return constants(kv_heads, dim, device, ctx)

    def begin(self, index: Index, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        begin(index, prompt, self.sinks, ctx)

    def extend(self, index: Index, kv: KV, done: Tensor, most: int, ctx: Ctx) -> None:
        extend(index, kv, self.bits, done, most)

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection:
        return sample(
            *(q_BHD, index["codes"], index["size"], kv, index["mean"], index["w"]),
            planes_of(self.bits, kv.k.shape[3]),
            ctx.scale,
            self.quota(q_BHD, kv),
            ctx.seed,
            ctx.layer,
            ctx.positions,
            room(self.most(kv.bound), kv.bound),
            self.per,
            self.draws == "independent",
            ctx.first_head,
        ).selection

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor:
        return scanned(kv, index)
