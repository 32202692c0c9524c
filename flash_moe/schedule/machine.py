"""A simulated GPU: programs that run side by side, words of shared memory, logical time in nanoseconds.

A program is a generator that yields what it does next: ``Run`` a task, ``Add`` to a word and get its old value,
``Signal`` a word without asking, ``Wait`` until a word is seen to have reached a value, or be ``Busy``. On a GPU the
same takes atomics. Everything happens in order of (time, what was asked for first), so a run can be repeated exactly.

The machine checks every program: a task that starts before what it needs is done, runs twice or is left out is a
``ScheduleError``, whatever the program believed that it waited for, and so is a wait that nobody ends.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from flash_moe.schedule.decode import Schedule
from flash_moe.schedule.tasks import NO_COUNTER, Kind, Rates
from flash_moe.schedule.trace import TaskSpan, Trace, WaitSpan

# A counter of the schedule, or a word that a policy has named.
Word = int | str


@dataclass(frozen=True)
class Run:
    index: int
    """Of the task, in the schedule's table."""


@dataclass(frozen=True)
class Add:
    word: Word
    value: int = 1
    is_early: bool = False
    """The program goes on, and does not look at the answer before its next task is done."""


@dataclass(frozen=True)
class Signal:
    word: Word


@dataclass(frozen=True)
class Wait:
    word: Word
    at_least: int


@dataclass(frozen=True)
class Busy:
    ns: int
    why: str


Action = Run | Add | Signal | Wait | Busy
Program = Generator[Action, int, None]


class ScheduleError(RuntimeError):
    """A policy broke the schedule."""


@dataclass(frozen=True)
class Slots:
    """What routing has found: the experts hit, ascending, and the number of tokens that take each."""

    experts: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def hits(self) -> int:
        return len(self.experts)


class Machine:
    """Runs programs on ``schedule`` and writes what they did into ``trace``.

    ``execute`` gets the place of each task in the table when that task starts; ``find_slots`` is asked once, when the
    last SELECT is done.
    """

    def __init__(
        self,
        schedule: Schedule,
        rates: Rates,
        find_slots: Callable[[], Slots],
        execute: Callable[[int], None],
        trace: Trace,
    ) -> None:
        self.schedule, self.rates, self.trace = schedule, rates, trace
        self._find_slots, self._execute = find_slots, execute
        self._slots: Slots | None = None
        self._done: defaultdict[int, int] = defaultdict(int)  # signals of tasks that are really done, by counter
        self._started: set[int] = set()
        self._memory: defaultdict[Word, int] = defaultdict(int)
        self._seen: defaultdict[Word, int] = defaultdict(int)  # what a reader finds: the memory, a hop ago
        self._free_at: defaultdict[Word, int] = defaultdict(int)
        self._waiting: defaultdict[Word, list[tuple[Wait, int, int]]] = defaultdict(list)
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self.now = 0

    @property
    def is_routed(self) -> bool:
        return self._slots is not None

    @property
    def slots(self) -> Slots:
        """Known to a program once it has waited for every SELECT."""
        if self._slots is None:
            raise ScheduleError("the slots were asked for before every SELECT was done")
        return self._slots

    def run(self, programs: Sequence[Program], memory: Mapping[Word, int] | None = None) -> None:
        """From the start of all programs to the end of the last; ``memory`` is what words hold at the start."""
        for start in (self._memory, self._seen):
            start.update(memory or {})
        self._programs = programs
        for number in range(len(programs)):
            self._at(0, self._resume, number)
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        self._check_end()

    def _at(self, time: int, happen: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (time, next(self._order), lambda: happen(*arguments)))

    def _resume(self, number: int, answer: int | None = None) -> None:
        program = self._programs[number]
        try:
            action = next(program) if answer is None else program.send(answer)
        except StopIteration:
            return
        if isinstance(action, Run):
            self._start(number, action.index)
        elif isinstance(action, Wait):
            self._wait(number, action)
        elif isinstance(action, Busy):
            self.trace.tasks.append(TaskSpan(number, action.why, self.now, self.now + action.ns))
            self._at(self.now + action.ns, self._resume, number, 0)
        else:
            old, time = self._add(action.word, action.value if isinstance(action, Add) else 1)
            asks = isinstance(action, Add) and not action.is_early
            self._at(time if asks else self.now, self._resume, number, old)

    def _start(self, number: int, index: int) -> None:
        task = self.schedule.tasks[index]
        if index in self._started:
            raise ScheduleError(f"task {index}, {task}, ran twice")
        self._started.add(index)
        self._check_need(index)
        self._execute(index)
        expert = tokens = None
        if task.slot >= 0:
            expert, tokens = self.slots.experts[task.slot], self.slots.tokens[task.slot]
        cost = self.schedule.cost(index, tokens)
        end = self.now + cost.time_ns(self.rates, self.schedule.num_programs)
        kind, tile = task.kind.name.lower(), (task.begin, task.end)
        self.trace.tasks.append(TaskSpan(number, kind, self.now, end, index, expert, tile, cost.nbytes))
        self._at(end, self._end, number, index)

    def _end(self, number: int, index: int) -> None:
        task = self.schedule.tasks[index]
        self._done[task.signals] += 1
        if task.kind is Kind.SELECT and self._done[task.signals] == self.schedule.total(task.signals).fixed:
            self._slots = self._find_slots()
        self._resume(number, 0)

    def _check_need(self, index: int) -> None:
        task = self.schedule.tasks[index]
        need = task.need
        if task.slot >= 0 and task.slot >= self.slots.hits:
            raise ScheduleError(f"task {index}, {task}, ran for a slot beyond the {self.slots.hits} hit")
        if need.counter == NO_COUNTER:
            return
        required = need.required(self.slots.hits if need.per_hit else 0)
        if self._done[need.counter] < required:
            done = self._done[need.counter]
            raise ScheduleError(f"task {index}, {task}, ran when {done} of the {required} that it needs were done")

    def _add(self, word: Word, value: int) -> tuple[int, int]:
        """The old value, and when the answer is there. Additions to one word take turns."""
        time = max(self.now, self._free_at[word])
        self._free_at[word] = time + self.rates.atomic_ns
        old = self._memory[word]
        self._memory[word] = old + value
        self._at(time + self.rates.hop_ns, self._publish, word, old + value)
        return old, time + self.rates.hop_ns

    def _publish(self, word: Word, value: int) -> None:
        self._seen[word] = value
        waiting, self._waiting[word] = self._waiting[word], []
        for wait, number, since in waiting:
            if wait.at_least <= value:
                what = self.schedule.counter_name(word) if isinstance(word, int) else word
                self.trace.waits.append(WaitSpan(number, what, since, self.now))
                self._resume(number, 0)
            else:
                self._waiting[word].append((wait, number, since))

    def _wait(self, number: int, wait: Wait) -> None:
        if self._seen[wait.word] >= wait.at_least:
            self._resume(number, 0)
        else:
            self._waiting[wait.word].append((wait, number, self.now))

    def _check_end(self) -> None:
        if stuck := [(number, wait) for waiting in self._waiting.values() for wait, number, _ in waiting]:
            raise ScheduleError(f"{len(stuck)} programs wait for ever, the first {stuck[0]}")
        live = {self.schedule.nth_live(n, self.slots.hits) for n in range(self.schedule.num_live(self.slots.hits))}
        if missing := sorted(live - self._started):
            raise ScheduleError(f"{len(missing)} tasks were left out, the first {self.schedule.tasks[missing[0]]}")
