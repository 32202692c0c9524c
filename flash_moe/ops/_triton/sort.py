"""A bitonic sorting network on a vector of integers."""

import triton
import triton.language as tl

LANES = tl.constexpr(32)


@triton.constexpr_function
def log2(n: int) -> int:
    """Of a power of two."""
    return n.bit_length() - 1


@triton.jit
def _bit(num_bits: tl.constexpr, bit: tl.constexpr):
    """Value of bit ``bit`` of every index of a hypercube, in its shape."""
    return tl.reshape(tl.arange(0, 2), [1] * (num_bits - bit - 1) + [2] + [1] * bit)


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def _compare_exchange(x, num_bits: tl.constexpr, bit: tl.constexpr):
    """The greater of two neighbours along ``bit`` comes first."""
    other = x ^ tl.reduce(x, num_bits - 1 - bit, _xor, keep_dims=True)
    return tl.where(_bit(num_bits, bit) == 0, tl.maximum(x, other), tl.minimum(x, other))


@triton.jit
def _merge(x, num_bits: tl.constexpr, stage: tl.constexpr, ALTERNATE: tl.constexpr):
    """Sorts bitonic runs of 2^stage, in descending order; with ``ALTERNATE`` every other one in ascending order."""
    # Minimum and maximum of 32-bit integers are one instruction each: this network is a third shorter than tl.sort's,
    # which compares and selects. All bits flipped reverse the order, so that every pair is exchanged the same way.
    if ALTERNATE:
        flip = -_bit(num_bits, stage).to(x.dtype)
        x = x ^ flip
    for i in tl.static_range(stage):
        x = _compare_exchange(x, num_bits, stage - 1 - i)
    if ALTERNATE:
        x = x ^ flip
    return x


@triton.jit
def top(x, COUNT: tl.constexpr, VECTOR: tl.constexpr = 0, ROWS: tl.constexpr = 1):
    """The COUNT greatest of each of ROWS runs of ``x [ROWS * S]`` in descending order; all are powers of two.

    With VECTOR, as many neighbours as a lane holds, the network takes what lies in one lane as neighbours, since these
    are exchanged most often, and without a shuffle.
    """
    S: tl.constexpr = x.shape[0] // ROWS
    LOG_S: tl.constexpr = log2(S)
    LOG_X: tl.constexpr = log2(x.shape[0])
    LOG_COUNT: tl.constexpr = log2(COUNT)
    if VECTOR > 0 and S > LANES * VECTOR:
        x = tl.permute(tl.reshape(x, [ROWS, S // (LANES * VECTOR), LANES * VECTOR]), 0, 2, 1)
    h = tl.reshape(x, [2] * LOG_X)
    for stage in tl.static_range(1, LOG_COUNT + 1):
        h = _merge(h, LOG_X, stage, stage < LOG_S)
    for stage in tl.static_range(LOG_COUNT + 1, LOG_S + 1):
        # Neighbouring runs point in opposite directions: the elementwise maxima are the greatest of both.
        h = tl.max(h, axis=LOG_X - stage)
        h = _merge(h, LOG_X + LOG_COUNT - stage, LOG_COUNT, stage < LOG_S)
    return tl.reshape(h, [ROWS * COUNT])


@triton.jit
def merge_best(a, b, LOWEST: tl.constexpr):
    """Of two vectors in descending order the greatest, as many as ``a`` holds, in that order; ``b`` may be shorter."""
    SIZE: tl.constexpr = a.shape[0]
    COUNT: tl.constexpr = b.shape[0]
    LOG_S: tl.constexpr = log2(SIZE)
    # One reversed, their elementwise maxima are the greatest of both, in a bitonic order.
    b = tl.flip(b, 0)
    if COUNT < SIZE:
        b = tl.reshape(tl.broadcast_to(b[None, :], [SIZE // COUNT, COUNT]), [SIZE])
        b = tl.where(tl.arange(0, SIZE) < SIZE - COUNT, LOWEST, b)
    h = tl.reshape(tl.maximum(a, b), [2] * LOG_S)
    return tl.reshape(_merge(h, LOG_S, LOG_S, False), a.shape)
