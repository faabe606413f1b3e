"""What the method files share: checked options, the base fields of prefill and of decode methods, row buffers."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from keysift.ops.pages import Quota
from keysift.types import KV, Ctx, Index, Side, State, one_of

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


def centring(prompt: KV, sinks: int, ctx: Ctx) -> KV:
    """The rows whose mean keys are centred with: the prompt less its sinks, or all of it if it has no more, which does
    not depend on when a sequence of a batch gets a middle; of shared pages, what all that share them begin with."""
    length = prompt.length if ctx.shared is None else prompt.length.clamp(max=ctx.shared)
    return prompt.between(prompt.start + torch.where(length > sinks, sinks, 0), prompt.start + length)


class KeepsNothing:
    """What a decode method without side data says."""

    __slots__ = ()

    @property
    def top_p(self) -> float | None:
        return None

    @property
    def reads_sides_alone(self) -> bool:
        return False

    def covers(self, keys: int) -> bool:
        return keys <= 0

    def sides(self, dim: int, dtype: torch.dtype) -> dict[str, Side]:
        return {}

    def states(self, kv_heads: int, dim: int, capacity: int) -> dict[str, State]:
        return {}

    def constants(self, kv_heads: int, dim: int, device: torch.device, ctx: Ctx) -> dict[str, Tensor]:
        return {}

    def begin(self, index: Index, kv: KV, prompt: KV, tail_q_BTHD: Tensor, ctx: Ctx) -> None:
        return None

    def extend(self, index: Index, kv: KV, done: Tensor, most: int, ctx: Ctx) -> None:
        return None

    def scan_bytes(self, kv: KV, index: Index, heads: int) -> Tensor | int:
        return 0


@dataclass(frozen=True, slots=True)
class DecodeMethod(KeepsNothing):
    """Base of the methods that choose keys of the middle in decode."""

    paper: ClassVar[str]
    tail: ClassVar[int] = 0
    grows: ClassVar[bool] = True

    sinks: int = option(4, "first keys, always read", low=0)
    window: int = option(64, "last keys, always read", low=1)
    dense_layers: tuple[int, ...] = option((), DENSE_LAYERS, low=0)
    dense_below: int | None = option(None, "fewer keys are all read; none: where that was measured as faster", low=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class BudgetedDecode(DecodeMethod):
    """Base of the decode methods whose cost is a budget: of keys, or of bytes."""

    keep: float | None = option(DEFAULT_KEEP, "share of the middle keys to read; 1 means dense", above=0, high=1)
    budget: int | None = option(None, "keys to read in all, sinks and window included, instead of keep", low=1)
    keep_bytes: float | None = option(
        None, "share of the middle's bytes to read, codes and the like included, instead of keep", above=0, high=1
    )
    top_p: float | None = option(
        None, "read the values only of the fewest chosen keys that have this share of their weight", above=0, high=1
    )

    def __post_init__(self) -> None:
        check(self)
        given = [n for n in ("budget", "keep_bytes") if getattr(self, n) is not None]
        given = ["keep"] * (self.keep not in (None, DEFAULT_KEEP)) + given
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'{n}={getattr(self, n)}' for n in given)}: give one of them")
        if not given and self.keep is None:
            raise ValueError("keep and budget are both none: give one of them")
        if self.budget is not None and self.budget <= self.sinks + self.window:
            raise ValueError(
                f"budget={self.budget}: must exceed sinks + window = {self.sinks} + {self.window};"
                " raise budget or lower sinks or window"
            )

    def quota(self, q_BHD: Tensor, kv: KV) -> Quota:
        """How many of the middle's keys one selection may take.

        Raises:
            ValueError: keep_bytes does not even pay for what is read to choose.
        """
        if self.budget is not None:
            return Quota(keys=self.budget - self.sinks - self.window)
        if self.keep_bytes is None:
            return Quota(share=self.keep or 0.0)
        left = self.share_to_read(kv.k.shape[-1], kv.v.shape[-1], kv.k.dtype)
        return Quota(share=left / self.lists(q_BHD.shape[1] // kv.k.shape[2]))

    def lists(self, group: int) -> int:
        """Selections that a KV head of so many query heads reads: one, or one for each."""
        return 1

    def share_to_read(self, dim: int, v_dim: int, dtype: torch.dtype) -> float:
        """What ``keep_bytes`` leaves once the keys are chosen, as a share of the bytes of keys and values.

        Raises:
            ValueError: it leaves nothing.
        """
        scanned = self.scanned_share(dim, v_dim, dtype)
        if self.keep_bytes is not None and self.keep_bytes <= scanned:
            raise ValueError(f"keep_bytes={self.keep_bytes}: to choose alone takes {scanned:.3f} of the bytes")
        return (1.0 if self.keep_bytes is None else self.keep_bytes) - scanned

    def scanned_share(self, dim: int, v_dim: int, dtype: torch.dtype) -> float:
        """Bytes that are read of every key to choose, as a share of those of its key and value."""
        return sum(side.token_bytes for side in self.sides(dim, dtype).values()) / ((dim + v_dim) * dtype.itemsize)

    def most(self, keys: int) -> int:
        """Keys that a selection takes at most from a middle of so many, as the host knows."""
        share = self.keep if self.keep_bytes is None else self.keep_bytes
        wanted = int((share or 0.0) * keys) if self.budget is None else self.budget - self.sinks - self.window
        return min(max(wanted, 1), keys)

    def covers(self, keys: int) -> bool:
        return keys <= 0 or (self.most(keys) >= keys and self.keep_bytes in (None, 1.0))


@dataclass(frozen=True, slots=True)
class ExactDecode(BudgetedDecode):
    """Base of the budgeted methods that read all keys to choose, each query head for itself; for studies."""

    dense_layers: tuple[int, ...] = option((0, 1), DENSE_LAYERS, low=0)

    def lists(self, group: int) -> int:
        return group

    def scanned_share(self, dim: int, v_dim: int, dtype: torch.dtype) -> float:
        return dim / (dim + v_dim)
