"""Attention whose keys are shared out among programs, and the merge: what the kernels of one or a few new tokens share.

A program folds its share of one head's keys into an online softmax (arXiv:2307.08691); shares are merged by their
log-sum-exps (arXiv:2501.01005), always in the same order. Query rows of a program are numbered ``m = t * G + g``: query
token ``t``, head ``g`` of those that read the same rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.chain_triton import chained, wait_for_previous
from keysift.types import KV, Partial

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_SPLITS = 128
MERGED_ELEMENTS = 8192  # of partial outputs that a program merges


class Config(NamedTuple):
    """How an attention kernel runs; never what it computes.

    Attributes:
        block_n: keys of a tile, a power of two from 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    block_n: int
    num_warps: int
    num_stages: int


def takes(q: Tensor, kv: KV) -> bool:
    """Whether the kernels of this family take the case."""
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, kv.k, kv.v)):
        return False  # no backward
    return max(kv.k.shape[-1], kv.v.shape[-1]) <= 256 and all(x.dtype in DTYPES for x in (q, kv.k, kv.v))


def widened(q: Tensor, kv: KV) -> bool:
    """Whether operands become fp32: where one is, or types differ, or the interpreter's dot would take bfloat16 for
    integers."""
    alike = q.dtype == kv.k.dtype == kv.v.dtype
    return not alike or q.dtype == torch.float32 or bool(triton.knobs.runtime.interpret)


def splits_of(q: Tensor, programs: int, most_tiles: int, per_processor: int, least: int = 1) -> int:
    """So many splits that ``programs`` times as many make ``per_processor`` a multiprocessor of the device."""
    properties: Any = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    wanted = per_processor * properties.multi_processor_count if properties else programs
    return max(1, min(max(round(wanted / max(1, programs)), least), most_tiles, MOST_SPLITS))


