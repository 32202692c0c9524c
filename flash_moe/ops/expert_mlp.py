"""The routed experts and the dense MLP beside them as one op: one node of autograd, no sum left to add on its own.

T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from typing import Any, cast

import torch
from torch import Tensor

from flash_moe._backend import Backend, resolve_backend
from flash_moe.ops._register import register_op
from flash_moe.ops.flash_expert import check_ids, flash_expert, sparse_table, under_autocast
from flash_moe.ops.flash_mlp import flash_mlp

DenseWeights = tuple[Tensor, Tensor, Tensor]


def expert_mlp(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    dense_weights: DenseWeights,
    *,
    hidden_act: str = "silu",
    backend: str = "auto",
    sparse_grad: bool = False,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """``flash_expert`` plus ``flash_mlp`` of the same tokens ``[T, H]``, for a caller that has checked the arguments.

    Through Triton the MLP's last product is added to the experts' sums in float32 before they are rounded, and on a
    GPU both branches run at the same time; other backends, and tables of 8 bits, add the two ops.

    Args:
        hidden_states, down_weights, up_weights, indices, routing_weights, hidden_act, backend, sparse_grad, down_scale,
            up_scale: as ``flash_expert`` takes them.
        dense_weights: ``gate_proj [I, H]``, ``up_proj [I, H]`` and ``down_proj [H, I]``, as ``flash_mlp`` takes them.
    Returns:
        ``[T, H]`` in ``hidden_states.dtype``, under autocast in its dtype; differentiable in all but ``indices``.
    """
    options: dict[str, Any] = {"hidden_act": hidden_act, "backend": backend}
    experts = (hidden_states, down_weights, up_weights, indices, routing_weights)
    if down_scale is not None or resolve_backend(backend, hidden_states) is not Backend.TRITON:
        only_experts = {"sparse_grad": sparse_grad, "down_scale": down_scale, "up_scale": up_scale}
        routed = flash_expert(*experts, **(options | only_experts))
        return routed + flash_mlp(hidden_states, *dense_weights, **options)
    if torch.is_autocast_enabled(hidden_states.device.type):
        experts = under_autocast(*experts, sparse_grad)
        dense_weights = cast(DenseWeights, tuple(x.to(experts[0].dtype) for x in dense_weights))
    tensors = (x.contiguous() for x in (*experts, *dense_weights))
    out, *_ = torch.ops.flash_moe.expert_mlp(*tensors, hidden_act, sparse_grad)
    return out


def _forward(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    hidden_act: str,
    sparse_grad: bool,
) -> tuple[Tensor, ...]:
    from flash_moe.ops._triton import expert_mlp as kernels

    check_ids(indices, down_weights.shape[0])
    experts = (hidden_states, down_weights, up_weights, indices, routing_weights)
    out, saved = kernels.expert_mlp_forward(experts, (gate_proj, up_proj, down_proj), hidden_act)
    return out, *saved


def _forward_fake(
    hidden_states: Tensor, down: Tensor, up: Tensor, indices: Tensor, routing_weights: Tensor, gate_proj: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = (hidden_states.shape[0], gate_proj.shape[0])
    return (
        torch.empty_like(hidden_states),
        torch.empty_like(routing_weights, dtype=torch.float32),
        *(hidden_states.new_empty(shape) for _ in range(2)),
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from flash_moe.ops._triton import expert_mlp as kernels

    grad_out, tensors, options = arguments[0], arguments[1:12], arguments[12:]
    return kernels.expert_mlp_backward(grad_out, tensors[:5], tensors[5:8], tensors[8:], *options)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, x, down, _, indices, weights, gate_proj, up_proj, down_proj, *_ = arguments
    sparse_grad, wants_tables, wants_dense = arguments[-3:]
    num_rows = torch.sym_min(indices.numel(), down.shape[0]) if sparse_grad else down.shape[0]
    ids = indices.new_empty(num_rows if sparse_grad and wants_tables else 0, dtype=torch.int64)
    tables = (down.new_empty((num_rows, down.shape[1]) if wants_tables else 0) for _ in range(2))
    dense = (torch.empty_like(x) if wants_dense else x.new_empty(0) for x in (gate_proj, up_proj, down_proj))
    return torch.empty_like(x), torch.empty_like(weights), ids, *tables, *dense


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.hidden_act, ctx.sparse_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward_formula(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor no second time
    num_experts = saved[1].shape[0]
    wants_tables, wants_dense = any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[5:8])
    dx, dweights, ids, ddown, dup, *dense = torch.ops.flash_moe.expert_mlp_backward(
        grad_out.contiguous(), *saved, ctx.hidden_act, ctx.sparse_grad, wants_tables, wants_dense
    )
    if ctx.sparse_grad and wants_tables:
        ddown, dup = (sparse_table(ids, rows, num_experts) for rows in (ddown, dup))
    tables = (ddown, dup) if wants_tables else (None, None)
    return dx, *tables, None, dweights, *(dense if wants_dense else (None, None, None)), None, None


_TENSORS = (
    "Tensor hidden_states, Tensor down_weights, Tensor up_weights, Tensor indices, Tensor routing_weights, "
    "Tensor gate_proj, Tensor up_proj, Tensor down_proj"
)
register_op(
    f"expert_mlp({_TENSORS}, str hidden_act, bool sparse_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    f"expert_mlp_backward(Tensor grad_out, {_TENSORS}, Tensor pre_activations, Tensor gate, Tensor up, "
    "str hidden_act, bool sparse_grad, bool wants_tables, bool wants_dense) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
