"""The schedule of flash_decode: its tasks, its arithmetic, its integers, and three policies that all give the same."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe import flash_decode
from flash_moe._moe_layer import Routing
from flash_moe.ops._torch.decode import Interpreter, sizes_of
from flash_moe.schedule.decode import FINISHED, NEVER, SELECTED, build_schedule, tile_sizes
from flash_moe.schedule.machine import Add, Machine, Run, ScheduleError, Signal, Slots, Wait
from flash_moe.schedule.policies import POLICIES, run_actor, run_policy
from flash_moe.schedule.tasks import NO_COUNTER, SHARED, TASK_WORDS, Combine, Down, GateUp, Kind, Rates, Sizes, Tiles
from flash_moe.schedule.trace import Trace
from flash_moe.testing import decode_arguments, make_decode_inputs

QWEN3 = Sizes(T=1, H=2048, I=768, E=128, K=8)
SMALL = Sizes(T=5, H=40, I=24, E=9, K=3, shared_intermediate_size=20)
TILES = Tiles(
    route_experts=2,
    route_tokens=3,
    select_tokens=2,
    gate_up_columns=7,
    down_columns=6,
    combine_tokens=3,
    combine_columns=10,
    lead=2,
)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def small(num_programs=5, sizes=SMALL, **tiles):
    return build_schedule(sizes, replace(TILES, **tiles), num_programs)


def run_dry(schedule, policy, hits, rates=None):
    """Without task bodies; what ran, in order of the start, and the trace."""
    ran, trace = [], Trace()
    pairs = schedule.sizes.T * schedule.sizes.K
    slots = Slots(tuple(range(hits)), tuple(max(1, pairs // hits) for _ in range(hits)))
    run_policy(schedule, policy, lambda: slots, ran.append, trace, rates)
    return ran, trace


# The table


def test_tiles_cover_everything_once():
    schedule = small()
    covered = {}
    for task in schedule.tasks:
        for column in range(task.begin, task.end):
            for token in range(task.first_token, max(task.end_token, task.first_token + 1)):
                key = (task.kind, task.slot, column, token)
                assert key not in covered
                covered[key] = task
    count = {kind: sum(key[0] is kind for key in covered) for kind in Kind}
    S, T, H = SMALL.num_slots, SMALL.T, SMALL.H
    assert count == {
        Kind.ROUTE: 9 * T, Kind.SELECT: 9 * T, Kind.GATE_UP: S * 24 + 20, Kind.DOWN: (S + 1) * H, Kind.COMBINE: T * H,
    }  # fmt: skip


def test_every_task_comes_after_what_it_needs_and_is_counted():
    """Whatever number of slots is hit: when a task's turn comes, the live tasks before it have fed its counter."""
    schedule = small()
    for hits in range(1, SMALL.num_slots + 1):
        counters = [0] * schedule.num_counters
        for task in schedule.tasks:
            if task.slot < hits:
                if task.need.counter != NO_COUNTER:
                    assert counters[task.need.counter] == task.need.required(hits)
                counters[task.signals] += 1
        for counter in range(schedule.num_counters):
            live = [i for i in schedule.released[counter] if schedule.tasks[i].slot < hits]
            if live:
                assert counters[counter] == schedule.total(counter).required(hits)


@pytest.mark.parametrize("lead", [1, 2, 4, 9, 30])
@pytest.mark.parametrize("shared", [0, 20])
def test_the_nth_live_task_by_arithmetic(shared, lead):
    schedule = small(sizes=replace(SMALL, shared_intermediate_size=shared), lead=lead)
    for hits in range(1, SMALL.num_slots + 1):
        live = [i for i, task in enumerate(schedule.tasks) if task.slot < hits]
        assert [schedule.nth_live(n, hits) for n in range(schedule.num_live(hits))] == live


def test_costs_count_the_bytes_of_the_layer():
    """One token: eight experts' weights, 75.5 MB, and the router's; none twice, and the rest is small."""
    schedule = build_schedule(QWEN3, tile_sizes(QWEN3, 132), 132)
    by_kind = dict.fromkeys(Kind, 0)
    for index, task in enumerate(schedule.tasks):
        by_kind[task.kind] += schedule.cost(index).nbytes
    experts, router = 8 * 3 * 2048 * 768 * 2, 128 * 2048 * 2
    assert by_kind == {
        Kind.GATE_UP: experts * 2 // 3,
        Kind.DOWN: experts // 3,
        Kind.ROUTE: router,
        Kind.SELECT: 0,
        Kind.COMBINE: 0,
    }
    assert sum(schedule.cost(index).cached_nbytes for index in range(len(schedule.tasks))) < 0.1 * experts
    half = build_schedule(replace(QWEN3, weight_itemsize=1), tile_sizes(QWEN3, 132), 132)
    index = next(i for i, task in enumerate(half.tasks) if task.kind is Kind.GATE_UP)
    width, half_width = schedule.tasks[index].width, half.tasks[index].width
    assert half.cost(index).nbytes * 2 * width == schedule.cost(index).nbytes * half_width


