"""What memory does at best: the plainest kernels that read a buffer once, or sum rows of a table. Benchmarks' roofs.

R rows of H elements; T sums of K rows each. They compute something only so that nothing is optimised away.
"""

import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv

# (elements a program reads, elements at a time, warps): small programs spread a small buffer over the chip, large ones
# keep more bytes in flight. (rows, elements at a time, warps): likewise. Which is best depends on the size: try all.
READ_CONFIGS = ((1024, 1024, 4), (4096, 1024, 4), (8192, 1024, 4), (16384, 4096, 8))
SUM_CONFIGS = ((4, 128, 1), (8, 128, 1), (2, 256, 1), (1, 1024, 2))


@triton.jit
def _read_once_kernel(data_ptr, sums_ptr, numel, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * CHUNK
    acc = tl.zeros([BLOCK], tl.float32)
    for first in tl.static_range(0, CHUNK, BLOCK):
        offs = start + first + tl.arange(0, BLOCK)
        acc += tl.load(data_ptr + offs, mask=offs < numel, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(acc, 0))


@triton.jit
def _sum_rows_kernel(table_ptr, indices_ptr, out_ptr, H, K, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=4):
        k = start + tl.arange(0, BLOCK_K)
        ids = tl.load(indices_ptr + t * K + k, mask=k < K, other=0).to(tl.int64)
        mask = (k < K)[:, None] & (h < H)[None, :]
        acc += tl.load(table_ptr + ids[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * H + h, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=h < H)


def read_once(data: Tensor, config: tuple[int, int, int]) -> Tensor:
    """The sum of each program's part of the float32 ``data``, for a config of ``READ_CONFIGS``."""
    chunk, block, num_warps = config
    num_programs = cdiv(data.numel(), chunk)
    sums = data.new_empty(num_programs)
    launch(_read_once_kernel, (num_programs,), (data, sums), (data.numel(),), chunk, block, num_warps=num_warps)
    return sums


def sum_rows(table: Tensor, indices: Tensor, config: tuple[int, int, int]) -> Tensor:
    """``out[t] = sum_k table[indices[t, k]]`` in the table's dtype, for a config of ``SUM_CONFIGS``."""
    (T, K), H = indices.shape, table.shape[1]
    block_k, block_h, num_warps = config
    out = table.new_empty(T, H)
    # Tokens first: all take their sums over one slice of columns before the next, which helps a cache to hold it.
    grid = (T, cdiv(H, block_h))
    launch(_sum_rows_kernel, grid, (table, indices, out), (H, K), block_k, block_h, num_warps=num_warps)
    return out
