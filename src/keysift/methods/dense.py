"""All keys: the baseline, exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keysift.types import KV, BlockMask, Ctx, Selection


@dataclass(frozen=True, slots=True)
class Method:
    """Reads every key; exact."""

    paper: ClassVar[str] = "arXiv:1706.03762"
    dense_layers: ClassVar[tuple[int, ...]] = ()
    block: ClassVar[int] = 128
    sinks: ClassVar[int] = 0
    window: ClassVar[int] = 1
    tail: ClassVar[int] = 0
    grows: ClassVar[bool] = True

    def plan(self, q_BTHD: Tensor, kv: KV, ctx: Ctx) -> None:
        return None

    def mask(self, plan: None, blocks: range) -> BlockMask:
        raise AssertionError("dense has no mask")

    def build(self, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        return None

    def append(self, index: None, kv: KV, done: Tensor, ctx: Ctx) -> None:
        return None

    def select(self, q_BHD: Tensor, kv: KV, index: None, ctx: Ctx) -> Selection | None:
        return None

    def scan_bytes(self, kv: KV, index: None) -> int:
        return 0
