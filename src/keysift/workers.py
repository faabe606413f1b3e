"""Other processes that do what this one does, at the same time: the ranks of a model that is sharded over devices."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

START_SECONDS = 120.0
GRACE_SECONDS = 10.0  # for this process to notice a death by itself
KEY = "KEYSIFT_WORKERS_KEY"


class Workers:
    """Processes of ranks 1 and up; they hear every call before this process makes it, and make it too.

    If one dies, waiting for it in a collective operation would never end: this process then ends with an error, at the
    latest 10 seconds later.
    """

    def __init__(self, program: str, ranks: int) -> None:
        """Start processes of Python code that calls ``serve``, one for each rank but this, 0.

        What torchrun would tell them stands in their environment; ``environment`` is what it would tell this one.
        """
        key, count = secrets.token_hex(16), ranks - 1
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self.environment = meeting | {"RANK": "0", "LOCAL_RANK": "0"}
        self._closing = self._noticed = False
        self.dead: str | None = None
        listener = Listener(authkey=key.encode())
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(listener.address), str(os.getpid())],
                env=os.environ | meeting | {KEY: key, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(1, ranks)
        ]
        threading.Thread(target=self._watch, args=(self._processes,), daemon=True).start()
        self._connections: list[Connection] = []
        try:
            self._accept(listener, count)
        except BaseException:
            self.close()
            raise
        finally:
            listener.close()

    def _accept(self, listener: Listener, count: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]  # to see meanwhile who has died
        while len(self._connections) < count:
            try:
                self._connections.append(listener.accept())
            except TimeoutError:
                if self.dead or time.monotonic() > deadline:
                    raise RuntimeError(self.dead or f"no word from a worker within {START_SECONDS:.0f} s") from None

    def tell(self, *call: Any) -> None:
        """Have the others make a call.

        Raises:
            RuntimeError: one of them is gone.
        """
        self.check()
        for connection in self._connections:
            try:
                connection.send(call)
            except OSError as error:
                time.sleep(0.5)  # for who watches to see which it was
                self._noticed = True
                raise RuntimeError(self.dead or "a tensor-parallel worker is gone") from error

    def check(self) -> None:
        """Raise RuntimeError if a worker has died."""
        if self.dead:
            self._noticed = True
            raise RuntimeError(self.dead)

    def end(self, why: str) -> None:
        """Kill the processes; later calls are refused with the reason."""
        self._closing, self.dead = True, self.dead or why
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the processes."""
        self._closing = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Wait for a process to die before it should."""
        while not self._closing:
            for rank, process in enumerate(processes):
                code = process.poll()
                if code is not None and not self._closing:
                    self.dead = f"tensor-parallel rank {rank + 1} ended with code {code}"
                    self._end_unless_noticed()
                    return
            time.sleep(0.1)

    def _end_unless_noticed(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if self._closing or self._noticed:
                return
            time.sleep(0.1)
        sys.stderr.write(f"keysift: {self.dead}\n")  # the last that is heard of this process
        sys.stderr.flush()
        for process in self._processes:
            process.kill()
        os._exit(1)


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """What a worker does: make an object of the first call's options, and have it do what it hears, until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that the user started
    address, parent = sys.argv[1], int(sys.argv[2])
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    connection = Client(address, authkey=os.environ[KEY].encode())
    (options,) = connection.recv()
    try:
        made = make(options)
    except ValueError:  # which the first process says too
        os._exit(1)
    try:
        while True:
            name, *args = connection.recv()
            getattr(made, name)(*args)
    except (EOFError, ConnectionError):
        os._exit(0)  # what others are in the middle of is over


def _die_with(parent: int) -> None:
    """End when the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
