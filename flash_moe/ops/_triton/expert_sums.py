"""Both tables' gradients: each expert's sum of coefficient * row over its pairs, which are sorted by expert.

T tokens, H hidden size, K experts per token, P = T * K pairs, G groups: the pairs of one expert each. One program adds
a group's pairs in their order. Those of a hot expert, a group longer than a hot tile, are cut at the multiples of the
tile: a program sums each piece, and whichever is the last to arrive adds the pieces in order. No floating-point
number is added atomically, so the bits are the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.grouping import Groups
from flash_moe.ops._triton.launch import tile_config
from flash_moe.ops._triton.math import round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

# On an H200 at T 4096, H 1024, bf16, K 64, E 16384 one row load at a time is as fast as several: 7.5 TB/s, counted per
# row used. Many pairs want narrower tiles: at T 16384, E 102400, K 512 4.6 ms instead of 5.7.
# A tile of H / 16 pairs keeps the float32 sums of tiles at 32 numbers a pair; a group of twice the mean is not hot.
MIN_HOT_TILE = 64
TILE_UNROLL = tl.constexpr(2)


@triton.jit
def _expert_sums_kernel(
    x_ptr,
    dout_ptr,
    dpre_activations_ptr,
    coefficients_ptr,
    keys_ptr,
    order_ptr,
    offsets_ptr,
    partials_ptr,
    arrivals_ptr,
    ddown_ptr,
    dup_ptr,
    H,
    K,
    num_tiles,
    log_tile,
    FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of a hot group's tiles, the first ``num_tiles`` programs; ddown[g] and dup[g] of the rest by one program each.

    A tile's sum is over the pairs of its first pair's group: those in the tile, and those before it where no other
    tile begins within the group. The last tile to arrive adds up all of its group. Tiles come first: they take longest.
    """
    program = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_tile = program < num_tiles
    g = program - num_tiles
    if is_tile:
        g = tl.load(keys_ptr + (program << log_tile)).to(tl.int64) - FIRST
    start = tl.load(offsets_ptr + g).to(tl.int64)
    end = tl.load(offsets_ptr + g + 1).to(tl.int64)
    hot_tile = 1 << log_tile
    if (end - start > hot_tile) == is_tile:
        first_tile, last_tile = (start + hot_tile - 1) >> log_tile, (end + hot_tile - 1) >> log_tile
        if is_tile:
            start = tl.where(program == first_tile, start, program << log_tile)
            end = tl.minimum((program << log_tile) + hot_tile, end)
        ddown = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
        dup = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
        # Both at once: the pairs' numbers are read once, and twice as many bytes are in flight behind them.
        for first in tl.range(start, end, BLOCK_P, loop_unroll_factor=UNROLL):
            p = first + tl.arange(0, BLOCK_P)
            pair = tl.load(order_ptr + p, mask=p < end, other=0).to(tl.int32)
            ds = tl.load(dpre_activations_ptr + pair, mask=p < end, other=0.0)
            coefficients = tl.load(coefficients_ptr + pair, mask=p < end, other=0.0)
            mask = (p < end)[:, None] & (h < H)[None, :]
            offs = (pair // K).to(tl.int64)[:, None] * H + h[None, :]
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            ddown += ds[:, None] * x
            dup += coefficients[:, None] * dout
        ddown_sum, dup_sum = tl.sum(ddown, 0), tl.sum(dup, 0)
        is_last = program >= num_tiles  # no tile
        if is_tile:
            tl.store(partials_ptr + 2 * program * H + h, ddown_sum, mask=h < H)
            tl.store(partials_ptr + (2 * program + 1) * H + h, dup_sum, mask=h < H)
            tl.debug_barrier()  # every thread has stored its part before the program arrives
            arrived = tl.atomic_add(arrivals_ptr + tl.program_id(1) * num_tiles + first_tile, 1, sem="acq_rel")
            is_last = arrived == last_tile - first_tile - 1
            if is_last:
                ddown_sum = tl.zeros_like(ddown_sum)
                dup_sum = tl.zeros_like(dup_sum)
                for tile in tl.range(first_tile, last_tile, loop_unroll_factor=TILE_UNROLL):
                    # Past the L1 cache, which knows nothing of other multiprocessors' stores.
                    partials = partials_ptr + 2 * tile * H + h
                    ddown_sum += tl.load(partials, mask=h < H, other=0.0, cache_modifier=".cg")
                    dup_sum += tl.load(partials + H, mask=h < H, other=0.0, cache_modifier=".cg")
        if is_last:
            tl.store(ddown_ptr + g * H + h, round_for(ddown_ptr, ddown_sum), mask=h < H)
            tl.store(dup_ptr + g * H + h, round_for(dup_ptr, dup_sum), mask=h < H)


def expert_sums(
    grad_out: Tensor, hidden_states: Tensor, dpre_activations: Tensor, coefficients: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """``ddown`` and ``dup [G, H]``, a row for each group; an empty one gets zeros."""
    (P,), H, K = groups.order.shape, hidden_states.shape[1], coefficients.shape[1]
    num_groups = groups.offsets.numel() - 1
    ddown, dup = (hidden_states.new_empty(num_groups, H) for _ in range(2))
    hot_tile = _hot_tile(P, num_groups, H)
    num_tiles = cdiv(P, hot_tile) if P > hot_tile else 0
    partials = ddown.new_empty(num_tiles, 2, H, dtype=torch.float32)
    config = tile_config("expert_sums", ddown, coefficients, H)
    num_slices = cdiv(H, config["BLOCK_H"])
    arrivals = torch.zeros(num_slices, num_tiles, dtype=torch.int32, device=ddown.device)
    launch(
        _expert_sums_kernel,
        (num_tiles + num_groups, num_slices),
        (hidden_states, grad_out, dpre_activations, coefficients, *groups[:3], partials, arrivals, ddown, dup),
        (H, K, num_tiles, hot_tile.bit_length() - 1),
        groups.first,
        **config,
    )
    return ddown, dup


def _hot_tile(num_pairs: int, num_groups: int, H: int) -> int:
    """Pairs, a power of two: the kernel, to which it is a number like any other, divides by shifts."""
    twice_the_mean = cdiv(2 * num_pairs, max(1, num_groups))
    return max(MIN_HOT_TILE, next_power_of_2(H) // 16, next_power_of_2(twice_the_mean))
