"""All keys: the baseline, exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keysift.methods.base import KeepsNothing
from keysift.types import KV, BlockMask, Ctx, Index, Selection


@dataclass(frozen=True, slots=True)
class Method(KeepsNothing):
    """Reads every key; exact."""

    paper: ClassVar[str] = "arXiv:1706.03762"
    dense_layers: ClassVar[tuple[int, ...]] = ()
    block: ClassVar[int] = 128
    sinks: ClassVar[int] = 0
    window: ClassVar[int] = 1
    tail: ClassVar[int] = 0
    grows: ClassVar[bool] = True
    dense_below: ClassVar[int | None] = 0

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> None:
        return None

    def mask(self, plan: None, blocks: range) -> BlockMask:
        raise AssertionError("dense has no mask")

    def covers(self, keys: int) -> bool:
        return True

    def select(self, q_BHD: Tensor, kv: KV, index: Index, ctx: Ctx) -> Selection | None:
        return None
