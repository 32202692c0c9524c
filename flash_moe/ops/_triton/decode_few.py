"""flash_decode's kernel for a few tokens: a launch in which programs wait for one another twice, for no single task.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, S = T * K slots, G programs, all on the GPU
at once. Contiguous tensors; sums in float32 and in a fixed order. Each program

    routes    takes a row of the router, if it is one of the first E, and waits for all other rows
    selects   the K experts of every token, for itself, so that nobody waits to be told, and puts all slots in the order
              of their experts: of an expert that several tokens take, its rows come from memory for the first, and from
              L2 for the others, which follow before it is full (``MAX_SHARED_NBYTES``)
    gate_up   takes tiles of ROWS gate and ROWS up rows, ``activated [S, I]``, and waits for all others' tiles
    down      takes ROWS rows of the output over all S slots: their weighted sums are its own

Weights go from memory to registers in whole rows, without shared memory and without tensor cores, which a few tokens
cannot fill. The first chunks of the down rows are asked for before the second wait: they do not depend on it.

Whatever programs tell each other they read by plain loads, so that the programs of a multiprocessor share its L1 cache:
``activated`` is read by every program. That is right by the memory model of PTX, since writer's stores, its release,
the reader's acquire, a barrier and the reader's loads are in causality order; acquiring drops what L1 holds.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe._checks import debug_enabled
from flash_moe._moe_layer import MoELayer
from flash_moe.ops._triton.counters import LINE, MAX_POLLS, arrive, wait_again
from flash_moe.ops._triton.decode_call import PreparedCall, check_flag
from flash_moe.ops._triton.decode_config import max_registers, scale_kind
from flash_moe.ops._triton.decode_experts import BLOCK_OF_SCALE, num_scales
from flash_moe.ops._triton.decode_routing import NO_LOGIT, TINY_SUM, score
from flash_moe.ops._triton.math import INTERPRETED, accurate_exp, activation, round_for
from flash_moe.ops._triton.ranking import SMALLEST_KEY, ordered_key, with_ids
from flash_moe.ops._triton.relaunch import Kept, Relaunch
from flash_moe.ops._triton.router_keys import PADDING, long_keys, score_and_id
from flash_moe.ops._triton.scratch import Scratch, current_stream
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.schedule.tasks import sizes_of

# By the tokens' bytes an element. Of 16 bits, with more tokens the schedule is faster, on tensor cores. Of float32
# one takes a sixth of the schedule's time (41.6 of 266 us), eight two sevenths (261 of 929), and more have not been
# measured. All with the sizes of Qwen3-30B-A3B.
MAX_TOKENS = {2: 6, 4: 8}
MAX_SLOTS = 64
# Of an expert's gate and up rows, where tokens may share it: so much is read before its second token asks for the same
# row, which is to be in L2 still. Of the weights, down rows come back sooner. Measured are 6 and 12 MiB (Qwen3-30B-A3B
# in 16 bits and in float32); the limit, a third of an H200's L2, lets OLMoE pass in both and has not been measured.
# Beyond it is the schedule, which reads an expert once however large it is.
MAX_SHARED_NBYTES = 2**24
# The code goes through a token's experts, and through chunks of a gate row, without a loop.
MAX_EXPERTS_PER_TOKEN, MAX_CHUNKS = 16, 64
MAX_EXPERTS = 1024
# A cache line each: how many launches there were, what programs count, and whether one has given up.
LAUNCHES, ROUTED, DONE, FLAG = (tl.constexpr(i) for i in range(4))
NUM_COUNTERS = 4
# A program's list of slots: their experts, tokens and weights, and the experts in the order of tokens.
LISTS = tl.constexpr(4)
# What a thread loads at once, and how much of the router's row a program does.
LOAD_NBYTES, ROW_NBYTES = 16, 4096
WORD_NBYTES = 4


class Config(NamedTuple):
    programs: int = 4
    """On a multiprocessor."""
    num_warps: int = 4
    gate_up_rows: int = 4
    """As many as warps, or a multiple."""
    gate_up_chunks: int = 8
    """Of a row, a warp's loads that are on their way at a time."""
    down_rows: int = 4
    ahead: int = 2
    """Chunks of the down rows that are on their way at a time, also across the wait."""

    @property
    def max_registers(self) -> int:
        """Of a thread, so that the programs fit."""
        return max_registers(self.num_warps, self.programs)


