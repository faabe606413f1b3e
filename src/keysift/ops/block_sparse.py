"""Attention under a block mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.ops import block_sparse_cpu, fa4
from keysift.ops.dense import keys_values, triton_kernels, uniform_span
from keysift.types import KV, BlockMask, Partial, one_of

GATHERED_ELEMENTS = 1 << 26  # so many elements of keys, and as many of values, are gathered at a time

Backend = Literal["auto", "fa4", "triton", "cpu", "sdpa"]


def block_sparse_attention(
    q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float, with_lse: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last T positions over the key blocks of ``mask``.

    Only the queries whose block is in the mask are computed: with ``p`` the position of the first query, those at
    positions ``max(p, mask.rows().start) .. min(N, mask.rows().stop) - 1``.

    Args:
        q_BTHD: queries; all sequences of the batch have one length.
        kv: keys and values, N of them; where they lie in pages, "triton" reads them there and "sdpa" gathers them.
        mask: key blocks per query head and query block.
        scale: factor on q.k.
        with_lse: also return the log-sum-exp.
        backend: "fa4" for FlashAttention-4, "triton" for the kernel of ``block_sparse_triton``, "sdpa" for torch's SDPA
            on gathered keys (fp32 arithmetic where the log-sum-exp is asked for), "cpu" for the kernel of ``ops.cpu``,
            "auto" for the first of them that takes the case.

    Returns:
        Output in q's dtype, ``[B, rows, H, Dv]``, zero for a query without blocks; lse, fp32 natural log,
        ``[B, rows, H]``, -inf for a query without blocks, or None.

    Raises:
        ValueError: the backend was asked for by name and does not take the case.
    """
    choice = _choose(backend, q_BTHD, kv, mask.block, scale)
    if choice == "fa4":
        return fa4.block_sparse(q_BTHD, *keys_values(kv), mask, scale, with_lse)
    if choice == "triton":
        return triton_kernels().block_sparse(q_BTHD, kv, mask, scale, with_lse)
    if choice == "cpu":
        return block_sparse_cpu.block_sparse(q_BTHD, kv, mask, scale, with_lse)
    if with_lse:
        part = block_sparse_attention_reference(q_BTHD, kv, mask, scale)
        return part.out.to(q_BTHD.dtype), part.lse
    by_sdpa = _by_query_block if q_BTHD.is_cuda else _by_tile  # few large launches, or no wasted work
    return by_sdpa(q_BTHD, kv, mask, scale), None


