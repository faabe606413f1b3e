"""A layer's cache in two tiers: all rows in host memory, sinks and newest rows on the device too.

After the prompt a layer's rows, and the side data of its method, which the device computes, are copied to the host
while the next layers compute. A decode step then attends to sinks and window on the device, and on the host to the
rows that the method selects (arXiv:2410.16179). Side data stay on the device where they fit: it selects then, and of
the host's memory only the selected rows are read.
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
from keysift.types import KV, Ctx, Decode, Side, one_of

HOST = torch.device("cpu")
SELECT_DEVICES = ("auto", "gpu", "cpu")
HELD = 64  # newest rows that the device keeps at least: side data of a page of so many are made anew from them
SIDES_OF_FREE = 0.5  # of the device's free memory may be side data where nobody said where they are to be
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
        self._admitted = 0

    def admit(self, needed: int) -> None:
        """Raise MemoryError, in one line that says what would help, where a cache of so many bytes has no room."""
        free = int(SPARE * free_bytes()) if self.limit is None else self.limit
        if needed + self._admitted > free:
            raise MemoryError(
                f"kv_device=cpu: keys, values and side data of this prompt need {needed / 2**30:.2f} GiB of host"
                f" memory, and {free / 2**30:.2f} GiB may be used: shorten the prompt, make the batch smaller, or raise"
                " the limit"
            )
        if self.limit is not None:  # what is free tells by itself what was admitted before
            self._admitted += needed

    def give_back(self, admitted: int) -> None:
        """Note that a cache of so many bytes is gone."""
        self._admitted = max(0, self._admitted - admitted)


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


class Mailbox:
    """Tensors of the host that stay where they are, page-locked where the other side is a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._locked: list[Tensor] = []

    def room(self, **like: Tensor) -> None:
        """Make tensors of these shapes and dtypes, where there are none of their names, or of another shape."""
        for name, x in like.items():
            if name not in self._kept or self._kept[name].shape != x.shape:
                with ordinary_tensors():
                    self._kept[name] = torch.empty(x.shape, dtype=x.dtype)
                if x.is_cuda:
                    self._lock(self._kept[name])

    def put(self, **tensors: Tensor) -> None:
        """Copy into them; from a device without waiting for it."""
        self.room(**tensors)
        for name, x in tensors.items():
            self._kept[name].copy_(x, non_blocking=True)

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def get(self, name: str) -> Tensor | None:
        return self._kept.get(name)

    def _lock(self, x: Tensor) -> None:
        """Not by torch's allocator: that asks of every copy from what it made whether it is over, also while a graph is
        being captured."""
        error = torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0)
        if int(error):
            raise MemoryError(f"{x.nbytes} bytes of host memory could not be page-locked: {error}")
        self._locked.append(x)

    def __del__(self) -> None:
        for x in self._locked:
            torch.cuda.cudart().cudaHostUnregister(x.data_ptr())


def _by_sides_alone(method: Decode) -> bool:
    return method.reads_sides_alone and method.top_p is None


class HostTier:
    """What the layers of one cache share: who selects from the rows on the host, how they get there, what fits.

    Attributes:
        method: the decode method; its dense layers stay on the device.
        memory: what may be used.
        select_device: where side data are and rows are selected: "gpu" (the model's device), "cpu", or "auto": the
            device, where it has the memory and the method needs nothing but side data.
        sides_on_device: what that came to, known once a prompt was admitted.
    """

    def __init__(self, method: Decode, memory: HostMemory | None = None, select_device: str = "auto") -> None:
        one_of("select_device", select_device, SELECT_DEVICES)
        if select_device == "gpu" and not _by_sides_alone(method):
            raise ValueError("select_device=gpu: this method does not select by side data alone; choose cpu or auto")
        self.method, self.memory, self.select_device = method, memory or HostMemory(), select_device
        self.copier = Copier()
        self.sides_on_device = False
        self._admitted = 0  # bytes

    def admit(self, k_BKTD: Tensor, v_BKTD: Tensor, layers: int) -> None:
        """Raise MemoryError unless the host has room for prompts like this layer's in so many layers; once a prompt."""
        if self._admitted:
            return
        batch, heads, tokens, dim = k_BKTD.shape
        rows = layers * batch * rows_with_room(0, tokens) * heads
        sides = rows * sum(side.token_bytes for side in self.method.sides(dim, k_BKTD.dtype).values())
        self.sides_on_device = self._selects_on_device(sides, k_BKTD.device)
        row = (dim + v_BKTD.shape[3]) * k_BKTD.element_size()
        needed = int(rows * row + (0 if self.sides_on_device else sides))
        self.memory.admit(needed)
        self._admitted = needed

    def _selects_on_device(self, sides: float, device: torch.device) -> bool:
        able = _by_sides_alone(self.method) and sides > 0
        if self.select_device != "auto" or not able:
            return able and self.select_device == "gpu"
        return device.type == "cuda" and sides <= SIDES_OF_FREE * free_device_bytes(device)

    def forget(self) -> None:
        """The cache is empty again: the next prompt is to be admitted."""
        self.memory.give_back(self._admitted)
        self._admitted = 0


