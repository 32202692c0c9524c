"""The work of ``flash_decode`` as data: a table of tasks, joined by counters, and flat integers for a kernel.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, P = T * K pairs.

Which experts are hit is known only once the tokens are routed, on the device. So the tasks are made for *slots*: slot i
is the i-th distinct expert hit, in ascending order of expert ids. There are S = min(E, P) of them, and the tasks of
slots beyond those hit are skipped. The shared expert, which needs no routing, is slot ``SHARED``.

    ROUTE     logits of a few experts, a few tokens                     waits for nothing
    SELECT    experts and weights of a few tokens                        waits for every ROUTE
    GATE_UP   act(gate) * up, a few of the I columns of a slot           waits for every SELECT (SHARED: for nothing)
    DOWN      down product, a few of the H columns of a slot             waits for every GATE_UP of its slot
    COMBINE   weighted sum of a few columns of a few tokens              waits for every DOWN of its columns

The tasks stand in one table, in an order in which each comes after all that it waits for:

    head      ROUTE, SELECT, GATE_UP of SHARED
    steps     step s has the GATE_UP tiles of slot s, then the DOWN tiles of slot s - lead
    tail      DOWN of SHARED, COMBINE

The lead lets the GATE_UP tiles of later slots fill the time in which a slot's DOWN tiles would wait.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from flash_moe._checks import check_int
from flash_moe.schedule.tasks import (
    NO_SLOT,
    SHARED,
    Combine,
    Cost,
    Down,
    GateUp,
    Need,
    Rates,
    Route,
    Select,
    Sizes,
    Task,
    Tiles,
)

# Counters: these, then one for each slot's GATE_UP tiles (SHARED last), then one for each block of combined columns.
ROUTED, SELECTED, FINISHED, FIRST_SLOT = range(4)

MAX_PROGRAMS = 2**20

# What a counter reaches that no task waits for.
NEVER = 2**31 - 1


class Serialized(NamedTuple):
    """A schedule as flat int32, for a kernel."""

    tasks: list[int]
    """``TASK_WORDS`` for each task, in the order of the table."""
    totals: list[int]
    """For each counter what it reaches: a fixed number, and one a slot hit."""
    released_offsets: list[int]
    released: list[int]
    """Tasks at ``released[offsets[c]]`` up to ``released[offsets[c + 1]]`` wait for counter c; the entry after the last
    counter has those that wait for nothing."""


@dataclass(frozen=True)
class Schedule:
    """The table of tasks, and the arithmetic that finds the live ones once the number of slots hit is known."""

    sizes: Sizes
    tiles: Tiles
    num_programs: int
    tasks: tuple[Task, ...]
    num_head: int
    num_tail: int
    num_counters: int
    gate_up_tiles: int
    """Of a slot."""
    down_tiles: int

    @property
    def lead(self) -> int:
        return self.tiles.lead

    def num_live(self, hits: int) -> int:
        return self.num_head + hits * (self.gate_up_tiles + self.down_tiles) + self.num_tail

    def nth_live(self, n: int, hits: int) -> int:
        """The place in the table of the n-th task that is not skipped, by arithmetic that a kernel can do as well."""
        g, d, lead = self.gate_up_tiles, self.down_tiles, self.lead
        n -= self.num_head
        if n < 0:
            return n + self.num_head
        if n >= hits * (g + d):
            return len(self.tasks) - self.num_tail + n - hits * (g + d)
        alone = min(lead, hits) * g  # steps that have no DOWN tiles yet
        if n < alone:
            return self._step_at(n // g) + n % g
        both = max(0, hits - lead)
        n -= alone
        if n < both * (g + d):
            return self._step_at(lead + n // (g + d)) + n % (g + d)
        n -= both * (g + d)
        step = max(lead, hits) + n // d
        skipped = g if step < self.sizes.num_slots else 0  # GATE_UP tiles of a slot that is not hit
        return self._step_at(step) + skipped + n % d

    def _step_at(self, step: int) -> int:
        gate_ups, downs = min(step, self.sizes.num_slots), max(0, step - self.lead)
        return self.num_head + gate_ups * self.gate_up_tiles + downs * self.down_tiles

    @cached_property
    def released(self) -> tuple[tuple[int, ...], ...]:
        """For each counter the tasks that wait for it; the last entry has those that wait for nothing."""
        found: list[list[int]] = [[] for _ in range(self.num_counters + 1)]
        for index, task in enumerate(self.tasks):
            found[task.need.counter].append(index)
        return tuple(map(tuple, found))

    def total(self, counter: int) -> Need:
        """What ``counter`` reaches in all."""
        if counter == FINISHED:
            return Need(counter, sum(task.signals == FINISHED for task in self.tasks))
        return self.tasks[self.released[counter][0]].need

    def counter_name(self, counter: int) -> str:
        if counter < FIRST_SLOT:
            return ("routing", "selection", "the end")[counter]
        slot = counter - FIRST_SLOT
        if slot > self.sizes.num_slots:
            return f"down tiles of columns block {slot - self.sizes.num_slots - 1}"
        return "gate-up tiles of the shared expert" if slot == self.sizes.num_slots else f"gate-up tiles of slot {slot}"

    def cost(self, index: int, tokens: int | None = None) -> Cost:
        """Of a task, for ``tokens`` tokens in its slot; by default as many as are expected."""
        task = self.tasks[index]
        if task.slot == SHARED:
            tokens = self.sizes.T
        return task.cost(self.sizes, self.sizes.expected_tokens if tokens is None else tokens)

    def serialize(self) -> Serialized:
        tasks = [word for task in self.tasks for word in task.serialize()]
        totals = []
        for counter in range(self.num_counters):
            is_used = counter == FINISHED or self.released[counter]
            total = self.total(counter) if is_used else Need(counter, NEVER)
            totals += [total.fixed, total.per_hit]
        offsets = list(accumulate(map(len, self.released), initial=0))
        return Serialized(tasks, totals, offsets, [i for each in self.released for i in each])


def build_schedule(sizes: Sizes, tiles: Tiles, num_programs: int) -> Schedule:
    """The schedule of a call; the same for every policy and whatever the tokens will be."""
    check_int("num_programs", num_programs, 1, MAX_PROGRAMS)
    if sizes.T == 0:
        return Schedule(sizes, tiles, num_programs, (), 0, 0, FIRST_SLOT, 0, 0)
    maker = _Maker(sizes, tiles)
    head, steps, tail = maker.head(), maker.steps(), maker.tail()
    tasks = (*head, *steps, *tail)
    return Schedule(
        sizes, tiles, num_programs, tasks, len(head), len(tail), maker.first_block + len(maker.blocks),
        len(_cut(sizes.I, tiles.gate_up_columns)), len(maker.down_tiles),
    )  # fmt: skip


class _Maker:
    """Cuts the sizes into tiles and joins these by counters."""

    def __init__(self, sizes: Sizes, tiles: Tiles) -> None:
        self.sizes, self.tiles = sizes, tiles
        self.has_shared = sizes.shared_intermediate_size > 0
        self.down_tiles = _cut(sizes.H, tiles.down_columns)
        per_block = -(-tiles.combine_columns // tiles.down_columns)
        self.blocks = [self.down_tiles[i : i + per_block] for i in range(0, len(self.down_tiles), per_block)]
        self.first_block = FIRST_SLOT + sizes.num_slots + 1
        self.select_tiles = _cut(sizes.T, tiles.select_tokens)

    def head(self) -> list[Task]:
        experts, tokens = _cut(self.sizes.E, self.tiles.route_experts), _cut(self.sizes.T, self.tiles.route_tokens)
        tasks: list[Task] = [Route(*tile, Need(), ROUTED, NO_SLOT, *some) for some in tokens for tile in experts]
        need = Need(ROUTED, len(tasks))
        tasks += [Select(0, self.sizes.E, need, SELECTED, NO_SLOT, *tokens) for tokens in self.select_tiles]
        return tasks + (self._gate_ups(SHARED, 0) if self.has_shared else [])

    def steps(self) -> list[Task]:
        S, lead = self.sizes.num_slots, self.tiles.lead
        tasks: list[Task] = []
        for step in range(S + lead):
            tasks += self._gate_ups(step, step) if step < S else []
            tasks += self._downs(step - lead, step) if step >= lead else []
        return tasks

    def tail(self) -> list[Task]:
        tasks: list[Task] = list(self._downs(SHARED, 0)) if self.has_shared else []
        for number, block in enumerate(self.blocks):
            fixed = len(block) if self.has_shared else 0
            need = Need(self.first_block + number, fixed, len(block))
            for tokens in _cut(self.sizes.T, self.tiles.combine_tokens):
                tasks.append(Combine(block[0][0], block[-1][1], need, FINISHED, NO_SLOT, *tokens))
        return tasks

    def _gate_ups(self, slot: int, step: int) -> list[Task]:
        need = Need() if slot == SHARED else Need(SELECTED, len(self.select_tiles))
        return [GateUp(*tile, need, self._counter(slot), slot, step=step) for tile in self._columns(slot)]

    def _downs(self, slot: int, step: int) -> list[Task]:
        need = Need(self._counter(slot), len(self._columns(slot)))
        return [
            Down(*tile, need, self.first_block + number, slot, step=step)
            for number, block in enumerate(self.blocks)
            for tile in block
        ]

    def _columns(self, slot: int) -> list[tuple[int, int]]:
        I = self.sizes.shared_intermediate_size if slot == SHARED else self.sizes.I
        return _cut(I, self.tiles.gate_up_columns)

    def _counter(self, slot: int) -> int:
        return FIRST_SLOT + (self.sizes.num_slots if slot == SHARED else slot)


def tile_sizes(sizes: Sizes, num_programs: int, rates: Rates | None = None) -> Tiles:
    """The tiles that take the least logical time for the expected number of experts hit."""
    check_int("num_programs", num_programs, 1, MAX_PROGRAMS)
    gate_up_columns = _best_width(GateUp, sizes.I, sizes, num_programs, rates or Rates())
    down_columns = _best_width(Down, sizes.H, sizes, num_programs, rates or Rates())
    waves_ahead = 2
    return Tiles(
        route_experts=-(-sizes.E // num_programs),
        select_tokens=max(1, -(-sizes.T // num_programs)),
        gate_up_columns=gate_up_columns,
        down_columns=down_columns,
        combine_columns=max(64, -(-sizes.H // num_programs)),
        lead=-(-waves_ahead * num_programs // -(-sizes.I // gate_up_columns)),
    )


def _best_width(make: type[Task], size: int, sizes: Sizes, num_programs: int, rates: Rates) -> int:
    """Of powers of two: the programs run all tiles in waves, each as long as one tile takes."""

    def time_ns(width: int) -> int:
        tile = make(0, min(width, size), Need(), FINISHED, slot=0).cost(sizes, sizes.expected_tokens)
        waves = -(-sizes.expected_hits * -(-size // width) // num_programs)
        return waves * tile.time_ns(rates, num_programs)

    return min((128, 64, 32, 16, 8), key=time_ns)


def _cut(size: int, width: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + width, size)) for begin in range(0, size, width)]
