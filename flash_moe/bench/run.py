"""Check, then measure: one row for each case, competitor, pass and way of launching."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_moe.bench.cases import (
    LATENCY_BOUND_TOKENS,
    LETTERS,
    OP_NAMES,
    ROUTINGS,
    Case,
    Inputs,
    find_cases,
    make_inputs,
)
from flash_moe.bench.checks import check, check_replay
from flash_moe.bench.competitors import Bound, Competitor, find_competitors, free_competitor
from flash_moe.bench.machine import describe_machine, sm_clock_mhz
from flash_moe.bench.roofs import Roof, Roofs
from flash_moe.bench.timing import CudaTimer, Timer, count_launches, make_timer, percentiles
from flash_moe.bench.work import FORWARD, Work, count_work, passes_of
from flash_moe.testing import peak_nbytes

EAGER, GRAPH = "eager", "graph"
# An eager call that takes less may be waiting for the host, which needs up to 15 us for a launch and makes up to 60 of
# them: it is measured in a graph, too. So is every call on up to LATENCY_BOUND_TOKENS.
GRAPH_BELOW_US = 1000.0
# Of the measuring time of a row, what each of a roof's parts gets: there are many, and they vary little.
ROOF_SECONDS = 0.25
# Input sets that a graph's calls go through, so that each finds its own cold; and the memory they may take.
GRAPH_SETS, GRAPH_SETS_NBYTES = 16, 4 * 2**30
# More than this between two readings, and the clock has moved under the measurement.
CLOCK_TOLERANCE = 0.03

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    ops: Sequence[str]
    case: str | None = None
    backends: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    """"fwd" or "bwd"; both by default."""
    routing: str | None = None
    seconds: float = 0.4
    """Of measuring, for each row."""
    commit: str | None = None

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("op", self.ops, (*LETTERS, "all")),
            ("pass", self.passes, ("fwd", "bwd")),
            ("routing", [self.routing] if self.routing else [], ROUTINGS),
        ):
            for value in values:
                if value not in allowed:
                    raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")
        if not self.ops:
            raise ValueError(f"op: expected one or more of {', '.join(LETTERS)}, or all; got none")
        if not 0 < self.seconds <= 60:
            raise ValueError(f"seconds: expected a number above 0, at most 60; got {self.seconds}")
        if self.routing and not {"expert", "all"} & set(self.ops):
            raise ValueError(f"routing: expected only with expert, whose ids it draws; got {self.routing!r}")


@dataclass(frozen=True)
class Refusal:
    """A row that there is none of."""

    case: Case
    backend: str
    which: str
    launch: str
    reason: str
    is_failure: bool
    """False where a competitor needs more memory than there is."""


@dataclass
class _Bench:
    """What the rows of a run share."""

    device: torch.device
    timer: Timer
    roofs: Roofs
    fields: Row


def run_bench(request: Request) -> Iterator[Row | Refusal]:
    """Rows as they are measured. Raises ``ValueError`` before the first for what the request cannot mean."""
    # Above every level that the profiler's library has: it reports each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    todo = [(case, find_competitors(case, device, request.backends)) for case in _cases(request, device)]
    if not any(competitors for _, competitors in todo):
        raise ValueError(f"backend: expected one that {', '.join(request.ops)} has; got {', '.join(request.backends)}")
    fields = describe_machine(device, request.commit)
    timer = make_timer(device, request.seconds)
    roofs = Roofs(make_timer(device, ROOF_SECONDS * request.seconds), device)
    bench = _Bench(device, timer, roofs, fields)
    for case, competitors in todo:
        yield from _run_case(bench, case, competitors, _passes(case, request.passes))
        timer.free()


def _cases(request: Request, device: torch.device) -> list[Case]:
    ops = list(LETTERS) if "all" in request.ops else list(dict.fromkeys(request.ops))
    return [case for op in ops for case in find_cases(op, request.case, request.routing, device.type)]


def _passes(case: Case, wanted: tuple[str, ...]) -> list[str]:
    """fwd is the forward, bwd is the op's backward or the layer's forward and backward."""
    return [which for which in passes_of(case) if not wanted or ("fwd" if which == FORWARD else "bwd") in wanted]


def _run_case(
    bench: _Bench, case: Case, competitors: Sequence[Competitor], passes: Sequence[str]
) -> Iterator[Row | Refusal]:
    if not competitors or not passes:
        return
    inputs = make_inputs(case, bench.device)
    works = {which: count_work(case, which, inputs) for which in passes}
    roofs = {which: bench.roofs.roof(case, which, inputs, works[which]) for which in passes}
    del inputs
    for competitor in competitors:
        bench.timer.free()
        inputs = make_inputs(case, bench.device)  # its own, so that nobody depends on what another left
        for which in passes:
            for found in _measure(bench, case, competitor, which, inputs):
                if isinstance(found, Refusal):
                    yield found
                else:
                    yield _row(bench, case, competitor, which, works[which], roofs[which], found)
        del inputs
        free_competitor(competitor.name)


def _measure(bench: _Bench, case: Case, competitor: Competitor, which: str, inputs: Inputs) -> Iterator[Row | Refusal]:
    """What was measured of the eager call, then of a graph that holds it where there is one."""
    for launch, measure in ((EAGER, _measure_eager), (GRAPH, _measure_graph)):
        found: Row | Refusal
        try:
            found = {"launch": launch, **measure(bench, case, competitor, which, inputs)}
        except torch.OutOfMemoryError:
            found = Refusal(case, competitor.name, which, launch, "out of memory", competitor.is_ours)
        except NotImplementedError as error:  # embedding_bag's backward on a GPU knows no bfloat16, say
            found = Refusal(case, competitor.name, which, launch, str(error), competitor.is_ours)
        except Exception as error:
            # Only its text is kept: a traceback would hold on to the tensors.
            reason = f"{type(error).__name__}: {error}".strip()
            found = Refusal(case, competitor.name, which, launch, reason, True)
        is_last = isinstance(found, Refusal) or not _is_graphed(bench, case, competitor, which, found["times"])
        bench.timer.free()
        yield found
        if is_last:
            return


def _is_graphed(bench: _Bench, case: Case, competitor: Competitor, which: str, eager_us: Sequence[float]) -> bool:
    # A layer's launches are so many that the host may be what is measured at any size.
    is_short = case.op == "layer" or case.T <= LATENCY_BOUND_TOKENS or percentiles(eager_us)[1] < GRAPH_BELOW_US
    return is_short and which in competitor.captured and isinstance(bench.timer, CudaTimer)


def _measure_eager(bench: _Bench, case: Case, competitor: Competitor, which: str, inputs: Inputs) -> Row:
    """The fields that the eager call gives, after its results have passed the check."""
    bound = competitor.bind(inputs, which)
    error = check(case, inputs, bound, which, competitor.is_ours)
    with torch.set_grad_enabled(which != FORWARD):
        call = bound.prepare(which)
        warm_up_calls = bench.timer.warm_up(call)
        before = _clock(bench)
        times = bench.timer.time_eager(call, idle_start=case.T <= LATENCY_BOUND_TOKENS)
        after = _clock(bench)
        extra_nbytes = peak_nbytes(call, bench.device) - _result_nbytes(call())
        launches = count_launches(call) if isinstance(bench.timer, CudaTimer) else None
    return {
        "times": times,
        "warm_up_calls": warm_up_calls,
        "peak_mib": max(0.0, extra_nbytes / 2**20),
        "launches": launches,
        "error": error,
        "sm_mhz": [before, after],
    }


def _measure_graph(bench: _Bench, case: Case, competitor: Competitor, which: str, inputs: Inputs) -> Row:
    """The fields that a replayed graph gives, after what it left has been compared with the plain call's results."""
    assert isinstance(bench.timer, CudaTimer)
    count = max(1, min(GRAPH_SETS, GRAPH_SETS_NBYTES // max(1, _result_nbytes(inputs.args))))
    sets = [inputs, *(make_inputs(case, bench.device, seed) for seed in range(1, count))]
    bounds: list[Bound] = [competitor.bind(each, which) for each in sets]
    with torch.set_grad_enabled(which != FORWARD):
        before = _clock(bench)
        replayed = bench.timer.time_graph([partial(bound.prepare, which) for bound in bounds])
        after = _clock(bench)
    check_replay(case, bounds[0], which, replayed.result)
    return {
        "times": replayed.times,
        "warm_up_calls": replayed.warm_up_calls,
        "peak_mib": None,
        "launches": None,
        "error": None,
        "sm_mhz": [before, after],
    }


def _row(bench: _Bench, case: Case, competitor: Competitor, which: str, work: Work, roof: Roof, found: Row) -> Row:
    times, launch = found.pop("times"), found.pop("launch")
    time_us = percentiles(times)
    text = case.describe() + (", CUDA graph" if launch == GRAPH else "")
    # Experts are counted by the row used, as the caches deliver them; see work.py.
    nbytes = work.row_nbytes or work.nbytes
    return {
        "op": OP_NAMES[case.op],
        "case": text,
        "backend": competitor.name,
        "pass": which,
        "launch": launch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "routing": case.routing,
        "sizes": case.by_letter,
        "time_us": [round(time, 3) for time in time_us],
        "calls": len(times),
        "nbytes": work.nbytes,
        "row_nbytes": work.row_nbytes,
        "flops": work.flops,
        "gb_per_s": nbytes / time_us[1] / 1e3,
        "tflops": None if work.flops is None else work.flops / time_us[1] / 1e6,
        "roof": roof.bound,
        "roof_us": roof.time_us,
        "roof_pct": 100 * roof.time_us / time_us[1],
        "roof_parts_us": roof.parts_us,
        "roof_gather_us": roof.gather_us,
        "copy_gb_per_s": bench.roofs.copy_gb_per_s(),
        **found,
        "is_cold": bench.timer.is_cold,
        **bench.fields,
    }


def clock_moved(row: Row) -> bool:
    """Whether the SM clock was another after the measurement than before it."""
    before, after = row["sm_mhz"]
    return bool(before and after) and abs(after - before) > CLOCK_TOLERANCE * before


def _clock(bench: _Bench) -> int | None:
    return sm_clock_mhz(bench.device, bench.timer.flush) if isinstance(bench.timer, CudaTimer) else None


def _result_nbytes(results: object) -> int:
    results = results if isinstance(results, tuple) else (results,)
    return sum(x.numel() * x.element_size() for x in results if isinstance(x, Tensor))