def free_device_bytes(device: torch.device) -> int:
    """Memory of a GPU that torch may still take, a limit by ``set_per_process_memory_fraction`` included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, limit) + reserved - torch.cuda.memory_allocated(device)


class SideStore(Store):
    """Side data on the device of rows that are on the host: keys and values have a shape here, and no memory."""

    def __init__(self, whole: Store) -> None:
        """Take over the slots and the side data of a store, which must be thrown away."""
        super().__init__()
        slots, k, v = whole._made()
        self.slots = slots
        slots.stores[:] = [self]
        with ordinary_tensors():
            self.k, self.v = (x.new_empty(1, 1, 1, 1).expand(x.shape) for x in (k, v))
        self._index, self._kinds, self._built_by, self._seen = whole._index, whole._kinds, whole._built_by, whole._seen

    def add(self, rows: int) -> None:
        """Note that every sequence has more rows, of which there are no side data yet."""
        slots, _, _ = self._made()
        if self.length + rows > slots.page:
            self.reserve(rows_with_room(self.length, self.length + rows))
        slots.append(rows)

    @property
    def unit(self) -> int:
        """Tokens of the longest entry that is made anew from its keys; longer ones are written a token at a time."""
        units = [kind.unit for kind in self._kinds.values() if isinstance(kind, Side)]
        return max((unit for unit in units if unit <= HELD), default=1)

    def made_by(self, method: Decode, seed: int) -> bool:
        return self._built_by == (method, seed)

    @property
    def missing(self) -> int:
        """Rows that sequences may have gained since side data were brought up to date."""
        slots, _, _ = self._made()
        return max((n - seen for n, seen in zip(slots.appended, self._seen, strict=True)), default=0)

    def refresh(self, method: Decode, near: Store, shift: int, ctx: Ctx) -> None:
        """Bring side data up to date from the newest rows, row ``r`` being row ``r - shift`` of ``near``."""
        slots, _, _ = self._made()
        if method.grows and (most := self.missing):
            with ordinary_tensors():
                rows = slots.part(self.view(), method.sinks, 0, True)
                done = slots.all_but(most, method.sinks, True) - shift
                k, v = _made(near.k), _made(near.v)
                here = rows._replace(k=k, v=v, start=rows.start - shift, origin=slots.start - shift, most=k.shape[1])
                method.extend(self._index, here, done, most, ctx)
        self._seen = list(slots.appended)

    def _picked(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[:1].expand(len(rows), -1, -1, -1)

    def _enlarged(self, x: Tensor, rows: int) -> Tensor:
        return x[:, :1].expand(-1, rows, -1, -1)


class OffloadedStore:
    """One layer's rows: all of them in ``host``; sinks, window and those after it in ``near`` as well.

    Attributes:
        host: all rows; with their side data, where the host selects.
        near: rows on the device, those of sequence b at the end of its piece.
        side: side data on the device, where that selects; None before the prompt's end, and where the host does.
    """

    def __init__(self, tier: HostTier) -> None:
        self.tier, self.copier = tier, tier.copier
        self.host = Store()
        self.near = Store()
        self.side: SideStore | None = None
        self._whole: Store | None = None  # during a prompt, on its device

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
            if self.side is not None:
                self.side.add(k_BKTD.shape[2])
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

    def check(self, method: Decode) -> None:
        """Raise ValueError unless the rows were placed for a method."""
        if method != self.tier.method:
            raise ValueError(
                "kv_device=cpu: this cache was filled for another decode method, by whose window its rows were placed;"
                " read the prompt again"
            )

    @property
    def shift(self) -> int:
        """What is to be taken from the number of a row to find it in ``near``."""
        return self.host.length - self.near.length

    def end_prefill(self, q_BTHD: Tensor, ctx: Ctx) -> None:
        """Note that the rows so far are prompt: side data are made on the device, and the rows go to the host."""
        method = self.tier.method
        if self._whole is None:  # a later part of a prompt: its rows are on the host already
            self.host.end_prefill(q_BTHD.to(HOST), method.tail)
            self.near, self.side = self._newest(self.host, q_BTHD.device), None
            return
        whole, self._whole = self._whole, None
        whole.end_prefill(q_BTHD, method.tail)
        if ctx.layer not in method.dense_layers and not method.covers(whole.longest_middle(method)):
            whole.begin(method, q_BTHD[:, max(0, q_BTHD.shape[1] - method.tail) :], ctx)
        begun = whole._built_by is not None
        self.host = whole.copied(HOST, self.copier.copy, sides=not self.tier.sides_on_device)
        self.near = self._newest(whole, q_BTHD.device)
        self.side = SideStore(whole) if begun and self.tier.sides_on_device else None
        self.copier.mark()

    def _newest(self, store: Store, device: torch.device, generated: int = 0) -> Store:
        method = self.tier.method
        return _newest(store, method.sinks, max(method.window, HELD) + generated, device)

    def drop_old(self) -> None:
        """Let go of rows on the device that have left the window; the host has them."""
        method = self.tier.method
        if method.grows and self.near.length > method.sinks + max(method.window, HELD) + NEWEST:
            self.near = self._newest(self.near, _made(self.near.k).device)

    def bring_up_to_date(self, ctx: Ctx) -> None:
        """Side data on the device of rows that were added since; the host makes its own where too many were."""
        if self.side is None:
            return
        of_page = self.side.unit if self.side.missing > 1 else 0  # several make the page of the first anew
        if self.side.missing + of_page > self.near.length - self.tier.method.sinks or not self.side.made_by(
            self.tier.method, ctx.seed
        ):
            self.side = None
        else:
            self.side.refresh(self.tier.method, self.near, self.shift, ctx)

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
        if self.side is not None:
            self.side.truncate(length)
        generated = 0 if self.tier.method.grows else length - self.host.prompt  # the middle ends where the prompt's did
        self.near = self._newest(self.host, _made(self.near.k).device, generated)
        for slot, start in enumerate(self.near.slots.starts if self.near.slots else ()):
            self.near.slots.end_prompt(slot, max(start, self.near.length - generated))  # type: ignore[union-attr]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat sequences, as ``Store.select``."""
        self.copier.wait()
        for store in (self.host, self.near, self.side, self._whole):
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
