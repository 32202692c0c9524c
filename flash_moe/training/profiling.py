"""One training step under PyTorch's profiler: which part of the model takes how much of the device's time.

A kernel belongs to the part of the model whose forward launched it, or whose forward made the node of autograd that
launched it: both have the same sequence number in the profiler's trace.
"""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from flash_moe.modules.flash_moe import FlashMoE
from flash_moe.training.model import Attention

# What is inside another part counts there, attention's own norms say.
PARTS: dict[type[nn.Module], str] = {FlashMoE: "FlashMoE layers", Attention: "attention", nn.RMSNorm: "norms"}
CLIPPING = "gradient clipping"
OPTIMIZER = "optimizer"
REST = "embedding, output, loss and sums"
SHOWN_KERNELS = 20
NAME_LENGTH = 80  # templates have names of a thousand letters

Event = dict[str, Any]


@dataclass(frozen=True)
class Item:
    name: str
    ms: float
    """During which at least one of its kernels ran."""
    launches: int


@dataclass
class StepProfile:
    busy_ms: float = 0.0
    """During which the device did anything."""
    span_ms: float = 0.0
    """From the first kernel's start to the last one's end, by a host that the profiler slows down."""
    parts: list[Item] = field(default_factory=list)
    kernels: list[Item] = field(default_factory=list)
    """By part and name, the ``SHOWN_KERNELS`` that take longest."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "StepProfile":
        """The inverse of ``to_json``; further keys are ignored."""
        parts, kernels = ([Item(**item) for item in content[name]] for name in ("parts", "kernels"))
        return cls(content["busy_ms"], content["span_ms"], parts, kernels)


@contextmanager
def profile_step(model: nn.Module) -> Iterator[StepProfile]:
    """Profiles what runs within; the result is filled in at the end. On a CPU its operators stand for kernels."""
    # Above every level that the profiler's library has: it reports each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    result = StepProfile()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _named_parts(model), torch.profiler.profile(activities=activities) as profiler:
        yield result
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    vars(result).update(vars(summarize(events)))


def summarize(events: Sequence[Event]) -> StepProfile:
    """What a Chrome trace of the profiler says; times in it are microseconds."""
    calls = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    work = work or [event for event in calls if event["cat"] == "cpu_op" and not _is_backward(event)]
    if not work:
        return StepProfile()
    part_of = _parts_of_calls(calls)
    by_part, by_name = defaultdict(list), defaultdict(list)
    for event in work:
        part = part_of.get(event.get("args", {}).get("External id"), REST)
        by_part[part].append(event)
        by_name[f"{part}: {event['name'][:NAME_LENGTH]}"].append(event)
    kernels = sorted(_items(by_name), key=lambda item: -item.ms)
    return StepProfile(
        busy_ms=_busy_ms(work),
        span_ms=(max(map(_end, work)) - min(event["ts"] for event in work)) / 1e3,
        parts=sorted(_items(by_part), key=lambda item: -item.ms),
        kernels=kernels[:SHOWN_KERNELS],
    )


def describe(profile: StepProfile, num_layers: int) -> Table:
    """Parts, then kernels, with their shares of the device's busy time."""
    table = Table(
        title=f"One step: the device is busy for {profile.busy_ms:.2f} ms; "
        f"a FlashMoE layer takes {_ms_of(profile, PARTS[FlashMoE]) / num_layers:.3f} ms of it",
        title_justify="left",
    )
    for name, justify in (("part or kernel", "left"), ("ms", "right"), ("of the step", "right"), ("launches", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type] # a literal, to mypy a str
    for items in (profile.parts, profile.kernels):
        for item in items:
            share = 100 * item.ms / profile.busy_ms
            table.add_row(item.name, f"{item.ms:.3f}", f"{share:.1f} %", str(item.launches))
        table.add_section()
    return table


def write_text(table: Table, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)


def _parts_of_calls(calls: Sequence[Event]) -> dict[int, str]:
    """The part of each call by its external id; a call of a backward belongs where its node's forward belongs."""
    part_of: dict[int, str] = {}
    part_of_node: dict[int, str] = {}
    node_of: dict[int, int] = {}
    for call, enclosing in _nested(calls):
        stack, args = [*enclosing, call], call["args"]
        node = next((each["args"].get("Sequence number") for each in stack if _is_backward(each)), None)
        if node is not None:
            node_of[args["External id"]] = node
            continue
        part = next((name for name in map(_part_name, stack) if name is not None), REST)
        part_of[args["External id"]] = part
        if "Sequence number" in args:
            # Calls carry the number of the next node to be made: the last of them to begin made it.
            part_of_node[args["Sequence number"]] = part
    return part_of | {call: part_of_node.get(node, REST) for call, node in node_of.items()}


def _nested(calls: Sequence[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Each call with those that enclose it on its thread, the outermost first."""
    by_thread = defaultdict(list)
    for call in calls:
        by_thread[call["tid"]].append(call)
    for thread in by_thread.values():
        stack: list[Event] = []
        for call in sorted(thread, key=lambda call: (call["ts"], -call["dur"])):
            while stack and _end(stack[-1]) <= call["ts"]:
                stack.pop()
            yield call, stack
            stack.append(call)


def _part_name(call: Event) -> str | None:
    if call["cat"] != "user_annotation":
        return None
    if call["name"].startswith("Optimizer."):
        return OPTIMIZER
    return call["name"] if call["name"] in (*PARTS.values(), CLIPPING) else None


def _is_backward(call: Event) -> bool:
    return str(call["name"]).startswith("autograd::engine::evaluate_function")


def _items(groups: dict[str, list[Event]]) -> list[Item]:
    return [Item(name, round(_busy_ms(events), 4), len(events)) for name, events in groups.items()]


def _busy_ms(events: Sequence[Event]) -> float:
    """Time during which at least one of the events runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        total += max(0.0, _end(event) - max(until, event["ts"]))
        until = max(until, _end(event))
    return total / 1e3


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def _ms_of(profile: StepProfile, part: str) -> float:
    return sum(item.ms for item in profile.parts if item.name == part)


@contextmanager
def _named_parts(model: nn.Module) -> Iterator[None]:
    """While within, the forward of every module in ``PARTS`` is a range of that name in the profiler's trace."""
    open_ranges: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        open_ranges.append(torch.profiler.record_function(PARTS[type(module)]))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for module in model.modules():
            if type(module) in PARTS:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
