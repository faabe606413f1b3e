"""What prefill methods read and cover, over all query rows and heads: is gamma kept, and at what price?

python tools/mass_covered.py [--inputs structured|pocket] [--tokens 4096]... [--device cuda] [--out FILE.json] [SPEC ...]

The limit of a method is the density of the true block mass taken row by row to the same coverage, head by head.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from keysift import methods, pocket
from keysift.bench.inputs import structured_qkv
from keysift.eval.data import Data
from keysift.eval.ruler import make_sample
from keysift.ops.coverage import block_mass, fewest_blocks
from keysift.types import KV, Ctx

SPECS = (
    "flexprefill:gamma=0.9",
    "flexprefill:gamma=0.95",
    "flexprefill:gamma=0.9,mode=seed,min_budget=none",
    "flexprefill:gamma=0.95,mode=seed,min_budget=none",
    "xattention:threshold=0.9",
    "flashprefill:alpha=0.12",
    "minference:vertical=512,slash=1024",
    "streaming:sinks=128,window=1024",
)
Layer = tuple[Tensor, Tensor]


def structured(tokens: int, device: str) -> Iterator[Layer]:
    q, k, _ = structured_qkv(tokens, device=device)
    yield q, k


def of_pocket(tokens: int, device: str) -> Iterator[Layer]:
    """Queries and keys of every layer of the pocket model on a document of facts to trace."""
    folder = pocket.path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    ids = make_sample("vt", tokens, 0, AutoTokenizer.from_pretrained(folder), Data()).ids
    seen: list[Layer] = []

    def spy(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
        seen.append((query.transpose(1, 2), key.transpose(1, 2)))
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model.set_attn_implementation("spy")
    with torch.no_grad():
        model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)
    yield from seen


def measure(method: Any, layers: list[tuple[Layer, Tensor]]) -> dict[str, float]:
    """Density, coverage and the limit's density of every head, summed up."""
    densities, covered, limits, rows = [], [], [], []
    for index, ((q, k), mass) in enumerate(layers):
        kv = KV.of(k, k)
        blocks = mass.shape[-1]
        plan = method.plan(q, kv, Ctx(index, q.shape[-1] ** -0.5, kv.length - 1))
        causal = torch.ones(blocks, blocks, dtype=torch.bool, device=k.device).tril()
        active = causal if plan is None else method.mask(plan, range(blocks)).active(blocks) & causal
        share = (mass * active).sum(-1)
        densities.append(active.expand(mass.shape).sum((-1, -2)) / causal.sum())
        covered.append(share.mean(-1))
        limits.append(fewest_blocks(mass, share.mean(-1)) / causal.sum())
        rows.append(share.flatten())
    density, mean, limit = (torch.cat([x.flatten().cpu() for x in parts]) for parts in (densities, covered, limits))
    return {
        "density": float(density.mean()),
        "mass": float(mean.mean()),
        "worst_head": float(mean.min()),
        "worst_percent_of_rows": float(torch.cat(rows).cpu().quantile(0.01)),
        "limit_density": float(limit.mean()),
        "density_over_limit": float(density.sum() / limit.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--inputs", choices=("structured", "pocket"), default="pocket")
    parser.add_argument("--tokens", type=int, action="append", help="repeat for several; default 4096")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for tokens in args.tokens or [4096]:
        make = structured if args.inputs == "structured" else of_pocket
        layers = []
        for q, k in make(tokens, args.device):
            blocks = range(math.ceil(q.shape[1] / args.block))
            layers.append(((q, k), block_mass(q, KV.of(k, k), q.shape[-1] ** -0.5, args.block, blocks)))
        table = Table("method", "density", "mass", "worst head", "worst 1% of rows", "density / limit", box=None)
        for spec in args.specs or SPECS:
            method = methods.parse(f"{spec}{',' if ':' in spec else ':'}block={args.block}", "prefill")
            found = measure(method, layers)
            results.append({"inputs": args.inputs, "tokens": tokens, "method": spec, **found})
            cells = ("density", "mass", "worst_head", "worst_percent_of_rows", "density_over_limit")
            table.add_row(spec, *(f"{found[c]:.3f}" for c in cells))
        Console(width=140).print(f"{args.inputs}, {tokens} tokens", table)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
