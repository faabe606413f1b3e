"""Caches of one shape that take turns, as the layers of a model do, and steps that read them; in CUDA graphs on a GPU.

A step writes the newest row, brings the side data up to date, selects, and attends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keysift import attention
from keysift.bench.inputs import structured_qkv
from keysift.bench.prefill import INPUTS, TOLERANCE
from keysift.cache import Store
from keysift.functional import NO_LAYER
from keysift.meter import Meter
from keysift.ops.heads import group
from keysift.slots import Slots, check_page
from keysift.types import Ctx, Decode, Selection, check_seed, one_of

ROOM = 512  # rows that a cache can take after the prompt


class NoGraph(Exception):
    """A step waits for the device."""


class Shape(NamedTuple):
    """Sequences, and tokens of each one's prompt."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


@dataclass(frozen=True)
class Setup:
    """What is measured, apart from shapes and methods.

    Attributes:
        heads, kv_heads, dim, dtype, device: of the tensors.
        page: rows a page of the cache.
        seed: of the inputs, and of methods that draw.
        inputs: "structured" (see ``bench.inputs``) or "random": normal noise.
        repeats: timed rounds of each part; None lets them take half a second (on a CPU a second).
        draws: seeds that the error of a method that draws is averaged over.
        steps: decode steps, with rows and queries of their own, that figures other than times are averaged over.
    """

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    page: int = 128
    seed: int = 0
    inputs: str = "structured"
    repeats: int | None = None
    draws: int = 5
    steps: int = 4

    def __post_init__(self) -> None:
        one_of("inputs", self.inputs, INPUTS)
        check_seed(self.seed)
        for name in ("heads", "kv_heads", "dim", "repeats", "draws", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: choose 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} are not divisible by kv_heads={self.kv_heads}")
        check_page(self.page)
        if self.inputs == "structured" and (self.dim % 2 or self.dim < 32):
            raise ValueError(f"dim={self.dim}: structured inputs need an even dim of 32 or more; or --inputs random")
        if self.dtype not in TOLERANCE:
            raise ValueError(f"dtype={self.dtype}: choose float32, bfloat16 or float16")

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def row_bytes(self) -> int:
        """Of one KV head's key and value."""
        return 2 * self.dim * self.dtype.itemsize


@dataclass
class Inputs:
    """Rows of prompts and of the steps after them.

    Attributes:
        q: queries ``[B, T, H, D]`` of the prompt's last positions and of the steps.
        k, v: ``[B, context + steps, K, D]``.
        context: rows of the prompt.
        exact: fp32 attention of the steps over all keys, ``[steps, B, H, D]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    context: int
    exact: Tensor

    @classmethod
    def make(cls, setup: Setup, shape: Shape, tail: int) -> Inputs:
        """One sequence at a time, each of a seed of its own; with the prompt's last ``tail`` queries, one or more."""
        (batch, context), device, dtype = shape, setup.device, setup.dtype
        rows, tail = context + setup.steps, min(tail, context)
        q = torch.empty(batch, tail + setup.steps, setup.heads, setup.dim, dtype=dtype, device=device)
        k, v = (torch.empty(batch, rows, setup.kv_heads, setup.dim, dtype=dtype, device=device) for _ in range(2))
        for b in range(batch):
            all_q, all_k, all_v = _sequence(setup, rows, setup.seed + b)
            q[b], k[b], v[b] = all_q[0, -q.shape[1] :], all_k[0], all_v[0]
            del all_q, all_k, all_v  # before the next
        exact = [
            exact_attention(q[:, tail + i], k[:, : context + i + 1], v[:, : context + i + 1], setup.scale)
            for i in range(setup.steps)
        ]
        return cls(q, k, v, context, torch.stack(exact))

    @property
    def prompt_q(self) -> Tensor:
        """Of the prompt's last positions, ``[B, tail, H, D]``."""
        return self.q[:, : -len(self.exact)]

    @property
    def prompt_kv(self) -> tuple[Tensor, Tensor]:
        return self.k[:, : self.context], self.v[:, : self.context]

    def query(self, step: int) -> Tensor:
        """``[B, H, D]``."""
        return self.q[:, step - len(self.exact)]

    def newest(self, step: int) -> tuple[Tensor, Tensor]:
        """Key and value that a step adds, ``[B, 1, K, D]``."""
        rows = slice(self.context + step, self.context + step + 1)
        return self.k[:, rows], self.v[:, rows]


