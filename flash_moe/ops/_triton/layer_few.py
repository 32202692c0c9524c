"""The layer without gradients on one or two tokens, in one launch: programs of two kinds that share every SM.

T tokens, H hidden size, I intermediate size, N keys a half of the router, E = N * N experts, K experts a token, C pairs
of ranks that can be among a token's K best, G programs. Contiguous tensors; sums in float32 and in a fixed order.

The first half of the programs are routers. Each

    routes   takes a few of the router's logits, and waits for all others'
    ranks    orders both halves, and finds the rank of its own few of the C candidates, each warp for itself
    experts  where one is among the K best: tells its id, and then its coefficient, from its dot with the token

so nobody waits for a selection to be told, and from the logits to an expert's row there is neither a barrier nor a
trip to memory. Logits, ids and coefficients are each published in one word with the launch's number: who reads the
number has the rest, too. The other half take gate and up rows of the MLP meanwhile. Then all wait once more, and each
adds its own columns of the output: rows of the MLP's last product, which it has asked for long before, and of the
experts' rows of ``up`` what it asked for when the ids were there. So the chain of routing costs nothing but its own
time, which reading 26 MB takes too.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.counters import LINE, MAX_POLLS, arrive, wait_again
from flash_moe.ops._triton.gate import load_norm
from flash_moe.ops._triton.math import accurate_exp, activation, round_for
from flash_moe.ops._triton.ranking import SMALLEST_KEY, is_above, ordered_key, with_ids
from flash_moe.ops._triton.relaunch import Kept, Relaunch
from flash_moe.ops._triton.router_keys import from_ordered, long_keys, nan_max, score_and_id
from flash_moe.ops._triton.scratch import Scratch, current_stream, keep
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.ops._triton.sort import top

MAX_TOKENS, MAX_KEYS, MAX_CANDIDATES = 2, 256, 1024
# A cache line each: how many launches there were, and what the programs of one count.
LAUNCHES, ARRIVED = tl.constexpr(0), tl.constexpr(1)
NUM_COUNTERS = tl.constexpr(2)
# Of the launch's number in a 16-bit logit's word.
NUMBER_MASK = tl.constexpr(65535)
# Of a row or of candidates, what a warp takes at a time: of any dtype four elements a lane, which then lie alike.
TILE, LANES = tl.constexpr(128), tl.constexpr(32)
# Of fewer than a warp has lanes, tl.gather does not compile.
MIN_KEYS = 32
# Two programs an SM, of few threads with all registers there are: what a thread has asked for stands in them, and the
# program waits for fewer warps. Of 8 warps and 128 registers each one token takes a quarter longer.
NUM_WARPS, PROGRAMS_PER_SM, MAX_REGISTERS = 4, 2, 255
# Gate and up rows of a tile, and pieces of them that are on their way at a time, by the number of tokens.
GATE_TILES = {1: (16, 1), 2: (8, 2)}
DOWN_ROWS, DOWN_CHUNKS = 4, 8

Gate = tuple[Tensor, Tensor, Tensor, float]
Weights = tuple[Tensor, ...]


@triton.jit
def _to_words(values, number):
    """Values of 16 or 32 bits above the launch's number, of as many bits; each launch writes all words."""
    if values.dtype == tl.float32:
        return (values.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)
    else:
        if values.dtype != tl.int32:
            values = values.to(tl.int16, bitcast=True).to(tl.int32)
        return (values << 16) | (number & NUMBER_MASK)


@triton.jit
def _floats(words, dtype: tl.constexpr):
    if dtype == tl.float32:
        return (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _is_missing(words, number):
    """Whether they are not this launch's, word by word, as 0 or 1."""
    differing = (words ^ number).to(tl.int32)
    if words.dtype == tl.int32:
        differing &= NUMBER_MASK
    return (differing != 0).to(tl.int32)


@triton.jit
def _wait_for_words(words_ptr, count, number, polls_left, BLOCK: tl.constexpr):
    """``count`` words, then zeros, and how many polls are left. BLOCK: no fewer than the program's threads."""
    at = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + at, mask=at < count, other=number, volatile=True)
    while (tl.max(_is_missing(words, number), 0) > 0) & (polls_left > 0):
        words = tl.load(words_ptr + at, mask=at < count, other=number, volatile=True)
        polls_left -= 1
    return tl.where(at < count, words, 0), polls_left


