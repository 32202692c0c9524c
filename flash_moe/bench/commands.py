"""The commands ``bench``, ``plot`` and ``tune``: options in, rows, pictures and launch tables out."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from flash_moe.bench import decode_competitors
from flash_moe.bench.cases import ROUTINGS, SETS
from flash_moe.bench.competitors import NAMES
from flash_moe.bench.decode_cases import FORMATS
from flash_moe.bench.machine import describe_machine
from flash_moe.bench.rows import OPS, Refusal, Request, Row, clock_moved
from flash_moe.bench.run import run_bench
from flash_moe.bench.timing import CudaTimer
from flash_moe.bench.tune import TUNABLES, describe, find_jobs, tune_kernel, write_table
from flash_moe.ops._triton.launch import FOLDER, table_name
from flash_moe.schedule.policies import POLICIES

RESULTS = Path("benchmarks", "results")
ANCHORS = Path("benchmarks", "anchors.json")
# Rows for the pictures alone.
SWEEP = RESULTS / "sweep"
# Not beside the rows that the documents show: every run adds to these.
RUNS = RESULTS / "bench"
BACKENDS = tuple(dict.fromkeys((*NAMES, *decode_competitors.NAMES)))
COLUMNS = (
    ("op", 12), ("case", 36), ("dtype", 8), ("pass", 16), ("backend", 23), ("p50 us", 10), ("p20", 10), ("p80", 10),
    ("TB/s", 6), ("TFLOP/s", 7), ("of roof", 12), ("MiB", 8), ("launches", 8),
)  # fmt: skip


def bench(
    ops: Annotated[list[str], typer.Argument(help=f"{', '.join(OPS)} or all.")],
    case: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(SETS)}, or sizes such as 4096x128x64; of decode qwen3-30b-a3b:T1,8."),
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help=f"May be repeated: {', '.join(BACKENDS)}.")] = None,
    pass_: Annotated[list[str] | None, typer.Option("--pass", help="fwd or bwd; by default both.")] = None,
    routing: Annotated[str | None, typer.Option(help=f"Of the experts' ids: {', '.join(ROUTINGS)}.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"File to append to; by default one in {RUNS}.")] = None,
    seconds: Annotated[float, typer.Option(help="Of measuring, for each row.")] = 0.4,
    commit: Annotated[str | None, typer.Option(help="Of the code; by default what git says.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Of decode, by default all: auto, {', '.join(POLICIES)}.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of decode; may be repeated: {', '.join(FORMATS)}.")] = None,
) -> None:
    """Check and time the ops and the layer beside PyTorch, and append a row for each to a file."""
    request = Request(
        ops, case, tuple(backend or ()), tuple(pass_ or ()), routing, seconds, commit, tuple(policy or ()),
        tuple(dtype or ()),
    )  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    path = out or default_path()
    refusals = []
    count = 0
    ties: str | None = None
    for found in run_bench(request):
        if isinstance(found, Refusal):
            refusals.append(found)
            console.print(describe_refusal(found), style="red" if found.is_failure else "yellow", markup=False)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        if count == 0:
            console.print(describe_run(found), markup=False)
            console.print(format_line([name for name, _ in COLUMNS]), style="bold", markup=False)
        count += 1
        told, ties = ties, describe_ties(found)
        if ties and ties != told:
            console.print(ties, markup=False)
        console.print(format_row(found), markup=False)
        if clock_moved(found):
            before, after = found["sm_mhz"]
            console.print(f"  the SM clock moved from {before} to {after} MHz meanwhile", style="yellow", markup=False)
    console.print(f"{count} rows appended to {path}", markup=False)
    if failures := [each for each in refusals if each.is_failure]:
        console.print(f"{len(failures)} rows refused:", style="red", markup=False)
        for each in failures:
            console.print(describe_refusal(each), style="red", markup=False)
        raise typer.Exit(1)


def plot(
    files: Annotated[list[Path] | None, typer.Argument(help=f"Rows; by default all under {RESULTS}.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = RESULTS / "plots",
) -> None:
    """Draw time against T and against E, and shares of the roof, from the rows that flash-moe bench wrote.

    Of decode also launches, beside the goals and engines of benchmarks/anchors.json.
    """
    from flash_moe.bench.plot import draw_all, read_rows

    # Of rows that measure the same thing the last counts: those of the documents before those of the sweep.
    chosen = files or [path for folder in (SWEEP, RESULTS, RUNS) for path in sorted(folder.glob("*.jsonl"))]
    rows = read_rows(chosen)
    if not rows:
        raise ValueError(
            f"files: expected rows of flash-moe bench in {', '.join(map(str, chosen)) or RESULTS}; got none"
        )
    console = Console(highlight=False, soft_wrap=True)
    anchors = json.loads(ANCHORS.read_text(encoding="utf-8")) if ANCHORS.exists() else None
    for path in draw_all(rows, out, anchors):
        console.print(f"drew {path}", markup=False)


def tune(
    kernels: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(TUNABLES)}; by default all.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Sizes of the kernel's op, such as 4096x128x64; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Table to add to; by default this GPU's, in the package.")] = None,
    seconds: Annotated[float, typer.Option(help="Of measuring, for each config.")] = 0.05,
    commit: Annotated[str | None, typer.Option(help="Of the code; by default what git says.")] = None,
) -> None:
    """Find the fastest launch config of each kernel on this GPU, and write the table that the kernels ship with."""
    jobs = find_jobs(kernels or (), case or ())
    if not 0 < seconds <= 60:
        raise ValueError(f"seconds: expected a number above 0, at most 60; got {seconds}")
    if not torch.cuda.is_available():
        raise ValueError("tune: expected a CUDA GPU to time the kernels on; got none")
    device = torch.device("cuda", torch.cuda.current_device())
    fields = describe_machine(device, commit)
    path = out or FOLDER / f"{table_name(fields['gpu'])}.json"
    console = Console(highlight=False, soft_wrap=True)
    timer = CudaTimer(device, seconds)
    for kernel, sizes in jobs:
        found = tune_kernel(kernel, sizes, torch.bfloat16, device, timer)
        if found is None:
            console.print(f"{kernel} {'x'.join(map(str, sizes))}: not launched at this case", markup=False)
            continue
        write_table(path, [found], fields)
        console.print(describe(found), markup=False)
        for config, reason in found.refused:
            console.print(f"  refused: {dict(config)}: {reason}", style="yellow", markup=False)
        console.print(f"  in {path}", markup=False)


def default_path() -> Path:
    """A file for this device."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "cpu"
    return RUNS / f"{table_name(device)}.jsonl"


