"""The two pictures of a run: its loss curve and its use of the experts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from flash_moe.training.files import write_atomically

LEVELS = 16  # usage is shown from 1/16 of an even share to 16 times it


def plot_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte over steps: every training batch, and the held-out text."""
    train = [row for row in metrics if row["kind"] == "train"]
    heldout = [row for row in metrics if row["kind"] == "heldout"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte")
    axes.plot([row["step"] for row in train], [row["bits_per_byte"] for row in train], lw=0.8, color="0.65",
              label="training batch")  # fmt: skip
    axes.plot([row["step"] for row in heldout], [row["bits_per_byte"] for row in heldout], "o-", color="C0",
              label="held-out text")  # fmt: skip
    if heldout:
        last = heldout[-1]
        axes.set_title(f"{last['bits_per_byte']:.3f} bits per byte of held-out text after {last['step']} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_experts(counts: Sequence[Tensor], path: Path) -> None:
    """One square a layer, one point an expert: row and column are its two keys, the colour is its use.

    Args:
        counts: ``[E]`` for each layer, on the CPU.
    """
    columns = min(len(counts), 4)
    rows = math.ceil(len(counts) / columns)
    figure = Figure(figsize=(2.6 * columns + 1, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, layer_counts in enumerate(counts):
        keys = math.isqrt(layer_counts.numel())
        share = (layer_counts.double() / layer_counts.double().mean().clamp(min=1e-30)).view(keys, keys)
        axes = grid.flat[i]
        image = axes.imshow(
            share.clamp(min=1 / LEVELS).tolist(), norm=LogNorm(1 / LEVELS, LEVELS), cmap="viridis", origin="lower"
        )
        unused = (layer_counts == 0).double().mean().item()
        axes.set_title(f"layer {i}: {unused:.1%} unused", fontsize="small")
    figure.suptitle("Use of the experts on held-out text, by row key and column key")
    bar = figure.colorbar(image, ax=grid, label="times an even share", shrink=0.8, extend="both")
    bar.set_ticks([1 / LEVELS, 1 / 4, 1, 4, LEVELS], labels=[f"1/{LEVELS}", "1/4", "1", "4", str(LEVELS)], minor=False)
    bar.minorticks_off()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
