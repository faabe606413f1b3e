"""All keys: the baseline, exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keysift.methods.base import DecodeMethod
from keysift.types import KV, BlockMask, Ctx, Selection


@dataclass(frozen=True, slots=True)
class Method(DecodeMethod):
    """Reads every key; exact."""

    paper: ClassVar[str] = "arXiv:1706.03762"
    block: ClassVar[int] = 128

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> None:
        return None

    def mask(self, plan: None, blocks: range) -> BlockMask:
        raise AssertionError("dense has no mask")

    def select(self, q_BHD: Tensor, kv: KV, index: None, ctx: Ctx) -> Selection | None:
        return None