def block_sparse_attention_varlen(
    q_THD: Tensor,
    cu_seqlens_q: Sequence[int],
    kv: KV,
    masks: Sequence[BlockMask],
    scale: float,
    with_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention over key blocks for a ragged batch of packed queries; one launch on "triton".

    Args:
        q_THD: queries of all sequences, one behind the other, ``[total, H, D]``; those of a sequence are its last
            positions.
        cu_seqlens_q: rows of ``q_THD`` at which the sequences begin, and ``total``; B + 1 numbers of the host.
        kv: keys and values of B sequences, with spans that the host knows: padded, paged, or packed, that is one buffer
            ``[1, S, K, D]`` expanded to B with the rows of each as its span.
        masks: one a sequence (batch 1) with one block size, over all query blocks that hold queries of the sequence.
        scale: factor on q.k.
        with_lse: also return the log-sum-exp.
        backend: as in ``block_sparse_attention``.

    Returns:
        Output in q's dtype, ``[total, H, Dv]``, zero for a query without blocks; lse, fp32 ``[total, H]``, or None.

    Raises:
        ValueError: lengths or masks do not fit together, or the backend does not take the case.
    """
    spans = kv.known_spans()
    _check_ragged(q_THD, cu_seqlens_q, spans, masks)
    block = masks[0].block if masks else 0
    choice = _choose(backend, q_THD[None], kv, block, scale, ragged=True) if masks else "sdpa"
    if choice == "triton":
        return triton_kernels().block_sparse_varlen(q_THD, cu_seqlens_q, kv, masks, scale, with_lse)
    if choice == "cpu":
        return block_sparse_cpu.block_sparse_varlen(q_THD, cu_seqlens_q, kv, masks, scale, with_lse)
    outs, lses = [q_THD.new_empty(0, q_THD.shape[1], kv.v.shape[-1])], [q_THD.new_empty(0, q_THD.shape[1]).float()]
    for b, (mask, (start, end)) in enumerate(zip(masks, spans, strict=True)):
        q = q_THD[None, cu_seqlens_q[b] : cu_seqlens_q[b + 1]]
        if not q.shape[1]:
            continue
        if choice == "fa4":
            k, v = (x[b : b + 1, start:end] for x in (kv.k, kv.v))
            out, lse = fa4.block_sparse(q, k, v, mask, scale, with_lse)
        else:
            out, lse = block_sparse_attention(q, kv.only(b), mask, scale, with_lse, "sdpa")
        outs.append(out[0])
        lses.extend([] if lse is None else [lse[0]])
    return torch.cat(outs), torch.cat(lses) if with_lse else None


def _check_ragged(
    q_THD: Tensor, cu_seqlens_q: Sequence[int], spans: Sequence[tuple[int, int]], masks: Sequence[BlockMask]
) -> None:
    if not len(cu_seqlens_q) - 1 == len(spans) == len(masks):
        counts = f"{len(cu_seqlens_q) - 1}, {len(spans)} and {len(masks)}"
        raise ValueError(f"queries, keys and masks are of {counts} sequences: give one of each a sequence")
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != q_THD.shape[0]:
        ends = f"from {cu_seqlens_q[0]} to {cu_seqlens_q[-1]}"
        raise ValueError(f"cu_seqlens_q runs {ends}: it has to run from 0 to the number of queries, {q_THD.shape[0]}")
    for b, ((start, end), mask) in enumerate(zip(spans, masks, strict=True)):
        tokens, keys, block = cu_seqlens_q[b + 1] - cu_seqlens_q[b], end - start, mask.block
        if not 0 <= tokens <= keys:
            raise ValueError(f"sequence {b}: {tokens} queries and {keys} keys; queries are the last of its positions")
        if block != masks[0].block:
            raise ValueError(f"masks of block {masks[0].block} and {block}: one launch has one block size")
        due = range((keys - tokens) // block, -(-keys // block))
        if tokens and range(mask.first, mask.first + mask.full_count.shape[2]) != due:
            raise ValueError(
                f"sequence {b}: its mask has to cover query blocks {due.start} to {due.stop - 1}, no others"
            )


def _choose(backend: Backend, q: Tensor, kv: KV, block: int, scale: float, ragged: bool = False) -> Backend:
    """The backend that runs."""
    one_of("backend", backend, ("auto", "fa4", "triton", "cpu", "sdpa"))
    if backend == "cpu" or backend == "auto" and not q.is_cuda:
        lacks = block_sparse_cpu.unsupported(q, kv, block, scale)
        if lacks is None:
            return "cpu"
        if backend == "cpu":
            raise ValueError(f"backend=cpu: needs {lacks}")
        return "sdpa"
    if backend == "sdpa":
        return "sdpa"
    if backend != "triton":
        lacks = _lacks_fa4(q, kv, block, scale, ragged)
        if lacks is None:
            return "fa4"
        if backend == "fa4":
            raise ValueError(f"backend=fa4: needs {lacks}")
    kernels = triton_kernels()
    lacks = kernels.unsupported(q, kv, block, scale) if kernels else "the package triton; pip install triton"
    if lacks is None and not ragged and len({end - start for start, end in kv.known_spans()}) > 1:
        lacks = "sequences of one length; block_sparse_attention_varlen takes others"
    if lacks is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend=triton: needs {lacks}")
    return "sdpa"


def _lacks_fa4(q: Tensor, kv: KV, block: int, scale: float, ragged: bool) -> str | None:
    lacks = fa4.unsupported(q, kv.k, kv.v, scale, block)
    if lacks is None and kv.table is not None:
        lacks = "keys in one piece; backend=triton reads pages"
    if lacks is None and not ragged and len(set(kv.known_spans())) > 1:
        lacks = "sequences in the same rows of the buffer; backend=triton takes others"
    return lacks


def block_sparse_attention_reference(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Partial:
    """The same in fp32."""
    rows = _computed_rows(q_BTHD, kv, mask)
    heads, width = q_BTHD.shape[2], kv.v.shape[-1]
    out = q_BTHD.new_zeros(q_BTHD.shape[0], len(rows), heads, width, dtype=torch.float32)
    lse = q_BTHD.new_full((q_BTHD.shape[0], len(rows), heads), -torch.inf, dtype=torch.float32)
    for tile in _tiles(q_BTHD, kv, mask):
        score = tile.q.float() @ tile.k.float().T * scale
        if tile.seen is not None:
            score = score.masked_fill(~tile.seen, -torch.inf)
        out[tile.at] = score.softmax(-1) @ tile.v.float()
        lse[tile.at] = score.logsumexp(-1)
    return Partial(out, lse)


def _by_tile(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Tensor:
    """Torch SDPA on the gathered keys of each tile."""
    rows = _computed_rows(q_BTHD, kv, mask)
    out = q_BTHD.new_zeros(q_BTHD.shape[0], len(rows), q_BTHD.shape[2], kv.v.shape[-1])
    for tile in _tiles(q_BTHD, kv, mask):
        q, k, v = (x[None, None] for x in (tile.q, tile.k, tile.v))
        out[tile.at] = F.scaled_dot_product_attention(q, k, v, tile.seen, scale=scale)[0, 0]
    return out


def _by_query_block(q_BTHD: Tensor, kv: KV, mask: BlockMask, scale: float) -> Tensor:
    """Torch SDPA on the gathered keys of all heads of a query block, padded to the longest list."""
    rows, offset, block = _computed_rows(q_BTHD, kv, mask), _num_keys(kv) - q_BTHD.shape[1], mask.block
    k, v = _blocks(kv, block)
    batch, heads = q_BTHD.shape[0], q_BTHD.shape[2]
    active = mask.active(k.shape[2])
    order = torch.argsort(active.byte(), dim=-1, descending=True, stable=True)
    count = active.sum(-1)
    longest = count.amax((0, 1)).tolist()
    if batch * heads * max(longest) * block * k.shape[-1] > GATHERED_ELEMENTS:
        return _by_tile(q_BTHD, kv, mask, scale)
    b = torch.arange(batch, device=q_BTHD.device)[:, None, None]
    kv_head = (torch.arange(heads, device=q_BTHD.device) // (heads // k.shape[1]))[:, None]
    triangle = torch.ones(block, block, dtype=torch.bool, device=q_BTHD.device).tril()
    out = q_BTHD.new_zeros(batch, len(rows), heads, v.shape[-1])
    for i, most in enumerate(longest):
        first = (mask.first + i) * block
        lo, hi = max(first, rows.start), min(first + block, rows.stop)
        if lo >= hi or not most:
            continue
        chosen = order[:, :, i, :most]
        used = torch.arange(most, device=q_BTHD.device) < count[:, :, i, None]
        on_diagonal = (chosen == mask.first + i)[..., None, :, None]
        seen = used[..., None, :, None] & (~on_diagonal | triangle[lo - first : hi - first, None])
        part = F.scaled_dot_product_attention(
            q_BTHD[:, lo - offset : hi - offset].transpose(1, 2),
            k[b, kv_head, chosen].flatten(2, 3),
            v[b, kv_head, chosen].flatten(2, 3),
            seen.flatten(3),
            scale=scale,
        )
        out[:, lo - rows.start : hi - rows.start] = part.masked_fill(~used[..., :1, None], 0).transpose(1, 2)
    return out


class _Tile(NamedTuple):
    """One query block of one head, with the keys it reads."""

    at: tuple[int, slice, int]  # where its output goes
    q: Tensor  # [rows, D]
    k: Tensor  # [keys, D]
    v: Tensor  # [keys, Dv]
    seen: Tensor | None  # [rows, keys]; None for all


def _tiles(q_BTHD: Tensor, kv: KV, mask: BlockMask) -> Iterator[_Tile]:
    """The tiles that have keys. Keys past the end pad the last block with zeros; the causal mask hides them."""
    rows, offset = _computed_rows(q_BTHD, kv, mask), _num_keys(kv) - q_BTHD.shape[1]
    k, v = _blocks(kv, mask.block)
    group = q_BTHD.shape[2] // k.shape[1]
    triangle = torch.ones(mask.block, mask.block, dtype=torch.bool, device=q_BTHD.device).tril()
    num_full, num_partial = mask.full_count.tolist(), mask.partial_count.tolist()
    for i in range(mask.full_count.shape[2]):
        first = (mask.first + i) * mask.block
        lo, hi = max(first, rows.start), min(first + mask.block, rows.stop)
        for b in range(q_BTHD.shape[0]):
            for h in range(q_BTHD.shape[2]):
                full, partial = num_full[b][h][i], num_partial[b][h][i]
                if lo >= hi or not full + partial:
                    continue
                blocks = torch.cat([mask.full_index[b, h, i, :full], mask.partial_index[b, h, i, :partial]])
                seen = F.pad(triangle[lo - first : hi - first], (full * mask.block, 0), value=True) if partial else None
                yield _Tile(
                    (b, slice(lo - rows.start, hi - rows.start), h),
                    q_BTHD[b, lo - offset : hi - offset, h],
                    k[b, h // group, blocks].flatten(0, 1),
                    v[b, h // group, blocks].flatten(0, 1),
                    seen,
                )


def _blocks(kv: KV, block: int) -> tuple[Tensor, Tensor]:
    """Keys and values by block, ``[B, K, C, block, *]``; zeros fill the last one."""
    fill = -_num_keys(kv) % block
    k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4) for x in keys_values(kv))
    return k, v


def _computed_rows(q_BTHD: Tensor, kv: KV, mask: BlockMask) -> range:
    keys = _num_keys(kv)
    return range(max(keys - q_BTHD.shape[1], mask.rows().start), min(keys, mask.rows().stop))


def _num_keys(kv: KV) -> int:
    start, end = uniform_span(kv)
    return end - start
