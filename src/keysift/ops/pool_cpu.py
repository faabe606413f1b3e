"""The CPU kernel that matches tables of a pool: what each bit says of a key is read once for all tables and heads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from keysift.ops import pool
from keysift.ops.codes_cpu import matched
from keysift.types import KV, Law, Selection


@functools.lru_cache(maxsize=16)
def masks_of(bits: int, tables: int, words: int) -> Tensor:
    """The bits of a word that each of its tables takes, int32: the highest is the sign."""
    return torch.tensor(pool.tables_of_word(bits, -(-tables // words))).to(torch.int32)


def collisions(
    codes_BHW: Tensor, planes: Tensor, kv: KV, bits: int, law: Law | None, tables: int, isa: str = "auto"
) -> Selection:
    """As ``codes.collisions`` for tables of a pool; R is the largest count."""
    masks = masks_of(bits, tables, codes_BHW.shape[2])
    return matched(codes_BHW, planes, kv, bits, tables, masks, law, isa)
