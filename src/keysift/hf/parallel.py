"""One model in several processes, a GPU or some cores each: weights are sharded by transformers' plan for the model.

Transformers loads each process its part. What it installs for training (distributed tensors, hooks) is then replaced by
plain layers that compilers and CUDA graphs take: products with the local part of the weights, a sum over the processes
where rows are sharded, a gathering of the logits.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

TIMEOUT = timedelta(minutes=5)  # one may load or compile for longer than another; deaths are noticed otherwise
COLUMNS, ROWS, GATHERED = "colwise", "rowwise", ("colwise_gather_output", "colwise_rep")
REPLICATED = "replicated_with_grad_allreduce"
GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch has renamed it
log = logging.getLogger(__name__)
T = TypeVar("T")

_group: Group | None = None
_met = False  # symmetric memory counts meetings in each process, so that a second group could not meet


class Group:
    """The processes that share a model, this one among them.

    Attributes:
        rank, size: of this process, and how many there are.
        one_shot: whether small sums are written straight into the other GPUs' memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self._shared: tuple[Tensor, Tensor, Tensor] | None = None
        self.one_shot = device.type == "cuda" and self.least(int(not _met)) == 1 and self._make_buffer()

    def _make_buffer(self) -> bool:
        """Symmetric memory, without NVLink multicast; False where it cannot be had."""
        global _met
        _met = True
        try:
            import torch.distributed._symmetric_memory as symmetric

            from keysift.ops import sum_ranks_triton as kernels

            words = symmetric.empty(kernels.buffer_words(self.size), dtype=torch.int64, device=self.device)
            words.zero_()
            reached = symmetric.rendezvous(words, dist.group.WORLD)  # type: ignore[arg-type]
            addresses = torch.tensor(reached.buffer_ptrs, dtype=torch.int64, device=self.device)
            calls = torch.zeros(kernels.CAPACITY // kernels.WORDS, dtype=torch.int32, device=self.device)
            self._shared = words, addresses, calls
        except Exception as error:  # drivers and builds fail in many ways
            reason = " ".join(str(error).split())[:200]
            log.warning("no symmetric memory between the GPUs, NCCL sums instead: %s", reason)
        return self.least(int(self._shared is not None)) == 1  # which all have reached then, their words zero

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what all processes have; same shape."""
        if self.one_shot and self._shared is not None:
            from keysift.ops import sum_ranks_triton as kernels

            if kernels.takes(x):
                return kernels.sum_ranks(x.contiguous(), *self._shared, self.rank)
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    def gather(self, x: Tensor, width: int) -> Tensor:
        """What all processes have, joined along the last dimension, which is ``width`` in all; the first ones have the
        larger parts."""
        part = -(-width // self.size)
        x = F.pad(x, (0, part - x.shape[-1]))
        parts = torch.empty(self.size * x.numel(), dtype=x.dtype, device=x.device)
        GATHER(parts, x.flatten())
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)[..., :width].contiguous()

    def least(self, number: int) -> int:
        """The least of the processes' numbers."""
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)


def ranks_of_environment() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Meet the other processes where the environment says, as torchrun does."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)


def the_group(device: torch.device) -> Group:
    """The group that this process joined."""
    global _group
    if _group is None or _group.size != dist.get_world_size():
        _group = Group(device)
    return _group


def ranks_here() -> int:
    """Processes of the group that this one has joined; 1 where it has joined none."""
    return 1 if _group is None else _group.size


def this_rank() -> int:
    """Of this process in its group; 0 where it has joined none."""
    return 0 if _group is None else _group.rank


def least(number: int) -> int:
    """The least of the processes' numbers."""
    return number if _group is None else _group.least(number)


def total(numbers: Sequence[float]) -> list[float]:
    """Sums over the processes, of each number; the numbers themselves where there is one process."""
    if _group is None:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=_group.device)
    dist.all_reduce(sums)
    return [float(x) for x in sums.tolist()]


def from_first(x: Tensor) -> Tensor:
    """What the first process has of a tensor that all have."""
    dist.broadcast(x, 0)
    return x


