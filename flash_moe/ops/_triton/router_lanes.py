"""Product router for many tokens and few experts a token: each lane serves a token, all by itself.

T tokens, N keys a half, K experts per token, R ranks kept of each half. What `router.py` exchanges between lanes is
exchanged between a lane's registers here, so nothing is shuffled but the logits, once, on their way in. A row of keys
is a tuple of R tensors ``[BLOCK_T]``, which no layout can spread over lanes. In three steps:
  rank   Logits are taken R at a time: sorted, then merged with the best so far, as 32-bit keys of the score's high bits
         and the id. These hold a score of 16 bits whole. Scores of float32 that differ in the low bits alone are put in
         order afterwards; and where one such was kept and one was not, they are gone through once more.
  pair   Sums of ranks (i, j), (i + 1) * (j + 1) <= K. Those of one row rank are in order already, and of one column
         rank, but for sums that rounding made equal. So these lists are merged, as 64-bit keys of the sum and the id.
  store  Scores and ids, through a layout in which neighbouring lanes write neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.math import round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.router_keys import (
    LOWEST,
    PADDING,
    PROBABILITIES,
    from_ordered,
    ids_of,
    load_logits,
    log_sum_exp,
    long_keys,
    ordered,
    scores_of,
    weigh,
)
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.ops._triton.sort import log2

# A lane's registers hold no more ranks, and its 32-bit keys no more bits of an id beside those of a score.
MAX_RANKS, MAX_EXPERT_KEYS = 16, 512
# Fewer, and a load takes less than a sector of memory.
MIN_RANKS = 8
# By the bytes of a logit. As many as keep four warps a multiprocessor busy: at T 8192, N 128, K 16 float32 takes 16 us
# either way, bfloat16 11 instead of 15; at T 32768 it is 27 instead of 57, and 19 instead of 53.
MIN_TOKENS = {2: 8192, 4: 16384}
# One warp a program.
BLOCK_T = 32
NUM_STAGES = 3


@triton.constexpr_function
def _sort_pairs(n: int) -> tuple[tuple[int, int], ...]:
    """The exchanges of Batcher's odd-even merge sort of ``n`` elements."""
    pairs = []
    run = 1
    while run < n:
        step = run
        while step:
            for first in range(step % run, n - step, 2 * step):
                for i in range(first, min(first + step, n - step)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        pairs.append((i, i + step))
            step //= 2
        run *= 2
    return tuple(pairs)


@triton.constexpr_function
def _merge_pairs(n: int) -> tuple[tuple[int, int], ...]:
    """The exchanges that sort ``n`` elements, a power of two, in a bitonic order."""
    steps = [n >> i for i in range(1, n.bit_length())]
    return tuple((i, i + step) for step in steps for i in range(n) if not i & step)


@triton.constexpr_function
def _neighbours(n: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, i + 1) for parity in range(2) for i in range(parity, n - 1, 2))


