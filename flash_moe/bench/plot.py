"""Pictures drawn from rows alone: time against T and against E, and each row's share of its roof.

Beside rows of decode stand the goals and the serving engines' times and launches of ``benchmarks/anchors.json``.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flash_moe.bench.cases import DECODE, OP_NAMES
from flash_moe.bench.competitors import DENSE_MLP, SPARSE_GRAD

Row = dict[str, Any]

COLORS = {
    "triton": "C0", "torch": "C2", "reference": "C3", "pytorch_smart": "C1", "torch_compile": "C4", "liger": "C5",
    "triton_static": "navy", "triton_queue": "C9", "triton_actor": "C6", "torch_static": "C2", "torch_queue": "olive",
    "torch_actor": "darkgreen", "transformers_eager": "C3", "transformers_batched_mm": "C1",
    "transformers_grouped_mm": "C8", "vllm": "C5", "sglang": "C7", "dense_mlp": "C9", "triton_sparse_grad": "navy",
}  # fmt: skip
LABELS = {
    "reference": "PyTorch", "pytorch_smart": "PyTorch, with care", "torch_compile": "torch.compile", "vllm": "vLLM",
    "sglang": "SGLang", "dense_mlp": "dense MLP, same arithmetic", "triton_sparse_grad": "triton, sparse_grad",
    **{f"triton_{policy}": f"ours, {policy}" for policy in ("static", "queue", "actor")},
    **{f"transformers_{name}": f"transformers, {name}" for name in ("eager", "batched_mm", "grouped_mm")},
}  # fmt: skip
# Of engines, which have no backend of ours.
PEER_STYLES = ("^", "v", "s", "D")
# The size along the horizontal axis; the router has N where the others have E.
AXES = {"T": ("T",), "E": ("E", "N")}


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The bench rows of the files, of those that measure the same thing the last; other rows are passed over."""
    rows: dict[object, Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"files: {path}, line {number} is not JSON: {error}") from None
            if "roof_us" in row:
                rows[(_device(row), row["op"], row["case"], row["dtype"], row["pass"], row["backend"])] = row
    return list(rows.values())


def draw_all(rows: Sequence[Row], folder: Path, anchors: Row | None = None) -> list[Path]:
    """Every picture that the rows give, one file for each op and device; returns the files.

    ``anchors`` are those of ``benchmarks/anchors.json``, and count beside rows of their own GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for device, op in dict.fromkeys((_device(row), row["op"]) for row in rows):
        chosen = [row for row in rows if (_device(row), row["op"]) == (device, op)]
        if op == OP_NAMES[DECODE]:
            known = anchors[DECODE] if anchors and anchors["gpu"] == device else []
            figures: dict[str, Figure | None] = {
                "time_T": draw_decode_times(chosen, known),
                "launches": draw_launches(chosen, known),
            }
        else:
            figures = {f"time_{axis}": draw_times(chosen, axis) for axis in AXES}
            figures["roof"] = draw_shares(chosen)
        for name, figure in figures.items():
            if figure is not None:
                figure.suptitle(f"{op}, {device}")
                path = folder / f"{_slug(op)}_{_slug(device)}_{name}.png"
                figure.savefig(path, dpi=110, format="png")
                drawn.append(path)
    return drawn


def draw_times(rows: Sequence[Row], axis: str) -> Figure | None:
    """One plot for each set of rows that differ in ``axis`` alone; None where there is no such set."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if not set(AXES[axis]) & set(row["sizes"]):
            continue
        others = tuple(size for size in row["sizes"].items() if size[0] not in AXES[axis])
        groups.setdefault((row["pass"], row["dtype"], row["routing"] or "", others), []).append(row)
    groups = {key: group for key, group in groups.items() if len({_along(row, axis) for row in group}) > 1}
    if not groups:
        return None
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, group in zip(grid.flat, groups.values(), strict=False):
        _draw_group(axes, group, axis)
    return figure


