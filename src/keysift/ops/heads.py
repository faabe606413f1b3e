"""Grouped-query heads: query head ``h`` reads key/value head ``h // (H / K)``."""

from __future__ import annotations

from torch import Tensor


def group(q: Tensor, num_kv_heads: int, dim: int) -> Tensor:
    """Split the query-head dimension ``dim`` into (KV head, head in the group)."""
    dim %= q.dim()
    return q.unflatten(dim, (num_kv_heads, q.shape[dim] // num_kv_heads))


def per_query_head(x: Tensor, num_heads: int, dim: int) -> Tensor:
    """Repeat a per-KV-head tensor so that ``dim`` counts query heads; a no-op where it already does."""
    return x if x.shape[dim] == num_heads else x.repeat_interleave(num_heads // x.shape[dim], dim)
