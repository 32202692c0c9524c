"""The router's gate on normalised tokens: BatchNorm and a linear layer as one product."""

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash_moe._backend import Backend, resolve_backend
from flash_moe._checks import FLOAT_DTYPES, check_dtype, check_same_device, check_shape
from flash_moe.ops._register import is_recomputing, register_op

# A float32 product cannot use tensor cores. On an H200 at H 1024, N 128 16 tokens take 10 us, and torch 21; 64 tokens
# take 101, and torch 23.
MAX_FLOAT32_TOKENS = 16


def batch_norm_statistics(
    hidden_states: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    *,
    momentum: float = 0.1,
    is_update: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each column of ``hidden_states``, for ``flash_gate``; the running statistics move.

    By Triton alone, in one launch if H is 768 or more. In a forward that activation checkpointing runs again the
    running statistics stay as they are.

    Args:
        hidden_states: ``[T, H]``, float32, float16 or bfloat16, two tokens or more.
        running_mean, running_var: ``[H]``; with ``is_update`` they move by ``momentum`` as those of nn.BatchNorm1d do.
        num_batches_tracked: int64, no dimension; with ``is_update`` it grows by one.
        momentum: the weight of these tokens in the running statistics.
        is_update: False leaves the three buffers as they are.
    Returns:
        ``mean`` and ``variance [H]``, float32: over T, not T - 1. Without a graph: ``flash_gate`` knows their gradient.
    Raises:
        ValueError: a shape or device disagrees, there are fewer than two tokens, or Triton cannot run here.
        TypeError: a dtype is not supported.
    """
    check_shape("hidden_states", hidden_states, (None, None), "[T, H]")
    check_dtype("hidden_states", hidden_states, FLOAT_DTYPES)
    T, H = hidden_states.shape
    if T < 2:
        raise ValueError(f"hidden_states: expected 2 or more tokens to take a variance of; got {T}")
    check_shape("running_mean", running_mean, (H,), "[H]")
    check_shape("running_var", running_var, (H,), "[H]")
    check_shape("num_batches_tracked", num_batches_tracked, (), "[]")
    check_dtype("num_batches_tracked", num_batches_tracked, (torch.int64,))
    check_same_device(
        hidden_states=hidden_states,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
    )
    resolve_backend("triton", hidden_states)
    buffers = (running_mean, running_var, num_batches_tracked)
    mean, variance = torch.ops.flash_moe.batch_norm_statistics(
        hidden_states.detach().contiguous(), *buffers, momentum, is_update
    )
    return mean, variance


def flash_gate(
    hidden_states: Tensor,
    gate_weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    eps: float = 1e-5,
    is_batch: bool = False,
) -> Tensor:
    """``((hidden_states - mean) / sqrt(variance + eps)) @ gate_weight^T``, in one launch, by Triton alone.

    Args:
        hidden_states: ``[T, H]``, float32, float16 or bfloat16. Normalised in float32, and rounded to this dtype before
            the product.
        gate_weight: ``[C, H]`` in the same dtype, as nn.Linear keeps it.
        mean, variance: ``[H]``, of any float dtype; no gradient of their own.
        eps: is added to ``variance``.
        is_batch: mean and variance are those of ``hidden_states`` (``batch_norm_statistics``), and the gradient of
            ``hidden_states`` goes through them as well, as in a BatchNorm that trains; else they are constants.
    Returns:
        ``[T, C]`` in the dtype of ``hidden_states``, accumulated in float32. Differentiable in ``hidden_states`` and
        ``gate_weight``, with the same bits on every run.
    Raises:
        ValueError: a shape or device disagrees, or Triton cannot run here.
        TypeError: a dtype is not supported.
    """
    check_shape("hidden_states", hidden_states, (None, None), "[T, H]")
    H = hidden_states.shape[1]
    check_shape("gate_weight", gate_weight, (None, H), "[C, H]")
    check_shape("mean", mean, (H,), "[H]")
    check_shape("variance", variance, (H,), "[H]")
    check_dtype("hidden_states", hidden_states, FLOAT_DTYPES)
    check_dtype("gate_weight", gate_weight, (hidden_states.dtype,))
    check_same_device(hidden_states=hidden_states, gate_weight=gate_weight, mean=mean, variance=variance)
    resolve_backend("triton", hidden_states)
    return torch.ops.flash_moe.flash_gate(
        hidden_states.contiguous(), gate_weight.contiguous(), mean, variance, eps, is_batch
    )


def fuses_gate(hidden_states: Tensor, backend: str) -> bool:
    """Whether ``backend`` is Triton for these tokens, and the two functions above can and should take them."""
    if resolve_backend(backend, hidden_states) is not Backend.TRITON:
        return False
    T = hidden_states.shape[0]
    if torch.compiler.is_compiling():
        # One graph for every T: no question about it that torch.compile has no answer to before it knows T, as it has
        # for 0 and 1, which it compiles for themselves. A program exported without Dynamo takes those as well;
        # is_exporting() would be the question, but Dynamo of torch 2.11 always says yes to it.
        return hidden_states.dtype != torch.float32 and torch.compiler.is_dynamo_compiling() and T > 0
    return T > 0 and (hidden_states.dtype != torch.float32 or T <= MAX_FLOAT32_TOKENS)


@lru_cache
def _kernels() -> ModuleType:
    return import_module("flash_moe.ops._triton.gate")


def _statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
    is_update: bool,
) -> tuple[Tensor, Tensor]:
    # Asked here, since one compiled graph runs in both passes.
    is_update = is_update and not is_recomputing()
    buffers = (running_mean, running_var, num_batches_tracked)
    statistics = _kernels().batch_norm_statistics(x, *buffers, momentum, is_update)
    if is_update:
        # Else an evaluation's backward that comes after this would use the moved statistics, and nobody would notice.
        increment_version([buffer for buffer in buffers if not buffer.is_inference()])
    return statistics


def _statistics_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _forward(x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float, is_batch: bool) -> Tensor:
    return _kernels().gate_forward(x, weight, mean, variance, eps)


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward(
    grad_logits: Tensor, x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float, is_batch: bool
) -> tuple[Tensor, Tensor]:
    return _kernels().gate_backward(grad_logits.contiguous(), x, weight, mean, variance, eps, is_batch)


def _backward_fake(grad_logits: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.is_batch = inputs
    ctx.save_for_backward(*tensors)


def _backward_formula(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.flash_moe.flash_gate_backward(grad_logits, *ctx.saved_tensors, ctx.eps, ctx.is_batch)
    return (*grads, None, None, None, None)


register_op(
    "batch_norm_statistics(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, "
    "float momentum, bool is_update) -> (Tensor, Tensor)",
    _statistics,
    _statistics_fake,
)
register_op(
    "flash_gate(Tensor x, Tensor weight, Tensor mean, Tensor variance, float eps, bool is_batch) -> Tensor",
    _forward,
    _forward_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    "flash_gate_backward(Tensor grad_logits, Tensor x, Tensor weight, Tensor mean, Tensor variance, float eps, "
    "bool is_batch) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
