"""The one launch of flash_decode: persistent programs that take tasks of the schedule, as one of three policies says.

The tasks, their order and what they wait for are the integers of ``Schedule.serialize``; how n-th live tasks, counters
and lists of released tasks are read is said there. In an interpreter programs run one after another, so there is one,
and it takes all tasks in the order of the table, under any policy.
"""

import triton
import triton.language as tl

from flash_moe.ops._triton.counters import LINE, arrive, wait
from flash_moe.ops._triton.decode_actor import STOP, WORDS_OF_TASK, push_released, push_stop, receive, run_scheduler
from flash_moe.ops._triton.decode_experts import combine, down, gate_up, num_scales
from flash_moe.ops._triton.decode_records import DOORBELL, WORDS, now, record
from flash_moe.ops._triton.decode_routing import TAKER_STRIDE, find_slots, pairs_of, route, select
from flash_moe.schedule.decode import FINISHED, SELECTED
from flash_moe.schedule.tasks import SHARED, Kind

# Counters in the order of the schedule's, after those of the policies.
TICKET, LEFT, READY, NUM_OWN = (tl.constexpr(i) for i in range(4))
ALL_SELECTED = tl.constexpr(NUM_OWN.value + SELECTED)
SHARED_SLOT = tl.constexpr(SHARED)
ALL_DONE = tl.constexpr(FINISHED)
IS_ROUTE, IS_SELECT, IS_GATE_UP, IS_DOWN, IS_COMBINE = (tl.constexpr(int(kind)) for kind in Kind)
# Tokens of an expert at once, most often.
FEW = tl.constexpr(16)
# Of more tokens, shorter pieces: their rows take as much shared memory as the weights.
MANY_BLOCK, MANY_STAGES = tl.constexpr(64), tl.constexpr(3)
# What a program that has given up waiting adds to the count of those that have left, beside one: more than there are.
GAVE_UP = tl.constexpr(2**16)


@triton.jit
def _step_at(step, slots, num_head, gate_up_tiles, down_tiles, lead):
    return num_head + tl.minimum(step, slots) * gate_up_tiles + tl.maximum(step - lead, 0) * down_tiles


