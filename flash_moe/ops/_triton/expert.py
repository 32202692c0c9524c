"""One-neuron experts, forward and backward, by gathering rows; what other variants run is in ``expert_plan.py``.

T tokens, H hidden size, E experts, K experts per token, P = T * K pairs (token, expert). Tensors are contiguous; sums
are in float32 and in a fixed order. Every pass is one of three products, and each exists once:
  dots          value[t, k] = row[t] . table[e]              forward: x . down; backward: dout . up
  token sums    out[t] = sum_k coefficient[t, k] * table[e]  forward: act(s) * w over up; backward: ds over down
  expert sums   grad[e] = sum of coefficient[t, k] * row[t] over the pairs of e (``expert_sums.py``)
A dot may be split into S column slices of the table, whose partial values ``[S, T, K]`` the next kernel adds.
Tables of 8 bits have a scale a row, which the kernel between dots and token sums puts to the coefficients.
Row addresses are 64-bit: E * H and T * H may pass 2^31; P may not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.expert_dense import compress, dense_dots, dense_expert_sums, dense_token_sums
from flash_moe.ops._triton.expert_fused import fused_forward, fused_forward_quantized, load_parts
from flash_moe.ops._triton.expert_plan import (
    BACKWARD_TABLES,
    BACKWARD_TOKENS,
    DENSE,
    FORWARD,
    FUSED,
    GATHER,
    variant_for,
)
from flash_moe.ops._triton.expert_sums import expert_sums
from flash_moe.ops._triton.grouping import Groups, group_by_distinct_expert, group_by_expert
from flash_moe.ops._triton.launch import tile_config
from flash_moe.ops._triton.math import activation, activation_grad, round_for, table_float
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

# The tiles that a warp keeps in flight are in the launch tables. On an H200 at T 4096, H 1024, bf16, K 64, E 16384 the
# best of up to 60 shapes: dots 7.2, token sums 8.5 TB/s, counted per row used; one row load at a time: 5.9, 8.3.
# Where the table passes the L2 cache and a slice of SLICE columns does not, all tokens take their dots with one slice
# before the next: at K 512, E 102400 (210 MB) 7.6 TB/s instead of 4.0. The sums' programs are in that order anyway.
SLICE = 256
BLOCKS_PER_PROGRAM_OF_A_SLICE = 4
ELEMENTWISE_BLOCK = 1024


@triton.jit
def _dots_kernel(
    rows_ptr,
    table_ptr,
    indices_ptr,
    partials_ptr,
    T,
    H,
    K,
    WIDTH: tl.constexpr,
    K_PER_PROGRAM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """partials[slice, t, k] = row[t] . table[e] over the slice's WIDTH columns; a program takes K_PER_PROGRAM pairs.

    WIDTH is H or a multiple of BLOCK_H, so only H ends a block early.
    """
    programs_per_token = tl.cdiv(K, K_PER_PROGRAM)
    t = (tl.program_id(0) // programs_per_token).to(tl.int64)
    first_k = (tl.program_id(0) % programs_per_token) * K_PER_PROGRAM
    first_h = tl.program_id(1) * WIDTH
    for k_offset in range(0, K_PER_PROGRAM, BLOCK_K):
        k = first_k + k_offset + tl.arange(0, BLOCK_K)
        ids = tl.load(indices_ptr + t * K + k, mask=k < K, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        for start in tl.range(0, WIDTH, BLOCK_H, loop_unroll_factor=UNROLL):
            h = first_h + start + tl.arange(0, BLOCK_H)
            row = tl.load(rows_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
            mask = (k < K)[:, None] & (h < H)[None, :]
            table = table_float(tl.load(table_ptr + ids[:, None] * H + h[None, :], mask=mask, other=0.0))
            acc += row[None, :] * table
        partial_row = tl.program_id(1).to(tl.int64) * T + t
        tl.store(partials_ptr + partial_row * K + k, tl.sum(acc, 1), mask=k < K)


@triton.jit
def _sum_slices(partials_ptr, pair, P, mask, NUM_SLICES: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(NUM_SLICES):
        total += tl.load(partials_ptr + pair, mask=mask, other=0.0)
        partials_ptr += P
    return total


@triton.jit
def _coefficients_fwd_kernel(
    partials_ptr,
    weights_ptr,
    pre_activations_ptr,
    coefficients_ptr,
    P,
    HIDDEN_ACT: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s = x . down; coefficient = act(s) * w."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < P
    s = _sum_slices(partials_ptr, pair, P, mask, NUM_SLICES, BLOCK)
    weights = tl.load(weights_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    tl.store(pre_activations_ptr + pair, s, mask=mask)
    tl.store(coefficients_ptr + pair, activation(s, HIDDEN_ACT) * weights, mask=mask)


@triton.jit
def _scaled_coefficients_kernel(
    partials_ptr,
    weights_ptr,
    indices_ptr,
    down_scale_ptr,
    up_scale_ptr,
    coefficients_ptr,
    P,
    HIDDEN_ACT: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s = (x . down) * down_scale; coefficient = act(s) * w * up_scale.

    Each scale is loaded once a pair; the token sums would load theirs again for every block of columns.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < P
    ids = tl.load(indices_ptr + pair, mask=mask, other=0)
    s = _sum_slices(partials_ptr, pair, P, mask, NUM_SLICES, BLOCK)
    s *= tl.load(down_scale_ptr + ids, mask=mask, other=0.0)
    weights = tl.load(weights_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    weights *= tl.load(up_scale_ptr + ids, mask=mask, other=0.0)
    tl.store(coefficients_ptr + pair, activation(s, HIDDEN_ACT) * weights, mask=mask)


@triton.jit
def _coefficients_bwd_kernel(
    partials_ptr,
    weights_ptr,
    pre_activations_ptr,
    dweights_ptr,
    dpre_activations_ptr,
    coefficients_ptr,
    P,
    HIDDEN_ACT: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dcoefficient = dout . up; dw = dcoefficient * act(s); ds = dcoefficient * w * act'(s); the coefficient again."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < P
    dcoefficients = _sum_slices(partials_ptr, pair, P, mask, NUM_SLICES, BLOCK)
    weights = tl.load(weights_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(pre_activations_ptr + pair, mask=mask, other=0.0)
    activated = activation(s, HIDDEN_ACT)
    tl.store(dweights_ptr + pair, round_for(dweights_ptr, dcoefficients * activated), mask=mask)
    tl.store(dpre_activations_ptr + pair, dcoefficients * weights * activation_grad(s, HIDDEN_ACT), mask=mask)
    tl.store(coefficients_ptr + pair, activated * weights, mask=mask)


@triton.jit
def _token_sums_kernel(
    coefficients_ptr,
    table_ptr,
    indices_ptr,
    residual_ptr,
    out_ptr,
    H,
    K,
    num_parts,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        k = start + tl.arange(0, BLOCK_K)
        ids = tl.load(indices_ptr + t * K + k, mask=k < K, other=0).to(tl.int64)
        coefficients = tl.load(coefficients_ptr + t * K + k, mask=k < K, other=0.0)
        mask = (k < K)[:, None] & (h < H)[None, :]
        rows = table_float(tl.load(table_ptr + ids[:, None] * H + h[None, :], mask=mask, other=0.0))
        acc += coefficients[:, None] * rows
    out = tl.sum(acc, 0)
    if residual_ptr is not None:
        out += load_parts(residual_ptr, t, h, H, num_parts, BLOCK_P)
    tl.store(out_ptr + t * H + h, round_for(out_ptr, out), mask=h < H)


def _slice_width(table: Tensor, num_pairs: int) -> int:
    """Columns of a slice: all of H, or SLICE where that brings rows that are used again within the L2 cache."""
    E, H = table.shape
    cache = torch.cuda.get_device_properties(table.device).L2_cache_size if table.is_cuda else SLICE
    fits_whole = E * H * table.element_size() <= 0.8 * cache
    fits_sliced = E * SLICE * table.element_size() <= cache
    return H if H <= SLICE or fits_whole or not fits_sliced or num_pairs < E else SLICE


def _dots(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``[S, T, K]`` float32: row[t] . table[indices[t, k]] over each of S column slices."""
    (T, K), H = indices.shape, table.shape[1]
    width = _slice_width(table, indices.numel())
    num_slices = cdiv(H, width)
    config = tile_config("dots", table, indices, width)
    k_per_program = config["BLOCK_K"] * (1 if num_slices == 1 else BLOCKS_PER_PROGRAM_OF_A_SLICE)
    partials = torch.empty(num_slices, T, K, dtype=torch.float32, device=rows.device)
    grid = (T * cdiv(K, k_per_program), num_slices)
    tensors = (rows, table, indices, partials)
    launch(_dots_kernel, grid, tensors, (T, H, K), width, k_per_program, **config)
    return partials


