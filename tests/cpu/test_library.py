"""The library of CPU kernels: found, forced, refusing what it cannot do, and failing as one clear error."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from keysift.ops.attention_cpu import GatherArgs, gather, short
from keysift.ops.cpu import library as module
from keysift.ops.cpu.library import DTYPES, ISAS, Args, Library, isa_number, load
from keysift.ops.cpu.memory import in_large_pages
from keysift.types import KV, Selection
from tests.helpers import generator

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "keysift" / "ops" / "cpu" / "src"
OUT_OF_MEMORY, EXCEPTION, NO_SCRATCH = 1, 2, 3

library = load()
needs_library = pytest.mark.skipif(library is None, reason="the CPU kernels were not built")


class FailArgs(Args):
    _fields_ = (("kind", ctypes.c_int64), ("task", ctypes.c_int64))


def fail_next(kind, task=0):
    library.function("fail_next", FailArgs)(FailArgs(ctypes.sizeof(FailArgs), 0, 1, kind, task))


def case(keys=3000):
    g = generator(0)
    q = torch.randn(1, 4, 64, generator=g)
    kv = KV.of(*(torch.randn(1, keys, 2, 64, generator=g) for _ in range(2)))
    return q, kv, Selection.of(torch.rand(1, 2, keys, generator=g) < 0.9)


@needs_library
def test_the_portable_path_is_always_usable():
    assert library.usable[0] == "portable"
    assert set(library.usable) <= set(library.compiled) <= set(ISAS[1:])


@needs_library
def test_the_numbers_of_python_are_those_of_the_header():
    text = (SOURCES / "abi.h").read_text(encoding="utf-8")
    isas = dict(re.findall(r"(\w+) = (\d)", text[text.index("enum Isa") : text.index("enum Dtype")]))
    assert [name.upper() for name in ISAS] == sorted(isas, key=lambda name: int(isas[name]))
    assert [DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [0, 1, 2]
    assert "enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 }" in text


@needs_library
def test_an_instruction_set_that_the_cpu_lacks_is_refused():
    lacking = [name for name in ISAS[1:] if name not in library.usable]
    assert lacking, "no CPU has all of them"
    q, kv, selection = case()
    for name in lacking:
        with pytest.raises(ValueError, match=f"isa={name}: choose auto or one of portable"):
            gather(q, kv, selection, 1.0, isa=name)
        args = FailArgs(ctypes.sizeof(FailArgs), ISAS.index(name), 1, 0, 0)
        with pytest.raises(ValueError, match=f"isa={name}: this (CPU lacks it|library was built without it)"):
            library.function("fail_next", FailArgs)(args)
    with pytest.raises(ValueError, match="isa=17"):
        library.function("fail_next", FailArgs)(FailArgs(ctypes.sizeof(FailArgs), 17, 1, 0, 0))
    assert isa_number("auto", library) == 0


@needs_library
def test_arguments_of_another_size_are_refused():
    size = ctypes.sizeof(GatherArgs)
    with pytest.raises(ValueError, match=f"arguments of {size + 8} bytes, where the library has {size}"):
        library.function("gather", GatherArgs)(GatherArgs(size + 8, 0, 1))
    with pytest.raises(ValueError, match="threads has to be at least 1"):
        library.function("gather", GatherArgs)(GatherArgs(size, 0, 0))


@needs_library
def test_a_library_that_is_older_than_the_sources_says_how_to_build_it():
    with pytest.raises(RuntimeError, match="no ks_nothing: it is older than the sources; cmake"):
        library.function("nothing", Args)


@needs_library
@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (OUT_OF_MEMORY, MemoryError, "CPU kernels: out of memory"),
        (EXCEPTION, RuntimeError, "CPU kernels: a worker failed, as a test asked"),
        (NO_SCRATCH, MemoryError, "CPU kernels: out of memory"),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_fault_in_any_task_is_one_clear_error_and_the_next_call_works(kind, error, text, threads):
    q, kv, selection = case()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = gather(q, kv, selection, 0.1)
        for task in (0, 1, 3):
            fail_next(kind, task)
            with pytest.raises(error, match=text):
                gather(q, kv, selection, 0.1)
            assert torch.equal(gather(q, kv, selection, 0.1).out, want.out)
        fail_next(kind)
        with pytest.raises(error, match=text):
            short(q[:, None], kv, 0.1)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_several_threads_of_python_share_the_pool():
    q, kv, selection = case()
    torch.set_num_threads(threads := max(2, torch.get_num_threads()))
    want = gather(q, kv, selection, 0.1).out
    same = []

    def call():
        torch.set_num_threads(threads)
        same.extend(torch.equal(gather(q, kv, selection, 0.1).out, want) for _ in range(50))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert len(same) == 200 and all(same)


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_pool_of_its_own():
    program = """
