"""Times of the CPU attention kernels beside torch, one layer: python tools/bench_cpu_attention.py [--keys 98304]"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from keysift.ops.attention_cpu import gather, short
from keysift.ops.cpu.library import load
from keysift.types import KV, Law, Selection


def clock(run, seconds, least=5):
    """Minimum and median in ms."""
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times), statistics.median(times)


def ascending(lists, keys, share, generator):
    """Random ascending rows, ``[1, lists, share * keys]``, and their counts."""
    count = round(keys * share)
    rows = torch.stack([torch.randperm(keys, generator=generator)[:count].sort().values for _ in range(lists)])
    return Selection(rows[None].int(), torch.full((1, lists), count, dtype=torch.int32))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[32768, 98304])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, g = getattr(torch, args.dtype), torch.Generator().manual_seed(0)
    print(f"{args.threads} threads, isa {args.isa} of {load().usable}; ms, minimum and median")
    for keys in args.keys:
        one_length(keys, args, dtype, g)


def one_length(keys, args, dtype, g):
    k, v = (torch.randn(1, keys, args.kv_heads, args.dim, generator=g).to(dtype) for _ in range(2))
    q = torch.randn(1, args.heads, args.dim, generator=g).to(dtype)
    kv, scale, isa = KV.of(k, v), args.dim**-0.5, args.isa

    def show(what, run, size):
        low, mid = clock(run, args.seconds)
        print(f"{keys:7} keys  {what:44} {low:8.3f} {mid:8.3f}   {size / low / 1e6:6.1f} GB/s", flush=True)

    every, row = k.nbytes + v.nbytes, 2 * args.dim * k.element_size()
    grouped = q.view(1, args.kv_heads, -1, args.dim)
    turned = [x.transpose(1, 2) for x in (k, v)]
    show("torch SDPA, heads grouped, rows of tokens", lambda: F.scaled_dot_product_attention(grouped, *turned), every)
    whole = [x.contiguous() for x in turned]
    show("torch SDPA, heads grouped, heads apart", lambda: F.scaled_dot_product_attention(grouped, *whole), every)
    show("dense decode", lambda: short(q[:, None], kv, scale, isa=isa), every)
    for tokens in args.tokens:
        many = q[:, None].repeat(1, tokens, 1, 1)
        show(f"{tokens} tokens", lambda many=many: short(many, kv, scale, isa=isa), every)
    law = Law(k.float().mean(1), torch.linspace(4, 0, 1025))
    for name, lists in (("query head", args.heads), ("KV head", args.kv_heads)):
        for share in (0.045, 0.015):
            chosen = ascending(lists, keys, share, g)
            size = row * lists * chosen.rows.shape[2]
            for weights, selection in (("", chosen), (", law", chosen._replace(log_w=law))):
                what = f"{share:.1%} of the rows per {name}{weights}"
                show(what, lambda s=selection: gather(q, kv, s, scale, isa=isa), size)
    few = Selection(torch.arange(32).int().expand(1, args.kv_heads, 32), torch.full((1, args.kv_heads), 32).int())
    show("32 rows per KV head", lambda: gather(q, kv, few, scale, isa=isa), 32 * args.kv_heads * row)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
