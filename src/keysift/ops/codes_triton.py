"""The kernels behind ``keysift.ops.codes``: hash keys and queries, match their codes, list the keys that collide.

``codes`` says how codes are stored. A page that is no multiple of an entry leaves the rest of its last one unused, so
words and entries are counted page by page.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from keysift.ops import codes
from keysift.ops.chain_triton import chained, wait_for_previous
from keysift.ops.paging_triton import programs, row_offsets
from keysift.types import KV, Law, Selection

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
WORDS = tl.constexpr(codes.WORDS)
ENTRIES = 16  # matched by a program at a time: 4 a warp, whose lanes meet only once, when all tables have been counted
TABLES = 8  # compared at a time: 8 lanes read 128 bytes in a row
STAGES = 3  # of the pipeline that brings them
PROGRAMS = 512  # fill a large GPU; where there are fewer they split the tables
MAX_SPLITS = 8
MOST_PROGRAMS = 32768  # more than what fits into a large GPU's memory has parts
WORD_TILE = 512  # words that a program lists at a time
WORDS_BEFORE = 2048  # and of those before them, which it counts, at a time
GROUPS = 4  # words of 32 tokens that a program hashes together; of fp32 keys, which take twice the room, half as many
PLANES = 64  # hashed at a time
TOGETHER = 24  # tiles of so many planes that a program hashes at a prefill


@triton.jit
def place(token, width: tl.constexpr, PAGE: tl.constexpr):
    """Which group of ``width`` tokens holds a token, where each page begins a new one."""
    at = token // PAGE * ((PAGE + width - 1) // width) + token % PAGE // width if PAGE > 0 else token // width
    return at


@triton.jit
def _tokens_of(at, width: tl.constexpr, PAGE: tl.constexpr):
    """First token of a group, and one past its last."""
    if PAGE > 0:
        groups = (PAGE + width - 1) // width
        token = at // groups * PAGE + at % groups * width
        stop = tl.minimum(token + width, (at // groups + 1) * PAGE)
    else:
        token = at * width
        stop = token + width
    return token, stop


@triton.jit
def span(b, start, length, origin, seen):
    """Tokens at which the views of sequences begin and end, and the buffer row of their token 0."""
    first = tl.load(start + b, mask=seen, other=0)
    end = first + tl.load(length + b, mask=seen, other=0)
    zero = first * 0
    if origin is not None:
        zero = tl.load(origin + b, mask=seen, other=0)
    return (first - zero).to(tl.int32), (end - zero).to(tl.int32), zero.to(tl.int32)


@triton.jit
def entry_offset(entry, seen, b, k_head, table, table_stride, strides, PAGE: tl.constexpr):
    """Where an entry lies, int64, in units of ``WORDS`` words."""
    if PAGE > 0:
        entries = (PAGE + 32 * WORDS - 1) // (32 * WORDS)
        of_page = tl.load(table + b * table_stride + entry // entries, mask=seen, other=0).to(tl.int64)
        slot = entry % entries
    else:
        of_page = (entry * 0 + b).to(tl.int64)
        slot = entry
    return of_page * strides[0] + k_head.to(tl.int64) * strides[1] + tl.where(seen, slot, 0).to(tl.int64) * strides[2]


@triton.jit
def parts_of(b, start, length, origin, ENTRIES: tl.constexpr, PAGE: tl.constexpr):
    """First and last entry of a sequence's view, the first part of ``ENTRIES`` that this program matches, and one past
    the last that any does."""
    begin, end, _ = span(b, start, length, origin, True)
    low = place(begin, 32 * WORDS, PAGE)
    high = place(tl.maximum(end - 1, 0), 32 * WORDS, PAGE)
    return low, high, low // ENTRIES + tl.program_id(0), tl.where(begin < end, high // ENTRIES + 1, 0)


@triton.jit
def _bits_between(low, high):
    """A word whose bits ``low .. high - 1`` are set, of what lies in 0 .. 31."""
    one = (low * 0 + 1).to(tl.int64)
    below = (one << tl.minimum(tl.maximum(low, 0), 32)) - 1
    return (((one << tl.minimum(tl.maximum(high, 0), 32)) - 1) & ~below).to(tl.int32)


@triton.jit
def _ones(word):
    """How many bits of a word are set."""
    if INTERPRET:
        x = word.to(tl.uint32)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        number = ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
    else:
        number = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    return number


@triton.jit
def _either(once_a, twice_a, once_b, twice_b):
    """At least once and at least twice in two sets of tables together."""
    return once_a | once_b, twice_a | twice_b | (once_a & once_b)


@triton.jit
def over_lanes(once, twice, ENTRIES: tl.constexpr, LANES: tl.constexpr):
    """At least once and at least twice in the tables of all lanes of an entry."""
    once = tl.reshape(once, [ENTRIES, LANES, WORDS])
    return tl.reduce((once, tl.reshape(twice, [ENTRIES, LANES, WORDS])), 1, _either)


@triton.jit
def words_of(part, entries, ENTRIES: tl.constexpr):
    """Words of the entries of a part, and which of these entries there are."""
    entry = part * ENTRIES + tl.arange(0, ENTRIES)
    return entry[:, None] * WORDS + tl.arange(0, WORDS)[None, :], (entry < entries)[:, None]


# ---- matching -------------------------------------------------------------------------------------------------------


@triton.jit
def _match(
    codes, planes, parts, table, start, length, origin, table_stride, strides, entries,
    K: tl.constexpr, G: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr,
    TABLES: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """What some tables say of the keys of some entries, for each query head of a group."""
    wait_for_previous(CHAINED)
    b, k_head = tl.program_id(1) // K, tl.program_id(1) % K
    split = tl.program_id(2)
    low, high, first, stop = parts_of(b, start, length, origin, ENTRIES, PAGE)
    lane = tl.arange(0, ENTRIES * TABLES)  # tables of an entry side by side
    none = tl.zeros([ENTRIES * TABLES, WORDS], tl.int32)
    chunks: tl.constexpr = (L + TABLES - 1) // TABLES
    per: tl.constexpr = (chunks + SPLITS - 1) // SPLITS
    for part in range(first, stop, tl.num_programs(0)):
        # lanes without an entry or a table of their own read another's, so that loads need no mask
        entry = tl.minimum(tl.maximum(part * ENTRIES + lane // TABLES, low), high)
        offset = entry_offset(entry, True, b, k_head, table, table_stride, strides, PAGE) * WORDS
        planes_at = planes + offset[:, None] + tl.arange(0, WORDS)[None, :]
        of_group = codes + (tl.program_id(1) * G).to(tl.int64) * L
        once = (none,) * G
        twice = (none,) * G
        for chunk in tl.range(split * per, tl.minimum((split + 1) * per, chunks), num_stages=STAGES):
            at = (chunk * TABLES + lane % TABLES)[:, None]
            no_table = tl.where(at < L, 0, -1)
            at = tl.minimum(at, L - 1)
            plane = ()
            for bit in tl.static_range(BITS):
                plane += (tl.load(planes_at + at * WORDS + bit * L * WORDS),)  # type: ignore[assignment]
            new_once = ()
            new_twice = ()
            for g in tl.static_range(G):
                code = tl.load(of_group + g * L + at)
                differs = no_table
                for bit in tl.static_range(BITS):
                    differs = differs | (plane[bit] ^ ((code << (31 - bit)) >> 31))
                new_twice += (twice[g] | (once[g] & ~differs),)  # type: ignore[assignment]
                new_once += (once[g] | ~differs,)  # type: ignore[assignment]
            once = new_once
            twice = new_twice
        to, kept = words_of(part, entries, ENTRIES)
        for g in tl.static_range(G):
            one, two = over_lanes(once[g], twice[g], ENTRIES, TABLES)
            row = (tl.program_id(1) * G + g).to(tl.int64) * SPLITS + split
            if SPLITS > 1:
                tl.store(parts + 2 * row * entries * WORDS + to, one, mask=kept)
                tl.store(parts + (2 * row + 1) * entries * WORDS + to, two, mask=kept)
            else:
                tl.store(parts + row * entries * WORDS + to, two, mask=kept)


@triton.jit
def _collided(parts, bh, at, seen, begin, end, entries, PAGE: tl.constexpr, SPLITS: tl.constexpr):
    """Words of the keys of a view with two tables in common with the query, and the first token of each."""
    once = at * 0
    twice = at * 0
    for split in tl.static_range(SPLITS):
        if SPLITS > 1:
            row = (bh.to(tl.int64) * SPLITS + split) * 2 * entries * WORDS
            one = tl.load(parts + row + at, mask=seen, other=0)
            two = tl.load(parts + row + entries * WORDS + at, mask=seen, other=0)
            once, twice = _either(once, twice, one, two)
        else:
            twice = tl.load(parts + bh.to(tl.int64) * entries * WORDS + at, mask=seen, other=0)
    token, stop = _tokens_of(at // WORDS, 32 * WORDS, PAGE)
    token += at % WORDS * 32
    return tl.where(seen, twice, 0) & _bits_between(begin - token, tl.minimum(end, stop) - token), token


@triton.jit
def _list(
    parts, rows, count, start, length, origin, entries, width, H: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, BEFORE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The rows of the bits that are set in tiles of words, those of each behind those of the words before it."""
    wait_for_previous(CHAINED)
    bh = tl.program_id(1)
    begin, end, zero = span(bh // H, start, length, origin, True)
    low = place(begin, 32 * WORDS, PAGE) * WORDS
    high = (place(tl.maximum(end - 1, 0), 32 * WORDS, PAGE) + 1) * WORDS
    high = tl.where(begin < end, tl.minimum(high, entries * WORDS), 0)
    if (high == 0) & (tl.program_id(0) == 0):
        tl.store(count + bh, 0)
    rows += bh.to(tl.int64) * width
    for mine in range(tl.program_id(0) * TILE, high, tl.num_programs(0) * TILE):
        number = tl.zeros([BEFORE], tl.int32)
        for some in range(low // BEFORE * BEFORE, mine, BEFORE):
            at = some + tl.arange(0, BEFORE)
            word, _ = _collided(parts, bh, at, (at >= low) & (at < mine), begin, end, entries, PAGE, SPLITS)
            number += _ones(word)
        listed = tl.sum(number)
        at = mine + tl.arange(0, TILE)
        word, token = _collided(parts, bh, at, (at >= low) & (at < high), begin, end, entries, PAGE, SPLITS)
        number = _ones(word)
        slot = listed + tl.cumsum(number, 0) - number
        for _ in range(tl.max(number)):
            lowest = word & -word
            tl.store(rows + slot, zero + token + _ones(lowest - 1), mask=word != 0)
            slot += 1
            word ^= lowest
        if mine + TILE >= high:
            tl.store(count + bh, listed + tl.sum(number))


def collisions(codes_BHL: Tensor, planes: Tensor, kv: KV, bits: int, law: Law | None) -> Selection:
    """As ``codes.collisions``: two launches, which depend on nothing but shapes and ``kv.bound``."""
    batch, heads, tables = codes_BHL.shape
    kv_heads, entries = planes.shape[1], entries_of(kv)
    blocks = -(-entries // ENTRIES)
    splits = 1
    while splits < min(MAX_SPLITS, tables // TABLES) and splits * blocks * batch * kv_heads < PROGRAMS:
        splits *= 2
    rows = batch * heads * splits * (2 if splits > 1 else 1)
    parts = torch.empty(rows, entries * codes.WORDS, dtype=torch.int32, device=planes.device)
    if parts.numel():
        with torch.cuda.device_of(planes):
            _match[(programs(blocks, batch * kv_heads * splits, MOST_PROGRAMS), batch * kv_heads, splits)](
                *(codes_BHL, planes, parts, kv.table, kv.start, kv.length, kv.origin),
                *(0 if kv.table is None else kv.table.stride(0), entry_strides(planes), entries),
                K=kv_heads, G=heads // kv_heads, L=tables, BITS=bits, ENTRIES=ENTRIES, TABLES=TABLES,
                PAGE=page_of(kv), SPLITS=splits, STAGES=STAGES, num_warps=4, **chained(planes),
            )  # fmt: skip
    return listed(parts, kv, batch, heads, splits, law)


def listed(parts: Tensor, kv: KV, batch: int, heads: int, splits: int, law: Law | None) -> Selection:
    """The rows of a view that ``parts`` say collide."""
    device = parts.device
    rows = torch.empty(batch, heads, kv.bound, dtype=torch.int32, device=device)
    if not rows.numel():
        return Selection(rows, torch.zeros(batch, heads, dtype=torch.int32, device=device), law)
    count = torch.empty(batch, heads, dtype=torch.int32, device=device)
    with torch.cuda.device_of(parts):
        _list[(programs(-(-parts.shape[1] // WORD_TILE), batch * heads, MOST_PROGRAMS), batch * heads)](
            *(parts, rows, count, kv.start, kv.length, kv.origin, parts.shape[1] // codes.WORDS, kv.bound),
            H=heads, PAGE=page_of(kv), SPLITS=splits, TILE=WORD_TILE, BEFORE=WORDS_BEFORE, num_warps=4,
            **chained(parts),
        )  # fmt: skip
    return Selection(rows, count, law)


def entries_of(kv: KV) -> int:
    """Entries that a view may reach."""
    page = page_of(kv)
    return -(-kv.bound // page) * -(-page // codes.UNIT) if page else -(-kv.bound // codes.UNIT)


def page_of(kv: KV) -> int:
    """Tokens of a page, or 0 where rows lie in one piece."""
    return 0 if kv.table is None else kv.k.shape[1]


def entry_strides(planes: Tensor) -> tuple[int, ...]:
    """Of pages, heads and entries, in units of ``WORDS`` words."""
    return tuple(stride // codes.WORDS for stride in planes.stride()[:3])


# ---- hashing --------------------------------------------------------------------------------------------------------


@triton.jit
def _new_word(job, jobs, per, start, length, origin, done, PAGE: tl.constexpr):
    """A word with new tokens: its sequence, number and first token, and where its new tokens begin and end."""
    seen = job < jobs
    b = tl.where(seen, job // per, 0)
    begin, end, zero = span(b, start, length, origin, seen)
    low = tl.maximum(begin, tl.load(done + b, mask=seen, other=0).to(tl.int32) - zero)
    at = place(low, 32, PAGE) + job % per
    token, stop = _tokens_of(at, 32, PAGE)
    low = tl.maximum(low, token)
    return b, at, token, low, tl.where(seen, tl.minimum(end, stop), low), zero


@triton.jit(do_not_specialize_on_alignment=["jobs", "per"])  # or prompts of other lengths would be other kernels
def _hash(
    k, w, mean, threshold, planes, table, start, length, origin, done, k_strides, table_stride, w_stride, strides,
    jobs, per, tiles,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr,
    PLANES: tl.constexpr, STAGES: tl.constexpr, ROUNDED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Words of some planes for a few groups of 32 tokens, perhaps of several sequences."""
    wait_for_previous(CHAINED)
    k_head = tl.program_id(1)
    d = tl.arange(0, D_PAD)
    of_token = tl.program_id(0) * GROUPS + tl.arange(0, 32 * GROUPS) // 32
    b, _, token, low, high, zero = _new_word(of_token, jobs, per, start, length, origin, done, PAGE)
    token += tl.arange(0, 32 * GROUPS) % 32
    new = (token >= low) & (token < high)
    row = row_offsets(token + zero, new, b, table, table_stride, k_strides[0], k_strides[1], PAGE)
    k += k_head.to(tl.int64) * k_strides[2]
    inside = new[:, None] & (d < D)[None, :]
    x = tl.load(k + row[:, None] + d[None, :] * k_strides[3], mask=inside, other=0.0)
    if ROUNDED:
        of_mean = (b * K + k_head).to(tl.int64) * D
        x = (x.to(tl.float32) - tl.load(mean + of_mean[:, None] + d[None, :], mask=inside, other=0.0)).to(x.dtype)
    if WIDEN:
        x = x.to(tl.float32)
    x = tl.trans(x)

    job = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    b, at, token, low, high, zero = _new_word(job, jobs, per, start, length, origin, done, PAGE)
    fresh = _bits_between(low - token, high - token)
    live = fresh != 0
    in_page = at
    entry = at // WORDS
    if PAGE > 0:
        in_page = at % ((PAGE + 31) // 32)
        entry = at // ((PAGE + 31) // 32) * ((PAGE + 32 * WORDS - 1) // (32 * WORDS)) + in_page // WORDS
    offset = entry_offset(entry, live, b, k_head, table, table_stride, strides, PAGE) * WORDS
    planes += (offset + in_page % WORDS)[None, :]
    threshold += ((b * K + k_head).to(tl.int64) * N)[None, :]
    w += k_head.to(tl.int64) * w_stride
    bit = (1 << tl.arange(0, 32))[None, None, :]
    last = tl.minimum((tl.program_id(2) + 1) * tiles, (N + PLANES - 1) // PLANES)
    for tile in tl.range(tl.program_id(2) * tiles, last, num_stages=STAGES):
        plane = tile * PLANES + tl.arange(0, PLANES)
        known = (plane < N)[:, None]
        directions = tl.load(w + plane[:, None] * D + d[None, :], mask=known & (d < D)[None, :], other=0.0)
        product = tl.dot(directions.to(x.dtype), x, input_precision=PRECISION)
        product = tl.reshape(product, [PLANES, GROUPS, 32])
        if ROUNDED:
            word = tl.sum(tl.where(product > 0, bit, 0), 2)
        else:
            least = tl.load(threshold + plane[:, None], mask=known & live[None, :], other=0.0)
            word = tl.sum(tl.where(product > least[:, :, None], bit, 0), 2)
        to = planes + plane[:, None] * WORDS
        kept = known & live[None, :]
        old = tl.load(to, mask=kept & (fresh != -1)[None, :], other=0)
        tl.store(to, (old & ~fresh[None, :]) | (word.to(tl.int32) & fresh[None, :]), mask=kept)


@triton.jit
def _hash_queries(
    q, w, codes, q_strides, w_stride, columns,
    L: tl.constexpr, BITS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    TABLES: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Bytes of the codes of some tables for the query heads of a KV head, of as many sequences as fit."""
    wait_for_previous(CHAINED)
    k_head = tl.program_id(1) // BYTES
    byte = tl.program_id(1) % BYTES
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    b, h = column // G, k_head * G + column % G
    known = column < columns
    d = tl.arange(0, D_PAD)
    q_at = q + b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1]
    inside = known[None, :] & (d < D)[:, None]
    x = tl.load(q_at[None, :] + d[:, None] * q_strides[2], mask=inside, other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    row = tl.arange(0, TABLES * 8)  # eight bits of each table, whose products are taken at once
    at, bit = tl.program_id(0) * TABLES + row // 8, byte * 8 + row % 8
    w_at = w + k_head.to(tl.int64) * w_stride + (bit * L + at)[:, None] * D + d[None, :]
    directions = tl.load(w_at, mask=((at < L) & (bit < BITS))[:, None] & (d < D)[None, :], other=0.0)
    product = tl.dot(directions.to(x.dtype), x, input_precision=PRECISION)
    product = tl.reshape(product, [TABLES, 8, COLUMNS])  # 0 where there is no such bit
    code = tl.sum(tl.where(product > 0, (1 << tl.arange(0, 8))[None, :, None], 0), 1)
    at = tl.program_id(0) * TABLES + tl.arange(0, TABLES)
    to = codes + ((b.to(tl.int64) * H + h)[None, :] * L + at[:, None]) * BYTES + byte
    tl.store(to, code.to(tl.uint8), mask=(at < L)[:, None] & known[None, :])


def hash_planes(
    planes: Tensor, kv: KV, mean_BKD: Tensor, threshold_BKN: Tensor | None, w: Tensor, done: Tensor, most: int
) -> None:
    """As ``codes.hash_planes``; a program owns the words it writes."""
    batch, (kv_heads, dim), columns = done.shape[0], kv.k.shape[2:], w.shape[1]
    page, most = page_of(kv), min(most, kv.bound)
    per = (most + 30) // 32 + 1 if page % 32 == 0 else ((most + page - 2) // page + 1) * -(-page // 32)
    groups = min(GROUPS if kv.k.element_size() <= 2 else GROUPS // 2, triton.next_power_of_2(batch * per))
    blocks, tiles = -(-batch * per // groups), -(-columns // PLANES)
    together = TOGETHER if blocks * kv_heads >= PROGRAMS else 1
    if not most:
        return
    with torch.cuda.device_of(planes):
        _hash[(blocks, kv_heads, -(-tiles // together))](
            *(kv.k, w, mean_BKD, mean_BKD if threshold_BKN is None else threshold_BKN, planes, kv.table),
            *(kv.start, kv.length, kv.origin, done.contiguous(), kv.k.stride()),
            *(0 if kv.table is None else kv.table.stride(0), 0 if w.shape[0] == 1 else w.stride(0)),
            *(entry_strides(planes), batch * per, per, together),
            N=columns, K=kv_heads, D=dim, D_PAD=max(16, triton.next_power_of_2(dim)),
            PAGE=page, GROUPS=groups, PLANES=PLANES, STAGES=3 if together > 1 else 1,
            ROUNDED=threshold_BKN is None, **_product(), num_warps=4, **chained(planes),
        )  # fmt: skip


def hash_query(q_BHD: Tensor, w: Tensor, bits: int) -> Tensor:
    """As ``codes.hash_query``; up to 64 query heads read the directions together."""
    (batch, heads, dim), (kv_heads, columns, _) = q_BHD.shape, w.shape
    tables, queries = columns // bits, batch * heads // kv_heads
    together = min(64, max(16, triton.next_power_of_2(queries)))
    codes_BHL = torch.empty(batch, heads, tables, dtype=torch.int32, device=q_BHD.device)
    bytes_of_codes = codes_BHL.view(torch.uint8)
    size = codes_BHL.element_size()
    with torch.cuda.device_of(q_BHD):
        _hash_queries[(-(-tables // 16), kv_heads * size, -(-queries // together))](
            *(q_BHD, w, bytes_of_codes, q_BHD.stride(), w.stride(0), queries),
            L=tables, BITS=bits, H=heads, G=heads // kv_heads, D=dim, D_PAD=max(16, triton.next_power_of_2(dim)),
            TABLES=16, COLUMNS=together, BYTES=size, **_product("ieee"), num_warps=4, **chained(q_BHD),
        )  # fmt: skip
    return codes_BHL


def _product(of_fp32: str = "tf32x3") -> dict[str, object]:
    """How products are taken so that they are as good as fp32's; the interpreter has no dot of bf16."""
    wide = bool(triton.knobs.runtime.interpret)
    return {"WIDEN": wide, "PRECISION": "ieee" if wide else of_fp32}
