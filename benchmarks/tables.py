"""Writes the tables of README.md, README_zh.md and docs/*.md from the rows committed in benchmarks/results/*.jsonl.

Run: python benchmarks/tables.py          rewrites the text between <!-- table: NAME --> and <!-- /table -->
     python benchmarks/tables.py --check  changes nothing and fails where a document is not what the rows give

NAME is one of
    training         the runs of flash-moe train, one line a run
    training history every run on a GPU, those before and those with another backend too
    profile          of the last run on a GPU that has one, what of a step's time goes to which part, and what a layer
                     takes of it beside the same layer alone
    first losses     of the first steps of runs with the same weights and batches, a column a backend
    soak             the last run of benchmarks/soak_decode.py of each layer on each GPU
    loss curve       the picture of the GPU run, where one is committed
    gpu OP, cpu OP   the timings of one op or layer on that kind of device
    gpu flash_decode, cpu flash_decode   likewise by tokens; on a GPU beside its goals and serving engines
    sparse gradients the experts' backward with row-sparse gradients beside the same with dense ones
    anchors OP       published times and goals of router, expert, mlp or layer beside ours, where the rows have them

A timing row has op, case, backend, pass, time_us [p20, p50, p80], torch, commit, date, and gpu or cpu (a name; with
cpu also threads); it may have dtype, gb_per_s, tflops, peak_mib and triton. A training row is the line of kind "result"
at the end of a run's metrics.jsonl, or has preset, steps, seconds, heldout_bits_per_byte, tokens_per_s, params, torch,
commit, date, and gpu or cpu. Of rows that measure the same thing on the same device the last counts. Only the .jsonl
files of the folder itself are read: raw data goes into subfolders. Published times and goals are in anchors.json.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ANCHORS = Path("benchmarks/anchors.json")
LOSS_CURVE = Path("benchmarks/results/train_gpu/loss.png")
FIRST_LOSSES = Path("benchmarks/results/train_gpu/first_losses.jsonl")
SOAKS = Path("benchmarks/results/soak")
TIMING_FIELDS = ("op", "case", "backend", "pass", "time_us", "torch", "commit", "date")
TRAINING_FIELDS = (
    "preset", "steps", "seconds", "heldout_bits_per_byte", "tokens_per_s", "params", "torch", "commit", "date"
)  # fmt: skip
# The ratio column compares with this backend: plain PyTorch, which gathers [T, K, H] and ranks every candidate.
BASELINE = "reference"
# Of ops whose name ends so, tables of 8 bits are compared with those of 16; each case names its error.
QUANTIZED, NOT_QUANTIZED = "_quantized", "bfloat16"
ERROR = re.compile(r", relative error [\d.]+ %")
OURS = "triton"
# A layer as flash-moe train runs it, by benchmarks/layer.py.
TRAINED_LAYER = "triton, autocast"
SPARSE_GRAD = "triton_sparse_grad"
DECODE = "flash_decode"
# As flash-moe bench has it: with more between two readings, the SM clock moved under the measurement.
CLOCK_TOLERANCE, CLOCK_MARK = 0.03, "†"
# A launch and a chain of dependent loads take several microseconds whatever they move, so a call shorter than this is
# bound by latency: what the same bytes take in a stream or a gather, each with a latency of its own, is no roof of it.
LATENCY_BOUND_US = 10.0
# By how much a time that is to be as good as another may be above it: medians of two runs differ by that.
NOISE = 0.03
MARKED = re.compile(r"(?P<open><!-- table: (?P<name>[^>]+?) -->\n)(?P<body>.*?)(?P<close><!-- /table -->)", re.DOTALL)

Row = dict[str, Any]

WORDS = {
    "en": {
        "none": "No row is committed yet.",
        "stop": ".",
        "preset": "run", "device": "device", "params": "parameters", "steps": "steps", "tokens_per_s": "tokens/s",
        "seconds": "time", "heldout": "held-out bits per byte",
        "case": "case", "pass": "pass", "backend": "backend", "time": "time, ms (p20 to p80)", "ratio": "speed-up",
        "gb_per_s": "TB/s", "tflops": "TFLOP/s", "peak_mib": "peak MiB", "commit": "commit", "threads": "threads",
        "loss curve": "Loss of the GPU run: bits per byte over training steps",
        "part": "part", "ms": "GPU, ms", "step_share": "of the step", "launches": "launches", "all": "all",
        "a layer": "A FlashMoE layer takes {here:.2f} ms, and {alone:.2f} ms alone in a graph: {ratio:.2f} times that",
        "step": "step", "loss of": "loss, {backend}",
        "published": "published FlashMoE, ms", "pytorch": "best PyTorch, ms", "ours": "ours, ms",
        "graph": "ours in a CUDA graph, ms", "roof": "roof, ms", "share": "of the roof", "goal": "goal, ms",
        "holds": "goal holds", "yes": "yes", "no": "no",
        "repaired": "repaired", "broken": "does not compile; repaired", "refuses": "refuses K > N",
        "eager": "not in a graph; eager", "incomplete": "part of the output missing; repaired",
        "uniform": "as fast as uniform", "float32": "as fast as float32", "gathering": "× as fast as gathering",
        "clock": "the SM clock moved by more than 3 % between the readings before and after",
        "latency": "A time under 10 us is bound by latency and has no share of the roof",
        "peers": "as fast as torch.compile and cuBLAS",
        "anchors": "Published and PyTorch times",
        "implementation": "us a layer, T =", "experts hit": "distinct experts hit",
        "floor": "floor: the same bytes read once", "goal line": "goal", "in graph": "CUDA graph", "in eager": "eager",
        "decode note": "In brackets the share of the floor; bold where a goal holds",
        "decode anchors": "Engines' times",
        "layer": "layer", "calls": "calls", "wrong_rows": "wrong rows", "flags": "waits given up",
    },
    "zh": {
        "none": "尚未提交任何数据。",
        "stop": "。",
        "preset": "训练", "device": "设备", "params": "参数量", "steps": "步数", "tokens_per_s": "词元/秒",
        "seconds": "用时", "heldout": "留出文本的每字节比特数",
        "case": "规模", "pass": "阶段", "backend": "后端", "time": "耗时，毫秒（p20 至 p80）", "ratio": "加速比",
        "gb_per_s": "TB/s", "tflops": "TFLOP/s", "peak_mib": "峰值 MiB", "commit": "提交", "threads": "线程",
        "loss curve": "GPU 训练的损失曲线：每字节比特数随步数的变化",
        "part": "部分", "ms": "GPU，毫秒", "step_share": "占一步", "launches": "启动次数", "all": "合计",
        "a layer": "每个 FlashMoE 层占一步的 {here:.2f} 毫秒，单独在 CUDA graph 中为 {alone:.2f} 毫秒：{ratio:.2f} 倍",
        "step": "步", "loss of": "损失，{backend}",
        "published": "已发布的 FlashMoE，毫秒", "pytorch": "最快的 PyTorch，毫秒", "ours": "本库，毫秒",
        "graph": "本库（CUDA graph），毫秒", "roof": "上限，毫秒", "share": "占上限", "goal": "目标，毫秒",
        "holds": "达到目标", "yes": "是", "no": "否",
        "repaired": "修复后", "broken": "无法编译；修复后", "refuses": "拒绝 K > N",
        "eager": "无法捕获；eager", "incomplete": "部分输出缺失；修复后",
        "uniform": "与均匀路由一样快", "float32": "与 float32 一样快", "gathering": "× 快于逐行读取",
        "clock": "测量前后读到的 SM 时钟相差超过 3 %",
        "latency": "耗时低于 10 us 的受延迟限制，不列占上限的比例",
        "peers": "不慢于 torch.compile 与 cuBLAS",
        "anchors": "已发布的与 PyTorch 的耗时",
        "implementation": "每层微秒，T =", "experts hit": "命中的不同专家数",
        "floor": "下限：同样字节读一次", "goal line": "目标", "in graph": "CUDA graph", "in eager": "eager",
        "decode note": "括号内为占下限的比例；粗体表示达到目标",
        "decode anchors": "推理引擎的耗时",
        "layer": "层", "calls": "调用次数", "wrong_rows": "错误行数", "flags": "放弃的等待",
    },
}  # fmt: skip
PASSES = {
    "forward": {"en": "forward", "zh": "前向"},
    "backward": {"en": "backward", "zh": "反向"},
    "forward_backward": {"en": "forward + backward", "zh": "前向 + 反向"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a document is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    stale = False
    for path, text in render_documents(args.root).items():
        if text == path.read_text(encoding="utf-8"):
            continue
        stale = True
        if args.check:
            print(f"{path.relative_to(args.root)} is stale: run python benchmarks/tables.py")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"rewrote {path.relative_to(args.root)}")
    return int(args.check and stale)


def render_documents(root: Path) -> dict[Path, str]:
    """Every document with tables, as it should read. Raises ``ValueError`` at a row that no document shows."""
    rows = read_rows(root / "benchmarks" / "results")
    texts = {path: path.read_text(encoding="utf-8") for path in find_documents(root)}
    shown = {match["name"] for text in texts.values() for match in MARKED.finditer(text)}
    for row in rows:
        if table_of(row) not in shown:
            raise ValueError(f"expected a document with <!-- table: {table_of(row)} -->, for the row {row}; found none")
    return {path: render_text(text, rows, root, path) for path, text in texts.items() if MARKED.search(text)}


def find_documents(root: Path) -> list[Path]:
    return sorted([*root.glob("README*.md"), *(root / "docs").glob("*.md")])


def read_rows(folder: Path) -> list[Row]:
    """The rows of every .jsonl file in the folder, checked. Raises ``ValueError`` with the file and line."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if row.get("kind") == "result":
                    row = training_row(row)
                check_row(row)
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
            rows.append(row)
    return rows


