"""The three products of ``expert.py`` on tensor cores, for when each token chooses a large share of the experts.

T tokens, H hidden size, E experts, K experts per token, G = ceil(E / 8) groups. Tensors are contiguous; sums are in
float32 and in a fixed order. With P [T, E] the coefficients of the pairs, zero where a token did not choose:
  dots          rows @ table^T in tiles, of which only the chosen scores leave the chip
  token sums    P @ table
  expert sums   P^T @ rows
P is never in memory. What it costs to make a tile of it decides: an H200 multiplies a tile of 128 tokens x 64 experts
by 64 x 256 table values in 1024 clocks (2048 products a clock and SM), in which an SM can issue 16 instructions for
each of the 8192 coefficients. Comparing every pair of the token with every expert of the tile takes 3 K; finding a
coefficient by a bit mask and the number of bits before it about 10, of them a population count, 16 a clock. So each
token's pairs are sorted by expert once, and each group of 8 experts of which it chose any becomes 8 values, zeros among
them, that one 16-byte copy brings to where tensor cores read them (``Compressed``): less than 1 instruction a
coefficient. Memory: at most 16 bytes a pair, and 2 bytes for each token and group to find them.

Unlike a gather, P @ table multiplies every row by something: an infinity or NaN in a row reaches all sums as NaN.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.launch import FLOAT32_TILE, Tile
from flash_moe.ops._triton.math import activation, dot, round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

GROUP = tl.constexpr(8)
COMPRESS_BLOCK, COMPRESS_WARPS = 512, 4
# Splits are added ADD_UNROLL at a time, all of them on their way at once.
ADD_BLOCK, ADD_UNROLL = 1024, 4
SLOTS_ALIGNMENT = 16
# Row blocks that take turns at one column block, so that what programs read at one time stays in L2.
ROW_BLOCKS_IN_TURN = 8
# A sum over fewer rows than this is not split among programs.
MIN_SPLIT = 256


# The sums of 128 x 256 results fill half of an SM's registers. Its operands ask L2 for 48 bytes a clock and SM at full
# rate, those of 128 x 128 for 64.
DOTS_TILE = Tile(128, 256, 64, 8, 3)
TOKEN_SUMS_TILE = Tile(128, 256, 64, 8, 5)
EXPERT_SUMS_TILE = Tile(128, 256, 64, 8, 5)
# Pairs of a token that the dots' last step looks up at a time.
DOTS_BLOCK_K = 128


def _num_splits(length: int, num_programs: int, multiprocessors: int) -> int:
    """Among how many programs a sum of ``length`` rows is shared out, where its tiles are too few for the GPU."""
    return max(1, min(multiprocessors // max(1, num_programs), length // MIN_SPLIT))


@dataclass(frozen=True)
class Compressed:
    """P without the groups of 8 experts that a token chose none of. An example with E = 20, so G = 3:

    indices [[17, 2, 17]], coefficients [[.5, 3, 1]]  ->  slots, column 0 of 16: [0, -1, 1]; the others are -1
    values [[[0, 0, 3, 0, 0, 0, 0, 0], [0, 1.5, 0, 0, 0, 0, 0, 0], [anything]]]
    """

    # [G, S] int16 or int32, where S is T rounded up to SLOTS_ALIGNMENT, so that rows are loaded 16 bytes at a time
    # whatever T is: the place of the group among the token's, -1 where it chose none of it.
    slots: Tensor
    values: Tensor  # [T, K, 8] in the dtype of the operands
    scales: Tensor | None  # float16: what the values were multiplied by, a power of two for each row of the result


@triton.jit
def _add_to_same_expert(e, total, next_e, next_total):
    return next_e, tl.where(e == next_e, total, 0.0) + next_total


@triton.jit
def _scale_for(largest):
    """The power of two that brings a float32 ``largest`` >= 2^-100 into [2^14, 2^15), below the largest float16."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -100)
    return ((127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _compress_kernel(
    coefficients_ptr,
    weights_ptr,
    indices_ptr,
    scales_ptr,
    slots_ptr,
    values_ptr,
    T,
    S,
    G,
    K,
    HIDDEN_ACT: tl.constexpr,
    SCALE_BY_EXPERT: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """slots and values of BLOCK_T tokens: all empty first, then what the sorted pairs put there."""
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first_t + tl.arange(0, BLOCK_T)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    is_pair = (t < T) & (k < K)
    for first_g in range(0, G, BLOCK_G):
        g = (first_g + tl.arange(0, BLOCK_G)[None, :]).to(tl.int64)
        tl.store(slots_ptr + g * S + t, tl.full([BLOCK_T, BLOCK_G], -1, tl.int32), mask=(t < S) & (g < G))
    lane = tl.arange(0, GROUP)[None, None, :]
    nothing = tl.zeros([BLOCK_T, BLOCK_K, GROUP], values_ptr.dtype.element_ty)
    tl.store(values_ptr + (t * K + k)[:, :, None] * GROUP + lane, nothing, mask=is_pair[:, :, None])

    # By expert, and for the same expert in the order given. What is no pair comes last, in a group of its own.
    ids = tl.load(indices_ptr + t * K + k, mask=is_pair, other=0).to(KEY_DTYPE)
    key = tl.sort(tl.where(is_pair, ids, G * GROUP) * BLOCK_K + k, 1)
    e = (key // BLOCK_K).to(tl.int32)
    pair = t * K + (key % BLOCK_K).to(tl.int32)
    coefficients = tl.load(coefficients_ptr + pair, mask=is_pair, other=0.0)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + pair, mask=is_pair, other=0.0).to(tl.float32)
        coefficients = activation(coefficients, HIDDEN_ACT) * weights
    _, total = tl.associative_scan((e, coefficients), 1, _add_to_same_expert)
    everywhere = tl.broadcast_to(k, [BLOCK_T, BLOCK_K])
    previous = tl.gather(e, tl.maximum(everywhere - 1, 0), 1)
    following = tl.gather(e, tl.minimum(everywhere + 1, BLOCK_K - 1), 1)
    is_last_of_expert = is_pair & ((following != e) | (k == BLOCK_K - 1))
    is_first_of_group = is_pair & ((previous // GROUP != e // GROUP) | (k == 0))
    slot = tl.cumsum(is_first_of_group.to(tl.int32), 1) - 1
    total = tl.where(is_last_of_expert, total, 0.0)
    if scales_ptr is not None:
        if SCALE_BY_EXPERT:
            total *= tl.load(scales_ptr + e, mask=is_pair, other=0.0)
        else:
            scale = _scale_for(tl.max(tl.abs(total), 1, keep_dims=True))
            tl.store(scales_ptr + t, scale, mask=t < T)
            total *= scale

    # Other threads of this block cleared what is written now.
    tl.debug_barrier()
    tl.store(slots_ptr + (e // GROUP).to(tl.int64) * S + t, slot, mask=is_first_of_group)
    place = (t * K + slot) * GROUP + e % GROUP
    tl.store(values_ptr + place, round_for(values_ptr, total), mask=is_last_of_expert)


@triton.jit
def _load_tile(
    tile_ptr, rows_left, columns_left, H, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_H: tl.constexpr
):
    """Rows of H from ``tile_ptr`` on. Past the last row it is read again: nothing uses it, or its coefficient is 0."""
    r = tl.minimum(tl.arange(0, BLOCK_R), rows_left - 1)
    c = tl.arange(0, BLOCK_C)
    if EVEN_H:
        return tl.load(tile_ptr + r[:, None] * H + c[None, :])
    mask = tl.broadcast_to((c < columns_left)[None, :], [BLOCK_R, BLOCK_C])
    return tl.load(tile_ptr + r[:, None] * H + c[None, :], mask=mask, other=0.0)


@triton.jit
def _load_coefficients(
    slots_ptr, values_ptr, slots_left, groups_left, S, K, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The tile [BLOCK_T, BLOCK_E] of P; the pointers are at its first token's values and its first group's slots.

    Where 8 values lie side by side is not to be seen in their offsets. Told so, the compiler copies them 16 bytes at a
    time to where tensor cores read them; else they pass through registers, and the sums take half as long again.
    """
    BLOCK_G: tl.constexpr = BLOCK_E // GROUP
    t, g = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_G)[None, :]
    slot = tl.load(slots_ptr + g * S + t, mask=(g < groups_left) & (t < slots_left), other=-1).to(tl.int32)
    offs = (t * K + slot)[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    mask = tl.broadcast_to((slot >= 0)[:, :, None], [BLOCK_T, BLOCK_G, GROUP])
    offs = tl.max_contiguous(tl.multiple_of(tl.reshape(offs, [BLOCK_T, BLOCK_E]), [1, 8]), [1, 8])
    mask = tl.max_constancy(tl.reshape(mask, [BLOCK_T, BLOCK_E]), [1, 8])
    return tl.load(values_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _pick(tile, columns):
    """out[r, i] = tile[r, columns[r, i]], by way of shared memory.

    Along one axis of a matrix, gather would shuffle each result together from the registers of a whole warp. As a
    vector, the tile goes to shared memory; in the order of its reshaping, the 32 values that a warp writes at a time
    (8 rows by every other of 8 columns) fall into different banks.
    """
    R: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    flat = tl.reshape(tl.permute(tl.reshape(tile, [R // 8, 8, C // 8, 4, 2]), 0, 2, 4, 3, 1), [R * C])
    r = tl.arange(0, R)[:, None]
    place = r // 8 * (8 * C) + columns // 8 * 64 + columns % 2 * 32 + columns // 2 % 4 * 8 + r % 8
    return tl.reshape(tl.gather(flat, tl.reshape(place, [place.numel]), 0), columns.shape)


@triton.jit
def _dots_kernel(
    rows_ptr,
    table_ptr,
    indices_ptr,
    out_ptr,
    T,
    H,
    E,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_BLOCKS_IN_TURN: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    expert_blocks = tl.cdiv(E, BLOCK_E)
    turn = tl.program_id(0) // (ROW_BLOCKS_IN_TURN * expert_blocks)
    in_turn = tl.program_id(0) % (ROW_BLOCKS_IN_TURN * expert_blocks)
    row_blocks = tl.minimum(tl.cdiv(T, BLOCK_T) - turn * ROW_BLOCKS_IN_TURN, ROW_BLOCKS_IN_TURN)
    first_t = (turn * ROW_BLOCKS_IN_TURN + in_turn % row_blocks).to(tl.int64) * BLOCK_T
    first_e = (in_turn // row_blocks).to(tl.int64) * BLOCK_E
    rows_ptr += first_t * H
    table_ptr += first_e * H
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for h in range(0, H, BLOCK_H):
        rows = _load_tile(rows_ptr + h, (T - first_t).to(tl.int32), H - h, H, BLOCK_T, BLOCK_H, EVEN_H)
        table = _load_tile(table_ptr + h, (E - first_e).to(tl.int32), H - h, H, BLOCK_E, BLOCK_H, EVEN_H)
        acc = dot(rows, tl.trans(table), acc)
    t = first_t + tl.arange(0, BLOCK_T)[:, None]
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)[None, :]
        e = tl.load(indices_ptr + t * K + k, mask=(t < T) & (k < K), other=-1).to(tl.int32) - first_e.to(tl.int32)
        is_here = (e >= 0) & (e < BLOCK_E)
        tl.store(out_ptr + t * K + k, _pick(acc, tl.where(is_here, e, 0)), mask=is_here)


@triton.jit
def _store_sums(
    acc, scales_ptr, out_ptr, first_r, first_h, R, H, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr
):
    r, h = first_r + tl.arange(0, BLOCK_R)[:, None], first_h + tl.arange(0, BLOCK_H)[None, :]
    if scales_ptr is not None:
        acc = acc / tl.load(scales_ptr + r, mask=r < R, other=1.0)
    mask = (r < R) if EVEN_H else (r < R) & (h < H)
    tl.store(out_ptr + r * H + h, round_for(out_ptr, acc), mask=mask)


@triton.jit
def _token_sums_kernel(
    slots_ptr,
    values_ptr,
    scales_ptr,
    table_ptr,
    out_ptr,
    T,
    H,
    E,
    S,
    G,
    K,
    SPLIT,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """out[split] = P @ table over the split's experts. Programs side by side share their tokens' coefficients."""
    column_blocks = tl.cdiv(H, BLOCK_H)
    first_t = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_T
    first_h = tl.program_id(0) % column_blocks * BLOCK_H
    split = tl.program_id(1).to(tl.int64)
    first_e = tl.program_id(1) * SPLIT
    slots_ptr += split * (SPLIT // GROUP) * S + first_t
    values_ptr += first_t * K * GROUP
    table_ptr += split * SPLIT * H + first_h
    slots_left = (S - first_t).to(tl.int32)
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for e in range(first_e, tl.minimum(first_e + SPLIT, E), BLOCK_E):
        p = _load_coefficients(slots_ptr, values_ptr, slots_left, G - e // GROUP, S, K, BLOCK_T, BLOCK_E)
        table = _load_tile(table_ptr, E - e, H - first_h, H, BLOCK_E, BLOCK_H, EVEN_H)
        acc = dot(p, table, acc)
        slots_ptr += BLOCK_E // GROUP * S
        table_ptr += BLOCK_E * H
    _store_sums(acc, scales_ptr, out_ptr + split * T * H, first_t, first_h, T, H, BLOCK_T, BLOCK_H, EVEN_H)


@triton.jit
def _expert_sums_kernel(
    slots_ptr,
    values_ptr,
    scales_ptr,
    rows_ptr,
    out_ptr,
    T,
    H,
    E,
    S,
    G,
    K,
    SPLIT,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """out[split] = P^T @ rows over the split's tokens. P's tile is read as it lies, and transposed for the product."""
    column_blocks = tl.cdiv(H, BLOCK_H)
    first_e = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_E
    first_h = tl.program_id(0) % column_blocks * BLOCK_H
    split = tl.program_id(1).to(tl.int64)
    first_t = tl.program_id(1) * SPLIT
    slots_ptr += first_e // GROUP * S + split * SPLIT
    values_ptr += split * SPLIT * K * GROUP
    rows_ptr += split * SPLIT * H + first_h
    groups_left = (G - first_e // GROUP).to(tl.int32)
    acc = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
    for t in range(first_t, tl.minimum(first_t + SPLIT, T), BLOCK_T):
        p = _load_coefficients(slots_ptr, values_ptr, S - t, groups_left, S, K, BLOCK_T, BLOCK_E)
        rows = _load_tile(rows_ptr, T - t, H - first_h, H, BLOCK_T, BLOCK_H, EVEN_H)
        acc = dot(tl.trans(p), rows, acc)
        slots_ptr += BLOCK_T
        values_ptr += BLOCK_T * K * GROUP
        rows_ptr += BLOCK_T * H
    _store_sums(acc, scales_ptr, out_ptr + split * E * H, first_e, first_h, E, H, BLOCK_E, BLOCK_H, EVEN_H)


@triton.jit
def _add_splits_kernel(partials_ptr, out_ptr, numel, num_splits, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """In order. What is loaded past the last split is 0, and the sum, which starts at 0, keeps its bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_splits, UNROLL):
        for split in tl.static_range(UNROLL):
            end = tl.where(first + split < num_splits, numel, 0)
            total += tl.load(partials_ptr + i, mask=i < end, other=0.0)
            partials_ptr += numel
    tl.store(out_ptr + i, round_for(out_ptr, total), mask=i < numel)


def compress(
    coefficients: Tensor,
    indices: Tensor,
    num_experts: int,
    dtype: torch.dtype,
    *,
    weights: Tensor | None = None,
    hidden_act: str = "identity",
    for_expert_sums: bool = False,
) -> Compressed:
    """The sparse operand of a sum; with ``weights [T, K]`` of hidden_act(coefficients) * weights instead.

    One serves both sums, but in float16, whose coefficients are scaled by the row of the result.
    """
    (T, K), G = indices.shape, cdiv(num_experts, GROUP.value)
    S = cdiv(T, SLOTS_ALIGNMENT) * SLOTS_ALIGNMENT
    slots = indices.new_empty(G, S, dtype=torch.int16 if K < 2**15 else torch.int32)
    values = coefficients.new_empty(T, K, GROUP.value, dtype=dtype)
    scales = None
    if dtype == torch.float16:
        scales = coefficients.new_empty(T)
        if for_expert_sums:
            scales = _expert_scales(coefficients, indices, num_experts)
    block_k = max(2, next_power_of_2(K))
    block_t = max(1, COMPRESS_BLOCK // block_k)
    key_dtype = tl.int32 if (G + 1) * GROUP.value * block_k < 2**31 else tl.int64
    launch(
        _compress_kernel,
        (cdiv(S, block_t),),
        (coefficients, weights, indices, scales, slots, values),
        (T, S, G, K),
        hidden_act,
        for_expert_sums,
        key_dtype,
        block_t,
        block_k,
        min(next_power_of_2(G), COMPRESS_BLOCK),
        num_warps=COMPRESS_WARPS,
    )
    return Compressed(slots, values, scales)


def _expert_scales(coefficients: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """For each expert the power of two that brings its largest coefficient near the largest float16.

    With room for K of them: a token may have chosen the expert as often.
    """
    # Of float32 from 0 on the bits, as integers, are in the same order, NaN last: no atomic maximum of floating point.
    bits = coefficients.abs().flatten().view(torch.int32)
    largest = bits.new_zeros(num_experts).scatter_reduce_(0, indices.flatten().long(), bits, "amax").view(torch.float32)
    exponents = torch.frexp(largest).exponent.clamp(min=-100)
    return torch.ldexp(torch.ones_like(largest), 15 - (indices.shape[1] - 1).bit_length() - exponents)


def dense_dots(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``[1, T, K]`` float32: row[t] . table[indices[t, k]]."""
    (T, K), (E, H) = indices.shape, table.shape
    tile = DOTS_TILE if table.element_size() == 2 else FLOAT32_TILE
    out = torch.empty(1, T, K, dtype=torch.float32, device=rows.device)
    launch(
        _dots_kernel,
        (cdiv(T, tile.rows) * cdiv(E, tile.columns),),
        (rows, table, indices, out),
        (T, H, E, K),
        tile.rows,
        tile.columns,
        tile.depth,
        min(next_power_of_2(K), DOTS_BLOCK_K),
        ROW_BLOCKS_IN_TURN,
        H % tile.depth == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def dense_token_sums(
    coefficients: Tensor, table: Tensor, indices: Tensor, compressed: Compressed | None = None
) -> Tensor:
    """``[T, H]`` in the table's dtype: the sum over k of coefficients[t, k] * table[indices[t, k]]."""
    (T, K), (E, H) = indices.shape, table.shape
    compressed = compressed or compress(coefficients, indices, E, table.dtype)
    tile = TOKEN_SUMS_TILE if table.element_size() == 2 else FLOAT32_TILE
    return _sums(_token_sums_kernel, tile, compressed, table, (T, H), E, (T, H, E, K))


def dense_expert_sums(
    rows: Tensor, coefficients: Tensor, indices: Tensor, num_experts: int, compressed: Compressed | None = None
) -> Tensor:
    """``[E, H]`` in the rows' dtype: the sum over the pairs of e of coefficients[t, k] * rows[t]; zeros for none."""
    (T, K), H = indices.shape, rows.shape[1]
    compressed = compressed or compress(coefficients, indices, num_experts, rows.dtype, for_expert_sums=True)
    tile = EXPERT_SUMS_TILE if rows.element_size() == 2 else FLOAT32_TILE
    return _sums(_expert_sums_kernel, tile, compressed, rows, (num_experts, H), T, (T, H, num_experts, K))


def _sums(
    kernel: triton.JITFunction,
    tile: Tile,
    compressed: Compressed,
    operand: Tensor,
    shape: tuple[int, int],
    length: int,
    sizes: tuple[int, int, int, int],
) -> Tensor:
    """``length``: how many rows of ``operand`` are summed. Programs too few for the GPU share them out in float32."""
    (R, H), (T, _, E, K), (G, S) = shape, sizes, compressed.slots.shape
    num_programs = cdiv(R, tile.rows) * cdiv(H, tile.columns)
    split = _split(length, num_programs, tile.depth, operand)
    num_splits = max(1, cdiv(length, split))
    out = operand.new_empty(R, H)
    sums = out if num_splits == 1 else operand.new_empty(num_splits, R, H, dtype=torch.float32)
    launch(
        kernel,
        (num_programs, num_splits),
        (compressed.slots, compressed.values, compressed.scales, operand, sums),
        (T, H, E, S, G, K, split),
        tile.rows,
        tile.columns,
        tile.depth,
        H % tile.columns == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        launch(_add_splits_kernel, (cdiv(R * H, ADD_BLOCK),), (sums, out), (R * H, num_splits), ADD_BLOCK, ADD_UNROLL)
    return out


def _split(length: int, num_programs: int, depth: int, operand: Tensor) -> int:
    """Rows that a program sums, in whole steps."""
    multiprocessors = torch.cuda.get_device_properties(operand.device).multi_processor_count if operand.is_cuda else 1
    num_splits = _num_splits(length, num_programs, multiprocessors)
    return depth * max(1, cdiv(length, num_splits * depth))
