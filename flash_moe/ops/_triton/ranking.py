"""Ranks by counting who stands above: int32 keys that sort as floats do, ties to the lowest id."""

import triton
import triton.language as tl

SMALLEST_KEY = tl.constexpr(-(2**31))
LARGEST_KEY = tl.constexpr(2**31 - 1)
# In a key with an id.
ID_MASK = tl.constexpr(8191)


@triton.jit
def ordered_key(x):
    """int32 that sort as float32 does, NaN the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return tl.where(x == x, tl.where(bits < 0, bits ^ LARGEST_KEY, bits), LARGEST_KEY)


@triton.jit
def is_above(others, other_ids, keys, ids):
    """Larger, or equal with a lower id."""
    return (others > keys) | ((others == keys) & (other_ids < ids))


@triton.jit
def with_ids(keys, ids):
    """Distinct keys of what is a 16-bit float, ids below 2^13: the lower one is the larger of equal keys.

    The low 13 bits of such a key are all equal: room for the id, and one comparison in place of 3.
    """
    return (keys & ~ID_MASK) | (ID_MASK - ids)
