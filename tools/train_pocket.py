"""Train the pocket model: `python tools/train_pocket.py --minutes 9 --out DIR` on one GPU.

Writes a Hugging Face checkpoint, the loss curve (train.json) and, unless --no-eval, the table (results.json).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pocket_tokenizer
import torch
from pocket_mix import Feed
from pocket_model import Pocket, Shape, angles, load_checkpoint, new_weights, save_checkpoint
from pocket_optim import Optimizer
from tokenizers import Tokenizer

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "keysift" / "pocket"


@dataclass
class Curve:
    """The loss over the run, averaged between records."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


class Stepper:
    """One optimizer step per call; on CUDA each length gets its own graph after a few plain steps."""

    def __init__(self, model: Pocket, optimizer: Optimizer, graphs: bool) -> None:
        self.model, self.optimizer, self.graphs = model, optimizer, graphs
        self._kept: dict[int, tuple] = {}

    def _run(self, tokens: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model.loss(tokens, weight, cos, sin)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _prepare(self, rows: int, length: int) -> tuple:
        device = self.model.device
        cos, sin = (t.repeat(rows, 1) for t in angles(self.model.shape, length, device))
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        weight = torch.zeros(rows, length, device=device)
        return tokens, weight, cos, sin

    def __call__(self, tokens, weight, length: int) -> torch.Tensor:
        """Loss [] on the device of this step's batch (numpy arrays [rows, length])."""
        if length not in self._kept:
            self._kept[length] = [self._prepare(*tokens.shape), 0, None, None]
        kept = self._kept[length]
        x, w, cos, sin = kept[0]
        x.copy_(torch.from_numpy(tokens.astype("int64")), non_blocking=True)
        w.copy_(torch.from_numpy(weight.astype("float32")), non_blocking=True)
        if not self.graphs:
            return self._run(x, w, cos, sin)
        if kept[1] < 3:  # plain steps first: compilation and lazy handles must not fall into a capture
            kept[1] += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self._run(x, w, cos, sin)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if kept[2] is None:
            kept[2] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(kept[2]):
                kept[3] = self._run(x, w, cos, sin)
        kept[2].replay()
        return kept[3]


def rate(step: int, progress: float, warmup: int) -> float:
    """Share of the full learning rate: linear warm-up by steps, linear decay over the last third of the time."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, (1.0 - progress) * 3.0))


def train(args: argparse.Namespace, device: str) -> tuple[Pocket, Curve, dict]:
    """Run for args.minutes (or args.steps) and save checkpoints on the way."""
    cuda = device == "cuda"
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    if args.resume:
        shape, weights = load_checkpoint(args.resume, device)
    else:
        shape = Shape(vocab_size=tokenizer.get_vocab_size())
        weights = new_weights(shape, args.seed, device)
    for w in weights.values():
        w.requires_grad_(True)
    model = Pocket(shape, weights, low=torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    optimizer = Optimizer(weights, args.muon_lr, args.adam_lr)
    stepper = Stepper(model, optimizer, graphs=cuda)
    feed = Feed(
        args.tokenizer,
        args.text or pocket_tokenizer.default_roots(),
        workers=args.workers,
        tokens=args.batch_tokens,
        seed=args.seed,
        progress=args.start,
    )
    curve, step, tokens, total, seen, starved = Curve(), 0, 0, None, 0, 0
    begin = saved = time.monotonic()
    try:
        for length, ids, weight in feed:
            if step == 3:  # workers have started and kernels are compiled
                begin = time.monotonic()
            elapsed = time.monotonic() - begin
            done = step / args.steps if args.steps else elapsed / (60 * args.minutes)
            if done >= 1:
                break
            feed.progress.value = args.start + done * (1 - args.start)
            starved += feed.waiting() == 0
            optimizer.scale.fill_(rate(step, feed.progress.value if not args.resume else done, args.warmup))
            loss = stepper(ids, weight, length)
            total = loss.clone() if total is None else total + loss
            seen, step, tokens = seen + 1, step + 1, tokens + ids.size
            if seen == args.record or step == 1:
                value = (total / seen).item()
                if value != value:
                    raise RuntimeError(f"the loss is NaN at step {step}: lower --muon-lr or --adam-lr")
                for name, v in zip(
                    ("steps", "tokens", "seconds", "length", "loss"),
                    (step, tokens, round(elapsed, 2), length, round(value, 5)),
                    strict=True,
                ):
                    getattr(curve, name).append(v)
                total, seen = None, 0
                if len(curve.steps) % 10 == 1:
                    print(
                        f"step {step:6d}  {tokens / 1e6:7.1f}M tokens  {elapsed:6.1f} s  length {length:6d}  loss {value:.4f}  starved {starved}",
                        flush=True,
                    )
            if time.monotonic() - saved > args.save_seconds:
                save_checkpoint(args.out, shape, weights)
                saved = time.monotonic()
    finally:
        feed.close()
    save_checkpoint(args.out, shape, weights)
    facts = {
        "steps": step,
        "tokens": tokens,
        "seconds": round(time.monotonic() - begin, 1),
        "parameters": sum(w.numel() for w in weights.values()),
        "starved_steps": starved,
    }
    return model, curve, facts


def machine() -> dict:
    """What a figure needs to be repeated: device and versions."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the figures")
    p.add_argument(
        "--minutes", type=float, default=9.0, help="training time; the curriculum and the learning rate follow it"
    )
    p.add_argument("--steps", type=int, default=0, help="train so many steps instead")
    p.add_argument("--resume", type=Path, help="start from this checkpoint's weights")
    p.add_argument("--start", type=float, default=0.0, help="share of the curriculum to skip (with --resume)")
    p.add_argument("--tokenizer", type=Path, default=PACKAGE / "tokenizer.json")
    p.add_argument("--build-tokenizer", action="store_true", help="build a new tokenizer into --out first, from --text")
    p.add_argument(
        "--text",
        type=Path,
        nargs="*",
        help="folders of text for haystacks (default: Python's library, the system's licences)",
    )
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    p.add_argument("--batch-tokens", type=int, default=32768)
    p.add_argument("--muon-lr", type=float, default=0.01)
    p.add_argument("--adam-lr", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=300)
    p.add_argument("--record", type=int, default=25, help="steps between points of the loss curve")
    p.add_argument("--save-seconds", type=float, default=60.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-eval", action="store_true")
    p.add_argument("--eval-samples", type=int, default=100)
    p.add_argument("--eval-seconds", type=float, default=0.0, help="stop the evaluation after so long (0: never)")
    args = p.parse_args(argv)
    if not args.build_tokenizer and not args.tokenizer.is_file():
        p.error(f"no tokenizer at {args.tokenizer}: give --tokenizer FILE or --build-tokenizer")
    if args.resume and not (args.resume / "model.safetensors").is_file():
        p.error(f"no model.safetensors in {args.resume}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.build_tokenizer:
        files = pocket_tokenizer.corpus_files(args.text or pocket_tokenizer.default_roots())
        pocket_tokenizer.save(pocket_tokenizer.build(files), args.out, Shape().max_position_embeddings)
        args.tokenizer = args.out / "tokenizer.json"
    _, curve, facts = train(args, args.device)
    words = ["DIR" if w == str(args.out) else w for w in (argv if argv is not None else sys.argv[1:])]
    command = "python tools/train_pocket.py " + " ".join(words)
    record = {"command": command, **machine(), **facts, "curve": vars(curve)}
    (args.out / "train.json").write_text(json.dumps(record) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}), flush=True)
    if not args.no_eval:
        from pocket_eval import evaluate

        evaluate(
            args.out,
            args.tokenizer,
            args.text or pocket_tokenizer.default_roots(),
            args.out / "results.json",
            device=args.device,
            samples=args.eval_samples,
            workers=args.workers,
            seconds=args.eval_seconds,
        )


if __name__ == "__main__":
    main()
