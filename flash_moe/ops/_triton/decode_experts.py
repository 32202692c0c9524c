"""The experts' tasks in the kernel of flash_decode: tiles of the two products, and the weighted sum.

H hidden size, I intermediate size, N tokens of one expert. Weights go through tensor cores as ``[rows, columns]`` times
``[columns, N]``: each is read once for all tokens of its expert. Products have a row for each pair t * K + k; a row
begins a cache line, so that no line holds what two programs write at different times.
"""

import triton
import triton.language as tl

from flash_moe._moe_layer import SCALE_BLOCK
from flash_moe.ops._triton.math import activation, dot, dot_apart, round_for, widen

BLOCK_OF_SCALE = tl.constexpr(SCALE_BLOCK)


@triton.jit
def num_scales(R: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr):
    """Of an expert's weights ``[R, C]``, a row or a block each."""
    if SCALE == "block":
        return tl.cdiv(R, BLOCK_OF_SCALE) * tl.cdiv(C, BLOCK_OF_SCALE)
    return R


@triton.jit
def _times(weights, x, sums, scale_ptr, row, column, C: tl.constexpr, SCALE: tl.constexpr):
    """sums + weights @ x; a scale of a block of 128 x 128 goes with each step, one of a row does not."""
    weights = widen(weights, x.dtype)
    if SCALE == "block":
        per_row = (C + BLOCK_OF_SCALE - 1) // BLOCK_OF_SCALE
        scale = tl.load(scale_ptr + row // BLOCK_OF_SCALE * per_row + column // BLOCK_OF_SCALE)
        sums += dot(weights, x, tl.zeros_like(sums)) * scale[:, None]
    elif x.dtype == tl.float32:
        # A sum of thousands of terms, one after another, would be less exact than PyTorch's.
        sums += dot_apart(weights, x)
    else:
        sums = dot(weights, x, sums)
    return sums


@triton.jit
def _first_step(begin, turn, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The column at which a tile begins, before it goes round: each elsewhere.

    Programs that start together would otherwise read the same columns of their rows at the same time, and a row of a
    weight is often a power of two of bytes long: few of the memory's channels would be at work.
    """
    return (begin // ROWS + turn) % ((C + BLOCK - 1) // BLOCK) * BLOCK


@triton.jit
def gate_up(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_scale_ptr,
    activated_ptr,
    begin,
    end,
    tokens,
    rows,
    is_token,
    turn,
    first_up_row,
    STRIDE,
    H: tl.constexpr,
    HIDDEN_ACT: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """act(gate x) * up x for rows ``[begin, end)`` of both."""
    i = begin + tl.arange(0, ROWS)
    row = tl.minimum(i, end - 1)
    gate, up = tl.zeros([ROWS, N], tl.float32), tl.zeros([ROWS, N], tl.float32)
    first = _first_step(begin, turn, H, ROWS, BLOCK_H)
    for _ in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        h = first + tl.arange(0, BLOCK_H)
        mask = (i < end)[:, None] & (h < H)[None, :]
        gate_weights = tl.load(gate_ptr + row[:, None] * H + h[None, :], mask=mask, other=0.0)
        up_weights = tl.load(up_ptr + row[:, None] * H + h[None, :], mask=mask, other=0.0)
        mask = is_token[None, :] & (h < H)[:, None]
        x = tl.load(x_ptr + tokens[None, :] * H + h[:, None], mask=mask, other=0.0)
        gate = _times(gate_weights, x, gate, gate_scale_ptr, row, first, H, SCALE)
        up = _times(up_weights, x, up, gate_scale_ptr, first_up_row + row, first, H, SCALE)
        first = tl.where(first + BLOCK_H < H, first + BLOCK_H, 0)
    if SCALE == "row":
        gate *= tl.load(gate_scale_ptr + row)[:, None]
        up *= tl.load(gate_scale_ptr + first_up_row + row)[:, None]
    activated = round_for(activated_ptr, activation(gate, HIDDEN_ACT) * up)
    mask = (i < end)[:, None] & is_token[None, :]
    tl.store(activated_ptr + rows[None, :] * STRIDE + i[:, None], activated, mask=mask)


@triton.jit
def down(
    down_ptr,
    scale_ptr,
    activated_ptr,
    products_ptr,
    begin,
    end,
    rows,
    is_row,
    pairs,
    is_pair,
    weights,
    turn,
    STRIDE,
    PRODUCT_STRIDE,
    I: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Weighted products of rows ``[begin, end)`` of one expert, in float32, for those columns that are pairs."""
    h = begin + tl.arange(0, ROWS)
    row = tl.minimum(h, end - 1)
    sums = tl.zeros([ROWS, N], tl.float32)
    first = _first_step(begin, turn, I, ROWS, BLOCK_I)
    for _ in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK_I)
        mask = (h < end)[:, None] & (i < I)[None, :]
        down_weights = tl.load(down_ptr + row[:, None] * I + i[None, :], mask=mask, other=0.0)
        mask = is_row[None, :] & (i < I)[:, None]
        # Past the L1 cache, which knows nothing of other multiprocessors' stores.
        at = activated_ptr + rows[None, :] * STRIDE + i[:, None]
        activated = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        sums = _times(down_weights, activated, sums, scale_ptr, row, first, I, SCALE)
        first = tl.where(first + BLOCK_I < I, first + BLOCK_I, 0)
    if SCALE == "row":
        sums *= tl.load(scale_ptr + row)[:, None]
    mask = (h < end)[:, None] & is_pair[None, :]
    tl.store(products_ptr + pairs[None, :] * PRODUCT_STRIDE + h[:, None], sums * weights[None, :], mask=mask)


@triton.jit
def combine(
    products_ptr,
    weights_ptr,
    out_ptr,
    begin,
    end,
    first_token,
    end_token,
    T,
    PRODUCT_STRIDE,
    H: tl.constexpr,
    K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Output columns ``[begin, end)``: a token's pairs, best first, then the shared expert."""
    t, h = first_token + tl.arange(0, TOKENS), begin + tl.arange(0, COLUMNS)
    mask = (t < end_token)[:, None] & (h < end)[None, :]
    out = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for k in tl.static_range(K):
        at = products_ptr + (t * K + k)[:, None] * PRODUCT_STRIDE + h[None, :]
        out += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    if HAS_SHARED:
        weights = tl.load(weights_ptr + t, mask=t < end_token, other=0.0, cache_modifier=".cg")
        at = products_ptr + (T * K + t)[:, None] * PRODUCT_STRIDE + h[None, :]
        out += weights[:, None] * tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + t[:, None] * H + h[None, :], round_for(out_ptr, out), mask=mask)
