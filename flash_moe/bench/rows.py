"""What a run of the bench is asked for, and what it gives: rows, and refusals where there is none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_moe.bench.cases import DECODE, LETTERS, OP_NAMES, ROUTINGS, Case
from flash_moe.bench.decode_cases import FORMATS
from flash_moe.bench.machine import sm_clock_mhz
from flash_moe.bench.roofs import Roof, Roofs
from flash_moe.bench.timing import CudaTimer, Replayed, Timer, percentiles
from flash_moe.bench.work import Work
from flash_moe.schedule.policies import POLICIES

EAGER, GRAPH = "eager", "graph"
OPS = (*LETTERS, DECODE)
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
    policies: tuple[str, ...] = ()
    """Of decode's schedule; all by default."""
    formats: tuple[str, ...] = ()
    """Of decode: dtypes of weights and tokens, keys of ``decode_cases.FORMATS``; by default one."""

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("op", self.ops, (*OPS, "all")),
            ("pass", self.passes, ("fwd", "bwd")),
            ("routing", [self.routing] if self.routing else [], ROUTINGS),
            ("policy", self.policies, ("auto", *POLICIES)),
            ("dtype", self.formats, tuple(FORMATS)),
        ):
            for value in values:
                if value not in allowed:
                    raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")
        if not self.ops:
            raise ValueError(f"op: expected one or more of {', '.join(OPS)}, or all; got none")
        if not 0 < self.seconds <= 60:
            raise ValueError(f"seconds: expected a number above 0, at most 60; got {self.seconds}")
        if self.routing and not {"expert", "all"} & set(self.ops):
            raise ValueError(f"routing: expected only with expert, whose ids it draws; got {self.routing!r}")
        for name, given in (("policy", self.policies), ("dtype", self.formats)):
            if given and not {DECODE, "all"} & set(self.ops):
                raise ValueError(f"{name}: expected only with {DECODE}; got {', '.join(given)}")

    def has(self, op: str) -> bool:
        return op in self.ops or "all" in self.ops


@dataclass(frozen=True)
class Refusal:
    """A row that there is none of."""

    case: Case
    backend: str
    which: str
    launch: str
    reason: str
    is_failure: bool
    """False where a competitor needs more memory than there is, or where it does not take the case."""


@dataclass
class Bench:
    """What the rows of a run share."""

    device: torch.device
    timer: Timer
    roofs: Roofs
    fields: Row


def measure_or_refuse(
    case: Case, backend: str, which: str, launch: str, is_ours: bool, measure: Callable[[], Row]
) -> Row | Refusal:
    """The fields that ``measure`` gives, or why there are none."""
    try:
        return {"launch": launch, **measure()}
    except torch.OutOfMemoryError:
        return Refusal(case, backend, which, launch, "out of memory", is_ours)
    except NotImplementedError as error:  # embedding_bag's backward on a GPU knows no bfloat16, say
        return Refusal(case, backend, which, launch, str(error), is_ours)
    except Exception as error:
        # Only its text is kept: a traceback would hold on to the tensors.
        reason = f"{type(error).__name__}: {error}".strip()
        return Refusal(case, backend, which, launch, reason, True)


def make_row(bench: Bench, case: Case, backend: str, which: str, work: Work, roof: Roof, found: Row) -> Row:
    times, launch = found.pop("times"), found.pop("launch")
    time_us = percentiles(times)
    text = case.describe() + (", CUDA graph" if launch == GRAPH else "")
    # Experts are counted by the row used, as the caches deliver them; see work.py.
    nbytes = work.row_nbytes or work.nbytes
    return {
        "op": OP_NAMES[case.op],
        "case": text,
        "backend": backend,
        "pass": which,
        "launch": launch,
        "dtype": case.dtype_name,
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


def graph_fields(replayed: Replayed) -> Row:
    """What of a row a replayed graph gives; the rest is known from plain calls."""
    return {
        "times": replayed.times,
        "warm_up_calls": replayed.warm_up_calls,
        "peak_mib": None,
        "launches": None,
        "error": None,
    }


def read_clock(bench: Bench) -> int | None:
    """MHz of the SMs, on a GPU."""
    return sm_clock_mhz(bench.device, bench.timer.flush) if isinstance(bench.timer, CudaTimer) else None


def clock_moved(row: Row) -> bool:
    """Whether the SM clock was another after the measurement than before it."""
    before, after = row["sm_mhz"]
    return bool(before and after) and abs(after - before) > CLOCK_TOLERANCE * before


def result_nbytes(results: object) -> int:
    results = results if isinstance(results, tuple) else (results,)
    tensors = [x for x in results if isinstance(x, Tensor)]
    parts = [part for x in tensors for part in ((x._indices(), x._values()) if x.is_sparse else (x,))]
    return sum(x.numel() * x.element_size() for x in parts)