import os, sys, torch
from keysift.ops.attention_cpu import short
from keysift.types import KV
torch.set_num_threads(2)
q, k, v = torch.ones(1, 1, 4, 64), torch.randn(1, 3000, 2, 64), torch.randn(1, 3000, 2, 64)
want = short(q, KV.of(k, v), 0.1).out.numpy()
child = os.fork()
if child == 0:
    os._exit(0 if (short(q, KV.of(k, v), 0.1).out.numpy() == want).all() else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_a_missing_library_is_none_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "_candidates", lambda: iter([ROOT / "nowhere"]))
    load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="keysift"):
            assert load() is None and load() is None
        assert [record.getMessage() for record in caplog.records] == [caplog.records[0].getMessage()]
        assert "runs slower" in caplog.text
    finally:
        load.cache_clear()


@needs_library
def test_the_newest_build_is_loaded(monkeypatch, tmp_path):
    old, new = tmp_path / "old.so", tmp_path / "new.so"
    for age, path in ((100, old), (50, new)):
        shutil.copy(library.path, path)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    monkeypatch.setattr(module, "_candidates", lambda: iter([old, new, tmp_path / "none.so"]))
    load.cache_clear()
    try:
        assert load().path == new
    finally:
        load.cache_clear()


@needs_library
def test_an_unreadable_library_is_an_error_and_not_silence(tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    with pytest.raises(OSError, match=r"broken\.so"):
        Library(tmp_path / "broken.so")


def test_the_kernels_stay_readable():
    for path in [*SOURCES.iterdir(), *(ROOT / "tests" / "cpu" / "native").iterdir()]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 520, path.name
        assert max(map(len, lines)) <= 120, path.name


def build(folder, *options):
    """Build the library and the native tests in ``folder``; skip where there is no compiler or sanitizer."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("no cmake or no C++ compiler")
    done = subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the compiler cannot build this: {done.stderr[-300:]}")
    done = subprocess.run(["cmake", "--build", folder, "-j2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@needs_library
@pytest.mark.soak
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_kernels_and_pool_are_clean_under_a_sanitizer(sanitizer, tmp_path):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    command = ["c++", f"-fsanitize={sanitizer}", "-o", tmp_path / "probe", probe]
    if not shutil.which("c++") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    build(tmp_path / "build", f"-DKEYSIFT_SANITIZE={sanitizer}", f"-DKEYSIFT_ISAS={';'.join(library.usable)}")
    command = ["ctest", "--test-dir", tmp_path / "build", "--output-on-failure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@needs_library
@pytest.mark.soak
def test_no_kernel_leaves_the_linker_a_choice_between_instruction_sets(tmp_path):
    """A weak symbol in a file that is compiled once an instruction set may win over the others."""
    if not shutil.which("nm"):
        pytest.skip("no nm")
    # what is inlined has no symbol: the less is optimised, the more there are, and the sooner it is done
    build(tmp_path, "-DCMAKE_BUILD_TYPE=MinSizeRel", "-DCMAKE_CXX_FLAGS_MINSIZEREL=-O1")
    objects = list(tmp_path.glob("CMakeFiles/kernels_*.dir/**/*.o"))
    assert len(objects) == len(library.compiled) * len(list(SOURCES.glob("*_kernels.cpp")))
    symbols = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True)
    assert not re.findall(r"^\S* [WVu] .*$", symbols.stdout, re.MULTILINE)


def test_large_pages_are_only_a_hint():
    for shape in ((0,), (3, 5), (3 << 20,)):
        x = in_large_pages(torch.empty(shape, dtype=torch.int16))
        x.fill_(7)
        assert (x == 7).all()
    assert in_large_pages(torch.empty(5, device="meta")).is_meta
