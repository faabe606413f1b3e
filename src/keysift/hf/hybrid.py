"""Greedy decode steps of batches whose rows are in host memory, several batches in flight.

While the host attends for a layer of one batch, the device computes for another, so that neither waits for long. On a
GPU a step is a chain of CUDA graphs, cut where the host's part of a layer begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from keysift.attention import attend_beside, attend_on_host, decode, select
from keysift.cache import Store
from keysift.hf.cache import KVLayer, OffloadedLayer
from keysift.methods import dense
from keysift.offload import HOST, Mailbox
from keysift.ops.attention_cpu import repeated_gather
from keysift.ops.cpu.library import beside
from keysift.ops.merge import merge
from keysift.slots import Slots, ordinary_tensors
from keysift.types import Ctx, Decode, Law, Partial, Selection

DENSE = dense.Method()
EAGER_STEPS = 2  # before graphs are captured: kernels are compiled, and buffers made
TAKEN = "taken"  # how a cache is marked while steps have it


class Span(NamedTuple):
    """What one side did for a layer of a batch, in seconds since the trace began.

    Attributes:
        batch: which of the batches.
        layer: whose rows on the host the device's work comes before, or the host attends to; None after the last.
        device: "gpu" or "cpu".
    """

    batch: int
    layer: int | None
    device: str
    start: float
    end: float


class _Piece(NamedTuple):
    graph: torch.cuda.CUDAGraph
    host: _OnHost | None  # that the host works for once the graph is through


class HybridLayer(CacheLayerMixin):
    """One layer of a batch: what attention gets back are the new rows, and where the others are."""

    is_initialized = True

    def __init__(self, batch: _Batch, store: Store) -> None:
        super().__init__()
        self.batch, self.store = batch, store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = key_states.transpose(1, 2), value_states.transpose(1, 2)
        for tensor in (key_states, value_states):
            tensor._keysift_store = self  # type: ignore[attr-defined]  # how the attention function finds it
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        return self.batch.limit

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.length + query_length, 0

    def attend(self, q_BHD: Tensor, method: Decode, ctx: Ctx) -> Tensor:
        """Add the new rows and attend with one query a sequence; output in q's dtype ``[B, H, Dv]``."""
        self.store.write(*self.new)
        return decode(q_BHD, self.store, DENSE, ctx, None)[0]


class _OnHost(HybridLayer):
    """A layer whose rows are on the host."""

    def __init__(self, batch: _Batch, layer: OffloadedLayer) -> None:
        store = layer.offloaded
        super().__init__(batch, store.host)
        self.near, self.side = store.near, store.side
        self.shift, self.there, self.back = store.shift, Mailbox(), Mailbox()
        self._law: Law | None = None
        self._chosen = False
        self._gather: Callable[[], None] | None = None  # over the tensors of both mailboxes

    def attend(self, q_BHD: Tensor, method: Decode, ctx: Ctx) -> Tensor:
        self.near.write(*self.new)
        k, v = self.new
        self.there.put(q=q_BHD, k=k, v=v)
        if self.side is not None and self.side.slots is not None:
            self.side.refresh(method, self.near, self.shift, ctx)
            ctx = ctx._replace(positions=self.side.slots.positions)
            self._send(select(q_BHD, self.side, method, ctx, None, self.store))
        beside = attend_beside(q_BHD, self.near, method, ctx.scale)
        self._asked = method, ctx._replace(positions=torch.zeros(0))
        self.back.room(out=beside.out, lse=beside.lse)
        self.batch.cut(self)
        out, lse = (self.back[name].to(q_BHD.device, non_blocking=True) for name in ("out", "lse"))
        return merge(beside, Partial(out, lse)).out[:, 0].to(q_BHD.dtype)

    def _send(self, selection: Selection | None) -> None:
        self._chosen = selection is not None
        if selection is None:
            return
        self.there.put(rows=selection.rows, count=selection.count)
        if isinstance(selection.log_w, Law):
            self._law = self._law or Law(*(x.to(HOST) for x in selection.log_w))  # a sequence's stays what it is
        elif selection.log_w is not None:
            self.there.put(log_w=selection.log_w)

    def work(self) -> None:
        """The host's part, once the device's have arrived."""
        method, ctx = self._asked
        there = self.there
        self.batch.count_on_host(self)
        self.store.put(there["k"], there["v"])
        if self._gather is not None and self._chosen:
            return self._gather()
        if self.side is None:
            ctx = ctx._replace(positions=self.store.view().length - 1)
            selection = select(there["q"], self.store, method, ctx, None)
        else:
            selection = self._selection() if self._chosen else None
        part = attend_on_host(there["q"], self.store, selection, method, ctx.scale)
        self.back.put(out=part.out, lse=part.lse)

    def settle(self) -> None:
        """Nothing moves from here on: what the host does may be prepared."""
        if self._chosen:
            out, lse = self.back["out"], self.back["lse"]
            self._gather = repeated_gather(
                self.there["q"], self.store.view(), self._selection(), self._asked[1].scale, out, lse
            )

    def _selection(self) -> Selection:
        return Selection(self.there["rows"], self.there["count"], self._law or self.there.get("log_w"))


