"""What prefill methods read and cover on the pocket model: density, attention mass, output error, over all its heads.

python tools/mass_covered.py [--tokens 4096] [SPEC ...]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import keysift
from keysift import pocket

SPECS = (
    "flexprefill:gamma=0.9,block=64,min_budget=none",
    "flexprefill:gamma=0.95,block=64,min_budget=none",
    "flexprefill:gamma=0.9,block=64,min_budget=none,mode=seed",
    "flexprefill:gamma=0.95,block=64,min_budget=none,mode=seed",
    "xattention:threshold=0.9,block=64",
    "flashprefill:alpha=0.12,block=64",
    "minference:vertical=512,slash=1024,block=64",
    "streaming:sinks=64,window=1024,block=64",
)


def layers_of_the_demo(tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of every layer for the first tokens of demo.txt, ``[1, tokens, heads, 64]``."""
    folder = pocket.path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (folder / "demo.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :tokens]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def spy(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
        seen.append(tuple(x.transpose(1, 2) for x in (query, key, value)))
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model.set_attn_implementation("spy")
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return seen


def measure(spec: str, layers: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float, float, float]:
    """Mean density, mean mass, mass of the worst tenth of the heads, mean relative error of a layer's output."""
    densities, masses, errors = [], [], []
    for q, k, v in layers:
        group = q.shape[2] // k.shape[2]
        for h in range(q.shape[2]):
            kv_head = slice(h // group, h // group + 1)
            one = (q[:, :, h : h + 1], k[:, :, kv_head], v[:, :, kv_head])
            _, stats = keysift.prefill_attention(*one, spec, return_stats=True, measure_mass=True)
            densities.append(stats.density)
            masses.append(stats.mass_covered)
        dense = keysift.prefill_attention(q, k, v, "dense")
        errors.append(float((keysift.prefill_attention(q, k, v, spec) - dense).norm() / dense.norm()))
    mass = torch.tensor(masses)
    return sum(densities) / len(densities), float(mass.mean()), float(mass.quantile(0.1)), sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    layers = layers_of_the_demo(args.tokens)
    table = Table("method", "density", "mass", "mass, worst tenth", "output error", box=None)
    for spec in args.specs or SPECS:
        table.add_row(spec, *(f"{x:.3f}" for x in measure(spec, layers)))
    Console().print(table)


if __name__ == "__main__":
    main()