def _sequence(setup: Setup, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (setup.heads, setup.kv_heads, setup.kv_heads)
    if setup.inputs == "structured":
        return structured_qkv(rows, *heads[:2], setup.dim, seed=seed, device=setup.device, dtype=setup.dtype)
    random = torch.Generator(setup.device).manual_seed(seed)
    q, k, v = (
        torch.randn(1, rows, n, setup.dim, generator=random, dtype=setup.dtype, device=setup.device) for n in heads
    )
    return q, k, v


def exact_attention(q_BHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, scale: float) -> Tensor:
    """fp32 attention over all keys, ``[B, H, Dv]``; a sequence at a time."""
    out = []
    for q, k, v in zip(q_BHD, k_BSKD, v_BSKD, strict=True):
        z = torch.einsum("kgd,skd->kgs", group(q.float(), k.shape[1], 0), k.float()) * scale
        out.append(torch.einsum("kgs,ske->kge", z.softmax(-1), v.float()).flatten(0, 1))
    return torch.stack(out)


class Layers:
    """Caches of a prompt for one method; they share slots, as a model's layers do, and each has pages of its own."""

    def __init__(self, setup: Setup, inputs: Inputs, method: Decode) -> None:
        """With one cache."""
        batch, rows = len(inputs.k), inputs.context + ROOM
        self.setup, self.inputs, self.method, self.limit, self.seed = setup, inputs, method, rows, setup.seed
        pages = -(-rows // setup.page)
        self.slots = Slots(batch, setup.page, pages, batch * pages + 1, setup.device)
        for slot in range(batch):
            self.slots.reserve(slot, rows)
        self.slots.append(inputs.context)
        for slot in range(batch):
            self.slots.end_prompt(slot)
        self.one_each = torch.ones_like(self.slots.length)  # a graph reads it, and must find it at every replay
        self.stores: list[Store] = []
        self.add()

    def add(self) -> None:
        """One more cache, with the prompt in it."""
        setup = self.setup
        store = Store.in_pages(self.slots, setup.kv_heads, setup.dim, setup.dim, setup.dtype)
        try:
            store.write(*self.inputs.prompt_kv)
            self._begin(store, len(self.stores))
        except torch.OutOfMemoryError:
            self.slots.stores.remove(store)
            raise
        self.stores.append(store)

    def close(self) -> None:
        """Let go of the caches, whose slots know them as they know their slots."""
        self.stores.clear()
        self.slots.stores.clear()

    def begin(self, seed: int) -> None:
        """Make the side data anew, with this seed."""
        self.seed = seed
        for n, store in enumerate(self.stores):
            self._begin(store, n)

    def _begin(self, store: Store, n: int) -> None:
        q = self.inputs.prompt_q
        store.begin(self.method, q[:, max(0, q.shape[1] - self.method.tail) :], _of_layer(self._ctx(), n))

    def _ctx(self) -> Ctx:
        return Ctx(NO_LAYER, self.setup.scale, self.slots.length - 1, self.seed)

    def step(self, i: int = 0, part: str = "total", meter: Meter | None = None, rows: int | Tensor = 1) -> list[Tensor]:
        """A step of every cache, with queries and newest rows of step ``i``; or what it does up to "hash" or "select".

        Returns:
            The outputs of a whole step, ``[B, H, D]`` of each cache.
        """
        self.slots.append(rows)
        now, q, out = self._ctx(), self.inputs.query(i), list[Tensor]()
        for n, store in enumerate(self.stores):
            ctx = _of_layer(now, n)
            store.write(*self.inputs.newest(i))
            if part == "total":
                out.append(attention.decode(q, store, self.method, ctx, meter)[0])
            elif part == "select":
                self._select(store, q, ctx)
            else:
                store.index(self.method, q, ctx)
        return out

    def selection(self, i: int = 0) -> Selection | None:
        """What the query of step ``i`` reads of the middle of the first cache as it is; None if it reads all."""
        store = self.stores[0]
        if not attention.chooses(self.method, store, NO_LAYER):
            return None
        return self._select(store, self.inputs.query(i), self._ctx())

    def _select(self, store: Store, q: Tensor, ctx: Ctx) -> Selection | None:
        index = store.index(self.method, q, ctx)
        return self.method.select(q, store.middle(self.method), index, ctx)

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        for slot in range(len(self.slots)):
            self.slots.truncate(slot, self.inputs.context)

    @contextmanager
    def flatter(self) -> Iterator[None]:
        """Within it queries are a 16th of what they are: heads that look at a few keys would not miss the others."""
        q = self.inputs.q.clone()
        self.inputs.q.div_(16)
        try:
            yield
        finally:
            self.inputs.q.copy_(q)

    def as_recorded(self) -> Any:
        """Within it, steps launch what recorded steps do: on a GPU these are for any length."""
        return self.slots.unknown_lengths(self.limit) if self.setup.on_gpu else nullcontext()

    def recorded(self, part: str = "total", pool: Any = None) -> Callable[[], list[Tensor]]:
        """A function that does one more step, or as ``step`` a part; on a GPU it replays a graph. Rewinds.

        Raises:
            NoGraph: a step waits for the device.
        """
        replay = self._graph(part, pool) if self.setup.on_gpu else None
        self.rewind()

        def once() -> list[Tensor]:
            if self.slots.lengths[0] >= self.limit:
                self.rewind()
            if replay is None:
                return self.step(part=part)
            self.slots.note([1] * len(self.slots))
            return list(replay())

        return once

    def _graph(self, part: str, pool: Any) -> Callable[[], Any]:
        self.rewind()
        with self.as_recorded():
            self.step(part=part)  # compiles the kernels; and after it, one row is new in each step
            _refuse_waiting(lambda: self.step(part=part))
            return captured(lambda: self.step(part=part, rows=self.one_each), pool)


def _of_layer(ctx: Ctx, n: int) -> Ctx:
    """What cache ``n`` is told: a layer of its own, with draws and hash directions of its own, that none is called."""
    return ctx._replace(layer=NO_LAYER - n)


def captured(run: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """A function that replays what ``run`` launches, and gives what ``run`` returned, computed anew in its place."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        outputs = run()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def _refuse_waiting(run: Callable[[], Any]) -> None:
    """Find out before a capture: one that fails leaves the allocator in disorder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NoGraph("a step waits for the device, so a CUDA graph cannot hold it") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