def test_the_router_comes_from_memory_once_however_many_tokens_there_are():
    schedule = build_schedule(replace(QWEN3, T=40), Tiles(route_tokens=16), 132)
    costs = [schedule.cost(index) for index, task in enumerate(schedule.tasks) if task.kind is Kind.ROUTE]
    router = 128 * 2048 * 2
    assert len(costs) == 3 * 128
    assert sum(cost.nbytes for cost in costs) == router
    assert sum(cost.cached_nbytes for cost in costs) > 2 * router


def test_time_is_that_of_the_scarcer_of_bytes_and_operations():
    schedule = build_schedule(QWEN3, Tiles(), 100)
    index = next(i for i, task in enumerate(schedule.tasks) if task.kind is Kind.DOWN)
    rates = Rates(bytes_per_second=1e12, cached_bytes_per_second=4e12, flops_per_second=1e13, task_ns=500)
    few, many = schedule.cost(index, tokens=1), schedule.cost(index, tokens=10**5)
    assert few.time_ns(rates, 100) == 500 + round((few.nbytes / 1e12 + few.cached_nbytes / 4e12) * 100 * 1e9)
    assert many.time_ns(rates, 100) == 500 + round(many.flops / 1e13 * 100 * 1e9)


@pytest.mark.parametrize("T", [1, 2, 8, 128])
@pytest.mark.parametrize("H, I, E, K", [(2048, 768, 128, 8), (4096, 14336, 8, 2), (7168, 2048, 256, 8), (1, 1, 1, 1)])
def test_tile_sizes_give_every_program_work(T, H, I, E, K):
    sizes = Sizes(T, H, I, E, K)
    tiles = tile_sizes(sizes, 132)
    schedule = build_schedule(sizes, tiles, 132)
    if H > 1:
        assert min(schedule.gate_up_tiles, schedule.down_tiles) * sizes.expected_hits > 0.9 * 132
    assert {task.kind for task in schedule.tasks} == set(Kind)


def test_no_tokens_no_tasks():
    for policy in POLICIES:
        assert run_dry(small(sizes=replace(SMALL, T=0)), policy, 1)[0] == []


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sizes(-1, 1, 1, 1, 1), "T: expected an integer from 0"),
        (lambda: Sizes(1, 0, 1, 1, 1), "H: expected an integer from 1"),
        (lambda: Sizes(1, 1, 1, 4, 5), "K: expected an integer from 1 to 4; got 5"),
        (lambda: Tiles(lead=0), "lead: expected an integer from 1"),
        (lambda: build_schedule(SMALL, TILES, 0), "num_programs: expected an integer from 1"),
    ],
)
def test_wrong_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Integers for a kernel


def test_serialized_schedule_says_the_same():
    schedule = small()
    tasks, _, offsets, released = schedule.serialize()
    assert all(isinstance(word, int) and -(2**31) <= word < 2**31 for words in schedule.serialize() for word in words)
    assert len(TASK_WORDS) % 4 == 0
    assert len(tasks) == len(TASK_WORDS) * len(schedule.tasks)
    for index, task in enumerate(schedule.tasks):
        words = dict(zip(TASK_WORDS, tasks[index * len(TASK_WORDS) :], strict=False))
        need = task.need
        assert words == {
            "kind": task.kind, "slot": task.slot, "begin": task.begin, "end": task.end,
            "first_token": task.first_token, "end_token": task.end_token, "counter": need.counter, "fixed": need.fixed,
            "per_hit": need.per_hit, "signals": task.signals, "step": task.step, "reserved": 0,
        }  # fmt: skip
    waiting = [[i for i, task in enumerate(schedule.tasks) if task.need.counter == counter]
               for counter in (*range(schedule.num_counters), NO_COUNTER)]  # fmt: skip
    assert [released[begin:end] for begin, end in pairwise(offsets)] == waiting


@pytest.mark.parametrize("shared", [0, 20])
def test_serialized_totals_are_what_counters_reach(shared):
    """Whatever number of slots is hit; the shared expert's counter, where there is none, is never reached."""
    schedule = small(sizes=replace(SMALL, shared_intermediate_size=shared))
    totals = schedule.serialize().totals
    fixed, per_hit = totals[::2], totals[1::2]
    assert len(fixed) == schedule.num_counters
    for hits in range(1, SMALL.num_slots + 1):
        reached = [0] * schedule.num_counters
        for task in schedule.tasks:
            reached[task.signals] += task.slot < hits
        for counter, count in enumerate(reached):
            if count or counter == FINISHED:
                assert count == fixed[counter] + per_hit[counter] * hits
    assert fixed.count(NEVER) == (shared == 0)


