"""Attention over lists of key blocks, or over all of them, in one Triton kernel.

A program computes one query block of one head of one sequence by the online softmax of FlashAttention-2
(arXiv:2307.08691). Sequences of any lengths, packed, padded or paged, share a launch: a table says where each one's
queries, keys, outputs and lists begin. Programs start in the order of their list's length, longest first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops.descriptors import tma_takes, token_tiles
from keysift.types import KV, BlockMask

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)
SHARED_BYTES = 227 << 10  # of a Hopper block; asked of the device where there is one


class Config(NamedTuple):
    """How the kernel runs; never what it computes.

    Attributes:
        block_n: keys of a tile, a power of two from 16 to the mask's block.
        num_warps: 4 or 8; wgmma wants a multiple of 4, and 64 query rows for each four.
        num_stages: tiles of keys and values that are in flight.
        tma: load keys and values through tensor descriptors (compute capability 9 and later).
    """

    block_n: int
    num_warps: int
    num_stages: int
    tma: bool


def default_config(block: int, dim: int, v_dim: int, shared_bytes: int = SHARED_BYTES, tma: bool = True) -> Config:
    """The largest tiles and the deepest pipeline that fit into the shared memory of a block beside the queries."""
    d, dv = triton.next_power_of_2(dim), triton.next_power_of_2(v_dim)
    warps = 8 if block == 128 else 4
    # wider accumulators, or as many addresses, overflow the registers
    most = {64: 128, 128: 128 if tma else 64, 256: 64 if tma else 32}[max(64, d, dv)]
    candidates = [(n, s) for n in (128, 64, 32, 16) if n <= min(block, most) for s in (3, 2)]
    spare = shared_bytes - 2 * block * d - 2048
    for block_n, stages in candidates:
        if 2 * stages * block_n * (d + dv) <= spare:
            return Config(block_n, warps, stages, tma)
    return Config(16, warps, 1, tma)


def unsupported(q: Tensor, kv: KV, block: int, scale: float) -> str | None:
    """What keeps the kernel from taking the case, in words that follow "needs"; None where it takes it."""
    dims = (q.shape[-1], kv.v.shape[-1])
    if not (q.dtype == kv.k.dtype == kv.v.dtype and q.dtype in DTYPES):
        return f"q, k and v all in bfloat16 or float16, not {q.dtype}, {kv.k.dtype}, {kv.v.dtype}"
    if max(dims) > 256:
        return f"head dims up to 256, not {max(dims)}"
    if block not in BLOCKS:
        return f"a mask of block 16, 32, 64 or 128, not {block}"
    if not (scale > 0 and math.isfinite(scale)):
        return f"a positive scale, not {scale}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, kv.k, kv.v)):
        return "torch.no_grad(): it has no backward"
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        return f"tensors on a CUDA device, not on {q.device.type}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 or later"
    return None


def block_sparse(
    q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float, with_lse: bool = False, config: Config | None = None
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last T positions of each sequence over the key blocks of ``mask``.

    Shapes and results are those of ``block_sparse_attention``. Sequences may start in different rows, and their keys
    may lie in pages; their number must be known on the host and the same for all.
    """
    batch, tokens = q_BTHD.shape[:2]
    spans = kv.known_spans()
    keys = spans[0][1] - spans[0][0]
    lo, hi = max(keys - tokens, mask.rows().start), min(keys, mask.rows().stop)
    rows = max(0, hi - lo)
    lists = _Lists(
        *(x.contiguous() for x in (mask.full_count, mask.full_index, mask.partial_count, mask.partial_index))
    )
    full, partial = lists.full_index, lists.partial_index
    heads, blocks = mask.full_count.shape[1:]
    sequences = [
        _Sequence(
            q_row=tokens - keys,
            out_row=b * rows - lo,
            lo=lo,
            hi=hi,
            key_row=start,
            first=mask.first,
            blocks=blocks,
            row=b * heads * blocks,
            full=b * heads * blocks * full.shape[3],
            full_width=full.shape[3],
            partial=b * heads * blocks * partial.shape[3],
            partial_width=partial.shape[3],
            q_batch=b,
        )
        for b, (start, _) in enumerate(spans)
    ]
    flat = _Lists(*(x.flatten() for x in lists))
    out, lse = _launch(q_BTHD, kv, sequences, flat, mask.block, batch * rows, scale, with_lse, config)
    return out.unflatten(0, (batch, rows)), None if lse is None else lse.unflatten(0, (batch, rows))


