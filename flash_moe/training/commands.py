"""The commands ``train`` and ``generate``: options in, progress and text out."""

import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flash_moe.modules.flash_moe import BACKENDS
from flash_moe.training.generate import generate_bytes, to_text
from flash_moe.training.loop import Row, TrainResult, load_model, read_config, start_run
from flash_moe.training.loop import train as train_run
from flash_moe.training.presets import PRESETS, TrainConfig, preset
from flash_moe.training.profiling import StepProfile, describe

SAMPLE_PROMPT = "def "
SAMPLE_BYTES = 400


def train(
    run: Annotated[Path | None, typer.Option(help="Folder of the new run [default: runs/ and the time].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder, with its own settings.")] = None,
    preset_name: Annotated[str | None, typer.Option("--preset", help=" or ".join(PRESETS) + " [default: cpu].")] = None,
    data: Annotated[str | None, typer.Option(help="Text file or folder [default: Python's standard library].")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the batches.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [default: auto].")] = None,
    backend: Annotated[str | None, typer.Option(help=f"{', '.join(BACKENDS)} [default: auto].")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show which part of a step takes how long.")] = False,
) -> None:
    """Train a small FlashMoE language model and show what it has learnt."""
    settings = {"data": data, "num_steps": steps, "batch_size": batch_size, "seed": seed, "device": device}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    console = Console(highlight=False)
    if resume is None:
        config = replace(preset(preset_name or "cpu"), **given)
        if backend is not None:
            config = replace(config, model=replace(config.model, backend=backend))  # type: ignore[arg-type] # is checked
        folder = start_run(config, run or Path("runs", time.strftime("%Y%m%d-%H%M%S")))
    else:
        if given or any(option is not None for option in (run, preset_name, backend)):
            raise ValueError("resume: expected no other option but profile, since a run keeps its settings; got one")
        folder, config = resume, read_config(resume)
    with ProgressDisplay(console, config) as display:
        result = train_run(folder, display.show, with_profile=profile)
    if not result.finished:
        console.print(f"Stopped and saved after step {result.step}. Continue with:", soft_wrap=True)
        console.print(f"  flash-moe train --resume {folder}", soft_wrap=True)
        raise typer.Exit(130)
    _show_result(console, result)


def generate(
    run: Annotated[Path, typer.Option(help="Folder of a run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = SAMPLE_PROMPT,
    num_bytes: Annotated[int, typer.Option(help="Bytes to generate.")] = SAMPLE_BYTES,
    temperature: Annotated[float, typer.Option(help="Below 1 for safer text, 0 for the likeliest.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among this many of the likeliest bytes.")] = 40,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [default: as the run was told].")] = None,
) -> None:
    """Continue a prompt with a trained model."""
    model = load_model(run, device)
    encoded = prompt.encode("utf-8", "surrogateescape")
    sampled = generate_bytes(model, encoded, num_bytes, temperature=temperature, top_k=top_k, seed=seed)
    sys.stdout.write(prompt)
    for text in to_text(sampled):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


class ProgressDisplay:
    """A progress bar on a terminal; elsewhere, in a log say, a line now and then."""

    def __init__(self, console: Console, config: TrainConfig):
        self.console, self.config = console, config
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}   {task.fields[speed]} tokens/s   time left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=config.num_steps, loss="-", speed="-")
        self.seconds = 0.0
        self.first_step = 0

    def __enter__(self) -> "ProgressDisplay":
        model = self.config.model
        self.console.print(
            f"FlashMoE language model: {model.num_layers} layers, hidden size {model.hidden_size}, "
            f"{model.num_experts} experts a layer, {model.num_experts_per_tok} a byte",
            soft_wrap=True,
        )
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, row: Row) -> None:
        """One row of ``metrics.jsonl``."""
        if row["kind"] == "train":
            loss, speed = f"{row['loss']:.3f}", f"{row['tokens_per_s']:,.0f}"
            self.bar.update(self.task, completed=row["step"], loss=loss, speed=speed)
            if not self.console.is_terminal:
                self._show_line(row, loss, speed)
        elif row["kind"] == "heldout":
            bits = f"{row['bits_per_byte']:.3f}"
            self.console.print(f"after step {row['step']}: {bits} bits per byte of held-out text", soft_wrap=True)
        elif row["kind"] == "profile":
            profile = StepProfile.from_json(row)
            self.console.print(describe(profile, self.config.model.num_layers))

    def _show_line(self, row: Row, loss: str, speed: str) -> None:
        self.first_step = self.first_step or row["step"]
        self.seconds += row["seconds"]
        every = max(self.config.num_steps // 20, self.config.log_every)
        if row["step"] % every and row["step"] != self.config.num_steps:
            return
        steps_done = row["step"] - self.first_step + self.config.log_every
        left = timedelta(seconds=round(self.seconds / steps_done * (self.config.num_steps - row["step"])))
        line = f"step {row['step']}/{self.config.num_steps}   loss {loss}   {speed} tokens/s   time left {left}"
        self.console.print(line, soft_wrap=True)


def _show_result(console: Console, result: TrainResult) -> None:
    model = load_model(result.run)
    sample = "".join(to_text(generate_bytes(model, SAMPLE_PROMPT.encode(), SAMPLE_BYTES)))
    console.rule("a sample")
    console.print(SAMPLE_PROMPT + sample, markup=False, soft_wrap=True)
    console.rule()
    console.print(f"held-out bits per byte: {result.heldout_bits_per_byte:.3f} (8 would be no idea at all)")
    if result.note:
        console.print(result.note, markup=False, soft_wrap=True)
    console.print(f"saved in {result.run}: config, metrics, model, loss.png, experts.png", markup=False, soft_wrap=True)
    console.print(f'more text: flash-moe generate --run {result.run} --prompt "def "', markup=False, soft_wrap=True)
