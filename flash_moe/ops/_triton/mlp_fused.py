"""The gated MLP up to its last product in one launch, act(x gate_proj^T) * (x up_proj^T), on Hopper's tensor cores.

T tokens, H hidden size, I intermediate size; contiguous x [T, H], gate_proj and up_proj [I, H], out [T, I]. Both
products take the same rows of x, which are fetched once, and their float32 sums meet in registers: only their product
is rounded. There is no gradient: for one, gate and up would have to be kept, and that takes as long as two products.

Tiles come and go by tensor descriptors: the hardware makes the addresses, reads zeros beyond an edge and writes nothing
there, so that sizes need not be multiples of a tile.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_moe.ops._triton.launch import Tile, is_forced
from flash_moe.ops._triton.math import activation, dot, rounded
from flash_moe.ops._triton.mlp import gated_activation_forward
from flash_moe.ops._triton.mlp_few import gated_product_of_few, takes_few
from flash_moe.ops._triton.relaunch import ALIGNMENT, launch
from flash_moe.ops._triton.sizes import cdiv

# Two programs an SM, of at most 128 registers a thread: one multiplies while the other one stores. On an H200 at
# T 4096, H 1024, I 4096 this takes four fifths of the time of two products of cuBLAS and the pointwise kernel; with
# four warps, or with 128 columns of each weight and one program an SM, it takes longer.
TILE = Tile(128, 64, 64, 8, 3)
PROGRAMS_PER_SM = 2
# Tiles of so many rows go one after another down a column: weights of a wave of programs stay in the L2 cache.
GROUP = 8
# Fewer go the way of few tokens; float32, and other GPUs, take three kernels.
MIN_TOKENS = 65
# Compute capability. Only there have these tiles been measured; tensor cores of others want their operands otherwise.
HOPPER = (9, 0)


@triton.jit
def _gated(gate, up, HIDDEN_ACT: tl.constexpr):
    # One division in place of a sigmoid's and a product: tensor cores wait for what is done here.
    if HIDDEN_ACT == "silu":
        return gate * up / (1.0 + tl.exp2(gate * -1.4426950408889634))
    return activation(gate, HIDDEN_ACT) * up


@triton.jit(do_not_specialize=["T", "H", "I"])
def _gated_product_kernel(
    x_desc,
    gate_proj_desc,
    up_proj_desc,
    out_desc,
    T,
    H,
    I,
    HIDDEN_ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_rows, num_columns = tl.cdiv(T, BLOCK_T), tl.cdiv(I, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_rows * num_columns, tl.num_programs(0)):
        group = tile // (GROUP * num_columns)
        within = tile - group * (GROUP * num_columns)
        height = tl.minimum(num_rows - group * GROUP, GROUP)
        t = (group * GROUP + within % height) * BLOCK_T
        i = within // height * BLOCK_I
        gate = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
        up = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
        for h in tl.range(0, H, BLOCK_H):
            # All three before the first product: one barrier waits for them.
            x, gate_proj, up_proj = x_desc.load([t, h]), gate_proj_desc.load([i, h]), up_proj_desc.load([i, h])
            gate = dot(x, gate_proj.T, gate)
            up = dot(x, up_proj.T, up)
        out_desc.store([t, i], rounded(_gated(gate, up, HIDDEN_ACT), out_desc.dtype))


def gated_product_forward(x: Tensor, gate_proj: Tensor, up_proj: Tensor, hidden_act: str) -> Tensor:
    """``[T, I]``; few tokens, and what ``takes`` does not take, go other ways."""
    (T, H), I = x.shape, gate_proj.shape[0]
    is_few = takes_few(x, gate_proj, up_proj)
    if is_forced("gated_forward") or not (is_few or takes(x, gate_proj, up_proj)):
        gate, up = torch.mm(x, gate_proj.t()), torch.mm(x, up_proj.t())
        return gated_activation_forward(gate, up, hidden_act, out=gate)
    if is_few:
        return gated_product_of_few(x, gate_proj, up_proj, hidden_act)
    out = x.new_empty(T, I)
    tokens = TensorDescriptor(x, [T, H], [H, 1], [TILE.rows, TILE.depth])
    weights = (TensorDescriptor(w, [I, H], [H, 1], [TILE.columns, TILE.depth]) for w in (gate_proj, up_proj))
    result = TensorDescriptor(out, [T, I], [I, 1], [TILE.rows, TILE.columns])
    launch(
        _gated_product_kernel,
        (min(cdiv(T, TILE.rows) * cdiv(I, TILE.columns), _num_programs(x.device)),),
        (tokens, *weights, result),
        (T, H, I),
        hidden_act,
        TILE.rows,
        TILE.columns,
        TILE.depth,
        GROUP,
        num_warps=TILE.num_warps,
        num_stages=TILE.num_stages,
    )
    return out


def takes(x: Tensor, gate_proj: Tensor, up_proj: Tensor) -> bool:
    """Whether one launch does it: many tokens of 16-bit floats, a GPU it is made for, layouts that descriptors have."""
    if x.shape[0] < MIN_TOKENS or x.dtype not in (torch.float16, torch.bfloat16) or not _is_made_for(x.device):
        return False
    row_length = ALIGNMENT // x.element_size()
    return (
        all(size > 0 and size % row_length == 0 for size in gate_proj.shape)
        and all(y.is_contiguous() and y.data_ptr() % ALIGNMENT == 0 for y in (x, gate_proj, up_proj))
        and x.dtype == gate_proj.dtype == up_proj.dtype
    )


@lru_cache
def _is_made_for(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == HOPPER


@lru_cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