def test_steps_beyond_the_slots_hit_are_all_skipped():
    """So that a kernel's program can leave the steps early."""
    schedule = small()
    for task in schedule.tasks[schedule.num_head : -schedule.num_tail]:
        for hits in range(1, SMALL.num_slots + 1):
            if task.step >= hits + schedule.lead:
                assert task.slot >= hits


# Policies


@every_policy
@pytest.mark.parametrize("num_programs", [2, 3, 5, 40])
@pytest.mark.parametrize("hits", [1, 2, 5, 9])
def test_every_live_task_runs_once(hits, num_programs, policy):
    schedule = small(num_programs)
    ran, trace = run_dry(schedule, policy, hits)
    assert sorted(ran) == [i for i, task in enumerate(schedule.tasks) if task.slot < hits]
    assert {span.program for span in trace.tasks} <= set(range(num_programs))


@pytest.mark.parametrize("num_schedulers", [1, 2, 3])
def test_several_schedulers(num_schedulers):
    schedule, ran, trace = small(7), [], Trace(num_programs=7)
    machine = Machine(schedule, Rates(), lambda: Slots((0, 4), (3, 5)), ran.append, trace)
    run_actor(machine, num_schedulers)
    assert sorted(ran) == [i for i, task in enumerate(schedule.tasks) if task.slot < 2]
    assert {span.program for span in trace.tasks if span.kind == "dispatch"} == set(range(num_schedulers))
    assert all(span.program >= num_schedulers for span in trace.tasks if span.kind != "dispatch")


def test_the_actor_needs_a_worker():
    with pytest.raises(ScheduleError, match="1 schedulers leave no worker among 1 programs"):
        run_dry(small(1), "actor", 2)


@every_policy
def test_same_trace_on_every_run(policy):
    assert run_dry(small(), policy, 5)[1] == run_dry(small(), policy, 5)[1]


@pytest.mark.parametrize("hits", [1, 2, 9])
def test_static_takes_every_gth_live_task(hits):
    schedule = small(4)
    trace = run_dry(schedule, "static", hits)[1]
    order = [schedule.nth_live(n, hits) for n in range(schedule.num_live(hits))]
    for program in range(4):
        assert [span.index for span in trace.tasks if span.program == program] == order[program::4]


def test_one_scheduler_is_the_bottleneck_of_many_small_tasks():
    """What was found of a published single-kernel MoE; more schedulers, or none, do better."""
    sizes = replace(QWEN3, T=8)
    schedule = build_schedule(sizes, tile_sizes(sizes, 132), 132)
    slots = Slots(tuple(range(50)), (2,) * 50)
    times = {}
    for number in (1, 4):
        trace = Trace(num_programs=132)
        run_actor(Machine(schedule, Rates(), lambda: slots, lambda index: None, trace), number)
        times[number] = trace.end_ns
    static = run_dry(schedule, "static", 50)[1].end_ns
    assert static < times[4] < times[1]


# The same bits


def interpret(x, layer, policy, tiles=TILES, num_programs=5):
    schedule = build_schedule(sizes_of(x, layer), tiles, num_programs)
    interpreter = Interpreter(schedule, x, layer)
    for buffer in (
        interpreter.activated,
        interpreter.products,
        interpreter.logits,
        interpreter.weights,
        interpreter.out,
    ):
        buffer.fill_(torch.nan)
    run_policy(schedule, policy, interpreter.find_slots, interpreter.execute, Trace())
    return interpreter.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 33])
def test_every_policy_gives_the_same_bits(T, dtype):
    x, layer = make_decode_inputs(
        T, 40, 24, 9, Routing(3), dtype, "cpu", shared_intermediate_size=20, has_shared_gate=True
    )
    static, queue, actor = (interpret(x, layer, policy) for policy in ("static", "queue", "actor"))
    assert static.isfinite().all()
    assert torch.equal(static, queue)
    assert torch.equal(static, actor)
    torch.testing.assert_close(static, flash_decode(x, **decode_arguments(layer), backend="reference"))


