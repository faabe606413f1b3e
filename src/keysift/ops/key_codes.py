"""Keys sampled by codes of a few bits a coordinate: the codes, what they estimate of q.k, and the draw.

A key is centred, rotated at random, and each coordinate of it kept in 1, 2, 4 or 8 bits, with one number that makes its
product with the key itself exact. The query stays in numbers: the scores of all keys are products of integers, and an
unequal-probability sample of the keys is drawn by them. What a score was wrong about is mended by the weights 1 /
inclusion probability, which are exact.

Field ``f`` of byte ``j`` of a code, ``planes`` bits wide, is coordinate ``f * bytes + j``, so that one mask expands
four coordinates; the highest bit of every byte is inverted, which makes two's complement of the last field. Side data
is addressed by token (``row - kv.first``): with a table ``[pages, K, page, ...]``, else ``[B, K, S, ...]``. That of a
page lies in one piece; pages may lie apart, by so much as whole heads take, so that other data fit between.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from keysift.ops.heads import group
from keysift.ops.lists import on_cpu, on_gpu
from keysift.ops.pages import Quota
from keysift.ops.random import _absorb, normal, state_of
from keysift.types import KV, Selection, one_of

STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}  # of the best uniform quantiser of a normal number
PER = ("kv_head", "query_head")
CLIP = 4.0  # standard deviations of a query's coordinate that its integer covers
LOG2E = math.log2(math.e)
SAMPLE = 2048  # so many tokens at most tell the draw's factor
BLOCK = 256  # consecutive tokens that share one uniform number of a systematic draw
ONE = 1 << 22  # probabilities are integers of this unit: their sums over a block are exact
ALL = 1e30  # log of the factor with which every probability is 1
THINNING = 2**31 - 1  # stands in the place of the block in the address of the number that thins a draw


class Probe(NamedTuple):
    """The queries' side of scores: ``log2(e) * score = size * (sum_c integer_c * level_c * slope - shift)``.

    Attributes:
        weights: integers, int8 ``[B, H, code dim]``, divided by what the place of a coordinate's field multiplies the
            level with, see ``multiples``.
        line: slope and shift, fp32 ``[B, H, 2]``; zeros for a query of zeros.
    """

    weights: Tensor
    line: Tensor


class Draw(NamedTuple):
    """A sample of the middle.

    Attributes:
        selection: rows in ascending order, int32 ``[B, K or H, most_rows]``, with log (1 / inclusion probability).
        expected: rows that the draw has on average, fp32 ``[B, K or H]``: the sum of all inclusion probabilities.
        overflow: whether rows had to be left out, bool ``[B, K or H]``; not once in a thousand million draws.
    """

    selection: Selection
    expected: Tensor
    overflow: Tensor


def rotation(
    seed: int, layer: int, num_kv_heads: int, dim: int, device: torch.device | str, first_head: int = 0
) -> Tensor:
    """A random orthonormal matrix of each KV head from ``first_head`` on, bf16 ``[K, D, D]``."""
    return _rotation(seed, layer, num_kv_heads, dim, first_head).to(device)


@functools.cache
def _rotation(seed: int, layer: int, num_kv_heads: int, dim: int, first_head: int) -> Tensor:
    head, row, column = (torch.arange(n) for n in (num_kv_heads, dim, dim))
    q, r = torch.linalg.qr(normal(seed, layer, first_head + head[:, None, None], row[:, None], column).double())
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # QR leaves the signs open
    return q.bfloat16().contiguous()


def code_dim(dim: int) -> int:
    """Coordinates of a code: a power of two; those past the head dim count for nothing."""
    return max(16, 1 << (dim - 1).bit_length())


def code_bytes(dim: int, planes: int) -> int:
    """Bytes of a code.

    Raises:
        ValueError: for ``planes``, bits a coordinate, other than 1, 2, 4 or 8.
    """
    one_of("planes", planes, STEPS)
    return code_dim(dim) * planes // 8


def pitch_of(side: Tensor) -> int:
    """Heads after which side data of the next page, or sequence, begin.

    Raises:
        ValueError: a page's side data that do not lie in one piece, or pages apart by other than whole heads.
    """
    per_head = side[0, 0].numel() if len(side) else 0
    if len(side) < 2 or not per_head:
        return side.shape[1]
    if not side[0].is_contiguous() or side.stride(0) % per_head:
        raise ValueError(
            f"side data of strides {side.stride()}: a page's must lie in one piece, pages whole heads apart"
        )
    return side.stride(0) // per_head


def hash_keys(
    codes: Tensor, size: Tensor, kv: KV, mean_BKD: Tensor, w: Tensor, planes: int, done: Tensor, most: int
) -> None:
    """Bring the codes and sizes of ``k - mean`` up to date, in place.

    With ``y = (k - mean) W sqrt(D) / |k - mean|``, the level of a coordinate is ``floor(y / step) + 2**(planes - 1)``
    within ``0 .. 2**planes - 1``; it stands for ``y^ = (level - 2**(planes - 1) + 0.5) * step``. The size,
    ``|k - mean|^2 / ((k - mean) W . y^)``, makes ``size * y^`` exact along the key. Differences are rounded to bf16
    before they are rotated.

    Args:
        codes: uint8 ``[pages, K, page, bytes]``, or ``[B, K, S, bytes]`` without a table.
        size: fp16 likewise, without the last dimension.
        kv: the middle.
        mean_BKD: what keys are centred with.
        w: of ``rotation``.
        planes: bits a coordinate.
        done: rows before it are up to date, int64 ``[B]``.
        most: no sequence has more new rows than this.
    """
    if on_gpu(codes):
        from keysift.ops import key_codes_triton

        return key_codes_triton.hash_keys(codes, size, kv, mean_BKD, w, planes, done, most)
    if on_cpu(codes, kv.k):
        from keysift.ops import key_codes_cpu

        return key_codes_cpu.hash_keys(codes, size, kv, mean_BKD, w, planes, done, most)
    return hash_keys_reference(codes, size, kv, mean_BKD, w, planes, done, most)


def hash_keys_reference(
    codes: Tensor, size: Tensor, kv: KV, mean_BKD: Tensor, w: Tensor, planes: int, done: Tensor, most: int
) -> None:
    """Row by row of the batch."""
    for b in range(kv.start.shape[0]):
        row = torch.arange(int(done[b]), int(kv.end[b]), device=codes.device)[:most]
        page, slot = _side(kv, row - kv.first[b], b, codes.shape[2])
        at, inside = (x[b] for x in kv.locate(row.expand(kv.start.shape[0], -1)))
        centred = (kv.k[at, inside].float() - mean_BKD[b].float()).transpose(0, 1)  # [K, rows, D]
        code, of_code = encode(centred, w, planes)
        codes[page, :, slot] = code.transpose(0, 1)
        size[page, :, slot] = of_code.transpose(0, 1).half()


def encode(x: Tensor, w: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 ``[..., bytes]``, and sizes, fp32 ``[...]``, of vectors that are centred."""
    dim, half = x.shape[-1], 1 << (planes - 1)
    y = torch.nn.functional.pad(x.bfloat16().float() @ w.float(), (0, code_dim(dim) - dim))
    square = x.float().square().sum(-1)
    unit = math.sqrt(dim) / STEPS[planes] / square.clamp(min=1e-30).sqrt()
    level = ((y * unit[..., None]).floor() + half).clamp(0, 2 * half - 1)
    against = (y * (level - half + 0.5)).sum(-1) * STEPS[planes]
    size = torch.where(against > 0, square / against.clamp(min=1e-30), 0).clamp(max=6e4)
    place = planes * torch.arange(8 // planes, device=x.device)[:, None]
    byte = (level.int().unflatten(-1, (8 // planes, -1)) << place).sum(-2)
    return (byte ^ 0x80).to(torch.uint8), size


def levels(codes: Tensor, planes: int) -> Tensor:
    """Levels of the coordinates, uint8 ``[..., code dim]``."""
    place = planes * torch.arange(8 // planes, device=codes.device, dtype=torch.uint8)[:, None]
    return (((codes ^ 0x80)[..., None, :] >> place) & ((1 << planes) - 1)).flatten(-2)


def multiples(dim: int, planes: int, device: torch.device) -> Tensor:
    """What each coordinate's level is multiplied with, as it is masked out of a nibble, fp32 ``[code dim]``."""
    field = torch.arange(code_dim(dim), device=device) // code_bytes(dim, planes)
    return 2.0 ** (field * planes % 4)


def project_reference(q_BHD: Tensor, w: Tensor, planes: int, scale: float) -> Probe:
    """Queries, rounded to bf16, as integers; over isotropic keys the regression of scores on what they estimate has
    slope one, whatever the rounding."""
    kv_heads, dim, _ = w.shape
    q, half = group(q_BHD.bfloat16().float(), kv_heads, 1), 1 << (planes - 1)
    y = torch.nn.functional.pad((q @ w.float()).flatten(1, 2), (0, code_dim(dim) - dim))
    square = q.flatten(1, 2).square().sum(-1)
    many = multiples(dim, planes, q.device)
    unit = (square / dim).sqrt().clamp(min=1e-30)[..., None] * (CLIP / 127)
    weights = (y / unit / many + 0.5).floor()
    weights = torch.minimum(torch.maximum(weights, -(127 // many)), 127 // many)
    integers = weights * many
    along = (integers * y).sum(-1)
    slope = torch.where(along > 0, square / along.clamp(min=1e-30), 0) * (scale * STEPS[planes] * LOG2E)
    shift = slope * (half - 0.5) * integers.sum(-1)
    last = integers[..., -code_bytes(dim, planes) :].sum(-1) * half  # the kernels' levels of the last field are signed
    return Probe(weights.to(torch.int8), torch.stack((slope, shift - slope * last), -1))


def estimate(q_BHD: Tensor, codes: Tensor, size: Tensor, kv: KV, w: Tensor, planes: int, scale: float) -> Tensor:
    """Estimates of ``q . (k - mean) * scale`` for the tokens of the middle.

    Returns:
        fp32 ``[B, H, N]`` by token, N = ``kv.bound``; -inf outside of the middle.
    """
    if on_gpu(codes):
        from keysift.ops import key_sample_triton

        return key_sample_triton.estimate(q_BHD, codes, size, kv, w, planes, scale)
    if on_cpu(codes, q_BHD):
        from keysift.ops import key_codes_cpu

        return key_codes_cpu.estimate(q_BHD, codes, size, kv, w, planes, scale)
    score = scores_reference(project_reference(q_BHD, w, planes, scale), codes, size, kv, planes) / LOG2E
    return score.transpose(2, 3).flatten(1, 2)


def scores_reference(probe: Probe, codes: Tensor, size: Tensor, kv: KV, planes: int) -> Tensor:
    """Scores times log2(e), fp32 ``[B, K, N, G]``; -inf outside of the middle."""
    kv_heads, half = codes.shape[1], 1 << (planes - 1)
    dim, bytes_ = probe.weights.shape[2], codes.shape[3]
    integers = group(probe.weights * multiples(dim, planes, codes.device), kv_heads, 1)
    slope, shift = group(probe.line, kv_heads, 1).unbind(-1)
    level = levels(by_token(codes, kv), planes).float()
    level[..., -bytes_:] -= half
    total = level @ integers.transpose(2, 3)
    score = (total * slope[:, :, None] - shift[:, :, None]) * by_token(size, kv).float()[..., None]
    return score.masked_fill(~inside(kv)[:, None, :, None], -math.inf)


def hamming_distance(q_codes: Tensor, k_codes: Tensor, kv: KV) -> Tensor:
    """Bits in which the queries' codes differ from the keys', int16 ``[B, K, N, G]`` by token.

    With one bit a coordinate it is the number of coordinates that have another sign.

    Args:
        q_codes: uint8 ``[B, H, bytes]``, from ``encode``.
        k_codes: side data, as ``hash_keys`` makes it.
        kv: the middle.
    """
    if on_gpu(k_codes):
        from keysift.ops import key_codes_triton

        return key_codes_triton.hamming_distance(q_codes, k_codes, kv)
    if on_cpu(k_codes):
        from keysift.ops import key_codes_cpu

        return key_codes_cpu.hamming_distance(q_codes, k_codes, kv)
    return hamming_distance_reference(q_codes, k_codes, kv)


def hamming_distance_reference(q_codes: Tensor, k_codes: Tensor, kv: KV) -> Tensor:
    """Bits unpacked."""
    differ = by_token(k_codes, kv)[:, :, :, None] ^ group(q_codes, k_codes.shape[1], 1)[:, :, None]
    return levels(differ ^ 0x80, 1).sum(-1, dtype=torch.int16)


def sample(
    q_BHD: Tensor,
    codes: Tensor,
    size: Tensor,
    kv: KV,
    mean_BKD: Tensor,
    w: Tensor,
    planes: int,
    scale: float,
    quota: Quota,
    seed: int,
    layer: int,
    positions_B: Tensor,
    most_rows: int,
    per: str = "kv_head",
    independent: bool = False,
    first_head: int = 0,
    new: Tensor | None = None,
) -> Draw:
    """Poisson sampling (each row with a probability of its own) by the weights ``exp(score)``.

    A row's probability is ``u = min(1, f * sum_h softmax_h)``, over the heads that share the selection, with f such
    that all u add up to the quota, as far as a sample of 2,048 tokens tells. Then, as u is known
    exactly, so is the weight 1 / u of a row that is taken. Rows with u = 1 always are. Where more than ``most_rows``
    could be taken, all probabilities are lowered by one factor.

    Draws are systematic in blocks of 256 tokens: with one uniform number r a block, the token at which the running sum
    of u passes r, r + 1, r + 2, ... is taken; the number of rows then hardly varies, and neighbours, which tend to be
    alike, are not taken together. The number is a function of seed, layer, head, position and block.

    Args:
        q_BHD: one query a sequence and head.
        codes, size, kv, mean_BKD, w, planes: as for ``hash_keys``.
        scale: what q.k is multiplied with before the softmax.
        quota: rows that a selection shall have; all are taken where there are no more.
        positions_B: position of the query of each sequence, int64.
        most_rows: room for rows; see ``room``.
        per: ``query_head``: a selection each; ``kv_head``: one for all heads of a group.
        independent: a uniform number of its own for each token.
        first_head: number of the first KV head, for the draws.
        new: what ``done`` is to ``hash_keys`` with ``most=1``, to do that in the same launch as something else.

    Raises:
        ValueError: an unknown ``per``.
    """
    one_of("per", per, PER)
    where = seed_state(seed, layer), positions_B, most_rows, per, independent, first_head
    if on_gpu(codes):
        from keysift.ops import key_sample_triton

        return key_sample_triton.sample(q_BHD, codes, size, kv, mean_BKD, w, planes, scale, quota, *where, new)
    if on_cpu(codes, q_BHD):
        from keysift.ops import key_codes_cpu

        return key_codes_cpu.sample(q_BHD, codes, size, kv, mean_BKD, w, planes, scale, quota, *where, new)
    if new is not None:
        hash_keys_reference(codes, size, kv, mean_BKD, w, planes, new, 1)
    score = scores_reference(project_reference(q_BHD, w, planes, scale), codes, size, kv, planes)
    log_c = log_factors_reference(score, kv, quota, per, tokens_a_row(score.shape[3], codes.shape[3]))
    return draw_reference(score, log_c, kv, *where)


def room(budget: float, bound: int) -> int:
    """Room for the rows of a draw: that it lowers probabilities is then rare."""
    return min(bound, math.ceil(1.25 * budget + 6 * math.sqrt(budget)) + 64)


@functools.cache
def seed_state(seed: int, layer: int) -> int:
    """What the numbers of a layer's draws continue from."""
    return state_of(seed, layer)


def tokens_a_row(heads: int, bytes_: int) -> int:
    """Neighbouring codes that kernels multiply as one row: so that matrix products have 8 columns in use, and rows of
    32 bytes or more."""
    padded = 1 << (heads - 1).bit_length()
    return max(32 // bytes_, min(8 // padded, 128 // bytes_), 1)


def sampled(kv: KV, row: int) -> Tensor:
    """The tokens from which the factors of a draw are found, bool ``[B, N]``: one run of ``row`` of every ``step``."""
    run = torch.arange(kv.bound, device=kv.start.device) // row
    first, last = ((x - kv.first)[:, None] // row for x in (kv.start, kv.end - 1))
    step = (last - first).clamp(min=0) // (SAMPLE // row - 1) + 1
    scattered = (run // step * 0x9E3779B1 & 0xFFFFFFFF) >> 12  # for texts have periods
    return inside(kv) & (run % step == scattered % step)


def log_factors_reference(score: Tensor, kv: KV, quota: Quota, per: str, row: int) -> Tensor:
    """Log2 of the c of each head with which ``min(1, sum_h c_h * exp(score_h))``, summed over the sampled tokens, is
    their part of the quota; fp32 ``[B, H]``."""
    known = sampled(kv, row)[:, None, :, None]
    score = score.double().masked_fill(~known, -math.inf)
    lse = ((score / LOG2E).logsumexp(2, keepdim=True) * LOG2E).clamp(min=-ALL)
    x = (score - lse).exp2()
    x = x.sum(3, keepdim=True) if per == "kv_head" else x
    wanted = keys_of(quota, kv.length)
    share = wanted.double() / kv.length.clamp(min=1)
    target = (share * known.sum((1, 2, 3)))[:, None, None, None]
    low, high = (torch.full_like(x[:, :, :1], bound) for bound in (-40.0, 120.0))
    for _ in range(60):
        middle = (low + high) / 2
        less = (x * middle.exp2()).clamp(max=1).sum(2, keepdim=True) < target
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    log_c = (high - lse)[:, :, 0].flatten(1)
    return torch.where((wanted >= kv.length)[:, None], ALL, log_c).float()


def keys_of(quota: Quota, length: Tensor) -> Tensor:
    """Rows that a quota wants, int64."""
    return torch.minimum(((quota.share * length.float()).long() + quota.keys).clamp(min=1), length)


def draw_reference(
    score: Tensor,
    log_c: Tensor,
    kv: KV,
    state: int,
    positions_B: Tensor,
    most_rows: int,
    per: str = "kv_head",
    independent: bool = False,
    first_head: int = 0,
) -> Draw:
    """All probabilities at once; rows scattered to their places."""
    kv_heads, tokens = score.shape[1:3]
    device = score.device
    u = (score + group(log_c, kv_heads, 1)[:, :, None]).exp2()
    u = u.sum(-1, keepdim=True) if per == "kv_head" else u
    unit = (u.clamp(max=1) * ONE).int().clamp(min=1) * inside(kv)[:, None, :, None]
    unit = unit.transpose(2, 3).flatten(1, 2)  # [B, lists, N]
    blocks = -(-tokens // BLOCK)
    unit = torch.nn.functional.pad(unit, (0, blocks * BLOCK - tokens)).unflatten(2, (blocks, BLOCK))

    of_list = torch.arange(unit.shape[1], device=device)[None] + first_head * unit.shape[1] // kv_heads
    of_query = _continue(torch.tensor(state), of_list, positions_B[:, None])[..., None]
    of_block = _continue(of_query, torch.arange(blocks, device=device))
    if independent:
        taken = (_continue(of_block[..., None], torch.arange(BLOCK, device=device)) >> 10) < unit
    else:
        taken = ((unit.cumsum(-1) + (of_block >> 10)[..., None]) & (ONE - 1)) < unit
    factor, expected = thinning(unit.sum(-1), kv.length, most_rows, independent)
    start = _continue(of_query, torch.tensor([THINNING], device=device))
    taken, unit = taken.flatten(2), unit.flatten(2)
    place = taken.cumsum(-1) * factor[..., None] + start
    rank = (place >> 32) - 1
    kept = taken & (((place - factor[..., None]) >> 32) == rank)
    total = kept.sum(-1)
    to = torch.where(kept & (rank < most_rows), rank, most_rows)
    rows = torch.zeros(*to.shape[:2], most_rows + 1, dtype=torch.int32, device=device)
    row = (torch.arange(to.shape[2], device=device) + kv.first[:, None]).int()
    rows.scatter_(2, to, row[:, None].expand_as(to))
    log_w = torch.zeros_like(rows, dtype=torch.float32)
    less = (factor.double() * 2.0**-32).log().float()[..., None]
    log_w.scatter_(2, to, -(unit.clamp(min=1).float() / ONE).log() - less)
    selection = Selection(rows[..., :-1], total.clamp(max=most_rows).int(), log_w[..., :-1])
    return Draw(selection, expected, total > most_rows)


def thinning(sums: Tensor, length: Tensor, most_rows: int, independent: bool) -> tuple[Tensor, Tensor]:
    """What probabilities are multiplied with, in units of 2**-32, and how many rows are expected after that.

    Below 1 only where a draw could have more than ``most_rows`` rows, six standard deviations above its mean counted:
    of a systematic draw only the fractions of the blocks' sums vary. Every so many-th row is dropped then.

    Args:
        sums: of the probabilities of each block, in units, integer ``[B, K or H, blocks]``.
        length: tokens of the middle, ``[B]``.
    """
    total = sums.long().sum(-1).double() / ONE
    fraction = (sums & (ONE - 1)).double() / ONE
    variance = total if independent else (fraction * (1 - fraction)).sum(-1)
    likely = torch.minimum(total + 6 * variance.sqrt() + 1, length[:, None].double())
    share = torch.where(likely <= most_rows, 1.0, max(0.0, most_rows - 1.0) / likely)
    factor = (share * 2.0**32).floor().long().clamp(min=1)
    return factor, (total * share).float()


def inside(kv: KV) -> Tensor:
    """Which tokens belong to the view, bool ``[B, N]``."""
    token = torch.arange(kv.bound, device=kv.start.device)
    return (token >= (kv.start - kv.first)[:, None]) & (token < (kv.end - kv.first)[:, None])


def by_token(side: Tensor, kv: KV) -> Tensor:
    """Side data ``[B, K, N, ...]``, zeros outside of the view."""
    out = side.new_zeros(kv.start.shape[0], side.shape[1], kv.bound, *side.shape[3:])
    for b, here in enumerate(inside(kv)):
        page, slot = _side(kv, torch.arange(kv.bound, device=side.device)[here], b, side.shape[2])
        out[b, :, here] = side[page, :, slot].transpose(0, 1)
    return out


def _side(kv: KV, token: Tensor, b: int, page: int) -> tuple[Tensor, Tensor]:
    """First and third index of side data of sequence ``b``'s tokens."""
    if kv.table is None:
        return torch.full_like(token, b), token
    return kv.table[b].long()[token // page], token % page


def _continue(state: Tensor, *address: Tensor) -> Tensor:
    """32 random bits of an address, of which ``state`` are the first words."""
    for word in address:
        state = _absorb(state.to(word.device), word.long())
    return state
