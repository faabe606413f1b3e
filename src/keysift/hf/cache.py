"""Our cache behind transformers' interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from keysift.cache import Store


class KVLayer(DynamicLayer):
    """One layer of a cache: a ``Store`` behind transformers' interface."""

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states, value_states)
        self._show()
        assert self.keys is not None and self.values is not None
        for tensor in (self.keys, self.values):
            tensor._keysift_store = self.store  # type: ignore[attr-defined]  # how the attention function finds it
        return self.keys, self.values

    def _show(self) -> None:
        self.keys, self.values = self.store.keys, self.store.values

    def get_seq_length(self) -> int:
        return self.store.length

    def reset(self) -> None:
        self.store = Store()
        self.is_initialized = False
        self._show()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove")
        self.store.truncate(self.store.length + tokens_to_remove)
        self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)
        self._show()

    def offload(self) -> None:
        raise ValueError("keysift does not support offloaded caches")

    prefetch = offload


class KVCache(DynamicCache):
    """A preallocated cache with the methods' side data; pass it as ``past_key_values`` to keep it between turns.

    Without one, an attached model turns the empty cache that ``generate`` makes into this kind.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        adopt(self)


def adopt(cache: Cache) -> None:
    """Put our layers in the place of a dynamic cache's own, what they hold included.

    Raises:
        ValueError: static, quantised, offloaded or other caches.
    """
    if type(cache) not in (DynamicCache, KVCache) or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ValueError(f"keysift does not support {kind}: pass a DynamicCache or keysift.KVCache, or none")
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = KVLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = ours = KVLayer()
            if layer.keys is not None and layer.values is not None and layer.get_seq_length():
                ours.update(layer.keys, layer.values)
                ours.store.end_prompt()
        elif not isinstance(layer, (KVLayer, DynamicSlidingWindowLayer)):
            raise ValueError(f"keysift does not support cache layers of type {type(layer).__name__}")
    cache.__dict__["_keysift"] = True  # layers that it adds later are ours too