class Launch(NamedTuple):
    """What the attention kernels and the merge need to know alike, from the host.

    Attributes:
        q: queries ``[B, T, H, D]``.
        k, v: keys and values, with rows in one piece.
        slots: rows of programs a sequence: KV heads, or query heads where each reads its own rows.
        result: where results go: out, lse, partial out, partial lse.
        constants: constexpr arguments of the attention kernels.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    slots: int
    splits: int
    result: tuple[Tensor, ...]
    constants: dict[str, Any]

    def merge(self) -> Partial:
        """Merge what the programs left, if there were several a head."""
        out, lse = self.result[:2]
        c = self.constants
        if self.splits > 1 and out.numel():
            together = triton.next_power_of_2(self.splits)
            tile = min(c["DV_PAD"], max(16, MERGED_ELEMENTS // together))
            with torch.cuda.device_of(out):
                _merge[(c["ROWS"] * (c["DV_PAD"] // tile), self.slots, out.shape[0])](
                    self.result,
                    self.splits,
                    **{name: c[name] for name in ("T", "H", "G", "ROWS", "DV")},
                    TILE=tile,
                    SPLITS_PAD=together,
                    num_warps=4,
                    **chained(out),
                )
        return Partial(out, lse)


def prepare(q_BTHD: Tensor, kv: KV, slots: int, splits: int, config: Config, dtype: torch.dtype) -> Launch:
    """Buffers and constants of a launch."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, kv.k, kv.v))
    batch, tokens, heads, dim = q.shape
    v_dim, group = v.shape[3], heads // slots
    rows = tokens * group
    out = torch.empty(batch, tokens, heads, v_dim, dtype=dtype, device=q.device)
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=q.device)
    part_out, part_lse = out, lse  # unread where there is one split
    if splits > 1:
        part_out = torch.empty(batch, slots, splits, rows, v_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(batch, slots, splits, rows, dtype=torch.float32, device=q.device)
    wide = widened(q, kv)
    d_pad, dv_pad = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
    constants = {
        "T": tokens,
        "H": heads,
        "G": group,
        "SHARED": slots // k.shape[2],
        "ROWS": rows,
        "D": dim,
        "DV": v_dim,
        "M_PAD": max(16, triton.next_power_of_2(rows)),
        "D_PAD": d_pad,
        "DV_PAD": dv_pad,
        "PAGE": 0 if kv.table is None else k.shape[1],
        "ALIKE": k.stride() == v.stride(),
        "ALONE": splits == 1,  # not their number, which may change from step to step
        "WIDEN": wide,
        "PRECISION": "tf32x3" if wide else "tf32",  # read for fp32 alone
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        **chained(q),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch(q, k, v, slots, splits, (out, lse, part_out, part_lse), constants)


@triton.jit
def load_queries(
    q, strides, b, slot,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, M_PAD: tl.constexpr, D_PAD: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Queries of a program, ``[M_PAD, D_PAD]``; 0 where there is none."""
    m = tl.arange(0, M_PAD)
    d = tl.arange(0, D_PAD)
    rows = q + b.to(tl.int64) * strides[0] + (m // G).to(tl.int64) * strides[1] + (slot * G + m % G) * strides[2]
    tile = tl.load(rows[:, None] + d[None, :], mask=(m < ROWS)[:, None] & (d < D)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def load_rows(base, offsets, seen, D: tl.constexpr, D_PAD: tl.constexpr, WIDEN: tl.constexpr):
    """Rows of keys or values at ``offsets`` from ``base``, ``[N, D_PAD]``; 0 where a row is not ``seen``."""
    d = tl.arange(0, D_PAD)
    mask = seen[:, None]
    if D < D_PAD:
        mask &= (d < D)[None, :]
    tile = tl.load(base + offsets[:, None] + d[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def nothing(M_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """The online softmax before the first key: largest score, in units of log2, weights and weighted values."""
    top = tl.full([M_PAD], float("-inf"), tl.float32)
    return top, tl.zeros([M_PAD, BLOCK_N], tl.float32), tl.zeros([M_PAD, DV_PAD], tl.float32)


@triton.jit
def fold(state, score, tile_v, PRECISION: tl.constexpr):
    """Fold a tile of keys with these scores (of log2, ``[M, N]``) into the online softmax.

    Weights are added up over the tiles here and over the keys of a tile once in the end: warps share a row's keys.
    """
    top, total, acc = state
    new_top = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row may have seen no key yet
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink[:, None] + weight
    acc = tl.dot(weight.to(tile_v.dtype), tile_v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def finish(
    state, result, split, b, slot,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, M_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Write the result, or a share of it."""
    top, total, acc = state
    out, lse, part_out, part_lse = result
    total = tl.sum(total, 1)
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    log_sum = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    m = tl.arange(0, M_PAD)
    d = tl.arange(0, DV_PAD)
    kept = (m < ROWS)[:, None] & (d < DV)[None, :]
    if ALONE:
        ln2: tl.constexpr = 0.6931471805599453
        row = (b * T + m // G).to(tl.int64) * H + slot * G + m % G
        tl.store(out + row[:, None] * DV + d[None, :], acc.to(out.dtype.element_ty), mask=kept)
        tl.store(lse + row, log_sum * ln2, mask=m < ROWS)
    else:
        row = ((b * tl.num_programs(1) + slot) * tl.num_programs(0) + split).to(tl.int64) * ROWS + m
        tl.store(part_out + row[:, None] * DV + d[None, :], acc, mask=kept)
        tl.store(part_lse + row, log_sum, mask=m < ROWS)


@triton.jit
def leave_nothing(result, split, b, slot, ROWS: tl.constexpr, M_PAD: tl.constexpr):
    """What a program without a share tells the merge; its output is not read."""
    m = tl.arange(0, M_PAD)
    row = ((b * tl.num_programs(1) + slot) * tl.num_programs(0) + split).to(tl.int64) * ROWS + m
    tl.store(result[3] + row, tl.full([M_PAD], float("-inf"), tl.float32), mask=m < ROWS)


@triton.jit(do_not_specialize=["splits"])
def _merge(
    result, splits, T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr, SPLITS_PAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """``TILE`` values of one query row; the grid is (rows times tiles, slots, sequences)."""
    wait_for_previous(CHAINED)
    ln2: tl.constexpr = 0.6931471805599453
    out, lse, part_out, part_lse = result
    b = tl.program_id(2)
    slot = tl.program_id(1)
    m = tl.program_id(0) % ROWS
    d = tl.program_id(0) // ROWS * TILE + tl.arange(0, TILE)
    split = tl.arange(0, SPLITS_PAD)
    there = split < splits
    row = ((b * tl.num_programs(1) + slot).to(tl.int64) * splits + split) * ROWS + m
    part = tl.load(part_lse + row, mask=there, other=float("-inf"))
    at = part_out + row[:, None] * DV + d[None, :]
    values = tl.load(at, mask=there[:, None] & (d < DV)[None, :], other=0.0)  # does not wait for what is empty
    top = tl.max(part, 0)
    weight = tl.exp2(part - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    empty = total == 0
    acc = tl.sum(tl.where((weight > 0)[:, None], weight[:, None] * values, 0.0), 0) / tl.where(empty, 1.0, total)
    row = (b * T + m // G).to(tl.int64) * H + slot * G + m % G
    tl.store(out + row * DV + d, acc.to(out.dtype.element_ty), mask=d < DV)
    if tl.program_id(0) < ROWS:
        tl.store(lse + row, tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * ln2))
