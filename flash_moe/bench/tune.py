"""``flash-moe tune``: every candidate config of a kernel, checked against the default one, timed; the best is shipped.

A kernel joins by an entry in ``TUNABLES`` and one in ``launch_tables/default.json``; its launcher asks
``launch_config``. It runs as a part of the pass that uses it, so that what is checked and timed is what users get.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flash_moe.bench.cases import SETS, Case, Sizes, make_inputs, parse_sizes
from flash_moe.bench.competitors import Bound, find_competitors
from flash_moe.bench.timing import Replayed, percentiles
from flash_moe.bench.work import BACKWARD, FORWARD
from flash_moe.ops._triton.expert_plan import FUSED, GATHER, use_variant
from flash_moe.ops._triton.launch import Config, launch_config, use_config
from flash_moe.testing import poison_memory

# A config takes the place of the default where the pass is faster by more than the noise of a median.
MIN_GAIN = 0.01
# How far apart, in eps of its dtype, two roundings of one result may lie: 16-bit results are rounded once from float32
# sums that differ in their order; float32 results are those sums.
ROUNDING = {torch.float32: 32.0, torch.float16: 2.0, torch.bfloat16: 2.0}
# Elements that are compared at a time.
CHUNK = 2**26

Call = Callable[[], Any]


class Timer(Protocol):
    """What tuning needs of ``bench.timing.CudaTimer``."""

    def time_graph(self, prepare: Sequence[Callable[[], Call]]) -> Replayed: ...
    def free(self) -> None: ...


@dataclass(frozen=True)
class Tunable:
    """A kernel whose launcher asks ``launch_config``."""

    op: str
    which: str
    """The pass of ``op`` that launches it."""
    letters: tuple[str, ...]
    """Names of the sizes that the launcher looks up."""
    candidates: tuple[Config, ...]
    cases: tuple[Sizes, ...]
    """Sizes of the op where the kernel is tuned."""
    tiny: tuple[Sizes, ...]
    """Sizes of the op where the tests run it in the interpreter: no block divides them."""
    variant: str | None = None
    """Of the experts' passes, the one that launches it."""


@dataclass(frozen=True)
class Tuned:
    """The outcome of one kernel at one case."""

    kernel: str
    case: Sizes
    sizes: tuple[Sizes, ...]
    """Those that the launcher looked up."""
    config: Config
    time_us: float
    """Of the whole pass."""
    default_us: float
    num_timed: int
    refused: tuple[tuple[Config, str], ...]