@triton.constexpr_function
def _row_list(K: int, i: int) -> tuple[tuple[int, int], ...]:
    """Candidates of row rank ``i`` and a column rank that is no better."""
    return tuple((i, j) for j in range(i, K // (i + 1)))


@triton.constexpr_function
def _column_list(K: int, j: int) -> tuple[tuple[int, int], ...]:
    """Candidates of column rank ``j`` and a worse row rank."""
    return tuple((i, j) for i in range(j + 1, K // (j + 1)))


@triton.constexpr_function
def _other_candidates(K: int) -> tuple[tuple[int, int], ...]:
    """Those of no rank below two; the lists of these are too short to be merged each for itself."""
    return tuple((i, j) for i in range(2, K) for j in range(2, K // (i + 1)))


@triton.constexpr_function
def _length(pairs: tuple[tuple[int, int], ...]) -> int:
    return len(pairs)


@triton.jit
def _exchange_two(keys, A: tl.constexpr, B: tl.constexpr):
    a, b = keys[A], keys[B]
    return keys[:A] + (tl.maximum(a, b),) + keys[A + 1 : B] + (tl.minimum(a, b),) + keys[B + 1 :]


@triton.jit
def _exchange(keys, PAIRS: tl.constexpr):
    """The greater key of each pair comes first."""
    for i in tl.static_range(_length(PAIRS)):
        keys = _exchange_two(keys, PAIRS[i][0], PAIRS[i][1])
    return keys


@triton.jit
def _merge_best(best, keys):
    """Of both, each in descending order, the greatest, as many as ``best`` has; ``keys`` may be fewer."""
    R: tl.constexpr = len(best)
    greatest = ()
    for r in tl.static_range(R):
        if R - 1 - r < len(keys):
            greatest = greatest + (tl.maximum(best[r], keys[R - 1 - r]),)
        else:
            greatest = greatest + (best[r],)
    return _exchange(greatest, _merge_pairs(R))


@triton.jit
def _is_sorted(keys):
    is_sorted = keys[0] == keys[0]
    for i in tl.static_range(len(keys) - 1):
        is_sorted &= keys[i] >= keys[i + 1]
    return tl.min(is_sorted.to(tl.int32)) == 1


@triton.jit
def _settle(keys):
    """Sorts what nearly is in order."""
    while not _is_sorted(keys):
        keys = _exchange(keys, _neighbours(len(keys)))
    return keys


@triton.jit
def _split_each(parts):
    evens, odds = (), ()
    for p in tl.static_range(len(parts)):
        even, odd = tl.split(parts[p])
        evens, odds = evens + (even,), odds + (odd,)
    return evens + odds


@triton.jit
def _join_halves(parts):
    HALF: tl.constexpr = len(parts) // 2
    joined = ()
    for p in tl.static_range(HALF):
        joined = joined + (tl.join(parts[p], parts[p + HALF]),)
    return joined


@triton.jit
def _load_columns(logits_ptr, is_token, start, N, R: tl.constexpr, HAS_TAIL: tl.constexpr):
    """R logits of each token, from number ``start`` on."""
    n = start + tl.arange(0, R)
    mask = is_token[:, None]
    if HAS_TAIL:
        mask = mask & (n < N)[None, :]
    x = load_logits(logits_ptr[:, None], n[None, :], mask)
    columns = (tl.reshape(x, [x.shape[0]] + [2] * log2(R)),)
    for _ in tl.static_range(log2(R)):
        columns = _split_each(columns)
    return columns


@triton.jit
def _from_columns(columns):
    parts = columns
    for _ in tl.static_range(log2(len(columns))):
        parts = _join_halves(parts)
    return tl.reshape(parts[0], [columns[0].shape[0], len(columns)])


@triton.jit
def _short_keys(x, n, LOG_N: tl.constexpr):
    LAST: tl.constexpr = (1 << LOG_N) - 1
    return (ordered(x) & ~LAST) | (LAST - n)


@triton.jit
def _take(
    best,
    dropped,
    logits_ptr,
    is_token,
    start,
    N,
    R: tl.constexpr,
    LOG_N: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """The best short keys of each token, in order, and the best that is not among them, after R more logits."""
    columns = _load_columns(logits_ptr, is_token, start, N, R, HAS_TAIL)
    keys = ()
    for i in tl.static_range(R):
        key = _short_keys(columns[i], start + i, LOG_N)
        keys = keys + (tl.where(start + i < N, key, LOWEST) if HAS_TAIL else key,)
    keys = _exchange(keys, _sort_pairs(R))
    for i in tl.static_range(R):
        dropped = tl.maximum(dropped, tl.minimum(best[i], keys[R - 1 - i]))
    return _merge_best(best, keys), dropped


@triton.jit
def _best_of_step(logits_ptr, is_token, step, bound, N, R: tl.constexpr, LOG_N: tl.constexpr, HAS_TAIL: tl.constexpr):
    """The greatest long key below ``bound`` among the scores whose high bits are ``step``."""
    best = tl.full(is_token.shape, PADDING, tl.int64)
    for start in range(0, N, R):
        columns = _load_columns(logits_ptr, is_token, start, N, R, HAS_TAIL)
        for i in tl.static_range(R):
            is_of_step = (start + i < N) & ((ordered(columns[i]) >> LOG_N) == step)
            key = long_keys(columns[i], start + i + tl.zeros_like(step), is_of_step)
            best = tl.maximum(best, tl.where(key < bound, key, PADDING))
    return best


@triton.jit
def _resolve(best, keys, dropped, logits_ptr, is_token, N, LOG_N: tl.constexpr, HAS_TAIL: tl.constexpr):
    """Long keys ``best`` of the short ``keys``, but the best where high bits alone cannot tell which are kept.

    Those that share the last kept one's are gone through again, each as a whole.
    """
    R: tl.constexpr = len(keys)
    step = keys[R - 1] >> LOG_N
    is_unsure = is_token & (step == (dropped >> LOG_N))
    slot = tl.full(is_token.shape, R, tl.int32)
    for r in tl.static_range(R):
        slot -= (is_unsure & ((keys[r] >> LOG_N) == step)).to(tl.int32)
    bound = tl.full(is_token.shape, 2**63 - 1, tl.int64)
    while tl.min(slot) < R:
        bound = _best_of_step(logits_ptr, is_token, step, bound, N, R, LOG_N, HAS_TAIL)
        resolved = ()
        for r in tl.static_range(R):
            resolved = resolved + (tl.where(slot == r, bound, best[r]),)
        best = resolved
        slot += 1
    return best


@triton.jit
def _ranked(
    keys,
    dropped,
    logits_ptr,
    is_token,
    N,
    LOG_N: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    IS_16_BIT: tl.constexpr,
):
    """Scores and ids of the best keys, in their final order."""
    LAST: tl.constexpr = (1 << LOG_N) - 1
    scores, ids = (), ()
    for r in tl.static_range(len(keys)):
        id = LAST - (keys[r] & LAST)
        if IS_16_BIT:
            score = (from_ordered(keys[r]).to(tl.int32, bitcast=True) & ~LAST).to(tl.float32, bitcast=True)
        else:
            score = load_logits(logits_ptr, id, is_token & (id < N))
        scores, ids = scores + (score,), ids + (id,)
    if not IS_16_BIT:
        is_close = is_token & (keys[len(keys) - 1] >> LOG_N == dropped >> LOG_N)
        for r in tl.static_range(len(keys) - 1):
            is_close |= is_token & (keys[r] >> LOG_N == keys[r + 1] >> LOG_N)
        if tl.max(is_close.to(tl.int32)) == 1:
            best = _resolve(_long_keys(scores, ids), keys, dropped, logits_ptr, is_token, N, LOG_N, HAS_TAIL)
            scores, ids = _scores_and_ids(_settle(best))
    return scores, ids


@triton.jit
def _long_keys(scores, ids):
    keys = ()
    for i in tl.static_range(len(scores)):
        keys = keys + (long_keys(scores[i], ids[i], True),)
    return keys


@triton.jit
def _scores_and_ids(keys):
    scores, ids = (), ()
    for i in tl.static_range(len(keys)):
        scores, ids = scores + (scores_of(keys[i]),), ids + (ids_of(keys[i]).to(tl.int32),)
    return scores, ids


@triton.jit
def _candidates(rows, row_ids, cols, col_ids, N, PAIRS: tl.constexpr):
    """Long keys of the sums of these pairs of ranks."""
    sums, ids = (), ()
    for i in tl.static_range(_length(PAIRS)):
        sums = sums + (rows[PAIRS[i][0]] + cols[PAIRS[i][1]],)
        ids = ids + (row_ids[PAIRS[i][0]] * N + col_ids[PAIRS[i][1]],)
    return _long_keys(sums, ids)


@triton.jit
def _best_pairs(rows, row_ids, cols, col_ids, N, K: tl.constexpr):
    """Long keys of the best sums, in order; the first K count."""
    best = _settle(_candidates(rows, row_ids, cols, col_ids, N, _row_list(K, 0)))
    for _ in tl.static_range(K, len(rows)):
        best = best + (tl.full(rows[0].shape, PADDING, tl.int64),)
    if K >= 2:
        best = _merge_best(best, _settle(_candidates(rows, row_ids, cols, col_ids, N, _column_list(K, 0))))
    if K >= 4:
        best = _merge_best(best, _settle(_candidates(rows, row_ids, cols, col_ids, N, _row_list(K, 1))))
    if K >= 6:
        best = _merge_best(best, _settle(_candidates(rows, row_ids, cols, col_ids, N, _column_list(K, 1))))
    if K >= 9:
        others = _candidates(rows, row_ids, cols, col_ids, N, _other_candidates(K))
        best = _merge_best(best, _exchange(others, _sort_pairs(len(others))))
    return best


@triton.jit
def _router_lanes_kernel(
    logits_ptr,
    scores_ptr,
    indices_ptr,
    log_sums_ptr,
    half_stride,
    token_stride,
    T,
    N,
    K: tl.constexpr,
    R: tl.constexpr,
    LOG_N: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    IS_16_BIT: tl.constexpr,
    OUTPUT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = t < T
    rows_ptr = logits_ptr + t * token_stride
    cols_ptr = rows_ptr + half_stride
    dropped_row = tl.full([BLOCK_T], LOWEST, tl.int32)
    dropped_col = dropped_row
    row_keys = ()
    for _ in tl.static_range(R):
        row_keys = row_keys + (dropped_row,)
    col_keys = row_keys
    # Both halves in one loop: what one does not depend on in the other fills its waits.
    for start in tl.range(0, N, R, num_stages=NUM_STAGES):
        row_keys, dropped_row = _take(row_keys, dropped_row, rows_ptr, is_token, start, N, R, LOG_N, HAS_TAIL)
        col_keys, dropped_col = _take(col_keys, dropped_col, cols_ptr, is_token, start, N, R, LOG_N, HAS_TAIL)
    rows, row_ids = _ranked(row_keys, dropped_row, rows_ptr, is_token, N, LOG_N, HAS_TAIL, IS_16_BIT)
    cols, col_ids = _ranked(col_keys, dropped_col, cols_ptr, is_token, N, LOG_N, HAS_TAIL, IS_16_BIT)
    best = _best_pairs(rows, row_ids, cols, col_ids, N, K)
    scores, ids = _scores_and_ids(best)
    row_log_sum, col_log_sum = 0.0, 0.0
    if OUTPUT == PROBABILITIES:
        row_log_sum = log_sum_exp(rows_ptr[:, None], is_token[:, None], N, R)
        col_log_sum = log_sum_exp(cols_ptr[:, None], is_token[:, None], N, R)
        tl.store(log_sums_ptr + t[:, None], row_log_sum, mask=is_token[:, None])
        tl.store(log_sums_ptr + T + t[:, None], col_log_sum, mask=is_token[:, None])
    k = tl.arange(0, R)[None, :]
    mask = is_token[:, None] & (k < K)
    scores = weigh(_from_columns(scores), k < K, row_log_sum, col_log_sum, OUTPUT)
    tl.store(scores_ptr + t[:, None] * K + k, round_for(scores_ptr, scores), mask=mask)
    tl.store(indices_ptr + t[:, None] * K + k, _from_columns(ids).to(tl.int64), mask=mask)


def _ranks(num_experts_per_tok: int) -> int:
    return max(MIN_RANKS, next_power_of_2(num_experts_per_tok))


def takes_lanes(router_logits: Tensor, num_experts_per_tok: int) -> bool:
    """Whether these sizes are served here, and sooner than by `router.py`."""
    _, T, N = router_logits.shape
    fits = _ranks(num_experts_per_tok) <= min(MAX_RANKS, N) and N <= MAX_EXPERT_KEYS
    return fits and T >= MIN_TOKENS[router_logits.element_size()]


def forward_by_lanes(router_logits: Tensor, scores: Tensor, indices: Tensor, log_sums: Tensor, output: int) -> None:
    """Fills ``scores`` and ``indices [T, K]``, and ``log_sums [2, T]`` where the output is probabilities."""
    (_, T, N), K = router_logits.shape, scores.shape[1]
    ranks = _ranks(K)
    launch(
        _router_lanes_kernel,
        (cdiv(T, BLOCK_T),),
        (router_logits, scores, indices, log_sums),
        (*router_logits.stride()[:2], T, N),
        K=K,
        R=ranks,
        LOG_N=next_power_of_2(N).bit_length() - 1,
        HAS_TAIL=N % ranks != 0,
        BLOCK_T=BLOCK_T,
        IS_16_BIT=router_logits.dtype != torch.float32,
        OUTPUT=output,
        NUM_STAGES=NUM_STAGES,
        num_warps=1,
    )
