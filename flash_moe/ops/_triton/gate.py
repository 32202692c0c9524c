"""The router's gate: the statistics of BatchNorm, the product of normalised tokens and gate, and its backward.

T tokens, H hidden size, C = 2 N logits a token. Contiguous x [T, H], weight [C, H], logits [T, C]; sums are in float32
and in a fixed order. xhat = (x - mean) * rstd is made from x wherever it is needed, and like a BatchNorm's output it is
rounded to the dtype of x before a product:
  statistics  mean and variance of every column of x, in one launch
  forward     logits = xhat @ weight^T, in one launch
  backward    three launches: dweight = dlogits^T @ xhat by splits of the tokens; the sum of the splits, and shift and
              slope; dx = rstd * (dxhat - shift - xhat * slope), where dxhat = dlogits @ weight
Shift and slope [H] are the means over t of dxhat and of dxhat * xhat. They come from the weights' gradient, before
anybody knows dxhat: sum_t dxhat = sum_c weight[c] * sum_t dlogits[t, c], sum_t dxhat * xhat = sum_c weight[c] *
dweight[c]. Neither xhat nor dxhat, both [T, H], is ever in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.launch import FLOAT32_TILE, Tile
from flash_moe.ops._triton.math import dot, reciprocal_root, round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

# A program takes few columns, and as a rule all tokens: no partial sums to combine, no counter of arrivals to clear.
# Where that gives too few programs to keep memory busy, tokens are cut into chunks of at least STATISTICS_MIN_CHUNK.
# Stages are of 16-bit tokens: 4 KB each, on their way at once. On an H200 at T 4096, H 1024, in bf16, 10.7 us; with
# 16 columns, half as many programs and whole sectors, 12.5, and in two chunks of tokens 11.8.
STATISTICS_BLOCK_H, STATISTICS_BLOCK_T = 8, 256
STATISTICS_WARPS, STATISTICS_STAGES = 16, 12
STATISTICS_PROGRAMS, STATISTICS_MIN_CHUNK = 96, 1024

# Up to this many tokens a program takes one of them and few columns, so that the weights come through many SMs at once.
FEW_TOKENS = 16
FEW_BLOCK_H, FEW_WARPS = 1024, 4
# Largest first: the first of which there are MIN_PROGRAMS or more, else the last. float32 does without tensor cores. On
# an H200 at H 1024, N 128, in bf16, the forward takes 8 us on up to 256 tokens, 14 on 4096, 31 on 16,384.
MIN_PROGRAMS = 96
FORWARD_TILES = (
    Tile(128, 256, 64, 8, 4), Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3), Tile(64, 64, 128, 4, 3),
    Tile(64, 32, 128, 4, 3), Tile(32, 32, 128, 4, 3), Tile(16, 32, 128, 4, 3), Tile(16, 16, 256, 2, 3),
)  # fmt: skip
DX_TILES = (Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3))
DWEIGHT_TILE = Tile(128, 128, 64, 8, 3)
# Splits of the tokens: as many as fill an H200, of 132 SMs, once, but none of fewer tokens than MIN_SPLIT.
SPLIT_PROGRAMS, MIN_SPLIT = 128, 256
# A program adds up to ADD_UNROLL splits at a time, all of them on their way at once.
ADD_BLOCK_C, ADD_BLOCK_H, ADD_BLOCK_S, ADD_UNROLL, ADD_WARPS = 256, 8, 32, 8, 8


@triton.jit
def _moments(x_ptr, h, H, num_rows, BLOCK_T: tl.constexpr, NUM_STAGES: tl.constexpr):
    """Mean, and sum of squared differences from it, of columns ``h`` of the ``num_rows`` rows from ``x_ptr`` on.

    Each of BLOCK_T lanes takes every BLOCK_T-th row and moves its mean row by row; then the lanes are combined. No
    large sum is ever subtracted from another, so tokens may be far from zero.
    """
    lane = tl.arange(0, BLOCK_T)
    offs = lane.to(tl.int64)[:, None] * H + h[None, :]
    lane_mean = tl.zeros([BLOCK_T, h.shape[0]], tl.float32)
    lane_squares = tl.zeros([BLOCK_T, h.shape[0]], tl.float32)
    for step in tl.range(0, tl.cdiv(num_rows, BLOCK_T), num_stages=NUM_STAGES):
        mask = (step * BLOCK_T + lane < num_rows)[:, None] & (h < H)[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        delta = tl.where(mask, x - lane_mean, 0.0)
        lane_mean += delta * (1.0 / (step + 1))
        lane_squares += delta * (x - lane_mean)
        offs += BLOCK_T * H
    count = ((num_rows - lane + BLOCK_T - 1) // BLOCK_T).to(tl.float32)[:, None]
    return _combine(lane_mean, lane_squares, count, num_rows)


@triton.jit
def _combine(means, squares, count, num_rows):
    """The moments of all rows, from those of parts with ``count [parts, 1]`` rows each (Chan's formula)."""
    mean = tl.sum(means * count, 0) / num_rows
    delta = means - mean[None, :]
    rest = tl.sum(delta * count, 0)  # what rounding took from the mean
    return mean + rest / num_rows, tl.sum(squares + delta * delta * count, 0) - rest * rest / num_rows


@triton.jit
def _statistics_kernel(
    x_ptr,
    mean_ptr,
    variance_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    partials_ptr,
    arrivals_ptr,
    T,
    H,
    CHUNK,
    num_chunks,
    momentum,
    IS_UPDATE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Columns by program_id(0), chunks of tokens by program_id(1); the last chunk to arrive combines them all."""
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    chunk = tl.program_id(1)
    first_t = chunk * CHUNK
    num_rows = tl.minimum(CHUNK, T - first_t)
    mean, squares = _moments(x_ptr + first_t.to(tl.int64) * H, h, H, num_rows, BLOCK_T, NUM_STAGES)
    is_last = chunk == num_chunks - 1
    if MAX_CHUNKS > 1:
        tl.store(partials_ptr + 2 * chunk * H + h, mean, mask=h < H)
        tl.store(partials_ptr + (2 * chunk + 1) * H + h, squares, mask=h < H)
        tl.debug_barrier()  # every thread has stored its part before the program arrives
        arrived = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel")
        is_last = arrived == num_chunks - 1
        if is_last:
            part = tl.arange(0, MAX_CHUNKS)
            mask = (part < num_chunks)[:, None] & (h < H)[None, :]
            offs = 2 * part[:, None] * H + h[None, :]
            # Past the L1 cache, which knows nothing of other multiprocessors' stores.
            means = tl.load(partials_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")
            part_squares = tl.load(partials_ptr + offs + H, mask=mask, other=0.0, cache_modifier=".cg")
            count = tl.maximum(tl.minimum(T - part * CHUNK, CHUNK), 0).to(tl.float32)[:, None]
            mean, squares = _combine(means, part_squares, count, T)
    if is_last:
        tl.store(mean_ptr + h, mean, mask=h < H)
        tl.store(variance_ptr + h, squares / T, mask=h < H)
        if IS_UPDATE:
            running_mean = tl.load(running_mean_ptr + h, mask=h < H, other=0.0).to(tl.float32)
            running_var = tl.load(running_var_ptr + h, mask=h < H, other=0.0).to(tl.float32)
            running_mean = (1.0 - momentum) * running_mean + momentum * mean
            running_var = (1.0 - momentum) * running_var + momentum * (squares / (T - 1))
            tl.store(running_mean_ptr + h, round_for(running_mean_ptr, running_mean), mask=h < H)
            tl.store(running_var_ptr + h, round_for(running_var_ptr, running_var), mask=h < H)
            if tl.program_id(0) == 0:
                tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)


@triton.jit
def load_norm(mean_ptr, variance_ptr, h, H, eps):
    mean = tl.load(mean_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    variance = tl.load(variance_ptr + h, mask=h < H, other=1.0).to(tl.float32)
    return mean, reciprocal_root(variance + eps)


@triton.jit
def _few_fwd_kernel(
    x_ptr,
    weight_ptr,
    mean_ptr,
    variance_ptr,
    logits_ptr,
    T,
    H,
    C,
    eps,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_C logits of one token."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1)
    acc = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    for first_h in range(0, H, BLOCK_H):
        h = first_h + tl.arange(0, BLOCK_H)
        mask = (c < C)[:, None] & (h < H)[None, :]
        weight = tl.load(weight_ptr + c.to(tl.int64)[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
        mean, rstd = load_norm(mean_ptr, variance_ptr, h, H, eps)
        xhat = round_for(x_ptr, (x - mean) * rstd).to(tl.float32)
        acc += weight * xhat[None, :]
    tl.store(logits_ptr + t * C + c, round_for(logits_ptr, tl.sum(acc, 1)), mask=c < C)


@triton.jit
def _fwd_kernel(
    x_ptr,
    weight_ptr,
    mean_ptr,
    variance_ptr,
    logits_ptr,
    T,
    H,
    C,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    column_blocks = tl.cdiv(C, BLOCK_C)
    t = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    mean, rstd = load_norm(mean_ptr, variance_ptr, tl.arange(0, BLOCK_H), H, eps)
    for first_h in range(0, H, BLOCK_H):
        h = first_h + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=(t < T)[:, None] & (h < H)[None, :], other=0.0)
        offs = c.to(tl.int64)[:, None] * H + h[None, :]
        weight = tl.load(weight_ptr + offs, mask=(c < C)[:, None] & (h < H)[None, :], other=0.0)
        # The next columns', a step ahead: what is no product's operand Triton loads where it stands, and waits for it.
        next_mean, next_rstd = load_norm(mean_ptr, variance_ptr, h + BLOCK_H, H, eps)
        xhat = round_for(x_ptr, (x.to(tl.float32) - mean[None, :]) * rstd[None, :])
        acc = dot(xhat, tl.trans(weight), acc)
        mean, rstd = next_mean, next_rstd
    mask = (t < T)[:, None] & (c < C)[None, :]
    tl.store(logits_ptr + t[:, None] * C + c[None, :], round_for(logits_ptr, acc), mask=mask)


@triton.jit
def _dweight_kernel(
    dlogits_ptr,
    x_ptr,
    mean_ptr,
    variance_ptr,
    partials_ptr,
    logit_sums_ptr,
    T,
    H,
    C,
    SPLIT,
    eps,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """partials[split] = dlogits^T @ xhat over the split's tokens. Programs of a split share out the sum of dlogits."""
    column_blocks = tl.cdiv(H, BLOCK_H)
    column_block = tl.program_id(0) % column_blocks
    c = tl.program_id(0) // column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    h = column_block * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    first_t = split * SPLIT
    end_t = tl.minimum(first_t + SPLIT, T)
    if logit_sums_ptr is not None:
        logit_sum = tl.zeros([BLOCK_C], tl.float32)
        for t0 in range(first_t + column_block * BLOCK_T, end_t, column_blocks * BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
            mask = (t < T)[:, None] & (c < C)[None, :]
            dlogits = tl.load(dlogits_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0)
            logit_sum += tl.sum(dlogits.to(tl.float32), 0)
        tl.store(logit_sums_ptr + (split * column_blocks + column_block) * C + c, logit_sum, mask=c < C)
    mean, rstd = load_norm(mean_ptr, variance_ptr, h, H, eps)
    acc = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    for t0 in range(first_t, end_t, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
        dlogits = tl.load(
            dlogits_ptr + t[:, None] * C + c[None, :], mask=(t < T)[:, None] & (c < C)[None, :], other=0.0
        )
        x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=(t < T)[:, None] & (h < H)[None, :], other=0.0)
        xhat = round_for(x_ptr, (x.to(tl.float32) - mean[None, :]) * rstd[None, :])
        acc = dot(tl.trans(dlogits), xhat, acc)
    offs = (split.to(tl.int64) * C + c)[:, None] * H + h[None, :]
    tl.store(partials_ptr + offs, acc, mask=(c < C)[:, None] & (h < H)[None, :])


@triton.jit
def _add_splits_kernel(
    partials_ptr,
    logit_sums_ptr,
    weight_ptr,
    dweight_ptr,
    shift_ptr,
    T,
    H,
    C,
    num_sums,
    num_splits,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """dweight, the sum of the splits; and for BatchNorm shift and slope of some columns, one after the other.

    What is loaded past the last split is 0, and the sum, which starts at 0, keeps its bits.
    """
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    shift = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    slope = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    for first_c in range(0, C, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & (h < H)[None, :]
        offs = c.to(tl.int64)[:, None] * H + h[None, :]
        dweight = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
        for first_split in range(0, num_splits, UNROLL):
            for i in tl.static_range(UNROLL):
                split = first_split + i
                partials = partials_ptr + tl.cast(H, tl.int64) * C * split + offs
                dweight += tl.load(partials, mask=mask & (split < num_splits), other=0.0)
        tl.store(dweight_ptr + offs, round_for(dweight_ptr, dweight), mask=mask)
        if shift_ptr is not None:
            logit_sum = tl.zeros([BLOCK_C], tl.float32)
            for first_s in range(0, num_sums, BLOCK_S):
                s = first_s + tl.arange(0, BLOCK_S)
                sums = logit_sums_ptr + s[None, :] * C + c[:, None]
                logit_sum += tl.sum(tl.load(sums, mask=(s < num_sums)[None, :] & (c < C)[:, None], other=0.0), 1)
            weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            shift += weight * logit_sum[:, None]
            slope += weight * dweight
    if shift_ptr is not None:
        tl.store(shift_ptr + h, tl.sum(shift, 0) / T, mask=h < H)
        tl.store(shift_ptr + H + h, tl.sum(slope, 0) / T, mask=h < H)


@triton.jit
def _dx_kernel(
    dlogits_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    variance_ptr,
    shift_ptr,
    dx_ptr,
    T,
    H,
    C,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_blocks = tl.cdiv(H, BLOCK_H)
    t = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(0) % column_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    offs = t[:, None] * H + h[None, :]
    mask = (t < T)[:, None] & (h < H)[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for first_c in range(0, C, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        dlogits = tl.load(
            dlogits_ptr + t[:, None] * C + c[None, :], mask=(t < T)[:, None] & (c < C)[None, :], other=0.0
        )
        weight_offs = c.to(tl.int64)[:, None] * H + h[None, :]
        weight = tl.load(weight_ptr + weight_offs, mask=(c < C)[:, None] & (h < H)[None, :], other=0.0)
        acc = dot(dlogits, weight, acc)
    mean, rstd = load_norm(mean_ptr, variance_ptr, h, H, eps)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + h, mask=h < H, other=0.0)
        slope = tl.load(shift_ptr + H + h, mask=h < H, other=0.0)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        acc -= shift[None, :] + (x - mean[None, :]) * (rstd * slope)[None, :]
    tl.store(dx_ptr + offs, round_for(dx_ptr, acc * rstd[None, :]), mask=mask)


def batch_norm_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
    is_update: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[H]`` of the columns, float32; with ``is_update`` the buffers move as nn.BatchNorm1d's do."""
    T, H = x.shape
    mean, variance = (torch.empty(H, dtype=torch.float32, device=x.device) for _ in range(2))
    column_blocks = cdiv(H, STATISTICS_BLOCK_H)
    chunk = _chunk(T, column_blocks)
    num_chunks = cdiv(T, chunk)
    partials, arrivals = None, None
    if num_chunks > 1:
        partials = mean.new_empty(num_chunks, 2, H)
        arrivals = torch.zeros(column_blocks, dtype=torch.int32, device=x.device)
    block_t = min(STATISTICS_BLOCK_T, next_power_of_2(T))
    launch(
        _statistics_kernel,
        (column_blocks, num_chunks),
        (x, mean, variance, running_mean, running_var, num_batches_tracked, partials, arrivals),
        (T, H, chunk, num_chunks, momentum),
        is_update,
        next_power_of_2(num_chunks),
        block_t,
        STATISTICS_BLOCK_H,
        max(1, STATISTICS_STAGES * 2 // x.element_size()),
        num_warps=max(1, STATISTICS_WARPS * block_t // STATISTICS_BLOCK_T),
    )
    return mean, variance


def gate_forward(x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    (T, H), (C, _) = x.shape, weight.shape
    logits = x.new_empty(T, C)
    tensors = (x, weight, mean, variance, logits)
    if T <= FEW_TOKENS:
        block_c = max(2, next_power_of_2(T) // 2)
        block_h = min(FEW_BLOCK_H, next_power_of_2(H))
        grid = (cdiv(C, block_c), T)
        launch(_few_fwd_kernel, grid, tensors, (T, H, C, eps), block_c, block_h, num_warps=FEW_WARPS)
    else:
        tile = _tile(FORWARD_TILES, x, T, C)
        launch(
            _fwd_kernel,
            (_num_programs(tile, T, C),),
            tensors,
            (T, H, C, eps),
            tile.rows,
            tile.columns,
            tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return logits


def gate_backward(
    grad_logits: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    is_batch: bool,
) -> tuple[Tensor, Tensor]:
    """``dx`` and ``dweight``; with ``is_batch`` mean and variance are those of x, whose gradient goes through them."""
    dweight, shift = gate_backward_weight(grad_logits, x, weight, mean, variance, eps, is_batch)
    dx = gate_backward_tokens(grad_logits, x, weight, mean, variance, eps, shift)
    return dx, dweight


def gate_backward_weight(
    grad_logits: Tensor, x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float, is_batch: bool
) -> tuple[Tensor, Tensor | None]:
    """``dweight``, and with ``is_batch`` shift and slope ``[2, H]``."""
    (T, H), (C, _) = x.shape, weight.shape
    tile = FLOAT32_TILE if x.dtype == torch.float32 else DWEIGHT_TILE
    num_programs = _num_programs(tile, C, H)
    num_splits = max(1, min(SPLIT_PROGRAMS // num_programs, T // MIN_SPLIT))
    split = cdiv(cdiv(T, num_splits), tile.depth) * tile.depth
    num_splits = cdiv(T, split)
    num_sums = num_splits * cdiv(H, tile.columns)
    dweight = torch.empty_like(weight)
    partials = torch.empty(num_splits, C, H, dtype=torch.float32, device=x.device)
    logit_sums = partials.new_empty(num_sums, C) if is_batch else None
    shift = partials.new_empty(2, H) if is_batch else None
    launch(
        _dweight_kernel,
        (num_programs, num_splits),
        (grad_logits, x, mean, variance, partials, logit_sums),
        (T, H, C, split, eps),
        tile.rows,
        tile.columns,
        tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    launch(
        _add_splits_kernel,
        (cdiv(H, ADD_BLOCK_H),),
        (partials, logit_sums, weight, dweight, shift),
        (T, H, C, num_sums, num_splits),
        ADD_BLOCK_C,
        ADD_BLOCK_H,
        ADD_BLOCK_S,
        ADD_UNROLL,
        num_warps=ADD_WARPS,
    )
    return dweight, shift


def gate_backward_tokens(
    grad_logits: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    shift: Tensor | None,
) -> Tensor:
    (T, H), (C, _) = x.shape, weight.shape
    tile = _tile(DX_TILES, x, T, H)
    dx = torch.empty_like(x)
    launch(
        _dx_kernel,
        (_num_programs(tile, T, H),),
        (grad_logits, x, weight, mean, variance, shift, dx),
        (T, H, C, eps),
        tile.rows,
        tile.columns,
        tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dx


def _chunk(T: int, column_blocks: int) -> int:
    """Tokens that a program of the statistics takes."""
    num_chunks = max(1, min(STATISTICS_PROGRAMS // column_blocks, T // STATISTICS_MIN_CHUNK))
    return cdiv(T, num_chunks)


def _num_programs(tile: Tile, rows: int, columns: int) -> int:
    return cdiv(rows, tile.rows) * cdiv(columns, tile.columns)


def _tile(tiles: tuple[Tile, ...], x: Tensor, rows: int, columns: int) -> Tile:
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    return next((tile for tile in tiles if _num_programs(tile, rows, columns) >= MIN_PROGRAMS), tiles[-1])