def training_row(result: Row) -> Row:
    """A row for the table from the last line of a run's metrics.jsonl; preset or commit may have been added to it."""
    model = result["train"]["model"]
    sizes = f"L {model['num_layers']}, H {model['hidden_size']}, E {model['num_experts']}, "
    backend = model.get("backend", "auto")
    row = {
        "preset": f"{sizes}K {model['num_experts_per_tok']}" + ("" if backend == "auto" else f", {backend}"),
        "backend": backend,
        "commit": next(iter(re.findall(r"commit ([^)]+)", result["flash_moe"])), None),
        "steps": result["step"],
        "seconds": result["train_seconds"],
        "params": result["parameters"],
    }
    where, *details = result["device"].split(", ")
    if any("compute capability" in detail for detail in details):
        row["gpu"] = where
    else:
        row["cpu"] = where
        row["threads"] = next((int(detail.split()[0]) for detail in details if "threads" in detail), None)
    return {**row, **result}


def check_row(row: Row) -> None:
    fields = TRAINING_FIELDS if "preset" in row else TIMING_FIELDS
    if missing := [field for field in fields if row.get(field) is None]:
        raise ValueError(f"expected the fields {', '.join(fields)}; {', '.join(missing)} missing")
    if bool(row.get("gpu")) == bool(row.get("cpu")):
        raise ValueError("expected the name of the device in gpu or in cpu, and the other empty or absent")
    if "preset" in row:
        return
    if row["pass"] not in PASSES:
        raise ValueError(f"expected pass to be one of {', '.join(PASSES)}; got {row['pass']!r}")
    times = row["time_us"]
    if len(times) != 3 or not 0 < times[0] <= times[1] <= times[2]:
        raise ValueError(f"expected time_us to be [p20, p50, p80]; got {times}")


