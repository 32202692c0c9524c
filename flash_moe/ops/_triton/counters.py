"""How programs of one launch wait for one another: counters in memory, published with release, read with acquire.

A counter has a cache line to itself. Nobody waits for ever: a wait that takes too long gives up and says so. For a
single program a wait is over in the order of the program, and that is what the interpreter runs.
"""

import triton
import triton.language as tl

# int32 words of a cache line.
LINE = tl.constexpr(32)
# Polls that a program makes in all before it gives up: about a second where atomics poll, less
# where loads do.
MAX_POLLS = 2**20


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()  # every thread has stored its part before the program arrives
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait(counter_ptr, count, polls_left):
    """Until ``count`` have arrived, or no polls are left; gives how many are."""
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while (arrived < count) & (polls_left > 0):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        polls_left -= 1
    return polls_left


@triton.jit
def wait_again(counter_ptr, launches, count, polls_left):
    """As ``wait``, on a counter that nobody clears: it grows by ``count`` in every launch, and wraps around."""
    end = (launches + 1) * count
    missing = end - tl.atomic_add(counter_ptr, 0, sem="acquire")
    while (missing > 0) & (polls_left > 0):
        missing = end - tl.atomic_add(counter_ptr, 0, sem="acquire")
        polls_left -= 1
    return polls_left
