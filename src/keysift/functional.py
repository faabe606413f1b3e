"""The methods on plain tensors: no model, no cache."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from keysift.attention import decode, prefill, prefill_varlen
from keysift.cache import Store
from keysift.meter import Meter
from keysift.methods import flexprefill, parse
from keysift.ops.block_sparse import Backend
from keysift.types import KV, Ctx, check_seed, one_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = get_args(Backend)
NO_LAYER = -1  # tensors belong to no layer: no method's dense_layers name it


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Any = "flexprefill",
    *,
    scale: float | None = None,
    layer: int = NO_LAYER,
    seed: int = 0,
    return_lse: bool = False,
    return_stats: bool = False,
    measure_mass: bool = False,
    check: bool = False,
    backend: Backend = "auto",
) -> Any:
    """Causal attention of the last Tq positions, over the key blocks that a method chooses.

    Args:
        q: queries after rotary embedding, ``[B, Tq, Hq, D]``; float32, bfloat16 or float16; Tq <= Tk.
        k: keys, ``[B, Tk, Hkv, D]``; Hkv divides Hq, query head h reads head h // (Hq / Hkv).
        v: values, ``[B, Tk, Hkv, Dv]``.
        method: SPEC such as "flexprefill:gamma=0.9", or a method object.
        scale: factor on q.k; default D ** -0.5.
        layer: decoder layer the tensors come from, for a method's per-layer exceptions; -1 means none.
        seed: of the method's random draws.
        return_lse: also return the natural log-sum-exp, float32 ``[B, Tq, Hq]``.
        return_stats: also return ``Stats``, last: ``density``, and ``mass_covered`` if ``measure_mass``.
        measure_mass: measure the attention mass on the kept blocks, on up to 64 query rows (costs dense rows).
        check: look for NaN and inf in q and k on other devices than the CPU too, where it waits for the device.
        backend: of attention over blocks: "fa4", "triton", "sdpa", or "auto" for the fastest that takes the case; what
            is read densely takes the fastest dense attention.

    Returns:
        Output in q's dtype, ``[B, Tq, Hq, Dv]``; with ``return_lse`` or ``return_stats`` a tuple.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, NaN or inf, unknown method, a backend that cannot take it.
    """
    chosen = parse(method, "prefill")
    one_of("backend", backend, BACKENDS)
    _validate(q, k, v, check)
    kv, meter = KV.of(k, v), Meter(measure_mass)
    ctx = _context(layer, scale, q, kv.length - 1, seed)
    out, lse = prefill(q, kv, chosen, ctx, meter, with_lse=return_lse, backend=backend)
    return _pack(out, lse, meter, return_stats)


def prefill_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    method: Any = "flexprefill",
    *,
    scale: float | None = None,
    layer: int = NO_LAYER,
    seed: int = 0,
    return_lse: bool = False,
    return_stats: bool = False,
    measure_mass: bool = False,
    check: bool = False,
    backend: Backend = "auto",
) -> Any:
    """The same for sequences of any lengths, packed one behind the other: nothing is padded.

    Args:
        q: queries of all sequences, ``[total_q, Hq, D]``; those of a sequence are its last positions.
        k: keys, ``[total_k, Hkv, D]``.
        v: values, ``[total_k, Hkv, Dv]``.
        cu_seqlens_q, cu_seqlens_k: rows at which the sequences begin in q and in k, and the totals: B + 1 integers
            each, of the host (a tensor on a GPU would have to be waited for).
        method, scale, layer, seed, return_lse, return_stats, measure_mass, check, backend: as in ``prefill_attention``.

    Returns:
        Output in q's dtype, ``[total_q, Hq, Dv]``; with ``return_lse`` (``[total_q, Hq]``) or ``return_stats`` a tuple.

    Raises:
        ValueError: as ``prefill_attention``, and lengths that do not fit.
    """
    chosen = parse(method, "prefill")
    one_of("backend", backend, BACKENDS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not torch.is_tensor(x) or x.dim() != 3:
            found = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f"{name} is {found}: pass a tensor [tokens, heads, head_dim], all sequences in one")
    _validate(q[None], k[None], v[None], check, packed=True)
    rows, keys = (_boundaries(name, cu, len(x)) for name, cu, x in (("q", cu_seqlens_q, q), ("k", cu_seqlens_k, k)))
    if len(rows) != len(keys):
        raise ValueError(f"cu_seqlens_q is of {len(rows) - 1} sequences and cu_seqlens_k of {len(keys) - 1}")
    spans = tuple(itertools.pairwise(keys))
    for b, ((first, last), (start, end)) in enumerate(zip(itertools.pairwise(rows), spans, strict=True)):
        if last - first > end - start:
            raise ValueError(
                f"sequence {b} has {last - first} queries and {end - start} keys: "
                "queries are the last tokens of the keys"
            )
    batch = len(spans)
    kv, meter = KV.on(k[None].expand(batch, -1, -1, -1), v[None].expand(batch, -1, -1, -1), spans), Meter(measure_mass)
    ctx = _context(layer, scale, q, kv.length - 1, seed)
    out, lse = prefill_varlen(q, rows, kv, chosen, ctx, meter, with_lse=return_lse, backend=backend)
    return _pack(out, lse, meter, return_stats)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Any = "magicpig",
    *,
    tail_q: Tensor | None = None,
    scale: float | None = None,
    layer: int = NO_LAYER,
    seed: int = 0,
    return_lse: bool = False,
    return_stats: bool = False,
    check: bool = False,
) -> Any:
    """Attention of the newest position, over the keys that a method selects.

    Side data (codes, page bounds) is built on every call: this is for studies and tests; ``attach`` keeps it.

    Args:
        q: the newest query, ``[B, 1, Hq, D]``.
        k, v: all keys and values, the newest position's included, as in ``prefill_attention``.
        method: SPEC such as "magicpig:K=10,L=150", or a method object.
        tail_q: last queries of the prompt, ``[B, W, Hq, D]``, for methods that choose by them (snapkv); default q.
        scale, layer, seed, return_lse, check: as in ``prefill_attention``.
        return_stats: also return ``Stats``, last: ``kept_fraction``.

    Returns:
        Output in q's dtype, ``[B, 1, Hq, Dv]``; with ``return_lse`` or ``return_stats`` a tuple.

    Raises:
        ValueError: as ``prefill_attention``, and Tq other than 1.
    """
    chosen = parse(method, "decode")
    _validate(q, k, v, check)
    if q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens: decode takes 1; use prefill_attention for more")
    if tail_q is not None:
        _validate(tail_q, k, v, check, name="tail_q")
        if tail_q.shape[2] != q.shape[2]:
            raise ValueError(f"tail_q has {tail_q.shape[2]} heads and q has {q.shape[2]}")
    store, meter = Store(), Meter()
    store.append(k.transpose(1, 2), v.transpose(1, 2))
    store.end_prefill(q if tail_q is None else tail_q, chosen.tail)
    ctx = _context(layer, scale, q, store.view().length - 1, seed)
    out, lse = decode(q[:, 0], store, chosen, ctx, meter, with_lse=return_lse)
    return _pack(out[:, None], None if lse is None else lse[:, None], meter, return_stats)


def flex_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float = 0.95,
    tau: float = 0.0,
    min_budget: int | None = None,
    max_budget: int | None = None,
    gqa_interleave: bool = False,
    softmax_scale: float | None = None,
    block_size: int = 128,
    return_computational_ratio: bool = False,
    *,
    dense_below: int | None = None,
    mode: str = "default",
    return_lse: bool = False,
    return_stats: bool = False,
    measure_mass: bool = False,
    check: bool = False,
    backend: Backend = "auto",
) -> Any:
    """FlexPrefill (arXiv:2502.20766) with its authors' arguments and defaults, for any batch, dtype and Tq <= Tk.

    Args:
        q, k, v: as in ``prefill_attention``.
        gamma: share of attention mass to cover; 1 means dense.
        tau: mode="seed" only: a head is query-aware if its pooled estimate is closer than this; 0 for none.
        min_budget, max_budget: bounds in tokens on the keys that a block of queries reads; on columns and on diagonals
            with mode="seed".
        gqa_interleave: query head h reads KV head h % Hkv instead of h // (Hq / Hkv).
        softmax_scale: factor on q.k; default D ** -0.5.
        block_size: 16, 32, 64 or 128 tokens.
        return_computational_ratio: also return the share of the causal triangle that was read (the authors divide by
            the whole square, so theirs is about half of it).
        dense_below: shorter prompts are read densely; None: those for which that was measured to be faster.
        mode: "default", whose gamma is kept on all rows, or "seed" for the authors' block sets to the letter.
        return_lse, return_stats, measure_mass, check, backend: as in ``prefill_attention``.

    Returns:
        Output in q's dtype, ``[B, Tq, Hq, Dv]``; then lse, ratio and ``Stats``, those asked for.
    """
    method = flexprefill.Method(
        gamma=gamma,
        tau=tau,
        min_budget=min_budget,
        max_budget=max_budget,
        block=block_size,
        dense_below=dense_below,
        mode=mode,
    )
    one_of("backend", backend, BACKENDS)
    _validate(q, k, v, check)
    heads, kv_heads = q.shape[2], k.shape[2]
    if gqa_interleave:
        order = torch.arange(heads, device=q.device).view(heads // kv_heads, kv_heads).T.flatten()
        q = q[:, :, order]
    kv, meter = KV.of(k, v), Meter(measure_mass)
    ctx = _context(NO_LAYER, softmax_scale, q, kv.length - 1, 0)
    out, lse = prefill(q, kv, method, ctx, meter, with_lse=return_lse, backend=backend)
    if gqa_interleave:
        back = order.argsort()
        out, lse = out[:, :, back], None if lse is None else lse[:, :, back]
    return _pack(out, lse, meter, return_stats, return_computational_ratio)


def _boundaries(name: str, cu_seqlens: Sequence[int], total: int) -> list[int]:
    """Rows at which packed sequences begin, checked."""
    try:
        rows = [operator.index(row) for row in cu_seqlens]
    except TypeError:
        raise ValueError(f"cu_seqlens_{name}={cu_seqlens}: pass the rows at which sequences begin, integers") from None
    if len(rows) < 2 or rows[0] != 0 or rows[-1] != total or any(a > b for a, b in itertools.pairwise(rows)):
        raise ValueError(f"cu_seqlens_{name}={rows}: must rise from 0 to the {total} tokens of {name}")
    return rows


def _pack(out: Tensor, lse: Tensor | None, meter: Meter, return_stats: bool, return_ratio: bool = False) -> Any:
    if not return_stats and not return_ratio:  # reading the meter waits for the device
        return out if lse is None else (out, lse)
    stats = meter.stats()
    wanted = ((lse, lse is not None), (stats.density, return_ratio), (stats, return_stats))
    extras = [value for value, asked in wanted if asked]
    return (out, *extras) if extras else out


def _scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return dim**-0.5
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: must be above 0 and finite")
    return scale


def _context(layer: int, scale: float | None, q: Tensor, positions: Tensor, seed: int) -> Ctx:
    check_seed(seed)
    if not isinstance(layer, int):
        raise ValueError(f"layer={layer!r}: must be an integer, or -1 for none")
    return Ctx(layer, _scale(scale, q.shape[-1]), positions, seed)


def _validate(q: Tensor, k: Tensor, v: Tensor, check: bool, name: str = "q", packed: bool = False) -> None:
    """Raise ValueError, in one line, for tensors that do not fit together; ``name`` is what the caller calls q."""
    named = ((name, q), ("k", k), ("v", v))
    for name, x in named:
        if not torch.is_tensor(x) or x.dim() != 4:
            found = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f"{name} is {found}: pass a tensor [batch, tokens, heads, head_dim]")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: pass float32, bfloat16 or float16")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: no dimension may be empty")
    for what, values in (("dtype", [x.dtype for x in (q, k, v)]), ("device", [x.device for x in (q, k, v)])):
        if len(set(values)) > 1:
            raise ValueError(f"q, k, v differ in {what}: {', '.join(map(str, values))}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: batch, tokens and heads must agree")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)}: batch and head_dim must agree")
    if q.shape[1] > k.shape[1] and not packed:
        raise ValueError(f"q has {q.shape[1]} tokens and k only {k.shape[1]}: queries are the last tokens of the keys")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not divisible by {k.shape[2]} key/value heads")
    if check or q.device.type == "cpu":
        for name, x in named[:2]:
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"{name} holds NaN or inf")