def table_of(row: Row) -> str:
    if "preset" in row:
        return "training"
    return f"{'gpu' if row.get('gpu') else 'cpu'} {row['op']}"


def render_text(text: str, rows: Sequence[Row], root: Path, path: Path) -> str:
    language = "zh" if path.stem.endswith("_zh") else "en"

    def fill(match: re.Match[str]) -> str:
        return match["open"] + render_table(match["name"], rows, language, root, path) + match["close"]

    return MARKED.sub(fill, text)


def render_table(name: str, rows: Sequence[Row], language: str, root: Path, path: Path) -> str:
    words = WORDS[language]
    if name == "loss curve":
        if not (root / LOSS_CURVE).exists():
            return words["none"] + "\n"
        up = "../" * len(path.relative_to(root).parent.parts)
        return f"![{words['loss curve']}]({up}{LOSS_CURVE.as_posix()})\n"
    if name == "soak":
        return soak_table(root / SOAKS, words)
    if name == "training history":
        return history_table([row for row in rows if table_of(row) == "training" and row.get("gpu")], words)
    if name == "profile":
        return profile_table([row for row in rows if row.get("profile") and row.get("gpu")][-1:], rows, words)
    if name == "first losses":
        return first_losses_table(root / FIRST_LOSSES, words)
    if name == "sparse gradients":
        return sparse_gradients_tables(rows, words, language)
    if name.startswith("anchors "):
        return anchors_table(name.removeprefix("anchors "), rows, words, language, root)
    if name != "training" and not re.fullmatch(r"(gpu|cpu) \w+(: .+)?", name):
        expected = (
            "training, training history, profile, first losses, loss curve, soak, sparse gradients, gpu OP, cpu OP or "
            "anchors OP"
        )
        raise ValueError(f"{path.name}: expected the table {expected}; got {name!r}")
    table, _, sizes = name.partition(": ")  # "gpu FlashMoE: T 4096" is the cases that begin so
    chosen = [row for row in rows if table_of(row) == table and (not sizes or row["case"].startswith(f"{sizes}, "))]
    if op_of(table) == DECODE:
        return decode_tables(chosen, table.startswith("gpu"), words, root)
    if not chosen:
        return words["none"] + "\n"
    return training_table(chosen, words) if name == "training" else timing_tables(chosen, words, language)


