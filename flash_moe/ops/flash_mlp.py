"""Dense gated MLP: products through torch, the gated activation in one pass, or without gradients fused into them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe._activations import check_activation
from flash_moe._backend import Backend, resolve_backend
from flash_moe._checks import check_dtype, check_same_device, check_shape, check_tensor, float_dtypes
from flash_moe.ops._reference.mlp import mlp_reference
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
    if chosen is not Backend.TRITON:
        return mlp_reference(hidden_states, gate_proj, up_proj, down_proj, hidden_act)
    tensors = [hidden_states, gate_proj, up_proj, down_proj]
    if is_autocast:
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        tensors = [x.to(dtype) for x in tensors]
    rows = tensors[0] if hidden_states.dim() == 2 else tensors[0].reshape(-1, hidden_states.shape[-1])
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:3]):
        out = torch.ops.flash_moe.gated_mlp(rows, *tensors[1:], hidden_act)[0]
    else:
        out = F.linear(torch.ops.flash_moe.gated_product(rows, *tensors[1:3], hidden_act), tensors[3])
    return out if hidden_states.dim() == 2 else out.view(hidden_states.shape)


def triton_flash_mlp_func(
    hidden_states: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, hidden_act: str = "silu"
) -> Tensor:
    """``flash_mlp`` with the Triton gated activation; raises where it cannot run."""
    return flash_mlp(hidden_states, gate_proj, up_proj, down_proj, hidden_act=hidden_act, backend="triton")


def _product(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    from flash_moe.ops._triton import mlp_fused

    return mlp_fused.gated_product_forward(x, gate_proj, up_proj, hidden_act)


def _product_fake(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    return x.new_empty(x.shape[0], gate_proj.shape[0])


def _forward(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, hidden_act: str) -> tuple[Tensor, ...]:
    from flash_moe.ops._triton import mlp

    return mlp.gated_mlp_forward(x, gate_proj, up_proj, down_proj, hidden_act)


def _forward_fake(x: Tensor, gate_proj: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = (x.shape[0], gate_proj.shape[0])
    return x.new_empty(x.shape), *(x.new_empty(shape) for _ in range(3))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from flash_moe.ops._triton import mlp

    grad_out, tensors, options = arguments[0], arguments[1:8], arguments[8:]
    return mlp.gated_mlp_backward(grad_out, tensors[:4], tensors[4:], *options)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, wanted = arguments[1:5], arguments[-1]
    return tuple(x.new_empty(x.shape if is_wanted else 0) for x, is_wanted in zip(inputs, wanted, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.hidden_act = inputs
    ctx.mark_non_differentiable(*output[1:])
    gate, up, activated = output[1:]
    if not ctx.needs_input_grad[3]:  # it is for the gradient of down_proj alone
        activated = activated.new_empty(0)
    ctx.save_for_backward(*tensors, gate, up, activated)


def _backward_formula(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    grads = torch.ops.flash_moe.gated_mlp_backward(grad_out, *ctx.saved_tensors, ctx.hidden_act, wanted)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), None


register_op(
    "gated_product(Tensor x, Tensor gate_proj, Tensor up_proj, str hidden_act) -> Tensor", _product, _product_fake
)
_TENSORS = "Tensor x, Tensor gate_proj, Tensor up_proj, Tensor down_proj"
register_op(
    f"gated_mlp({_TENSORS}, str hidden_act) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    f"gated_mlp_backward(Tensor grad_out, {_TENSORS}, Tensor gate, Tensor up, Tensor activated, str hidden_act, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
