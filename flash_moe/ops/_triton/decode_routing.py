"""Routing in the kernel of flash_decode: logits, the choice of K experts a token, and who was chosen by whom.

T tokens, H hidden size, E experts, K experts a token. Pair t * K + k is the k-th best expert of token t. What is known
of the pairs stands in ``pairs`` and ``weights``, T * E of each: of few tokens, pair (t, e) at t * E + e, and
``takers [E]`` has a bit for each token; of many, the pairs of expert e begin at e * T, in any order, and ``takers[e]``
is their number. No sum depends on that order.
"""

import triton
import triton.language as tl

from flash_moe._moe_layer import TINY
from flash_moe.ops._triton.math import accurate_exp, dot, round_for
from flash_moe.ops._triton.ranking import SMALLEST_KEY, is_above, ordered_key, with_ids

# Below every logit, and finite: a token of NaNs would subtract infinities.
NO_LOGIT = tl.constexpr(-3.4e38)
# A sector of the L2 cache for each expert's takers: additions to one sector take turns.
TAKER_STRIDE = tl.constexpr(8)
TINY_SUM = tl.constexpr(TINY)


@triton.jit
def route(
    x_ptr,
    router_ptr,
    logits_ptr,
    begin,
    end,
    first_token,
    end_token,
    H: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Logits of experts ``[begin, end)``: of one by sums, of several by a matrix product."""
    e, t = begin + tl.arange(0, EXPERTS), first_token + tl.arange(0, TOKENS)
    weights_ptr, tokens_ptr = router_ptr + e * H, x_ptr + t.to(tl.int64) * H
    if EXPERTS == 1:
        products = tl.zeros([TOKENS, BLOCK_H], tl.float32)
        for first in tl.range(0, H, BLOCK_H, num_stages=3):
            h = first + tl.arange(0, BLOCK_H)
            weights = tl.load(weights_ptr[:, None] + h[None, :], mask=(h < H)[None, :], other=0.0)
            x = tl.load(tokens_ptr[:, None] + h[None, :], mask=(t < end_token)[:, None] & (h < H)[None, :], other=0.0)
            products += weights.to(tl.float32) * x.to(tl.float32)
        logits = tl.sum(products, 1)[:, None]
    else:
        logits = tl.zeros([TOKENS, EXPERTS], tl.float32)
        for first in tl.range(0, H, BLOCK_H, num_stages=3):
            h = first + tl.arange(0, BLOCK_H)
            mask = (e < end)[None, :] & (h < H)[:, None]
            weights = tl.load(weights_ptr[None, :] + h[:, None], mask=mask, other=0.0)
            x = tl.load(tokens_ptr[:, None] + h[None, :], mask=(t < end_token)[:, None] & (h < H)[None, :], other=0.0)
            logits = dot(x.to(weights.dtype), weights, logits)
    mask = (t < end_token)[:, None] & (e < end)[None, :]
    tl.store(logits_ptr + t[:, None] * E + e[None, :], round_for(logits_ptr, logits), mask=mask)


@triton.jit
def score(logits, largest, total, SCORING: tl.constexpr):
    if SCORING == "softmax":
        return accurate_exp(logits - largest) / total
    small = accurate_exp(-tl.abs(logits))  # of either sign: an exponential that cannot overflow
    return tl.where(logits >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _above(others, other, keys, e, IS_DISTINCT: tl.constexpr):
    """[others, experts]: whether the other's key is larger, or equal with a lower id."""
    if IS_DISTINCT:
        return others[:, None] > keys[None, :]
    return is_above(others[:, None], other[:, None], keys[None, :], e[None, :])


@triton.jit
def _as_stored(keys, e, keys_ptr):
    """The same keys, of which there is one copy.

    What was computed may be computed again where another layout needs it, and come out a bit larger: an expert would
    stand above itself. Logits are only loaded, and need no such care.
    """
    tl.store(keys_ptr + e, keys)
    tl.debug_barrier()  # all keys are there before any thread reads
    return tl.load(keys_ptr + e)


@triton.jit
def _ranks(keys, e, keys_ptr, IS_DISTINCT: tl.constexpr, BLOCK_E: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """How many stand above each expert. Many keys go through memory of the program's own, a block at a time."""
    if RANK_BLOCK == BLOCK_E:
        return tl.sum(_above(keys, e, keys, e, IS_DISTINCT).to(tl.int32), 0)
    tl.store(keys_ptr + e, keys)
    tl.debug_barrier()  # all keys are there before any thread reads
    ranks = tl.zeros([BLOCK_E], tl.int32)
    for first in tl.range(0, BLOCK_E, RANK_BLOCK):
        other = first + tl.arange(0, RANK_BLOCK)
        ranks += tl.sum(_above(tl.load(keys_ptr + other), other, keys, e, IS_DISTINCT).to(tl.int32), 0)
    tl.debug_barrier()  # all have read before other keys are there
    return ranks


@triton.jit
def _keep_best_groups(
    keys, ranked, e, keys_ptr, IS_DISTINCT: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, BEST: tl.constexpr,
    BLOCK_E: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """The stored keys, but the smallest one outside the groups whose two best have the largest sums."""
    group = e // (E // GROUPS)
    sums_ptr = keys_ptr + BLOCK_E
    place = tl.zeros([BLOCK_E], tl.int32)
    for first in tl.range(0, BLOCK_E, RANK_BLOCK):
        other = first + tl.arange(0, RANK_BLOCK)
        is_mine = (other // (E // GROUPS))[:, None] == group[None, :]
        others = tl.load(keys_ptr + other)
        place += tl.sum((_above(others, other, keys, e, IS_DISTINCT) & is_mine).to(tl.int32), 0)
    # The group's sum at its best expert: two terms, whose order does not matter.
    tl.store(sums_ptr + e, tl.where((place < 2) & (e < E), ranked, 0.0).to(tl.int32, bitcast=True))
    tl.debug_barrier()
    sums = tl.zeros([BLOCK_E], tl.float32)
    for first in tl.range(0, BLOCK_E, RANK_BLOCK):
        other = first + tl.arange(0, RANK_BLOCK)
        is_mine = (other // (E // GROUPS))[:, None] == group[None, :]
        sums += tl.sum(tl.where(is_mine, tl.load(sums_ptr + other).to(tl.float32, bitcast=True)[:, None], 0.0), 0)
    tl.debug_barrier()
    tl.store(sums_ptr + e, tl.where((place == 0) & (e < E), ordered_key(sums), SMALLEST_KEY))
    tl.debug_barrier()
    above = tl.zeros([BLOCK_E], tl.int32)
    for first in tl.range(0, BLOCK_E, RANK_BLOCK):
        other = first + tl.arange(0, RANK_BLOCK)
        others = tl.load(sums_ptr + other)
        above += tl.sum(_above(others, other // (E // GROUPS), ordered_key(sums), group, False).to(tl.int32), 0)
    tl.debug_barrier()  # all have read before other keys are there
    return tl.where(above < BEST, keys, SMALLEST_KEY)


@triton.jit
def select(
    logits_ptr,
    bias_ptr,
    keys_ptr,
    pairs_ptr,
    weights_ptr,
    takers_ptr,
    token,
    T,
    factor,
    E: tl.constexpr,
    K: tl.constexpr,
    IS_LISTED: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    BEST_GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """The K experts of one token and their weights. An expert's rank is how many stand above it."""
    e = tl.arange(0, BLOCK_E)
    # Past the L1 cache, which knows nothing of other multiprocessors' stores.
    logits = tl.load(logits_ptr + token * E + e, mask=e < E, other=0.0, cache_modifier=".cg")
    logits = tl.where(e < E, logits.to(tl.float32), NO_LOGIT)
    largest = tl.max(logits, 0)
    total = tl.sum(accurate_exp(logits - largest), 0)
    ranked = logits  # without a bias a softmax ranks as logits do
    if SCORING == "sigmoid" or HAS_BIAS or GROUPS > 1:
        scores = score(logits, largest, total, SCORING)
        biased = scores
        if HAS_BIAS:
            biased += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        if SCORING == "sigmoid" or HAS_BIAS:
            ranked = biased
    keys = tl.where(e < E, ordered_key(ranked), SMALLEST_KEY)
    IS_DISTINCT: tl.constexpr = SCORING == "softmax" and not HAS_BIAS and logits_ptr.dtype.element_ty != tl.float32
    if IS_DISTINCT:
        keys = with_ids(keys, e)
    if SCORING == "sigmoid" or HAS_BIAS or GROUPS > 1:
        keys = _as_stored(keys, e, keys_ptr)
    if GROUPS > 1:
        keys = _keep_best_groups(keys, biased, e, keys_ptr, IS_DISTINCT, E, GROUPS, BEST_GROUPS, BLOCK_E, RANK_BLOCK)
    ranks = _ranks(keys, e, keys_ptr, IS_DISTINCT, BLOCK_E, RANK_BLOCK)
    chosen = (ranks < K) & (e < E)
    if NORM and SCORING == "softmax":
        best = largest if not (HAS_BIAS or GROUPS > 1) else tl.max(tl.where(chosen, logits, NO_LOGIT), 0)
        weights = tl.where(chosen, accurate_exp(logits - best), 0.0)
        weights = weights / tl.sum(weights, 0)
    else:
        weights = tl.where(chosen, score(logits, largest, total, SCORING), 0.0)
        if NORM:
            weights = weights / (tl.sum(weights, 0) + TINY_SUM)
    if IS_LISTED:
        at = e * T + tl.atomic_add(takers_ptr + e * TAKER_STRIDE, 1, mask=chosen, sem="relaxed")
    else:
        at = token * E + e
        bit = (tl.zeros([BLOCK_E], tl.int32) + 1) << token
        tl.atomic_or(takers_ptr + e * TAKER_STRIDE, bit, mask=chosen, sem="relaxed")
    tl.store(pairs_ptr + at, token * K + ranks, mask=chosen)
    tl.store(weights_ptr + at, weights * factor, mask=chosen)


@triton.jit
def find_slots(takers_ptr, slots_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Writes each slot's expert into memory of the program's own; the number of slots hit."""
    e = tl.arange(0, BLOCK_E)
    # Past the L1 cache, as all that other programs write.
    is_hit = tl.load(takers_ptr + e * TAKER_STRIDE, mask=e < E, other=0, cache_modifier=".cg") != 0
    slot = tl.cumsum(is_hit.to(tl.int32), 0) - 1
    tl.store(slots_ptr + slot, e, mask=is_hit)
    tl.debug_barrier()  # all of it is there before any thread reads
    return tl.max(slot, 0) + 1


@triton.jit
def pairs_of(takers_ptr, pairs_ptr, weights_ptr, e, T, E: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
             IS_LISTED: tl.constexpr):  # fmt: skip
    """``[N]``: tokens of expert e, their pairs and weights, and which of them there are. No load waits for another."""
    n = tl.arange(0, N)
    takers = tl.load(takers_ptr + e * TAKER_STRIDE, cache_modifier=".cg")
    at = e * T + n if IS_LISTED else n * E + e
    pairs = tl.load(pairs_ptr + at, mask=n < T, other=0, cache_modifier=".cg")
    weights = tl.load(weights_ptr + at, mask=n < T, other=0.0, cache_modifier=".cg")
    if IS_LISTED:
        return pairs // K, pairs, weights, n < takers
    return n, pairs, weights, (takers >> n) & 1 != 0
