"""A layer's cache in two tiers: all rows and their side data in host memory, sinks and newest rows on the device too.

After the prompt a layer's rows and the side data of its method, which the device computes, are copied to the host while
the next layers compute. A decode step then attends to sinks and window on the device, and on the host to the rows
that the method selects (arXiv:2410.16179).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keysift.cache import Store, rows_with_room
from keysift.ops.cpu.memory import in_large_pages
from keysift.slots import Slots, ordinary_tensors
from keysift.types import KV, Ctx, Decode

HOST = torch.device("cpu")
NEWEST = 256  # rows that may gather on the device behind the window before those that have left it are dropped
STAGED_BYTES = 64 << 20  # of each of the two pinned buffers that copies go through
IDLE_S = 5.0  # after which the thread that copies ends, and its buffers are free again
IN_FLIGHT = 2  # layers whose copies may be under way, so long as their rows stay on the device
SPARE = 0.95  # of the memory that is free may be used


class HostMemory:
    """What the caches on the host may take in all.

    Attributes:
        limit: bytes; None for what the machine has free when a prompt begins.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"host memory of {limit} bytes: choose 1 or more")
        self.limit = limit

    def admit(self, needed: int) -> None:
        """Raise MemoryError, in one line that says what would help, where a cache of so many bytes has no room."""
        free = int(SPARE * free_bytes()) if self.limit is None else self.limit
        if needed > free:
            raise MemoryError(
                f"kv_device=cpu: keys, values and side data of this prompt need {needed / 2**30:.2f} GiB of host"
                f" memory, and {free / 2**30:.2f} GiB may be used: shorten the prompt, make the batch smaller, or raise"
                " the limit"
            )


