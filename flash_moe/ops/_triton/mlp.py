"""The gated MLP with gradients: products by torch and, a launch each, the gated activation and its backward.

T tokens, H hidden size, I intermediate size. ``act(gate) * up`` takes contiguous tensors and is float32 math.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.launch import launch_config
from flash_moe.ops._triton.math import activation, activation_grad, round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv


@triton.jit
def _gated_fwd_kernel(gate_ptr, up_ptr, out_ptr, numel, HIDDEN_ACT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, round_for(out_ptr, activation(gate, HIDDEN_ACT) * up), mask=mask)


@triton.jit
def _gated_bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, numel, HIDDEN_ACT: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dgate_ptr + offs, round_for(dgate_ptr, dout * up * activation_grad(gate, HIDDEN_ACT)), mask=mask)
    tl.store(dup_ptr + offs, round_for(dup_ptr, dout * activation(gate, HIDDEN_ACT)), mask=mask)


def gated_activation_forward(gate: Tensor, up: Tensor, hidden_act: str, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(gate) if out is None else out
    numel = gate.numel()
    config = launch_config("gated_forward", gate.device, (numel,))
    launch(_gated_fwd_kernel, (cdiv(numel, config["BLOCK"]),), (gate, up, out), (numel,), hidden_act, **config)
    return out


def gated_activation_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, hidden_act: str, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``dgate`` and ``dup``; ``out`` may be in the place of the inputs, each element of which is read first."""
    dgate, dup = (torch.empty_like(gate), torch.empty_like(up)) if out is None else out
    numel = gate.numel()
    config = launch_config("gated_backward", gate.device, (numel,))
    grid = (cdiv(numel, config["BLOCK"]),)
    launch(_gated_bwd_kernel, grid, (grad_out, gate, up, dgate, dup), (numel,), hidden_act, **config)
    return dgate, dup


def gated_mlp_forward(
    x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, hidden_act: str
) -> tuple[Tensor, ...]:
    """``out [T, H]``, and what the backward takes: gate, up and their gated product, ``[T, I]``."""
    gate, up = torch.mm(x, gate_proj.t()), torch.mm(x, up_proj.t())
    activated = gated_activation_forward(gate, up, hidden_act)
    return torch.mm(activated, down_proj.t()), gate, up, activated


def gated_mlp_backward(
    grad_out: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor], hidden_act: str, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients of ``inputs``, as ``gated_mlp_forward`` takes them; what is not ``wanted`` is empty."""
    (x, gate_proj, up_proj, down_proj), (gate, up, activated) = inputs, saved
    nothing = x.new_empty(0)
    ddown_proj = torch.mm(grad_out.t(), activated) if wanted[3] else nothing
    dactivated = torch.mm(grad_out, down_proj)
    dgate, dup = gated_activation_backward(dactivated, gate, up, hidden_act, out=(dactivated, torch.empty_like(up)))
    dx = torch.mm(dgate, gate_proj).addmm_(dup, up_proj) if wanted[0] else nothing
    dgate_proj = torch.mm(dgate.t(), x) if wanted[1] else nothing
    dup_proj = torch.mm(dup.t(), x) if wanted[2] else nothing
    return dx, dgate_proj, dup_proj, ddown_proj
