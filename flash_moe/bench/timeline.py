"""A picture of a trace: programs down, time across, a colour for each kind of task, idle time white."""

from pathlib import Path

from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from flash_moe.schedule.trace import TaskSpan, Trace

COLORS = {
    "route": "C1", "select": "C3", "gate_up": "C0", "down": "C2", "combine": "C4", "dispatch": "0.3",
}  # fmt: skip


# Inches of a program, and of all of them at most, where many of them would have fewer than this many pixels.
PROGRAM_INCHES, MOST_INCHES, MIN_PIXELS, DPI = 0.16, 8.0, 6, 150


def draw_timeline(trace: Trace, path: Path) -> None:
    """Write ``trace`` as a PNG; as high as its programs need."""
    programs = max(1, trace.num_programs)
    inches = max(min(MOST_INCHES, PROGRAM_INCHES * programs), MIN_PIXELS / DPI * programs)
    height = 0.9 if inches >= PROGRAM_INCHES * programs else 1.0  # a gap of less than a pixel would come and go
    figure = Figure(figsize=(11, 1.6 + inches), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(span.kind for span in trace.tasks):
        boxes = [_box(span, height) for span in trace.tasks if span.kind == kind]
        # Whole pixels: blurred edges would fill what a program of a few pixels leaves white.
        axes.add_collection(PolyCollection(boxes, facecolor=COLORS.get(kind, "0.6"), label=kind, antialiased=False))
    sizes = ", ".join(f"{name} {size}" for name, size in trace.sizes.items())
    axes.set_title(f"{trace.policy}; {sizes}; idle {trace.idle_share:.0%}", fontsize="medium")
    axes.set(xlabel=f"{trace.clock} time, us", ylabel="program", xlim=(0, trace.end_ns / 1e3 or 1))
    axes.set_ylim(programs - 0.5, -0.5)
    if trace.tasks:
        figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=DPI, format="png")


def _box(span: TaskSpan, height: float) -> list[tuple[float, float]]:
    left, right = span.start_ns / 1e3, span.end_ns / 1e3
    top, bottom = span.program - height / 2, span.program + height / 2
    return [(left, top), (right, top), (right, bottom), (left, bottom)]
