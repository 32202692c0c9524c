"""The command ``trace``: the schedule of one decode call on a simulated GPU, as JSON, as a picture and in words."""

import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flash_moe.schedule.decode import Schedule, build_schedule, tile_sizes
from flash_moe.schedule.machine import Slots
from flash_moe.schedule.policies import AUTO, POLICIES, run_policy
from flash_moe.schedule.tasks import Sizes
from flash_moe.schedule.trace import Trace

# H, I, E, K and the intermediate size of the shared expert, from each model's published configuration.
MODELS = {
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0),
    "olmoe-1b-7b": (2048, 1024, 64, 8, 0),
    "mixtral-8x7b": (4096, 14336, 8, 2, 0),
    "deepseek-v3": (7168, 2048, 256, 8, 2048),
}
H200_SMS = 132


def trace(
    out: Annotated[Path, typer.Option(help="Folder for the trace's three files.")],
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, or sizes HxIxExK such as 64x32x16x4.")] = next(
        iter(MODELS)
    ),
    tokens: Annotated[int, typer.Option(help="T, decoded in one call.")] = 1,
    policy: Annotated[str, typer.Option(help=f"auto, {', '.join(POLICIES)}.")] = "auto",
    programs: Annotated[
        int, typer.Option(help="Of the simulated GPU; by default one for each SM of an H200.")
    ] = H200_SMS,
    seed: Annotated[int, typer.Option(help="Of the experts that the tokens choose, uniformly.")] = 0,
) -> None:
    """Show which program does what and when in a flash_decode call, in the logical time of a simulated GPU."""
    from flash_moe.bench.timeline import draw_timeline

    if policy not in ("auto", *POLICIES):
        raise ValueError(f"policy: expected one of auto, {', '.join(POLICIES)}; got {policy!r}")
    policy = AUTO if policy == "auto" else policy
    if policy == "actor" and programs < 2:
        raise ValueError(f"programs: expected at least 2 with policy actor, a scheduler and a worker; got {programs}")
    found = simulate(find_sizes(model, tokens), policy, programs, seed)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{model}_T{tokens}_{policy}"
    summary, json, picture = (stem.with_name(stem.name + ending) for ending in (".txt", ".json", ".png"))
    summary.write_text(found.summary() + "\n", encoding="utf-8")
    found.write_chrome(json)
    draw_timeline(found, picture)
    console = Console(highlight=False, soft_wrap=True)
    console.print(found.summary(), markup=False)
    for path in (summary, json, picture):
        console.print(f"wrote {path}", markup=False)


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


def simulate(sizes: Sizes, policy: str, num_programs: int, seed: int) -> Trace:
    """A call without arithmetic: each token takes K experts at random."""
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
