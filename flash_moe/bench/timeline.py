"""A picture of a trace: programs down, time across, a colour for each kind of task, idle time white."""

from pathlib import Path

from matplotlib.figure import Figure

from flash_moe.schedule.trace import Trace

COLORS = {
    "route": "C1", "select": "C3", "gate_up": "C0", "down": "C2", "combine": "C4", "dispatch": "0.3",
}  # fmt: skip


def draw_timeline(trace: Trace, path: Path) -> None:
    """Write ``trace`` as a PNG; as high as its programs need."""
    figure = Figure(figsize=(11, 1.6 + min(8.0, 0.16 * trace.num_programs)), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(span.kind for span in trace.tasks):
        spans = [span for span in trace.tasks if span.kind == kind]
        axes.barh(
            [span.program for span in spans],
            [(span.end_ns - span.start_ns) / 1e3 for span in spans],
            left=[span.start_ns / 1e3 for span in spans],
            height=0.9, color=COLORS.get(kind, "0.6"), label=kind, linewidth=0,
        )  # fmt: skip
    sizes = ", ".join(f"{name} {size}" for name, size in trace.sizes.items())
    axes.set_title(f"{trace.policy}; {sizes}; idle {trace.idle_share:.0%}", fontsize="medium")
    axes.set(xlabel=f"{trace.clock} time, us", ylabel="program", xlim=(0, trace.end_ns / 1e3 or 1))
    axes.set_ylim(max(1, trace.num_programs) - 0.5, -0.5)
    if trace.tasks:
        figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150, format="png")
