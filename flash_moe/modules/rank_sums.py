"""Sums over the ranks of the default process group, for statistics that all ranks are to share."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops._register import register_op


def spans_ranks() -> bool:
    """Whether there is a default process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's ``x``, the same on all of them. Differentiable: a gradient is summed as well."""
    return torch.ops.flash_moe.sum_over_ranks(x)


def _sum_over_ranks(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _sum_over_ranks_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_formula(ctx: Any, grad: Tensor) -> Tensor:
    return sum_over_ranks(grad)


register_op(
    "sum_over_ranks(Tensor x) -> Tensor",
    _sum_over_ranks,
    _sum_over_ranks_fake,
    backward=_backward_formula,
    setup_context=lambda ctx, inputs, output: None,
    is_collective=True,
)
