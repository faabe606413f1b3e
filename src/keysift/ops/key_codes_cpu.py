"""The CPU kernels behind ``keysift.ops.key_codes``: codes of keys, scores, Hamming distances, and draws by them."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.ops.cpu.library import DTYPES
from keysift.ops.key_codes import LOG2E, SAMPLE, STEPS, Draw, Probe, code_dim, pitch_of, tokens_a_row
from keysift.ops.pages import Quota
from keysift.ops.select_cpu import F32, I32, I64, PTR, View, call, fields, fill_view, pointer, rows_in_one_piece
from keysift.types import KV, Selection

PROBE, FACTORS, DRAW, ESTIMATE = 1, 2, 4, 8

_SIDE = (
    ("codes", PTR),
    ("sizes", PTR),
    ("codes_pitch", I64),
    ("sizes_pitch", I64),
    ("tokens", I64),
    ("planes", I64),
    ("code_dim", I64),
)


class _Hash(View):
    _fields_ = fields(
        *_SIDE,
        ("mean", PTR),
        ("w", PTR),
        ("done", PTR),
        ("most", I64),
        ("step", F32),
        ("reserved_2", F32),
    )


class _Sample(View):
    _fields_ = fields(
        *_SIDE,
        ("q", PTR),
        ("q_stride_b", I64),
        ("q_stride_head", I64),
        ("w", PTR),
        ("heads", I64),
        ("weights", PTR),
        ("line", PTR),
        ("log_c", PTR),
        ("lists", I64),
        ("first", I64),
        ("positions", PTR),
        ("rows", PTR),
        ("log_w", PTR),
        ("counts", PTR),
        ("expected", PTR),
        ("overflow", PTR),
        ("most_rows", I64),
        ("quota_keys", I64),
        ("scores", PTR),
        ("row", I64),
        ("sample", I64),
        ("quota_share", F32),
        ("scale", F32),
        ("state", I32),
        ("independent", I32),
        ("stages", I32),
        ("q_dtype", I32),
    )


class _Hamming(View):
    _fields_ = fields(*_SIDE, ("q_codes", PTR), ("heads", I64), ("out", PTR))


def hash_keys(
    codes: Tensor,
    size: Tensor,
    kv: KV,
    mean_BKD: Tensor,
    w: Tensor,
    planes: int,
    done: Tensor,
    most: int,
    isa: str = "auto",
) -> None:
    """As ``key_codes.hash_keys``."""
    keys, mean, w, done = rows_in_one_piece(kv.k), mean_BKD.float().contiguous(), w.contiguous(), done.contiguous()
    args = _Hash(mean=pointer(mean), w=pointer(w), done=pointer(done), most=most, step=STEPS[planes])
    held = fill_view(args, kv, keys)
    _fill_side(args, codes, size, planes, code_dim(kv.k.shape[3]))
    call("key_hash", args, isa)
    del held


def _fill_side(args: _Hash | _Sample, codes: Tensor, size: Tensor, planes: int, dim: int) -> None:
    args.codes, args.sizes, args.tokens = pointer(codes), pointer(size), codes.shape[2]
    args.codes_pitch, args.sizes_pitch = pitch_of(codes), pitch_of(size)
    args.planes, args.code_dim = planes, dim


class _Step:
    """The arguments of one step's draw, which its stages share."""

    def __init__(self, codes: Tensor, size: Tensor, kv: KV, planes: int, of_query: Probe) -> None:
        self.args = _Sample(heads=of_query.weights.shape[1], lists=kv.k.shape[2])
        self.of_query = of_query
        self._held: list[object] = [fill_view(self.args, kv), of_query, codes, size]
        _fill_side(self.args, codes, size, planes, of_query.weights.shape[2])
        self.args.weights, self.args.line = pointer(of_query.weights), pointer(of_query.line)

    def probe(self, q: Tensor, w: Tensor, planes: int, scale: float) -> None:
        q, w = rows_in_one_piece(q), w.contiguous()
        args = self.args
        args.q, args.q_stride_b, args.q_stride_head, args.q_dtype = pointer(q), *q.stride()[:2], DTYPES[q.dtype]
        args.w, args.scale, args.dim = pointer(w), scale * STEPS[planes] * LOG2E, w.shape[1]
        args.stages |= PROBE
        self._held += [q, w]

    def factors(self, quota: Quota, lists: int) -> Tensor:
        weights, args = self.of_query.weights, self.args
        log_c = torch.empty(weights.shape[:2])
        args.log_c, args.lists, args.quota_share, args.quota_keys = pointer(log_c), lists, quota.share, quota.keys
        args.row = tokens_a_row(weights.shape[1] // args.kv_heads, args.code_dim * args.planes // 8)
        args.sample = SAMPLE
        args.stages |= FACTORS
        return log_c

    def draw(
        self,
        log_c: Tensor,
        state: int,
        positions: Tensor,
        most_rows: int,
        lists: int,
        independent: bool,
        first_head: int = 0,
    ) -> Draw:
        args, shape = self.args, (len(log_c), lists)
        args.first = first_head * lists // args.kv_heads
        positions = positions.contiguous()
        rows = torch.empty(*shape, most_rows, dtype=torch.int32)
        log_w, expected = torch.empty(*shape, most_rows), torch.empty(shape)
        counts, overflow = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.bool)
        args.log_c, args.lists, args.positions, args.most_rows = pointer(log_c), lists, pointer(positions), most_rows
        args.rows, args.log_w, args.counts = pointer(rows), pointer(log_w), pointer(counts)
        args.expected, args.overflow = pointer(expected), pointer(overflow)
        args.state, args.independent = state - ((state >> 31) << 32), independent
        args.stages |= DRAW
        self._held += [log_c, positions]
        return Draw(Selection(rows, counts, log_w), expected, overflow)

    def run(self, isa: str) -> None:
        if self.of_query.weights.numel():
            call("key_sample", self.args, isa)