def every(**choices: Sequence[int]) -> Iterator[dict[str, int]]:
    """All combinations of the choices."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _tiles(rows: str, row_choices: Sequence[int], unroll: Sequence[int]) -> tuple[Config, ...]:
    """Tiles of rows that keep 16 to 64 elements a thread in flight: fewer leave memory idle, more spill."""
    configs = every(**{rows: row_choices}, BLOCK_H=(128, 256, 512, 1024), UNROLL=unroll, num_warps=(1, 2))
    return tuple(c for c in configs if 16 <= c[rows] * c["BLOCK_H"] // (32 * c["num_warps"]) <= 64)


_EXPERT_LETTERS = ("T", "H", "E", "K")
_TOKEN_TILES = _tiles("BLOCK_K", (1, 2, 4, 8), (1, 4))
_EXPERT_TILES = _tiles("BLOCK_P", (1, 2, 4), (1, 2))
# All of a token's rows at once where tokens are few; UNROLL blocks are the usual 1024 columns.
_FUSED_TILES = tuple(
    {**config, "UNROLL": 1024 // config["BLOCK_H"]}
    for config in every(BLOCK_K=(8, 16, 32, 64), BLOCK_H=(64, 256), SLICE=(128, 1024), num_warps=(4, 8, 16))
    if 16 <= config["BLOCK_K"] * max(config["BLOCK_H"], config["SLICE"]) // (32 * config["num_warps"]) <= 64
)
_GATED_BLOCKS = tuple(every(BLOCK=(512, 1024, 2048, 4096), num_warps=(2, 4, 8)))
# Small and large tables and numbers of tokens; the look-up finds the nearest for all else.
_EXPERT_CASES = (
    (4096, 1024, 16384, 64),
    (4096, 1024, 102400, 512),
    (1024, 1024, 4096, 32),
    (1024, 1024, 65536, 32),
    (8192, 2048, 1048576, 64),
    (1, 1024, 16384, 64),
)
_FUSED_CASES = (
    (1, 1024, 16384, 64),
    (16, 1024, 16384, 64),
    (128, 1024, 16384, 64),
    (1024, 1024, 4096, 32),
    (1024, 1024, 65536, 32),
)
_MLP_CASES = ((1, 1024, 4096), (64, 1024, 4096), (4096, 1024, 4096))
_TINY_EXPERT = ((2, 300, 5, 3), (1, 16, 3, 9))
_TINY_MLP = ((1, 4, 1), (5, 8, 1001))
TUNABLES = {
    "dots": Tunable("expert", FORWARD, _EXPERT_LETTERS, _TOKEN_TILES, _EXPERT_CASES, _TINY_EXPERT, GATHER),
    "token_sums": Tunable("expert", FORWARD, _EXPERT_LETTERS, _TOKEN_TILES, _EXPERT_CASES, _TINY_EXPERT, GATHER),
    "expert_sums": Tunable("expert", BACKWARD, _EXPERT_LETTERS, _EXPERT_TILES, _EXPERT_CASES, _TINY_EXPERT, GATHER),
    "fused": Tunable("expert", FORWARD, _EXPERT_LETTERS, _FUSED_TILES, _FUSED_CASES, _TINY_EXPERT, FUSED),
    "gated_forward": Tunable("mlp", FORWARD, ("numel",), _GATED_BLOCKS, _MLP_CASES, _TINY_MLP),
    "gated_backward": Tunable("mlp", BACKWARD, ("numel",), _GATED_BLOCKS, _MLP_CASES, _TINY_MLP),
}


def find_jobs(kernels: Sequence[str], cases: Sequence[str]) -> list[tuple[str, Sizes]]:
    """What to tune: the kernels, by default all, each at its own cases or at ``cases``. Raises ``ValueError``."""
    for kernel in kernels:
        if kernel not in TUNABLES:
            raise ValueError(f"kernel: expected one of {', '.join(TUNABLES)}; got {kernel!r}")
    jobs = []
    for kernel in kernels or TUNABLES:
        tunable = TUNABLES[kernel]
        jobs += [(kernel, sizes) for sizes in tunable.cases if not cases]
        for case in cases:
            chosen = SETS[case][tunable.op] if case in SETS else (parse_sizes(tunable.op, case),)
            jobs += [(kernel, sizes) for sizes in chosen]
    return jobs


def tune_kernel(kernel: str, case: Sizes, dtype: torch.dtype, device: torch.device, timer: Timer) -> Tuned | None:
    """The fastest config that computes what the default one does; the default itself unless one is clearly faster.

    None where the pass does without the kernel at ``case``.
    """
    bound = bind(kernel, case, dtype, device)
    sizes = sizes_of(kernel, bound)
    if not sizes:
        return None
    default = launch_config(kernel, torch.device("cpu"), sizes[0])
    expected = run_with_config(kernel, default, bound)
    times = [(_time(kernel, default, bound, timer), default)]
    refused = []
    for config in TUNABLES[kernel].candidates:
        if config == default:
            continue
        try:
            require_same(expected, run_with_config(kernel, config, bound))
            times.append((_time(kernel, config, bound, timer), config))
        except Exception as error:  # of Triton's compiler, the driver or a check: each has a class of its own
            refused.append((config, f"{type(error).__name__}: {error}".splitlines()[0]))
        timer.free()
    default_us = times[0][0]
    time_us, config = min(times, key=lambda each: each[0])
    if time_us > (1 - MIN_GAIN) * default_us:
        time_us, config = times[0]
    return Tuned(kernel, case, sizes, config, time_us, default_us, len(times), tuple(refused))


def bind(kernel: str, case: Sizes, dtype: torch.dtype, device: torch.device) -> Bound:
    """The kernel's op on random inputs of the sizes ``case``."""
    tunable = TUNABLES[kernel]
    full_case = Case(tunable.op, case, dtype, "uniform" if tunable.op == "expert" else None)
    (competitor,) = find_competitors(full_case, device, ("triton",))
    return competitor.bind(make_inputs(full_case, device), tunable.which)


def sizes_of(kernel: str, bound: Bound) -> tuple[Sizes, ...]:
    """The sizes that the kernel's launcher looks up, in order; none where the pass does without it."""
    tunable = TUNABLES[kernel]
    with use_variant(tunable.variant), use_config(kernel, None) as asked:
        bound.results(tunable.which)
    return tuple(sorted(asked))


