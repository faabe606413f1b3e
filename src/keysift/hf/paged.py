"""A model's decode step over paged slots, captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from keysift.cache import Store
from keysift.slots import Slots

WARMUP_STEPS = 2  # before a capture: layers and kernels are compiled, and buffers made


class PagedLayer(CacheLayerMixin):
    """One layer of a paged cache: what attention gets back are the new rows, and the store to which they were added."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.store.write(key_states.transpose(1, 2), value_states.transpose(1, 2))
        for tensor in (key_states, value_states):
            tensor._keysift_store = self.store  # type: ignore[attr-defined]  # how the attention function finds it
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        assert self.store.slots is not None
        return self.store.slots.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.length, 0


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads of a decoder's layer, and their dim."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, dim


class PagedCache(Cache):
    """Slots that all layers of a model share, for decode steps of one token each; ``slots.append`` comes before a step.

    Args:
        model: whose layers, heads and dtype are taken.
        slots: the sequences.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots) -> None:
        config = model.config.get_text_config(decoder=True)
        kv_heads, dim = kv_shape(config)
        self.slots = slots
        self.stores = [Store.in_pages(slots, kv_heads, dim, dim, model.dtype) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=[PagedLayer(store) for store in self.stores])
        self.__dict__["_keysift"] = True


class StepGraph:
    """Greedy decode steps of all slots. On a GPU each is a replay of one graph; on a CPU it is computed afresh.

    Side data of the prompts must have been begun (``Store.begin``), and rows for the steps reserved.

    Attributes:
        ids: newest token of each slot, which the next step reads and then replaces, int64 ``[slots, 1]``.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache, limit: int) -> None:
        """Capture a step for sequences of at most ``limit`` rows, the new one included."""
        self.model, self.cache, self.limit = model, cache, limit
        self.ids = torch.zeros(len(cache.slots), 1, dtype=torch.int64, device=cache.slots.device)
        self._one = torch.ones(len(cache.slots), dtype=torch.int64, device=cache.slots.device)
        self.graph = captured(self._step, cache.slots) if self.ids.is_cuda else None
        self.ids.zero_()

    def step(self) -> None:
        """One more token for every slot."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        self.cache.slots.note([1] * len(self.cache.slots))

    def eager_step(self) -> None:
        """The same, computed afresh on a GPU too."""
        self._step()
        self.cache.slots.note([1] * len(self.cache.slots))

    def _step(self) -> None:
        slots = self.cache.slots
        with torch.no_grad(), slots.unknown_lengths(self.limit):
            slots.append(self._one)
            position = (slots.length - 1).clamp(min=0)[:, None]
            out = self.model(input_ids=self.ids, position_ids=position, past_key_values=self.cache, use_cache=True)
            self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))


def captured(
    step: Callable[[], None], slots: Slots, beside: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph:
    """A step of all slots as a graph; the slots are left as they were.

    Args:
        step: appends to the slots what the host is not told of.
        beside: another graph, of which the memory can be used too: the two never run at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            step()
            slots.take_back()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None if beside is None else beside.pool()):
        step()
    slots.take_back()
    return graph