def _empty_probe(q: Tensor, w: Tensor) -> Probe:
    batch, heads, dim = *q.shape[:2], code_dim(w.shape[1])
    return Probe(torch.empty(batch, heads, dim, dtype=torch.int8), torch.empty(batch, heads, 2))


def probe(
    q: Tensor,
    w: Tensor,
    planes: int,
    scale: float,
    new: tuple[Tensor, Tensor, KV, Tensor, Tensor] | None = None,
    isa: str = "auto",
) -> Probe:
    """The queries' side of scores and, with ``new``, ``hash_keys`` of at most one row."""
    if new is not None:
        codes, size, kv, mean, done = new
        hash_keys(codes, size, kv, mean, w, planes, done, 1, isa)
    kv_heads = w.shape[0]
    out = _empty_probe(q, w)
    none = torch.zeros(len(q), 1, kv_heads, 1)
    side = torch.empty(len(q), kv_heads, 0, dtype=torch.uint8)
    step = _Step(side, side, KV.of(none, none), planes, out)
    step.probe(q, w, planes, scale)
    step.run(isa)
    return out


def factors(
    of_query: Probe, codes: Tensor, size: Tensor, kv: KV, planes: int, quota: Quota, lists: int, isa: str = "auto"
) -> Tensor:
    """Log2 of the factors of a draw, fp32 ``[B, H]``."""
    step = _Step(codes, size, kv, planes, of_query)
    log_c = step.factors(quota, lists)
    step.run(isa)
    return log_c


def draw(
    of_query: Probe,
    log_c: Tensor,
    codes: Tensor,
    size: Tensor,
    kv: KV,
    planes: int,
    state: int,
    positions: Tensor,
    most_rows: int,
    lists: int,
    independent: bool,
    isa: str = "auto",
) -> Draw:
    """``keysift.ops.key_codes.draw_reference`` of the scores that codes estimate."""
    step = _Step(codes, size, kv, planes, of_query)
    out = step.draw(log_c, state, positions, most_rows, lists, independent)
    step.run(isa)
    return out


def sample(
    q: Tensor,
    codes: Tensor,
    size: Tensor,
    kv: KV,
    mean: Tensor,
    w: Tensor,
    planes: int,
    scale: float,
    quota: Quota,
    state: int,
    positions: Tensor,
    most_rows: int,
    per: str,
    independent: bool,
    first_head: int,
    new: Tensor | None,
    isa: str = "auto",
) -> Draw:
    """``keysift.ops.key_codes.sample`` in one call of the library, or two where a row is new."""
    if new is not None:
        hash_keys(codes, size, kv, mean, w, planes, new, 1, isa)
    heads, kv_heads = q.shape[1], w.shape[0]
    lists = kv_heads if per == "kv_head" else heads
    step = _Step(codes, size, kv, planes, _empty_probe(q, w))
    step.probe(q, w, planes, scale)
    log_c = step.factors(quota, lists)
    out = step.draw(log_c, state, positions, most_rows, lists, independent, first_head)
    step.run(isa)
    return out


def estimate(
    q: Tensor, codes: Tensor, size: Tensor, kv: KV, w: Tensor, planes: int, scale: float, isa: str = "auto"
) -> Tensor:
    """As ``key_codes.estimate``."""
    step = _Step(codes, size, kv, planes, _empty_probe(q, w))
    step.probe(q, w, planes, scale)
    scores = torch.empty(*q.shape[:2], kv.bound)
    step.args.scores = pointer(scores)
    step.args.stages |= ESTIMATE
    if scores.numel():
        step.run(isa)
    return scores


def hamming_distance(q_codes: Tensor, k_codes: Tensor, kv: KV, isa: str = "auto") -> Tensor:
    """As ``key_codes.hamming_distance``; 0 outside of the view."""
    batch, heads, bytes_ = q_codes.shape
    kv_heads = k_codes.shape[1]
    q_codes = q_codes.contiguous()
    out = torch.empty(batch, kv_heads, kv.bound, heads // kv_heads, dtype=torch.int16)
    args = _Hamming(q_codes=pointer(q_codes), heads=heads, out=pointer(out))
    held = fill_view(args, kv)
    args.codes, args.tokens, args.planes, args.code_dim = pointer(k_codes), k_codes.shape[2], 1, bytes_ * 8
    args.codes_pitch = pitch_of(k_codes)
    args.dim = args.code_dim
    if out.numel():
        call("key_hamming", args, isa)
    del held
    return out
