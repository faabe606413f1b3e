"""The library of CPU kernels: found, loaded and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

FILE = "libkeysift_cpu.so"
ISAS = ("auto", "portable", "avx2", "avx512", "avx512_bf16", "neon")  # their numbers in abi.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUILD = "cmake -S . -B build && cmake --build build"
_BAD_ARGUMENT, _NO_MEMORY = 1, 2


class Args(ctypes.Structure):
    """What every struct of arguments begins with; fields of subclasses follow, as in C++."""

    _fields_: ClassVar[tuple[tuple[str, Any], ...]] = (
        ("size", ctypes.c_int64),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Library:
    """A loaded library.

    Attributes:
        path: of the file.
        compiled: instruction sets that it was built with.
        usable: those of them that this CPU has, the best one last; each can be forced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        self._c.ks_last_error.restype = ctypes.c_char_p
        of_library, of_cpu = ctypes.c_int64(), ctypes.c_int64()
        self._c.ks_isas(ctypes.byref(of_library), ctypes.byref(of_cpu))
        self.compiled = tuple(name for i, name in enumerate(ISAS) if of_library.value >> i & 1)
        self.usable = tuple(name for i, name in enumerate(ISAS) if of_cpu.value >> i & 1)

    def function(self, name: str, args: type[Args]) -> Callable[[Args], None]:
        """The exported ``ks_<name>``, which takes a pointer to an ``args``.

        Raises:
            RuntimeError: the library has no such function; from a call: an exception in a kernel.
            MemoryError: from a call.
            ValueError: from a call, for an argument that the library refuses.
        """
        try:
            call = self._c[f"ks_{name}"]
        except AttributeError:
            raise RuntimeError(f"{self.path} has no ks_{name}: it is older than the sources; {BUILD}") from None
        call.argtypes, call.restype = (ctypes.POINTER(args),), ctypes.c_int
        return functools.partial(self._checked, call)

    def _checked(self, call: Callable[[Any], int], args: Args) -> None:
        status = call(args)
        if status:
            text = self._c.ks_last_error().decode(errors="replace")
            error = {_BAD_ARGUMENT: ValueError, _NO_MEMORY: MemoryError}.get(status, RuntimeError)
            raise error(f"CPU kernels: {text}")


_shared = threading.local()


def threads() -> int:
    """Threads that a kernel may use: torch's, less those that callers beside this one keep busy."""
    return max(1, torch.get_num_threads() - getattr(_shared, "others", 0))


@contextmanager
def beside(others: int) -> Iterator[None]:
    """Within it this thread leaves a core to each of so many others that call kernels at the same time: with more
    threads at work than cores a kernel would wait for one that has lost its core."""
    before, _shared.others = getattr(_shared, "others", 0), others
    try:
        yield
    finally:
        _shared.others = before


def isa_number(name: str, library: Library) -> int:
    """The number of an instruction set; ValueError unless it is "auto" or the library can run it here."""
    if name != "auto" and name not in library.usable:
        raise ValueError(f"isa={name}: choose auto or one of {', '.join(library.usable)}")
    return ISAS.index(name)


@functools.cache
def load() -> Library | None:
    """The library; None, told once, where it was not built. Of several builds the newest."""
    found = [path for path in _candidates() if path.is_file()]
    if not found:
        logging.getLogger("keysift").warning(
            "keysift was installed without its CPU kernels, so that attention on a CPU runs slower. They need a C++"
            " compiler when keysift is installed."
        )
        return None
    return Library(max(found, key=lambda path: path.stat().st_mtime))


@functools.cache
def _built() -> Library:
    library = load()
    if library is None:
        raise RuntimeError("the CPU kernels were not built; load() says so")
    return library


@functools.cache
def function(name: str, args: type[Args]) -> Callable[[Args], None]:
    """``ks_<name>`` of the library; RuntimeError where there is none."""
    return _built().function(name, args)


@functools.cache
def isa_of(name: str) -> int:
    """The number of an instruction set; ValueError where it cannot run."""
    return isa_number(name, _built())


def _candidates() -> Iterator[Path]:
    """Where a library may be: in the package, which an editable install has in two places, or a source tree's build."""
    package = sys.modules[__package__ or "keysift.ops.cpu"]
    for folder in dict.fromkeys(package.__path__):
        yield Path(folder) / FILE
    yield Path(__file__).resolve().parents[4] / "build" / FILE