def draw_shares(rows: Sequence[Row]) -> Figure:
    """A bar for each row, its length the share of the roof that was measured beside it."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    longest = max(len([row for row in rows if row["pass"] == which]) for which in passes)
    figure = Figure(figsize=(8 * len(passes), 1.4 + 0.22 * longest), layout="constrained")
    for axes, which in zip(figure.subplots(1, len(passes), squeeze=False).flat, passes, strict=True):
        chosen = [row for row in rows if row["pass"] == which]
        chosen.sort(key=lambda row: (row["dtype"], list(row["sizes"].values()), row["case"]))
        shares = [row["roof_pct"] for row in chosen]
        axes.barh(range(len(chosen)), shares, color=[COLORS.get(row["backend"], "0.5") for row in chosen])
        axes.set_yticks(range(len(chosen)), [_describe(row) for row in chosen], fontsize=6)
        for i, share in enumerate(shares):
            axes.text(share, i, f" {share:.0f} %", va="center", fontsize=6)
        axes.axvline(100, color="black", lw=1, ls="--")
        axes.set_xlim(0, 1.12 * max(100, *shares))
        axes.set(title=_words(which), xlabel="share of the roof, %")
        axes.invert_yaxis()
    return figure


def draw_decode_times(rows: Sequence[Row], anchors: Sequence[Row] = ()) -> Figure:
    """A plot for each dtype and model, and for calls in a graph and eager calls: a line for each backend and policy."""
    known = {(each["model"], each["dtype"]): each for each in anchors}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dtype"], row["launch"]), []).append(row)
    keys = sorted(groups, key=lambda key: (*key[:2], key[2] != "graph"))
    columns = min(2, len(keys))
    figure = Figure(figsize=(6.4 * columns, 5.0 * -(-len(keys) // columns) + 0.4), layout="constrained")
    grid = figure.subplots(-(-len(keys) // columns), columns, squeeze=False)
    for axes in grid.flat[len(keys) :]:
        axes.set_axis_off()
    for axes, key in zip(grid.flat, keys, strict=False):
        _draw_anchors(axes, known.get(key[:2], {}), key[2])
        _draw_lines(axes, groups[key], "T", with_launch=False)
        axes.set_title(f"{key[0]}, {key[1]}, {'CUDA graph' if key[2] == 'graph' else 'eager calls'}", fontsize="small")
        axes.set_xticks(ticks := sorted({row["sizes"]["T"] for row in groups[key]}), list(map(str, ticks)))
        axes.set(ylabel="time of a layer, us")
        axes.minorticks_off()
    return figure


def draw_launches(rows: Sequence[Row], anchors: Sequence[Row] = ()) -> Figure | None:
    """A bar for each backend: what one call of a layer puts on the GPU, for the fewest and the most tokens.

    An engine that needs now more, now fewer has a bar of the most.
    """
    counted = [row for row in rows if row["launches"]]
    if not counted:
        return None
    counts = sorted({row["sizes"]["T"] for row in counted})
    chosen = dict.fromkeys((counts[0], counts[-1]))
    figure = Figure(figsize=(6.4 * len(chosen), 4.2), layout="constrained")
    for axes, T in zip(figure.subplots(1, len(chosen), squeeze=False).flat, chosen, strict=True):
        here = {row["backend"]: row for row in counted if row["sizes"]["T"] == T}
        bars = [(_label(row), str(row["launches"]), COLORS.get(row["backend"], "0.5")) for row in here.values()]
        bars = sorted([*bars, *_engine_bars(anchors, T)], key=lambda bar: _most(bar[1]))
        labels, texts, colors = zip(*bars, strict=True)
        launches = list(map(_most, texts))
        axes.barh(range(len(bars)), launches, color=colors)
        axes.set_yticks(range(len(bars)), labels, fontsize="small")
        for i, (count, text) in enumerate(zip(launches, texts, strict=True)):
            axes.text(count, i, f" {text}", va="center", fontsize="small")
        axes.set(xscale="log", xlim=(0.5, 2.5 * max(launches)), xlabel="launches a layer", title=f"T {T}")
        axes.invert_yaxis()
    return figure


def _engine_bars(anchors: Sequence[Row], T: int) -> list[tuple[str, str, str]]:
    """Label, launches and colour of each serving engine that was measured on T tokens."""
    peers = [peer for each in anchors if T in each["tokens"] for peer in each.get("peers", [])]
    launches = {peer["name"].partition(",")[0]: peer["launches"] for peer in peers}
    return [(_apart(engine), count, "0.7") for engine, count in launches.items()]


def _most(launches: str) -> int:
    """Of a count such as "8", or of several such as "7 – 8"."""
    return max(map(int, re.findall(r"\d+", launches)))


def _apart(name: str) -> str:
    """Of what no row of ours gives, without the way of launching that all of a picture share."""
    return re.sub(r", (CUDA graph|eager)$", "", name) + " (measured apart)"


def _draw_anchors(axes: Axes, anchor: Row, launch: str) -> None:
    """The engines' times and the goal."""
    tokens = anchor.get("tokens", [])
    peers = [peer for peer in anchor.get("peers", []) if peer["launch"] == launch]
    for peer, marker in zip(peers, PEER_STYLES, strict=False):
        axes.plot(tokens, peer["us"], marker=marker, ms=4, lw=0.8, ls="--", color="0.55", label=_apart(peer["name"]))
    if goal := anchor.get("goal_us", {}).get(launch):
        axes.plot(tokens, goal, marker="_", ms=9, lw=0, color="red", label="goal")


