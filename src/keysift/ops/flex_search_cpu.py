"""The CPU kernel of the search for key blocks: what share of its attention a query row gives to each block."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from keysift.ops.attention_cpu import KEY_FIELDS, dense_rows, fields, key_values
from keysift.ops.cpu.library import DTYPES, Args, function, isa_of, threads


class RowMassArgs(Args):
    """``ks_row_mass_args`` of prefill.h."""

    _fields_ = (
        *KEY_FIELDS,
        *fields(ctypes.c_int64, "q_stride2 tokens keys"),
        *fields(ctypes.c_void_p, "start position"),
        *fields(ctypes.c_int64, "rows block"),
        *fields(ctypes.c_void_p, "mass"),
        *fields(ctypes.c_int32, "q_dtype kv_dtype out_dtype"),
        ("scale", ctypes.c_float),
    )


_BYTES = ctypes.sizeof(RowMassArgs)


def row_mass(q_BTHD: Tensor, k_BNKD: Tensor, scale: float, block: int, position: Tensor, isa: str = "auto") -> Tensor:
    """Exact share of attention by key block of some query rows, fp32 ``[B, H, rows, ceil(N / block)]``.

    Keys are read once for the rows of all heads that share them, 64 at a time; a block's weights are summed relative to
    its highest, so that no row is gone through twice.

    Args:
        q_BTHD: queries of the last T positions.
        k_BNKD: keys of all N.
        scale: factor on q.k.
        block: tokens a block.
        position: of the rows, ascending, int64.
        isa: forces a path.

    Raises:
        ValueError: a position without a query.
    """
    (batch, tokens, heads, _), keys = q_BTHD.shape, k_BNKD.shape[1]
    q, k, position = dense_rows(q_BTHD), dense_rows(k_BNKD), position.contiguous()
    start = torch.zeros(batch, dtype=torch.int64)
    mass = torch.zeros(batch, heads, len(position), -(-keys // block))
    function("row_mass", RowMassArgs)(
        RowMassArgs(
            _BYTES, isa_of(isa), threads(),
            *key_values(q, heads, k, k, None),
            q.stride(2), tokens, keys, start.data_ptr(), position.data_ptr(), len(position), block,
            mass.data_ptr(), DTYPES[q.dtype], DTYPES[k.dtype], 0, scale,
        )
    )  # fmt: skip
    return mass
