"""From which size on reading fewer keys pays: below, dense attention is done before the search or the selection is.

For prefill it is a number of tokens, measured with ``keysift bench prefill --save-crossover``, once per device and
shape of attention. What this package knows stands in ``crossover.json`` beside this file; what a user has measured, in
the cache folder, comes first. For decode it is a number of bytes of keys and values, of one layer and all sequences,
per device and method: ``crossover_decode.json``, from ``keysift bench decode`` with ``dense_below=0``.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch
from torch import Tensor

SHIPPED = Path(__file__).with_name("crossover.json")
DECODE = Path(__file__).with_name("crossover_decode.json")


def dense_below(q_BTHD: Tensor, k_BNKD: Tensor) -> int:
    """Prompt length in tokens below which dense attention is faster, for inputs like these; 0 on a CPU.

    Where the shape was not measured on the device, the measured one that is nearest in query heads counts; where the
    device was not, the largest that was measured on any.
    """
    if not q_BTHD.is_cuda:
        return 0
    table = _table()
    known = table.get(torch.cuda.get_device_name(q_BTHD.device))
    if not known:
        return max((tokens for shapes in table.values() for tokens in shapes.values()), default=0)
    batch, _, heads, dim = q_BTHD.shape
    wanted = shape_name(batch * heads, batch * k_BNKD.shape[2], dim)
    nearest = min(known, key=lambda name: (name != wanted, abs(int(name.split("/")[0]) - batch * heads), name))
    return known[nearest]


def dense_below_bytes(device: torch.device, method: str) -> int:
    """Bytes of keys and values below which dense decode is faster than a method on a device; 0 on a CPU.

    Where the device was not measured, the largest figure of any device counts; a method that was not is taken for the
    slowest.
    """
    if device.type != "cuda":
        return 0
    table = _decode_table()
    known = [table[name] for name in [torch.cuda.get_device_name(device)] if name in table] or [*table.values()]
    return max((methods.get(method, max(methods.values())) for methods in known), default=0)


@functools.cache
def _decode_table() -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = json.loads(DECODE.read_text(encoding="utf-8"))
    return table


def shape_name(heads: int, kv_heads: int, dim: int) -> str:
    """How the table calls a shape; sequences of a batch count as heads."""
    return f"{heads}/{kv_heads}x{dim}"


def user_table() -> Path:
    """Where a user's own measurements are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "keysift" / "crossover.json"


def save(device: str, shape: str, tokens: int) -> Path:
    """Add a measurement to the user's table; it counts from the next call on."""
    path = user_table()
    table = _read(path)
    table.setdefault(device, {})[shape] = tokens
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(table, indent=1), encoding="utf-8")
    fresh.replace(path)
    _table.cache_clear()
    return path


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    table = _read(SHIPPED)
    for device, shapes in _read(user_table()).items():
        table.setdefault(device, {}).update(shapes)
    return table


def _read(path: Path) -> dict[str, dict[str, int]]:
    """A table, empty where there is none or none that can be read."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for shapes in table.values():
            for name, tokens in shapes.items():
                int(name.split("/")[0])  # as `dense_below` reads it
                shapes[name] = int(tokens)
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return table
