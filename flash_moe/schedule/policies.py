"""Three ways to hand the tasks of a schedule to programs, each written as the loop that a program runs.

static   of G programs, program p takes the live tasks p, p + G, ...; it waits only for what its next task needs.
queue    a program takes the next task from one counter, and waits there until that task may start. It asks for the
         one after that before it begins, so that the answer is there when it is done.
actor    workers take a task when their doorbell rings. A finished task that was the last of its kind's fan-in pushes
         the tasks it released onto a list of ready ones; each of n schedulers hands every n-th of those to whichever
         of its workers has been free for the longest. Nothing that is handed out ever waits.

A task's result does not depend on who runs it or when, so all give the same bits.
"""

import itertools
from collections import deque
from collections.abc import Callable

from flash_moe.schedule.decode import FINISHED, SELECTED, Schedule
from flash_moe.schedule.machine import Add, Busy, Machine, Program, Run, ScheduleError, Signal, Slots, Wait
from flash_moe.schedule.tasks import NO_COUNTER, Rates
from flash_moe.schedule.trace import Trace

# What "auto" is. On a CPU one task runs after another, so a policy costs its own bookkeeping, of which static has
# least: called in turns with one to five tokens, the queue took up to a tenth longer and the actor up to a quarter. The
# rows of one token have static first, too. In those of five the actor is ahead, but each policy was timed for itself,
# beside other work, and calls in turns do not bear it out.
AUTO = "static"


def run_policy(
    schedule: Schedule,
    policy: str,
    find_slots: Callable[[], Slots],
    execute: Callable[[int], None],
    trace: Trace,
    rates: Rates | None = None,
) -> None:
    """Run every task of ``schedule`` through ``execute`` in the order that ``policy`` gives, and fill ``trace``."""
    policy, rates = AUTO if policy == "auto" else policy, rates or Rates()
    sizes = schedule.sizes
    letters = {"T": sizes.T, "H": sizes.H, "I": sizes.I, "E": sizes.E, "K": sizes.K}
    trace.begin(policy, "logical", schedule.num_programs, letters)
    if schedule.tasks:
        POLICIES[policy](Machine(schedule, rates, find_slots, execute, trace))


def run_static(machine: Machine) -> None:
    machine.run([_static_program(machine, number) for number in range(machine.schedule.num_programs)])


def run_queue(machine: Machine) -> None:
    machine.run([_queue_program(machine) for _ in range(machine.schedule.num_programs)])


def run_actor(machine: Machine, num_schedulers: int = 1) -> None:
    """The first programs are the schedulers; worker w belongs to scheduler w modulo their number."""
    schedule = machine.schedule
    if not 1 <= num_schedulers < schedule.num_programs:
        raise ScheduleError(f"{num_schedulers} schedulers leave no worker among {schedule.num_programs} programs")
    desk = _Desk(machine, num_schedulers)
    workers = range(num_schedulers, schedule.num_programs)
    programs = [_scheduler(desk, number, workers) for number in range(num_schedulers)]
    machine.run([*programs, *(_worker(desk, worker) for worker in workers)], {"ready": len(desk.ready)})


POLICIES: dict[str, Callable[[Machine], None]] = {"static": run_static, "queue": run_queue, "actor": run_actor}


def _perform(machine: Machine, index: int) -> Program:
    """Wait for what a task needs, run it, and tell."""
    task = machine.schedule.tasks[index]
    if task.need.counter != NO_COUNTER:
        yield Wait(task.need.counter, task.need.required(machine.slots.hits if task.need.per_hit else 0))
    yield Run(index)
    yield Signal(task.signals)


def _wait_for_slots(machine: Machine) -> Program:
    yield Wait(SELECTED, machine.schedule.total(SELECTED).fixed)


def _static_program(machine: Machine, number: int) -> Program:
    schedule = machine.schedule
    n = number
    while n < schedule.num_head:
        yield from _perform(machine, n)
        n += schedule.num_programs
    yield from _wait_for_slots(machine)
    hits = machine.slots.hits
    for later in range(n, schedule.num_live(hits), schedule.num_programs):
        yield from _perform(machine, schedule.nth_live(later, hits))


def _queue_program(machine: Machine) -> Program:
    schedule = machine.schedule
    n = yield Add("queue")
    while n < schedule.num_head:
        following = yield Add("queue", is_early=True)
        yield from _perform(machine, n)
        n = following
    yield from _wait_for_slots(machine)
    hits = machine.slots.hits
    while n < schedule.num_live(hits):
        following = yield Add("queue", is_early=True)
        yield from _perform(machine, schedule.nth_live(n, hits))
        n = following


class _Desk:
    """What schedulers and workers share: the list of ready tasks, and the task that a worker finds when it is rung."""

    def __init__(self, machine: Machine, num_schedulers: int) -> None:
        self.machine, self.num_schedulers = machine, num_schedulers
        self.ready: list[int | None] = list(machine.schedule.released[NO_COUNTER])
        self.orders: dict[int, int | None] = {}
        self.mail: list[list[int]] = [[] for _ in range(num_schedulers)]

    def released_by(self, index: int, old: int) -> list[int | None]:
        """What may start now that a task is done whose counter was ``old``; at the end None for every scheduler."""
        schedule, machine = self.machine.schedule, self.machine
        counter = schedule.tasks[index].signals
        total = schedule.total(counter)
        if total.per_hit and not machine.is_routed:
            return []  # only the shared expert's tiles can be this early, and they are never the last
        if old + 1 < total.required(machine.slots.hits if total.per_hit else 0):
            return []
        if counter == FINISHED:
            return [None] * self.num_schedulers
        released = schedule.released[counter]
        return [i for i in released if schedule.tasks[i].slot < 0 or schedule.tasks[i].slot < machine.slots.hits]


def _worker(desk: _Desk, number: int) -> Program:
    rung = 0
    scheduler = number % desk.num_schedulers
    while True:
        rung += 1
        yield Wait(f"doorbell {number}", rung)
        index = desk.orders[number]
        if index is None:
            return
        yield Run(index)
        old = yield Add(desk.machine.schedule.tasks[index].signals)
        if released := desk.released_by(index, old):
            desk.ready += released
            yield Add("ready", len(released))
        desk.mail[scheduler].append(number)
        yield Signal(f"mail {scheduler}")


def _scheduler(desk: _Desk, number: int, workers: range) -> Program:
    mine = [worker for worker in workers if worker % desk.num_schedulers == number]
    free = deque(mine)
    heard = 0
    for ticket in itertools.count(number, desk.num_schedulers):
        yield Wait("ready", ticket + 1)
        index = desk.ready[ticket]
        while index is not None and not free:
            yield Wait(f"mail {number}", heard + 1)
            free.append(desk.mail[number][heard])
            heard += 1
        for worker in mine if index is None else [free.popleft()]:
            desk.orders[worker] = index
            yield Busy(desk.machine.rates.dispatch_ns, "dispatch")
            yield Signal(f"doorbell {worker}")
        if index is None:
            return