@pytest.mark.parametrize("T", [0, 1, 2, 16, 128])
def test_public_policies_give_the_same_bits(T):
    x, layer = make_decode_inputs(T, 64, 48, 32, Routing(4), torch.bfloat16, "cpu", scale="row")
    outputs = [flash_decode(x, **decode_arguments(layer), policy=policy) for policy in ("auto", *POLICIES)]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_sizes_and_tiles(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    E = draw(1, 8)
    x, layer = make_decode_inputs(
        draw(0, 9), draw(1, 20), draw(1, 20), E, Routing(draw(1, E)), torch.float32, "cpu", draw(0, 9),
        shared_intermediate_size=draw(0, 9),
    )  # fmt: skip
    tiles = Tiles(*(draw(1, 9) for _ in fields(Tiles)))
    outputs = [interpret(x, layer, policy, tiles, draw(2, 9)) for policy in POLICIES]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    torch.testing.assert_close(
        outputs[0], flash_decode(x, **decode_arguments(layer), backend="reference"), rtol=1e-4, atol=1e-4
    )


# What the machine catches


def machine_of(schedule, hits=4):
    slots = Slots(tuple(range(hits)), (3,) * hits)
    return Machine(schedule, Rates(), lambda: slots, lambda index: None, Trace(num_programs=schedule.num_programs))


def one_by_one(indices, schedule, waiting=True):
    """A program that takes the tasks in the order given."""
    for index in indices:
        task = schedule.tasks[index]
        if waiting and task.need.counter != NO_COUNTER:
            yield Wait(task.need.counter, task.need.required(4))
        yield Run(index)
        yield Signal(task.signals)


def live(schedule, hits=4):
    return [i for i, task in enumerate(schedule.tasks) if task.slot < hits]


def test_a_correct_program_passes():
    schedule = small()
    machine_of(schedule).run([one_by_one(live(schedule), schedule)])


@pytest.mark.parametrize("kind", [Kind.SELECT, Kind.GATE_UP, Kind.DOWN, Kind.COMBINE])
def test_a_task_before_what_it_needs(kind):
    """For every kind: one task too early, after all but the last of what it waits for."""
    schedule = small()
    order = live(schedule)
    early = next(i for i in order if schedule.tasks[i].kind is kind and schedule.tasks[i].slot != SHARED)
    last = max(i for i in order if schedule.tasks[i].signals == schedule.tasks[early].need.counter)
    order.remove(early)
    order.insert(order.index(last), early)
    with pytest.raises(ScheduleError, match=r"needs were done|before every SELECT was done"):
        machine_of(schedule).run([one_by_one(order, schedule, waiting=False)])


def test_programs_that_do_not_wait():
    schedule = small()
    programs = [one_by_one(live(schedule)[number::5], schedule, waiting=False) for number in range(5)]
    with pytest.raises(ScheduleError, match=r"of the \d+ that it needs were done|before every SELECT"):
        machine_of(schedule).run(programs)


def test_a_task_that_runs_twice():
    schedule = small()
    with pytest.raises(ScheduleError, match="ran twice"):
        machine_of(schedule).run([one_by_one([0, 0], schedule)])


def test_a_task_that_is_left_out():
    schedule = small()
    with pytest.raises(ScheduleError, match=r"1 tasks were left out, the first Combine\("):
        machine_of(schedule).run([one_by_one(live(schedule)[:-1], schedule)])


def test_a_slot_that_is_not_hit():
    schedule = small()
    dead = next(i for i, task in enumerate(schedule.tasks) if task.slot == 4)
    with pytest.raises(ScheduleError, match="ran for a slot beyond the 4 hit"):
        machine_of(schedule).run([one_by_one([*range(schedule.num_head), dead], schedule)])


def test_a_wait_that_nobody_ends():
    schedule = small()

    def waits():
        yield Wait(SELECTED, 10**6)

    with pytest.raises(ScheduleError, match=r"1 programs wait for ever, the first \(1, Wait"):
        machine_of(schedule).run([one_by_one(live(schedule), schedule), waits()])


def test_slots_are_unknown_before_routing():
    with pytest.raises(ScheduleError, match="before every SELECT was done"):
        _ = machine_of(small()).slots


def test_additions_to_one_word_take_turns_and_are_seen_a_hop_later():
    schedule, times = small(), {}
    machine = Machine(schedule, Rates(hop_ns=100, atomic_ns=10), lambda: Slots((0,), (1,)), lambda index: None, Trace())

    def adds(number):
        old = yield Add("word")
        times[number] = (old, machine.now)
        if number == 2:
            yield Wait("word", 3)
            times["seen"] = machine.now
            yield from one_by_one(live(schedule, 1), schedule, waiting=False)

    machine.run([adds(number) for number in range(3)])
    assert times == {0: (0, 100), 1: (1, 110), 2: (2, 120), "seen": 120}


def test_tasks_know_their_kind():
    kinds = {type(task): task.kind for task in small().tasks}
    assert (kinds[GateUp], kinds[Down], kinds[Combine]) == (Kind.GATE_UP, Kind.DOWN, Kind.COMBINE)
