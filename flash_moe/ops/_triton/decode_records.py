"""Records of what a program does and when, written by the kernel of flash_decode when it is traced."""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

# In place of a task: a wait for an order, and the handing out of orders. Other waits are -1 - counter.
DOORBELL, DISPATCH = tl.constexpr(-(2**30)), tl.constexpr(-(2**30) - 1)
# int64 of a record.
WORDS = tl.constexpr(3)


@triton.jit
def now(TRACE: tl.constexpr):
    return globaltimer() if TRACE else 0


@triton.jit
def record(trace_ptr, events, max_events, what, start, TRACE: tl.constexpr):
    """What a program did from ``start`` until now: a task's place in the table, or a wait. Gives the next record."""
    if TRACE:
        at = trace_ptr + events * WORDS
        tl.store(at, what, mask=events < max_events)
        tl.store(at + 1, start, mask=events < max_events)
        tl.store(at + 2, globaltimer(), mask=events < max_events)
    return events + 1
