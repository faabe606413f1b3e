"""FlashAttention-4 (package flash-attn-4, written against 4.0.0b36): dense and block-sparse attention on recent GPUs.

The package is imported when it is first needed. The first call of each combination of dtype, head dims and group size
compiles for some seconds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keysift.types import BlockMask

INSTALL = "pip install 'keysift[hopper]'"


@functools.cache
def available() -> bool:
    """Whether the package can be found; it is not imported for that."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # neither is its parent package
        return False


def unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int | None = None) -> str | None:
    """What keeps FlashAttention-4 from taking the case, in words that follow "needs"; None where it takes it.

    Args:
        q, k, v: queries, keys and values, ``[B, *, heads, dim]``.
        scale: factor on q.k.
        block: tokens of a block of the mask; None for dense attention.
    """
    dim, v_dim = q.shape[-1], v.shape[-1]
    if not available():
        return f"the package flash-attn-4; {INSTALL}"
    if not q.is_cuda or torch.version.cuda is None:
        return f"tensors on an NVIDIA GPU, not on {q.device.type}"
    major = torch.cuda.get_device_capability(q.device)[0]
    if major not in (9, 10) or (block is not None and major != 9):  # there its query tiles are of 256 rows
        return f"compute capability 9{'' if block else ' or 10'}, not {major}"
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)):
        return f"q, k and v all in bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "torch.no_grad()"
    if not (scale > 0 and math.isfinite(scale)):
        return f"a positive scale, not {scale}"
    if dim % 8 or v_dim % 8 or not _takes_dims(major, dim, v_dim):
        return f"head dims that it has kernels for, not {dim} and {v_dim}"
    if block is not None and not (block == 64 or block == 128 and (dim <= 128 or dim <= 192 and v_dim <= 128)):
        return f"a mask of block 64, or of block 128 and head dims up to 128, not block {block} and dim {dim}"
    return None


def _takes_dims(major: int, dim: int, v_dim: int) -> bool:
    if major == 9:
        return max(dim, v_dim) <= 256
    return max(dim, v_dim) <= 128 or (dim, v_dim) in ((192, 128), (256, 256))


def dense(
    q_BTHD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, scale: float, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last T of N positions over all keys.

    Returns:
        Output in q's dtype ``[B, T, H, Dv]``; lse, fp32 ``[B, T, H]``, or None.
    """
    return _forward(q_BTHD, k_BNKD, v_BNKD, scale, with_lse, causal=True)


def block_sparse(
    q_BTHD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: BlockMask, scale: float, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last T of N positions over the key blocks of ``mask``.

    Returns:
        What ``block_sparse_attention`` returns: the mask's query rows only.
    """
    tokens, keys, block = q_BTHD.shape[1], k_BNKD.shape[1], mask.block
    lo, hi = max(keys - tokens, mask.rows().start), min(keys, mask.rows().stop)
    if hi <= lo:
        empty = q_BTHD.new_empty(q_BTHD.shape[0], 0, q_BTHD.shape[2], v_BNKD.shape[-1])
        return empty, empty.new_empty(empty.shape[:3], dtype=torch.float32) if with_lse else None
    q = q_BTHD[:, lo - (keys - tokens) : hi - (keys - tokens)]
    # its query tiles start at the first query and take their positions from how many keys there are more than queries,
    # so queries begin with a block and keys end with the last query
    skipped, missing = divmod(lo - mask.rows().start, block)
    if missing:
        q = F.pad(q, (0, 0, 0, 0, missing, 0))
    used = slice(skipped, skipped + -(-q.shape[1] // block))
    partial_count, partial_index, full_count, full_index = (x[:, :, used] for x in mask[:4])
    lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(
        mask_block_cnt=partial_count.contiguous(),
        mask_block_idx=_filled(partial_index),
        full_block_cnt=full_count.contiguous(),
        full_block_idx=_filled(full_index),
        block_size=(block, block),
    )
    out, lse = _forward(
        q,
        k_BNKD[:, :hi],
        v_BNKD[:, :hi],
        scale,
        with_lse,
        mask_mod=_causal(),
        block_sparse_tensors=lists,
        pack_gqa=False,
    )
    return out[:, missing:], None if lse is None else lse[:, missing:]


def _filled(index: Tensor) -> Tensor:
    """A list that is nowhere used still needs an element to point at."""
    return index.contiguous() if index.shape[-1] else F.pad(index, (0, 1))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool, **options: Any) -> tuple:
    interface = importlib.import_module("flash_attn.cute.interface")
    # the public function drops the lse, or keeps what a backward needs
    with torch.cuda.device(q.device):
        out, lse, *_ = interface._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=with_lse, **options)
    return out, lse.transpose(1, 2) if with_lse else None


@functools.cache
def _causal() -> Callable[..., Any]:
    """The mask of the diagonal blocks; one object, for a new one would be compiled anew."""
    cute = importlib.import_module("cutlass.cute")
    cutlass = importlib.import_module("cutlass")
    scalar_to_ssa = importlib.import_module("flash_attn.cute.utils").scalar_to_ssa

    @cute.jit
    def causal(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        before = scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)
        return kv_idx <= q_idx + before

    return causal
