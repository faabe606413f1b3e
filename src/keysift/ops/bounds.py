"""How many keys a uniform sample needs for a promised accuracy of the attention output (arXiv:2510.05688)."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from keysift.ops.heads import group


def sample_size(
    score_BHS: Tensor, v_BSKD: Tensor, sure: Tensor, rest: Tensor, sample: Tensor, epsilon: float, delta: float
) -> Tensor:
    """Size of a uniform sample of some keys with which the output's relative error stays within epsilon.

    With ``e_i = exp(score_i)``, the output is ``o = N / D``, ``N = sum e_i v_i``, ``D = sum e_i``. Both are known over
    the keys that are surely read, and estimated over the n others from a sample of b, without replacement. What the
    sample makes of a sum of ``x_i`` has the variance ``n**2 (1/b - 1/n) S**2``, where S**2 is the variance of the x_i;
    by the central limit theorem it is within t of the truth with probability 1 - delta as soon as
    ``z**2 n**2 (1/b - 1/n) S**2 <= t**2``, z being the normal quantile of ``1 - delta / 2``. That is asked

    - of the denominator: ``x = e``, ``t = epsilon D``;
    - of the output: its error is ``sum e_i (v_i - o) / D`` up to terms of second order, so ``x_i = e_i (v_i - o)``,
      ``t = epsilon |o| D``, and S**2 is the trace of the covariance. An error in many dimensions is rarely longer than
      z times its root mean square; in one dimension that is the theorem itself.

    The paper bounds N in place of the output: there ``x_i = e_i v_i`` and ``t = epsilon |N|``. The errors of N and D
    then add up, though they mostly cancel: to promise as much, its epsilon has to be halved, and b be four times as
    large. Here all of N, D, o, S are estimates from the first sample; the square of |o| is cleared of what that
    sample's noise adds to it.

    Args:
        score_BHS: log weights; only those of sure keys and of the sample are read.
        v_BSKD: values; zero, or at least finite, where a key is neither.
        sure, rest, sample: keys that are surely read; the others; and those of them that were drawn first, each with
            the same probability. Bool ``[B, H, S]``.
        epsilon, delta: relative error, and how often it may be exceeded.

    Returns:
        b, fp32 ``[B, H]``, from 0 to n: n where the sample says too little (fewer than two keys).
    """
    z = NormalDist().inv_cdf(1 - delta / 2)
    kv_heads = v_BSKD.shape[2]
    drawn, n = sample.sum(-1).float(), rest.sum(-1).float()
    score = score_BHS.masked_fill(~(sure | sample), -torch.inf)
    top = score.amax(-1, keepdim=True)
    e = (score - top.masked_fill(top == -torch.inf, 0)).exp()
    of_sample = e.masked_fill(~sample, 0)
    each = (n / drawn.clamp(min=1))[..., None]
    v = v_BSKD.float()

    def total(weight: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("bkgs,bskd->bkgd", group(weight, kv_heads, 1), values).flatten(1, 2)

    d = (e.masked_fill(~sure, 0) + of_sample * each).sum(-1)
    numerator = total(e.masked_fill(~sure, 0) + of_sample * each, v)
    out = numerator / d.clamp(min=1e-30)[..., None]
    first, second = of_sample.sum(-1), of_sample.square().sum(-1)
    residual = total(of_sample, v) - first[..., None] * out
    length = v.square().sum(-1, keepdim=True)
    spread = total(of_sample.square(), length)[..., 0] + second * out.square().sum(-1)
    spread = spread - 2 * (total(of_sample.square(), v) * out).sum(-1)
    size = out.square().sum(-1)

    def variance(squares: Tensor, square_of_sum: Tensor) -> Tensor:
        return (squares - square_of_sum / drawn.clamp(min=1)).clamp(min=0) / (drawn - 1).clamp(min=1)

    of_d = variance(second, first.square())
    of_out = variance(spread, residual.square().sum(-1)) / d.clamp(min=1e-30).square()
    noise = n.square() * (1 / drawn.clamp(min=1) - 1 / n.clamp(min=1)).clamp(min=0) * of_out
    size = (size - noise).clamp(min=0)
    with_replacement = torch.maximum(of_d / d.clamp(min=1e-30).square(), of_out / size.clamp(min=1e-30))
    with_replacement = with_replacement * (z * n / epsilon).square()
    needed = n * with_replacement / (n + with_replacement).clamp(min=1e-30)
    return torch.where(drawn < 2, n, torch.where(needed.isnan(), n, needed))
