"""Check, then measure a decode layer: a row for each case, competitor and way of launching.

What is timed is a call of each of several layers, one after another, and a row's time is that of a layer. In a graph
all of them are one replay; eagerly the host makes one call after another, and the GPU is idle when the first begins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_moe._moe_layer import MoELayer
from flash_moe.bench.checks import REPLAY_BOUND, MismatchError, worst_error
from flash_moe.bench.competitors import free_competitor
from flash_moe.bench.decode_cases import (
    DecodeCase,
    DecodeInputs,
    count_decode_work,
    count_experts,
    draw_tokens,
    find_decode_cases,
    make_pools,
)
from flash_moe.bench.decode_checks import Truth, check_decode, find_truth, tied_share
from flash_moe.bench.decode_competitors import (
    Absence,
    Call,
    DecodeCompetitor,
    check_names,
    find_decode_competitors,
    why_not_decode,
)
from flash_moe.bench.roofs import Roof
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
from flash_moe.bench.timing import CudaTimer, Timer, count_launches, make_timer
from flash_moe.bench.work import FORWARD, Work
from flash_moe.testing import peak_nbytes

# Of the measuring time of a row: rows are many and each of their calls goes through several layers. A loop over the
# experts takes up to 0.2 s for one call.
SECONDS_SHARE, LOOP_SECONDS_SHARE = 0.25, 0.05

Pools = list[tuple[Tensor, MoELayer]]


@dataclass(frozen=True)
class DecodePlan:
    cases: Sequence[DecodeCase]
    names: tuple[str, ...]
    policies: tuple[str, ...]
    timer: Timer
    loop_timer: Timer


@dataclass(frozen=True)
class _Layers:
    """What a case's competitors share."""

    inputs: Sequence[DecodeInputs]
    truths: Sequence[Truth]
    work: Work
    roof: Roof
    facts: Row
    """Fields of every row."""


def plan_decode(request: Request, device: torch.device) -> DecodePlan:
    """What ``request`` asks for. Raises ``ValueError`` for what it cannot mean."""
    check_names(request.backends, device)
    cases = find_decode_cases(request.case, request.formats, device.type)
    if request.passes and "fwd" not in request.passes:
        cases = []
    timers = (make_timer(device, share * request.seconds) for share in (SECONDS_SHARE, LOOP_SECONDS_SHARE))
    return DecodePlan(cases, request.backends, request.policies, *timers)


@torch.no_grad()
def run_decode(bench: Bench, plan: DecodePlan) -> Iterator[Row | Refusal]:
    pools: Pools = []
    for i, case in enumerate(plan.cases):
        if i == 0 or (case.model, case.format) != (plan.cases[i - 1].model, plan.cases[i - 1].format):
            pools.clear()
            plan.timer.free()
            pools = make_pools(case, bench.device)  # the same weights at every T
        yield from _run_case(bench, plan, case, pools)


def _run_case(bench: Bench, plan: DecodePlan, case: DecodeCase, pools: Pools) -> Iterator[Row | Refusal]:
    inputs = [draw_tokens(case, pool, layer) for pool, layer in pools]
    try:
        layers = _prepare(bench, case, inputs)
    except MismatchError as error:  # the inputs, or the specification itself
        yield Refusal(case, "reference", FORWARD, EAGER, str(error), True)
        return
    clock = read_clock(bench)  # read between competitors only, since a reading takes longer than many a row
    for competitor in find_decode_competitors(case, inputs[0], bench.device, plan.names, plan.policies):
        if isinstance(competitor, Absence):
            yield Refusal(case, competitor.name, FORWARD, EAGER, competitor.reason, False)
            continue
        timer = plan.loop_timer if competitor.is_loop else plan.timer
        measured = list(_measure(timer, case, competitor, layers))
        before, clock = clock, read_clock(bench)
        for found in measured:
            if isinstance(found, Refusal):
                yield found
            else:
                found["sm_mhz"] = [before, clock]
                yield make_row(bench, case, competitor.name, FORWARD, layers.work, layers.roof, found)
        timer.free()
        free_competitor(competitor.name)


def _prepare(bench: Bench, case: DecodeCase, inputs: list[DecodeInputs]) -> _Layers:
    tied = tied_share(inputs)
    has_block = why_not_decode("transformers_eager", bench.device) is None
    truths = [find_truth(each, has_block) for each in inputs]
    work = count_decode_work(case, inputs)
    stream_us = bench.roofs.stream_us(work.nbytes)
    facts = {
        "model": case.model,
        "layers": len(inputs),
        "experts_hit": sum(map(count_experts, inputs)) / len(inputs),
        "tied_pct": 100 * tied,
        "tied_pct_of_pool": 100 * sum(each.pool_tied_share for each in inputs) / len(inputs),
    }
    return _Layers(inputs, truths, work, Roof("stream", stream_us, {"stream": stream_us}), facts)


def _measure(timer: Timer, case: DecodeCase, competitor: DecodeCompetitor, layers: _Layers) -> Iterator[Row | Refusal]:
    """What was measured of eager calls, then of a graph that holds them where there is one."""
    calls: list[Call] = []
    attempt = partial(measure_or_refuse, case, competitor.name, FORWARD, is_ours=competitor.is_ours)
    eager = attempt(EAGER, measure=partial(_measure_eager, timer, case, competitor, layers, calls))
    yield eager
    if isinstance(eager, dict) and isinstance(timer, CudaTimer) and not competitor.is_loop:
        yield attempt(GRAPH, measure=partial(_measure_graph, timer, case, competitor, layers, calls))


def _measure_eager(
    timer: Timer, case: DecodeCase, competitor: DecodeCompetitor, layers: _Layers, calls: list[Call]
) -> Row:
    """The fields that eager calls give, after every layer's output has passed the check. Leaves the calls."""
    calls += [competitor.bind(each) for each in layers.inputs]
    error, difference = check_decode(case, competitor, layers.inputs, calls, layers.truths)

    def call_all() -> None:
        for call in calls:
            call()

    warm_up_calls = timer.warm_up(call_all)
    times = timer.time_eager(call_all, idle_start=True)
    extra_nbytes = peak_nbytes(calls[0], layers.inputs[0].tokens.device) - result_nbytes(calls[0]())
    return {
        "times": [time / len(calls) for time in times],
        "warm_up_calls": warm_up_calls,
        "peak_mib": max(0.0, extra_nbytes / 2**20),
        "launches": count_launches(calls[0]) if isinstance(timer, CudaTimer) else None,
        "error": error,
        "difference_from_transformers": difference,
        **_facts(competitor, layers),
    }


def _measure_graph(
    timer: CudaTimer, case: DecodeCase, competitor: DecodeCompetitor, layers: _Layers, calls: Sequence[Call]
) -> Row:
    """The fields that a replayed graph gives, after what it left has been compared with a plain call's output."""
    replayed = timer.time_graph([partial(_same, call) for call in calls])
    worst_error(("replayed output",), (replayed.result,), (calls[0](),), REPLAY_BOUND[case.dtype])
    return {
        **graph_fields(replayed),
        "difference_from_transformers": None,
        **_facts(competitor, layers),
    }


def _facts(competitor: DecodeCompetitor, layers: _Layers) -> dict[str, Any]:
    return {"policy": competitor.policy, **layers.facts}


def _same(call: Call) -> Call:
    return call
