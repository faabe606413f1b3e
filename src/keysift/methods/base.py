"""What the method files share: checked options, the base fields of prefill and of decode methods, row buffers."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from keysift.types import KV, one_of

BLOCKS = (16, 32, 64, 128)


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A dataclass field with its one-line explanation and bounds (``low`` and ``high`` inclusive, ``above`` not)."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "above": above, "choices": choices})


def check(method: Any) -> None:
    """Raise ValueError for the first option of the wrong type or out of its bounds."""
    hints = get_type_hints(type(method))
    for f in fields(method):
        value, limits = getattr(method, f.name), f.metadata
        if not _fits(value, hints[f.name]):
            wanted = getattr(hints[f.name], "__name__", None) or hints[f.name]
            raise ValueError(f"{f.name}={value!r}: must be of type {wanted}")
        if value is None:
            continue
        if limits.get("choices"):
            one_of(f.name, value, limits["choices"])
        for item in value if isinstance(value, tuple) else (value,):
            _check_bounds(f.name, item, limits)


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the annotation says; an int passes as a float, a bool as nothing."""
    if get_origin(hint) is types.UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not isinstance(value, bool)


def _check_bounds(name: str, value: Any, limits: Any) -> None:
    low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be finite")
    if (
        (above is not None and not value > above)
        or (low is not None and value < low)
        or (high is not None and value > high)
    ):
        least = f"above {above}" if above is not None else f"at least {low}" if low is not None else ""
        most = f"at most {high}" if high is not None else ""
        raise ValueError(f"{name}={value}: must be {' and '.join(filter(None, [least, most]))}")


DEFAULT_KEEP = 0.05
DENSE_LAYERS = "layers that read all keys, joined by +, such as 0+16"


@dataclass(frozen=True, slots=True)
class PrefillMethod:
    """Base of the methods that only prefill."""

    paper: ClassVar[str]

    block: int = option(128, "tokens a block", choices=BLOCKS)
    dense_layers: tuple[int, ...] = option((), DENSE_LAYERS, low=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class DecodeMethod:
    """Base of the methods that choose keys of the middle in decode."""

    paper: ClassVar[str]
    tail: ClassVar[int] = 0
    grows: ClassVar[bool] = True

    sinks: int = option(4, "first keys, always read", low=0)
    window: int = option(64, "last keys, always read", low=1)
    dense_layers: tuple[int, ...] = option((), DENSE_LAYERS, low=0)

    def __post_init__(self) -> None:
        check(self)

    def build(self, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Any) -> Any | None:
        return None

    def append(self, index: Any, kv: KV, done: Tensor, ctx: Any) -> Any | None:
        return index

    def scan_bytes(self, kv: KV, index: Any) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class BudgetedDecode(DecodeMethod):
    """Base of the decode methods whose cost is a budget of keys."""

    keep: float | None = option(DEFAULT_KEEP, "share of the middle keys to read; 1 means dense", above=0, high=1)
    budget: int | None = option(None, "keys to read in all, sinks and window included, instead of keep", low=1)

    def __post_init__(self) -> None:
        check(self)
        if self.budget is not None and self.keep not in (None, DEFAULT_KEEP):
            raise ValueError(f"keep={self.keep} and budget={self.budget}: give one of them")
        if self.budget is None and self.keep is None:
            raise ValueError("keep and budget are both none: give one of them")
        if self.budget is not None and self.budget <= self.sinks + self.window:
            raise ValueError(
                f"budget={self.budget}: must exceed sinks + window = {self.sinks} + {self.window};"
                " raise budget or lower sinks or window"
            )

    def count(self, length: Tensor) -> Tensor:
        """Middle keys to read where there are ``length``: at least one, at most all, int64 like ``length``."""
        if self.keep is not None and self.budget is None:
            wanted = (self.keep * length).long()
        else:
            wanted = torch.full_like(length, (self.budget or 0) - self.sinks - self.window)
        return torch.minimum(wanted.clamp(min=1), length)

    def reads_all(self, length: Tensor) -> bool:
        """Whether the budget covers every sequence's middle."""
        return bool((self.count(length) >= length).all())


def grown(buffer: Tensor, dim: int, size: int) -> Tensor:
    """``buffer`` with room for ``size`` entries along ``dim``: itself, or a copy a quarter larger, its rest zero."""
    have = buffer.shape[dim]
    if have >= size:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = max(size, have + have // 4)
    larger = buffer.new_zeros(shape)
    larger.narrow(dim, 0, have).copy_(buffer)
    return larger
