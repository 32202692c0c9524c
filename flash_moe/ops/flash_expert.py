"""One-neuron experts: each token sums its K chosen experts, w * act(x . down[e]) * up[e]."""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flash_moe._activations import check_activation
from flash_moe._backend import Backend, resolve_backend
from flash_moe._checks import (
    check_dtype,
    check_ids_in_range,
    check_pairs,
    check_same_device,
    check_shape,
    debug_enabled,
    float_dtypes,
)
from flash_moe.ops._reference.expert import expert_reference
from flash_moe.ops._register import register_op


def flash_expert(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    *,
    hidden_act: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """Sum each token's one-neuron experts: out[t] = sum_k w[t,k] * act(x[t] . down[e]) * up[e], e = indices[t,k].

    Args:
        hidden_states: ``[T, H]``, float32, float16 or bfloat16.
        down_weights, up_weights: ``[E, H]``, in the dtype of ``hidden_states``.
        indices: ``[T, K]``, int32 or int64, in ``[0, E)``; an expert may occur more than once in a row. Ids out of
            range raise on the CPU, and on a GPU when ``FLASH_MOE_DEBUG=1``; otherwise they read stray memory there.
        routing_weights: ``[T, K]``, in the dtype of ``hidden_states`` or float32.
        hidden_act: "silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2" or "identity".
        backend: "auto" (triton for CUDA tensors, else torch), "triton", "torch" or "reference"; an explicit choice
            never falls back.
    Returns:
        ``[T, H]`` in ``hidden_states.dtype``, accumulated in float32. Differentiable in all but ``indices``; gradients
        are summed in a fixed order, the same bits on every run. Beyond inputs and outputs the memory is O(T * K).
        Under autocast the hidden states and both tables are cast to the autocast dtype, as matrix products are; the
        routing weights are taken as they come.
    Raises:
        ValueError: a shape or device disagrees, ``hidden_act`` or ``backend`` is unknown, an id is out of range, or
            T * K is 2^31 or more; the message names the argument, what was expected and what came.
        TypeError: a dtype is not supported.
    Source: PEER, arXiv:2407.04153.
    """
    check_activation(hidden_act)
    check_shape("hidden_states", hidden_states, (None, None), "[T, H]")
    T, H = hidden_states.shape
    check_shape("down_weights", down_weights, (None, H), "[E, H]")
    check_shape("up_weights", up_weights, tuple(down_weights.shape), "[E, H]")
    check_shape("indices", indices, (T, None), "[T, K]")
    check_shape("routing_weights", routing_weights, tuple(indices.shape), "[T, K]")
    check_dtype("indices", indices, (torch.int32, torch.int64))
    check_same_device(
        hidden_states=hidden_states,
        down_weights=down_weights,
        up_weights=up_weights,
        indices=indices,
        routing_weights=routing_weights,
    )
    chosen = resolve_backend(backend, hidden_states)
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_states, down_weights, up_weights = (x.to(dtype) for x in (hidden_states, down_weights, up_weights))
        if routing_weights.dtype != dtype:
            routing_weights = routing_weights.float()
    check_dtype("hidden_states", hidden_states, float_dtypes(backend))
    check_dtype("down_weights", down_weights, (hidden_states.dtype,))
    check_dtype("up_weights", up_weights, (hidden_states.dtype,))
    check_dtype("routing_weights", routing_weights, (hidden_states.dtype, torch.float32))
    check_pairs("indices", T, indices.shape[1])
    if chosen is Backend.REFERENCE:
        _check_ids(indices, down_weights.shape[0])
        return expert_reference(hidden_states, down_weights, up_weights, indices, routing_weights, hidden_act)
    inputs = (hidden_states, down_weights, up_weights, indices, routing_weights)
    out, _ = torch.ops.flash_moe.flash_expert(*(x.contiguous() for x in inputs), hidden_act, chosen.value)
    return out


def triton_flash_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str = "silu",
) -> Tensor:
    """``flash_expert`` through the Triton kernels; raises where they cannot run."""
    return flash_expert(
        hidden_states, down_weights, up_weights, indices, routing_weights, hidden_act=hidden_act, backend="triton"
    )


def _check_ids(indices: Tensor, num_experts: int) -> None:
    if not indices.is_cuda or debug_enabled():
        check_ids_in_range("indices", indices, num_experts)


def _implementation(backend: str) -> ModuleType:
    return import_module(f"flash_moe.ops._{backend}.expert")


def _forward(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_ids(indices, down_weights.shape[0])
    return _implementation(backend).expert_forward(
        hidden_states, down_weights, up_weights, indices, routing_weights, hidden_act
    )


def _forward_fake(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_states), torch.empty_like(routing_weights, dtype=torch.float32)


def _backward_tokens(
    grad_out: Tensor,
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    pre_activations: Tensor,
    hidden_act: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(backend).expert_backward_tokens(
        grad_out, hidden_states, down_weights, up_weights, indices, routing_weights, pre_activations, hidden_act
    )


def _backward_tokens_fake(
    grad_out: Tensor,
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    pre_activations: Tensor,
    hidden_act: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden_states),
        torch.empty_like(routing_weights),
        torch.empty_like(pre_activations),
        torch.empty_like(pre_activations),
    )


def _backward_tables(
    grad_out: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    grad_pre_activations: Tensor,
    coefficients: Tensor,
    num_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _implementation(backend).expert_backward_tables(
        grad_out, hidden_states, indices, grad_pre_activations, coefficients, num_experts
    )


def _backward_tables_fake(
    grad_out: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    grad_pre_activations: Tensor,
    coefficients: Tensor,
    num_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad = hidden_states.new_empty(num_experts, hidden_states.shape[1])
    return grad, torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, hidden_act, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.hidden_act, ctx.backend = hidden_act, backend


def _backward_formula(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden_states, down_weights, up_weights, indices, routing_weights, pre_activations = ctx.saved_tensors
    grad_out = grad_out.contiguous()
    dx, dweights, grad_pre_activations, coefficients = torch.ops.flash_moe.flash_expert_backward_tokens(
        grad_out,
        hidden_states,
        down_weights,
        up_weights,
        indices,
        routing_weights,
        pre_activations,
        ctx.hidden_act,
        ctx.backend,
    )
    ddown = dup = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        ddown, dup = torch.ops.flash_moe.flash_expert_backward_tables(
            grad_out, hidden_states, indices, grad_pre_activations, coefficients, down_weights.shape[0], ctx.backend
        )
    return dx, ddown, dup, None, dweights, None, None


register_op(
    "flash_expert(Tensor hidden_states, Tensor down_weights, Tensor up_weights, Tensor indices, Tensor "
    "routing_weights, str hidden_act, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    "flash_expert_backward_tokens(Tensor grad_out, Tensor hidden_states, Tensor down_weights, Tensor "
    "up_weights, Tensor indices, Tensor routing_weights, Tensor pre_activations, str hidden_act, str "
    "backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_tokens,
    _backward_tokens_fake,
)
register_op(
    "flash_expert_backward_tables(Tensor grad_out, Tensor hidden_states, Tensor indices, Tensor "
    "grad_pre_activations, Tensor coefficients, int num_experts, str backend) -> (Tensor, Tensor)",
    _backward_tables,
    _backward_tables_fake,
)
