"""Inputs and oracles that several tests share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.mass_covered import of_pocket

TOLERANCE = {  # relative error ||out - ref|| / ||ref|| of an output against the fp32 oracle
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


class Clock:
    """Stands in for the ``time`` of a module: only what is said to take time takes any, however busy the machine is."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6  # nothing takes none at all
        return self.now

    def slower(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """The function, which now takes so long."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return wrapped


def relative_error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))


def close(out: Tensor, reference: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """NaN never passes."""
    return relative_error(out, reference) <= TOLERANCE[dtype]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poisoned_empty(*size: int, dtype: torch.dtype, device: Any) -> Tensor:
    """In the place of ``torch.empty``: whoever reads what nobody wrote finds what he would not expect."""
    return torch.full(
        size, torch.nan if dtype.is_floating_point else -7 if dtype.is_signed else 1, dtype=dtype, device=device
    )


def structured_qkv(
    tokens: int, heads: int = 4, kv_heads: int = 2, dim: int = 32, batch: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with sinks, a local band, and heavy columns in every second KV head: something to be sparse about."""
    g = generator(seed)
    q, k = (torch.randn(batch, tokens, h, dim, generator=g) for h in (heads, kv_heads))
    v = torch.randn(batch, tokens, kv_heads, dim, generator=g)
    position = torch.arange(tokens)[:, None]
    wave = position * (2 * math.pi / torch.logspace(1, 4, dim // 4))
    near = torch.cat([wave.cos(), wave.sin()], 1)  # neighbours have alike vectors
    q[..., : dim // 4 * 2] += 2 * near[:, None]
    k[..., : dim // 4 * 2] += 2 * near[:, None]
    q[..., -2:] += 2.0
    k[:, :4, :, -1] += 8.0
    heavy = torch.randint(0, tokens, (max(2, tokens // 100),), generator=g)
    k[:, heavy, ::2, -2] += 6.0
    return q, k, v


@functools.cache
def pocket_queries_keys(tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every layer of the shipped model on a document of facts to trace."""
    return list(of_pocket(tokens, "cpu"))


def codes_in_common(q: Tensor, k: Tensor, w: Tensor, bits: int) -> Tensor:
    """How many tables of SimHash give query and key one code, int64 ``[..., G, S]`` (arXiv:2410.16179).

    Bit b of table l is the sign of ``x . w[:, l * bits + b]``, for queries ``[..., G, D]``, keys ``[..., S, D]`` and
    directions ``[..., D, L * bits]``, whose leading dimensions matmul broadcasts.
    """
    q_code, k_code = ((x.float() @ w.float() > 0).unflatten(-1, (-1, bits)) for x in (q, k))
    return (q_code[..., :, None, :, :] == k_code[..., None, :, :, :]).all(-1).sum(-1)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp64 over the keys that ``seen`` (bool, broadcast to [B, H, Tq, Tk]) allows, causal.

    Returns output [B, Tq, H, Dv] and lse [B, Tq, H]; rows without keys give 0 and -inf.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = torch.einsum("bthd,bshd->bhts", q.double(), k) * scale
    causal = torch.arange(k.shape[1]) <= torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    allowed = causal if seen is None else causal & seen
    score = score.masked_fill(~allowed, -math.inf)
    lse = score.logsumexp(-1)
    weight = (score - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return torch.einsum("bhts,bshe->bthe", weight, v), lse.transpose(1, 2)
