"""Triton kernels behind ``keysift.ops.key_codes``: codes of keys, projections of queries, scores, Hamming distances.

Scores are products of int8 matrices: field ``f`` of a tile of codes is masked out four bytes an instruction and left
where it is, by the query's integers of that field, which were divided by its place's value beforehand. Fields of the
upper nibble have a sum of their own, for it comes out 16 times too large. A row of a tile has several tokens where a
group has few heads: each has its columns of weights, with zeros where the others are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops import key_codes
from keysift.ops.chain_triton import chained, wait_for_previous
from keysift.ops.key_codes import STEPS, Probe, code_dim, pitch_of, tokens_a_row
from keysift.ops.paging_triton import row_offsets
from keysift.types import KV


def _masks() -> tuple[str, ...]:
    """Instructions that mask fields of 1, 2 and 4 bits, in this order."""
    bits = [((1 << planes) - 1) << low for planes in (1, 2, 4) for low in range(0, 8, planes)]
    return tuple(f"and.b32 $0, $1, 0x{mask * 0x01010101:08x};" for mask in bits)


MASKS = tl.constexpr(_masks())


@triton.jit
def entries(t, seen, place, PAGE: tl.constexpr):
    """Where side data of tokens lie: entries from the start of ``[pages, heads, PAGE]``, or of ``[B, heads, size]``;
    ``heads`` is the pitch."""
    b, head, heads, table, table_stride, size = place
    if PAGE > 0:
        page = tl.load(table + b * table_stride + t // PAGE, mask=seen, other=0).to(tl.int64)
        return (page * heads + head) * PAGE + t % PAGE
    else:
        return (b.to(tl.int64) * heads + head) * size + t


@triton.jit
def middle(start, length, origin, b, HAS_ORIGIN: tl.constexpr):
    """First token of a view, and one past the last."""
    first = tl.load(start + b)
    count = tl.load(length + b).to(tl.int32)
    if HAS_ORIGIN:
        first -= tl.load(origin + b)
    return first.to(tl.int32), first.to(tl.int32) + count


def view(kv: KV) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Start, length, origin, table and its stride; what is absent is never read."""
    start, length = kv.start.contiguous(), kv.length.contiguous()
    table = start if kv.table is None else kv.table
    return start, length, start if kv.origin is None else kv.origin.contiguous(), table, table.stride(0)


@triton.jit
def _rounded(x, WIDEN: tl.constexpr):
    """``x`` in bf16, or that in fp32 for the interpreter: it multiplies the bits of bf16, and truncates."""
    if WIDEN:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _rotated(x, w, head, D: tl.constexpr, CODE: tl.constexpr, WIDEN: tl.constexpr):
    """Rows of ``x`` times the rotation of a head; 0 past the head dim."""
    d, c = tl.arange(0, CODE), tl.arange(0, CODE)
    at = w + head * (D * D) + d[:, None] * D + c[None, :]
    to = tl.load(at, mask=(d < D)[:, None] & (c < D)[None, :], other=0.0)
    return tl.dot(_rounded(x, WIDEN), to.to(tl.float32) if WIDEN else to)


