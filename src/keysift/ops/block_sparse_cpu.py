"""Attention over lists of key blocks, or over all of them, by the CPU kernels.

A thread computes one query block of one head of one sequence by the online softmax of FlashAttention-2
(arXiv:2307.08691), 64 keys at a time, so that nothing depends on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from keysift.ops.attention_cpu import KEY_FIELDS, dense_rows, fields, key_values, takes
from keysift.ops.cpu.library import DTYPES, Args, function, isa_of, threads
from keysift.types import KV, BlockMask


class PrefillArgs(Args):
    """``ks_prefill_args`` of prefill.h."""

    _fields_ = (
        *KEY_FIELDS,
        *fields(ctypes.c_int64, "q_stride2 tokens keys"),
        *fields(ctypes.c_void_p, "start full_count full_index partial_count partial_index"),
        *fields(ctypes.c_int64, "full_width partial_width query_blocks first block lo hi"),
        *fields(ctypes.c_void_p, "out lse"),
        *fields(ctypes.c_int32, "q_dtype kv_dtype out_dtype"),
        ("scale", ctypes.c_float),
    )


_BYTES = ctypes.sizeof(PrefillArgs)


def unsupported(q: Tensor, kv: KV, block: int, scale: float) -> str | None:
    """What keeps the kernel from taking the case, in words that follow "needs"; None where it takes it."""
    del block, scale  # any
    if takes(q, kv):
        return None
    if q.device.type != "cpu":
        return f"tensors on a CPU, not on {q.device.type}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, kv.k, kv.v)):
        return "torch.no_grad(): it has no backward"
    if not (kv.k.dtype == kv.v.dtype and q.dtype in DTYPES and kv.k.dtype in DTYPES):
        return f"k and v alike, and float32, bfloat16 or float16, not {q.dtype}, {kv.k.dtype}, {kv.v.dtype}"
    return "the CPU kernels, which a C++ compiler builds when keysift is installed"


def block_sparse(
    q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float, with_lse: bool = False, isa: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last T positions of each sequence over the key blocks of ``mask``.

    Shapes and results are those of ``block_sparse_attention``; any block size, head dim and scale; float32, bfloat16
    and float16. Sequences may start in different rows, and their keys may lie in pages; their number must be known on
    the host and the same for all.

    Raises:
        ValueError: a key block or page that does not exist, or an instruction set that this CPU lacks.
    """
    keys = _uniform_keys(kv)
    lo, hi = max(keys - q_BTHD.shape[1], mask.rows().start), min(keys, mask.rows().stop)
    lists = [mask.full_count, mask.full_index, mask.partial_count, mask.partial_index]
    return _run(q_BTHD, kv, lists, (keys, lo, max(lo, hi), mask.first, mask.block), scale, with_lse, isa)


def block_sparse_varlen(
    q_THD: Tensor,
    cu_seqlens_q: Sequence[int],
    kv: KV,
    masks: Sequence[BlockMask],
    scale: float,
    with_lse: bool = False,
    isa: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """A ragged batch of packed queries, one sequence after the other; shapes and results are those of
    ``block_sparse_attention_varlen``."""
    out = q_THD.new_empty(*q_THD.shape[:2], kv.v.shape[-1])
    lse = q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32) if with_lse else None
    for b, mask in enumerate(masks):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        if rows.stop > rows.start:
            part, part_lse = block_sparse(q_THD[None, rows], kv.only(b), mask, scale, with_lse, isa)
            out[rows] = part[0]
            if lse is not None and part_lse is not None:
                lse[rows] = part_lse[0]
    return out, lse


def dense(
    q_BTHD: Tensor, kv: KV, scale: float, with_lse: bool = False, block: int = 64, isa: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """The same over all key blocks, which no list names; ``block`` is that of the queries."""
    keys = _uniform_keys(kv)
    return _run(q_BTHD, kv, [], (keys, keys - q_BTHD.shape[1], keys, 0, block), scale, with_lse, isa)


def _uniform_keys(kv: KV) -> int:
    lengths = {end - start for start, end in kv.known_spans()}
    if len(lengths) > 1:
        raise ValueError(f"sequences of {sorted(lengths)} keys: block_sparse_varlen takes different lengths")
    return lengths.pop() if lengths else 0


def _run(
    q: Tensor, kv: KV, lists: list[Tensor], shape: tuple[int, ...], scale: float, with_lse: bool, isa: str
) -> tuple[Tensor, Tensor | None]:
    operands = (q, kv.k, kv.v, kv.table, kv.start, lists, list(shape), scale, isa)
    out, lse = (_prefill_op if torch.compiler.is_compiling() else _prefill)(*operands)
    return out, lse if with_lse else None


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    start: Tensor,
    lists: list[Tensor],
    shape: list[int],
    scale: float,
    isa: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    keys, lo, hi, first, block = shape
    q, k, v, start = dense_rows(q), dense_rows(k), dense_rows(v), start.contiguous()
    lists = [x.int().contiguous() for x in lists]
    out = torch.empty(batch, hi - lo, heads, v.shape[3], dtype=q.dtype)
    lse = torch.empty(batch, hi - lo, heads, dtype=torch.float32)
    pointers: list[int | None]
    if lists:
        pointers, widths = [x.data_ptr() for x in lists], (lists[1].shape[3], lists[3].shape[3])
        blocks = lists[0].shape[2]
    else:
        pointers, widths, blocks = [None] * 4, (0, 0), -(-hi // block) - first
    function("prefill", PrefillArgs)(
        PrefillArgs(
            _BYTES, isa_of(isa), threads(),
            *key_values(q, heads, k, v, table),
            q.stride(2), tokens, keys, start.data_ptr(), *pointers, *widths, blocks, first, block, lo, hi,
            out.data_ptr(), lse.data_ptr(), DTYPES[q.dtype], DTYPES[k.dtype], DTYPES[q.dtype], scale,
        )
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("keysift::prefill_cpu", mutates_args=(), device_types="cpu")
def _prefill_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    start: Tensor,
    lists: list[Tensor],
    shape: list[int],
    scale: float,
    isa: str,
) -> tuple[Tensor, Tensor]:
    return _prefill(q, k, v, table, start, lists, shape, scale, isa)


@_prefill_op.register_fake
def _prefill_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    start: Tensor,
    lists: list[Tensor],
    shape: list[int],
    scale: float,
    isa: str,
) -> tuple[Tensor, Tensor]:
    rows = shape[2] - shape[1]
    out = q.new_empty(q.shape[0], rows, q.shape[2], v.shape[3])
    return out, q.new_empty(q.shape[0], rows, q.shape[2], dtype=torch.float32)
