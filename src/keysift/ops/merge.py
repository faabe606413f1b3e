"""Merging partial attentions over disjoint keys (arXiv:2501.01005)."""

from __future__ import annotations

import torch

from keysift.types import Partial


def merge(a: Partial, b: Partial) -> Partial:
    """Merge two partial attentions over disjoint keys (arXiv:2501.01005).

    Shapes as in ``Partial``; a part without keys (lse -inf) adds nothing, and two such parts stay one.
    """
    lse = torch.logaddexp(a.lse, b.lse)
    base = lse.masked_fill(lse == -torch.inf, 0)  # -inf minus -inf would be NaN
    out = a.out * (a.lse - base).exp()[..., None] + b.out * (b.lse - base).exp()[..., None]
    return Partial(out, lse)
