"""Check, then measure: one row for each case, competitor, pass and way of launching."""

import os
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from flash_moe.bench.cases import DECODE, LATENCY_BOUND_TOKENS, LETTERS, Case, Inputs, find_cases, make_inputs
from flash_moe.bench.checks import check, check_replay
from flash_moe.bench.competitors import Bound, Competitor, find_competitors, free_competitor
from flash_moe.bench.decode import plan_decode, run_decode
from flash_moe.bench.machine import describe_machine
from flash_moe.bench.roofs import Roof, Roofs
from flash_moe.bench.rows import (
    EAGER,
    GRAPH,
    Bench,
    Refusal,
    Request,
    Row,
    graph_fields,
    make_row,
    measure_or_refuse,
    read_clock,
    result_nbytes,
)
from flash_moe.bench.timing import CudaTimer, count_launches, make_timer, percentiles
from flash_moe.bench.work import FORWARD, Work, count_work, passes_of
from flash_moe.testing import peak_nbytes

# An eager call that takes less may be waiting for the host, which needs up to 15 us for a launch and makes up to 60 of
# them: it is measured in a graph, too. So is every call on up to LATENCY_BOUND_TOKENS.
GRAPH_BELOW_US = 1000.0
# Of the measuring time of a row, what each of a roof's parts gets: there are many, and they vary little.
ROOF_SECONDS = 0.25
# Input sets that a graph's calls go through, so that each finds its own cold; and the memory they may take.
GRAPH_SETS, GRAPH_SETS_NBYTES = 16, 4 * 2**30


def run_bench(request: Request) -> Iterator[Row | Refusal]:
    """Rows as they are measured. Raises ``ValueError`` before the first for what the request cannot mean."""
    # Above every level that the profiler's library has: it reports each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    todo = [(case, find_competitors(case, device, request.backends)) for case in _cases(request, device)]
    decode = plan_decode(request, device) if request.has(DECODE) else None
    if decode is None and not any(competitors for _, competitors in todo):
        raise ValueError(f"backend: expected one that {', '.join(request.ops)} has; got {', '.join(request.backends)}")
    fields = describe_machine(device, request.commit)
    timer = make_timer(device, request.seconds)
    roofs = Roofs(make_timer(device, ROOF_SECONDS * request.seconds), device)
    bench = Bench(device, timer, roofs, fields)
    for case, competitors in todo:
        yield from _run_case(bench, case, competitors, _passes(case, request.passes))
        timer.free()
    if decode is not None:
        yield from run_decode(bench, decode)


def _cases(request: Request, device: torch.device) -> list[Case]:
    ops = LETTERS if "all" in request.ops else dict.fromkeys(op for op in request.ops if op in LETTERS)
    return [case for op in ops for case in find_cases(op, request.case, request.routing, device.type)]


def _passes(case: Case, wanted: tuple[str, ...]) -> list[str]:
    """fwd is the forward, bwd is the op's backward or the layer's forward and backward."""
    return [which for which in passes_of(case) if not wanted or ("fwd" if which == FORWARD else "bwd") in wanted]


def _run_case(
    bench: Bench, case: Case, competitors: Sequence[Competitor], passes: Sequence[str]
) -> Iterator[Row | Refusal]:
    if not competitors or not passes:
        return
    counted: dict[Case, dict[str, tuple[Work, Roof]]] = {}
    for competitor in competitors:
        computed = competitor.computes or case
        if not (measured := [which for which in passes if which in competitor.passes]):
            continue
        if computed not in counted:
            counted[computed] = _count(bench, computed, measured)
        bench.timer.free()
        inputs = make_inputs(computed, bench.device)  # its own, so that nobody depends on what another left
        for which in measured:
            for found in _measure(bench, case, competitor, which, inputs):
                if isinstance(found, Refusal):
                    yield found
                else:
                    yield make_row(bench, case, competitor.name, which, *counted[computed][which], found)
        del inputs
        free_competitor(competitor.name)


def _count(bench: Bench, case: Case, passes: Sequence[str]) -> dict[str, tuple[Work, Roof]]:
    inputs = make_inputs(case, bench.device)
    works = {which: count_work(case, which, inputs) for which in passes}
    return {which: (work, bench.roofs.roof(case, which, inputs, work)) for which, work in works.items()}


def _measure(bench: Bench, case: Case, competitor: Competitor, which: str, inputs: Inputs) -> Iterator[Row | Refusal]:
    """What was measured of the eager call, then of a graph that holds it where there is one."""
    for launch, measure in ((EAGER, _measure_eager), (GRAPH, _measure_graph)):
        call = partial(measure, bench, competitor.computes or case, competitor, which, inputs)
        found = measure_or_refuse(case, competitor.name, which, launch, competitor.is_ours, call)
        is_last = isinstance(found, Refusal) or not _is_graphed(bench, case, competitor, which, found["times"])
        bench.timer.free()
        yield found
        if is_last:
            return


def _is_graphed(bench: Bench, case: Case, competitor: Competitor, which: str, eager_us: Sequence[float]) -> bool:
    # A layer's launches are so many that the host may be what is measured at any size.
    is_short = case.op == "layer" or case.T <= LATENCY_BOUND_TOKENS or percentiles(eager_us)[1] < GRAPH_BELOW_US
    return is_short and which in competitor.captured and isinstance(bench.timer, CudaTimer)


def _measure_eager(bench: Bench, case: Case, competitor: Competitor, which: str, inputs: Inputs) -> Row:
    """The fields that the eager call gives, after its results have passed the check."""
    bound = competitor.bind(inputs, which)
    error = check(case, inputs, bound, which, competitor.is_ours)
    with torch.set_grad_enabled(which != FORWARD):
        call = bound.prepare(which)
        warm_up_calls = bench.timer.warm_up(call)
        before = read_clock(bench)
        times = bench.timer.time_eager(call, idle_start=case.T <= LATENCY_BOUND_TOKENS)
        after = read_clock(bench)
        extra_nbytes = peak_nbytes(call, bench.device) - result_nbytes(call())
        launches = count_launches(call) if isinstance(bench.timer, CudaTimer) else None
    return {
        "times": times,
        "warm_up_calls": warm_up_calls,
        "peak_mib": max(0.0, extra_nbytes / 2**20),
        "launches": launches,
        "error": error,
        "sm_mhz": [before, after],
    }


def _measure_graph(bench: Bench, case: Case, competitor: Competitor, which: str, inputs: Inputs) -> Row:
    """The fields that a replayed graph gives, after what it left has been compared with the plain call's results."""
    assert isinstance(bench.timer, CudaTimer)
    count = max(1, min(GRAPH_SETS, GRAPH_SETS_NBYTES // max(1, result_nbytes(inputs.args))))
    sets = [inputs, *(make_inputs(case, bench.device, seed) for seed in range(1, count))]
    bounds: list[Bound] = [competitor.bind(each, which) for each in sets]
    with torch.set_grad_enabled(which != FORWARD):
        before = read_clock(bench)
        replayed = bench.timer.time_graph([partial(bound.prepare, which) for bound in bounds])
        after = read_clock(bench)
    check_replay(case, bounds[0], which, replayed.result)
    return {
        **graph_fields(replayed),
        "sm_mhz": [before, after],
    }
