"""Dense gated MLP: two products and the gated activation as one op, then the last product through torch."""

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
        backend: of all but the last product: "auto" (triton for CUDA tensors, else torch), "triton", "torch" or
            "reference". The last two are the same PyTorch expression: there is no memory to bound.
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
    if chosen is Backend.TRITON:
        activated = _gated_product(hidden_states, gate_proj, up_proj, hidden_act)
    else:
        gate, up = F.linear(hidden_states, gate_proj), F.linear(hidden_states, up_proj)
        activated = gated_activation_reference(gate, up, hidden_act)
    return F.linear(activated, down_proj)


def triton_flash_mlp_func(
    hidden_states: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, hidden_act: str = "silu"
) -> Tensor:
    """``flash_mlp`` through Triton; raises where it cannot run."""
    return flash_mlp(hidden_states, gate_proj, up_proj, down_proj, hidden_act=hidden_act, backend="triton")


def _gated_product(hidden_states: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    """act(gate_proj x) * up_proj x, ``[..., I]``."""
    tensors = (hidden_states, gate_proj, up_proj)
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        tensors = (hidden_states.to(dtype), gate_proj.to(dtype), up_proj.to(dtype))
    x, *weights = tensors
    keeps = torch.is_grad_enabled() and any(y.requires_grad for y in tensors)
    rows = torch.atleast_2d(x).flatten(0, -2)
    activated, *_ = torch.ops.flash_moe.gated_product(rows, *weights, hidden_act, keeps)
    return activated if x.dim() == 2 else activated.view(*x.shape[:-1], gate_proj.shape[0])


def _forward(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str, keeps: bool) -> tuple[Tensor, ...]:
    from flash_moe.ops._triton import mlp_fused

    out, gate, up = _empty_results(x, gate_proj, up_proj, hidden_act, keeps)
    mlp_fused.gated_product_forward(x, gate_proj, up_proj, hidden_act, out, (gate, up) if keeps else None)
    return out, gate, up


def _empty_results(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str, keeps: bool) -> tuple[Tensor, ...]:
    shape = (x.shape[0], gate_proj.shape[0])
    kept = shape if keeps else (0, 0)
    return x.new_empty(shape), x.new_empty(kept), x.new_empty(kept)


def _backward(
    grad_out: Tensor, x: Tensor, gate_proj: Tensor, up_proj: Tensor, gate: Tensor, up: Tensor, hidden_act: str,
    wants_x: bool, wants_gate: bool, wants_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_moe.ops._triton import mlp

    if gate.numel() == 0:  # traced where no gradients were wanted, and run where they are
        gate, up = torch.mm(x, gate_proj.t()), torch.mm(x, up_proj.t())
    dgate, dup = mlp.gated_activation_backward(grad_out.contiguous(), gate, up, hidden_act)
    dx, dgate_proj, dup_proj = (x.new_empty(0) for _ in range(3))
    if wants_x:
        dx = torch.mm(dgate, gate_proj).addmm_(dup, up_proj)
    if wants_gate:
        dgate_proj = torch.mm(dgate.t(), x)
    del dgate
    if wants_up:
        dup_proj = torch.mm(dup.t(), x)
    return dx, dgate_proj, dup_proj


def _backward_fake(
    grad_out: Tensor, x: Tensor, gate_proj: Tensor, up_proj: Tensor, gate: Tensor, up: Tensor, hidden_act: str,
    wants_x: bool, wants_gate: bool, wants_up: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wants = ((x, wants_x), (gate_proj, wants_gate), (up_proj, wants_up))
    return tuple(y.new_empty(y.shape if is_wanted else 0) for y, is_wanted in wants)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.hidden_act, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward_formula(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad[:3]
    grads = torch.ops.flash_moe.gated_product_backward(grad_out, *ctx.saved_tensors, ctx.hidden_act, *wants)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wants, strict=True)), None, None


_TENSORS = "Tensor x, Tensor gate_proj, Tensor up_proj"
register_op(
    f"gated_product({_TENSORS}, str hidden_act, bool keeps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty_results,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    f"gated_product_backward(Tensor grad_out, {_TENSORS}, Tensor gate, Tensor up, str hidden_act, "
    "bool wants_x, bool wants_gate, bool wants_up) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
