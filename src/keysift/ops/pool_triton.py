"""The kernel that matches tables of a pool: what each bit says of a key is read once for all tables and query heads."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops import codes_triton, pool
from keysift.ops.chain_triton import chained, wait_for_previous
from keysift.ops.codes_triton import INTERPRET, WORDS, entry_offset, over_lanes, parts_of, words_of
from keysift.ops.paging_triton import programs
from keysift.types import KV, Law, Selection

PAIRS = tl.constexpr(pool.PAIRS)
HEADS = 4  # query heads that a program serves: what it counts for them stays in registers
ENTRIES = 4  # of 128 tokens, that a program matches at a time where it has so many lanes
LANES = 16  # words of the pool that are matched at a time, each by other threads, at most
FEW = 4  # of them that still read 64 bytes in a row
WIDE = 2  # words of tokens that a thread takes at a time, 1, 2 or 4: registers against how often signs are spread
WARPS = 4


@triton.jit
def _sign(code, BIT: tl.constexpr):
    """A word whose bits are all what bit ``BIT`` of ``code`` is."""
    if INTERPRET:
        word = (code << (31 - BIT)) >> 31
    else:
        shifted = code << (7 - BIT % 8)  # the bit is the sign of a byte, which a permutation can repeat
        if BIT // 8 == 0:
            word = tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x8888;", "=r,r", [shifted], tl.int32, True, 1)
        elif BIT // 8 == 1:
            word = tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x9999;", "=r,r", [shifted], tl.int32, True, 1)
        elif BIT // 8 == 2:
            word = tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0xaaaa;", "=r,r", [shifted], tl.int32, True, 1)
        else:
            word = tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0xbbbb;", "=r,r", [shifted], tl.int32, True, 1)
    return word


@triton.jit
def _any(a, b, c):
    """``a | b | c`` as one operation, which the compiler would share among tables and so make two."""
    if INTERPRET:
        word = a | b | c
    else:
        word = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xfe;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
    return word


@triton.jit
def _differ(first, pair, MASK: tl.constexpr, BITS: tl.constexpr):
    """Keys that differ from the query in some bit of a table."""
    parts = ()
    for i in tl.static_range(PAIRS):
        if MASK >> (2 * i + 1) & 1:
            parts += (pair[i],)  # type: ignore[assignment]
        elif MASK >> (2 * i) & 1:
            parts += (first[i],)  # type: ignore[assignment]
    number: tl.constexpr = (BITS + 1) // 2
    differs = parts[0]  # type: ignore[misc]
    for i in tl.static_range(1, number - 1, 2):
        differs = _any(differs, parts[i], parts[i + 1])
    if number % 2 == 0:
        differs |= parts[number - 1]
    return differs


@triton.jit
def _counted(once, twice, a, b):
    """Keys that are in one table and more, and in two and more, with those that do not differ in tables a and b."""
    if INTERPRET:
        both = (once & ~(a & b)) | ~(a | b)
        once = once | ~(a & b)
    else:  # as one operation each, which the compiler does not find
        both = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0x71;", "=r,r,r,r", [once, a, b], tl.int32, True, 1)
        once = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xf7;", "=r,r,r,r", [once, a, b], tl.int32, True, 1)
    return once, twice | both


@triton.jit
def _tables(
    plane, code, once, twice, without, without_last, BITS: tl.constexpr, MASKS: tl.constexpr, TABLES: tl.constexpr
):
    """Count the tables of a word in which keys agree with a query; ``without`` has all bits set where there is none."""
    first = ()
    pair = ()
    for i in tl.static_range(PAIRS):
        one = plane[2 * i] ^ _sign(code, 2 * i)
        first += (one,)  # type: ignore[assignment]
        pair += (one | (plane[2 * i + 1] ^ _sign(code, 2 * i + 1)),)  # type: ignore[assignment]
    for t in tl.static_range(0, TABLES, 2):
        a = _differ(first, pair, MASKS[t], BITS) | without
        if t + 1 == TABLES:
            a |= without_last
            once, twice = once | ~a, twice | (once & ~a)
        else:
            b = _differ(first, pair, MASKS[t + 1], BITS) | without
            if t + 2 == TABLES:
                b |= without_last
            once, twice = _counted(once, twice, a, b)
    return once, twice


@triton.jit
def _match(
    codes, planes, parts, table, start, length, origin, table_stride, strides, entries,
    K: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, POOL: tl.constexpr, BITS: tl.constexpr,
    MASKS: tl.constexpr, TABLES: tl.constexpr, LAST: tl.constexpr, ENTRIES: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, PAGE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Keys of some entries with two tables in common with the queries of a few heads; ``POOL`` words hold the bits.

    Each has tables ``MASKS``, but only the first ``LAST`` words have the last of them.
    """
    wait_for_previous(CHAINED)
    groups: tl.constexpr = (G + HEADS - 1) // HEADS
    pair_of = tl.program_id(1) // groups
    head = tl.program_id(1) % groups * HEADS
    batch, k_head = pair_of // K, pair_of % K
    low, high, first, stop = parts_of(batch, start, length, origin, ENTRIES, PAGE)
    pieces: tl.constexpr = WORDS // WIDE
    lane = tl.arange(0, ENTRIES * LANES * pieces)  # the pieces of a plane side by side, then words of the pool
    none = tl.zeros([ENTRIES * LANES * pieces, WIDE], tl.int32)
    for part in range(first, stop, tl.num_programs(0)):
        # lanes without an entry or a word of their own read another's, so that loads need no mask
        entry = tl.minimum(tl.maximum(part * ENTRIES + lane // (LANES * pieces), low), high)
        offset = entry_offset(entry, True, batch, k_head, table, table_stride, strides, PAGE) * WORDS
        planes_at = planes + (offset + lane % pieces * WIDE)[:, None] + tl.arange(0, WIDE)[None, :]
        of_group = codes + (pair_of * G).to(tl.int64) * POOL
        once = (none,) * HEADS
        twice = (none,) * HEADS
        for turn in tl.range(0, (POOL + LANES - 1) // LANES):
            at = (turn * LANES + lane // pieces % LANES)[:, None]
            without = 0 if POOL % LANES == 0 else tl.where(at < POOL, 0, -1)  # as if all keys differed
            without_last = tl.where(at < LAST, 0, -1)
            at = tl.minimum(at, POOL - 1)
            plane = ()
            for bit in tl.static_range(2 * PAIRS):
                plane += (tl.load(planes_at + (bit * POOL + at) * WORDS),)  # type: ignore[assignment]
            new_once = ()
            new_twice = ()
            for g in tl.static_range(HEADS):
                code = tl.load(of_group + tl.minimum(head + g, G - 1) * POOL + at)
                one, two = _tables(plane, code, once[g], twice[g], without, without_last, BITS, MASKS, TABLES)
                new_once += (one,)  # type: ignore[assignment]
                new_twice += (two,)  # type: ignore[assignment]
            once = new_once
            twice = new_twice
        to, kept = words_of(part, entries, ENTRIES)
        for g in tl.static_range(HEADS):
            _, two = over_lanes(once[g], twice[g], ENTRIES, LANES)
            row = (pair_of * G + head + g).to(tl.int64)
            tl.store(parts + row * entries * WORDS + to, two, mask=kept & (head + g < G))


def collisions(codes_BHW: Tensor, planes: Tensor, kv: KV, bits: int, law: Law | None, tables: int) -> Selection:
    """As ``codes.collisions`` for tables of a pool: two launches, which depend on shapes and ``kv.bound`` alone."""
    batch, heads, words = codes_BHW.shape
    kv_heads, group = planes.shape[1], heads // planes.shape[1]
    entries = codes_triton.entries_of(kv)
    masks = pool.tables_of_word(bits, -(-tables // words))
    parts = torch.empty(batch * heads, entries * WORDS.value, dtype=torch.int32, device=planes.device)
    together, lanes = min(HEADS, triton.next_power_of_2(group)), math.gcd(words, LANES)
    if lanes < FEW:  # some lanes without a word are better than so short a stretch of memory
        lanes = min(LANES, triton.next_power_of_2(words))
    block = ENTRIES * LANES // lanes  # as many threads in any case
    if parts.numel():
        with torch.cuda.device_of(planes):
            rows = batch * kv_heads * -(-group // together)
            _match[(programs(-(-entries // block), rows, codes_triton.MOST_PROGRAMS), rows)](
                *(codes_BHW, planes, parts, kv.table, kv.start, kv.length, kv.origin),
                *(0 if kv.table is None else kv.table.stride(0), codes_triton.entry_strides(planes), entries),
                K=kv_heads, G=group, HEADS=together, POOL=words, BITS=bits, MASKS=masks, TABLES=len(masks),
                LAST=tables - (len(masks) - 1) * words, ENTRIES=block, LANES=lanes, WIDE=WIDE,
                PAGE=codes_triton.page_of(kv), num_warps=WARPS, **chained(planes),
            )  # fmt: skip
    return codes_triton.listed(parts, kv, batch, heads, 1, law)
