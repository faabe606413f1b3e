"""Sign-bit hashing of keys and queries, and the keys whose codes match a query's (arXiv:2410.16179).

Codes of cached keys are kept in bit planes. Plane ``b * L + l`` has bit ``b`` of table ``l``, and bit ``i`` of one of
its words is that of token ``32 * g + i``: an XOR and an OR compare 32 keys with a query at once. Entries of ``UNIT``
tokens lie in the pages of the keys: ``planes`` is int32 ``[pages, K, ceil(page / UNIT), bits * L, WORDS]``, and
``[B, K, ceil(S / UNIT), bits * L, WORDS]`` where there are no pages. Tokens count from a sequence's first. Tables may
share their bits (see ``pool``): planes and queries' codes are then those of the pool's words, as of tables of 32 bits.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from keysift.ops import pool as pools
from keysift.ops.heads import group
from keysift.ops.lists import on_cpu, on_gpu
from keysift.ops.random import normal
from keysift.types import KV, Law, Selection

MAX_BITS = 15  # a table's code is kept in an int16
WORDS = 4  # of a plane in an entry, which one load of 16 bytes brings
UNIT = 32 * WORDS
MEAN_ROWS = 1024  # keys of a sequence that are added up at a time
HASH_ROWS = 2048  # keys that the reference hashes at a time, which bounds the products
MATCH_WORDS = 1 << 19  # words that the reference compares at a time, to stay in the cache
LAW_ERROR = 1e-3  # of a log weight that is read from a table, for cosines of -0.95 and more
MAX_POINTS = (1 << 16) + 1


def projections(
    seed: int, layer: int, num_kv_heads: int, dim: int, columns: int, device: torch.device, first_head: int = 0
) -> Tensor:
    """Independent N(0, 1) directions for each KV head of a layer from ``first_head`` on, fp32 ``[K, D, columns]``."""
    axes = [torch.arange(n, device=device) for n in (num_kv_heads, dim, columns)]
    return normal(seed, layer, first_head + axes[0][:, None, None], axes[1][:, None], axes[2])


def directions(w_KDN: Tensor, bits: int) -> Tensor:
    """The columns of ``projections`` as rows in the order of the planes, ``[K, bits * L, D]``, rounded to bf16.

    Products of bf16 numbers are exact in fp32, so that tensor cores take them as well as fp32 does. On a GPU the
    result is bf16, elsewhere fp32.
    """
    rows = w_KDN.unflatten(-1, (-1, bits)).permute(0, 3, 2, 1).flatten(1, 2).bfloat16().contiguous()
    return rows if rows.is_cuda else rows.float()


def collision_log_probability(cosine: Tensor, bits: int, tables: int, floor: float = 0.0) -> Tensor:
    """Log probability that at least two of L tables collide: with p = 1 - angle / pi and r = p^bits,
    ``u = 1 - (1 - r)^L - L r (1 - r)^(L - 1)`` (arXiv:2410.16179).

    Args:
        cosine: of the angle between query and key, any shape, clamped to [-1, 1].
        bits, tables: K and L of the paper.
        floor: added to u before the logarithm (the authors' code adds 1e-4, which biases rare keys).
    """
    angle = torch.acos(cosine.double().clamp(-1, 1))
    r = (1 - angle / math.pi) ** bits
    miss = torch.log1p(-r.clamp(max=1 - 1e-15))
    u = -torch.expm1(tables * miss) - tables * r * torch.exp((tables - 1) * miss)
    small = tables * (tables - 1) / 2 * r * r  # leading term, where the difference above has cancelled
    u = torch.where(tables * r < 1e-6, small, u)
    return (u + floor).clamp(1e-300, 1).log().float()


@functools.lru_cache(maxsize=16)
def collision_table(bits: int, tables: int, floor: float = 0.0, pool: int | None = None) -> Tensor:
    """The table of a ``Law`` that weighs keys by 1 / u: fp32, on the CPU. ``pool`` bits are what the tables share.

    It has 4,096 steps, or more where linear interpolation would err by over ``LAW_ERROR`` at cosines from -0.95 to 1,
    but not over 65,536: with two tables, log u has a vertical tangent at cosine 1, and errs there.
    """

    def log_u(cosine: Tensor) -> Tensor:
        if pool is None:
            return collision_log_probability(cosine, bits, tables, floor)
        return pools.collision_log_probability(cosine, bits, tables, pool, floor)

    points = 4097
    while True:
        cosine = torch.linspace(-1, 1, points, dtype=torch.float64)
        table = -log_u(cosine)
        middle = (cosine[1:] + cosine[:-1]) / 2
        error = (table[1:] + table[:-1]) / 2 + log_u(middle)
        if points >= MAX_POINTS or float(error[middle > -0.95].abs().max()) < LAW_ERROR / 2:
            return table
        points = 2 * points - 1


def mean_key(kv: KV) -> Tensor:
    """Mean of a view's keys, fp32 ``[B, K, D]``; 0 where there are none. Rows outside are not read."""
    total = torch.zeros(len(kv.start), *kv.k.shape[2:], device=kv.k.device)
    for begin in range(0, kv.bound, MEAN_ROWS):  # counted from each view's first row, so that a batch changes nothing
        rows = kv.start[:, None] + torch.arange(begin, min(begin + MEAN_ROWS, kv.bound), device=kv.k.device)
        inside = rows < kv.end[:, None]
        page, row = kv.locate(rows.where(inside, 0))
        page = page if kv.table is None else page.where(inside, 0)
        total += kv.k[page, row].float().masked_fill(~inside[..., None, None], 0).sum(1)
    return total / kv.length.clamp(min=1)[:, None, None]


def thresholds(mean_BKD: Tensor, w: Tensor) -> Tensor:
    """What products with keys that are not centred compare with: ``mean . w``, fp32 ``[B, K, bits * L]``."""
    return (w.double() @ mean_BKD.double()[..., None])[..., 0].float()


# ---- keys -----------------------------------------------------------------------------------------------------------


def hash_planes(
    planes: Tensor, kv: KV, mean_BKD: Tensor, threshold_BKN: Tensor | None, w: Tensor, done: Tensor, most: int
) -> None:
    """Write the bits of the tokens of rows ``done .. end - 1`` of a view, in place; those of other tokens stay.

    A bit says whether ``k . w`` exceeds ``mean . w``, that is whether ``(k - mean) . w`` is positive. On a GPU one
    launch, which depends on shapes, ``kv.bound`` and ``most`` alone.

    Args:
        planes: see the module.
        kv: keys; each sequence's bits are those of its first row on.
        mean_BKD: what keys are centred with, fp32.
        threshold_BKN: ``thresholds(mean, w)``. None means that keys are centred with the mean rounded to their dtype,
            and rounded again, before the product, as the authors' code does.
        w: ``directions``, ``[K, bits * L, D]`` or, for all KV heads, ``[1, bits * L, D]``.
        done: the first row that is new, int64 ``[B]``.
        most: new rows of a sequence, at most.
    """
    if on_gpu(planes):
        from keysift.ops import codes_triton

        codes_triton.hash_planes(planes, kv, mean_BKD, threshold_BKN, w, done, most)
    elif on_cpu(planes, kv.k) and threshold_BKN is not None:  # the authors' bits are to be met exactly
        from keysift.ops import codes_cpu

        codes_cpu.hash_planes(planes, kv, mean_BKD, threshold_BKN, w, done, most)
    else:
        hash_planes_reference(planes, kv, mean_BKD, threshold_BKN, w, done, most)


def hash_planes_reference(
    planes: Tensor, kv: KV, mean_BKD: Tensor, threshold_BKN: Tensor | None, w: Tensor, done: Tensor, most: int
) -> None:
    """The same in fp32, one sequence after the other."""
    bounds = torch.stack([kv.first, torch.maximum(kv.start, done), kv.end], 1).tolist()
    columns = w.float().mT
    for b, (zero, low, end) in enumerate(bounds):
        for start in range(low, min(end, low + most), HASH_ROWS):
            rows = torch.arange(start, min(start + HASH_ROWS, end, low + most), device=planes.device)
            page, row = (b, rows) if kv.table is None else _in_page(kv.table[b], rows, kv.k.shape[1])
            keys = kv.k[page, row].transpose(0, 1)
            if threshold_BKN is None:
                product = (keys - mean_BKD[b, :, None].to(keys.dtype)).float() @ columns
                positive = product > 0
            else:
                positive = keys.float() @ columns > threshold_BKN[b, :, None]
            _write_bits(planes, kv, b, rows - zero, positive)


def _in_page(table_P: Tensor, rows: Tensor, page: int) -> tuple[Tensor, Tensor]:
    return table_P[rows // page].long(), rows % page


def _write_bits(planes: Tensor, kv: KV, b: int, tokens: Tensor, bits_KTN: Tensor) -> None:
    """Put the bits of consecutive tokens of a sequence into their words."""
    if kv.table is None:
        planes, page, within = planes[b : b + 1], torch.zeros_like(tokens), tokens
    else:
        page, within = _in_page(kv.table[b], tokens, kv.k.shape[1])
    begins = within % 32 == 0
    begins[0] = True
    at = 32 * (begins.cumsum(0) - 1) + within % 32
    new, mask = (
        _packed(x.new_zeros(x.shape[0], 32 * int(begins.sum()), x.shape[2]).index_copy_(1, at, x)).transpose(0, 1)
        for x in (bits_KTN, torch.ones_like(bits_KTN[:1, :, :1]))
    )
    page, within = page[begins], within[begins]
    where = (page, slice(None), within // UNIT, slice(None), within % UNIT // 32)
    planes[where] = (planes[where] & ~mask) | new


def _packed(bits_KTN: Tensor) -> Tensor:
    """Words of 32 tokens each, int32 ``[K, T / 32, N]``."""
    bits = bits_KTN.view(torch.uint8).unflatten(1, (-1, 4, 8))
    byte = bits[:, :, :, 0].clone()
    for i in range(1, 8):
        byte |= bits[:, :, :, i] << i
    return byte.transpose(2, 3).flatten().view(torch.int32).view(*byte.shape[:2], -1)


# ---- queries --------------------------------------------------------------------------------------------------------


def hash_query(q_BHD: Tensor, w: Tensor, bits: int) -> Tensor:
    """Codes of queries, int32 ``[B, H, L]``; queries are not centred.

    Args:
        q_BHD: one query per sequence and head.
        w: ``directions``, ``[K, bits * L, D]`` or ``[1, bits * L, D]``.
        bits: bits a table, 1 to 15, or 32 for the words of a pool.
    """
    if on_gpu(q_BHD):
        from keysift.ops import codes_triton

        return codes_triton.hash_query(q_BHD, w, bits)
    if on_cpu(q_BHD):
        from keysift.ops import codes_cpu

        return codes_cpu.hash_query(q_BHD, w, bits)
    return hash_query_reference(q_BHD, w, bits)


def hash_query_reference(q_BHD: Tensor, w: Tensor, bits: int) -> Tensor:
    """The same in fp32."""
    positive = (group(q_BHD, w.shape[0], 1).float() @ w.float().mT > 0).int().flatten(1, 2)
    shift = torch.arange(bits, dtype=torch.int32, device=w.device)[:, None]
    return (positive.unflatten(-1, (bits, -1)) << shift).sum(-2, dtype=torch.int32)


# ---- matches --------------------------------------------------------------------------------------------------------


def collisions(
    codes_BHL: Tensor, planes: Tensor, kv: KV, bits: int, law: Law | None = None, tables: int | None = None
) -> Selection:
    """The rows of a view whose keys have the query's code in at least two tables.

    Args:
        codes_BHL: of the queries, int32.
        planes: of the keys; see the module.
        kv: the view; what ``planes`` say of other tokens is ignored.
        bits: bits a table.
        law: the weights of the rows, passed on.
        tables: of a pool; None for tables with bits of their own.

    Returns:
        Ascending rows of each query head, int32 ``[B, H, R]``. On a GPU R is ``kv.bound`` and the host waits for
        nothing; elsewhere R is the largest count.
    """
    if on_gpu(planes):
        from keysift.ops import codes_triton, pool_triton

        if tables is not None:
            return pool_triton.collisions(codes_BHL, planes, kv, bits, law, tables)
        return codes_triton.collisions(codes_BHL, planes, kv, bits, law)
    if on_cpu(planes):
        from keysift.ops import codes_cpu, pool_cpu

        if tables is not None:
            return pool_cpu.collisions(codes_BHL, planes, kv, bits, law, tables)
        return codes_cpu.collisions(codes_BHL, planes, kv, bits, law)
    return collisions_reference(codes_BHL, planes, kv, bits, law, tables)


def collisions_reference(
    codes_BHL: Tensor, planes: Tensor, kv: KV, bits: int, law: Law | None = None, tables: int | None = None
) -> Selection:
    """The same, as few entries at a time as stay in the cache."""
    page = max(kv.bound, 1) if kv.table is None else kv.k.shape[1]
    begin, end = kv.start - kv.first, kv.end - kv.first
    if kv.table is None:
        planes = planes[:, :, : -(-kv.bound // UNIT)]
    else:
        first = torch.arange(0, kv.bound, page, device=planes.device)  # token of each page
        pages = kv.table[:, : len(first)].long().masked_fill(first >= end[:, None], 0)
        planes = planes[pages].transpose(1, 2).flatten(2, 3)
    column = None
    if tables is not None:  # the planes of each table, as those of tables with bits of their own lie
        columns = pools.table_columns(bits, tables, planes.shape[3]).to(planes.device)
        column = columns.T.flatten()
        in_word = codes_BHL[..., columns % codes_BHL.shape[2]] >> (columns // codes_BHL.shape[2])
        codes_BHL = ((in_word & 1) << torch.arange(bits, device=planes.device)).sum(-1, dtype=torch.int32)
    batch, heads, tables = codes_BHL.shape
    kv_heads = planes.shape[1]
    shift = torch.arange(bits, dtype=torch.int32, device=planes.device)[:, None]
    query = group(-((codes_BHL[:, :, None] >> shift) & 1), kv_heads, 1)  # all ones where a bit is set
    query = query[..., None].expand(*query.shape, WORDS).flatten(-2)[:, :, :, None]
    step = max(1, MATCH_WORDS // (batch * heads * tables * WORDS))
    parts = (part if column is None else part[:, :, :, column] for part in planes.split(step, 2))
    words = torch.cat([_match(query, part.flatten(-2)) for part in parts], 3)
    byte = words.flatten(1, 2).contiguous().view(torch.uint8)
    hit = (byte[..., None] >> torch.arange(8, dtype=torch.uint8, device=byte.device) & 1).bool()
    hit = hit.flatten(2).unflatten(2, (-1, -(-page // UNIT) * UNIT))[..., :page].flatten(2)
    token = torch.arange(hit.shape[2], device=hit.device)
    chosen = Selection.of(hit & ((token >= begin[:, None]) & (token < end[:, None]))[:, None], law)
    rows = chosen.rows + kv.first[:, None, None]
    return chosen._replace(rows=rows.int(), count=chosen.count.int())


def _match(query_BKG1bLw: Tensor, planes_BKEbLw: Tensor) -> Tensor:
    """Words of the keys with two tables in common with the query, int32 ``[B, K, G, E, WORDS]``; the last two
    dimensions of what is compared lie flat."""
    bits = query_BKG1bLw.shape[4]
    planes = planes_BKEbLw.unflatten(-1, (bits, -1))[:, :, None]
    differs = planes[..., 0, :] ^ query_BKG1bLw[..., 0, :]
    for bit in range(1, bits):
        differs |= planes[..., bit, :] ^ query_BKG1bLw[..., bit, :]
    once = differs.bitwise_not_().unflatten(-1, (-1, WORDS))
    twice = torch.zeros_like(once)
    while (tables := once.shape[-2]) > 1:  # halves are counted together: at least once, at least twice
        half = tables // 2
        (a, b), (a2, b2) = ((x[..., :half, :], x[..., half : 2 * half, :]) for x in (once, twice))
        both = (a | b, a2 | b2 | (a & b))
        odd = 2 * half < tables
        once, twice = (
            torch.cat([y, x[..., -1:, :]], -2) if odd else y for x, y in zip((once, twice), both, strict=True)
        )
    return twice[..., 0, :]
