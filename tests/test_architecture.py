"""The house keeps its order: who may import whom, and what no room may contain."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import keysift

ROOT = Path(keysift.__file__).parent
# each may import those before it
ORDER = (
    "types ops methods slots cache offload meter attention functional hf checkpoint speculate sampling text prefixes"
    " requests workers ranks capacity scheduler engine custom_generate vllm_plugin patch eval bench cli"
).split()
FREE = {"pocket", "__init__"}  # pocket is data; the package's front names what hf and functional define
MODEL_NAMES = ("llama", "qwen", "mistral", "glm", "gemma", "phi3", "mixtral")
FILES = sorted(p for p in ROOT.rglob("*.py"))


def room(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def of_triton(path):
    """Whether a file may import triton: kernels, and how they address tensors."""
    return path.parent.name == "ops" and (path.stem.endswith("_triton") or path.stem == "descriptors")


def imports(path):
    """Rooms of keysift that a file imports, and whether anything foreign named transformers."""
    rooms, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" if node.module == "keysift" else node.module for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "keysift" and len(parts) > 1:
                rooms.add(parts[1])
            elif parts[0] != "keysift":
                foreign.add(parts[0])
    return rooms, foreign


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = room(path)
    if here in FREE:
        return
    rooms, foreign = imports(path)
    allowed = set(ORDER[: ORDER.index(here) + 1]) | (FREE if here in ("eval", "bench", "cli") else set())
    known = {r for r in rooms if r in ORDER or r in FREE}
    assert known <= allowed, f"{here} imports {known - allowed}"
    if here in ORDER[:8]:
        assert foreign <= {"torch", *sys.stdlib_module_names} | ({"triton"} if of_triton(path) else set())


@pytest.mark.slow
def test_the_package_works_where_triton_is_missing():
    """Modules of kernels are imported when they are first needed, which without a GPU is never."""
    program = """
import sys
sys.modules["triton"] = None
import torch, keysift, keysift.bench.inputs
q, k, v = keysift.bench.inputs.structured_qkv(300, 2, 1, 32, dtype=torch.bfloat16)
for spec in ("dense", "flexprefill:block=16", "flexprefill:block=16,mode=seed", "minference", "xattention"):
    assert keysift.prefill_attention(q, k, v, spec, return_lse=True)[0].isfinite().all()
loaded = [m for m in sys.modules if m.startswith("keysift") and m.endswith(("_triton", "descriptors"))]
assert not loaded, loaded
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_room_is_known():
    assert {room(p) for p in FILES} <= set(ORDER) | FREE


@pytest.mark.parametrize("path", [p for p in FILES if room(p) not in ("hf", "cli", "pocket")], ids=lambda p: p.name)
def test_model_names_stay_in_hf(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)
    }
    assert not [n for n in names if any(m in n.lower() for m in MODEL_NAMES)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 520


def test_the_public_names_exist():
    assert all(hasattr(keysift, name) for name in keysift.__all__)