def run_with_config(kernel: str, config: Config, bound: Bound) -> tuple[Tensor, ...]:
    """The results under ``config``, in memory full of NaN, so that nothing left unwritten looks right.

    Raises ``ValueError`` where a second call differs in a bit.
    """
    tunable = TUNABLES[kernel]
    with use_variant(tunable.variant), use_config(kernel, config), poison_memory():
        first, second = (bound.results(tunable.which) for _ in range(2))
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        # As bytes, since a NaN is not equal to itself.
        if not torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)):
            raise ValueError(f"result {i}: expected the same bits in every call; got others")
    return first


def require_same(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` unless the results are the same to rounding; integers have to be equal."""
    for i, (x, y) in enumerate(zip(expected, actual, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(f"result {i}: expected {x.dtype} {tuple(x.shape)}; got {y.dtype} {tuple(y.shape)}")
        if torch.equal(x, y):
            continue
        if not x.is_floating_point():
            raise ValueError(f"result {i}: expected the integers of the default config; got others")
        eps = ROUNDING[x.dtype] * torch.finfo(x.dtype).eps
        rms = torch.linalg.vector_norm(x, dtype=torch.float32).item() / x.numel() ** 0.5
        for a, b in zip(x.flatten().split(CHUNK), y.flatten().split(CHUNK), strict=True):
            a, b = a.float(), b.float()
            # Where terms cancel, the error is that of the terms: as large as an ordinary result's.
            excess = ((a - b).abs() - eps * (a.abs() + rms)).max().item()
            if not excess <= 0:  # written so that a NaN is refused
                raise ValueError(f"result {i}: expected the default config's to rounding; got {excess:.1e} beyond it")


def write_table(path: Path, results: Iterable[Tuned], fields: Mapping[str, Any]) -> None:
    """Put the results into a GPU's table, which keeps its entries at other sizes and of other kernels.

    ``fields`` are those of ``describe_machine``.
    """
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"gpu": fields["gpu"], "kernels": {}}
    if data["gpu"] != fields["gpu"]:
        raise ValueError(f"out: expected a table of {fields['gpu']}; got one of {data['gpu']}, {path}")
    for found in results:
        kernel = data["kernels"].setdefault(found.kernel, {"entries": []})
        kernel["letters"] = TUNABLES[found.kernel].letters
        kernel["measured"] = {name: fields[name] for name in ("driver", "torch", "triton", "commit", "date")}
        for sizes in found.sizes:
            others = [entry for entry in kernel["entries"] if tuple(entry["sizes"]) != sizes]
            entry = {"sizes": list(sizes), "config": dict(found.config), "time_us": round(found.time_us, 2)}
            kernel["entries"] = [*others, entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(format_table(data), encoding="utf-8")


def format_table(data: Mapping[str, Any]) -> str:
    """JSON with an entry a line, kernels, sizes and names in order, so that a difference shows what changed."""
    kernels = []
    for name, kernel in sorted(data["kernels"].items()):
        lines = [f'      "letters": {json.dumps(list(kernel["letters"]))}']
        if "measured" in kernel:
            lines.append(f'      "measured": {json.dumps(kernel["measured"], sort_keys=True)}')
        entries = []
        for entry in sorted(kernel["entries"], key=lambda entry: entry["sizes"]):
            config = dict(sorted(entry["config"].items()))
            time = {"time_us": entry["time_us"]} if "time_us" in entry else {}
            entries.append(f"        {json.dumps({'sizes': entry['sizes'], 'config': config} | time)}")
        lines.append('      "entries": [\n' + ",\n".join(entries) + "\n      ]")
        kernels.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n    }")
    return f'{{\n  "gpu": {json.dumps(data["gpu"])},\n  "kernels": {{\n' + ",\n".join(kernels) + "\n  }\n}\n"


def describe(found: Tuned) -> str:
    config = ", ".join(f"{name} {value}" for name, value in sorted(found.config.items()))
    times = f"{found.time_us:.1f} us, default {found.default_us:.1f} us"
    counts = f"{found.num_timed} timed, {len(found.refused)} refused"
    return f"{found.kernel} {'x'.join(map(str, found.case))}: {config}: {times} ({counts})"


def _time(kernel: str, config: Config, bound: Bound, timer: Timer) -> float:
    """In a graph: at small sizes an eager call would measure the host."""
    tunable = TUNABLES[kernel]
    prepare = partial(bound.prepare, tunable.which)
    with use_variant(tunable.variant), use_config(kernel, config), torch.set_grad_enabled(tunable.which != FORWARD):
        return percentiles(timer.time_graph([prepare]).times)[1]
