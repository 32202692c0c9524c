"""The actor policy in the kernel of flash_decode: schedulers hand out tasks that are ready, workers ring for more.

A finished task that is the last of a counter's fan-in writes the tasks that waited for it into one list. Of n
schedulers each reads every n-th place of the list and rings the doorbells of free workers among every n-th, as many as
it can at once (``BATCH``), from the one on that follows whom it has rung last. An order is the task's place in the
table, plus 1.
"""

import triton
import triton.language as tl

from flash_moe.ops._triton.counters import LINE
from flash_moe.ops._triton.decode_records import DISPATCH, now, record
from flash_moe.schedule.tasks import TASK_WORDS

WORDS_OF_TASK = tl.constexpr(len(TASK_WORDS))
STOP = tl.constexpr(-1)
# Released tasks looked at in one go.
BLOCK = tl.constexpr(256)


@triton.jit
def receive(doorbell_ptr, polls_left):
    """The next order, which is taken away; ``STOP`` also if no polls are left."""
    order = tl.atomic_xchg(doorbell_ptr, 0, sem="acquire")
    while (order == 0) & (polls_left > 0):
        order = tl.atomic_xchg(doorbell_ptr, 0, sem="acquire")
        polls_left -= 1
    return tl.where(order == 0, STOP, order), polls_left


@triton.jit
def push_released(counter, hits, tasks_ptr, offsets_ptr, released_ptr, ready_ptr, num_ready_ptr):
    """Write the live tasks that wait for ``counter`` into the list of ready ones."""
    end = tl.load(offsets_ptr + counter + 1)
    for first in range(tl.load(offsets_ptr + counter), end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        index = tl.load(released_ptr + place, mask=place < end, other=0)
        slot = tl.load(tasks_ptr + index * WORDS_OF_TASK + 1, mask=place < end, other=0)
        is_live = (place < end) & (slot < tl.maximum(hits, 0))
        position = tl.cumsum(is_live.to(tl.int32), 0) - 1
        at = tl.atomic_add(num_ready_ptr, tl.sum(is_live.to(tl.int32), 0), sem="relaxed")
        tl.atomic_xchg(ready_ptr + at + position, index + 1, mask=is_live, sem="release")


@triton.jit
def push_stop(ready_ptr, num_ready_ptr, SCHEDULERS: tl.constexpr):
    """An order to stop for each scheduler: any places that follow one another belong to one each."""
    at = tl.atomic_add(num_ready_ptr, SCHEDULERS, sem="relaxed")
    for number in tl.static_range(SCHEDULERS):
        tl.atomic_xchg(ready_ptr + at + number, STOP, sem="release")


@triton.jit
def in_turn(is_free, lane, last):
    """How many there are of the free, and each one's number among them, counted round from the first after ``last``."""
    free = is_free.to(tl.int32)
    num_free, num_before = tl.sum(free, 0), tl.sum(tl.where(lane <= last, free, 0), 0)
    nth = tl.cumsum(free, 0) - 1 - num_before
    return num_free, tl.where(lane <= last, nth + num_free, nth)


@triton.jit
def run_scheduler(
    ready_ptr,
    doorbells_ptr,
    busy_ptr,
    num_places,
    polls_left,
    trace_ptr,
    max_events,
    TRACE: tl.constexpr,
    SCHEDULERS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Until it reads an order to stop; gives the polls left."""
    number, lane = tl.program_id(0), tl.arange(0, BLOCK_G)
    is_mine = (lane >= SCHEDULERS) & (lane < tl.num_programs(0)) & (lane % SCHEDULERS == number)
    head, events, last, is_stopped = 0, 0, -1, False
    while (not is_stopped) & (polls_left > 0):
        start = now(TRACE)
        busy = tl.atomic_add(busy_ptr + lane, 0, mask=is_mine, sem="acquire")
        is_free = is_mine & (busy == 0)
        place = number + (head + lane) * SCHEDULERS
        orders = tl.atomic_add(ready_ptr + place, 0, mask=place < num_places, sem="acquire")
        # Orders that can be handed out: up to the first place that is still empty, or says stop.
        is_order = (place < num_places) & (orders > 0)
        available = tl.min(tl.where(is_order, BLOCK_G, lane), 0)
        is_stopped = tl.sum(((lane == 0) & (orders == STOP)).to(tl.int32), 0) > 0
        num_free, nth = in_turn(is_free, lane, last)
        count = tl.minimum(tl.minimum(available, num_free), BATCH)
        is_given = is_free & (nth < count)
        order = tl.load(ready_ptr + number + (head + nth) * SCHEDULERS, mask=is_given, other=0, cache_modifier=".cg")
        tl.store(busy_ptr + lane, tl.full([BLOCK_G], 1, tl.int32), mask=is_given)
        tl.debug_barrier()  # a worker may say that it is free again as soon as it is rung
        tl.atomic_xchg(doorbells_ptr + lane * LINE, order, mask=is_given, sem="release")
        if count > 0:
            last = tl.sum(tl.where(is_given & (nth == count - 1), lane, 0), 0)
            events = record(trace_ptr, events, max_events, DISPATCH, start, TRACE)
        head += count
        polls_left -= 1
    tl.debug_barrier()
    tl.atomic_xchg(doorbells_ptr + lane * LINE, tl.full([BLOCK_G], STOP, tl.int32), mask=is_mine, sem="release")
    return polls_left
