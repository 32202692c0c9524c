"""Product router: exact top K of N * N sums of two scores, optionally as routing weights, and its backward.

T tokens, N keys a half, K experts per token, R ranks kept of each half (the next power of two of min(K, N)). A program
serves one token, in three steps (many tokens with few experts each go to `router_lanes.py`, which does the same):
  rank       The R best logits of each half, in order, go to scratch memory: score and id.
  threshold  The K best sums lie among the pairs of ranks with (i + 1) * (j + 1) <= K. 2 * A sorted lists cover these,
             A about sqrt(K): list i < A is row rank i with the columns, list A + j column rank j with the rows from A
             on. So the sums above a threshold are counted by one binary search a list, and bisection finds a threshold
             that at least K sums reach and, unless equal sums prevent it, at most WIDTH. Few candidates are all taken.
  sort       These sums go through a sorting network, and the K best come out.
Up to 512 keys a half, networks sort 32-bit keys, for a third of what 64-bit keys cost: the score in fixed point between
the extremes of what is sorted, then the id. Scores less than a step apart may come out in the wrong order. That is
looked for, and repaired: a random half or set of sums in some dozens has such a pair.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.math import accurate_exp, round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.router_keys import (
    LOWEST,
    PADDING,
    PROBABILITIES,
    RENORMALIZED,
    SCORES,
    ids_of,
    load_logits,
    log_sum_exp,
    long_keys,
    nan_max,
    nan_min,
    scores_of,
    weigh,
)
from flash_moe.ops._triton.router_lanes import forward_by_lanes, takes_lanes
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.ops._triton.sort import log2, merge_best, top

MAX_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
# Keys that go through a network at a time, unless more must be kept: more does no less work and takes long to compile.
MAX_SORT = 512
# Up to this many keys a half both halves are ranked at once: 6.2 instead of 7.2 us at T 1, N 128, K 64.
MAX_SIDE_BY_SIDE = 128
# Up to this many experts a token all candidates are sorted, since that is sooner done than finding a threshold.
MAX_TAKE_ALL = 16
# A threshold with up to twice as many sums as needed is found in a step or two; above this the longer sort costs more.
MAX_WIDE = 128
# Where up to twice as many sums as needed will do, thresholds are guessed. The first, of the way from what K sums
# surely reach to the best sum: with normal logits 1.0 counts are enough at K 64, by halves 3.
FIRST_STEP = tl.constexpr(0.1)
# Guesses that have not found it by then never may: bounds are halved, which ends whatever the logits are.
MAX_GUESSES = tl.constexpr(10)
# Bounds that are sums cost a reduction a try, which pays only where sums tie, and few searches last so long.
TRIES_WITHOUT_SUMS = 3
NEVER = tl.constexpr(-1)
# Sums that tie with the worst chosen and do not fit among the sorted go through networks of this size: bfloat16 logits
# leave some five of them at N 320, K 512, and another network of 512 takes a third longer.
MAX_EXTRA = 64
# Keys a warp sorts: one warp a token is fastest as long as its registers hold them. 64-bit keys take twice as many,
# and ever longer to compile.
KEYS_PER_WARP, LONG_KEYS_PER_WARP = 1024, 128
# A lane loads and stores so many neighbours in float32, and networks that know this are faster. In 16 bits, where it
# would be twice as many, they are slower: 108 instead of 105 us at T 4096, N 320, K 512.
FLOATS_PER_LANE = 4
# Registers a thread, so that 32 one-warp programs fit a multiprocessor: 18 instead of 20 us at T 4096, N 128, K 64.
SMALL_SORT, SMALL_SORT_REGISTERS, REGISTERS = 128, 64, 112
# Gradients written at a time.
BACKWARD_BLOCK_N = 512
# Up to this many experts a token the backward compares each with all others, one of a token's experts a lane, for a few
# tokens a warp: 17 instead of 42 us at T 32768, N 128, K 16, and 5.4 instead of 8.0 us at T 4096, K 32.
MAX_ALL_PAIRS, MAX_BLOCK_T = 32, 4


@triton.jit
def _as_ints(float_ptr):
    return float_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _are_finite(low, high):
    return (low > -1e30) & (high < 1e30)


@triton.jit
def _fixed_point(x, low, high, BITS: tl.constexpr):
    """``x`` as an int32 from 0 at ``low`` to 2^BITS - 2 at ``high``, never in wrong order; only the low BITS count."""
    is_finite = _are_finite(low, high)
    low = tl.where(is_finite, low, 0.0)
    spread = tl.maximum(tl.where(is_finite, high, 1e30) - low, 1e-30)
    # Adding 2^23 leaves the integer part in the low bits of the float.
    scaled = (x - low) * ((2.0**BITS - 2.0) / spread) + 8388608.0
    return scaled.to(tl.int32, bitcast=True)


@triton.jit
def _settle(scores, scores_ptr, ids_ptr, length, RUN: tl.constexpr):
    """Order scores, also in memory, and ids, nearly in order, by (score descending, id ascending).

    Of every RUN of them, a power of two, the first ``length``.
    """
    SIZE: tl.constexpr = scores.shape[0]
    tl.debug_barrier()
    s = tl.arange(0, SIZE)
    following = tl.load(scores_ptr + s + 1, mask=s % RUN + 1 < length, other=float("-inf"))
    swaps = tl.max((scores < following).to(tl.int32))
    while swaps > 0:
        swaps = 0
        for parity in range(2):
            tl.debug_barrier()
            first = 2 * tl.arange(0, SIZE // 2) + parity
            mask = first % RUN + 1 < length
            score = tl.load(scores_ptr + first, mask=mask, other=0.0)
            next_score = tl.load(scores_ptr + first + 1, mask=mask, other=0.0)
            id = tl.load(ids_ptr + first, mask=mask, other=0)
            next_id = tl.load(ids_ptr + first + 1, mask=mask, other=0)
            swap = mask & ((score < next_score) | ((score == next_score) & (id > next_id)))
            tl.debug_barrier()
            tl.store(scores_ptr + first, next_score, mask=swap)
            tl.store(scores_ptr + first + 1, score, mask=swap)
            tl.store(ids_ptr + first, next_id, mask=swap)
            tl.store(ids_ptr + first + 1, id, mask=swap)
            swaps += tl.max(swap.to(tl.int32))
    tl.debug_barrier()


@triton.jit
def _rank_one_by_one(logits_ptr, scores_ptr, ids_ptr, N, R: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    keys = long_keys(load_logits(logits_ptr, n, n < N), n, n < N)
    for r in range(tl.minimum(R, N)):
        best = tl.max(keys, 0)
        tl.store(scores_ptr + r, scores_of(best))
        tl.store(ids_ptr + r, ids_of(best).to(tl.int32))
        keys = tl.where(keys == best, PADDING, keys)


@triton.jit
def _per_element(halves, COUNT: tl.constexpr):
    """A number of each half, COUNT times."""
    HALVES: tl.constexpr = halves.shape[0]
    return tl.reshape(tl.broadcast_to(halves[:, None], [HALVES, COUNT]), [HALVES * COUNT])


@triton.jit
def _rank_quickly(
    logits_ptr,
    half_stride,
    scores_ptr,
    ids_ptr,
    N,
    HALVES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One half; or both, in one chain of dependent steps in place of two, with twice as much in each."""
    LOG_N: tl.constexpr = log2(BLOCK_N)
    BITS: tl.constexpr = 23 if LOG_N < 9 else 31 - LOG_N
    i = tl.arange(0, HALVES * BLOCK_N)
    n = i % BLOCK_N
    x = load_logits(logits_ptr + i // BLOCK_N * half_stride, n, n < N)
    halves = tl.reshape(x, [HALVES, BLOCK_N])
    low, high = tl.reduce(halves, 1, nan_min), tl.reduce(halves, 1, nan_max)
    steps = _fixed_point(x, _per_element(low, BLOCK_N), _per_element(high, BLOCK_N), BITS)
    keys = tl.where(n < N, (steps << LOG_N) | (BLOCK_N - 1 - n), LOWEST)
    ids = BLOCK_N - 1 - (top(keys, R, VECTOR, HALVES) & (BLOCK_N - 1))
    r = tl.arange(0, HALVES * R)
    is_key = (r % R < N) & (ids < N)
    scores = load_logits(logits_ptr + r // R * half_stride, ids, is_key)
    tl.store(scores_ptr + r, scores)
    tl.store(ids_ptr + r, ids)
    # A better logit that was left out is in the same step of the fixed point as the last that was not.
    last = tl.min(tl.reshape(tl.where(is_key & (scores == scores), scores, float("inf")), [HALVES, R]), 1)
    num_better = tl.sum(((x > _per_element(last, BLOCK_N)) & (n < N)).to(tl.int32))
    num_better -= tl.sum(((scores > _per_element(last, R)) & is_key).to(tl.int32))
    if (num_better == 0) & _are_finite(tl.reduce(low, 0, nan_min), tl.reduce(high, 0, nan_max)):
        _settle(scores, scores_ptr, ids_ptr, tl.minimum(R, N), R)
    else:
        tl.debug_barrier()
        for half in range(HALVES):
            _rank_one_by_one(logits_ptr + half * half_stride, scores_ptr + half * R, ids_ptr + half * R, N, R, BLOCK_N)


@triton.jit
def _rank_many(logits_ptr, scores_ptr, ids_ptr, N, R: tl.constexpr, BLOCK_N: tl.constexpr):
    best = tl.full([R], PADDING, tl.int64)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        best = merge_best(best, top(long_keys(load_logits(logits_ptr, n, n < N), n, n < N), R), PADDING)
    r = tl.arange(0, R)
    tl.store(scores_ptr + r, scores_of(best))
    tl.store(ids_ptr + r, ids_of(best).to(tl.int32))


@triton.jit
def _list_length(list, N, K, A: tl.constexpr):
    """Candidates in a list: A lists of a row rank each, then A of a column rank each."""
    rank = list & (A - 1)
    length = tl.minimum(K // (rank + 1), N) - tl.where(list < A, 0, A)
    return tl.where(rank < N, tl.maximum(length, 0), 0)


@triton.jit
def _count(threshold, fixed, other_ptr, length, LOG_R: tl.constexpr):
    """How many sums of each list, ``fixed`` plus one of the descending others, are not below the threshold."""
    count = tl.zeros_like(length)
    for i in tl.static_range(LOG_R + 1):
        probe = count + (1 << (LOG_R - i))
        other = tl.load(other_ptr + probe - 1, mask=probe <= length, other=0.0)
        count = tl.where((probe <= length) & ~(fixed + other < threshold), probe, count)
    return count


@triton.jit
def _next_threshold(low, high, log_low, log_high, log_aim, tries, GUESSES: tl.constexpr):
    """Where between the bounds the logarithm of the count, as if it fell evenly, is ``log_aim``; or their middle."""
    threshold = 0.5 * tl.maximum(low, -MAX_FLOAT) + 0.5 * tl.minimum(high, MAX_FLOAT)
    if GUESSES & _are_finite(low, high) & (tries < MAX_GUESSES):
        guess = low + (high - low) * ((log_low - log_aim) / (log_low - log_high))
        threshold = tl.where((guess > low) & (guess < high), guess, threshold)
    return threshold


@triton.jit
def _find_threshold(
    ranked_ptr, N, K, R: tl.constexpr, A: tl.constexpr, WIDTH: tl.constexpr, GUESSES: tl.constexpr,
    SUMS_FROM: tl.constexpr,
):  # fmt: skip
    """How many sums of each list ``[2A]`` reach the threshold, and the threshold.

    K to WIDTH sums do; or more than WIDTH, and then fewer than K exceed it. From try SUMS_FROM on bounds are sums that
    occur, so that the search ends when none is left between them, and not only when no number is. A NaN is no bound:
    it counts as above any threshold. There are none if the best sum is below infinity.
    """
    list = tl.arange(0, 2 * A)
    rank = list & (A - 1)
    fixed_ptr = ranked_ptr + tl.where(list < A, 0, R)
    other_ptr = ranked_ptr + tl.where(list < A, R, 0)
    fixed = tl.load(fixed_ptr + rank, mask=rank < N, other=0.0)
    # K pairs or more are at least as good as the pair of ranks (i, j) with (i + 1) * (j + 1) >= K.
    beyond = (K + rank) // (rank + 1) - 1
    is_pair = (rank < N) & (beyond < N)
    bound = fixed + tl.load(other_ptr + beyond, mask=is_pair, other=0.0)
    bound = tl.max(tl.where(is_pair & (bound == bound), bound, float("-inf")))
    low = float("-inf")
    high = tl.load(ranked_ptr) + tl.load(ranked_ptr + R)
    is_bounded = high < float("inf")
    threshold = bound
    if GUESSES & _are_finite(bound, high):  # that bound is reached by two to three times K sums: a little above it
        threshold += FIRST_STEP * (high - bound)
    length = _list_length(list, N, K, A)
    first_ptr = other_ptr + tl.where(list < A, 0, A)
    counts = tl.zeros_like(length)
    total = 0
    log_aim = 0.5 * tl.log2(K * 1.0 * WIDTH)
    log_low, log_high = 0.0, 0.0
    tries = 0
    is_open = True
    while is_open:
        found = _count(threshold, fixed, first_ptr, length, log2(R))
        num_found = tl.sum(found)
        log_found = tl.log2(tl.maximum(num_found, 1).to(tl.float32))
        bounds_are_sums = False if SUMS_FROM == NEVER else is_bounded & (tries >= SUMS_FROM)
        tries += 1
        if num_found >= K:
            counts, total, low, log_low = found, num_found, threshold, log_found
            if bounds_are_sums:  # the last sum of a list that reaches the threshold
                last = fixed + tl.load(first_ptr + found - 1, mask=found > 0, other=0.0)
                low = tl.min(tl.where(found > 0, last, float("inf")))
        else:
            high, log_high = threshold, log_found
            if bounds_are_sums:  # the first that does not
                first = fixed + tl.load(first_ptr + found, mask=found < length, other=0.0)
                high = tl.max(tl.where(found < length, first, float("-inf")))
        threshold = _next_threshold(low, high, log_low, log_high, log_aim, tries, GUESSES)
        is_between = (threshold > low) & (threshold < high)
        is_open = (total > WIDTH) & (low < high) & (is_between | bounds_are_sums)
        threshold = tl.where(threshold > low, threshold, high)  # a sum as the upper bound is left to try, too
        if GUESSES:  # too few reach the first one
            threshold = tl.where(total == 0, bound, threshold)
            is_open = is_open | (total == 0)
    return counts, low


@triton.jit
def _find_list(ends_ptr, number, A: tl.constexpr):
    """In which list the chosen sums of these numbers are, and the number of that list's first."""
    list = tl.zeros_like(number)
    for i in tl.static_range(log2(2 * A)):
        probe = list + (A >> i)
        list = tl.where(tl.load(ends_ptr + probe - 1) <= number, probe, list)
    return list, tl.load(ends_ptr + list - 1, mask=list > 0, other=0)


@triton.jit
def _find_list_of_all(number, N, K, A: tl.constexpr):
    """The same where all candidates are chosen, and how many they are."""
    list = tl.zeros_like(number)
    begin = tl.zeros_like(number)
    end = 0
    for i in tl.static_range(2 * A):
        list = tl.where(end <= number, i, list)
        begin = tl.where(end <= number, end, begin)
        end += _list_length(i, N, K, A)
    return list, begin, end


@triton.jit
def _load_pairs(ranked_ptr, number, list, begin, mask, R: tl.constexpr, A: tl.constexpr):
    """Sums, row ids and column ids of the chosen sums of these numbers."""
    rank = list & (A - 1)
    other = number - begin
    row = tl.where(list < A, rank, other + A)
    col = R + tl.where(list < A, other, rank)
    sums = tl.load(ranked_ptr + row, mask=mask, other=0.0) + tl.load(ranked_ptr + col, mask=mask, other=0.0)
    ids_ptr = _as_ints(ranked_ptr + 2 * R)
    return sums, tl.load(ids_ptr + row, mask=mask, other=0), tl.load(ids_ptr + col, mask=mask, other=0)


@triton.jit
def _pair_keys(sums, row_ids, col_ids, low, high, mask, LOG_N: tl.constexpr):
    """32-bit keys: the sum in fixed point, 0 at ``low`` alone, then the ids."""
    BITS: tl.constexpr = 23 if LOG_N < 4 else 31 - 2 * LOG_N
    LAST: tl.constexpr = (1 << LOG_N) - 1
    steps = _fixed_point(tl.where(mask, sums, low), low, high, BITS) & ((1 << BITS) - 1)
    steps = tl.where(sums > low, tl.maximum(steps, 1), 0)
    return tl.where(mask, (steps << (2 * LOG_N)) | ((LAST - row_ids) << LOG_N) | (LAST - col_ids), LOWEST)


@triton.jit
def _sort_all(
    ranked_ptr,
    N,
    K,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Keys ``[WIDTH]`` of all candidates in order, and how many there are."""
    number = tl.arange(0, WIDTH)
    list, begin, total = _find_list_of_all(number, N, K, A)
    mask = number < total
    sums, row_ids, col_ids = _load_pairs(ranked_ptr, number, list, begin, mask, R, A)
    low = tl.min(tl.where(mask & (sums == sums), sums, float("inf")))
    high = tl.load(ranked_ptr) + tl.load(ranked_ptr + R)
    return top(_pair_keys(sums, row_ids, col_ids, low, high, mask, LOG_N), WIDTH, VECTOR), total


@triton.jit
def _sort_some(
    ranked_ptr,
    start,
    total,
    low,
    high,
    N,
    R: tl.constexpr,
    A: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_N: tl.constexpr,
    IS_QUICK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Keys of SIZE of the chosen sums, from number ``start`` on, in order."""
    number = start + tl.arange(0, SIZE)
    mask = number < total
    list, begin = _find_list(_as_ints(ranked_ptr + 4 * R), number, A)
    sums, row_ids, col_ids = _load_pairs(ranked_ptr, number, list, begin, mask, R, A)
    if IS_QUICK:
        keys = _pair_keys(sums, row_ids, col_ids, low, high, mask, LOG_N)
    else:
        keys = long_keys(sums, row_ids.to(tl.int64) * N + col_ids, mask)
    return top(keys, SIZE, VECTOR)


@triton.jit
def _sort_chosen(
    ranked_ptr,
    total,
    low,
    N,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDTH: tl.constexpr,
    EXTRA: tl.constexpr,
    LOG_N: tl.constexpr,
    IS_QUICK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Keys ``[WIDTH]`` of the chosen sums, or where these are more than WIDTH of the best, in order."""
    high = tl.load(ranked_ptr) + tl.load(ranked_ptr + R)
    best = _sort_some(ranked_ptr, 0, total, low, high, N, R, A, WIDTH, LOG_N, IS_QUICK, VECTOR)
    for start in range(WIDTH, total, EXTRA):
        extra = _sort_some(ranked_ptr, start, total, low, high, N, R, A, EXTRA, LOG_N, IS_QUICK, VECTOR)
        best = merge_best(best, extra, LOWEST if IS_QUICK else PADDING)
    return best


@triton.jit
def _settle_pairs(best, total, logits_ptr, half_stride, ranked_ptr, N, WIDTH: tl.constexpr, LOG_N: tl.constexpr):
    """Sums and expert ids ``[WIDTH]`` of sorted keys in their final order; they replace the ranks in memory."""
    LAST: tl.constexpr = (1 << LOG_N) - 1
    row = LAST - ((best >> LOG_N) & LAST)
    col = LAST - (best & LAST)
    sums = load_logits(logits_ptr, row, best >= 0) + load_logits(logits_ptr + half_stride, col, best >= 0)
    w = tl.arange(0, WIDTH)
    ids_ptr = _as_ints(ranked_ptr + WIDTH)
    tl.debug_barrier()
    tl.store(ranked_ptr + w, sums)
    tl.store(ids_ptr + w, (row << LOG_N) | col)
    _settle(sums, ranked_ptr, ids_ptr, tl.minimum(total, WIDTH), WIDTH)
    ids = tl.load(ids_ptr + w)
    return tl.load(ranked_ptr + w), (ids >> LOG_N) * N + (ids & LAST)


@triton.jit
def _router_fwd_kernel(
    logits_ptr,
    scratch_ptr,
    scores_ptr,
    indices_ptr,
    log_sums_ptr,
    half_stride,
    token_stride,
    T,
    N,
    K,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDTH: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCRATCH: tl.constexpr,
    IS_QUICK: tl.constexpr,
    HALVES: tl.constexpr,
    TAKES_ALL: tl.constexpr,
    VECTOR: tl.constexpr,
    GUESSES: tl.constexpr,
    SUMS_FROM: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """A token's scratch: 2R scores, 2R ids and 2A ends of lists; then WIDTH sums and WIDTH ids."""
    LOG_N: tl.constexpr = log2(BLOCK_N)
    t = tl.program_id(0).to(tl.int64)
    logits_ptr += t * token_stride
    ranked_ptr = scratch_ptr + t * SCRATCH
    ids_ptr = _as_ints(ranked_ptr + 2 * R)
    if IS_QUICK:
        for half in range(0, 2, HALVES):
            half_ptr = logits_ptr + half * half_stride
            _rank_quickly(
                half_ptr, half_stride, ranked_ptr + half * R, ids_ptr + half * R, N, HALVES, R, BLOCK_N, VECTOR
            )
    else:
        for half in range(2):
            _rank_many(logits_ptr + half * half_stride, ranked_ptr + half * R, ids_ptr + half * R, N, R, BLOCK_N)
    row_log_sum, col_log_sum = 0.0, 0.0
    if OUTPUT == PROBABILITIES:
        for half in range(2):
            half_ptr = logits_ptr + half * half_stride + tl.zeros([1, 1], tl.int32)
            log_sum = tl.sum(tl.sum(log_sum_exp(half_ptr, tl.full([1, 1], True, tl.int1), N, BLOCK_N), 1), 0)
            tl.store(log_sums_ptr + half * T + t, log_sum)
            row_log_sum, col_log_sum = col_log_sum, log_sum
    tl.debug_barrier()
    if TAKES_ALL:
        best, total = _sort_all(ranked_ptr, N, K, R, A, WIDTH, LOG_N, VECTOR)
    else:
        counts, low = _find_threshold(ranked_ptr, N, K, R, A, WIDTH, GUESSES, SUMS_FROM)
        total = tl.sum(counts)
        tl.store(_as_ints(ranked_ptr + 4 * R) + tl.arange(0, 2 * A), tl.cumsum(counts, 0))
        tl.debug_barrier()
        best = _sort_chosen(ranked_ptr, total, low, N, R, A, WIDTH, EXTRA, LOG_N, IS_QUICK, VECTOR)
    if IS_QUICK:
        scores, ids = _settle_pairs(best, total, logits_ptr, half_stride, ranked_ptr, N, WIDTH, LOG_N)
    else:
        scores, ids = scores_of(best), ids_of(best)
    k = tl.arange(0, WIDTH)
    scores = weigh(scores, k < K, row_log_sum, col_log_sum, OUTPUT)
    tl.store(scores_ptr + t * K + k, round_for(scores_ptr, scores), mask=k < K)
    tl.store(indices_ptr + t * K + k, ids.to(tl.int64), mask=k < K)


@triton.jit
def _add_equal(key_a, a, key_b, b):
    """Of keys in order: the sum at the last key of both."""
    return key_b, tl.where(key_a == key_b, a + b, b)


@triton.jit
def _softmax_part(logits_ptr, n, mask, log_sum, inner, OUTPUT: tl.constexpr):
    """What the softmax over the keys adds to a logit's gradient, chosen or not."""
    if OUTPUT == PROBABILITIES:
        return -accurate_exp(load_logits(logits_ptr, n, mask) - log_sum) * inner
    else:
        return tl.zeros(mask.shape, tl.float32)


@triton.jit
def _router_bwd_kernel(
    dout_ptr,
    weights_ptr,
    indices_ptr,
    logits_ptr,
    log_sums_ptr,
    dlogits_ptr,
    half_stride,
    token_stride,
    T,
    N,
    K,
    BLOCK_N: tl.constexpr,
    K_POW2: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """dlogits[half, t, n] = the sum of dscores[t, k] over the k whose expert has n as that half's key.

    Weights w = exp(score - log_sums) have dscores = w dw, and each logit less its probability times the sum of those.
    Renormalized ones have dscores = w (dw - sum of w dw).
    """
    t, half = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offset = half * half_stride + t * token_stride
    k = tl.arange(0, K_POW2)
    # Unsigned 32-bit: ids are below 2^32 here, and a 64-bit division costs several times more.
    is_expert = k < (K if HAS_TAIL else K_POW2)
    ids = tl.load(indices_ptr + t * K + k, mask=is_expert, other=0).to(tl.uint32)
    keys_per_half = tl.full([K_POW2], N, tl.uint32)
    row = ids // keys_per_half
    key = tl.where(half == 0, row, ids - row * keys_per_half)
    # Equal keys side by side, in a fixed order. N and K are below 2^16 and 2^13: 29 bits hold both, less the sign.
    pairs = top(tl.where(is_expert, (key.to(tl.int32) << log2(K_POW2)) | k, -1), K_POW2, VECTOR)
    is_pair = pairs >= 0 if HAS_TAIL else k >= 0
    order = pairs & (K_POW2 - 1)
    key = pairs >> log2(K_POW2)
    dscores = tl.load(dout_ptr + t * K + order, mask=is_pair, other=0.0).to(tl.float32)
    inner = 0.0
    if OUTPUT != SCORES:
        weights = tl.load(weights_ptr + t * K + order, mask=is_pair, other=0.0)
        inner = tl.sum(dscores * weights)
        dscores = weights * (dscores - inner if OUTPUT == RENORMALIZED else dscores)
    _, dlogits = tl.associative_scan((key, dscores), 0, _add_equal)
    ends = (k == K_POW2 - 1) | (key != tl.gather(key, tl.minimum(k + 1, K_POW2 - 1), 0))
    log_sum = tl.load(log_sums_ptr + half * T + t) if OUTPUT == PROBABILITIES else 0.0
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        unchosen = _softmax_part(logits_ptr + offset, n, n < N, log_sum, inner, OUTPUT)
        tl.store(dlogits_ptr + offset + n, round_for(dlogits_ptr, unchosen), mask=n < N)
    tl.debug_barrier()
    is_key = ends & is_pair
    dlogits += _softmax_part(logits_ptr + offset, key, is_key, log_sum, inner, OUTPUT)
    tl.store(dlogits_ptr + offset + key, round_for(dlogits_ptr, dlogits), mask=is_key)


@triton.jit
def _router_bwd_pairs_kernel(
    dout_ptr,
    weights_ptr,
    indices_ptr,
    logits_ptr,
    log_sums_ptr,
    dlogits_ptr,
    half_stride,
    token_stride,
    T,
    N,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_POW2: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """``_router_bwd_kernel`` for few experts a token: several tokens, both halves, each key compared with all others.

    Every expert of a key writes the sum of all that have it: the same bits, as they are added in the same order.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, K_POW2)
    mask = (t < T)[:, None] & (k < K)[None, :]
    offs = t[:, None] * K + k[None, :]
    # Unsigned 32-bit: ids are below 2^32 here, and a 64-bit division costs several times more.
    ids = tl.load(indices_ptr + offs, mask=mask, other=0).to(tl.uint32)
    dscores = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    inner = tl.zeros([BLOCK_T], tl.float32)
    if OUTPUT != SCORES:
        weights = tl.load(weights_ptr + offs, mask=mask, other=0.0)
        inner = tl.sum(dscores * weights, 1)
        dscores = weights * (dscores - inner[:, None] if OUTPUT == RENORMALIZED else dscores)
    row = ids // tl.full([BLOCK_T, K_POW2], N, tl.uint32)
    col = ids - row * N
    for half in tl.static_range(2):
        half_offs = half * half_stride + t[:, None] * token_stride
        log_sum = tl.zeros([BLOCK_T], tl.float32)
        if OUTPUT == PROBABILITIES:
            log_sum = tl.load(log_sums_ptr + half * T + t, mask=t < T, other=0.0)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[None, :]
            is_logit = (t < T)[:, None] & (n < N)
            unchosen = _softmax_part(logits_ptr, half_offs + n, is_logit, log_sum[:, None], inner[:, None], OUTPUT)
            tl.store(dlogits_ptr + half_offs + n, round_for(dlogits_ptr, unchosen), mask=is_logit)
        key = (row if half == 0 else col).to(tl.int32)
        is_same = key[:, :, None] == key[:, None, :]
        dlogits = tl.sum(tl.where(is_same, dscores[:, :, None], 0.0), 1)
        dlogits += _softmax_part(logits_ptr, half_offs + key, mask, log_sum[:, None], inner[:, None], OUTPUT)
        tl.debug_barrier()
        tl.store(dlogits_ptr + half_offs + key, round_for(dlogits_ptr, dlogits), mask=mask)


def router_forward(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """``scores [T, K]`` in the logits' dtype and ``indices [T, K]``, int64, for logits ``[2, T, N]``."""
    scores = router_logits.new_empty(router_logits.shape[1], num_experts_per_tok)
    return scores, _forward(router_logits, scores, scores, SCORES.value)


def routing_forward(
    router_logits: Tensor, num_experts_per_tok: int, norm_topk_prob: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``weights [T, K]``, float32, ``indices [T, K]``, int64, and the logits' ``log_sums [2, T]`` (empty if normed)."""
    T = router_logits.shape[1]
    weights = router_logits.new_empty(T, num_experts_per_tok, dtype=torch.float32)
    log_sums = weights.new_empty(2, 0 if norm_topk_prob else T)
    output = RENORMALIZED if norm_topk_prob else PROBABILITIES
    return weights, _forward(router_logits, weights, log_sums, output.value), log_sums


def _forward(router_logits: Tensor, scores: Tensor, log_sums: Tensor, output: int) -> Tensor:
    (_, T, N), K = router_logits.shape, scores.shape[1]
    indices = torch.empty_like(scores, dtype=torch.int64)
    if takes_lanes(router_logits, K):
        forward_by_lanes(router_logits, scores, indices, log_sums, output)
        return indices
    is_16_bit = router_logits.dtype != torch.float32
    meta, num_warps, registers = _shape_forward(N, K, is_16_bit)
    scratch = torch.empty(T, meta["SCRATCH"], dtype=torch.float32, device=router_logits.device)
    # The interpreter has no registers to limit.
    limit = {"maxnreg": registers} if router_logits.is_cuda else {}
    launch(
        _router_fwd_kernel,
        (T,),
        (router_logits, scratch, scores, indices, log_sums),
        (*router_logits.stride()[:2], T, N, K),
        **meta,
        OUTPUT=output,
        num_warps=num_warps,
        **limit,
    )
    return indices


@lru_cache(maxsize=256)
def _shape_forward(
    num_expert_keys: int, num_experts_per_tok: int, is_16_bit: bool
) -> tuple[dict[str, int | bool], int, int | None]:
    """The forward kernel's constants, its warps, and its registers a thread."""
    N, K = num_expert_keys, num_experts_per_tok
    candidates = sum(min(N, K // i) for i in range(1, min(N, K) + 1))
    ranks = max(2, next_power_of_2(min(K, N)))
    block_n = max(ranks, min(MAX_SORT, next_power_of_2(N)))
    width = max(2, next_power_of_2(K))
    is_quick = N <= block_n <= MAX_SORT
    takes_all = is_quick and K <= MAX_TAKE_ALL
    if takes_all:
        width = max(2, next_power_of_2(candidates))
    elif width <= MAX_WIDE and 4 * K > 3 * width:
        width *= 2
    guesses = 4 * K <= 3 * width
    lists = 1
    while K // (lists + 1) > lists:
        lists *= 2
    meta: dict[str, int | bool] = {
        "R": ranks,
        "A": lists,
        "WIDTH": width,
        "EXTRA": min(MAX_EXTRA, width),
        "BLOCK_N": block_n,
        "SCRATCH": max(4 * ranks + 2 * lists, 2 * width),
        "IS_QUICK": is_quick,
        "HALVES": 2 if is_quick and block_n <= MAX_SIDE_BY_SIDE else 1,
        "TAKES_ALL": takes_all,
        "GUESSES": guesses,
        "SUMS_FROM": TRIES_WITHOUT_SUMS if guesses else 0 if is_16_bit else NEVER.value,
        "VECTOR": 0 if is_16_bit else FLOATS_PER_LANE,
    }
    longest = max(block_n, width)
    if is_quick:
        registers = SMALL_SORT_REGISTERS if longest <= SMALL_SORT else REGISTERS
        return meta, max(1, longest // KEYS_PER_WARP), registers if longest <= MAX_SORT else None
    return meta, 1 if longest <= LONG_KEYS_PER_WARP else min(16, longest // LONG_KEYS_PER_WARP), None


def router_backward(grad_scores: Tensor, indices: Tensor, num_expert_keys: int) -> Tensor:
    """``grad_logits [2, T, N]``, summed in float32 in a fixed order."""
    grad_logits = grad_scores.new_empty(2, indices.shape[0], num_expert_keys)
    _backward(grad_scores, grad_scores, indices, grad_logits, grad_scores, grad_logits, SCORES.value)
    return grad_logits


def routing_backward(
    grad_weights: Tensor,
    weights: Tensor,
    indices: Tensor,
    router_logits: Tensor,
    log_sums: Tensor,
    norm_topk_prob: bool,
) -> Tensor:
    """``grad_logits [2, T, N]`` in the dtype and memory order of the logits."""
    grad_logits = torch.empty_like(router_logits)
    output = RENORMALIZED if norm_topk_prob else PROBABILITIES
    _backward(grad_weights, weights, indices, router_logits, log_sums, grad_logits, output.value)
    return grad_logits


def _backward(
    grad_out: Tensor,
    weights: Tensor,
    indices: Tensor,
    router_logits: Tensor,
    log_sums: Tensor,
    grad_logits: Tensor,
    output: int,
) -> None:
    (_, T, N), K = grad_logits.shape, indices.shape[1]
    block_n = min(BACKWARD_BLOCK_N, next_power_of_2(N))
    k_pow2 = max(2, next_power_of_2(K))
    tensors = grad_out, weights, indices, router_logits, log_sums, grad_logits
    sizes = *grad_logits.stride()[:2], T, N, K
    if k_pow2 <= MAX_ALL_PAIRS:
        block_t = min(MAX_BLOCK_T, MAX_ALL_PAIRS // k_pow2)
        grid = (cdiv(T, block_t),)
        launch(_router_bwd_pairs_kernel, grid, tensors, sizes, block_t, block_n, k_pow2, output, num_warps=1)
    else:
        num_warps = max(1, k_pow2 // KEYS_PER_WARP)
        # With weights, or more keys, a network that knows what a lane holds takes too many registers: 255, and spills.
        is_float = grad_logits.dtype == torch.float32
        vector = FLOATS_PER_LANE if is_float and output == SCORES.value and k_pow2 <= MAX_SORT else 0
        meta = block_n, k_pow2, K < k_pow2, vector, output
        launch(_router_bwd_kernel, (T, 2), tensors, sizes, *meta, num_warps=num_warps)
