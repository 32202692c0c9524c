"""Which variant of an expert pass runs: a cost model, written down here alone.

T tokens, H hidden size, E experts, K experts per token, P = T * K pairs. The variants of a pass:
  fused    forward only: one launch, dots and sums by the same program (``expert_fused.py``); for few tokens
  gather   one row of a table, or of the tokens, for each pair (``expert.py``)
  dense    products with every row on tensor cores (``expert_dense.py``); for many tokens an expert
In microseconds, with B bytes an element:
  gathered product   START + P H B / rate; rates are lower where what is gathered passes the L2 cache
  table gradients    and the sort by expert, once for both tables, and writing all E rows
  dense product      START + waves of tiles * (TILE_START + products of a tile / rate)
  dense sum          and the compression of its coefficients, ELEMENTWISE + P / rate
  fused, few tokens  START + K (H + columns of a program) B / rate of a multiprocessor
  fused, many        START + 2 P H B / rate
Measured and predicted, on an H200 (bfloat16, H 1024, cold L2), us:
                                     forward                      both tables' gradients
                              fused      gather      dense        gather        dense
  T 1,     E 16384, K 64      6    8    12   11                    22   35      56   57
  T 1024,  E 4096,  K 32     21   21    24   25     44   52        64   57      52   57
  T 4096,  E 1024,  K 64    127  135   113  122     48   55       351  171      76   84
  T 4096,  E 2048,  K 64    129  135   118  122     78   84       187  172     110  115
  T 4096,  E 4096,  K 128   255  266   231  233    151  154       313  309     185  184
  T 4096,  E 16384, K 64    178  223   134  122    498  499       181  191     572  567
  T 16384, E 4096,  K 128   982 1052   897  897    585  583      1564 1114     669  671
``tests/test_expert_plan.py`` holds the choice against the committed rows of ``benchmarks/variants.py``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import ceil, inf
from typing import NamedTuple

import torch
from torch import Tensor

from flash_moe.ops._triton.grouping import MAX_SINGLE_TILE

FORWARD, BACKWARD_TOKENS, BACKWARD_TABLES = "forward", "backward_tokens", "backward_tables"
FUSED, GATHER, DENSE = "fused", "gather", "dense"
VARIANTS = {
    FORWARD: (FUSED, GATHER, DENSE),
    BACKWARD_TOKENS: (GATHER, DENSE),
    BACKWARD_TABLES: (GATHER, DENSE),
}

START_US, ELEMENTWISE_US = 4.5, 2.0
SORT_FEW_US, SORT_US = 3.0, 25.5
# Bytes per microsecond, counted per row used, and the share of it that is left beyond the L2 cache.
GATHER_RATES = {"dots": 9.0e6, "token_sums": 10.5e6, "expert_sums": 8.0e6}
CACHED_SHARE, BEYOND_L2 = 0.8, 0.8
WRITE_RATE = 3.4e6
# Multiplications per microsecond of a multiprocessor, in tiles of TILE_ROWS x TILE_COLUMNS results by TILE_DEPTH.
DENSE_RATES = {"dots": 2.93e6, "token_sums": 2.5e6, "expert_sums": 2.15e6}
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH, TILE_START_US = 128, 256, 64, 4.5
PICKED_PAIRS_PER_US = 3.0e4  # of a multiprocessor: the dots look through all pairs of their tokens
COMPRESSED_PAIRS_PER_US = 2.8e4
# A sum whose tiles are too few for the GPU is shared out by its length; its float32 parts are written and read.
MIN_SPLIT, SPLIT_BYTES_PER_US = 256, 4.0e6
# Tiles in shared memory, several steps ahead: only GPUs with as much have been measured.
DENSE_SHARED_NBYTES = 227 * 1024
# Bytes: of a multiprocessor where tokens are few, of all where they are many, and both tables want to be in L2.
FUSED_PROGRAMS_A_TOKEN, FUSED_BYTES_PER_US = 8, 4.5e4
FUSED_MIN_TOKENS, FUSED_RATE, FUSED_BEYOND_L2 = 768, 8.2e6, 0.6
MAX_REMEMBERED = 4096

Sizes = tuple[int, int, int, int]
"""T, H, E, K."""

# Not a context variable: autograd calls a backward's launcher from a thread of its own.
_forced: list[str] = []


class Machine(NamedTuple):
    multiprocessors: int
    l2_nbytes: int
    shared_nbytes: int
    """That one program may use."""


# What a CPU's interpreter chooses as if it were.
H200 = Machine(132, 60 * 2**20, 227 * 1024)


def choose(which: str, sizes: Sizes, itemsize: int, machine: Machine) -> str:
    """The variant of ``which`` (a key of ``VARIANTS``) that is predicted to be the fastest."""
    times = {variant: predict_us(which, variant, sizes, itemsize, machine) for variant in VARIANTS[which]}
    return min(times, key=lambda variant: times[variant])


def predict_us(which: str, variant: str, sizes: Sizes, itemsize: int, machine: Machine) -> float:
    """Microseconds of one pass; infinite where the variant cannot run it."""
    if variant == FUSED:
        return _fused_us(sizes, itemsize, machine)
    product_us = _gather_us if variant == GATHER else _dense_us
    if which == BACKWARD_TABLES:
        T, _, _, K = sizes
        sort_us = SORT_FEW_US if T * K <= MAX_SINGLE_TILE else SORT_US
        return 2 * product_us("expert_sums", sizes, itemsize, machine) + (sort_us if variant == GATHER else 0)
    # The dense forward makes its coefficients while it compresses them.
    rest_us = 0 if (which, variant) == (FORWARD, DENSE) else ELEMENTWISE_US
    return sum(product_us(product, sizes, itemsize, machine) for product in ("dots", "token_sums")) + rest_us


def variant_for(which: str, rows: Tensor, indices: Tensor, num_experts: int) -> str:
    """The variant that runs ``which`` on ``rows [T, H]`` and ``indices [T, K]``."""
    if _forced and _forced[-1] in VARIANTS[which]:
        return _forced[-1]
    (T, K), H = indices.shape, rows.shape[1]
    index = rows.device.index if rows.is_cuda else None
    return _remembered(which, (T, H, num_experts, K), rows.element_size(), index)


@contextmanager
def use_variant(variant: str | None) -> Iterator[None]:
    """Within it, on every thread, ``variant`` runs each pass that has it; with None nothing changes."""
    if variant is None:
        yield
        return
    _forced.append(variant)
    try:
        yield
    finally:
        _forced.pop()


@lru_cache
def machine_of(index: int) -> Machine:
    device = torch.cuda.get_device_properties(index)
    return Machine(device.multi_processor_count, device.L2_cache_size, device.shared_memory_per_block_optin)


@lru_cache(MAX_REMEMBERED)
def _remembered(which: str, sizes: Sizes, itemsize: int, index: int | None) -> str:
    return choose(which, sizes, itemsize, H200 if index is None else machine_of(index))


def _gather_us(product: str, sizes: Sizes, itemsize: int, machine: Machine) -> float:
    T, H, E, K = sizes
    is_expert_centric = product == "expert_sums"
    rate = GATHER_RATES[product]
    if (T if is_expert_centric else E) * H * itemsize > CACHED_SHARE * machine.l2_nbytes:
        rate *= BEYOND_L2
    write_us = E * H * itemsize / WRITE_RATE if is_expert_centric else 0
    return START_US + T * K * H * itemsize / rate + write_us


def _dense_us(product: str, sizes: Sizes, itemsize: int, machine: Machine) -> float:
    """Tensor cores take 16-bit operands, and 16-byte loads rows of whole 16 bytes."""
    T, H, E, K = sizes
    if T * K == 0 or itemsize != 2 or H % 16 != 0 or machine.shared_nbytes < DENSE_SHARED_NBYTES:
        return inf
    rows, columns, length = {"dots": (T, E, H), "token_sums": (T, H, E), "expert_sums": (E, H, T)}[product]
    tiles = ceil(rows / TILE_ROWS) * ceil(columns / TILE_COLUMNS)
    splits = 1
    if product != "dots":
        splits = max(1, min(machine.multiprocessors // max(1, tiles), length // MIN_SPLIT))
    tile_products = TILE_ROWS * TILE_COLUMNS * max(TILE_DEPTH, length / splits)
    tile_us = TILE_START_US + tile_products / DENSE_RATES[product]
    rest_us = START_US
    if product == "dots":
        tile_us += TILE_ROWS * K / PICKED_PAIRS_PER_US
    else:
        rest_us += ELEMENTWISE_US + T * K / COMPRESSED_PAIRS_PER_US
    if splits > 1:
        rest_us += ELEMENTWISE_US + 4 * splits * rows * columns / SPLIT_BYTES_PER_US
    return ceil(tiles * splits / machine.multiprocessors) * tile_us + rest_us


def _fused_us(sizes: Sizes, itemsize: int, machine: Machine) -> float:
    """One wave of several programs a token, or so many tokens that one program a token keeps the GPU busy."""
    T, H, E, K = sizes
    if T * FUSED_PROGRAMS_A_TOKEN <= machine.multiprocessors:
        return START_US + K * (H + H / FUSED_PROGRAMS_A_TOKEN) * itemsize / FUSED_BYTES_PER_US
    if T < FUSED_MIN_TOKENS or itemsize == 1:  # bytes are converted in registers, of which the kernel has none left
        return inf
    rate = FUSED_RATE
    if 2 * E * H * itemsize > machine.l2_nbytes:  # both tables at once
        rate *= FUSED_BEYOND_L2
    return START_US + 2 * T * K * H * itemsize / rate