def block_sparse_varlen(
    q_THD: Tensor,
    cu_seqlens_q: Sequence[int],
    kv: KV,
    masks: Sequence[BlockMask],
    scale: float,
    with_lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A ragged batch of packed queries; shapes and results are those of ``block_sparse_attention_varlen``."""
    sequences, offsets, row = [], [0, 0], 0
    for b, ((start, end), mask) in enumerate(zip(kv.known_spans(), masks, strict=True)):
        keys, tokens = end - start, cu_seqlens_q[b + 1] - cu_seqlens_q[b]
        blocks, widths = mask.full_count.shape[2], (mask.full_index.shape[3], mask.partial_index.shape[3])
        behind = cu_seqlens_q[b] + tokens - keys  # packed row of a sequence's position 0, were it there
        sequences.append(
            _Sequence(
                q_row=behind,
                out_row=behind,
                lo=keys - tokens,
                hi=keys,
                key_row=start,
                first=mask.first,
                blocks=blocks,
                row=row,
                full=offsets[0],
                full_width=widths[0],
                partial=offsets[1],
                partial_width=widths[1],
                q_batch=0,
            )
        )
        row += q_THD.shape[1] * blocks
        offsets = [at + q_THD.shape[1] * blocks * width for at, width in zip(offsets, widths, strict=True)]
    parts = zip(*((m.full_count, m.full_index, m.partial_count, m.partial_index) for m in masks), strict=True)
    lists = _Lists(*(torch.cat([x.flatten() for x in part]) for part in parts))
    return _launch(q_THD[None], kv, sequences, lists, masks[0].block, q_THD.shape[0], scale, with_lse, config)


def dense(
    q_BTHD: Tensor, kv: KV, scale: float, with_lse: bool = False, block: int = 128, config: Config | None = None
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last T positions over all keys, in query blocks of ``block``.

    Sequences may start in different rows, and their keys may lie in pages, but all have one length.

    Returns:
        Output in q's dtype ``[B, T, H, Dv]``; lse, fp32 ``[B, T, H]``, or None.
    """
    batch, tokens = q_BTHD.shape[:2]
    spans = kv.known_spans()
    keys = spans[0][1] - spans[0][0]
    first, stop = (keys - tokens) // block, -(-keys // block)
    sequences = [
        _Sequence(
            q_row=tokens - keys,
            out_row=b * tokens - (keys - tokens),
            lo=keys - tokens,
            hi=keys,
            key_row=start,
            first=first,
            blocks=stop - first,
            row=b * q_BTHD.shape[2] * (stop - first),
            q_batch=b,
        )
        for b, (start, _) in enumerate(spans)
    ]
    out, lse = _launch(q_BTHD, kv, sequences, None, block, batch * tokens, scale, with_lse, config)
    return out.unflatten(0, (batch, tokens)), None if lse is None else lse.unflatten(0, (batch, tokens))


class _Sequence(NamedTuple):
    """Where a sequence's things are; the kernel reads the fields in this order."""

    q_row: int  # row of q, and of the outputs, that position 0 has or would have
    out_row: int
    lo: int  # positions that are computed
    hi: int
    key_row: int  # row of the first key
    first: int  # block position of query block 0
    blocks: int  # query blocks
    row: int  # its place in the counts and in the lists: head-major, then by query block
    full: int = 0
    full_width: int = 0
    partial: int = 0
    partial_width: int = 0
    q_batch: int = 0
    key_batch: int = 0


class _Lists(NamedTuple):
    """The lists of all sequences, one behind the other."""

    full_count: Tensor
    full_index: Tensor
    partial_count: Tensor
    partial_index: Tensor


def _launch(
    q: Tensor,
    kv: KV,
    sequences: list[_Sequence],
    lists: _Lists | None,
    block: int,
    rows: int,
    scale: float,
    with_lse: bool,
    config: Config | None,
) -> tuple[Tensor, Tensor | None]:
    """Output ``[rows, H, Dv]`` and lse ``[rows, H]``."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, kv.k, kv.v))
    heads, dim, v_dim = q.shape[2], q.shape[3], v.shape[3]
    out = torch.empty(rows, heads, v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=q.device) if with_lse else None
    programs = heads * sum(s.blocks for s in sequences)
    if not rows or not programs:
        return out, lse
    config = _config(config, block, k, v, kv.table is not None)
    one_buffer = k.stride(0) == v.stride(0) == 0  # packed keys that every sequence sees: a descriptor has no stride 0
    if kv.table is None:
        sequences = [s._replace(key_batch=0 if one_buffer else b) for b, s in enumerate(sequences)]
    page = 0 if kv.table is None else k.shape[1]
    tile_in_page = bool(page) and all(x % config.block_n == 0 for x in (page, *(s.key_row for s in sequences)))
    alike = (k.stride(0) == 0) == (v.stride(0) == 0)  # one number addresses a sequence in both
    tma = config.tma and alike and (not page or tile_in_page) and all(tma_takes(x) for x in (k, v))
    d_pad, dv_pad = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
    table = _on_device([list(s) for s in sequences], torch.int64, q.device)
    order = owner = full_count = full_index = partial_count = partial_index = table  # unread where there are no lists
    if lists is not None:
        full_count, full_index, partial_count, partial_index = lists
        order = torch.argsort(full_count + partial_count, descending=True, stable=True).int()
        repeats = _on_device([heads * s.blocks for s in sequences], torch.int64, q.device)
        numbers = torch.arange(len(sequences), dtype=torch.int32, device=q.device)
        owner = torch.repeat_interleave(numbers, repeats, output_size=programs)
    with torch.cuda.device_of(q):  # a kernel starts on the current device
        _attend[(programs,)](
            q,
            token_tiles(k, config.block_n, d_pad) if tma else k,
            token_tiles(v, config.block_n, dv_pad) if tma else v,
            out,
            lse if lse is not None else out,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            table,
            order,
            owner,
            full_count,
            full_index,
            partial_count,
            partial_index,
            kv.table if kv.table is not None else table,
            kv.table.stride(0) if kv.table is not None else 0,
            scale * math.log2(math.e),
            len(sequences),
            H=heads,
            G=heads // k.shape[2],
            D=dim,
            DV=v_dim,
            D_PAD=d_pad,
            DV_PAD=dv_pad,
            BLOCK=block,
            BLOCK_N=config.block_n,
            PAGE=page,
            TILE_IN_PAGE=tile_in_page,
            FIELDS=len(_Sequence._fields),
            DENSE=lists is None,
            LSE=with_lse,
            TMA=tma,
            WIDEN=triton.knobs.runtime.interpret,  # its dot takes the bits of bfloat16 for integers
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def _config(config: Config | None, block: int, k: Tensor, v: Tensor, paged: bool) -> Config:
    if config is not None:
        if config.block_n not in BLOCKS or config.block_n > block:
            raise ValueError(f"block_n={config.block_n}: choose {', '.join(str(n) for n in BLOCKS if n <= block)}")
        return config
    tma = all(tma_takes(x) for x in (k, v)) and not (paged and k.shape[1] % block)
    if not k.is_cuda:
        return default_config(block, k.shape[-1], v.shape[-1], tma=tma)
    properties: Any = torch.cuda.get_device_properties(k.device)
    tma = tma and torch.version.cuda is not None and properties.major >= 9
    return default_config(block, k.shape[-1], v.shape[-1], properties.shared_memory_per_block_optin, tma)


def _on_device(x: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers as a tensor, without waiting for the device."""
    host = torch.tensor(x, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@triton.jit
def _load_tile(
    x, strides, pages, key_batch, row, head, seen,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    TILE_IN_PAGE: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows ``row .. row + BLOCK_N - 1`` of a sequence, ``[BLOCK_N, WIDTH_PAD]``; unseen rows are 0 where MASKED."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, WIDTH_PAD)
    if TILE_IN_PAGE:
        key_batch = tl.load(pages + row // PAGE)
        row = row % PAGE
    if TMA:
        tile = x.load([key_batch.to(tl.int32), head, row.to(tl.int32), 0]).reshape(BLOCK_N, WIDTH_PAD)
        if MASKED:
            tile = tl.where(seen[:, None], tile, 0.0)
    else:
        if PAGE > 0 and not TILE_IN_PAGE:
            rows = row + offs_n
            page = tl.load(pages + rows // PAGE, mask=seen if MASKED else offs_n >= 0, other=0)
            offset = page.to(tl.int64) * strides[0] + (rows % PAGE).to(tl.int64) * strides[1]
            ptrs = x + head.to(tl.int64) * strides[2] + offset[:, None] + offs_d[None, :]
        else:
            base = x + key_batch.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[1]
            ptrs = base + head.to(tl.int64) * strides[2] + (offs_n[:, None] * strides[1] + offs_d[None, :])
        if MASKED:
            tile = tl.load(ptrs, mask=seen[:, None] & (offs_d[None, :] < WIDTH), other=0.0)
        elif WIDTH == WIDTH_PAD:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=offs_d[None, :] < WIDTH, other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _walk(
    state, q, position, k, v, k_strides, v_strides, pages, key_batch, key_row, end, head, blocks, first, tiles,
    scale_log2,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, TILE_IN_PAGE: tl.constexpr, LISTED: tl.constexpr, TMA: tl.constexpr,
    WIDEN: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold ``tiles`` tiles of keys into the online softmax: of the blocks of a list, or of all from ``first`` on."""
    SUB: tl.constexpr = BLOCK // BLOCK_N
    top, total, acc = state
    offs_n = tl.arange(0, BLOCK_N)
    if LISTED:
        first = tl.load(blocks, mask=tiles > 0, other=0)
    for j in tl.range(0, tiles, num_stages=STAGES):
        if LISTED:  # the next entry is read a turn ahead of its keys
            start = first * BLOCK + (j % SUB) * BLOCK_N
            first = tl.load(blocks + (j + 1) // SUB, mask=j + 1 < tiles, other=0)
        else:
            start = first * BLOCK + j * BLOCK_N
        exists = start + offs_n < end
        row = key_row + (tl.where(start < end, start, 0) if MASKED else start)  # none after the end, unseen or not
        tile_k = _load_tile(
            k, k_strides, pages, key_batch, row, head, exists,
            D, D_PAD, BLOCK_N, PAGE, TILE_IN_PAGE, TMA, WIDEN, MASKED,
        )  # fmt: skip
        score = tl.dot(q, tile_k.T)
        if MASKED:
            score = tl.where(exists[None, :] & (start + offs_n[None, :] <= position[:, None]), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        base = new_top
        if MASKED:  # a row may have seen no key yet
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        tile_v = _load_tile(
            v, v_strides, pages, key_batch, row, head, exists,
            DV, DV_PAD, BLOCK_N, PAGE, TILE_IN_PAGE, TMA, WIDEN, MASKED,
        )  # fmt: skip
        acc = tl.dot(weight.to(tile_v.dtype), tile_v, acc * shrink[:, None])
        top = new_top
    return top, total, acc


@triton.jit
def _locate(sequences, order, owner, num_sequences, H: tl.constexpr, FIELDS: tl.constexpr, DENSE: tl.constexpr):
    """Which row of the lists, sequence, head and query block the program computes."""
    flat = tl.program_id(0)
    if DENSE:  # all sequences have one length: the last query blocks of all heads come first, for they read most
        b = flat % (num_sequences * H) // H
        h = flat % H
        i = tl.load(sequences + b * FIELDS + 6).to(tl.int32) - 1 - flat // (num_sequences * H)
    else:
        flat = tl.load(order + flat)
        b = tl.load(owner + flat)
        blocks = tl.load(sequences + b * FIELDS + 6).to(tl.int32)
        in_sequence = flat - tl.load(sequences + b * FIELDS + 7).to(tl.int32)
        h = in_sequence // blocks
        i = in_sequence % blocks
    return flat, b, h, i


@triton.jit(do_not_specialize=["num_sequences"])
def _attend(
    q_ptr, k, v, out_ptr, lse_ptr, q_strides, k_strides, v_strides, sequences, order, owner, full_count, full_index,
    partial_count, partial_index, table, table_stride, scale_log2, num_sequences,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, TILE_IN_PAGE: tl.constexpr, FIELDS: tl.constexpr,
    DENSE: tl.constexpr, LSE: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query block of one head of one sequence."""
    SUB: tl.constexpr = BLOCK // BLOCK_N
    flat, b, h, i = _locate(sequences, order, owner, num_sequences, H, FIELDS, DENSE)
    sequence = sequences + b * FIELDS
    lo = tl.load(sequence + 2).to(tl.int32)
    hi = tl.load(sequence + 3).to(tl.int32)
    key_row = tl.load(sequence + 4)
    diagonal = tl.load(sequence + 5).to(tl.int32) + i
    key_batch = tl.load(sequence + 13)
    pages = table + b.to(tl.int64) * table_stride

    # a mask may speak of blocks without a computed row; their keys may not even exist
    has_rows = (diagonal * BLOCK < hi) & (diagonal * BLOCK + BLOCK > lo)
    if DENSE:
        num_full = tl.where(has_rows, diagonal, 0)
        num_partial = tl.where(has_rows, 1, 0)
        full_list = full_index
        partial_list = full_index
    else:
        num_full = tl.where(has_rows, tl.load(full_count + flat), 0)
        num_partial = tl.where(has_rows, tl.load(partial_count + flat), 0)
        in_sequence = flat - tl.load(sequence + 7)
        full_list = full_index + tl.load(sequence + 8) + in_sequence * tl.load(sequence + 9)
        partial_list = partial_index + tl.load(sequence + 10) + in_sequence * tl.load(sequence + 11)

    position = diagonal * BLOCK + tl.arange(0, BLOCK)
    inside = (position >= lo) & (position < hi)
    offs_d = tl.arange(0, D_PAD)
    q_base = q_ptr + tl.load(sequence + 12) * q_strides[0] + h.to(tl.int64) * q_strides[2]
    q_ptrs = q_base + (tl.load(sequence + 0) + position)[:, None] * q_strides[1] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None] & (offs_d[None, :] < D), other=0.0)
    if WIDEN:
        q = q.to(tl.float32)

    # running maximum in units of log2, sum of weights, weighted sum of values
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    state = (top, tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, DV_PAD], tl.float32))
    state = _walk(  # full blocks: every query sees every key
        state, q, position, k, v, k_strides, v_strides, pages, key_batch, key_row, hi, h // G, full_list, 0,
        num_full * SUB, scale_log2, D, DV, D_PAD, DV_PAD, BLOCK, BLOCK_N, PAGE, TILE_IN_PAGE, not DENSE, TMA,
        WIDEN, False, STAGES,
    )  # fmt: skip
    top, total, acc = _walk(  # the diagonal: no key after the query, none after the last one
        state, q, position, k, v, k_strides, v_strides, pages, key_batch, key_row, hi, h // G, partial_list, diagonal,
        num_partial * SUB, scale_log2, D, DV, D_PAD, DV_PAD, BLOCK, BLOCK_N, PAGE, TILE_IN_PAGE, not DENSE, TMA,
        WIDEN, True, 1,
    )  # fmt: skip

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    out_row = tl.load(sequence + 1) + position
    offs_v = tl.arange(0, DV_PAD)
    out_ptrs = out_ptr + (out_row * H + h)[:, None] * DV + offs_v[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (offs_v[None, :] < DV))
    if LSE:
        ln2: tl.constexpr = 0.6931471805599453
        lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * ln2)
        tl.store(lse_ptr + out_row * H + h, lse, mask=inside)