def _token_sums(
    coefficients: Tensor,
    table: Tensor,
    indices: Tensor,
    dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``[T, H]`` in ``dtype``, by default the table's. ``residual [P, T, H]``, float32: is added before, all P."""
    (T, K), H = indices.shape, table.shape[1]
    out = table.new_empty(T, H, dtype=dtype)
    config = tile_config("token_sums", table, indices, H)
    grid = (T, cdiv(H, config["BLOCK_H"]))
    num_parts = 0 if residual is None else residual.shape[0]
    config["BLOCK_P"] = next_power_of_2(max(1, num_parts))
    launch(_token_sums_kernel, grid, (coefficients, table, indices, residual, out), (H, K, num_parts), **config)
    return out


def expert_forward(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out [T, H]`` and the pre-activations ``s [T, K]``, float32.

    ``residual [P, T, H]``, float32, of few tokens: is added to ``out``, all P, as a rule before that is rounded.
    """
    arguments = (hidden_states, down_weights, up_weights, indices, routing_weights, hidden_act)
    variant = variant_for(FORWARD, hidden_states, indices, down_weights.shape[0])
    if variant == FUSED:
        return fused_forward(*arguments, residual)
    if variant == GATHER:
        return _forward_gathered(*arguments, residual)
    out, pre_activations = _forward_dense(*arguments)
    return out if residual is None else out.add_(residual.sum(0)), pre_activations


def _forward_gathered(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pre_activations = torch.empty_like(indices, dtype=torch.float32)
    coefficients = torch.empty_like(pre_activations)
    P = indices.numel()
    partials = _dots(hidden_states, down_weights, indices)
    launch(
        _coefficients_fwd_kernel,
        (cdiv(P, ELEMENTWISE_BLOCK),),
        (partials, routing_weights, pre_activations, coefficients),
        (P,),
        hidden_act,
        partials.shape[0],
        ELEMENTWISE_BLOCK,
    )
    return _token_sums(coefficients, up_weights, indices, residual=residual), pre_activations


def expert_forward_quantized(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    down_scale: Tensor,
    up_scale: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
) -> Tensor:
    """``out [T, H]`` in the dtype of ``hidden_states``, of tables of 8 bits with a scale a row ``[E]``."""
    tables = (down_weights, up_weights, down_scale, up_scale)
    # By the bytes of a table's row. The dense products take tables of 16 bits alone: they are never chosen here.
    variant = variant_for(FORWARD, down_weights, indices, down_weights.shape[0])
    if variant == FUSED:
        return fused_forward_quantized(hidden_states, *tables, indices, routing_weights, hidden_act)
    partials = _dots(hidden_states, down_weights, indices)
    coefficients, P = torch.empty_like(indices, dtype=torch.float32), indices.numel()
    launch(
        _scaled_coefficients_kernel,
        (cdiv(P, ELEMENTWISE_BLOCK),),
        (partials, routing_weights, indices, down_scale, up_scale, coefficients),
        (P,),
        hidden_act,
        partials.shape[0],
        ELEMENTWISE_BLOCK,
    )
    return _token_sums(coefficients, up_weights, indices, hidden_states.dtype)


def _forward_dense(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
) -> tuple[Tensor, Tensor]:
    (pre_activations,) = dense_dots(hidden_states, down_weights, indices)
    coefficients = compress(
        pre_activations,
        indices,
        up_weights.shape[0],
        hidden_states.dtype,
        weights=routing_weights,
        hidden_act=hidden_act,
    )
    return dense_token_sums(pre_activations, up_weights, indices, coefficients), pre_activations


def expert_backward_tokens(
    grad_out: Tensor,
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    pre_activations: Tensor,
    hidden_act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dx [T, H]``, ``dweights [T, K]``, and in float32 ``ds [T, K]`` and the coefficients w * act(s) ``[T, K]``."""
    dweights = torch.empty_like(routing_weights)
    dpre_activations, coefficients = torch.empty_like(pre_activations), torch.empty_like(pre_activations)
    P = indices.numel()
    is_dense = variant_for(BACKWARD_TOKENS, hidden_states, indices, down_weights.shape[0]) == DENSE
    dots, token_sums = (dense_dots, dense_token_sums) if is_dense else (_dots, _token_sums)
    partials = dots(grad_out, up_weights, indices)
    launch(
        _coefficients_bwd_kernel,
        (cdiv(P, ELEMENTWISE_BLOCK),),
        (partials, routing_weights, pre_activations, dweights, dpre_activations, coefficients),
        (P,),
        hidden_act,
        partials.shape[0],
        ELEMENTWISE_BLOCK,
    )
    dx = token_sums(dpre_activations, down_weights, indices)
    return dx, dweights, dpre_activations, coefficients


def group_for_tables(hidden_states: Tensor, indices: Tensor, num_experts: int) -> Groups | None:
    """What ``expert_backward_tables`` needs to know of the routing alone; None where tensor cores do without."""
    if variant_for(BACKWARD_TABLES, hidden_states, indices, num_experts) == DENSE:
        return None
    return group_by_expert(indices, num_experts)


def expert_backward_tables(
    grad_out: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    dpre_activations: Tensor,
    coefficients: Tensor,
    num_experts: int,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """``ddown [E, H]`` and ``dup [E, H]``; an expert nobody chose gets zeros.

    ``groups`` are those of ``group_for_tables``, if they are there already.
    """
    groups = groups or group_for_tables(hidden_states, indices, num_experts)
    if groups is None:
        ddown = dense_expert_sums(hidden_states, dpre_activations, indices, num_experts)
        return ddown, dense_expert_sums(grad_out, coefficients, indices, num_experts)
    return expert_sums(grad_out, hidden_states, dpre_activations, coefficients, groups)


def expert_backward_rows(
    grad_out: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    dpre_activations: Tensor,
    coefficients: Tensor,
    num_experts: int,
    grouped: tuple[Groups, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ids``, int64, and ``ddown``, ``dup`` of each distinct expert, in min(P, E) rows; the rows left are zeros.

    ``grouped`` is what ``group_by_distinct_expert`` gives, if it is there already.
    """
    groups, ids = grouped or group_by_distinct_expert(indices, num_experts)
    return ids, *expert_sums(grad_out, hidden_states, dpre_activations, coefficients, groups)