def number_of_first(number: int) -> int:
    """The first process's number."""
    return number if _group is None else int(from_first(torch.tensor(number, device=_group.device)))


def all_or_none(do: Callable[[], T]) -> T:
    """What this process's part gives; where one process fails all do, instead of waiting for it.

    Raises:
        ValueError: another one has failed, and says why.
    """
    try:
        done = do()
    except BaseException:
        least(0)
        raise
    if not least(1):
        raise ValueError("another process that shares the model has failed: its own error says why")
    return done


def leave(politely: bool = True) -> None:
    """Leave the group; where another process has died, without a word to it."""
    global _group
    _group = None
    if dist.is_initialized():
        if not politely and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


@torch.library.custom_op("keysift::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of what all processes have."""
    assert _group is not None
    return _group.sum(x)


@sum_over_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("keysift::gather_over_ranks", mutates_args=())
def gather_over_ranks(x: Tensor, width: int) -> Tensor:
    """What all processes have, joined along the last dimension, ``width`` in all."""
    assert _group is not None
    return _group.gather(x, width)


@gather_over_ranks.register_fake
def _(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


class Local(nn.Module):
    """A linear layer of which this process has a part of the weights.

    Args:
        weight: the part, ``[out, in]``.
        bias: of the outputs; of rows, all of it.
        how: "columns": outputs of this process; "rows": inputs of this process, outputs summed over all; "gathered":
            outputs of all.
        width: outputs of all.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, how: str, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.how, self.width = how, width

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "rows":
            total = torch.ops.keysift.sum_over_ranks(F.linear(x, self.weight))
            return total if self.bias is None else total + self.bias
        part = F.linear(x, self.weight, self.bias)
        return torch.ops.keysift.gather_over_ranks(part, self.width) if self.how == "gathered" else part


def is_dealt_out(model: nn.Module) -> bool:
    """Whether this process has but a part of a model."""
    return any(isinstance(module, Local) for module in model.modules())


def first_head(attention: nn.Module, heads: int) -> int:
    """Number of the first of a layer's ``heads`` KV heads that this process has."""
    dealt = any(isinstance(module, Local) and module.how == "columns" for module in attention.modules())
    return _group.rank * heads if dealt and _group is not None else 0


def deal_out(model: nn.Module, group: Group) -> None:
    """Keep this process's part of a model that every process has whole.

    Raises:
        ValueError: the parts would not be equal.
    """
    for name, module, how in _linear_layers(model):
        dim = 1 if how == "rows" else 0
        if how != "gathered" and module.weight.shape[dim] % group.size:
            raise ValueError(f"tensor_parallel={group.size} does not divide {module.weight.shape[dim]}, of {name}")
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        width = weight.shape[0]
        part = -(-weight.shape[dim] // group.size)
        weight = weight.split(part, dim)[group.rank].clone()
        bias = bias if bias is None or dim else bias.split(part)[group.rank].clone()
        _replace(model, name, Local(weight, bias, how, width))


def localise(model: nn.Module) -> None:
    """Replace the linear layers that transformers has sharded by ``Local`` ones, and drop what does nothing in
    inference; other kinds of sharding stay as transformers has them."""
    for name, module, how in _linear_layers(model):
        if isinstance(module.weight, DTensor):
            bias = None if module.bias is None else local_part(module.bias)
            _replace(model, name, Local(local_part(module.weight), bias, how, module.weight.shape[0]))
    for name, module in model.named_modules():
        if _style(model, name) == REPLICATED:
            for key, x in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(local_part(x), requires_grad=False))
            module.__dict__.pop("forward", None)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        module._backward_hooks.clear()  # with which no layer compiles
        module._backward_pre_hooks.clear()


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear, str]]:
    """Those that the model's plan shards: name, layer and how."""
    kinds = {COLUMNS: "columns", ROWS: "rows", **dict.fromkeys(GATHERED, "gathered")}
    found = ((name, module, kinds.get(_style(model, name))) for name, module in model.named_modules())
    return [(name, module, how) for name, module, how in found if how is not None and isinstance(module, nn.Linear)]


def _style(model: nn.Module, name: str) -> str:
    """What the model's plan says of a module."""
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def local_part(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()
