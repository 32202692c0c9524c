"""The layer without gradients on one or two tokens, in one launch: programs of two kinds that share every SM.

T tokens, H hidden size, I intermediate size, N keys a half of the router, E = N * N experts, K experts a token, C pairs
of ranks that can be among a token's K best, G programs. Contiguous tensors; sums in float32 and in a fixed order.

The first half of the programs are routers. Each

    routes   takes a few of the router's logits, and waits for all others'
    ranks    orders both halves, and finds the rank of its own few of the C candidates, each program for itself
    experts  where one is among the K best: its dot with the token, and its row of ``up`` times the coefficient

so nobody waits for a selection to be told. The other half take gate and up rows of the MLP meanwhile. Then all wait
once more, and each adds its own columns of the output: rows of the MLP's last product, which it has asked for long
before, and the experts' parts. So the chain of routing costs nothing but its own time, which reading 26 MB takes too.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.counters import LINE, MAX_POLLS, arrive, wait_again
from flash_moe.ops._triton.math import accurate_exp, activation, round_for
from flash_moe.ops._triton.ranking import SMALLEST_KEY, is_above, ordered_key, with_ids
from flash_moe.ops._triton.relaunch import Kept, Relaunch
from flash_moe.ops._triton.scratch import Scratch, current_stream, keep
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

MAX_TOKENS, MAX_KEYS, MAX_CANDIDATES = 2, 256, 1024
# A cache line each: how many launches there were, and what the programs of one count.
LAUNCHES, ROUTED, GATED, EXPERTS = (tl.constexpr(i) for i in range(4))
NUM_COUNTERS = 4
# Comparisons of keys at once: 32 for each of 128 threads.
RANK_COMPARISONS = tl.constexpr(2**12)
# Two programs an SM, of few threads with all registers there are: what a thread has asked for stands in them, and the
# program waits for fewer warps. Of 8 warps and 128 registers each one token takes 18.5 us instead of 15.7.
NUM_WARPS, PROGRAMS_PER_SM, MAX_REGISTERS = 4, 2, 255
ROWS, DOWN_ROWS, DOWN_CHUNKS = 8, 4, 8
GATE_CHUNKS = 2

Gate = tuple[Tensor, Tensor, Tensor, float]
Weights = tuple[Tensor, ...]


@triton.jit
def _as_ints(float_ptr):
    return float_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _load_norm(mean_ptr, variance_ptr, h, H, eps):
    """As the gate's kernels have it, but for the last place: their root and division are 16 branches, one by one."""
    mean = tl.load(mean_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    variance = tl.load(variance_ptr + h, mask=h < H, other=1.0).to(tl.float32) + eps
    rstd = tl.rsqrt(variance)
    rest = tl.fma(-variance * rstd, rstd, 1.0)
    return mean, tl.where(variance > 0.0, tl.fma(0.5 * rstd, rest, rstd), rstd)


@triton.jit
def _route(
    x_ptr, router_ptr, mean_ptr, variance_ptr, logits_ptr, eps, program, num_routers,
    T: tl.constexpr, H: tl.constexpr, C2: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    for first_c in range(program * BLOCK_C, C2, num_routers * BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        for t in tl.static_range(T):
            acc = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
            for first_h in range(0, H, BLOCK_H):
                h = first_h + tl.arange(0, BLOCK_H)
                mask = (c < C2)[:, None] & (h < H)[None, :]
                weight = tl.load(router_ptr + c[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
                mean, rstd = _load_norm(mean_ptr, variance_ptr, h, H, eps)
                acc += weight * round_for(x_ptr, (x - mean) * rstd).to(tl.float32)[None, :]
            tl.store(logits_ptr + t * C2 + c, round_for(logits_ptr, tl.sum(acc, 1)), mask=c < C2)


@triton.jit
def _load_logits(logits_ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    # Past the L1 cache, which knows nothing of other multiprocessors' stores.
    n = tl.arange(0, BLOCK_N)
    return tl.load(logits_ptr + n, mask=n < N, other=float("-inf"), cache_modifier=".cg").to(tl.float32)


@triton.jit
def _make_keys(logits, logits_ptr, keys_ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """A half's logits as keys into this program's memory."""
    n = tl.arange(0, BLOCK_N)
    keys = tl.where(n < N, ordered_key(logits), SMALLEST_KEY)
    if logits_ptr.dtype.element_ty != tl.float32:
        keys = with_ids(keys, n)
    tl.store(keys_ptr + n, keys)


@triton.jit
def _log_sum_exp(logits):
    largest = tl.reduce(logits, 0, _nan_max)
    total = tl.sum(accurate_exp(logits - largest), 0)
    log = tl.log(total)
    return largest + (log + (total * accurate_exp(-log) - 1.0))  # as the router's kernel has it


@triton.jit
def _rank_half(
    logits, logits_ptr, keys_ptr, scores_ptr, ids_ptr,
    N: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """The R best logits of a half and their ids, in order: a key's rank is how many stand above it."""
    n = tl.arange(0, BLOCK_N)
    num_above = tl.zeros([RANK_BLOCK, BLOCK_N], tl.int32)
    for first in tl.static_range(0, BLOCK_N, RANK_BLOCK):
        other = first + tl.arange(0, RANK_BLOCK)
        others = tl.load(keys_ptr + other)[:, None]
        # As a tile of equal rows, so that each thread gets four neighbours, and few of the others to compare them with.
        keys = tl.load(keys_ptr + tl.broadcast_to(n[None, :], [RANK_BLOCK, BLOCK_N]))
        if logits_ptr.dtype.element_ty == tl.float32:
            num_above += is_above(others, other[:, None], keys, n[None, :]).to(tl.int32)
        else:
            num_above += (others > keys).to(tl.int32)
    ranks = tl.sum(num_above, 0)
    is_kept = (ranks < R) & (n < N)
    tl.store(scores_ptr + ranks, logits + 0.0, mask=is_kept)
    tl.store(ids_ptr + ranks, n, mask=is_kept)


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _list_pairs(
    pairs_ptr, K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """All pairs of ranks (i, j) with (i + 1) * (j + 1) <= K, i in the high half: any other has K pairs that beat it.

    Into this program's memory, while it would only wait. From the host it would be a copy, which a graph cannot hold.
    """
    col = tl.arange(0, BLOCK_R)[None, :]
    begin = 0
    for first in range(0, R, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        length = tl.where(row < R, tl.minimum(K // (row + 1), R), 0)
        at = begin + tl.cumsum(length, 0) - length
        tl.store(pairs_ptr + at[:, None] + col, (row[:, None] << 16) | col, mask=col < length[:, None])
        begin += tl.sum(length, 0)


@triton.jit
def _candidates(ranked_ptr, pairs_ptr, c, mask, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums and expert ids of candidates, pairs of ranks."""
    pair = tl.load(pairs_ptr + c, mask=mask, other=0)
    row, col = pair >> 16, BLOCK_N + (pair & 0xFFFF)
    sums = tl.load(ranked_ptr + row, mask=mask, other=0.0) + tl.load(ranked_ptr + col, mask=mask, other=0.0)
    ids_ptr = _as_ints(ranked_ptr + 2 * BLOCK_N)
    ids = tl.load(ids_ptr + row, mask=mask, other=0) * N + tl.load(ids_ptr + col, mask=mask, other=0)
    return sums, ids


@triton.jit
def _rank_candidates(
    ranked_ptr, pairs_ptr, index, count, N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of candidates ``index``, ``index + count``, ..., four in all, rank among all, sum and expert id, as scalars."""
    c = tl.arange(0, BLOCK_C)
    sums, ids = _candidates(ranked_ptr, pairs_ptr, c, c < C, N, BLOCK_N)
    keys = tl.where(c < C, ordered_key(sums), SMALLEST_KEY)
    candidates = ()
    for i in tl.static_range(0, 4, 2):
        own, following = index + i * count, index + (i + 1) * count
        own_sum, own_id = _candidates(ranked_ptr, pairs_ptr, own, own < C, N, BLOCK_N)
        next_sum, next_id = _candidates(ranked_ptr, pairs_ptr, following, following < C, N, BLOCK_N)
        above = is_above(keys, ids, ordered_key(own_sum), own_id).to(tl.int32)
        above |= is_above(keys, ids, ordered_key(next_sum), next_id).to(tl.int32) << 16
        ranks = tl.sum(above, 0)  # C is below 2^16: both in one sum
        own_rank = tl.where(own < C, ranks & 0xFFFF, C)
        next_rank = tl.where(following < C, ranks >> 16, C)
        candidates = candidates + ((own_rank, own_sum, own_id), (next_rank, next_sum, next_id))
    return candidates


@triton.jit
def _experts(
    x_ptr, down_ptr, up_ptr, ranked_ptr, pairs_ptr, weights_ptr, parts_ptr, indices_ptr, log_sum, index, count,
    H: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, HIDDEN_ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, OWN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCKS_H: tl.constexpr,
):  # fmt: skip
    """Of one token: candidates ``index``, ``index + count``, ..., each a part of the output if among the K best."""
    if NORM:
        log_sum = tl.load(ranked_ptr) + tl.load(ranked_ptr + BLOCK_N)  # the best sum; the weights' own sum is to come
    for first in range(0, OWN, 4):
        own = index + first * count
        candidates = _rank_candidates(ranked_ptr, pairs_ptr, own, count, N, C, BLOCK_N, BLOCK_C)
        rows = ()
        for i in tl.static_range(4):  # all rows are asked for before the first is used
            rank, _, id = candidates[i]
            end = tl.where(rank < K, H, 0)
            row = id.to(tl.int64) * H
            rows = rows + (
                (_load_row(down_ptr + row, end, BLOCK_H, BLOCKS_H), _load_row(up_ptr + row, end, BLOCK_H, BLOCKS_H)),
            )
        x = _load_row(x_ptr, H, BLOCK_H, BLOCKS_H)
        for i in tl.static_range(4):
            rank, score, id = candidates[i]
            if rank < K:
                products = rows[i][0][0].to(tl.float32) * x[0].to(tl.float32)
                for block in tl.static_range(1, BLOCKS_H):
                    products += rows[i][0][block].to(tl.float32) * x[block].to(tl.float32)
                weight = accurate_exp(score - log_sum)
                coefficient = activation(tl.sum(products, 0), HIDDEN_ACT) * weight
                for block in tl.static_range(BLOCKS_H):
                    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
                    up = rows[i][1][block].to(tl.float32)
                    tl.store(parts_ptr + rank * H + h, coefficient * up, mask=h < H)
                tl.store(weights_ptr + rank, weight)
                tl.store(indices_ptr + rank, id.to(tl.int64))


@triton.jit
def _load_row(row_ptr, end, BLOCK_H: tl.constexpr, BLOCKS_H: tl.constexpr):
    """Blocks of a row up to ``end``."""
    blocks = ()
    for block in tl.static_range(BLOCKS_H):
        h = block * BLOCK_H + tl.arange(0, BLOCK_H)
        blocks = blocks + (tl.load(row_ptr + h, mask=h < end, other=0.0),)
    return blocks


@triton.jit
def _load_rows(matrix_ptr, row, end, PART: tl.constexpr, W: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Chunks ``[rows, WIDTH]`` of a matrix with W columns; rows from ``end`` on are zeros, and not read."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        column = (PART * CHUNKS + chunk) * WIDTH + tl.arange(0, WIDTH)
        mask = (row < end)[:, None] & (column < W)[None, :]
        at = matrix_ptr + row.to(tl.int64)[:, None] * W + column[None, :]
        tiles = tiles + (tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _products(
    tiles, vector_ptr, PART: tl.constexpr, W: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """Elementwise products with a vector, summed over the chunks."""
    products = tl.zeros(tiles[0].shape, tl.float32)
    for chunk in tl.static_range(CHUNKS):
        column = (PART * CHUNKS + chunk) * WIDTH + tl.arange(0, WIDTH)
        # As wide as the rows: each thread loads what it needs, and nothing changes threads.
        column = tl.broadcast_to(column[None, :], tiles[chunk].shape)
        vector = tl.load(vector_ptr + column, mask=column < W, other=0.0, cache_modifier=CACHE)
        products += tiles[chunk].to(tl.float32) * vector.to(tl.float32)
    return products


@triton.jit
def _gate_up(
    x_ptr, gate_ptr, up_ptr, activated_ptr, program, num_programs,
    T: tl.constexpr, H: tl.constexpr, I: tl.constexpr, HIDDEN_ACT: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """activated = act(x gate^T) * (x up^T): tiles ``program``, ``program + num_programs``, ... of ROWS columns of I.

    Loads are a step ahead of their use.
    """
    NUM_PARTS: tl.constexpr = (H + CHUNKS * WIDTH - 1) // (CHUNKS * WIDTH)
    i = program * ROWS + tl.arange(0, ROWS)
    gate = _load_rows(gate_ptr, i, I, 0, H, CHUNKS, WIDTH)
    up = _load_rows(up_ptr, i, I, 0, H, CHUNKS, WIDTH)
    for first_i in range(program * ROWS, I, num_programs * ROWS):
        i = first_i + tl.arange(0, ROWS)
        sums = ((tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)),) * T
        for part in tl.static_range(NUM_PARTS):
            next_i = i if part + 1 < NUM_PARTS else i + num_programs * ROWS
            next_gate = _load_rows(gate_ptr, next_i, I, (part + 1) % NUM_PARTS, H, CHUNKS, WIDTH)
            next_up = _load_rows(up_ptr, next_i, I, (part + 1) % NUM_PARTS, H, CHUNKS, WIDTH)
            new_sums = ()
            for t in tl.static_range(T):
                gate_sum = sums[t][0] + _products(gate, x_ptr + t * H, part, H, CHUNKS, WIDTH, "")
                up_sum = sums[t][1] + _products(up, x_ptr + t * H, part, H, CHUNKS, WIDTH, "")
                new_sums = new_sums + ((gate_sum, up_sum),)
            sums = new_sums
            gate, up = next_gate, next_up
        for t in tl.static_range(T):
            activated = activation(tl.sum(sums[t][0], 1), HIDDEN_ACT) * tl.sum(sums[t][1], 1)
            tl.store(activated_ptr + t * I + i, round_for(activated_ptr, activated), mask=i < I)


@triton.jit
def _routed_sum(parts_ptr, weights_ptr, row, end, H: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """The experts' parts of the output's columns ``row``."""
    k = tl.arange(0, BLOCK_K)
    mask = (k < K)[:, None] & (row < end)[None, :]
    parts = tl.load(parts_ptr + k[:, None] * H + row[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    routed = tl.sum(parts, 0)
    if NORM:
        routed = routed / tl.sum(tl.load(weights_ptr + k, mask=k < K, other=0.0, cache_modifier=".cg"), 0)
    return routed


@triton.jit
def _layer_kernel(
    x_ptr, router_ptr, mean_ptr, variance_ptr, down_embed_ptr, up_embed_ptr, gate_ptr, up_ptr, down_ptr,
    logits_ptr, out_ptr, counters_ptr, scratch_ptr, indices_ptr, eps, max_polls,
    T: tl.constexpr, H: tl.constexpr, I: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, NORM: tl.constexpr, HIDDEN_ACT: tl.constexpr, NUM_ROUTERS: tl.constexpr,
    FIRST_GATED: tl.constexpr, ROWS: tl.constexpr, GATE_CHUNKS: tl.constexpr, GATE_WIDTH: tl.constexpr,
    DOWN_ROWS: tl.constexpr, DOWN_CHUNKS: tl.constexpr, DOWN_WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr, ROUTE_ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    RANK_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, OWN: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    launches = tl.load(counters_ptr + LAUNCHES * LINE)
    # Scratch: the experts' parts [T, K, H], their weights [T, K], then of each router scores, ids and keys,
    # BLOCK_N of each and each half, and pairs [C]; from ACTIVATED on, in the dtype of x, what lies between the MLP's
    # products [T, I].
    weights_ptr = scratch_ptr + T * K * H
    ranked_ptr = weights_ptr + T * K + program * (6 * BLOCK_N + C)
    activated_ptr = (scratch_ptr + ACTIVATED).to(x_ptr.dtype, bitcast=True)
    NUM_PARTS: tl.constexpr = (I + DOWN_CHUNKS * DOWN_WIDTH - 1) // (DOWN_CHUNKS * DOWN_WIDTH)
    first_row = program * (BLOCKS * DOWN_ROWS)
    row = first_row + tl.arange(0, DOWN_ROWS)
    polls_left = max_polls
    if program >= FIRST_GATED:
        _gate_up(
            x_ptr, gate_ptr, up_ptr, activated_ptr, program - FIRST_GATED, num_programs - FIRST_GATED, T, H, I,
            HIDDEN_ACT, ROWS, GATE_CHUNKS, GATE_WIDTH,
        )  # fmt: skip
        arrive(counters_ptr + GATED * LINE)
    if program < NUM_ROUTERS:
        _route(
            x_ptr, router_ptr, mean_ptr, variance_ptr, logits_ptr, eps, program, NUM_ROUTERS, T, H, 2 * N, ROUTE_ROWS,
            BLOCK_H,
        )  # fmt: skip
        arrive(counters_ptr + ROUTED * LINE)
    # Across the wait, and the routers' work, too.
    down = _load_rows(down_ptr, row, H, 0, I, DOWN_CHUNKS, DOWN_WIDTH)
    if program < NUM_ROUTERS:
        pairs_ptr = _as_ints(ranked_ptr + 6 * BLOCK_N)
        _list_pairs(pairs_ptr, K, R, BLOCK_R, RANK_COMPARISONS // BLOCK_R)
        polls_left = wait_again(counters_ptr + ROUTED * LINE, launches, NUM_ROUTERS, polls_left)
        STEP: tl.constexpr = T if T < NUM_ROUTERS else NUM_ROUTERS
        for t in range(program % STEP, T, STEP):
            keys_ptr = _as_ints(ranked_ptr + 4 * BLOCK_N)
            half_ptrs = (logits_ptr + 2 * t * N, logits_ptr + (2 * t + 1) * N)
            # Both are asked for at once, and before any barrier.
            logits = (_load_logits(half_ptrs[0], N, BLOCK_N), _load_logits(half_ptrs[1], N, BLOCK_N))
            for half in tl.static_range(2):
                _make_keys(logits[half], logits_ptr, keys_ptr + half * BLOCK_N, N, BLOCK_N)
            log_sum = 0.0
            if not NORM:
                log_sum = _log_sum_exp(logits[0]) + _log_sum_exp(logits[1])
            tl.debug_barrier()  # all keys are there before any thread reads
            for half in tl.static_range(2):
                ids_ptr = _as_ints(ranked_ptr + (2 + half) * BLOCK_N)
                _rank_half(
                    logits[half], logits_ptr, keys_ptr + half * BLOCK_N, ranked_ptr + half * BLOCK_N, ids_ptr,
                    N, R, BLOCK_N, RANK_BLOCK,
                )  # fmt: skip
            tl.debug_barrier()  # all of it is there before any thread reads
            _experts(
                x_ptr + t * H, down_embed_ptr, up_embed_ptr, ranked_ptr, pairs_ptr, weights_ptr + t * K,
                scratch_ptr + t * K * H, indices_ptr + t * K, log_sum, program // STEP, NUM_ROUTERS // STEP,
                H, N, K, C, NORM, HIDDEN_ACT, BLOCK_N, BLOCK_C, OWN, BLOCK_H, (H + BLOCK_H - 1) // BLOCK_H,
            )  # fmt: skip
            tl.debug_barrier()  # all have read before the next token's ranks are there
        arrive(counters_ptr + EXPERTS * LINE)
    polls_left = wait_again(counters_ptr + GATED * LINE, launches, num_programs - FIRST_GATED, polls_left)
    for block in range(BLOCKS):
        row = first_row + block * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
        sums = (tl.zeros([DOWN_ROWS, DOWN_WIDTH], tl.float32),) * T
        for part in tl.static_range(NUM_PARTS):
            new_sums = ()
            for t in tl.static_range(T):
                products = _products(down, activated_ptr + t * I, part, I, DOWN_CHUNKS, DOWN_WIDTH, ".cg")
                new_sums = new_sums + (sums[t] + products,)
            sums = new_sums
            if part + 1 < NUM_PARTS:
                down = _load_rows(down_ptr, row, H, part + 1, I, DOWN_CHUNKS, DOWN_WIDTH)
            elif BLOCKS > 1:
                end = tl.where(block + 1 < BLOCKS, H, 0)
                down = _load_rows(down_ptr, row + DOWN_ROWS, end, 0, I, DOWN_CHUNKS, DOWN_WIDTH)
        outs = ()
        for t in tl.static_range(T):
            outs = outs + (tl.sum(sums[t], 1),)
        if block == 0:  # the chain of routing takes longest
            polls_left = wait_again(counters_ptr + EXPERTS * LINE, launches, NUM_ROUTERS, polls_left)
        for t in tl.static_range(T):
            routed = _routed_sum(scratch_ptr + t * K * H, weights_ptr + t * K, row, H, H, K, NORM, BLOCK_K)
            # Whoever has given up waiting says so.
            out = tl.where(polls_left > 0, outs[t] + routed, float("nan"))
            tl.store(out_ptr + t * H + row, round_for(out_ptr, out), mask=row < H)
    if program == 0:
        # All have read it before they arrived for the last time.
        tl.store(counters_ptr + LAUNCHES * LINE, launches + 1)


class _Sizes(NamedTuple):
    """What a launch is compiled for, beside the GPU."""

    T: int
    H: int
    I: int
    N: int
    K: int
    dtype: torch.dtype
    mean_dtype: torch.dtype
    variance_dtype: torch.dtype
    eps: float
    norm_topk_prob: bool
    hidden_act: str


@dataclass
class _Memory:
    counters: Tensor
    kept: Kept | None = None
    """Counters, scratch and indices, for a stream's calls that are not asked for indices."""


class FewTokens:
    """The launch for some sizes on a device: of tensors that differ in their addresses and numbers alone."""

    def __init__(self, sizes: _Sizes, device: torch.device) -> None:
        T, H, I, N, K, dtype, *_, eps, norm_topk_prob, hidden_act = sizes
        self._device = device
        self._device_index: int | None = device.index
        num_programs, options = 1, {}  # the interpreter runs programs one after another: one program of both kinds
        if device.type == "cuda":
            num_programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
            # All programs at once or an error, since they wait for each other.
            options = {"launch_cooperative_grid": True, "maxnreg": MAX_REGISTERS}
        constants = kernel_constants(T, H, I, N, K, num_programs, dtype.itemsize)
        constants |= {"NORM": norm_topk_prob, "HIDDEN_ACT": hidden_act}
        numbers = (eps, MAX_POLLS)
        self._launch = Relaunch(_layer_kernel, num_programs, numbers, constants, num_warps=NUM_WARPS, **options)
        self._scratch_numel = constants["ACTIVATED"] + cdiv(T * I * dtype.itemsize, 4)
        self._num_pairs = T * K
        self._logits_layout = (2, T, N), (N, 2 * N, 1)
        self.memory = Scratch(partial(_make_memory, device), device)

    def __call__(self, x: Tensor, *weights: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y`` like ``x``, whose dimensions before H are any of T tokens, and the gate's product ``[2, T, N]``.

        Args:
            weights: the gate's, running mean and variance, both tables, and the MLP's three; all contiguous.
            indices: takes the experts, ``[T, K]`` int64, if anybody wants them.
        """
        index = self._device_index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(x, *weights, indices=indices)
        stream, is_capturing = current_stream(index)
        memory = self.memory.get(stream, is_capturing=is_capturing)
        kept = memory.kept
        if indices is not None or is_capturing:  # a graph's memory is for its pool to use again
            kept = self._with_scratch(memory.counters, indices)
        elif kept is None:
            kept = memory.kept = keep(partial(self._with_scratch, memory.counters), self._device)
        out = torch.empty_like(x)
        logits = x.new_empty_strided(*self._logits_layout)
        self._launch((x, *weights, logits, out), stream, kept)
        return out, logits

    def _with_scratch(self, counters: Tensor, indices: Tensor | None = None) -> Kept:
        scratch = torch.empty(self._scratch_numel, dtype=torch.float32, device=self._device)
        if indices is None:
            indices = torch.empty(self._num_pairs, dtype=torch.int64, device=self._device)
        return Kept.of(counters, scratch, indices)


def takes(T: int, num_expert_keys: int, num_experts_per_tok: int) -> bool:
    """Whether the kernel is for so many tokens, keys and experts."""
    if not 0 < T <= MAX_TOKENS or num_expert_keys > MAX_KEYS:
        return False
    return _num_pairs(num_expert_keys, num_experts_per_tok) <= MAX_CANDIDATES


def layer_few(
    x: Tensor, gate: Gate, tables: Weights, dense: Weights, num_experts_per_tok: int, norm_topk_prob: bool,
    hidden_act: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``y [T, H]``, the gate's product ``[2, T, N]`` and ``indices [T, K]``, best first, where ``takes`` says so.

    Of a program that gave up waiting, which nothing should make it do, ``y`` is NaN.
    """
    few_tokens = few_tokens_like(x, gate, dense, num_experts_per_tok, norm_topk_prob, hidden_act)
    indices = x.new_empty(x.shape[0], num_experts_per_tok, dtype=torch.int64)
    return (*few_tokens(x, *gate[:3], *tables, *dense, indices=indices), indices)


def few_tokens_like(
    x: Tensor, gate: Gate, dense: Weights, num_experts_per_tok: int, norm_topk_prob: bool, hidden_act: str
) -> FewTokens:
    """The launch for tensors like these, x being ``[T, H]``, where ``takes`` says so."""
    router_gate, mean, variance, eps = gate
    T, H = x.shape
    sizes = _Sizes(
        T, H, dense[0].shape[0], router_gate.shape[0] // 2, num_experts_per_tok, x.dtype, mean.dtype, variance.dtype,
        eps, norm_topk_prob, hidden_act,
    )  # fmt: skip
    return _plan(sizes, x.device)


@lru_cache(None)  # a graph may read what it has
def _plan(sizes: _Sizes, device: torch.device) -> FewTokens:
    return FewTokens(sizes, device)


def _make_memory(device: torch.device, count: int) -> list[_Memory]:
    counters = torch.zeros(count, NUM_COUNTERS * LINE.value, dtype=torch.int32, device=device)
    return [_Memory(own) for own in counters.unbind()]


def kernel_constants(T: int, H: int, I: int, N: int, K: int, num_programs: int, itemsize: int) -> dict[str, Any]:
    """The kernel's sizes and blocks, for weights of ``itemsize`` bytes."""
    num_routers = max(1, num_programs // 2)  # whatever T is: every launch adds as much to a counter
    width = 32 * 16 // itemsize  # 16 bytes for each thread of a warp
    C, block_n = _num_pairs(N, K), max(16, next_power_of_2(N))
    block_h = min(1024, next_power_of_2(max(16, H)))
    own = cdiv(C, max(1, num_routers // T))
    down_width = min(2 * width, next_power_of_2(max(16, I)))
    gate_width = min(width, next_power_of_2(max(16, H)))
    return {
        "T": T, "H": H, "I": I, "N": N, "K": K, "C": C, "R": min(N, K),
        "NUM_ROUTERS": num_routers,
        "FIRST_GATED": num_routers if num_programs > 1 else 0,
        "ROWS": ROWS,
        "GATE_CHUNKS": min(GATE_CHUNKS, cdiv(H, gate_width)),
        "GATE_WIDTH": gate_width,
        "DOWN_ROWS": DOWN_ROWS,
        "DOWN_CHUNKS": min(DOWN_CHUNKS, cdiv(I, down_width)),
        "DOWN_WIDTH": down_width,
        "BLOCKS": cdiv(cdiv(H, num_programs), DOWN_ROWS),
        "BLOCK_R": max(2, next_power_of_2(min(N, K))),
        "ROUTE_ROWS": 2,
        "BLOCK_H": block_h,
        "BLOCK_N": block_n,
        "RANK_BLOCK": min(block_n, RANK_COMPARISONS.value // block_n),
        "BLOCK_C": next_power_of_2(max(16, C)),
        "OWN": own,
        "BLOCK_K": next_power_of_2(K),
        "ACTIVATED": cdiv(T * K * (H + 1) + num_routers * (6 * block_n + C), 4) * 4,
    }  # fmt: skip


@lru_cache(256)
def _num_pairs(num_expert_keys: int, num_experts_per_tok: int) -> int:
    """C."""
    R = min(num_expert_keys, num_experts_per_tok)
    return sum(min(R, num_experts_per_tok // i) for i in range(1, R + 1))
