"""How programs of one launch wait for one another: counters in memory, published with release, read with acquire.

A counter has a cache line to itself. Nobody waits for ever: a wait that takes too long gives up and says so.
"""

import triton
import triton.language as tl

# int32 words of a cache line.
LINE = tl.constexpr(32)


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