@triton.jit
def _route(
    x_ptr, router_ptr, mean_ptr, variance_ptr, logits_ptr, words_ptr, number, eps, program, num_routers,
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
                mean, rstd = load_norm(mean_ptr, variance_ptr, h, H, eps)
                acc += weight * round_for(x_ptr, (x - mean) * rstd).to(tl.float32)[None, :]
            logits = round_for(logits_ptr, tl.sum(acc, 1))
            tl.store(logits_ptr + t * C2 + c, logits, mask=c < C2)
            tl.atomic_xchg(words_ptr + t * C2 + c, _to_words(logits, number), mask=c < C2, sem="relaxed")


@triton.jit
def _load_half(words_ptr, number, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """A half's words, the same in each of the rows, of which a warp has one."""
    n = tl.broadcast_to(tl.arange(0, BLOCK_N)[None, :], [ROWS, BLOCK_N])
    return tl.load(words_ptr + n, mask=n < N, other=number, volatile=True)


@triton.jit
def _wait_for_logits(
    words_ptr, number, polls_left, dtype: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Both halves' logits, and how many polls are left."""
    high = _load_half(words_ptr, number, N, BLOCK_N, ROWS)
    low = _load_half(words_ptr + N, number, N, BLOCK_N, ROWS)
    while (tl.max(tl.max(_is_missing(high, number) | _is_missing(low, number), 1), 0) > 0) & (polls_left > 0):
        high = _load_half(words_ptr, number, N, BLOCK_N, ROWS)
        low = _load_half(words_ptr + N, number, N, BLOCK_N, ROWS)
        polls_left -= 1
    return _floats(high, dtype), _floats(low, dtype), polls_left


@triton.jit
def _log_sum_exp(logits, N: tl.constexpr):
    is_logit = tl.arange(0, logits.shape[1])[None, :] < N
    largest = tl.reduce(tl.where(is_logit, logits, float("-inf")), 1, nan_max, keep_dims=True)
    total = tl.sum(tl.where(is_logit, accurate_exp(logits - largest), 0.0), 1, keep_dims=True)
    log = tl.log(total)
    return largest + (log + (total * accurate_exp(-log) - 1.0))  # as the router's kernel has it


@triton.jit
def _best(logits, dtype: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr):
    """Keys of the best logits of each row, best first."""
    ROWS: tl.constexpr = logits.shape[0]
    n = tl.broadcast_to(tl.arange(0, logits.shape[1])[None, :], logits.shape)
    if dtype == tl.float32:
        keys = long_keys(logits + 0.0, n, n < N)
    else:
        keys = with_ids(tl.where(n < N, ordered_key(logits), SMALLEST_KEY), n)
    return tl.reshape(top(tl.reshape(keys, [logits.shape[0] * logits.shape[1]]), BLOCK_R, 0, ROWS), [ROWS, BLOCK_R])


@triton.jit
def _load_pairs(pairs_ptr, C: tl.constexpr, ROWS: tl.constexpr):
    tiles = ()
    for first in tl.static_range(0, C, TILE):
        c = first + tl.broadcast_to(tl.arange(0, TILE)[None, :], [ROWS, TILE])
        tiles = tiles + (tl.load(pairs_ptr + c, mask=c < C, other=0),)
    return tiles


@triton.jit
def _candidates(high, low, pairs, N: tl.constexpr, C: tl.constexpr):
    """Keys of the sums and expert ids of all pairs of ranks."""
    tiles = ()
    for tile in tl.static_range((C + TILE - 1) // TILE):
        c = tile * TILE + tl.arange(0, TILE)[None, :]
        high_score, high_id = score_and_id(tl.gather(high, pairs[tile] >> 16, 1))
        low_score, low_id = score_and_id(tl.gather(low, pairs[tile] & 0xFFFF, 1))
        keys = tl.where(c < C, ordered_key(high_score + low_score), SMALLEST_KEY)
        tiles = tiles + ((keys, high_id * N + low_id),)
    return tiles


@triton.jit
def _rank(candidates, own, C: tl.constexpr):
    """Of candidates ``own [rows]`` rank among all, sum's key and expert id."""
    key, id, rank = 0, 0, 0
    for tile in tl.static_range((C + TILE - 1) // TILE):
        is_own = tile * TILE + tl.arange(0, TILE)[None, :] == own[:, None]
        key += tl.sum(tl.where(is_own, candidates[tile][0], 0), 1)
        id += tl.sum(tl.where(is_own, candidates[tile][1], 0), 1)
    for tile in tl.static_range((C + TILE - 1) // TILE):
        rank += tl.sum(is_above(candidates[tile][0], candidates[tile][1], key[:, None], id[:, None]).to(tl.int32), 1)
    return rank, key, id


@triton.jit
def _experts(
    x_ptr, down_ptr, candidates, log_sum, ids_ptr, coefficients_ptr, weights_ptr, indices_ptr, number, own,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, HIDDEN_ACT: tl.constexpr,
):  # fmt: skip
    """Of candidates ``own [rows]``, of which a warp has one, id and coefficient if among the K best."""
    ROWS: tl.constexpr = own.shape[0]
    rank, key, id = _rank(candidates, own, C)
    is_chosen = ((own < C) & (rank < K))[:, None]
    row = id.to(tl.int64)[:, None] * H
    tiles = ()
    for first_h in tl.static_range(0, H, TILE):
        h = first_h + tl.arange(0, TILE)[None, :]
        tiles = tiles + (tl.load(down_ptr + row + h, mask=is_chosen & (h < H), other=0.0),)
    lane = tl.arange(0, LANES)[None, :]
    at, is_first = rank[:, None] + lane, is_chosen & (lane == 0)  # by a lane of each warp, which has them
    id = tl.broadcast_to(id[:, None], [ROWS, LANES])
    tl.atomic_xchg(ids_ptr + at, _to_words(id, number), mask=is_first, sem="relaxed")
    tl.store(indices_ptr + at, id.to(tl.int64), mask=is_first)
    products = tl.zeros([ROWS, TILE], tl.float32)
    for tile in tl.static_range((H + TILE - 1) // TILE):
        h = tile * TILE + tl.broadcast_to(tl.arange(0, TILE)[None, :], [ROWS, TILE])
        products += tiles[tile].to(tl.float32) * tl.load(x_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    weight = accurate_exp(from_ordered(key)[:, None] - log_sum)
    coefficient = activation(tl.sum(products, 1)[:, None], HIDDEN_ACT) * weight
    coefficient = tl.broadcast_to(coefficient, [ROWS, LANES])
    tl.atomic_xchg(coefficients_ptr + at, _to_words(coefficient, number), mask=is_first, sem="relaxed")
    if NORM:
        weight = tl.broadcast_to(weight, [ROWS, LANES])
        tl.atomic_xchg(weights_ptr + at, _to_words(weight, number), mask=is_first, sem="relaxed")


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
def _layer_kernel(
    x_ptr, router_ptr, mean_ptr, variance_ptr, down_embed_ptr, up_embed_ptr, gate_ptr, up_ptr, down_ptr,
    logits_ptr, out_ptr, counters_ptr, activated_ptr, indices_ptr, eps, max_polls,
    T: tl.constexpr, H: tl.constexpr, I: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, HIDDEN_ACT: tl.constexpr, NUM_ROUTERS: tl.constexpr, FIRST_GATED: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, GATE_CHUNKS: tl.constexpr, GATE_WIDTH: tl.constexpr,
    DOWN_ROWS: tl.constexpr, DOWN_CHUNKS: tl.constexpr, DOWN_WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr, ROUTE_ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    IDS: tl.constexpr, COEFFICIENTS: tl.constexpr, WEIGHTS: tl.constexpr, PAIRS: tl.constexpr, OWN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    launches = tl.load(counters_ptr + LAUNCHES * LINE)
    number = launches + 1
    # Behind the counters: words of the logits [T, 2, N], of the experts' ids, coefficients and weights, each [T, K];
    # pairs of ranks [C].
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    LONG: tl.constexpr = tl.pointer_type(tl.int64)
    words_ptr = counters_ptr + NUM_COUNTERS * LINE
    if dtype == tl.float32:
        words_ptr = words_ptr.to(LONG, bitcast=True)
    ids_ptr = counters_ptr + IDS
    coefficients_ptr = (counters_ptr + COEFFICIENTS).to(LONG, bitcast=True)
    weights_ptr = (counters_ptr + WEIGHTS).to(LONG, bitcast=True)
    NUM_PARTS: tl.constexpr = (I + DOWN_CHUNKS * DOWN_WIDTH - 1) // (DOWN_CHUNKS * DOWN_WIDTH)
    first_row = program * (BLOCKS * DOWN_ROWS)
    row = first_row + tl.arange(0, DOWN_ROWS)
    polls_left = max_polls
    if program >= FIRST_GATED:
        _gate_up(
            x_ptr, gate_ptr, up_ptr, activated_ptr, program - FIRST_GATED, num_programs - FIRST_GATED, T, H, I,
            HIDDEN_ACT, ROWS, GATE_CHUNKS, GATE_WIDTH,
        )  # fmt: skip
        arrive(counters_ptr + ARRIVED * LINE)
    if program < NUM_ROUTERS:
        _route(
            x_ptr, router_ptr, mean_ptr, variance_ptr, logits_ptr, words_ptr, number, eps, program, NUM_ROUTERS,
            T, H, 2 * N, ROUTE_ROWS, BLOCK_H,
        )  # fmt: skip
    # Across the wait, and the routers' work, too.
    down = _load_rows(down_ptr, row, H, 0, I, DOWN_CHUNKS, DOWN_WIDTH)
    if program < NUM_ROUTERS:
        pairs = _load_pairs(counters_ptr + PAIRS, C, WARPS)
        STEP: tl.constexpr = T if T < NUM_ROUTERS else NUM_ROUTERS
        for t in range(program % STEP, T, STEP):
            high, low, polls_left = _wait_for_logits(
                words_ptr + 2 * t * N, number, polls_left, dtype, N, BLOCK_N, WARPS
            )  # fmt: skip
            if t == program % STEP:  # no launch is over before everybody knows its number
                tl.atomic_add(counters_ptr + ARRIVED * LINE, 1, sem="relaxed")
            if not NORM:
                log_sum = _log_sum_exp(high, N) + _log_sum_exp(low, N)
            high, low = _best(high, dtype, N, BLOCK_R), _best(low, dtype, N, BLOCK_R)
            if NORM:  # the best sum; the weights' own sum is to come
                log_sum = tl.max(score_and_id(high)[0], 1, keep_dims=True)
                log_sum += tl.max(score_and_id(low)[0], 1, keep_dims=True)
            candidates = _candidates(high, low, pairs, N, C)
            for first in tl.static_range(0, OWN, WARPS):
                own = program // STEP + (first + tl.arange(0, WARPS)) * (NUM_ROUTERS // STEP)
                _experts(
                    x_ptr + t * H, down_embed_ptr, candidates, log_sum, ids_ptr + t * K, coefficients_ptr + t * K,
                    weights_ptr + t * K, indices_ptr + t * K, number, own, H, K, C, NORM, HIDDEN_ACT,
                )  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    ids = ()
    for t in tl.static_range(T):
        id_words, polls_left = _wait_for_words(ids_ptr + t * K, K, number, polls_left, BLOCK_K)
        ids = ids + ((id_words >> 16) & NUMBER_MASK,)
    for block in range(BLOCKS):
        row = first_row + block * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
        mask = (k < K)[:, None] & (row < H)[None, :]
        experts_up = ()
        for t in tl.static_range(T):
            at = ids[t].to(tl.int64)[:, None] * H + row[None, :]
            experts_up = experts_up + (tl.load(up_embed_ptr + at, mask=mask, other=0.0),)
        if block == 0:
            num_arrivals = NUM_ROUTERS + num_programs - FIRST_GATED
            polls_left = wait_again(counters_ptr + ARRIVED * LINE, launches, num_arrivals, polls_left)
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
        for t in tl.static_range(T):
            out = tl.sum(sums[t], 1)
            words, polls_left = _wait_for_words(coefficients_ptr + t * K, K, number, polls_left, BLOCK_K)
            routed = tl.sum(_floats(words, tl.float32)[:, None] * experts_up[t].to(tl.float32), 0)
            if NORM:
                words, polls_left = _wait_for_words(weights_ptr + t * K, K, number, polls_left, BLOCK_K)
                routed = routed / tl.sum(_floats(words, tl.float32), 0)
            # Whoever has given up waiting says so.
            out = tl.where(polls_left > 0, out + routed, float("nan"))
            tl.store(out_ptr + t * H + row, round_for(out_ptr, out), mask=row < H)
    if program == 0:
        # All have read it before they arrived.
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
    """Counters, buffers and indices, for a stream's calls that are not asked for indices."""


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
        self._activated_layout, self._num_pairs = (T * I, dtype), T * K
        self._logits_layout = (2, T, N), (N, 2 * N, 1)
        self.memory = Scratch(partial(_make_memory, device, sizes), device)

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
            kept = self._with_buffers(memory.counters, indices)
        elif kept is None:
            kept = memory.kept = keep(partial(self._with_buffers, memory.counters), self._device)
        out = torch.empty_like(x)
        logits = x.new_empty_strided(*self._logits_layout)
        self._launch((x, *weights, logits, out), stream, kept)
        return out, logits

    def _with_buffers(self, counters: Tensor, indices: Tensor | None = None) -> Kept:
        numel, dtype = self._activated_layout
        activated = torch.empty(numel, dtype=dtype, device=self._device)
        if indices is None:
            indices = torch.empty(self._num_pairs, dtype=torch.int64, device=self._device)
        return Kept.of(counters, activated, indices)


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


def _make_memory(device: torch.device, sizes: _Sizes, count: int) -> list[_Memory]:
    begin = _word_begins(sizes.T, sizes.N, sizes.K, sizes.dtype.itemsize)["PAIRS"]
    pairs = _pairs(sizes.N, sizes.K, device)
    counters = torch.zeros(count, _whole_lines(begin + len(pairs)), dtype=torch.int32, device=device)
    counters[:, begin : begin + len(pairs)] = pairs
    return [_Memory(own) for own in counters.unbind()]


def _word_begins(T: int, N: int, K: int, itemsize: int) -> dict[str, int]:
    """Where words begin that are behind the counters and the logits', in int32."""
    ids = NUM_COUNTERS.value * LINE.value + _whole_lines(2 * T * N * (itemsize // 2))
    coefficients = ids + _whole_lines(T * K)
    weights = coefficients + _whole_lines(2 * T * K)
    return {"IDS": ids, "COEFFICIENTS": coefficients, "WEIGHTS": weights, "PAIRS": weights + _whole_lines(2 * T * K)}


def _whole_lines(numel: int) -> int:
    return cdiv(numel, LINE.value) * LINE.value


def _pairs(N: int, K: int, device: torch.device) -> Tensor:
    """All pairs of ranks (i, j) with (i + 1) * (j + 1) <= K, i in the high half: any other has K pairs that beat it.

    Made on the device, since a copy from the host is nothing that a graph can hold.
    """
    R, C = min(N, K), _num_pairs(N, K)
    lengths = (K // torch.arange(1, R + 1, device=device)).clamp(max=R)
    rows = torch.arange(R, device=device).repeat_interleave(lengths, output_size=C)
    begins = lengths.cumsum(0) - lengths
    return (rows << 16) | (torch.arange(C, device=device) - begins[rows])


def kernel_constants(T: int, H: int, I: int, N: int, K: int, num_programs: int, itemsize: int) -> dict[str, Any]:
    """The kernel's sizes and blocks, for weights of ``itemsize`` bytes."""
    num_routers = max(1, num_programs // 2)  # whatever T is: every launch adds as much to a counter
    width = 32 * 16 // itemsize  # 16 bytes for each thread of a warp
    C, block_n = _num_pairs(N, K), max(MIN_KEYS, next_power_of_2(N))
    block_h = min(1024, next_power_of_2(max(16, H)))
    own = cdiv(C, max(1, num_routers // T))
    down_width = min(2 * width, next_power_of_2(max(16, I)))
    gate_width = min(width, next_power_of_2(max(16, H)))
    gate_rows, gate_chunks = GATE_TILES[T]
    return {
        "T": T, "H": H, "I": I, "N": N, "K": K, "C": C,
        "NUM_ROUTERS": num_routers,
        "FIRST_GATED": num_routers if num_programs > 1 else 0,
        "WARPS": NUM_WARPS,
        "ROWS": gate_rows,
        "GATE_CHUNKS": min(gate_chunks, cdiv(H, gate_width)),
        "GATE_WIDTH": gate_width,
        "DOWN_ROWS": DOWN_ROWS,
        "DOWN_CHUNKS": min(DOWN_CHUNKS, cdiv(I, down_width)),
        "DOWN_WIDTH": down_width,
        "BLOCKS": cdiv(cdiv(H, num_programs), DOWN_ROWS),
        "BLOCK_R": max(MIN_KEYS, next_power_of_2(min(N, K))),
        "ROUTE_ROWS": 2,
        "BLOCK_H": block_h,
        "BLOCK_N": block_n,
        **_word_begins(T, N, K, itemsize),
        "OWN": own,
        # A word for each thread: of two that load the same word one may find it still missing, and only one is asked.
        "BLOCK_K": max(32 * NUM_WARPS, next_power_of_2(K)),
    }  # fmt: skip


@lru_cache(256)
def _num_pairs(num_expert_keys: int, num_experts_per_tok: int) -> int:
    """C."""
    R = min(num_expert_keys, num_experts_per_tok)
    return sum(min(R, num_experts_per_tok // i) for i in range(1, R + 1))
