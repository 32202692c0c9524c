"""The dense gated MLP on few tokens, in two launches: each weight is read once, and that is all the time it takes.

T tokens, H hidden size, I intermediate size. Tensor cores multiply tokens of 16 bits, with float32 sums; between the
two the gated product is rounded to the tokens' dtype. Contiguous tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.launch import Tile
from flash_moe.ops._triton.math import activation, dot, round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

# On an H200 at H 1024, I 4096 64 tokens take 8 and 5.5 us, where two products of cuBLAS and the pointwise kernel take
# 15 and the third product 9; with 32 to 256 in depth and half of the columns up to a quarter longer.
MAX_FEW_TOKENS = 64
# Of a tile, which are tokens: no fewer than tensor cores take, and no more than are needed.
MIN_ROWS = 16
GATED_TILE, PARTS_TILE = Tile(MAX_FEW_TOKENS, 32, 128, 4, 4), Tile(MAX_FEW_TOKENS, 32, 128, 4, 4)
# Programs that keep an H200's memory busy. A part is of MIN_PART columns of ``down_proj`` or more.
NUM_PROGRAMS, MIN_PART = 256, 512


@triton.jit
def _gated_kernel(
    x_ptr,
    gate_proj_ptr,
    up_proj_ptr,
    out_ptr,
    T,
    H,
    I,
    HIDDEN_ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out [T, I] = act(x gate_proj^T) * (x up_proj^T)."""
    t = tl.arange(0, BLOCK_T)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    gate = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    for first_h in range(0, H, BLOCK_H):
        h = first_h + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=(t < T)[:, None] & (h < H)[None, :], other=0.0)
        offs = i.to(tl.int64)[:, None] * H + h[None, :]
        mask = (i < I)[:, None] & (h < H)[None, :]
        gate = dot(x, tl.trans(tl.load(gate_proj_ptr + offs, mask=mask, other=0.0)), gate)
        up = dot(x, tl.trans(tl.load(up_proj_ptr + offs, mask=mask, other=0.0)), up)
    mask = (t < T)[:, None] & (i < I)[None, :]
    tl.store(out_ptr + t[:, None] * I + i[None, :], round_for(out_ptr, activation(gate, HIDDEN_ACT) * up), mask=mask)


@triton.jit
def _parts_kernel(
    activated_ptr,
    down_proj_ptr,
    parts_ptr,
    T,
    I,
    H,
    PART,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """parts[p] [T, H] = activated down_proj^T over the PART columns from p * PART on."""
    t = tl.arange(0, BLOCK_T)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * PART, I)
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for first_i in range(part * PART, end, BLOCK_I):
        i = first_i + tl.arange(0, BLOCK_I)
        mask = (t < T)[:, None] & (i < end)[None, :]
        activated = tl.load(activated_ptr + t[:, None] * I + i[None, :], mask=mask, other=0.0)
        offs = h.to(tl.int64)[:, None] * I + i[None, :]
        down_proj = tl.load(down_proj_ptr + offs, mask=(h < H)[:, None] & (i < end)[None, :], other=0.0)
        acc = dot(activated, tl.trans(down_proj), acc)
    mask = (t < T)[:, None] & (h < H)[None, :]
    tl.store(parts_ptr + part.to(tl.int64) * T * H + t[:, None] * H + h[None, :], acc, mask=mask)


def takes_few(x: Tensor, *weights: Tensor) -> bool:
    """Whether these launches are for tokens and weights like these."""
    is_few = 0 < x.shape[0] <= MAX_FEW_TOKENS and x.dtype in (torch.float16, torch.bfloat16)
    return is_few and all(y.is_contiguous() for y in (x, *weights))


def gated_product_of_few(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    """``[T, I]``, of tokens that ``takes_few`` takes."""
    (T, H), I, tile = x.shape, gate_proj.shape[0], GATED_TILE
    out = x.new_empty(T, I)
    launch(
        _gated_kernel,
        (cdiv(I, tile.columns),),
        (x, gate_proj, up_proj, out),
        (T, H, I),
        hidden_act,
        _rows(T),
        tile.columns,
        tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def down_product_in_parts(activated: Tensor, down_proj: Tensor) -> Tensor:
    """``[P, T, H]``, float32, the sum of which over P is the product: in parts more programs read at once."""
    (T, I), H, tile = activated.shape, down_proj.shape[0], PARTS_TILE
    num_programs = cdiv(H, tile.columns)
    num_parts = max(1, min(NUM_PROGRAMS // num_programs, I // MIN_PART))
    part = cdiv(cdiv(I, num_parts), tile.depth) * tile.depth
    num_parts = cdiv(I, part)
    parts = activated.new_empty(num_parts, T, H, dtype=torch.float32)
    launch(
        _parts_kernel,
        (num_programs, num_parts),
        (activated, down_proj, parts),
        (T, I, H, part),
        _rows(T),
        tile.columns,
        tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return parts


def _rows(num_tokens: int) -> int:
    return max(MIN_ROWS, next_power_of_2(num_tokens))
