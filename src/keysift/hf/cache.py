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
from keysift.offload import HostTier, OffloadedStore


class KVLayer(DynamicLayer):
    """One layer of a cache: a ``Store`` behind transformers' interface."""

    is_croppable = True

    def __init__(self, tier: HostTier | None = None, offloaded: int = 0) -> None:
        """In a cache of which so many layers live on the host, if it has a tier there."""
        super().__init__()
        self.store = Store()
        self.tier, self.layers_on_host = tier, offloaded

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.tier is not None:
            self.tier.admit(key_states, value_states, self.layers_on_host)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states, value_states)
        self.show()
        assert self.keys is not None and self.values is not None
        for tensor in (self.keys, self.values):
            tensor._keysift_store = self.store  # type: ignore[attr-defined]  # how the attention function finds it
        return self.keys, self.values

    def show(self) -> None:
        """Show the rows that there are as transformers' ``keys`` and ``values``."""
        self.keys, self.values = self.store.keys, self.store.values

    def get_seq_length(self) -> int:
        return self.store.length

    def reset(self) -> None:
        self.store = Store()
        self.is_initialized = False
        self.show()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove")
        self.store.truncate(self.store.length + tokens_to_remove)
        self.show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)
        self.show()

    def offload(self) -> None:
        raise ValueError("keysift does not support offloaded caches")

    prefetch = offload


class OffloadedLayer(KVLayer):
    """One layer whose rows live in host memory: what attention gets back are the new rows, and where they belong."""

    def __init__(self, tier: HostTier, offloaded: int) -> None:
        super().__init__(tier, offloaded)
        self.offloaded = OffloadedStore(tier)

    def show(self) -> None:
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.offloaded.append(key_states, value_states)
        for tensor in (key_states, value_states):
            tensor._keysift_store = self.offloaded  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.offloaded.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.offloaded.length + query_length, 0

    def reset(self) -> None:
        tier = self.offloaded.tier
        tier.forget()
        self.offloaded = OffloadedStore(tier)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove")
        self.offloaded.truncate(self.offloaded.length + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        slots = self.offloaded.slots
        if slots is not None:
            self.batch_select_indices(torch.arange(len(slots)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.offloaded.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)


class KVCache(DynamicCache):
    """A preallocated cache with the methods' side data; pass it as ``past_key_values`` to keep it between turns.

    Without one, an attached model turns the empty cache that ``generate`` makes into this kind.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        adopt(self)


def adopt(cache: Cache, tier: HostTier | None = None) -> None:
    """Put our layers in the place of a dynamic cache's own, what they hold included.

    Args:
        cache: that of ``generate``, or the user's.
        tier: for caches whose rows live on the host; None for those on the model's device.

    Raises:
        ValueError: static, quantised, offloaded or other caches.
    """
    if type(cache) not in (DynamicCache, KVCache) or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ValueError(f"keysift does not support {kind}: pass a DynamicCache or keysift.KVCache, or none")
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = KVLayer
    if tier is not None and not cache.layers:
        raise ValueError("kv_device=cpu: make the cache with the model's config, keysift.KVCache(model.config)")
    kinds = (DynamicLayer,) if tier is None else (DynamicLayer, KVLayer)
    full = {
        i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer) and type(layer) in kinds
    }
    offloaded = [] if tier is None else [i for i in full if i not in tier.method.dense_layers]
    if any(full[i].get_seq_length() for i in offloaded):
        raise ValueError("kv_device=cpu: the cache holds rows already; begin with an empty one")
    for i, layer in enumerate(cache.layers):
        if i in full:
            of_tier = OffloadedLayer if tier is not None and i in offloaded else KVLayer
            ours = of_tier(tier, len(offloaded))  # type: ignore[arg-type]
            cache.layers[i] = ours
            before = full[i]
            if before.keys is not None and before.values is not None and before.get_seq_length():
                ours.update(before.keys, before.values)
                ours.store.end_prompt()
        elif not isinstance(layer, (KVLayer, DynamicSlidingWindowLayer)):
            raise ValueError(f"keysift does not support cache layers of type {type(layer).__name__}")
    cache.__dict__["_keysift"] = "gpu" if tier is None else "cpu"  # layers that it adds later are ours too
