"""Records of what a program does and when, written by the kernel of flash_decode when it is traced."""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

# In place of a task: a wait for an order, and the handing out of orders. Other waits are -1 - counter.
DOORBELL, DISPATCH = tl.constexpr(-(2**30)), tl.constexpr(-(2**30) - 1)
# int64 of a record. A program's first has how many it wanted to make, which may be more than there is room for.
WORDS = tl.constexpr(3)


@triton.jit
def now(TRACE: tl.constexpr):
    return globaltimer() if TRACE else 0


@triton.jit
def record(trace_ptr, events, max_events, what, start, TRACE: tl.constexpr):
    """What a program did from ``start`` until now: a task's place in the table, or a wait. Gives the next record."""
    if TRACE:
        at = trace_ptr + (events + 1) * WORDS
        has_room = events + 1 < max_events
        tl.store(at, what, mask=has_room)
        tl.store(at + 1, start, mask=has_room)
        tl.store(at + 2, globaltimer(), mask=has_room)
        tl.store(trace_ptr, events + 1)
    return events + 1