def training_table(rows: Sequence[Row], words: dict[str, str]) -> str:
    """The last of our runs of each kind: other backends are for the history."""
    ours = [row for row in rows if row.get("backend", "auto") == "auto"]
    last = last_of(ours, lambda row: (row["preset"], device(row, words)))
    return runs_table(last, words, []) + caption(last, words)


def history_table(rows: Sequence[Row], words: dict[str, str]) -> str:
    return runs_table(rows, words, ["commit"]) if rows else words["none"] + "\n"


def runs_table(rows: Sequence[Row], words: dict[str, str], more: list[str]) -> str:
    keys = ("preset", "device", *more, "params", "steps", "tokens_per_s", "seconds", "heldout")
    lines = [
        [
            row["preset"],
            device(row, words),
            *(short(row[key]) for key in more),
            f"{row['params'] / 1e6:,.1f} M",
            f"{row['steps']:,}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['seconds']:,.0f} s",
            f"{row['heldout_bits_per_byte']:.3f}",
        ]
        for row in rows
    ]
    return markdown([words[key] for key in keys], lines, left=2 + len(more))


def profile_table(run: Sequence[Row], rows: Sequence[Row], words: dict[str, str]) -> str:
    if not run:
        return words["none"] + "\n"
    profile = run[0]["profile"]
    items = [*profile["parts"], {"name": words["all"], "ms": profile["busy_ms"], "launches": ""}]
    lines = [
        [item["name"], f"{item['ms']:.2f}", f"{100 * item['ms'] / profile['busy_ms']:.1f} %", str(item["launches"])]
        for item in items
    ]
    header = [words[key] for key in ("part", "ms", "step_share", "launches")]
    beside = layer_beside_itself(run[0], rows)
    note = f"\n{words['a layer'].format(**beside)}{words['stop']}\n" if beside else ""
    return markdown(header, lines, left=1) + note + caption(run, words)


