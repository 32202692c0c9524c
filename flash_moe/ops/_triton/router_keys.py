"""What the router's forward kernels share: logits as they are compared, keys of score and id, weights of the chosen."""

import triton
import triton.language as tl

from flash_moe.ops._triton.math import INTERPRETED, accurate_exp
from flash_moe.ops._triton.ranking import ID_MASK

LOWEST = tl.constexpr(-(2**31))
PADDING = tl.constexpr(-(2**63))
SCORES, PROBABILITIES, RENORMALIZED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_logits(logits_ptr, n, mask):
    return tl.load(logits_ptr + n, mask=mask, other=0.0).to(tl.float32) + 0.0  # -0.0 becomes 0.0


@triton.jit
def ordered(scores):
    """int32 in the order of the scores; a NaN is above all."""
    # A GPU's arithmetic gives one NaN, whose sign bit is clear; an addition of 0.0 has come before.
    if INTERPRETED:
        scores = tl.where(scores == scores, scores, float("nan"))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def long_keys(scores, ids, mask):
    """int64 keys that order (score descending, id ascending): a NaN is above all, a masked slot below."""
    return tl.where(mask, (ordered(scores).to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64)), PADDING)


@triton.jit
def scores_of(long_keys):
    return from_ordered((long_keys >> 32).to(tl.int32))


@triton.jit
def ids_of(long_keys):
    return 0xFFFFFFFF - (long_keys & 0xFFFFFFFF)


@triton.jit
def score_and_id(keys):
    """Of ``long_keys``, or of keys that a 16-bit float's ``with_ids`` has made."""
    if keys.dtype == tl.int64:
        return scores_of(keys), ids_of(keys).to(tl.int32)
    else:
        # The bits below such a float's are all equal, to its sign.
        return from_ordered(tl.where(keys < 0, keys | ID_MASK, keys & ~ID_MASK)), ~keys & ID_MASK


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def weigh(scores, is_chosen, row_log_sum, col_log_sum, OUTPUT: tl.constexpr):
    """What the kernel gives for the scores of a token's chosen experts, along the last axis."""
    if OUTPUT == PROBABILITIES:
        scores = accurate_exp((scores - row_log_sum) - col_log_sum)
    elif OUTPUT == RENORMALIZED:
        scores = tl.where(is_chosen, scores, float("-inf"))
        exponentials = accurate_exp(scores - tl.reduce(scores, len(scores.shape) - 1, nan_max, keep_dims=True))
        scores = exponentials / tl.sum(exponentials, len(scores.shape) - 1, keep_dims=True)
    return scores


@triton.jit
def log_sum_exp(logits_ptr, mask, N, BLOCK_N: tl.constexpr):
    """Of the logits of some tokens, whose pointers and masks are ``[tokens, 1]``."""
    high = tl.full(mask.shape, float("-inf"), tl.float32)
    total = tl.zeros(mask.shape, tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[None, :]
        x = tl.where(n < N, load_logits(logits_ptr, n, mask & (n < N)), float("-inf"))
        higher = nan_max(high, tl.reduce(x, 1, nan_max, keep_dims=True))
        total = total * accurate_exp(high - higher) + tl.sum(accurate_exp(x - higher), 1, keep_dims=True)
        high = higher
    log = tl.log(total)
    return high + (log + (total * accurate_exp(-log) - 1.0))  # one Newton step: tl.log is off by several units
