"""The forward of one-neuron experts in one launch, for few tokens: nothing goes from kernel to kernel.

T tokens, H hidden size, E experts, K experts per token. Tensors are contiguous; sums are in float32 and in a fixed
order. A program makes SLICE columns of one token's output. For that it needs all K dots over all of H, so the token's
H / SLICE programs each take them for themselves: a token of 64 experts is 128 KB of rows, which an SM reads from L2 in
about a microsecond; a second launch, or programs that wait for each other, would cost more.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.launch import block_of, launch_config
from flash_moe.ops._triton.math import activation, round_for, table_float
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2


@triton.jit
def load_parts(parts_ptr, t, h, H, num_parts, BLOCK_P: tl.constexpr):
    """Columns ``h`` of row ``t`` of the sum over P of ``parts [P, T, H]``; T is the grid's first size."""
    p = tl.arange(0, BLOCK_P)
    rows = parts_ptr + (p[:, None] * tl.num_programs(0).to(tl.int64) + t) * H
    return tl.sum(tl.load(rows + h[None, :], mask=(p < num_parts)[:, None] & (h < H)[None, :], other=0.0), 0)


@triton.jit
def _fused_kernel(
    x_ptr,
    down_ptr,
    up_ptr,
    indices_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    pre_activations_ptr,
    down_scale_ptr,
    up_scale_ptr,
    K,
    num_parts,
    H: tl.constexpr,
    HIDDEN_ACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SLICE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Tables of 8 bits have scales, and no pre-activations are kept; for others both scales are None."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    acc = tl.zeros([BLOCK_K, SLICE], tl.float32)
    if residual_ptr is not None:
        residual = load_parts(residual_ptr, t, column, H, num_parts, BLOCK_P)
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        ids = tl.load(indices_ptr + t * K + k, mask=k < K, other=0).to(tl.int64)
        weights = tl.load(weights_ptr + t * K + k, mask=k < K, other=0.0).to(tl.float32)
        if up_scale_ptr is not None:
            weights *= tl.load(up_scale_ptr + ids, mask=k < K, other=0.0)
            down_scale = tl.load(down_scale_ptr + ids, mask=k < K, other=0.0)
        # Asked for before the dots, on which only its coefficients wait.
        mask = (k < K)[:, None] if H % SLICE == 0 else (k < K)[:, None] & (column < H)[None, :]
        up = tl.load(up_ptr + ids[:, None] * H + column[None, :], mask=mask, other=0.0)
        products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        for start in tl.range(0, H, BLOCK_H, loop_unroll_factor=UNROLL):
            h = start + tl.arange(0, BLOCK_H)
            x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
            within = (k < K)[:, None] if H % BLOCK_H == 0 else (k < K)[:, None] & (h < H)[None, :]
            down = table_float(tl.load(down_ptr + ids[:, None] * H + h[None, :], mask=within, other=0.0))
            products += x[None, :] * down
        s = tl.sum(products, 1)
        if up_scale_ptr is not None:
            s *= down_scale
        else:
            tl.store(pre_activations_ptr + t * K + k, s, mask=(k < K) & (tl.program_id(1) == 0))
        acc += (activation(s, HIDDEN_ACT) * weights)[:, None] * table_float(up)
    out = tl.sum(acc, 0)
    if residual_ptr is not None:
        out += residual
    tl.store(out_ptr + t * H + column, round_for(out_ptr, out), mask=column < H)


def fused_forward(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out [T, H]``, and ``s [T, K]``, float32. ``residual [P, T, H]``, float32: is added before rounding, all P."""
    out = torch.empty_like(hidden_states)
    pre_activations = torch.empty_like(indices, dtype=torch.float32)
    inputs = (hidden_states, down_weights, up_weights, indices, routing_weights, residual)
    tensors = (*inputs, out, pre_activations, None, None)
    _launch(tensors, len(down_weights), hidden_act)
    return out, pre_activations


def fused_forward_quantized(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    down_scale: Tensor,
    up_scale: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
) -> Tensor:
    """``out [T, H]`` of tables of 8 bits with a scale a row ``[E]``, float32."""
    out = torch.empty_like(hidden_states)
    inputs = (hidden_states, down_weights, up_weights, indices, routing_weights, None)
    tensors = (*inputs, out, None, down_scale, up_scale)
    _launch(tensors, len(down_weights), hidden_act)
    return out


def _launch(tensors: tuple[Any, ...], num_experts: int, hidden_act: str) -> None:
    """``tensors``: what the kernel's pointers point to, in its order."""
    hidden_states, indices, residual = tensors[0], tensors[3], tensors[5]
    (T, H), K = hidden_states.shape, indices.shape[1]
    config = dict(launch_config("fused", hidden_states.device, (T, H, num_experts, K)))
    config["BLOCK_K"] = min(config["BLOCK_K"], next_power_of_2(max(1, K)))
    for name in ("BLOCK_H", "SLICE"):
        config[name] = min(config[name], block_of(H))
    num_parts = 0 if residual is None else residual.shape[0]
    config["BLOCK_P"] = next_power_of_2(max(1, num_parts))
    launch(_fused_kernel, (T, cdiv(H, config["SLICE"])), tensors, (K, num_parts), H, hidden_act, **config)
