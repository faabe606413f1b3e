"""How many sequences of what length fit into the memory there is."""

from __future__ import annotations

import bisect
import math

from keysift.hf.config import context_tokens
from keysift.hf.parallel import is_dealt_out, least
from keysift.hf.served import ServedModel
from keysift.offload import free_bytes, free_device_bytes
from keysift.slots import Slots

SPARE_BYTES = 4 << 30  # of a GPU, for what is computed and for what CUDA graphs keep
HOST_SHARE = 0.5  # of free memory, on a CPU


def slots_for(
    served: ServedModel, max_batch: int, page: int, max_length: int | None, kv_memory: int | None, spare: int = 0
) -> tuple[Slots, int]:
    """Room for a model's sequences.

    Args:
        served: whose layers and decode method say what a token takes.
        max_batch: sequences at a time.
        page: rows a page.
        max_length: tokens of a sequence; None for what the model was made for, or what fits.
        kv_memory: bytes; None for what is free.
        spare: rows of tokens that are drafted past a sequence's end.

    Returns:
        The slots, and tokens that a sequence may have.

    Raises:
        ValueError: not even one sequence fits.
    """
    memory = _free(served) if kv_memory is None else kv_memory
    memory = least(memory) if is_dealt_out(served.model) else memory
    token = token_bytes(served)

    def pages(capacity: int) -> int:
        """That fit, besides what is kept for each sequence of so many rows."""
        return max(0, int((memory - max_batch * sequence_bytes(served, capacity)) / (page * token)))

    wanted = max_length or context_tokens(served.model.config) or memory // token
    per_slot = -(-(wanted + spare) // page)
    if max_length is not None and (there := pages(per_slot * page)) <= per_slot:
        raise ValueError(
            f"max_length={max_length}: one sequence needs {per_slot * page * token / 2**30:.2f} GiB and there is room"
            f" for {max(0, there - 1) * page:,} tokens; choose less, or more kv_memory"
        )
    if pages(per_slot * page) <= per_slot:  # the most pages of which one more are there
        per_slot = bisect.bisect_left(range(per_slot), True, key=lambda n: pages((n + 1) * page) <= n + 1)
    if per_slot < 1:
        raise ValueError(f"kv_memory={memory}: not even one page of {page} tokens fits")
    there = min(pages(per_slot * page), max_batch * per_slot + 1)
    return Slots(max_batch, page, per_slot, there, served.model.device), min(wanted, per_slot * page - spare)


def _free(served: ServedModel) -> int:
    device = served.model.device
    if device.type == "cuda":
        free = free_device_bytes(device)
        return free - min(SPARE_BYTES, free // 4)
    return int(HOST_SHARE * free_bytes())


def token_bytes(served: ServedModel) -> int:
    """Of a token's keys, values and side data, in all layers."""
    method, row = served.keeps_for, sum(shape.row_bytes for shape in served.shapes)
    return row + math.ceil(
        sum(
            shape.kv_heads * side.token_bytes
            for layer, shape in enumerate(served.shapes)
            if layer not in method.dense_layers
            for side in method.sides(shape.dim, shape.dtype).values()
        )
    )


def sequence_bytes(served: ServedModel, capacity: int) -> int:
    """Of what the decode method keeps once a sequence of at most so many rows."""
    method = served.keeps_for
    return sum(
        math.prod(state.shape) * state.dtype.itemsize
        for layer, shape in enumerate(served.shapes)
        if layer not in method.dense_layers
        for state in method.states(shape.kv_heads, shape.dim, capacity).values()
    )


def draft_cost(served: ServedModel, sequences: int, tokens: int, other: tuple[ServedModel, int] | None = None) -> float:
    """Bytes that a draft step reads, as a share of a dense step's, with all slots full; ``other`` is a draft model and
    the rows of its sequences."""
    method, (weights, rows) = served.keeps_for, (_weights_and_rows(served, sequences))
    if other is not None:
        others_weights, others_rows = _weights_and_rows(other[0], sequences)
        return (others_weights + others_rows * other[1]) / (weights + rows * tokens)
    most = getattr(method, "most", None)
    read = min(tokens, method.sinks + method.window + (most(tokens) if most else 0))
    scanned = (token_bytes(served) * sequences - rows) * tokens
    return min(1.0, (weights + rows * read + scanned) / (weights + rows * tokens))


def _weights_and_rows(served: ServedModel, sequences: int) -> tuple[int, int]:
    """Bytes of a model's weights, embeddings apart, and of a row of so many sequences' keys and values."""
    weights = sum(x.numel() * x.element_size() for name, x in served.model.named_parameters() if "embed" not in name)
    return weights, sum(shape.row_bytes for shape in served.shapes) * sequences
