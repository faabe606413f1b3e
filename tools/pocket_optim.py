"""Muon for matrices and AdamW (without decay) for the rest, as one step that a CUDA graph can hold.

Muon orthogonalizes a matrix's averaged gradient by Newton-Schulz iterations (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). Matrices of one shape go through it together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices to g [n, rows, cols], roughly (singular values in about 0.7 to 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16) if g.is_cuda else g
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Clips gradients to norm 1, then steps every parameter; `scale` [] multiplies both learning rates."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        muon_lr: float = 0.01,
        adam_lr: float = 2e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        matrices = [w for n, w in weights.items() if w.ndim == 2 and "embed" not in n]
        self.groups = [[w for w in matrices if w.shape == shape] for shape in dict.fromkeys(w.shape for w in matrices)]
        self.others = [w for n, w in weights.items() if w.ndim == 1 or "embed" in n]
        self.all = list(weights.values())
        self.muon_lr, self.adam_lr, self.momentum, self.betas = muon_lr, adam_lr, momentum, betas
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.first = [torch.zeros_like(w) for w in self.others]
        self.second = [torch.zeros_like(w) for w in self.others]
        self.scale = torch.ones((), device=self.all[0].device)
        self.count = torch.zeros((), device=self.all[0].device)

    @torch.no_grad()
    def step(self) -> None:
        grads = [w.grad for w in self.all]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            g = torch.stack([w.grad for w in group])
            buffer.lerp_(g, 1 - self.momentum)
            update = orthogonalize(g.lerp(buffer, self.momentum))
            rows, cols = group[0].shape
            update = update * (-self.muon_lr * max(1.0, rows / cols) ** 0.5 * self.scale)
            torch._foreach_add_(group, list(update.unbind(0)))
        self._adam()

    def _adam(self) -> None:
        grads, (b1, b2) = [w.grad for w in self.others], self.betas
        self.count += 1
        torch._foreach_lerp_(self.first, grads, 1 - b1)
        torch._foreach_mul_(self.second, b2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - b2)
        root = torch._foreach_sqrt(self.second)
        torch._foreach_div_(root, (1 - b2**self.count).sqrt())
        torch._foreach_add_(root, 1e-8)
        step = torch._foreach_div(self.first, root)
        torch._foreach_mul_(step, -self.adam_lr * self.scale / (1 - b1**self.count))
        torch._foreach_add_(self.others, step)

    def zero_grad(self) -> None:
        """Zero the gradients in place, so that a captured graph keeps their addresses."""
        for w in self.all:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        torch._foreach_zero_([w.grad for w in self.all])