def free_bytes() -> int:
    """Host memory that can be had without swapping, of the machine or of our control group, whichever is less."""
    free = [1 << 62]
    meminfo, current, most = (
        Path(p) for p in ("/proc/meminfo", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.max")
    )
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            free.append(1024 * int(fields["MemAvailable"].split()[0]))
    if most.is_file() and most.read_text().strip().isdigit() and current.is_file():
        free.append(int(most.read_text()) - int(current.read_text()))
    return max(0, min(free))


class Copier:
    """Copies from a device to the host beside what both are doing: device, pinned buffer, memory where they stay.

    One serves all layers of a cache. On a host without a device it copies at once.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Tensor, Tensor, Any]] = queue.Queue()
        self._waiting: list[threading.Event] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def copy(self, x: Tensor) -> Tensor:
        """A tensor on the host that holds what ``x`` does once ``wait`` has returned; till then it must not change."""
        with ordinary_tensors():
            out = in_large_pages(torch.empty(x.shape, dtype=x.dtype))
        if not x.is_cuda:
            out.copy_(x)
            return out
        x, ready = x.contiguous(), torch.cuda.Event()
        ready.record()
        self._put(x, out, ready)
        return out

    def _put(self, x: Tensor, out: Tensor, event: Any) -> None:
        with self._lock:
            self._jobs.put((x, out, event))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="keysift-copies", daemon=True)
                self._thread.start()

    def mark(self) -> None:
        """End of a layer; waits where too many layers are under way."""
        if self._thread is None and self._jobs.empty():
            return
        done = threading.Event()
        self._put(torch.empty(0), torch.empty(0), done)
        self._waiting.append(done)
        while len(self._waiting) > IN_FLIGHT:
            self._waiting.pop(0).wait()

    def wait(self) -> None:
        """Until everything is where it was to go.

        Raises:
            RuntimeError: a copy failed.
        """
        for done in self._waiting:
            done.wait()
        self._waiting.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(f"keys and values could not be copied to the host: {error}") from error

    def _work(self) -> None:
        staged: list[tuple[Tensor, torch.cuda.Event]] = []
        stream: torch.cuda.Stream | None = None
        while True:
            try:
                x, out, event = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._thread = None
                        return
                continue
            if isinstance(event, threading.Event):
                event.set()
                continue
            try:
                if stream is None:
                    stream = torch.cuda.Stream(x.device)
                    staged = [
                        (torch.empty(STAGED_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                        for _ in range(2)
                    ]
                stream.wait_event(event)
                _copy_in_pieces(x, out, staged, stream)
            except BaseException as error:  # told by `wait`, to the thread that needs the rows
                self._error = error
            del x, out  # the device's memory is free from here on, not from the next layer on


def _copy_in_pieces(
    x: Tensor, out: Tensor, staged: list[tuple[Tensor, torch.cuda.Event]], stream: torch.cuda.Stream
) -> None:
    """One piece is on its way to a pinned buffer while the one before leaves the other."""
    source, to = x.reshape(-1).view(torch.uint8), out.view(-1).view(torch.uint8)
    before: tuple[Tensor, torch.cuda.Event, Tensor] | None = None
    for i, first in enumerate(range(0, source.numel(), STAGED_BYTES)):
        piece = source[first : first + STAGED_BYTES]
        buffer, done = staged[i % 2]
        with torch.cuda.stream(stream):
            buffer[: piece.numel()].copy_(piece, non_blocking=True)
            done.record(stream)
        if before is not None:
            before[1].synchronize()
            before[2].copy_(before[0])
        before = buffer[: piece.numel()], done, to[first : first + piece.numel()]
    if before is not None:
        before[1].synchronize()
        before[2].copy_(before[0])


def arriving(x: Tensor) -> Callable[[], Tensor]:
    """Send a tensor to the host; what is returned waits for it, and for nothing that was launched since."""
    if not x.is_cuda:
        return lambda: x
    out, sent = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    out.copy_(x, non_blocking=True)
    sent.record()

    def wait() -> Tensor:
        sent.synchronize()
        return out

    return wait


class HostTier:
    """What the layers of one cache share: who selects from the rows on the host, how they get there, what fits.

    Attributes:
        method: the decode method; its dense layers stay on the device.
        memory: what may be used.
    """

    def __init__(self, method: Decode, memory: HostMemory | None = None) -> None:
        self.method, self.memory = method, memory or HostMemory()
        self.copier = Copier()

    def admit(self, k_BKTD: Tensor, v_BKTD: Tensor, layers: int) -> None:
        """Raise MemoryError unless the host has room for prompts like this layer's in so many layers."""
        batch, heads, tokens, dim = k_BKTD.shape
        sides = sum(side.token_bytes for side in self.method.sides(dim, k_BKTD.dtype).values())
        row = (dim + v_BKTD.shape[3]) * k_BKTD.element_size() + sides
        self.memory.admit(int(layers * batch * rows_with_room(0, tokens) * heads * row))


class OffloadedStore:
    """One layer's rows: all of them in ``host``; sinks, window and those after it in ``near`` as well.

    Attributes:
        host: the store that the method selects from.
        near: rows on the device, those of sequence b at the end of its piece.
    """

    def __init__(self, copier: Copier) -> None:
        self.copier = copier
        self.host = Store()
        self.near = Store()
        self._whole: Store | None = None  # during a prompt, on its device
        self._method: Decode | None = None

    @property
    def length(self) -> int:
        return self._whole.length if self._whole is not None else self.host.length

    @property
    def slots(self) -> Slots | None:
        return self._whole.slots if self._whole is not None else self.host.slots

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        """Add rows. The first ones are those of a prompt, and stay on the device until ``end_prefill``."""
        if self._whole is None and self.host.length:
            self.copier.wait()
            self.host.append(k_BKTD.to(HOST), v_BKTD.to(HOST))
            self.near.append(k_BKTD, v_BKTD)
        else:
            self._whole = self._whole or Store()
            self._whole.append(k_BKTD, v_BKTD)

    def whole(self) -> KV:
        """All rows on the device; those that are on the host only are brought back for as long as the view lives."""
        if self._whole is not None:
            return self._whole.view()
        self.copier.wait()
        kv, device = self.host.view(), _made(self.near.k).device
        k, v = (x[:, : self.host.length].to(device) for x in (kv.k, kv.v))
        start = kv.start.to(device)
        return KV(k, v, start, kv.length.to(device), kv.spans, origin=start)

    def pad(self, starts: list[int]) -> None:
        """Note that rows before these are padding."""
        slots = self.slots
        if slots is not None:
            slots.pad(starts)

    def end_prefill(self, q_BTHD: Tensor, method: Decode, ctx: Ctx) -> None:
        """Note that the rows so far are prompt: side data are made on the device, and all goes to the host."""
        self._method = method
        if self._whole is None:  # a later part of a prompt: its rows are on the host already
            self.host.end_prefill(q_BTHD.to(HOST), method.tail)
            self.near = _newest(self.host, method.sinks, method.window, q_BTHD.device)
            return
        whole, self._whole = self._whole, None
        whole.end_prefill(q_BTHD, method.tail)
        if ctx.layer not in method.dense_layers and not method.covers(whole.longest_middle(method)):
            whole.begin(method, q_BTHD[:, max(0, q_BTHD.shape[1] - method.tail) :], ctx)
        self.host = whole.copied(HOST, self.copier.copy)
        self.near = _newest(whole, method.sinks, method.window, q_BTHD.device)
        self.copier.mark()

    def drop_old(self, method: Decode) -> None:
        """Let go of rows on the device that have left the window; the host has them."""
        if method.grows and self.near.length > method.sinks + method.window + NEWEST:
            self.near = _newest(self.near, method.sinks, method.window, _made(self.near.k).device)

    def truncate(self, length: int) -> None:
        """Forget the rows of every sequence from ``length`` on.

        Raises:
            ValueError: ``length`` is within the prompt.
        """
        if self._whole is not None:
            self._whole.truncate(length)
            return
        self.copier.wait()
        if length >= self.host.length:
            return
        if length < self.host.prompt:
            raise ValueError(f"kv_device=cpu: the prompt's {self.host.prompt} rows cannot be cut to {length}")
        self.host.truncate(length)
        assert self._method is not None
        generated = 0 if self._method.grows else length - self.host.prompt  # the middle ends where the prompt's did
        self.near = _newest(self.host, self._method.sinks, self._method.window + generated, _made(self.near.k).device)
        for slot, start in enumerate(self.near.slots.starts if self.near.slots else ()):
            self.near.slots.end_prompt(slot, max(start, self.near.length - generated))  # type: ignore[union-attr]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat sequences, as ``Store.select``."""
        self.copier.wait()
        for store in (self.host, self.near, self._whole):
            if store is not None and store.length:
                store.select(rows)


def _made(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _newest(store: Store, sinks: int, window: int, device: torch.device) -> Store:
    """The first rows of each sequence, and its last, on a device."""
    assert store.slots is not None
    k, v, length = _made(store.k), _made(store.v), store.length
    rows = min(length, sinks + window)
    row = torch.arange(length - rows, length, device=k.device)
    start = store.slots.start[:, None]
    first = torch.arange(rows, device=k.device)
    far = (length - start) > rows  # where all rows of a sequence fit they are its last
    index = torch.where(far & (first < sinks), start + first, row)
    out = Store()
    at = index[:, None, :, None]
    k, v = (x.transpose(1, 2).gather(2, at.expand(-1, x.shape[2], -1, x.shape[3])) for x in (k, v))
    out.append(k.to(device), v.to(device))
    assert out.slots is not None
    out.slots.pad([max(0, rows - (length - s)) for s in store.slots.starts])
    out.end_prompt()
    return out
