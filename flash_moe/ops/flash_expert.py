"""One-neuron experts: each token sums its K chosen experts, w * act(x . down[e]) * up[e]."""

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe._activations import check_activation
from flash_moe._backend import Backend, resolve_backend
from flash_moe._checks import (
    check_bool,
    check_dtype,
    check_ids_in_range,
    check_pairs,
    check_same_device,
    check_shape,
    debug_enabled,
    float_dtypes,
)
from flash_moe.ops._reference.expert import expert_reference, expert_reference_quantized
from flash_moe.ops._register import register_op

QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.int8)


def flash_expert(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    *,
    hidden_act: str = "silu",
    backend: str = "auto",
    sparse_grad: bool = False,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """Sum each token's one-neuron experts: out[t] = sum_k w[t,k] * act(x[t] . down[e]) * up[e], e = indices[t,k].

    Tables of 8 bits have a scale for each row, and stand for ``table * scale[:, None]``; they are for inference.

    Args:
        hidden_states: ``[T, H]``, float32, float16 or bfloat16.
        down_weights, up_weights: ``[E, H]``, in the dtype of ``hidden_states``, or with scales float8_e4m3fn or int8.
        indices: ``[T, K]``, int32 or int64, in ``[0, E)``; an expert may occur more than once in a row. Ids out of
            range raise on the CPU, and on a GPU when ``FLASH_MOE_DEBUG=1``; otherwise they read stray memory there.
        routing_weights: ``[T, K]``, in the dtype of ``hidden_states`` or float32.
        hidden_act: "silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2" or "identity".
        backend: "auto" (triton for CUDA tensors, else torch), "triton", "torch" or "reference"; an explicit choice
            never falls back.
        sparse_grad: give both tables row-sparse gradients, at a cost that does not depend on E: sparse COO tensors of
            exactly min(T * K, E) rows, one sum for each distinct expert and the rest zeros on ids that occur already,
            hence not coalesced. For ``torch.optim.SparseAdam`` or SGD. DistributedDataParallel, FSDP2 and
            ``torch.nn.utils.clip_grad_norm_`` do not take such gradients; ``flash_moe.modules.grad_norm`` has a
            ``clip_grad_norm_`` that does. The reference's has T * K rows, those of an expert not summed.
        down_scale, up_scale: ``[E]``, float32, of tables of 8 bits; both or neither. Then nothing is differentiable.
    Returns:
        ``[T, H]`` in ``hidden_states.dtype``, accumulated in float32. Differentiable in all but ``indices``; gradients
        are summed in a fixed order, the same bits on every run. Beyond inputs and outputs the memory is O(T * K).
        Under autocast the hidden states and both tables are cast to the autocast dtype, as matrix products are; the
        routing weights are taken as they come.
    Raises:
        ValueError: a shape or device disagrees, ``hidden_act`` or ``backend`` is unknown, an id is out of range,
            T * K is 2^31 or more, a scale is missing, or a gradient is asked for beside tables of 8 bits; the message
            names the argument, what was expected and what came.
        TypeError: a dtype is not supported.
    Source: PEER, arXiv:2407.04153.
    """
    check_activation(hidden_act)
    check_bool("sparse_grad", sparse_grad)
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
    if down_scale is not None or up_scale is not None or down_weights.dtype in QUANTIZED_DTYPES:
        tables = (down_weights, up_weights, down_scale, up_scale)
        return _flash_expert_quantized(hidden_states, *tables, indices, routing_weights, hidden_act, backend)
    chosen = resolve_backend(backend, hidden_states)
    if torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states, down_weights, up_weights, indices, routing_weights = under_autocast(
            hidden_states, down_weights, up_weights, indices, routing_weights, sparse_grad
        )
    check_dtype("hidden_states", hidden_states, float_dtypes(backend))
    check_dtype("down_weights", down_weights, (hidden_states.dtype,))
    check_dtype("up_weights", up_weights, (hidden_states.dtype,))
    check_dtype("routing_weights", routing_weights, (hidden_states.dtype, torch.float32))
    check_pairs("indices", T, indices.shape[1])
    if chosen is Backend.REFERENCE:
        check_ids(indices, down_weights.shape[0])
        if sparse_grad:
            down_weights, up_weights = (_rows_of_pairs(x, indices) for x in (down_weights, up_weights))
            indices = torch.arange(indices.numel(), device=indices.device).view(indices.shape)
        return expert_reference(hidden_states, down_weights, up_weights, indices, routing_weights, hidden_act)
    inputs = (hidden_states, down_weights, up_weights, indices, routing_weights)
    out, _ = torch.ops.flash_moe.flash_expert(*(x.contiguous() for x in inputs), hidden_act, chosen.value, sparse_grad)
    return out


def _flash_expert_quantized(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    down_scale: Tensor | None,
    up_scale: Tensor | None,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
    backend: str,
) -> Tensor:
    """``flash_expert`` of tables of 8 bits, after the checks of shapes and devices that both kinds share."""
    down_scale = _check_scale("down_scale", down_scale, down_weights)
    up_scale = _check_scale("up_scale", up_scale, down_weights)
    chosen = resolve_backend(backend, hidden_states)
    check_dtype("down_weights", down_weights, QUANTIZED_DTYPES)
    check_dtype("up_weights", up_weights, (down_weights.dtype,))
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        if routing_weights.dtype != hidden_states.dtype:
            routing_weights = routing_weights.float()
    check_dtype("hidden_states", hidden_states, float_dtypes(backend))
    check_dtype("routing_weights", routing_weights, (hidden_states.dtype, torch.float32))
    check_pairs("indices", *indices.shape)
    tables = (down_weights, up_weights, down_scale, up_scale)
    inputs = (hidden_states, *tables, indices, routing_weights)
    _check_no_gradient(*inputs)
    if chosen is Backend.REFERENCE:
        check_ids(indices, down_weights.shape[0])
        return expert_reference_quantized(*inputs, hidden_act)
    return torch.ops.flash_moe.flash_expert_quantized(*(x.contiguous() for x in inputs), hidden_act, chosen.value)


def _check_scale(name: str, scale: Tensor | None, down_weights: Tensor) -> Tensor:
    if scale is None:
        raise ValueError(f"{name}: expected a tensor [E], since tables of 8 bits have a scale for each row; got None")
    check_shape(name, scale, (down_weights.shape[0],), "[E]")
    check_same_device(down_weights=down_weights, **{name: scale})
    check_dtype(name, scale, (torch.float32,))
    return scale


def _check_no_gradient(*tensors: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    names = ("hidden_states", "down_weights", "up_weights", "down_scale", "up_scale", "indices", "routing_weights")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.requires_grad:
            raise ValueError(
                f"{name}: expected no gradient to be asked for, since tables of 8 bits are for inference; "
                "got requires_grad=True; call under torch.no_grad(), or detach the tensor"
            )


def triton_flash_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str = "silu",
    sparse_grad: bool = False,
) -> Tensor:
    """``flash_expert`` through the Triton kernels; raises where they cannot run."""
    return flash_expert(
        hidden_states,
        down_weights,
        up_weights,
        indices,
        routing_weights,
        hidden_act=hidden_act,
        backend="triton",
        sparse_grad=sparse_grad,
    )


def under_autocast(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    sparse_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments as the op takes them under autocast: tokens and tables cast, weights in that dtype or float32."""
    dtype = torch.get_autocast_dtype(hidden_states.device.type)
    cast = _SparseGradCast.apply if sparse_grad else Tensor.to
    down_weights, up_weights = (x if x.dtype == dtype else cast(x, dtype) for x in (down_weights, up_weights))
    if routing_weights.dtype != dtype:
        routing_weights = routing_weights.float()
    return hidden_states.to(dtype), down_weights, up_weights, indices, routing_weights


def _rows_of_pairs(table: Tensor, indices: Tensor) -> Tensor:
    """``[T * K, H]``: a row for each pair; the table's gradient is sparse, its rows not summed by expert."""
    return F.embedding(indices.flatten(), table, sparse=True)


class _SparseGradCast(torch.autograd.Function):
    """``table.to(dtype)``, whose own backward pass refuses sparse gradients (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = table.dtype
        return table.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def check_ids(indices: Tensor, num_experts: int) -> None:
    if not indices.is_cuda or debug_enabled():
        check_ids_in_range("indices", indices, num_experts)


@lru_cache
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
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    check_ids(indices, down_weights.shape[0])
    return _implementation(backend).expert_forward(
        hidden_states, down_weights, up_weights, indices, routing_weights, hidden_act
    )


def _forward_fake(
    hidden_states: Tensor, down: Tensor, up: Tensor, indices: Tensor, routing_weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_states), torch.empty_like(routing_weights, dtype=torch.float32)


def _forward_quantized(*arguments: Any) -> Tensor:
    _, down_weights, _, _, _, indices, *_, backend = arguments
    check_ids(indices, down_weights.shape[0])
    return _implementation(backend).expert_forward_quantized(*arguments[:-1])


def _forward_quantized_fake(hidden_states: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden_states)


def _backward_tokens(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *passed, backend = arguments
    return _implementation(backend).expert_backward_tokens(*passed)


def _backward_tokens_fake(
    grad_out: Tensor, hidden_states: Tensor, down: Tensor, up: Tensor, indices: Tensor, routing_weights: Tensor,
    pre_activations: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(hidden_states),
        torch.empty_like(routing_weights),
        torch.empty_like(pre_activations),
        torch.empty_like(pre_activations),
    )


def _backward_tables(*arguments: Any) -> tuple[Tensor, Tensor]:
    *passed, backend = arguments
    return _implementation(backend).expert_backward_tables(*passed)


def _backward_tables_fake(
    grad_out: Tensor, hidden_states: Tensor, indices: Tensor, ds: Tensor, coefficients: Tensor, num_experts: int, _: str
) -> tuple[Tensor, Tensor]:
    grad = hidden_states.new_empty(num_experts, hidden_states.shape[1])
    return grad, torch.empty_like(grad)


def _backward_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *passed, backend = arguments
    return _implementation(backend).expert_backward_rows(*passed)


def _backward_rows_fake(
    grad_out: Tensor, hidden_states: Tensor, indices: Tensor, ds: Tensor, coefficients: Tensor, num_experts: int, _: str
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = torch.sym_min(indices.numel(), num_experts)
    rows = hidden_states.new_empty(num_rows, hidden_states.shape[1])
    return indices.new_empty(num_rows, dtype=torch.int64), rows, torch.empty_like(rows)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, hidden_act, backend, sparse_grad = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.hidden_act, ctx.backend, ctx.sparse_grad = hidden_act, backend, sparse_grad


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
        E = down_weights.shape[0]
        arguments = (grad_out, hidden_states, indices, grad_pre_activations, coefficients, E, ctx.backend)
        if ctx.sparse_grad:
            ids, *rows = torch.ops.flash_moe.flash_expert_backward_rows(*arguments)
            ddown, dup = (sparse_table(ids, x, E) for x in rows)
        else:
            ddown, dup = torch.ops.flash_moe.flash_expert_backward_tables(*arguments)
    return dx, ddown, dup, None, dweights, None, None, None


def sparse_table(ids: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    # Checking the ids would wait for the device.
    return torch.sparse_coo_tensor(ids[None], rows, (num_experts, rows.shape[1]), check_invariants=False)


register_op(
    "flash_expert(Tensor hidden_states, Tensor down_weights, Tensor up_weights, Tensor indices, Tensor "
    "routing_weights, str hidden_act, str backend, bool sparse_grad=False) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    "flash_expert_quantized(Tensor hidden_states, Tensor down_weights, Tensor up_weights, Tensor down_scale, Tensor "
    "up_scale, Tensor indices, Tensor routing_weights, str hidden_act, str backend) -> Tensor",
    _forward_quantized,
    _forward_quantized_fake,
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
register_op(
    "flash_expert_backward_rows(Tensor grad_out, Tensor hidden_states, Tensor indices, Tensor grad_pre_activations, "
    "Tensor coefficients, int num_experts, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_rows,
    _backward_rows_fake,
)
