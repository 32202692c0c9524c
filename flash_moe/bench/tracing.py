"""The command ``trace``: what each program of one decode call does and when, as JSON, as a picture and in words.

On a GPU this is the kernel's own record of a call whose weights are not in the cache; elsewhere, or if asked for, the
schedule on a simulated GPU.
"""

import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from flash_moe._backend import why_not_triton
from flash_moe._moe_layer import Routing
from flash_moe.bench.timing import CudaTimer
from flash_moe.ops.flash_decode import flash_decode
from flash_moe.schedule.decode import Schedule, build_schedule, tile_sizes
from flash_moe.schedule.machine import Slots
from flash_moe.schedule.policies import AUTO, POLICIES, run_policy
from flash_moe.schedule.tasks import Sizes
from flash_moe.schedule.trace import Trace
from flash_moe.testing import decode_arguments, make_decode_inputs

# H, I, E, K and the intermediate size of the shared expert, from each model's published configuration.
MODELS = {
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0),
    "olmoe-1b-7b": (2048, 1024, 64, 8, 0),
    "mixtral-8x7b": (4096, 14336, 8, 2, 0),
    "deepseek-v3": (7168, 2048, 256, 8, 2048),
}
H200_SMS = 132
# Before the call that is traced: the kernel is compiled, and the clock is what it is at work.
WARM_UP_CALLS = 50


def trace(
    out: Annotated[Path, typer.Option(help="Folder for the trace's three files.")],
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, or sizes HxIxExK such as 64x32x16x4.")] = next(
        iter(MODELS)
    ),
    tokens: Annotated[int, typer.Option(help="T, decoded in one call.")] = 1,
    policy: Annotated[str, typer.Option(help=f"auto, {', '.join(POLICIES)}.")] = "auto",
    programs: Annotated[
        int | None, typer.Option(help="Of a simulated GPU only; by default one for each SM of an H200.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the weights and tokens; in a simulation, of the experts that tokens choose.")
    ] = 0,
    is_simulated: Annotated[
        bool | None,
        typer.Option(
            "--simulate/--no-simulate",
            help="Logical time of a simulated GPU, or the kernel on this one; by default the kernel where it can run.",
        ),
    ] = None,
) -> None:
    """Show which program does what and when in a flash_decode call, on this GPU or in the logical time of a model."""
    from flash_moe.bench.timeline import draw_timeline

    if policy not in ("auto", *POLICIES):
        raise ValueError(f"policy: expected one of auto, {', '.join(POLICIES)}; got {policy!r}")
    sizes = find_sizes(model, tokens)
    simulates = find_whether_to_simulate(is_simulated)
    if simulates:
        found = simulate(sizes, policy, H200_SMS if programs is None else programs, seed)
    elif programs is None:
        found = trace_kernel(sizes, policy, seed)
    else:
        raise ValueError(f"programs: expected to be given with --simulate only; got {programs}")
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{model}_T{tokens}_{found.policy}"
    summary, json, picture = (stem.with_name(stem.name + ending) for ending in (".txt", ".json", ".png"))
    words = f"{found.summary()}\n{say_what_was_traced(found, simulates)}"
    summary.write_text(words + "\n", encoding="utf-8")
    found.write_chrome(json)
    draw_timeline(found, picture)
    console = Console(highlight=False, soft_wrap=True)
    console.print(words, markup=False)
    for path in (summary, json, picture):
        console.print(f"wrote {path}", markup=False)


def say_what_was_traced(found: Trace, is_simulated: bool) -> str:
    """And that it is not always what a call without a trace runs."""
    what = "the schedule on a simulated GPU" if is_simulated else "the kernel that runs the schedule"
    return (
        f"traced: {what}, policy {found.policy}; an untraced call with policy auto takes a kernel without a schedule "
        "for few tokens, and no trace shows that one"
    )


def find_whether_to_simulate(asked: bool | None) -> bool:
    """What was asked for, if it can be; by default whether the kernel cannot run."""
    reason = why_not_triton("cuda") if torch.cuda.is_available() else "there is no CUDA GPU"
    if asked is False and reason:
        raise ValueError(f"simulate: expected --simulate, since the kernel cannot run: {reason}; got --no-simulate")
    return reason is not None if asked is None else asked


def find_sizes(model: str, tokens: int) -> Sizes:
    """Of a model by name, or as ``HxIxExK``."""
    if model in MODELS:
        H, I, E, K, shared = MODELS[model]
    else:
        words = model.split("x")
        if len(words) != 4 or not all(word.isdecimal() for word in words):
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, or sizes HxIxExK; got {model!r}")
        (H, I, E, K), shared = map(int, words), 0
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1; got {tokens}")
    return Sizes(tokens, H, I, E, K, shared)


def trace_kernel(sizes: Sizes, policy: str, seed: int) -> Trace:
    """One call of the kernel on random weights in bfloat16, none of them in the L2 cache."""
    T, H, I, E, K = sizes.T, sizes.H, sizes.I, sizes.E, sizes.K
    device, found = torch.device("cuda"), Trace()
    x, layer = make_decode_inputs(
        T, H, I, E, Routing(K), torch.bfloat16, device, seed,
        shared_intermediate_size=sizes.shared_intermediate_size,
    )  # fmt: skip
    timer, given = CudaTimer(device, seconds=0), decode_arguments(layer)
    for warm_up in range(WARM_UP_CALLS):  # the first of them traced, since tracing is compiled for itself
        flash_decode(x, **given, backend="triton", policy=policy, trace=None if warm_up else found)
    timer.flush()
    flash_decode(x, **given, backend="triton", policy=policy, trace=found)
    return found


def simulate(sizes: Sizes, policy: str, num_programs: int, seed: int) -> Trace:
    """A call without arithmetic: each token takes K experts at random."""
    policy = AUTO if policy == "auto" else policy
    if policy == "actor" and num_programs < 2:
        raise ValueError(
            f"programs: expected at least 2 with policy actor, a scheduler and a worker; got {num_programs}"
        )
    schedule = build_schedule(sizes, tile_sizes(sizes, num_programs), num_programs)
    trace = Trace()
    run_policy(schedule, policy, lambda: draw_slots(schedule, seed), lambda index: None, trace)
    return trace


def draw_slots(schedule: Schedule, seed: int) -> Slots:
    sizes, generator = schedule.sizes, random.Random(seed)
    counts: dict[int, int] = {}
    for _ in range(sizes.T):
        for expert in generator.sample(range(sizes.E), sizes.K):
            counts[expert] = counts.get(expert, 0) + 1
    experts = tuple(sorted(counts))
    return Slots(experts, tuple(counts[expert] for expert in experts))
