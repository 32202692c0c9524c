"""Dense gated MLP: matrix products through torch, the gated activation fused into one pass, or into the products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe._activations import check_activation
from flash_moe._backend import Backend, resolve_backend
from flash_moe._checks import check_dtype, check_same_device, check_shape, check_tensor, float_dtypes
from flash_moe.ops._reference.mlp import gated_activation_reference
from flash_moe.ops._register import register_op


def flash_mlp(
    hidden_states: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    hidden_act: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """The SwiGLU MLP and its relatives: down_proj(act(gate_proj x) * up_proj x).

    Args:
        hidden_states: ``[..., H]``, float32, float16 or bfloat16.
        gate_proj, up_proj: ``[I, H]``; down_proj: ``[H, I]``: ``nn.Linear`` layouts, in the dtype of ``hidden_states``.
        hidden_act: "silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2" or "identity".
        backend: of the gated activation, and of what is fused with it: "auto" (triton for CUDA tensors, else torch),
            "triton", "torch" or "reference". The last two are the same PyTorch expression: there is no memory to bound.
    Returns:
        ``[..., H]`` in ``hidden_states.dtype``. Differentiable in all four tensors; beyond inputs and outputs the
        memory is O(T * I). Under autocast the products run in the autocast dtype.
    Raises:
        ValueError: a shape or device disagrees, or ``hidden_act`` or ``backend`` is unknown.
        TypeError: a dtype is not supported, or the tensors' dtypes differ outside autocast.
    Source: GLU variants, arXiv:2002.05202.
    """
    check_activation(hidden_act)
    check_tensor("hidden_states", hidden_states)
    if hidden_states.dim() == 0:
        raise ValueError("hidden_states: expected at least 1 dimension [..., H]; got a scalar")
    check_shape("gate_proj", gate_proj, (None, hidden_states.shape[-1]), "[I, H]")
    check_shape("up_proj", up_proj, tuple(gate_proj.shape), "[I, H]")
    check_shape("down_proj", down_proj, (gate_proj.shape[1], gate_proj.shape[0]), "[H, I]")
    check_same_device(hidden_states=hidden_states, gate_proj=gate_proj, up_proj=up_proj, down_proj=down_proj)
    chosen = resolve_backend(backend, hidden_states)
    check_dtype("hidden_states", hidden_states, float_dtypes(backend))
    is_autocast = torch.is_autocast_enabled(hidden_states.device.type)
    weight_dtypes = float_dtypes(backend) if is_autocast else (hidden_states.dtype,)
    for name, weight in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj)):
        check_dtype(name, weight, weight_dtypes)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_states, gate_proj, up_proj))
    if chosen is Backend.TRITON and not needs_grad:
        return F.linear(_gated_product(hidden_states, gate_proj, up_proj, hidden_act), down_proj)
    gate, up = F.linear(hidden_states, gate_proj), F.linear(hidden_states, up_proj)
    if chosen is Backend.TRITON:
        activated = torch.ops.flash_moe.gated_activation(gate, up, hidden_act)
    else:
        activated = gated_activation_reference(gate, up, hidden_act)
    return F.linear(activated, down_proj)


def triton_flash_mlp_func(
    hidden_states: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, hidden_act: str = "silu"
) -> Tensor:
    """``flash_mlp`` with the Triton gated activation; raises where it cannot run."""
    return flash_mlp(hidden_states, gate_proj, up_proj, down_proj, hidden_act=hidden_act, backend="triton")


def _gated_product(hidden_states: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    """act(gate_proj x) * up_proj x, ``[..., I]``, of which nobody wants a gradient."""
    tensors = (hidden_states, gate_proj, up_proj)
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        tensors = (hidden_states.to(dtype), gate_proj.to(dtype), up_proj.to(dtype))
    x, *weights = tensors
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    activated = torch.ops.flash_moe.gated_product(rows, *weights, hidden_act)
    return activated if x.dim() == 2 else activated.view(*x.shape[:-1], gate_proj.shape[0])


def _product(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    from flash_moe.ops._triton import mlp_fused

    return mlp_fused.gated_product_forward(x, gate_proj, up_proj, hidden_act)


def _product_fake(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    return x.new_empty(x.shape[0], gate_proj.shape[0])


def _forward(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    from flash_moe.ops._triton import mlp

    return mlp.gated_activation_forward(gate.contiguous(), up.contiguous(), hidden_act)


def _forward_fake(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _backward(grad_out: Tensor, gate: Tensor, up: Tensor, hidden_act: str) -> tuple[Tensor, Tensor]:
    from flash_moe.ops._triton import mlp

    return mlp.gated_activation_backward(grad_out.contiguous(), gate.contiguous(), up.contiguous(), hidden_act)


def _backward_fake(grad_out: Tensor, gate: Tensor, up: Tensor, hidden_act: str) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return grad, torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    gate, up, ctx.hidden_act = inputs
    ctx.save_for_backward(gate, up)


def _backward_formula(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.flash_moe.gated_activation_backward(grad_out, gate, up, ctx.hidden_act)
    return dgate, dup, None


register_op(
    "gated_product(Tensor x, Tensor gate_proj, Tensor up_proj, str hidden_act) -> Tensor", _product, _product_fake
)
register_op(
    "gated_activation(Tensor gate, Tensor up, str hidden_act) -> Tensor",
    _forward,
    _forward_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    "gated_activation_backward(Tensor grad_out, Tensor gate, Tensor up, str hidden_act) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
