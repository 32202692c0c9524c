"""Pairs grouped by expert, without floating-point atomics and without waiting for the device.

P pairs (token, expert), G groups. Pairs are sorted by expert and number, so their order is the same on every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

# Up to here one program sorts all pairs in one launch.
MAX_SINGLE_TILE = 1024
# int16 holds one more bit than counts from 0 use, at half of int32's passes of a radix sort.
INT16_EXPERTS = 2**16
BLOCK, NUM_PROBES = 256, 4


class Groups(NamedTuple):
    keys: Tensor
    """``[P]``, an integer dtype: the group of each pair, plus ``first``; ascending."""
    order: Tensor
    """``[P]``, int32 or int64: the pairs by expert, and of an expert by number."""
    offsets: Tensor
    """``[G + 1]``, int32: group g is pairs offsets[g] to offsets[g + 1] of ``order``."""
    first: int
    """The key of group 0."""


@triton.jit
def _sort_tile_kernel(ids_ptr, keys_ptr, order_ptr, P, IS_WIDE: tl.constexpr, BLOCK_P: tl.constexpr):
    """All pairs by (id, number), packed into one integer each: 32 bits, or 64 where IS_WIDE."""
    p = tl.arange(0, BLOCK_P)
    ids = tl.load(ids_ptr + p, mask=p < P, other=0)
    packed = ids.to(tl.int64 if IS_WIDE else tl.int32) * BLOCK_P + p
    last = 0x7FFFFFFFFFFFFFFF if IS_WIDE else 0x7FFFFFFF
    packed = tl.sort(tl.where(p < P, packed, last))
    tl.store(keys_ptr + p, (packed // BLOCK_P).to(tl.int32), mask=p < P)
    tl.store(order_ptr + p, (packed % BLOCK_P).to(tl.int32), mask=p < P)


@triton.jit
def _lower_bound(keys_ptr, targets, P, stride, NUM_PROBES: tl.constexpr):
    """For each target the number of keys below it, so the first p with keys[p] >= target, or P.

    NUM_PROBES at a time: what a search costs is its chain of dependent loads. ``stride`` is ``first_stride(P)``.
    """
    probe = tl.arange(0, NUM_PROBES)
    low = targets.to(tl.int64) * 0
    stride = tl.cast(stride, tl.int64)
    while stride > 0:
        last = low[:, None] + stride * (probe[None, :] + 1) - 1
        keys = tl.load(keys_ptr + last, mask=last < P, other=0).to(tl.int32)
        is_less = (last < P) & (probe[None, :] < NUM_PROBES - 1) & (keys < targets[:, None])
        low += stride * tl.sum(is_less.to(tl.int64), 1)
        stride = stride // NUM_PROBES
    return low.to(tl.int32)


@triton.jit
def _offsets_kernel(
    keys_ptr, offsets_ptr, P, G, stride, FIRST: tl.constexpr, BLOCK: tl.constexpr, NUM_PROBES: tl.constexpr
):
    """offsets[g] = the first p with keys[p] >= g + FIRST: by search, so that no long gap falls to one program."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(offsets_ptr + g, _lower_bound(keys_ptr, g + FIRST, P, stride, NUM_PROBES), mask=g <= G)


@triton.jit
def _distinct_kernel(
    numbers_ptr,
    keys_ptr,
    offsets_ptr,
    ids_ptr,
    P,
    G,
    stride,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PROBES: tl.constexpr,
):
    """``_offsets_kernel`` for numbers from 1, and the id of each group; past the last group the ids in turn."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(offsets_ptr + g, _lower_bound(numbers_ptr, g + 1, P, stride, NUM_PROBES), mask=g <= G)
    num_distinct = tl.load(numbers_ptr + P - 1)
    pair = _lower_bound(numbers_ptr, g % num_distinct + 1, P, stride, NUM_PROBES)
    keys = tl.load(keys_ptr + pair, mask=g < G, other=0)
    tl.store(ids_ptr + g, keys.to(tl.int64) - FIRST, mask=g < G)


def first_stride(num_pairs: int) -> int:
    """The power of NUM_PROBES at or below ``num_pairs``."""
    stride = 1
    while stride * NUM_PROBES <= num_pairs:
        stride *= NUM_PROBES
    return stride


def sort_pairs(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, int]:
    """``keys`` and ``order`` as in ``Groups``, and the key of expert 0."""
    if indices.numel() <= MAX_SINGLE_TILE:
        return sort_tile(indices, num_experts)
    return sort_by_torch(indices, num_experts)


def sort_tile(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, int]:
    """``sort_pairs`` of few pairs in one launch."""
    P = indices.numel()
    keys, order = (torch.empty(P, dtype=torch.int32, device=indices.device) for _ in range(2))
    if P > 0:
        block = max(128, next_power_of_2(P))  # few sizes: each compiles once
        is_wide = num_experts * block > 2**31
        launch(_sort_tile_kernel, (1,), (indices, keys, order), (P,), is_wide, block, num_warps=block // 128)
    return keys, order, 0


def sort_by_torch(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, int]:
    """``sort_pairs`` by ``torch.sort``, whose time is that of its keys' bytes.

    A counting sort of only the bits that ids have lost to it everywhere on an H200: 1340 us against 435 at 8.4 million
    pairs of 102,400 experts, 137 against 74 at 524,288 pairs of a million.
    """
    is_short = num_experts <= INT16_EXPERTS
    first = -INT16_EXPERTS // 2 if is_short else 0
    keys = torch.empty(indices.numel(), dtype=torch.int16 if is_short else torch.int32, device=indices.device)
    torch.add(indices.flatten(), first, out=keys)
    return *torch.sort(keys, stable=True), first


def group_by_expert(indices: Tensor, num_experts: int) -> Groups:
    """A group for each of ``num_experts`` experts.

    Example: indices [[2, 0], [2, 2]], 4 experts -> order [1, 0, 2, 3], offsets [0, 1, 1, 4, 4].
    """
    keys, order, first = sort_pairs(indices, num_experts)
    P, offsets = indices.numel(), torch.empty(num_experts + 1, dtype=torch.int32, device=indices.device)
    grid = (cdiv(num_experts + 1, BLOCK),)
    launch(_offsets_kernel, grid, (keys, offsets), (P, num_experts, first_stride(P)), first, BLOCK, NUM_PROBES)
    return Groups(keys, order, offsets, first)


def group_by_distinct_expert(indices: Tensor, num_experts: int) -> tuple[Groups, Tensor]:
    """min(P, num_experts) groups, one for each distinct expert, and the experts' ids, int64; nothing is as large as E.

    The groups beyond the distinct experts are empty and repeat those in turn, so that no expert gets many of them.

    Example: indices [[7, 2], [7, 7]], 9 experts -> order [1, 0, 2, 3], offsets [0, 1, 4, 4, 4], ids [2, 7, 2, 7].
    """
    keys, order, first = sort_pairs(indices, num_experts)
    P, G = indices.numel(), min(indices.numel(), num_experts)
    starts = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=starts[1:])
    numbers = starts.cumsum(0, dtype=torch.int32)
    offsets = torch.zeros(G + 1, dtype=torch.int32, device=indices.device)
    ids = torch.empty(G, dtype=torch.int64, device=indices.device)
    if G > 0:
        grid = (cdiv(G + 1, BLOCK),)
        tensors = (numbers, keys, offsets, ids)
        launch(_distinct_kernel, grid, tensors, (P, G, first_stride(P)), first, BLOCK, NUM_PROBES)
    return Groups(numbers, order, offsets, 1), ids