@triton.jit
def _sum_in_threads(products, VECTOR: tl.constexpr):
    """Over what a thread has of a row, without asking another."""
    return tl.sum(tl.reshape(products, [products.shape[0], products.shape[1] // VECTOR, VECTOR]), 2)


@triton.jit
def _route(
    x_ptr, router_ptr, logits_ptr, num_routers, T: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)[:, None]
    for e in range(tl.program_id(0), E, num_routers):
        sums = tl.zeros([BLOCK_T, BLOCK_H // VECTOR], tl.float32)
        for first in tl.static_range(0, H, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)[None, :]
            weights = tl.load(router_ptr + e * H + h, mask=h < H, other=0.0)
            x = tl.load(x_ptr + t * H + h, mask=(t < T) & (h < H), other=0.0)
            sums += _sum_in_threads(weights.to(tl.float32) * x.to(tl.float32), VECTOR)
        of_sum = tl.arange(0, BLOCK_T)
        tl.store(logits_ptr + of_sum * E + e, round_for(logits_ptr, tl.sum(sums, 1)), mask=of_sum < T)


@triton.jit
def _take_best(keys, e):
    """The largest key of each row: its number, its id, and the keys without it."""
    best, id = score_and_id(tl.max(keys, 1)[:, None])
    lowest = PADDING if keys.dtype == tl.int64 else SMALLEST_KEY
    return best, id, tl.where(e == id, lowest, keys)


@triton.jit
def _select(
    logits_ptr, bias_ptr, T: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The ids of each token's K best, best first, and their weights, ``[ROWS, BLOCK_K]``.

    The rows go through the tokens over and over: each warp has one to itself, and waits for no other.
    """
    token = tl.arange(0, ROWS)[:, None] % T
    e = tl.broadcast_to(tl.arange(0, BLOCK_E)[None, :], [ROWS, BLOCK_E])
    k = tl.arange(0, BLOCK_K)[None, :]
    logits = tl.load(logits_ptr + token * E + e, mask=e < E, other=0.0).to(tl.float32)
    logits = tl.where(e < E, logits, NO_LOGIT)
    largest = tl.zeros([ROWS, 1], tl.float32)
    total = largest + 1.0
    if SCORING == "softmax" and (HAS_BIAS or not NORM):
        largest = tl.max(logits, 1)[:, None]
        total = tl.sum(accurate_exp(logits - largest), 1)[:, None]
    ranked = logits  # without a bias a softmax ranks as logits do
    if SCORING == "sigmoid" or HAS_BIAS:
        ranked = score(logits, largest, total, SCORING)
        if HAS_BIAS:
            ranked += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    if SCORING == "softmax" and not HAS_BIAS and logits_ptr.dtype.element_ty != tl.float32:
        keys = tl.where(e < E, with_ids(ordered_key(ranked), e), SMALLEST_KEY)
    else:
        keys = long_keys(ranked + 0.0, e, e < E)  # -0.0 becomes 0.0
    ids = tl.zeros([ROWS, BLOCK_K], tl.int32)
    chosen = tl.full([ROWS, BLOCK_K], NO_LOGIT, tl.float32)
    for j in tl.static_range(K):  # the K largest keys in turn: less work than comparing each with each
        logit, id, keys = _take_best(keys, e)
        if SCORING == "sigmoid" or HAS_BIAS:
            logit = tl.sum(tl.where(e == id, logits, 0.0), 1)[:, None]
        ids, chosen = tl.where(k == j, id, ids), tl.where(k == j, logit, chosen)
    if NORM and SCORING == "softmax":
        weights = tl.where(k < K, accurate_exp(chosen - tl.max(chosen, 1)[:, None]), 0.0)
        weights = weights / tl.sum(weights, 1)[:, None]
    else:
        weights = tl.where(k < K, score(chosen, largest, total, SCORING), 0.0)
        if NORM:
            weights = weights / (tl.sum(weights, 1)[:, None] + TINY_SUM)
    return ids, weights


@triton.jit
def _write_slots(
    slots_ptr, ids, weights, T: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program's list of all slots, for itself: an expert, a token and the bits of a weight each, in BLOCK_S.

    In the order of their experts and, among equal ones, of tokens. For one token as they were selected.
    """
    row, k = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_K)[None, :]
    slot, mask = row * K + k, (row < T) & (k < K)
    bits = weights.to(tl.int32, bitcast=True)
    if T > 1:
        unordered_ptr = slots_ptr + (LISTS - 1) * BLOCK_S
        tl.store(unordered_ptr + slot, ids, mask=mask)
        tl.debug_barrier()
        rank = tl.zeros([ROWS, BLOCK_K], tl.int32)
        for other in tl.static_range(T * K):
            id = tl.load(unordered_ptr + other)
            rank += ((id < ids) | ((id == ids) & (other < slot))).to(tl.int32)
    else:
        rank = slot
    tl.store(slots_ptr + rank, ids, mask=mask)
    tl.store(slots_ptr + BLOCK_S + rank, row + tl.zeros_like(ids), mask=mask)
    tl.store(slots_ptr + 2 * BLOCK_S + rank, bits, mask=mask)
    tl.debug_barrier()


@triton.jit
def _scaled(sums, scale_ptr, row, first, R: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, SCALE: tl.constexpr):
    """Sums of VECTOR columns each, from ``first`` on, of rows of float8 weights ``[R, C]``, times their scales."""
    if SCALE == "row":
        sums *= tl.load(scale_ptr + row, mask=row < R, other=0.0)[:, None]
    elif SCALE == "block":
        column = first + tl.arange(0, sums.shape[1]) * VECTOR
        per_row = (C + BLOCK_OF_SCALE - 1) // BLOCK_OF_SCALE
        at = row[:, None] // BLOCK_OF_SCALE * per_row + column[None, :] // BLOCK_OF_SCALE
        sums *= tl.load(scale_ptr + at, mask=(row < R)[:, None] & (column < C)[None, :], other=0.0)
    return sums


@triton.jit
def _gate_up(
    x_ptr, gate_up_ptr, scale_ptr, activated_ptr, slots_ptr, S: tl.constexpr, H: tl.constexpr, I: tl.constexpr,
    HIDDEN_ACT: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """activated[s] = act(gate[expert of s] x[token of s]) * (up[expert of s] x[token of s]).

    A warp has whole rows, CHUNKS pieces of a gate row and of an up row on their way at a time, and waits for no other.
    """
    TILES: tl.constexpr = (I + ROWS - 1) // ROWS
    lane = tl.arange(0, WIDTH // VECTOR)[None, :]
    for tile in range(tl.program_id(0), S * TILES, tl.num_programs(0)):
        slot = tile // TILES
        id = tl.load(slots_ptr + slot).to(tl.int64)
        token_ptr = x_ptr + tl.load(slots_ptr + BLOCK_S + slot) * H
        row = (tile - slot * TILES) * ROWS + tl.arange(0, ROWS)
        i = row[:, None]
        gate_ptr = gate_up_ptr + id * (2 * I * H)
        own_scale_ptr = scale_ptr
        if SCALE != "none":
            own_scale_ptr += id * num_scales(2 * I, H, SCALE)
        gate = tl.zeros([ROWS, WIDTH // VECTOR], tl.float32)
        up = tl.zeros([ROWS, WIDTH // VECTOR], tl.float32)
        for first in tl.static_range(0, H, CHUNKS * WIDTH):
            pieces = ()
            for chunk in tl.static_range(CHUNKS):
                h = first + chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
                mask, at = (i < I) & (h < H), i * H + h
                gates = tl.load(gate_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
                ups = tl.load(gate_ptr + I * H + at, mask=mask, other=0.0, eviction_policy="evict_first")
                pieces = pieces + ((gates, ups),)
            for chunk in tl.static_range(CHUNKS):
                # As wide as the rows: each thread loads what it needs, and nothing changes threads.
                h = tl.broadcast_to((first + chunk * WIDTH + tl.arange(0, WIDTH))[None, :], [ROWS, WIDTH])
                x = tl.load(token_ptr + h, mask=h < H, other=0.0).to(tl.float32)
                gates = _sum_in_threads(pieces[chunk][0].to(tl.float32) * x, VECTOR)
                ups = _sum_in_threads(pieces[chunk][1].to(tl.float32) * x, VECTOR)
                gate += _scaled(gates, own_scale_ptr, row, first + chunk * WIDTH, I, H, VECTOR, SCALE)
                up += _scaled(ups, own_scale_ptr, I + row, first + chunk * WIDTH, 2 * I, H, VECTOR, SCALE)
        activated = activation(tl.sum(gate, 1), HIDDEN_ACT) * tl.sum(up, 1)
        # By one lane of each row's warp, where the sum is.
        at = slot * I + i + lane
        activated = tl.broadcast_to(round_for(activated_ptr, activated)[:, None], at.shape)
        tl.store(activated_ptr + at, activated, mask=(i < I) & (lane == 0))


@triton.jit
def _as_words(ptr):
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The two 16-bit floats of each word, as float32."""
    if dtype == tl.bfloat16:
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = words.to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _load_down(
    down_ptr, slots_ptr, chunk, row, end, S: tl.constexpr, H: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_I: tl.constexpr, IN_WORDS: tl.constexpr,
):  # fmt: skip
    """A chunk ``[rows, BLOCK_I]`` of all slots' down rows, each in PARTS; zeros from row ``end`` on, and after all."""
    SCALE: tl.constexpr = 2 if IN_WORDS else 1
    slot = chunk // PARTS
    expert_ptr = down_ptr + tl.load(slots_ptr + slot, mask=slot < S, other=0).to(tl.int64) * (H * I)
    i = chunk % PARTS * (BLOCK_I // SCALE) + tl.arange(0, BLOCK_I // SCALE)
    end = tl.where(slot < S, end, 0)
    mask, at = (row < end)[:, None] & (i < I // SCALE)[None, :], row[:, None] * (I // SCALE) + i[None, :]
    if IN_WORDS:
        expert_ptr = _as_words(expert_ptr)
    return tl.load(expert_ptr + at, mask=mask, other=0 if IN_WORDS else 0.0, eviction_policy="evict_first")


@triton.jit
def _down_products(
    tile, activated_ptr, chunk, S: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr, BLOCK_I: tl.constexpr,
    VECTOR: tl.constexpr, IN_PAIRS: tl.constexpr, IN_WORDS: tl.constexpr,
):  # fmt: skip
    """Sums of VECTOR columns each. ``IN_PAIRS``, two that are a word elsewhere come first, and add up as those do."""
    SCALE: tl.constexpr = 2 if IN_WORDS else 1
    PRODUCTS: tl.constexpr = 2 if IN_PAIRS else 1
    slot = chunk // PARTS
    i = chunk % PARTS * (BLOCK_I // SCALE) + tl.arange(0, BLOCK_I // SCALE)
    own_ptr = activated_ptr + slot * I
    mask = (i < I // SCALE) & (slot < S)
    if IN_WORDS:
        activated = tl.load(_as_words(own_ptr) + i, mask=mask, other=0)[None, :]
        low, high = _halves(tile, activated_ptr.dtype.element_ty)
        activated_low, activated_high = _halves(activated, activated_ptr.dtype.element_ty)
        products = low * activated_low + high * activated_high
    else:
        i, mask = i[None, :], mask[None, :]
        if tile.dtype != activated_ptr.dtype.element_ty:  # of other sizes, and so in other threads
            i, mask = tl.broadcast_to(i, tile.shape), tl.broadcast_to(mask, tile.shape)
        activated = tl.load(own_ptr + i, mask=mask, other=0.0)
        products = tile.to(tl.float32) * activated.to(tl.float32)  # of 16 bits exact, so a fused one is no other
        if IN_PAIRS:
            products = _sum_in_threads(products, 2)
    return _sum_in_threads(products, VECTOR // PRODUCTS)


@triton.jit
def _add_to_token(sums, products, slots_ptr, slot, S: tl.constexpr, T: tl.constexpr, BLOCK_S: tl.constexpr):
    """``sums``: one a token. Those of others stay as they are, also where a product is not finite."""
    weight = tl.load(slots_ptr + 2 * BLOCK_S + slot, mask=slot < S, other=0).to(tl.float32, bitcast=True)
    if T == 1:
        return (sums[0] + weight * products,)
    token = tl.load(slots_ptr + BLOCK_S + slot, mask=slot < S, other=T)
    added = ()
    for t in tl.static_range(T):
        added = added + (tl.where(token == t, sums[t] + weight * products, sums[t]),)
    return added


@triton.jit
def _down(
    down_ptr, scale_ptr, activated_ptr, slots_ptr, out_ptr, tiles, row, polls_left, factor, T: tl.constexpr,
    S: tl.constexpr, H: tl.constexpr, I: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr,
    IN_PAIRS: tl.constexpr, IN_WORDS: tl.constexpr,
):  # fmt: skip
    """out[t, row] = sum of weight * (down[expert of s, row] activated[s]) over the slots s of token t.

    ``tiles``: the first AHEAD chunks. Rows that follow are a grid's rows further on.
    """
    CHUNKS: tl.constexpr = (S * PARTS + AHEAD - 1) // AHEAD * AHEAD
    for block in range(BLOCKS):
        next_row = row + tl.num_programs(0) * ROWS
        next_end = tl.where(block + 1 < BLOCKS, H, 0)
        sums = (tl.zeros([ROWS, BLOCK_I // VECTOR], tl.float32),) * T
        for first in range(0, CHUNKS, AHEAD):
            is_last = first + AHEAD == CHUNKS
            load_row, load_end = tl.where(is_last, next_row, row), tl.where(is_last, next_end, H)
            load_first = tl.where(is_last, 0, first + AHEAD)
            for j in tl.static_range(AHEAD):
                tile = _load_down(down_ptr, slots_ptr, load_first + j, load_row, load_end, S, H, I, PARTS, BLOCK_I,
                                  IN_WORDS)  # fmt: skip
                chunk = first + j
                slot = chunk // PARTS
                products = _down_products(tiles[0], activated_ptr, chunk, S, I, PARTS, BLOCK_I, VECTOR, IN_PAIRS,
                                          IN_WORDS)  # fmt: skip
                if SCALE != "none":
                    id = tl.load(slots_ptr + slot, mask=slot < S, other=0).to(tl.int64)
                    own_scale_ptr = scale_ptr + id * num_scales(H, I, SCALE)
                    products = _scaled(products, own_scale_ptr, row, chunk % PARTS * BLOCK_I, H, I, VECTOR, SCALE)
                sums = _add_to_token(sums, products, slots_ptr, slot, S, T, BLOCK_S)
                tiles = tiles[1:] + (tile,)
        for t in tl.static_range(T):
            out = tl.sum(sums[t], 1) * factor
            out = tl.where(polls_left > 0, out, float("nan"))  # whoever has given up waiting says so
            tl.store(out_ptr + t * H + row, round_for(out_ptr, out), mask=row < H)
        row = next_row


@triton.jit
def decode_few_kernel(
    x_ptr, router_ptr, gate_up_ptr, down_ptr, bias_ptr, gate_up_scale_ptr, down_scale_ptr, logits_ptr, out_ptr,
    counters_ptr, activated_ptr, slots_ptr, factor, max_polls,
    T: tl.constexpr, H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, HIDDEN_ACT: tl.constexpr, GATE_UP_SCALE: tl.constexpr,
    DOWN_SCALE: tl.constexpr, GATE_UP_ROWS: tl.constexpr, GATE_UP_CHUNKS: tl.constexpr,
    GATE_UP_VECTOR: tl.constexpr, WIDTH: tl.constexpr, DOWN_ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr, SELECT_ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
    ROUTER_VECTOR: tl.constexpr, IN_PAIRS: tl.constexpr, IN_WORDS: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = T * K
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    launches = tl.load(counters_ptr + LAUNCHES * LINE)
    num_routers = tl.minimum(num_programs, E)
    if program < num_routers:
        _route(x_ptr, router_ptr, logits_ptr, num_routers, T, H, E, BLOCK_T, BLOCK_H, ROUTER_VECTOR)
        arrive(counters_ptr + ROUTED * LINE)
    polls_left = wait_again(counters_ptr + ROUTED * LINE, launches, num_routers, max_polls)
    ids, weights = _select(logits_ptr, bias_ptr, T, E, K, SCORING, HAS_BIAS, NORM, SELECT_ROWS, BLOCK_E, BLOCK_K)
    slots_ptr += program * (LISTS * BLOCK_S)
    _write_slots(slots_ptr, ids, weights, T, K, SELECT_ROWS, BLOCK_K, BLOCK_S)
    _gate_up(x_ptr, gate_up_ptr, gate_up_scale_ptr, activated_ptr, slots_ptr, S, H, I, HIDDEN_ACT, GATE_UP_SCALE,
             GATE_UP_ROWS, GATE_UP_CHUNKS, WIDTH, GATE_UP_VECTOR, BLOCK_S)  # fmt: skip
    arrive(counters_ptr + DONE * LINE)  # before more is loaded: a release waits for every load before it
    row = program * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
    tiles = ()
    for chunk in tl.static_range(AHEAD):
        tiles = tiles + (_load_down(down_ptr, slots_ptr, chunk, row, H, S, H, I, PARTS, BLOCK_I, IN_WORDS),)
    polls_left = wait_again(counters_ptr + DONE * LINE, launches, num_programs, polls_left)
    _down(down_ptr, down_scale_ptr, activated_ptr, slots_ptr, out_ptr, tiles, row, polls_left, factor, T, S, H, I,
          DOWN_SCALE, DOWN_ROWS, BLOCKS, AHEAD, PARTS, VECTOR, BLOCK_I, BLOCK_S, IN_PAIRS, IN_WORDS)  # fmt: skip
    if polls_left <= 0:
        tl.store(counters_ptr + FLAG * LINE, 1)
    if program == 0:
        # All have read it before they arrived for the last time.
        tl.store(counters_ptr + LAUNCHES * LINE, launches + 1)


def config_of(T: int, layer: MoELayer) -> Config:
    rows = 4 if T == 1 else 8
    is_float8 = layer.gate_up_scale is not None or layer.down_scale is not None
    return Config(gate_up_rows=rows, gate_up_chunks=2 if is_float8 else 8)


def takes_few(x: Tensor, layer: MoELayer) -> bool:
    """Whether ``FewTokens`` is for such a call."""
    E, H, I = layer.down_proj.shape
    T, K = x.shape[0], layer.routing.num_experts_per_tok
    if layer.routing.num_expert_groups > 1 or layer.shared is not None:
        return False
    if not 0 < T <= MAX_TOKENS[x.element_size()] or T * K > MAX_SLOTS or K > MAX_EXPERTS_PER_TOKEN:
        return False
    if E > MAX_EXPERTS or max(E, 2 * I) * H >= 2**31:
        return False
    if T > 1 and 2 * I * H * layer.gate_up_proj.element_size() > MAX_SHARED_NBYTES:
        return False
    return cdiv(H, _width(H, layer.gate_up_proj.element_size())) <= MAX_CHUNKS


class FewTokens(PreparedCall):
    """The scratch and the launch of a call on a few tokens, where ``takes_few`` says so."""

    def __init__(self, x: Tensor, layer: MoELayer, config: Config | None = None) -> None:
        super().__init__(sizes_of(x, layer), x.device)
        config = config or config_of(x.shape[0], layer)
        self._dtype, self._logits_dtype = x.dtype, layer.router_weight.dtype
        num_programs, options = 1, {"num_warps": config.num_warps}
        if not INTERPRETED:
            num_programs = config.programs * torch.cuda.get_device_properties(x.device).multi_processor_count
            # All programs at once or an error, since they wait for each other.
            options |= {"launch_cooperative_grid": True, "maxnreg": config.max_registers}
        self._num_programs = num_programs
        numbers = (float(layer.routing.routed_scaling_factor), MAX_POLLS)
        self._launches = [
            Relaunch(decode_few_kernel, num_programs, numbers, constants, **options)
            for constants in _constants(layer, x.shape[0], num_programs, x.element_size(), config)
        ]
        # Not a method of this object, which would then outlive its last reference.
        self.scratch = Scratch(partial(_make_counters, x.device), x.device)

    def __call__(self, tensors: Sequence[Tensor | None], logits: Tensor | None, out: Tensor) -> None:
        stream, is_capturing = current_stream(self.device_index)
        own = None if is_capturing else self._own_of_stream.get(stream)
        if own is None:
            own = self._make_own(stream, is_capturing)
        down: Any = tensors[3]
        launch = self._launches[down.data_ptr() % WORD_NBYTES == 0]
        launch((*tensors[:5], *tensors[9:], own.logits if logits is None else logits, out), stream, own.kept)
        self.has_launched = True
        if debug_enabled() and not is_capturing:
            check_flag(self._flag(own.kept.tensors[0]))

    def _flag(self, state: Tensor) -> Tensor:
        return state[FLAG.value * LINE.value :]

    def _own(self, state: Tensor, buffers: tuple[Tensor, ...]) -> "_Own":
        *programs_own, logits = buffers
        return _Own(logits, Kept.of(state, *programs_own))

    def _make_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        T, E, I, K = self.sizes.T, self.sizes.E, self.sizes.I, self.sizes.K
        activated = torch.empty(T * K, I, dtype=self._dtype, device=self.device)
        slots = torch.empty(self._num_programs, LISTS.value, _block_s(T * K), dtype=torch.int32, device=self.device)
        return activated, slots, torch.empty(T, E, dtype=self._logits_dtype, device=self.device)


class _Own(NamedTuple):
    """What belongs to one stream, or to one call in a graph."""

    logits: Tensor
    """Where the caller does not ask for them."""
    kept: Kept
    """Counters, activated products and programs' lists of slots."""


def _make_counters(device: torch.device, count: int) -> list[Tensor]:
    return list(torch.zeros(count, NUM_COUNTERS * LINE.value, dtype=torch.int32, device=device).unbind())


def _block_s(S: int) -> int:
    """Whole cache lines."""
    return cdiv(S, LINE.value) * LINE.value


def _block_i(I: int, itemsize: int, config: Config) -> int:
    """A chunk of a down row: at most a load for each thread, so that all rows of a tile lie alike in the threads."""
    return min(config.num_warps * 32 * LOAD_NBYTES // itemsize, next_power_of_2(max(16, I)))


def _width(H: int, itemsize: int) -> int:
    """A chunk of a gate row: a load for each thread of a warp."""
    return min(32 * LOAD_NBYTES // itemsize, next_power_of_2(max(16, H)))


def _constants(layer: MoELayer, T: int, num_programs: int, itemsize: int, config: Config) -> list[dict[str, Any]]:
    """For down rows that begin anywhere, and at a word."""
    routing, (E, H, I) = layer.routing, layer.down_proj.shape
    gate_up_itemsize, down_itemsize = layer.gate_up_proj.element_size(), layer.down_proj.element_size()
    K, block_i = routing.num_experts_per_tok, _block_i(I, down_itemsize, config)
    parts = cdiv(I, block_i)
    width = _width(H, gate_up_itemsize)
    constants = {
        "T": T, "H": H, "I": I, "E": E, "K": K,
        "SCORING": routing.scoring,
        "HAS_BIAS": routing.correction_bias is not None,
        "NORM": routing.norm_topk_prob,
        "HIDDEN_ACT": layer.hidden_act,
        "GATE_UP_ROWS": config.gate_up_rows,
        "DOWN_ROWS": config.down_rows,
        "GATE_UP_CHUNKS": min(config.gate_up_chunks, cdiv(H, width)),
        "BLOCKS": cdiv(H, num_programs * config.down_rows),
        "AHEAD": min(config.ahead, T * K * parts),
        "PARTS": parts,
        "GATE_UP_SCALE": scale_kind(layer.gate_up_scale),
        "DOWN_SCALE": scale_kind(layer.down_scale),
        "GATE_UP_VECTOR": LOAD_NBYTES // gate_up_itemsize,
        "VECTOR": LOAD_NBYTES // down_itemsize,
        "SELECT_ROWS": max(config.num_warps, next_power_of_2(T)),
        "BLOCK_T": next_power_of_2(T),
        "BLOCK_S": _block_s(T * K),
        "ROUTER_VECTOR": LOAD_NBYTES // itemsize,
        "BLOCK_E": next_power_of_2(max(16, E)),
        "BLOCK_K": next_power_of_2(K),
        "WIDTH": width,
        "BLOCK_H": min(ROW_NBYTES // itemsize, next_power_of_2(max(16, H))),
        "BLOCK_I": block_i,
        "IN_PAIRS": down_itemsize == 2 and I % 2 == 0,
    }  # fmt: skip
    # What is held in registers across a wait takes one for each 16 bits, but in words.
    return [constants | {"IN_WORDS": in_words} for in_words in (False, constants["IN_PAIRS"])]