class _Batch:
    """One batch: its layers, its newest tokens, and its step, captured in pieces on a GPU."""

    def __init__(self, model: PreTrainedModel, cache: Cache, ids: Tensor, room: int, others: int) -> None:
        self.others = others  # batches in flight at the same time
        self.model, self.limit, self.done, self.room = model, cache.get_seq_length() + room, 0, room
        self._counted: dict[str, tuple[Slots, int]] = {}  # by the device, with what they may come to
        self._on_host: Slots | None = None
        self.layers = [self._layer(layer) for layer in cache.layers]
        self._leader = next((layer for layer in self.layers if isinstance(layer, _OnHost)), None)
        self.cache = Cache(layers=[*self.layers])
        self.cache.__dict__["_keysift"] = "cpu"
        device = ids.device
        slots = self.layers[0].store.slots
        assert slots is not None
        rows = [length - start for length, start in zip(slots.lengths, slots.starts, strict=True)]
        with ordinary_tensors():
            self.first, self.ids = ids, ids.clone()
            self.one = torch.ones(len(ids), dtype=torch.int64, device=device)
            self.position = torch.tensor(rows, device=device)[:, None]
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
            self.history = torch.zeros(len(ids), room, dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream(device) if ids.is_cuda else None
        self.reached = torch.cuda.Event(blocking=True) if ids.is_cuda else None
        self.pieces: list[_Piece] = []
        self._capturing: torch.cuda.CUDAGraph | None = None
        self._pool: Any = None

    def _layer(self, layer: Any) -> HybridLayer:
        if isinstance(layer, OffloadedLayer):
            layer.offloaded.copier.wait()
            stores = [s for s in (layer.offloaded.host, layer.offloaded.side) if s is not None]
            layer.offloaded.near.reserve(layer.offloaded.near.length + self.room)
        else:
            stores = [layer.store]
        for store in stores:
            store.reserve(self.limit)
        layer.show()
        if isinstance(layer, OffloadedLayer):
            if layer.offloaded.side is not None:
                self._count("side", layer.offloaded.side, self.limit)
            near, host = layer.offloaded.near, layer.offloaded.host
            assert near.slots is not None
            self._count("near", near, near.slots.page)
            self._on_host = self._on_host or host.slots
            if self._on_host is not None and self._on_host is not host.slots:
                host.join(self._on_host)
            return _OnHost(self, layer)
        self._count("device", layer.store, self.limit)
        return HybridLayer(self, layer.store)

    def release(self) -> None:
        """Give every store slots of its own again."""
        for layer in self.layers:
            near = [layer.near] if isinstance(layer, _OnHost) else []
            side = [layer.side] if isinstance(layer, _OnHost) and layer.side is not None else []
            for store in (layer.store, *near, *side):
                store.leave()
        self.pieces.clear()

    def _count(self, kind: str, store: Store, limit: int) -> None:
        """Have the stores of one kind of all layers counted together."""
        assert store.slots is not None
        slots, _ = self._counted.setdefault(kind, (store.slots, limit))
        if slots is not store.slots:
            store.join(slots)

    def count_on_host(self, layer: _OnHost) -> None:
        """A row more on the host, noted by the first layer of a step."""
        if self._on_host is not None and layer is self._leader:
            self._on_host.append(1)

    def step(self) -> None:
        """One more token for every sequence, computed afresh; or captured."""
        with torch.inference_mode(), ExitStack() as unknown:
            for slots, limit in self._counted.values():
                unknown.enter_context(slots.unknown_lengths(limit))
                slots.append(self.one)
            out = self.model(input_ids=self.ids, position_ids=self.position, past_key_values=self.cache, use_cache=True)
            self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
            self.history.index_copy_(1, self.at, self.ids)
            self.position += 1
            self.at += 1

    def note(self) -> None:
        """Tell the host of a step."""
        self.done += 1
        for slots, _ in self._counted.values():
            slots.note([1] * len(slots))

    def take_back(self, steps: int) -> None:
        """Forget the last steps."""
        slots = [*(slots for slots, _ in self._counted.values()), *([self._on_host] if self._on_host else [])]
        for of_stores in slots:
            for slot, length in enumerate(of_stores.lengths):
                of_stores.truncate(slot, length - steps)
        self.done -= steps
        with ordinary_tensors():
            self.ids.copy_(self.history[:, self.done - 1 : self.done] if self.done else self.first)
            self.position -= steps
            self.at -= steps

    def cut(self, layer: _OnHost) -> None:
        """Where the host's part of a layer belongs."""
        if self._capturing is None:
            if self.stream is not None:
                torch.cuda.current_stream().synchronize()
            layer.work()
            return
        self._end_piece(layer)
        self._begin_piece()

    def capture(self) -> None:
        """Record a step, which is not computed by this."""
        assert self.stream is not None
        self._pool = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._begin_piece()
            try:
                self.step()
            finally:
                self._end_piece(None)
        with beside(self.others):
            for layer in self.layers:
                if isinstance(layer, _OnHost):
                    layer.settle()

    def _begin_piece(self) -> None:
        self._capturing = torch.cuda.CUDAGraph()
        self._capturing.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end_piece(self, host: _OnHost | None) -> None:
        assert self._capturing is not None
        self._capturing.capture_end()
        self.pieces.append(_Piece(self._capturing, host))
        self._capturing = None

    def run(self, steps: int, graphs: bool, trace: _Trace | None = None, which: int = 0) -> None:
        """So many steps, eager ones where nothing is captured, or graphs are not wanted."""
        with ExitStack() as here:
            here.enter_context(beside(self.others))
            if self.stream is not None:
                here.enter_context(torch.cuda.stream(self.stream))
            for _ in range(steps):
                if self.pieces and graphs:
                    self._replay(trace, which)
                else:
                    self.step()
                self.note()
            if self.stream is not None:
                self.stream.synchronize()

    def _replay(self, trace: _Trace | None, which: int) -> None:
        for graph, host in self.pieces:
            reached: Any = self.reached if trace is None else trace.on_device(which, host)
            graph.replay()
            reached.record()
            if host is None:
                continue
            reached.synchronize()
            start = time.perf_counter()
            host.work()
            if trace is not None:
                trace.on_host(which, host, start, time.perf_counter())


class _Trace:
    """Who worked when."""

    def __init__(self, layers: Sequence[Sequence[HybridLayer]]) -> None:
        self._layer = {id(layer): i for of_batch in layers for i, layer in enumerate(of_batch)}
        self._device: list[tuple[int, int | None, Any, Any]] = []
        self._host: list[Span] = []
        torch.cuda.synchronize()
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record()
        self._zero.synchronize()
        self._began = time.perf_counter()

    def on_device(self, batch: int, layer: HybridLayer | None) -> Any:
        """Begin what the device does up to the event that is returned, which is to be recorded then."""
        began, reached = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        began.record()
        self._device.append((batch, self._layer.get(id(layer)), began, reached))
        return reached

    def on_host(self, batch: int, layer: HybridLayer, start: float, end: float) -> None:
        self._host.append(Span(batch, self._layer[id(layer)], "cpu", start - self._began, end - self._began))

    def spans(self) -> list[Span]:
        torch.cuda.synchronize()
        device = [
            Span(batch, layer, "gpu", *(self._zero.elapsed_time(event) / 1e3 for event in (began, reached)))
            for batch, layer, began, reached in self._device
        ]
        return sorted(device + self._host, key=lambda span: span.start)


def _check(cache: Cache, method: Decode) -> None:
    """Raise ValueError unless steps can go on from what a cache holds."""
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, KVLayer):
            raise ValueError(f"steps over host memory do not take cache layers of type {type(layer).__name__}")
        if not layer.get_seq_length():
            raise ValueError("steps over host memory need a cache that holds a prompt: call the model with it first")
        if not isinstance(layer, OffloadedLayer) and i not in method.dense_layers:
            raise ValueError("steps over host memory need a cache that was filled with kv_device=cpu")
        if isinstance(layer, OffloadedLayer):
            layer.offloaded.check(method)
    if not cache.layers:
        raise ValueError("steps over host memory need a cache that holds a prompt: call the model with it first")
    if cache.__dict__.get("_keysift") == TAKEN:
        raise ValueError("this cache belongs to other HybridSteps: close() them first")


