"""How far decode methods are from dense attention, at how many keys and bytes, over seeds of their hashes and draws.

python tools/decode_error.py [--inputs pocket|structured] [--tokens 4096]... [--task vt]... [--seeds 5]
                             [--positions 8] [--device cuda] [--json] [SPEC ...]

Errors are |o - dense| / |dense| of one head's output, dense in fp32, over all layers, heads, positions and seeds; no
layer stays dense. Keys and values are bf16. Of methods that promise an ``epsilon``, "held" is the share of outputs
within it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from keysift import methods, pocket
from keysift.attention import decode
from keysift.bench.inputs import structured_qkv
from keysift.bench.layers import exact_attention
from keysift.cache import Store
from keysift.eval.data import Data
from keysift.eval.ruler import make_sample
from keysift.meter import Meter
from keysift.types import Ctx

SPECS = (
    "streaming:sinks=4,window=64",
    "topk:keep=0.02",
    "magicpig",
    "magicpig:K=8,L=75",
    "signbits:keep=0.01",
    "signbits:keep=0.02",
    "signbits:keep=0.05",
    "verified",
    "verified:by=signbits",
)


class Layer(NamedTuple):
    """One layer of a document; no batch: queries ``[T, H, D]``, keys and values ``[T, K, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor


def of_pocket(task: str, tokens: int, device: str) -> Iterator[Layer]:
    """Every layer of the pocket model on a RULER document with its answer."""
    folder = pocket.path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    sample = make_sample(task, tokens, 0, tokenizer, Data())
    ids = sample.ids + tokenizer(" " + " ".join(sample.outputs), add_special_tokens=False).input_ids
    seen: list[Layer] = []

    def spy(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
        seen.append(Layer(*(x[0].transpose(0, 1) for x in (query, key, value))))
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model.set_attn_implementation("spy")
    with torch.no_grad():
        model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)
    yield from seen


def structured(tokens: int, device: str) -> Iterator[Layer]:
    yield Layer(*(x[0] for x in structured_qkv(tokens, device=device)))


class Found(NamedTuple):
    """Relative errors, keys read as a share of the cached ones, and bytes as a share of what dense attention reads."""

    errors: Tensor
    kept: float
    bytes_read: float


def steps(method: Any, layer: Layer, number: int, positions: int, seed: int) -> Found:
    """The decode steps of a layer's last ``positions`` tokens."""
    q, k, v = layer.q.float()[None], layer.k.bfloat16()[None], layer.v.bfloat16()[None]
    prompt = q.shape[1] - positions
    store, meter, errors, scale = Store(), Meter(), [], q.shape[-1] ** -0.5
    store.append(k[:, :prompt].transpose(1, 2), v[:, :prompt].transpose(1, 2))
    store.end_prefill(q[:, max(0, prompt - method.tail) : prompt], method.tail)
    for t in range(prompt, q.shape[1]):
        rows = slice(t, t + 1)
        store.append(k[:, rows].transpose(1, 2), v[:, rows].transpose(1, 2))
        out, _ = decode(q[:, t], store, method, Ctx(number, scale, store.view().length - 1, seed), meter)
        exact = exact_attention(q[:, t], k[:, : t + 1], v[:, : t + 1], scale)
        errors.append((out - exact).norm(dim=-1) / exact.norm(dim=-1))
    stats = meter.stats()
    assert stats.kept_fraction is not None and stats.bytes_per_step is not None
    dense = (prompt + (positions + 1) / 2) * k[0, 0].numel() * k.element_size() * 2
    return Found(torch.cat(errors).flatten().cpu(), stats.kept_fraction, stats.bytes_per_step / dense)


def bound_held(errors: Tensor, method: Any) -> float | None:
    """Share of the outputs that are within the method's ``epsilon``; None where it promises none."""
    epsilon = getattr(method, "epsilon", None)
    return None if epsilon is None else float((errors <= epsilon).float().mean())


def figures(spec: str, layers: list[Layer], seeds: int, positions: int) -> dict[str, Any]:
    """What a row of the table says."""
    method = dataclasses.replace(methods.parse(spec, "decode"), dense_layers=())
    found = [steps(method, x, i, positions, seed) for i, x in enumerate(layers) for seed in range(seeds)]
    errors = torch.cat([x.errors for x in found])
    return {
        "method": spec,
        "kept": sum(x.kept for x in found) / len(found),
        "bytes": sum(x.bytes_read for x in found) / len(found),
        "median": float(errors.median()),
        "mean": float(errors.mean()),
        "p90": float(errors.quantile(0.9)),
        "held": bound_held(errors, method),
        "promised": None if bound_held(errors, method) is None else 1 - method.risk,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--inputs", choices=("pocket", "structured"), default="pocket")
    parser.add_argument("--tokens", type=int, action="append", help="repeat for several; default 4096")
    parser.add_argument("--task", action="append", help="RULER task of the pocket model's documents; default vt")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=8, help="decode steps, the last of the document")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of tables")
    args = parser.parse_args()
    for tokens in args.tokens or [4096]:
        if args.inputs == "structured":
            layers = list(structured(tokens, args.device))
        else:
            read = functools.partial(of_pocket, tokens=tokens, device=args.device)
            layers = [layer for task in args.task or ["vt"] for layer in read(task)]
        table = Table("method", "kept", "bytes / dense", "median", "mean", "90%", "held", "promised", box=None)
        for spec in args.specs or SPECS:
            row = figures(spec, layers, args.seeds, args.positions)
            if args.json:
                print(json.dumps({"inputs": args.inputs, "tokens": tokens, **row}), flush=True)
            table.add_row(spec, *("" if x is None else f"{x:.4f}" for x in list(row.values())[1:]))
        if not args.json:
            Console(width=120).print(f"{args.inputs}, {tokens} tokens, {args.seeds} seeds", table)


if __name__ == "__main__":
    main()
