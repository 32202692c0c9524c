"""What each program of a call did and when: spans, idle shares, a text summary, JSON for Perfetto and chrome://tracing."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

LONGEST_WAITS = 5
# Of a clock: an H200's global timer has 32. Tasks are a microsecond long, and waits shorter.
COARSEST_STEP_NS = 100


@dataclass(frozen=True)
class TaskSpan:
    """One task, or, without an index, what a program did between tasks; times in nanoseconds from the call's start."""

    program: int
    kind: str
    start_ns: int
    end_ns: int
    index: int | None = None
    """Place in the schedule's table."""
    expert: int | None = None
    """Only for the tiles of a routed expert."""
    tile: tuple[int, int] = (0, 0)
    nbytes: int = 0


@dataclass(frozen=True)
class WaitSpan:
    program: int
    what: str
    start_ns: int
    end_ns: int

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Phase:
    """All tasks of one kind, from the first to start to the last to end."""

    kind: str
    start_ns: int
    end_ns: int
    num_tasks: int
    nbytes: int
    idle_share: float
    """Of the programs' time in the phase, whatever kind of task the others were at."""

    @property
    def bytes_per_second(self) -> float:
        return _rate(self.nbytes, self.end_ns - self.start_ns)


@dataclass
class Trace:
    """Pass one to ``flash_decode(trace=...)``; every call starts it anew.

    ``clock`` is "GPU" where a kernel ran: times are what its programs read from the GPU's global timer. It is "logical"
    where the schedule is interpreted: times are those of a model of a GPU, not of this machine.
    """

    policy: str = ""
    clock: str = ""
    num_programs: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    tasks: list[TaskSpan] = field(default_factory=list)
    waits: list[WaitSpan] = field(default_factory=list)
    num_lost: int = 0
    """Tasks and waits of a GPU's call that there was no room to record."""

    def begin(self, policy: str, clock: str, num_programs: int, sizes: dict[str, int]) -> None:
        """Forget the last call."""
        self.policy, self.clock, self.num_programs, self.sizes = policy, clock, num_programs, sizes
        self.tasks.clear()
        self.waits.clear()
        self.num_lost = 0

    @property
    def end_ns(self) -> int:
        return max((span.end_ns for span in self.tasks), default=0)

    @property
    def step_ns(self) -> int:
        """The smallest difference between two times, 0 where all are equal: on a GPU, the step of its timer."""
        spans: list[TaskSpan | WaitSpan] = [*self.tasks, *self.waits]
        times = sorted({time for span in spans for time in (span.start_ns, span.end_ns)})
        return min((later - earlier for earlier, later in pairwise(times)), default=0)

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.tasks)

    @property
    def bytes_per_second(self) -> float:
        return _rate(self.nbytes, self.end_ns)

    @property
    def idle_share(self) -> float:
        return self._idle_share(self.tasks, 0, self.end_ns, self.num_programs)

    def idle_shares(self) -> list[float]:
        """Of each program, from the call's start to its end."""
        mine: list[list[TaskSpan]] = [[] for _ in range(self.num_programs)]
        for span in self.tasks:
            mine[span.program].append(span)
        return [self._idle_share(spans, 0, self.end_ns, 1) for spans in mine]

    def phases(self) -> list[Phase]:
        """In order of their start."""
        kinds: dict[str, list[TaskSpan]] = {}
        for span in self.tasks:
            kinds.setdefault(span.kind, []).append(span)
        found = []
        for kind, spans in kinds.items():
            start, end = min(span.start_ns for span in spans), max(span.end_ns for span in spans)
            idle = self._idle_share(self.tasks, start, end, self.num_programs)
            found.append(Phase(kind, start, end, len(spans), sum(span.nbytes for span in spans), idle))
        return sorted(found, key=lambda phase: (phase.start_ns, phase.end_ns))

    def longest_waits(self, count: int = LONGEST_WAITS) -> list[WaitSpan]:
        return sorted(self.waits, key=lambda wait: (-wait.ns, wait.start_ns, wait.program))[:count]

    def summary(self) -> str:
        """Time, idle share and rate of each phase, the longest waits, and what waiting cost in all."""
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        steps = f" in steps of {self.step_ns} ns" if self.clock == "GPU" else ""
        lines = [
            f"policy {self.policy}, {self.num_programs} programs, {self.clock} time{steps}; {sizes}",
            f"{self.end_ns / 1e3:.2f} us, {self.idle_share:.1%} idle, {_tera(self.bytes_per_second)} TB/s",
            f"{'phase':<10}{'from, us':>10}{'to, us':>10}{'tasks':>8}{'idle':>8}{'TB/s':>8}",
        ]
        for phase in self.phases():
            start, end = phase.start_ns / 1e3, phase.end_ns / 1e3
            rate = _tera(phase.bytes_per_second)
            lines.append(
                f"{phase.kind:<10}{start:>10.2f}{end:>10.2f}{phase.num_tasks:>8}{phase.idle_share:>8.1%}{rate:>8}"
            )
        lines.append(
            f"{len(self.waits)} waits, {sum(wait.ns for wait in self.waits) / 1e3:.2f} us in all; the longest:"
        )
        for wait in self.longest_waits():
            where = f"program {wait.program} from {wait.start_ns / 1e3:.2f} us"
            lines.append(f"  {wait.ns / 1e3:.2f} us for {wait.what}: {where}")
        return "\n".join([*lines, *self._reservations()])

    def _reservations(self) -> list[str]:
        """Why the rest of the summary may not be all there is to see."""
        found = []
        if self.clock == "GPU" and self.step_ns > COARSEST_STEP_NS:
            found.append(
                f"the GPU's timer has steps of {self.step_ns} ns, more than {COARSEST_STEP_NS}: tasks and waits that "
                "are shorter cannot be told apart, nor which of them came first"
            )
        if self.num_lost > 0:
            found.append(f"{self.num_lost} tasks and waits are missing: programs had no room to record more of them")
        return found

    def to_chrome(self) -> dict[str, Any]:
        """The trace event format: a thread a program, an event a task and a wait; times in microseconds."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": f"program {number}"}}
            for number in range(self.num_programs)
        ]
        tasks = [_event(span.kind, "task", span, _details(span)) for span in self.tasks]
        waits = [_event(f"wait for {wait.what}", "wait", wait, {}) for wait in self.waits]
        other = {"policy": self.policy, "clock": self.clock, **self.sizes}
        if self.num_lost > 0:
            other["missing"] = self.num_lost
        return {"traceEvents": [*names, *tasks, *waits], "displayTimeUnit": "ns", "otherData": other}

    def write_chrome(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_chrome()) + "\n", encoding="utf-8")

    @staticmethod
    def _idle_share(spans: Iterable[TaskSpan], start: int, end: int, num_programs: int) -> float:
        if end <= start:
            return 0.0
        busy = sum(max(0, min(span.end_ns, end) - max(span.start_ns, start)) for span in spans)
        return 1 - busy / ((end - start) * num_programs)


def _event(name: str, category: str, span: TaskSpan | WaitSpan, details: dict[str, Any]) -> dict[str, Any]:
    start, duration = span.start_ns / 1e3, (span.end_ns - span.start_ns) / 1e3
    return {
        "name": name, "cat": category, "ph": "X", "ts": start, "dur": duration, "pid": 0, "tid": span.program,
        "args": details,
    }  # fmt: skip


def _details(span: TaskSpan) -> dict[str, Any]:
    return {"task": span.index, "expert": span.expert, "tile": list(span.tile), "bytes": span.nbytes}


def _rate(nbytes: int, ns: int) -> float:
    return nbytes / ns * 1e9 if ns > 0 else 0.0


def _tera(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e12:.2f}"