def describe_run(row: Row) -> str:
    where = f"{row['gpu']}, driver {row['driver']}" if row.get("gpu") else f"{row['cpu']}, {row['threads']} threads"
    copy = f"device copy {row['copy_gb_per_s'] / 1e3:.2f} TB/s"
    return f"{where}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}, {copy}"


def describe_ties(row: Row) -> str | None:
    """Of a case of decode, how many rows have a choice of experts that is nobody's to decide; the same at each row."""
    if row.get("tied_pct") is None:
        return None
    case = f"{row['model']}, T {row['sizes']['T']}, {row['dtype']}"
    return f"{case}: {row['tied_pct']:.1f} % of the rows tie, of all to draw from {row['tied_pct_of_pool']:.1f} %"


def describe_refusal(refusal: Refusal) -> str:
    word = "FAILED" if refusal.is_failure else "left out"
    case = refusal.case
    what = f"{case.op} {case.describe()}, {case.dtype_name}, {refusal.which}, {refusal.backend}, {refusal.launch}"
    return f"{word}: {what}: {refusal.reason}"


def format_row(row: Row) -> str:
    p20, p50, p80 = (f"{time:,.1f}" for time in row["time_us"])
    tflops = "" if row["tflops"] is None else f"{row['tflops']:.3g}"
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.1f}"
    launches = "" if row["launches"] is None else str(row["launches"])
    share = f"{row['roof_pct']:.0f} % {row['roof']}"
    speed = f"{row['gb_per_s'] / 1e3:.3g}"
    details = [row["routing"] or "", row["launch"] if row["launch"] == "graph" else ""]
    case = " ".join(["x".join(map(str, row["sizes"].values())), *details]).strip()
    what = [row["op"], case, row["dtype"], row["pass"], row["backend"]]
    return format_line([*what, p50, p20, p80, speed, tflops, share, peak, launches])


def format_line(cells: list[str]) -> str:
    """Cells in columns of fixed width: a row is printed before the next is known."""
    left = 5
    padded = [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, (_, width)) in enumerate(zip(cells, COLUMNS, strict=True))
    ]
    return " ".join(padded).rstrip()
