"""Layers that read the same input as one: their weights lie side by side, and compiled code multiplies by all at once.

A matrix product with few rows takes as long as reading its weights, if those are many: queries, keys and values of an
8B Llama are 28 us as three products on an H200, and half of that as one. What is not compiled computes each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keysift.hf.parallel import Local

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Product:
    """Of one input and the weights of several layers, until each has taken its part."""

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: int) -> None:
        self.weight, self.bias, self.parts = weight, bias, parts
        self.of: Tensor | None = None
        self.out: Tensor | None = None
        self.taken = 0

    def part(self, x: Tensor, first: int, last: int) -> Tensor:
        if self.of is not x or self.out is None:
            self.of, self.out, self.taken = x, F.linear(x, self.weight, self.bias), 0
        part = self.out[..., first:last]
        self.taken += 1
        if self.taken == self.parts:
            self.of = self.out = None
        return part


class _Part(nn.Module):
    """One of several layers."""

    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        product, first, last = self.__dict__["_keysift_beside"]
        out: Tensor = product.part(x, first, last)
        return out


class _PartOfLinear(_Part, nn.Linear):
    pass


class _PartOfLocal(_Part, Local):
    pass


_KINDS: dict[type, type] = {nn.Linear: _PartOfLinear, Local: _PartOfLocal}
_WERE = {part: kind for kind, part in _KINDS.items()}


def join_layers(model: nn.Module) -> None:
    """Lay the weights of layers that read the same input side by side, until ``part_layers``."""
    for module in list(model.modules()):
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            if all(_can_join(layer, layers[0]) for layer in layers):
                _join(layers)
    _release(model)


def part_layers(model: nn.Module) -> None:
    """Give all layers weights of their own again."""
    joined: list[Any] = [module for module in model.modules() if type(module) in _WERE]
    for module in joined:
        for x in (module.weight, module.bias):
            if x is not None:
                x.data = x.data.clone()
        module.__dict__.pop("_keysift_beside")
        module.__class__ = _WERE[type(module)]
    if joined:
        _release(model)


def _can_join(layer: Any, first: Any) -> bool:
    """Whether a layer is an ordinary one, and like the first."""
    if type(layer) not in _KINDS or type(layer) is not type(first) or getattr(layer, "how", "columns") != "columns":
        return False
    weight, like = layer.weight, first.weight
    same = weight.dtype == like.dtype and weight.device == like.device and weight.shape[1] == like.shape[1]
    hooks = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return same and type(weight.data) is Tensor and (layer.bias is None) == (first.bias is None) and not hooks


def _join(layers: Sequence[Any]) -> None:
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
    product, first = _Product(weight, bias, len(layers)), 0
    for layer in layers:
        last = first + layer.weight.shape[0]
        layer.weight.data = weight[first:last]
        if bias is not None:
            layer.bias.data = bias[first:last]
        layer.__dict__["_keysift_beside"] = product, first, last
        layer.__class__ = _KINDS[type(layer)]
        first = last


def _release(model: nn.Module) -> None:
    """Have the memory of weights that were copied back: it is in pieces that nothing else fits."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.empty_cache()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The model's stack of decoder layers, found by its length; empty where there is no such stack."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((list(stack) for stack in stacks if len(stack) == count), [])