@triton.jit
def _encoded(y, square, root, STEP: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, CODE: tl.constexpr):
    """Bytes and sizes of rotated rows; ``root`` is sqrt(D)."""
    HALF: tl.constexpr = 1 << (PLANES - 1)
    FIELDS: tl.constexpr = 8 // PLANES
    unit = root / STEP / tl.sqrt(tl.maximum(square, 1e-30))
    level = tl.minimum(tl.maximum(tl.floor(y * unit[:, None]) + HALF, 0.0), 2 * HALF - 1.0)
    against = tl.sum(y * (level - (HALF - 0.5)), 1) * STEP
    size = tl.where(against > 0, square / tl.maximum(against, 1e-30), 0.0)
    field = tl.arange(0, CODE) // (CODE // FIELDS)
    placed = level.to(tl.int32) << (field * PLANES)[None, :]
    byte = tl.sum(tl.reshape(placed, (ROWS, FIELDS, CODE // FIELDS)), 1) ^ 0x80
    return byte.to(tl.uint8), tl.minimum(size, 6e4).to(tl.float16)


@triton.jit
def _hash(
    codes, size, k, mean, w, done, start, length, origin, table, table_stride, stride_0, stride_1, stride_k, heads,
    codes_pitch, size_pitch, tokens, root, D: tl.constexpr, CODE: tl.constexpr, PLANES: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, HAS_ORIGIN: tl.constexpr, WIDEN: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Codes and sizes of a tile of new rows of one KV head."""
    wait_for_previous(CHAINED)
    head, b = tl.program_id(1), tl.program_id(2)
    BYTES: tl.constexpr = CODE * PLANES // 8
    end = (tl.load(start + b) + tl.load(length + b)).to(tl.int32)
    first = tl.load(done + b).to(tl.int32) + tl.program_id(0) * ROWS
    if first < end:
        row = first + tl.arange(0, ROWS)
        seen = row < end
        d = tl.arange(0, CODE)
        at = row_offsets(row, seen, b, table, table_stride, stride_0, stride_1, PAGE)
        key = tl.load(
            k + head.to(tl.int64) * stride_k + at[:, None] + d[None, :],
            mask=seen[:, None] & (d < D)[None, :],
            other=0.0,
        )
        centre = tl.load(mean + (b * heads + head) * D + d, mask=d < D, other=0.0).to(tl.float32)
        x = tl.where(seen[:, None], key.to(tl.float32) - centre[None, :], 0.0)
        y = _rotated(x, w, head, D, CODE, WIDEN)
        byte, of_code = _encoded(y, tl.sum(x * x, 1), root, STEP, PLANES, ROWS, CODE)
        t = row
        if HAS_ORIGIN:
            t = row - tl.load(origin + b).to(tl.int32)
        entry = entries(t, seen, (b, head, codes_pitch, table, table_stride, tokens), PAGE)
        at = entry[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        tl.store(codes + at, byte, mask=seen[:, None])
        entry = entries(t, seen, (b, head, size_pitch, table, table_stride, tokens), PAGE)
        tl.store(size + entry, of_code, mask=seen)


def hash_keys(
    codes: Tensor, size: Tensor, kv: KV, mean: Tensor, w: Tensor, planes: int, done: Tensor, most: int
) -> None:
    """``keysift.ops.key_codes.hash_keys`` in one launch."""
    batch, (heads, dim, _) = kv.start.shape[0], w.shape
    if most <= 0:
        return
    k = kv.k if kv.k.stride(-1) == 1 else kv.k.contiguous()
    rows = 16 if most <= 16 else 64
    with torch.cuda.device_of(codes):
        _hash[(triton.cdiv(most, rows), heads, batch)](
            *(codes, size, k, mean.contiguous(), w.contiguous(), done.contiguous()),
            *view(kv),
            *k.stride()[:3],
            *(heads, pitch_of(codes), pitch_of(size), codes.shape[2], math.sqrt(dim)),
            D=dim,
            CODE=code_dim(dim),
            PLANES=planes,
            STEP=STEPS[planes],
            ROWS=rows,
            PAGE=0 if kv.table is None else k.shape[1],
            HAS_ORIGIN=kv.origin is not None,
            WIDEN=triton.knobs.runtime.interpret,
            num_warps=4,
            **chained(codes),
        )


@triton.jit
def _probe(
    q, w, weights, line, codes, size, k, mean, done, start, length, origin, table, table_stride,
    q_stride_b, q_stride_h, stride_0, stride_1, stride_k, heads, codes_pitch, size_pitch, tokens, root, scale,
    G: tl.constexpr, D: tl.constexpr, CODE: tl.constexpr, PLANES: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, CLIP: tl.constexpr, PAGE: tl.constexpr, HAS_ORIGIN: tl.constexpr, HASH: tl.constexpr,
    WIDEN: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The queries of one KV head's group and, with HASH, its newest key."""
    wait_for_previous(CHAINED)
    head, b = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = 1 << (PLANES - 1)
    BYTES: tl.constexpr = CODE * PLANES // 8
    row, d = tl.arange(0, ROWS), tl.arange(0, CODE)
    x = tl.load(
        q + b.to(tl.int64) * q_stride_b + (head * G + row[:, None]) * q_stride_h + d[None, :],
        mask=(row < G)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    x = _rounded(x.to(tl.float32), WIDEN).to(tl.float32)
    if HASH:
        newest = (tl.load(start + b) + tl.load(length + b)).to(tl.int32) - 1
        new = newest >= tl.load(done + b)
        at = row_offsets(newest, new, b, table, table_stride, stride_0, stride_1, PAGE)
        key = tl.load(k + head.to(tl.int64) * stride_k + at + d, mask=(d < D) & new, other=0.0).to(tl.float32)
        key -= tl.load(mean + (b * heads + head) * D + d, mask=(d < D) & new, other=0.0).to(tl.float32)
        x = tl.where((row == G)[:, None], key[None, :], x)
    square = tl.sum(x * x, 1)
    y = _rotated(x, w, head, D, CODE, WIDEN)
    many = (1 << (d // BYTES * PLANES % 4)).to(tl.float32)[None, :]
    most = tl.floor(127 / many)
    unit = tl.maximum(tl.sqrt(square) / root, 1e-30) * (CLIP / 127)
    weight = tl.minimum(tl.maximum(tl.floor(y / unit[:, None] / many + 0.5), -most), most)
    integer = weight * many
    along = tl.sum(integer * y, 1)
    slope = tl.where(along > 0, square / tl.maximum(along, 1e-30), 0.0) * scale
    shift = tl.sum(tl.where((d >= CODE - BYTES)[None, :], -0.5, HALF - 0.5) * integer, 1) * slope
    h = (b * heads * G + head * G + row).to(tl.int64)
    tl.store(weights + h[:, None] * CODE + d[None, :], weight.to(tl.int8), mask=(row < G)[:, None])
    tl.store(line + h * 2, slope, mask=row < G)
    tl.store(line + h * 2 + 1, shift, mask=row < G)
    if HASH:
        byte, of_code = _encoded(y, square, root, STEP, PLANES, ROWS, CODE)
        t = newest
        if HAS_ORIGIN:
            t = newest - tl.load(origin + b).to(tl.int32)
        entry = entries(t, new, (b, head, codes_pitch, table, table_stride, tokens), PAGE)
        at = entry * BYTES + tl.arange(0, BYTES)[None, :] + 0 * row[:, None]
        tl.store(codes + at, byte, mask=(row == G)[:, None] & new)
        entry = entries(t, new, (b, head, size_pitch, table, table_stride, tokens), PAGE)
        tl.store(size + entry + 0 * row, of_code, mask=(row == G) & new)


def probe(
    q: Tensor,
    w: Tensor,
    planes: int,
    scale: float,
    new: tuple[Tensor, Tensor, KV, Tensor, Tensor] | None = None,
) -> Probe:
    """The queries' side of scores and, with ``new``, ``hash_keys`` of at most one row, in one launch."""
    (batch, heads, dim), kv_heads = q.shape, w.shape[0]
    q = q if q.stride(-1) == 1 else q.contiguous()
    group, code = heads // kv_heads, code_dim(dim)
    out = Probe(
        torch.empty(batch, heads, code, dtype=torch.int8, device=q.device),
        torch.empty(batch, heads, 2, dtype=torch.float32, device=q.device),
    )
    side: tuple[object, ...] = (*(q,) * 9, 0)
    strides: tuple[int, ...] = (0, 0, 0)
    pitches, tokens, page, origin = (0, 0), 0, 0, False
    if new is not None:
        codes, size, kv, mean, done = new
        k = kv.k if kv.k.stride(-1) == 1 else kv.k.contiguous()
        side = (codes, size, k, mean.contiguous(), done.contiguous(), *view(kv))
        strides, tokens, page = k.stride()[:3], codes.shape[2], 0 if kv.table is None else k.shape[1]
        pitches, origin = (pitch_of(codes), pitch_of(size)), kv.origin is not None
    with torch.cuda.device_of(q):
        _probe[(kv_heads, batch)](
            *(q, w.contiguous(), *out),
            *side,
            *q.stride()[:2],
            *strides,
            *(kv_heads, *pitches, tokens, math.sqrt(dim), scale * STEPS[planes] * key_codes.LOG2E),
            G=group,
            D=dim,
            CODE=code,
            PLANES=planes,
            STEP=STEPS[planes],
            ROWS=max(16, triton.next_power_of_2(group + 1)),
            CLIP=key_codes.CLIP,
            PAGE=page,
            HAS_ORIGIN=origin,
            HASH=new is not None,
            WIDEN=triton.knobs.runtime.interpret,
            num_warps=4,
            **chained(q),
        )
    return out


@triton.jit
def _masked(codes, f: tl.constexpr, FIELDS: tl.constexpr, INTERPRET: tl.constexpr):
    """Field f of every byte, where it is: as int8, four at a time."""
    if FIELDS == 1:
        out = codes.to(tl.int8, bitcast=True)
    elif INTERPRET:
        out = (codes & (((1 << (8 // FIELDS)) - 1) << (8 // FIELDS * f))).to(tl.int8, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            MASKS[16 - 2 * FIELDS + f], "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )  # fmt: skip
    return out


@triton.jit
def _product(codes, weights, acc, INTERPRET: tl.constexpr):
    if INTERPRET:
        return acc + tl.dot(codes.to(tl.float32), weights.to(tl.float32)).to(tl.int32)
    else:
        return tl.dot(codes, weights, acc, out_dtype=tl.int32)


@triton.jit
def lines_of_group(
    weights, line, h, G: tl.constexpr, G_PAD: tl.constexpr, PER: tl.constexpr, CODE: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """A group's weights, a matrix a field, slopes and shifts: column ``r * G_PAD + g`` is token r of a row and head g
    of the group."""
    BYTES: tl.constexpr = CODE // FIELDS
    k, column = tl.arange(0, PER * BYTES), tl.arange(0, PER * G_PAD)
    g = column % G_PAD
    own = (k[:, None] // BYTES == column[None, :] // G_PAD) & (g < G)[None, :]
    at = (h + g)[None, :] * CODE + k[:, None] % BYTES
    fields = ()
    for f in tl.static_range(FIELDS):
        fields = fields + (tl.load(weights + at + f * BYTES, mask=own, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    slope = tl.load(line + (h + g) * 2, mask=g < G, other=0.0)
    shift = tl.load(line + (h + g) * 2 + 1, mask=g < G, other=0.0)
    return fields, slope, shift


@triton.jit
def scores(codes, query, FIELDS: tl.constexpr, INTERPRET: tl.constexpr):
    """Scores of rows of codes but for the sizes, fp32 ``[rows, columns]``."""
    weights, slope, shift = query
    low = tl.zeros((codes.shape[0], weights[0].shape[1]), tl.int32)
    high = low
    for f in tl.static_range(FIELDS):
        if FIELDS > 1 and f >= FIELDS // 2:
            high = _product(_masked(codes, f, FIELDS, INTERPRET), weights[f], high, INTERPRET)
        else:
            low = _product(_masked(codes, f, FIELDS, INTERPRET), weights[f], low, INTERPRET)
    if FIELDS > 1:
        low += high >> 4
    return low.to(tl.float32) * slope[None, :] - shift[None, :]


def shapes(heads: int, codes: Tensor, planes: int) -> dict[str, int]:
    """The constants of kernels that score."""
    per = tokens_a_row(heads, codes.shape[3])
    pad = max(triton.next_power_of_2(heads), 8 // per)
    return {"G": heads, "G_PAD": pad, "PER": per, "CODE": codes.shape[3] * 8 // planes, "FIELDS": 8 // planes}


@triton.jit
def _popcount(x, INTERPRET: tl.constexpr):
    if INTERPRET:
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _hamming(
    out, q_codes, codes, start, length, origin, table, table_stride, heads, pitch, size, tokens,
    G: tl.constexpr, WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
    HAS_ORIGIN: tl.constexpr, INTERPRET: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Distances of a tile of keys from every query of the group; codes are words here."""
    wait_for_previous(CHAINED)
    head, b = tl.program_id(1), tl.program_id(2)
    begin, end = middle(start, length, origin, b, HAS_ORIGIN)
    t, word = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WORDS_PAD)
    seen = (t >= begin) & (t < end)
    h = (b * heads + head).to(tl.int64)
    entry = entries(t, seen, (b, head, pitch, table, table_stride, size), PAGE)
    code = tl.load(
        codes + entry[:, None] * WORDS + word[None, :], mask=seen[:, None] & (word < WORDS)[None, :], other=0
    )
    for g in tl.static_range(G):
        of_query = tl.load(q_codes + (h * G + g) * WORDS + word, mask=word < WORDS, other=0)
        differ = (code ^ of_query[None, :]).to(tl.uint32, bitcast=True)
        tl.store(out + (h * tokens + t) * G + g, tl.sum(_popcount(differ, INTERPRET), 1).to(tl.int16), mask=seen)


def hamming_distance(q_codes: Tensor, codes: Tensor, kv: KV) -> Tensor:
    """``keysift.ops.key_codes.hamming_distance`` in one launch."""
    batch, heads, bytes_ = q_codes.shape
    kv_heads, size, tokens = *codes.shape[1:3], kv.bound
    group, tile = heads // kv_heads, 256
    out = torch.empty(batch, kv_heads, tokens, group, dtype=torch.int16, device=codes.device)
    if not out.numel():
        return out
    if bytes_ % 4:  # head dims of 16: as words of 32 bits
        q_codes, codes = (torch.nn.functional.pad(x, (0, -bytes_ % 4)) for x in (q_codes, codes))
    with torch.cuda.device_of(codes):
        _hamming[(triton.cdiv(tokens, tile), kv_heads, batch)](
            *(out, q_codes.contiguous().view(torch.int32), codes.view(torch.int32)),
            *view(kv),
            *(kv_heads, pitch_of(codes), size, tokens),
            G=group,
            WORDS=codes.shape[3] // 4,
            WORDS_PAD=triton.next_power_of_2(codes.shape[3] // 4),
            TILE=tile,
            PAGE=0 if kv.table is None else size,
            HAS_ORIGIN=kv.origin is not None,
            INTERPRET=triton.knobs.runtime.interpret,
            num_warps=4,
            **chained(codes),
        )
    return out