class HybridSteps:
    """Greedy steps of several batches of one attached model, all in flight at once.

    The model must be attached with ``kv_device="cpu"``, and each cache hold prompts that were read with it. Caches are
    this object's until ``close``; the model refuses them till then. Whether a method selects at all is settled by the
    rows that there are when a step is captured.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[tuple[Cache, Tensor]], room: int) -> None:
        """Take over caches.

        Args:
            model: attached.
            batches: each a cache and the newest token of its sequences, which it does not hold, int64 ``[B, 1]``.
            room: steps that there will be at most.

        Raises:
            ValueError: caches of another kind, or without a prompt.
        """
        link = model.__dict__.get("_keysift")
        if link is None or link.kv_device != "cpu":
            raise ValueError('steps over host memory: attach the model with kv_device="cpu" first')
        if room < 1:
            raise ValueError(f"room={room}: choose 1 or more steps")
        for cache, _ in batches:
            _check(cache, link.decode)
        self.room, self._failed, self._warm = room, False, 0
        self._on_gpu = all(ids.is_cuda for _, ids in batches)
        self._caches = [cache for cache, _ in batches]
        self._batches = [_Batch(model, cache, ids, room, len(batches) - 1) for cache, ids in batches]
        for cache in self._caches:
            cache.__dict__["_keysift"] = TAKEN

    @property
    def done(self) -> int:
        """Steps so far."""
        return self._batches[0].done

    def close(self) -> None:
        """Give the caches back, with the rows of all steps; there can be no more of these. Safe to call twice."""
        for cache, batch in zip(self._caches, self._batches, strict=False):  # none the second time
            batch.release()
            cache.__dict__["_keysift"] = "cpu"
            for layer in cache.layers:
                layer.show()  # type: ignore[union-attr]
        self._caches, self._failed = [], True

    @property
    def tokens(self) -> list[Tensor]:
        """What the steps gave, int64 ``[B, done]`` for each batch."""
        return [batch.history[:, : batch.done] for batch in self._batches]

    def run(self, steps: int, graphs: bool = True) -> None:
        """So many more tokens for every sequence; without ``graphs`` computed afresh on a GPU too.

        Raises:
            ValueError: more steps than there is room for.
            RuntimeError, MemoryError: what went wrong on either side; the steps cannot go on after it.
        """
        self._run(steps, None, graphs)

    def take_back(self, steps: int) -> None:
        """Forget the last steps, their rows included.

        Raises:
            ValueError: there were fewer.
        """
        if not 0 <= steps <= self.done:
            raise ValueError(f"{steps} steps cannot be taken back: there were {self.done}")
        for batch in self._batches:
            batch.take_back(steps)

    def traced(self, steps: int) -> list[Span]:
        """The same, and who worked when; steps must have been captured by earlier ones."""
        trace = _Trace([batch.layers for batch in self._batches])
        self._run(steps, trace, True)
        return trace.spans()

    def _run(self, steps: int, trace: _Trace | None, graphs: bool) -> None:
        if self._failed:
            raise RuntimeError("these steps were closed, or failed and left rows half written: begin with new ones")
        if self.done + steps > self.room:
            raise ValueError(f"{steps} more steps: there is room for {self.room - self.done}")
        for batch in self._batches:
            if batch.stream is not None:  # after what the caller has under way
                batch.stream.wait_stream(torch.cuda.current_stream(batch.ids.device))
        try:
            eager = 0
            if graphs and self._on_gpu and not self._batches[0].pieces:
                eager = min(steps, max(0, EAGER_STEPS - self._warm))
                for batch in self._batches:
                    batch.run(eager, graphs)
                    if steps > eager:
                        batch.capture()
                self._warm += eager
            with ThreadPoolExecutor(len(self._batches), thread_name_prefix="keysift-batch") as threads:
                futures = [
                    threads.submit(batch.run, steps - eager, graphs, trace, i) for i, batch in enumerate(self._batches)
                ]
            for future in futures:
                future.result()
        except BaseException:
            self._failed = True
            raise