@triton.jit
def _nth_live(n, hits, slots, num_head, num_tail, gate_up_tiles, down_tiles, lead):
    """The place of the n-th task that is not skipped; ``Schedule.nth_live`` says why."""
    if n < num_head:
        place = n
    else:
        n -= num_head
        both, tiles = tl.maximum(hits - lead, 0), gate_up_tiles + down_tiles
        alone = tl.minimum(lead, hits) * gate_up_tiles
        end = _step_at(slots + lead, slots, num_head, gate_up_tiles, down_tiles, lead)
        if n >= hits * tiles:
            place = end + n - hits * tiles
        elif n < alone:
            at = _step_at(n // gate_up_tiles, slots, num_head, gate_up_tiles, down_tiles, lead)
            place = at + n % gate_up_tiles
        elif n - alone < both * tiles:
            n -= alone
            at = _step_at(lead + n // tiles, slots, num_head, gate_up_tiles, down_tiles, lead)
            place = at + n % tiles
        else:
            n -= alone + both * tiles
            step = tl.maximum(lead, hits) + n // down_tiles
            at = _step_at(step, slots, num_head, gate_up_tiles, down_tiles, lead)
            place = at + tl.where(step < slots, gate_up_tiles, 0) + n % down_tiles
    return place


@triton.jit
def _leave(counters_ptr, flag_ptr, takers_ptr, polls_left, num, BLOCK: tl.constexpr,
           NUM_TAKERS: tl.constexpr, BLOCK_TAKERS: tl.constexpr, ready_ptr, doorbells_ptr, busy_ptr, num_places,
           out_ptr, num_out, POLICY: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """Whoever leaves last zeroes what the next call counts in: all have arrived, and nobody waits any more.

    If one has given up waiting, it is not known who went on from what was not there yet: the whole output is NaN.
    """
    if polls_left <= 0:
        tl.store(flag_ptr, 1)
    own = tl.where(polls_left <= 0, GAVE_UP + 1, 1)
    left = tl.atomic_add(counters_ptr + LEFT * LINE, own, sem="acq_rel") + own
    if left % GAVE_UP == tl.num_programs(0):
        counter, word, program = tl.arange(0, BLOCK), tl.arange(0, BLOCK_TAKERS), tl.arange(0, BLOCK_G)
        if POLICY == "actor":
            for first in range(0, num_places, BLOCK_G):
                tl.store(ready_ptr + first + program, tl.zeros([BLOCK_G], tl.int32), mask=first + program < num_places)
            is_program = program < tl.num_programs(0)
            tl.store(doorbells_ptr + program * LINE, tl.zeros([BLOCK_G], tl.int32), mask=is_program)
            tl.store(busy_ptr + program, tl.zeros([BLOCK_G], tl.int32), mask=is_program)
        tl.store(counters_ptr + counter * LINE, tl.zeros([BLOCK], tl.int32), mask=counter < num)
        tl.store(takers_ptr + word * TAKER_STRIDE, tl.zeros([BLOCK_TAKERS], tl.int32), mask=word < NUM_TAKERS)
        if left >= GAVE_UP:
            nan = tl.full([BLOCK_G], float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
            for first in range(0, num_out, BLOCK_G):
                tl.store(out_ptr + first + program, nan, mask=first + program < num_out)


# Numbers that differ from one number of tokens to the next, for which nothing is to be compiled anew.
NUMBERS = (
    "max_polls", "T", "S", "num_selects", "num_head", "num_tail", "gate_up_tiles", "down_tiles", "lead", "max_events",
    "num_counters", "num_places",
)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def decode_kernel(
    x_ptr, router_ptr, gate_up_ptr, down_ptr, bias_ptr, shared_gate_ptr, shared_up_ptr, shared_down_ptr,
    shared_expert_gate_ptr, gate_up_scale_ptr, down_scale_ptr,
    logits_ptr, out_ptr,
    tasks_ptr, totals_ptr, offsets_ptr, released_ptr,
    counters_ptr, flag_ptr, takers_ptr, pairs_ptr, weights_ptr, slots_ptr, ready_ptr, doorbells_ptr, busy_ptr,
    keys_ptr, activated_ptr, products_ptr, trace_ptr,
    factor, max_polls, T, S, num_selects, num_head, num_tail, gate_up_tiles, down_tiles, lead, ACTIVATED_STRIDE,
    PRODUCT_STRIDE, max_events, num_counters, num_places,
    H: tl.constexpr, I: tl.constexpr, SHARED_I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, GROUPS: tl.constexpr, BEST_GROUPS: tl.constexpr,
    HIDDEN_ACT: tl.constexpr, GATE_UP_SCALE: tl.constexpr, DOWN_SCALE: tl.constexpr, HAS_SHARED_GATE: tl.constexpr,
    POLICY: tl.constexpr, TRACE: tl.constexpr, SCHEDULERS: tl.constexpr, BATCH: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr, ROUTE_EXPERTS: tl.constexpr, ROUTE_TOKENS: tl.constexpr, ROUTE_H: tl.constexpr,
    GATE_UP_ROWS: tl.constexpr, DOWN_ROWS: tl.constexpr, COMBINE_COLUMNS: tl.constexpr, COMBINE_TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr, BLOCK_E: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_COUNTERS: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    keys_ptr += program * (2 * BLOCK_E)
    slots_ptr += program * E
    trace_ptr += program * (max_events * WORDS)
    polls_left, hits, events = max_polls, -1, 0
    # The shared expert's activated rows come after the routed ones.
    shared_row = S * T if BLOCK_T <= FEW else T * K
    n, live = program, 2**31 - 1
    if POLICY == "queue":
        n = tl.atomic_add(counters_ptr + TICKET * LINE, 1, sem="relaxed")
    if POLICY == "actor":
        if program < SCHEDULERS:
            if program == 0:
                push_released(num_counters, hits, tasks_ptr, offsets_ptr, released_ptr, ready_ptr,
                              counters_ptr + READY * LINE)  # fmt: skip
            polls_left = run_scheduler(ready_ptr, doorbells_ptr, busy_ptr, num_places, polls_left, trace_ptr,
                                       max_events, TRACE, SCHEDULERS, BATCH, BLOCK_G)  # fmt: skip
            live = 0
    while n < live:
        following = n + num_programs
        if POLICY == "actor":
            start = now(TRACE)
            order, polls_left = receive(doorbells_ptr + program * LINE, polls_left)
            events = record(trace_ptr, events, max_events, DOORBELL, start, TRACE)
            index, is_live = order - 1, order != STOP
            following = tl.where(is_live, n, live)
        else:
            if (n >= num_head) & (hits < 0):
                start = now(TRACE)
                polls_left = wait(counters_ptr + ALL_SELECTED * LINE, num_selects, polls_left)
                events = record(trace_ptr, events, max_events, NUM_OWN - 1 - ALL_SELECTED, start, TRACE)
                hits = find_slots(takers_ptr, slots_ptr, E, BLOCK_E)
                live = num_head + hits * (gate_up_tiles + down_tiles) + num_tail
            if POLICY == "queue":
                following = tl.atomic_add(counters_ptr + TICKET * LINE, 1, sem="relaxed")
            index = _nth_live(n, hits, S, num_head, num_tail, gate_up_tiles, down_tiles, lead)
            is_live = n < live
        if is_live:
            task_ptr = tasks_ptr + index * WORDS_OF_TASK
            kind, slot = tl.load(task_ptr), tl.load(task_ptr + 1)
            begin, end = tl.load(task_ptr + 2), tl.load(task_ptr + 3)
            first_token, end_token = tl.load(task_ptr + 4), tl.load(task_ptr + 5)
            counter, signals = tl.load(task_ptr + 6), tl.load(task_ptr + 9)
            if POLICY == "actor":
                if (slot >= 0) & (hits < 0):
                    hits = find_slots(takers_ptr, slots_ptr, E, BLOCK_E)
            elif (kind == IS_SELECT) | (kind == IS_DOWN) | (kind == IS_COMBINE):
                fixed, per_hit = tl.load(task_ptr + 7), tl.load(task_ptr + 8)
                start = now(TRACE)
                required = fixed + per_hit * tl.maximum(hits, 0)
                polls_left = wait(counters_ptr + (NUM_OWN + counter) * LINE, required, polls_left)
                events = record(trace_ptr, events, max_events, -1 - counter, start, TRACE)
            start = now(TRACE)
            if kind == IS_ROUTE:
                route(x_ptr, router_ptr, logits_ptr, begin, end, first_token, end_token, H, E, ROUTE_EXPERTS,
                      ROUTE_TOKENS, ROUTE_H)  # fmt: skip
            elif kind == IS_SELECT:
                for token in range(first_token, end_token):
                    select(logits_ptr, bias_ptr, keys_ptr, pairs_ptr, weights_ptr, takers_ptr, token, T, factor, E, K,
                           BLOCK_T > FEW, SCORING, HAS_BIAS, NORM, GROUPS, BEST_GROUPS, BLOCK_E,
                           RANK_BLOCK)  # fmt: skip
                    if SHARED_I > 0:
                        _weigh_shared(x_ptr, shared_expert_gate_ptr, weights_ptr + T * E, token, H, HAS_SHARED_GATE,
                                      ROUTE_H)  # fmt: skip
            elif kind == IS_COMBINE:
                combine(products_ptr, weights_ptr + T * E, out_ptr, begin, end, first_token, end_token, T,
                        PRODUCT_STRIDE, H, K, SHARED_I > 0, COMBINE_COLUMNS, COMBINE_TOKENS)  # fmt: skip
            elif kind == IS_GATE_UP:
                if SHARED_I > 0 and slot == SHARED_SLOT:
                    _shared_gate_up(x_ptr, shared_gate_ptr, shared_up_ptr, activated_ptr, begin, end, T, shared_row,
                                    ACTIVATED_STRIDE, H, HIDDEN_ACT, GATE_UP_ROWS, BLOCK_T, MANY_BLOCK,
                                    MANY_STAGES)  # fmt: skip
                else:
                    _routed_gate_up(x_ptr, gate_up_ptr, gate_up_scale_ptr, activated_ptr, takers_ptr, pairs_ptr,
                                    weights_ptr, slots_ptr, slot, T, begin, end, ACTIVATED_STRIDE, H, I, E, K,
                                    HIDDEN_ACT, GATE_UP_SCALE, GATE_UP_ROWS, BLOCK_T, BLOCK_H, STAGES)  # fmt: skip
            else:
                if SHARED_I > 0 and slot == SHARED_SLOT:
                    _shared_down(shared_down_ptr, activated_ptr, products_ptr, begin, end, T, shared_row, K,
                                 ACTIVATED_STRIDE, PRODUCT_STRIDE, SHARED_I, DOWN_ROWS, BLOCK_T, MANY_BLOCK,
                                 MANY_STAGES)  # fmt: skip
                else:
                    _routed_down(down_ptr, down_scale_ptr, activated_ptr, products_ptr, takers_ptr, pairs_ptr,
                                 weights_ptr, slots_ptr, slot, T, begin, end, ACTIVATED_STRIDE, PRODUCT_STRIDE, H, I,
                                 E, K, DOWN_SCALE, DOWN_ROWS, BLOCK_T, BLOCK_I, STAGES)  # fmt: skip
            if POLICY == "actor":
                hits = _finish(signals, hits, num_selects, counters_ptr, takers_ptr, slots_ptr, tasks_ptr, totals_ptr,
                               offsets_ptr, released_ptr, ready_ptr, SCHEDULERS, E, BLOCK_E)  # fmt: skip
                tl.atomic_xchg(busy_ptr + program, 0, sem="release")
            else:
                arrive(counters_ptr + (NUM_OWN + signals) * LINE)
            events = record(trace_ptr, events, max_events, index, start, TRACE)
        n = following
    _leave(counters_ptr, flag_ptr, takers_ptr, polls_left, num_counters + NUM_OWN, BLOCK_COUNTERS, E, BLOCK_E,
           ready_ptr, doorbells_ptr, busy_ptr, num_places, out_ptr, T * H, POLICY, BLOCK_G)  # fmt: skip


@triton.jit
def _finish(
    counter, hits, num_selects, counters_ptr, takers_ptr, slots_ptr, tasks_ptr, totals_ptr, offsets_ptr, released_ptr,
    ready_ptr, SCHEDULERS: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Count a task as done; the last of a fan-in pushes what waited for it. Gives the slots hit, -1 for unknown."""
    fixed, per_hit = tl.load(totals_ptr + counter * 2), tl.load(totals_ptr + counter * 2 + 1)
    tl.debug_barrier()  # every thread has stored its part before the program arrives
    old = tl.atomic_add(counters_ptr + (NUM_OWN + counter) * LINE, 1, sem="acq_rel")
    is_routed = counter == ALL_SELECTED - NUM_OWN
    if (per_hit > 0) & (hits < 0):  # one of the shared expert's, early or late
        is_routed = tl.atomic_add(counters_ptr + ALL_SELECTED * LINE, 0, sem="acquire") == num_selects
    elif is_routed:
        is_routed = old + 1 == fixed
    if is_routed & (hits < 0):
        hits = find_slots(takers_ptr, slots_ptr, E, BLOCK_E)
    if (old + 1 == fixed + per_hit * tl.maximum(hits, 0)) & ((per_hit == 0) | (hits >= 0)):
        if counter == ALL_DONE:
            push_stop(ready_ptr, counters_ptr + READY * LINE, SCHEDULERS)
        else:
            push_released(counter, hits, tasks_ptr, offsets_ptr, released_ptr, ready_ptr,
                          counters_ptr + READY * LINE)  # fmt: skip
    return hits


@triton.jit
def _weigh_shared(x_ptr, gate_ptr, weights_ptr, token, H: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr):
    weight = 1.0
    if HAS_GATE:
        products = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, H, BLOCK):
            h = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + token * H + h, mask=h < H, other=0.0).to(tl.float32)
            products += x * tl.load(gate_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        weight = tl.sigmoid(tl.sum(products, 0))
    tl.store(weights_ptr + token, weight)


@triton.jit
def _routed_gate_up(
    x_ptr, gate_up_ptr, scale_ptr, activated_ptr, takers_ptr, pairs_ptr, weights_ptr, slots_ptr, slot, T, begin, end,
    STRIDE, H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, HIDDEN_ACT: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    e = tl.load(slots_ptr + slot)
    gate_up_ptr += e.to(tl.int64) * (2 * I * H)
    if SCALE != "none":
        scale_ptr += e * num_scales(2 * I, H, SCALE)
    if BLOCK_T <= FEW:
        t = tl.arange(0, FEW)
        gate_up(x_ptr, gate_up_ptr, gate_up_ptr + I * H, scale_ptr, activated_ptr, begin, end, t, slot * T + t, t < T,
                e, I, STRIDE, H, HIDDEN_ACT, SCALE, ROWS, FEW, BLOCK_H, STAGES)  # fmt: skip
    elif tl.load(takers_ptr + e * TAKER_STRIDE, cache_modifier=".cg") <= FEW:
        tokens, pairs, _weights, is_token = pairs_of(takers_ptr, pairs_ptr, weights_ptr, e, T, E, K, FEW, True)
        gate_up(x_ptr, gate_up_ptr, gate_up_ptr + I * H, scale_ptr, activated_ptr, begin, end, tokens, pairs, is_token,
                e, I, STRIDE, H, HIDDEN_ACT, SCALE, ROWS, FEW, BLOCK_H, STAGES)  # fmt: skip
    else:
        many, many_pairs, _many_weights, is_one = pairs_of(
            takers_ptr, pairs_ptr, weights_ptr, e, T, E, K, BLOCK_T, True
        )
        gate_up(x_ptr, gate_up_ptr, gate_up_ptr + I * H, scale_ptr, activated_ptr, begin, end, many, many_pairs, is_one,
                e, I, STRIDE, H, HIDDEN_ACT, SCALE, ROWS, BLOCK_T, MANY_BLOCK, MANY_STAGES)  # fmt: skip


@triton.jit
def _routed_down(
    down_ptr, scale_ptr, activated_ptr, products_ptr, takers_ptr, pairs_ptr, weights_ptr, slots_ptr, slot, T, begin,
    end, STRIDE, PRODUCT_STRIDE, H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    e = tl.load(slots_ptr + slot)
    down_ptr += e.to(tl.int64) * (H * I)
    if SCALE != "none":
        scale_ptr += e * num_scales(H, I, SCALE)
    if BLOCK_T <= FEW:
        # All tokens are taken along, so that nothing is looked up before the weights are on their way.
        t, pairs, weights, is_pair = pairs_of(takers_ptr, pairs_ptr, weights_ptr, e, T, E, K, FEW, False)
        down(down_ptr, scale_ptr, activated_ptr, products_ptr, begin, end, slot * T + t, t < T, pairs, is_pair, weights,
             e, STRIDE, PRODUCT_STRIDE, I, SCALE, ROWS, FEW, BLOCK_I, STAGES)  # fmt: skip
    elif tl.load(takers_ptr + e * TAKER_STRIDE, cache_modifier=".cg") <= FEW:
        _tokens, pairs, weights, is_pair = pairs_of(takers_ptr, pairs_ptr, weights_ptr, e, T, E, K, FEW, True)
        down(down_ptr, scale_ptr, activated_ptr, products_ptr, begin, end, pairs, is_pair, pairs, is_pair, weights, e,
             STRIDE, PRODUCT_STRIDE, I, SCALE, ROWS, FEW, BLOCK_I, STAGES)  # fmt: skip
    else:
        _many_tokens, many, many_weights, is_one = pairs_of(
            takers_ptr, pairs_ptr, weights_ptr, e, T, E, K, BLOCK_T, True
        )
        down(down_ptr, scale_ptr, activated_ptr, products_ptr, begin, end, many, is_one, many, is_one, many_weights, e,
             STRIDE, PRODUCT_STRIDE, I, SCALE, ROWS, BLOCK_T, MANY_BLOCK, MANY_STAGES)  # fmt: skip


@triton.jit
def _shared_gate_up(
    x_ptr, gate_ptr, up_ptr, activated_ptr, begin, end, T, first_row, STRIDE, H: tl.constexpr,
    HIDDEN_ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)
    gate_up(x_ptr, gate_ptr, up_ptr, x_ptr, activated_ptr, begin, end, t, first_row + t, t < T, 0, 0, STRIDE, H,
            HIDDEN_ACT, "none", ROWS, BLOCK_T, BLOCK_H, STAGES)  # fmt: skip


@triton.jit
def _shared_down(
    down_ptr, activated_ptr, products_ptr, begin, end, T, first_row, K: tl.constexpr, STRIDE, PRODUCT_STRIDE,
    SHARED_I: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Not weighted yet: it may run before the router."""
    t, ones = tl.arange(0, BLOCK_T), tl.full([BLOCK_T], 1.0, tl.float32)
    down(down_ptr, down_ptr, activated_ptr, products_ptr, begin, end, first_row + t, t < T, T * K + t, t < T, ones, 0,
         STRIDE, PRODUCT_STRIDE, SHARED_I, "none", ROWS, BLOCK_T, BLOCK_I, STAGES)  # fmt: skip