def layer_beside_itself(run: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds of a FlashMoE layer, forward and backward, in the profiled step and alone at the same sizes.

    Empty where it was not measured alone.
    """
    train, model = run["train"], run["train"]["model"]
    T = train["batch_size"] * model["context_length"]
    sizes = f"T {T}, H {model['hidden_size']}, I {model['intermediate_size']}, E {model['num_experts']}, "
    name = f"{sizes}K {model['num_experts_per_tok']}, CUDA graph"
    wanted = ("FlashMoE", name, TRAINED_LAYER, "forward_backward", run["gpu"])
    alone = [row for row in rows if tuple(row.get(key) for key in ("op", "case", "backend", "pass", "gpu")) == wanted]
    if not alone:
        return {}
    parts = [part["ms"] for part in run["profile"]["parts"] if part["name"] == "FlashMoE layers"]
    here, alone_ms = sum(parts) / model["num_layers"], alone[-1]["time_us"][1] / 1000
    return {"here": here, "alone": alone_ms, "ratio": here / alone_ms}


def first_losses_table(path: Path, words: dict[str, str]) -> str:
    if not path.exists():
        return words["none"] + "\n"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    losses = {(row["step"], row["backend"]): f"{row['loss']:.4f}" for row in rows}
    lines = [
        [str(step), *(losses.get((step, backend), "") for backend in backends)]
        for step in sorted({at for at, _ in losses})
    ]
    header = [words["step"], *(words["loss of"].format(backend=backend) for backend in backends)]
    return markdown(header, lines, left=0) + caption(rows, words)


def sparse_gradients_tables(rows: Sequence[Row], words: dict[str, str], language: str) -> str:
    pairs = [row for row in rows if row.get("gpu") and row.get("backend") in (OURS, SPARSE_GRAD)]
    sparse = {measured(row) for row in pairs if row["backend"] == SPARSE_GRAD}
    chosen = [row for row in pairs if "op" in row and measured(row) in sparse]
    return timing_tables(chosen, words, language) if chosen else words["none"] + "\n"


def timing_tables(rows: Sequence[Row], words: dict[str, str], language: str) -> str:
    """One table for each device and set of versions, each with its caption."""
    last = last_of(rows, lambda row: (*measured(row), row["backend"], environment(row, words)))
    tables = []
    for where in dict.fromkeys(environment(row, words) for row in last):
        here = [row for row in last if environment(row, words) == where]
        tables.append(timing_table(here, words, language) + caption(here, words))
    return "\n".join(tables)


def timing_table(rows: Sequence[Row], words: dict[str, str], language: str) -> str:
    optional = [key for key in ("gb_per_s", "tflops", "peak_mib") if any(row.get(key) is not None for row in rows)]
    baseline = {compared(row): row["time_us"][1] for row in rows if is_baseline(row)}
    ratio_column = ["ratio"] if baseline else []
    header = [words[key] for key in ("case", "pass", "backend", "time", *ratio_column, *optional)]
    order = list(dict.fromkeys(case(row) for row in rows))
    lines = []
    for row in sorted(rows, key=lambda row: (order.index(case(row)), list(PASSES).index(row["pass"]))):
        p20, p50, p80 = (milliseconds(time) for time in row["time_us"])
        before = baseline.get(compared(row))
        ratio = ["" if before is None else f"{before / row['time_us'][1]:.2f} ×"] if baseline else []
        numbers = ["" if row.get(key) is None else quantity(key, row[key]) for key in optional]
        time = f"{p50}{clock_mark(row)} ({p20} – {p80})"
        lines.append([case(row), PASSES[row["pass"]][language], row["backend"], time, *ratio, *numbers])
    return markdown(header, lines, left=3)


def op_of(table: str) -> str:
    return table.partition(" ")[2]


def decode_tables(rows: Sequence[Row], on_gpu: bool, words: dict[str, str], root: Path) -> str:
    """A table for each device, model and dtype: a line for each implementation and launch, a column for each T."""
    anchors = json.loads((root / ANCHORS).read_text(encoding="utf-8")) if on_gpu and (root / ANCHORS).exists() else {}
    goals = {(anchors["gpu"], each["model"], each["dtype"]): each for each in anchors.get("decode", [])}
    groups: dict[tuple[str, ...], list[Row]] = {(*key, ""): [] for key in goals}
    for row in rows:
        key = (row.get("gpu") or row["cpu"], row["model"], row["dtype"])
        groups.pop((*key, ""), None)  # the place of goals without rows
        groups.setdefault((*key, environment(row, words)), []).append(row)
    tables = []
    order = list(goals)
    for (where, model, dtype, _), chosen in sorted(
        groups.items(), key=lambda group: order.index(group[0][:3]) if group[0][:3] in goals else len(order)
    ):
        goal = goals.get((where, model, dtype), {})
        last = last_of(chosen, lambda row: (row["backend"], row["launch"], row["sizes"]["T"]))
        text = f"{model}, {dtype}, {where}:\n\n" + decode_table(last, goal, words)
        text += caption(last, words) if last else ""
        if goal.get("peers"):
            made = f"{environment({**anchors['measured'], 'gpu': where}, words)}, {anchors['measured']['date']}"
            text += ("" if last else "\n") + f"{words['decode anchors']}: {made}{words['stop']}\n"
        tables.append(text)
    note = f"\n{words['decode note']}{words['stop']}\n"
    return "\n".join(tables) + note if tables else words["none"] + "\n"


def decode_table(rows: Sequence[Row], goal: Row, words: dict[str, str]) -> str:
    tokens = sorted({*goal.get("tokens", []), *(row["sizes"]["T"] for row in rows)})
    any_row = {row["sizes"]["T"]: row for row in rows}
    hit = [f"{any_row[T]['experts_hit']:.3g}" if T in any_row else "" for T in tokens]
    floor = [f"{any_row[T]['roof_us']:.1f}" if T in any_row else "" for T in tokens]
    lines = [[words["experts hit"], *hit, ""], [words["floor"], *floor, ""]]
    for launch in ("graph", "eager"):
        wanted = dict(zip(goal.get("tokens", []), goal.get("goal_us", {}).get(launch, []), strict=False))
        if wanted:
            cells = [str(wanted.get(T, "")) for T in tokens]
            lines.append([f"{words['goal line']}, {words[f'in {launch}']}", *cells, ""])
        here = [row for row in rows if row["launch"] == launch]
        backends = sorted(dict.fromkeys(row["backend"] for row in here), key=lambda name: not name.startswith(OURS))
        for backend in backends:
            own = {row["sizes"]["T"]: row for row in here if row["backend"] == backend}
            held = wanted if backend.startswith(OURS) else {}
            cells = [decode_cell(own.get(T), held.get(T)) for T in tokens]
            lines.append([f"{backend}, {words[f'in {launch}']}", *cells, launches(rows, backend)])
        for peer in goal.get("peers", []):
            if peer["launch"] == launch:
                times = dict(zip(goal["tokens"], peer["us"], strict=True))
                lines.append([peer["name"], *(str(times.get(T) or "") for T in tokens), peer["launches"]])
    header = [words["implementation"], *map(str, tokens), words["launches"]]
    return markdown(header, lines, left=1)


def decode_cell(row: Row | None, goal_us: float | None) -> str:
    if row is None:
        return ""
    time_us = row["time_us"][1]
    text = f"{time_us:,.1f}" if time_us < 1000 else f"{time_us:,.0f}"
    if goal_us is not None and time_us <= goal_us:
        text = f"**{text}**"
    return f"{text}{clock_mark(row)} ({100 * row['roof_us'] / time_us:.0f} %)"


def launches(rows: Sequence[Row], backend: str) -> str:
    """Counted in the eager calls, at the fewest and at the most tokens."""
    counts = [row["launches"] for row in rows if row["backend"] == backend and row.get("launches")]
    return "" if not counts else " – ".join(map(str, dict.fromkeys((min(counts), max(counts)))))


def soak_table(folder: Path, words: dict[str, str]) -> str:
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    if not rows:
        return words["none"] + "\n"
    last = last_of(rows, lambda row: (row["gpu"], str(row["sizes"]), row["dtype"], row["policy"]))
    lines = [
        [
            f"{case({**row, 'case': row['sizes']})}, {row['policy']}",
            ", ".join(map(str, row["tokens"])),
            *(f"{row[key]:,}" for key in ("calls", "wrong_rows", "flags")),
            f"{row['seconds']:,.0f} s",
        ]
        for row in last
    ]
    header = [words["layer"], "T", *(words[key] for key in ("calls", "wrong_rows", "flags", "seconds"))]
    return markdown(header, lines, left=2) + caption(last, words)


def anchors_table(op: str, rows: Sequence[Row], words: dict[str, str], language: str, root: Path) -> str:
    """A line for each case and pass of anchors.json, with our times on the same GPU where there are rows.

    An anchor with a launch has a goal for calls made that way alone.
    """
    anchors = json.loads((root / ANCHORS).read_text(encoding="utf-8"))
    if op not in anchors or op in ("gpu", "measured", "decode"):
        raise ValueError(f"{ANCHORS.name}: expected the anchors of {op!r}; got none")
    found = {anchored(row): row for row in rows if "op" in row and row.get("gpu") == anchors["gpu"]}
    keys = ("case", "pass", "published", "pytorch", "ours", "graph", "roof", "share", "goal", "holds")
    lines, used = [], []
    for anchor in anchors[op]:
        own = {
            launch: found.get(anchored({**anchor, "launch": launch}))
            for launch in ("eager", "graph")
            if anchor.get("launch", launch) == launch
        }
        eager, graph = own.get("eager"), own.get("graph")
        best = graph or eager
        held = held_rows(anchor, eager, graph)
        against = [rival(anchor, row, found) for row in held]
        used += [row for row in (eager, graph, *against) if row]
        lines.append([
            anchor_case(anchor, words),
            PASSES[anchor["pass"]][language],
            published(anchor, words),
            three_digits(min(anchor["pytorch_ms"].values())) if anchor.get("pytorch_ms") else "",
            three_digits(eager["time_us"][1] / 1000) + clock_mark(eager) if eager else "",
            three_digits(graph["time_us"][1] / 1000) + clock_mark(graph) if graph else "",
            three_digits(best["roof_us"] / 1000) if best else "",
            share_of_roof(best) if best else "",
            goal(anchor, against, words),
            words["yes" if goal_holds(anchor, held, against) else "no"] if best else "",
        ])  # fmt: skip
    made = {**anchors["measured"], "gpu": anchors["gpu"]}
    versions = f"{environment(made, words)}, {made['date']}"
    source = f"{words['anchors']}: {versions}{words['stop']}\n"
    short_ones = any(row["time_us"][1] < LATENCY_BOUND_US for row in used)
    note = f"{words['latency']}{words['stop']}\n" if short_ones else ""
    table = markdown([words[key] for key in keys], lines, left=2)
    return table + (caption(used, words) if used else "\n") + note + source


def share_of_roof(row: Row) -> str:
    time_us = row["time_us"][1]
    return "" if time_us < LATENCY_BOUND_US else f"{100 * row['roof_us'] / time_us:.0f} %"


def clock_mark(row: Row) -> str:
    before, after = row.get("sm_mhz") or (None, None)
    moved = before and after and abs(after - before) > CLOCK_TOLERANCE * before
    return CLOCK_MARK if moved else ""


def anchored(row: Row) -> tuple[object, ...]:
    """What a row and an anchor have in common."""
    routing = row.get("routing") or "uniform"
    launch = row.get("launch") or "eager"
    return row["op"], str(row.get("sizes")), row.get("dtype"), routing, row["pass"], launch, row.get("backend", OURS)


def anchor_case(anchor: Row, words: dict[str, str]) -> str:
    parts = [f"{name} {size}" for name, size in anchor["sizes"].items()]
    if anchor.get("routing", "uniform") != "uniform":
        parts.append(anchor["routing"])
    if "launch" in anchor:
        parts.append(words[f"in {anchor['launch']}"])
    return ", ".join([*parts, anchor["dtype"]])


def published(anchor: Row, words: dict[str, str]) -> str:
    times = anchor.get("published_ms", [])
    times = times if isinstance(times, list) else [times]
    text = " – ".join(three_digits(time) for time in times)
    note = anchor.get("published_note")
    return f"{words[note]} {text}".strip() if note else text


def is_against_peers(anchor: Row) -> bool:
    return "backend" in anchor.get("goal", {}).get("as_fast_as", {})


def held_rows(anchor: Row, eager: Row | None, graph: Row | None) -> list[Row]:
    """Of ours those that a goal is held against: the time in a graph where there is one, but both beside peers, whose
    compiled code is measured eagerly alone.
    """
    rows = (eager, graph) if is_against_peers(anchor) else (graph or eager,)
    return [row for row in rows if row]


def rival(anchor: Row, row: Row, found: dict[tuple[object, ...], Row]) -> Row | None:
    """The fastest of the rows that a relative goal names, measured in the same way as ``row``."""
    others = []
    for name, values in anchor.get("goal", {}).get("as_fast_as", {}).items():
        for value in values if isinstance(values, list) else [values]:
            others.append(found.get(anchored({**row, name: value})))
    return min((other for other in others if other), key=lambda other: other["time_us"][1], default=None)


def goal(anchor: Row, against: Sequence[Row | None], words: dict[str, str]) -> str:
    if "goal_ms" in anchor:
        return three_digits(anchor["goal_ms"])
    if "times_faster_than_gathering" in anchor["goal"]:
        return f"{anchor['goal']['times_faster_than_gathering']} {words['gathering']}"
    if is_against_peers(anchor):
        times = ", ".join(three_digits(row["time_us"][1] / 1000) + clock_mark(row) for row in against if row)
        return f"{words['peers']}: {times}" if times else words["peers"]
    (other,) = anchor["goal"]["as_fast_as"].values()
    return words[other]


def goal_holds(anchor: Row, held: Sequence[Row], against: Sequence[Row | None]) -> bool:
    """Whether all that is ``held`` takes no longer than the goal, or than the row beside it in ``against``."""
    if "goal_ms" in anchor:
        return all(row["time_us"][1] <= 1000 * anchor["goal_ms"] for row in held)
    if "times_faster_than_gathering" in anchor["goal"]:
        factor = anchor["goal"]["times_faster_than_gathering"]  # roof_gather_us is of the plainest gather of the rows
        return all(row["time_us"][1] * factor <= (row.get("roof_gather_us") or 0.0) for row in held)
    pairs = [(row, other) for row, other in zip(held, against, strict=True) if other]
    return bool(pairs) and all(row["time_us"][1] <= (1 + NOISE) * other["time_us"][1] for row, other in pairs)


def measured(row: Row) -> tuple[str, str]:
    return case(row), row["pass"]


def compared(row: Row) -> tuple[str, str]:
    """What rows that are compared with each other have in common."""
    return (ERROR.sub("", row["case"]), row["pass"]) if row["op"].endswith(QUANTIZED) else measured(row)


def is_baseline(row: Row) -> bool:
    return row["dtype"] == NOT_QUANTIZED if row["op"].endswith(QUANTIZED) else row["backend"] == BASELINE


def case(row: Row) -> str:
    sizes = row["case"]
    text = ", ".join(f"{name} {size}" for name, size in sizes.items()) if isinstance(sizes, dict) else str(sizes)
    return f"{text}, {row['dtype']}" if row.get("dtype") and row["dtype"] not in text else text


def device(row: Row, words: dict[str, str]) -> str:
    if row.get("gpu"):
        return str(row["gpu"])
    return f"{row['cpu']}, {row['threads']} {words['threads']}" if row.get("threads") else str(row["cpu"])


def environment(row: Row, words: dict[str, str]) -> str:
    versions = [f"{name} {row[name]}" for name in ("torch", "triton") if row.get(name)]
    return ", ".join([device(row, words), *versions])


def caption(rows: Sequence[Row], words: dict[str, str]) -> str:
    notes = (
        f"{environment(row, words)}, {words['commit']} {short(row['commit'])}, {row['date'][:10]}{words['stop']}"
        for row in rows
    )
    lines = list(dict.fromkeys(notes))
    if any(map(clock_mark, rows)):
        lines.append(f"{CLOCK_MARK} {words['clock']}{words['stop']}")
    return "\n" + "\n".join(lines) + "\n"


def short(commit: str) -> str:
    return commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


def milliseconds(time_us: float) -> str:
    ms = time_us / 1000
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def three_digits(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def quantity(key: str, value: float) -> str:
    return f"{value / 1000:.2f}" if key == "gb_per_s" else f"{value:,.0f}" if key == "tflops" else f"{value:,.1f}"


def last_of(rows: Iterable[Row], key: Callable[[Row], object]) -> list[Row]:
    """The last row of each key, in the order in which the keys first occur."""
    return list({key(row): row for row in rows}.values())


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns are aligned left and the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


if __name__ == "__main__":
    sys.exit(main())