def _draw_group(axes: Axes, rows: Sequence[Row], axis: str) -> None:
    _draw_lines(axes, rows, axis)
    letter = _letter(rows[0], axis)
    others = ", ".join(f"{name} {size}" for name, size in rows[0]["sizes"].items() if name != letter)
    routing = rows[0]["routing"]
    title = f"{_words(rows[0]['pass'])}, {others}, {rows[0]['dtype']}" + (f", {routing}" if routing else "")
    axes.set_title(title, fontsize="small")


def _draw_lines(axes: Axes, rows: Sequence[Row], axis: str, with_launch: bool = True) -> None:
    """A line for each backend and way of launching, and one for the roof."""
    for backend, launch in dict.fromkeys((row["backend"], row["launch"]) for row in rows):
        line = [row for row in rows if (row["backend"], row["launch"]) == (backend, launch)]
        line.sort(key=lambda row: _along(row, axis))
        sizes = [_along(row, axis) for row in line]
        p20, p50, p80 = zip(*(row["time_us"] for row in line), strict=True)
        is_dotted = with_launch and launch == "graph"
        label = _label(line[0]) + (", CUDA graph" if is_dotted else "")
        color = COLORS.get(backend, "0.5")
        axes.plot(sizes, p50, marker="o", ms=3, label=label, color=color, ls=":" if is_dotted else "-")
        axes.fill_between(sizes, p20, p80, color=color, alpha=0.2, lw=0)
    # The dense MLP beside a layer has a roof of its own, and so have row-sparse gradients.
    others = (DENSE_MLP, SPARSE_GRAD)
    roof = sorted({_along(row, axis): row["roof_us"] for row in rows if row["backend"] not in others}.items())
    axes.plot([size for size, _ in roof], [time for _, time in roof], color="black", ls="--", lw=1, label="roof")
    axes.set(xscale="log", yscale="log", xlabel=_letter(rows[0], axis), ylabel="time, us")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="x-small")


def _letter(row: Row, axis: str) -> str:
    return next(letter for letter in AXES[axis] if letter in row["sizes"])


def _along(row: Row, axis: str) -> int:
    return int(row["sizes"][_letter(row, axis)])


def _describe(row: Row) -> str:
    return f"{row['case']}, {row['dtype']}, {_label(row)} ({row['roof']})"


def _label(row: Row) -> str:
    if (row["op"], row["backend"]) == (OP_NAMES[DECODE], "triton"):
        return "ours, auto"  # beside those of ours that name their policy
    backend: str = row["backend"]
    return LABELS.get(backend, backend)


def _words(which: str) -> str:
    return which.replace("_", " + ")


def _device(row: Row) -> str:
    return str(row.get("gpu") or row.get("cpu"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
