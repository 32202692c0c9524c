"""Draws how_it_works.svg: the layer on the left, on the right a token's route through it, computed with flash_router.

Run: python docs/figures/how_it_works.py [OUT.svg]
"""

import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from flash_moe.ops.flash_router import flash_router

N, K = 12, 8  # keys a half and experts per token in the picture
INK, DENSE, ROUTER, EXPERT = "#222222", "#dbe7f5", "#fdebc8", "#dcefdc"
CANDIDATE, CHOSEN = "#fdebc8", "#2e7d32"
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "flash_moe", "font.family": "DejaVu Sans", "font.size": 9}


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    with rc_context(STYLE):
        figure = Figure(figsize=(10.4, 5.6), facecolor="white")
        draw_layer(figure.add_axes((0.01, 0.02, 0.43, 0.96)))
        draw_routing(figure.add_axes((0.53, 0.16, 0.44, 0.74)))
        figure.savefig(out, format="svg", metadata={"Date": None})


def draw_layer(axes: Axes) -> None:
    axes.set(xlim=(0, 10), ylim=(0, 12))
    axes.set_axis_off()
    axes.text(5, 11.8, "One FlashMoE layer", ha="center", va="top", weight="bold")
    box(axes, 3.8, 0.2, 2.0, 0.8, "tokens x", "white")
    box(axes, 0.1, 4.6, 4.1, 1.8, "dense gated MLP:\ndown_proj(\nact(gate_proj x) · up_proj x)", DENSE)
    box(axes, 5.4, 2.3, 4.5, 1.1, "router_norm, router_gate:\n2 N logits a token", ROUTER)
    box(axes, 5.4, 4.1, 4.5, 1.1, "log-softmax\nover each half of N", ROUTER)
    box(axes, 5.4, 5.9, 4.5, 1.1, "flash_router: the best K\nof N · N pair sums", ROUTER)
    box(axes, 5.4, 7.9, 4.5, 1.2, "flash_expert: sum over K of\nw · act(x · down[e]) · up[e]", EXPERT)
    box(axes, 3.8, 10.4, 2.0, 0.8, "y", "white")
    axes.text(4.8, 9.7, "+", ha="center", va="center", size=15)
    path(axes, (4.8, 1.0), (4.8, 8.5), (5.4, 8.5))
    path(axes, (4.8, 1.6), (2.15, 1.6), (2.15, 4.6))
    path(axes, (4.8, 1.6), (7.65, 1.6), (7.65, 2.3))
    path(axes, (7.65, 3.4), (7.65, 4.1))
    path(axes, (7.65, 5.2), (7.65, 5.9))
    path(axes, (7.65, 7.0), (7.65, 7.9))
    axes.text(7.8, 7.45, "ids e,\nweights w = exp(score)", va="center", size=7, color="0.35")
    path(axes, (2.15, 6.4), (2.15, 9.7), (4.5, 9.7))
    path(axes, (7.65, 9.1), (7.65, 9.7), (5.1, 9.7))
    path(axes, (4.8, 9.95), (4.8, 10.4))


def draw_routing(axes: Axes) -> None:
    """The grid of pairs, rows and columns sorted best first: candidates under the hyperbola, the K chosen in green."""
    halves = torch.randn(2, 1, N, generator=torch.Generator().manual_seed(24)).log_softmax(-1)
    values, ids = halves[:, 0].sort(dim=-1, descending=True)
    _, chosen = flash_router(halves, N, K)
    row_rank, col_rank = ids.argsort(dim=-1)
    picked = {(int(row_rank[e // N]), int(col_rank[e % N])) for e in chosen[0].tolist()}
    assert all((i + 1) * (j + 1) <= K for i, j in picked)
    for i in range(N):
        for j in range(N):
            is_candidate = (i + 1) * (j + 1) <= K
            colour = CHOSEN if (i, j) in picked else CANDIDATE if is_candidate else "white"
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="#c8c8c8", linewidth=0.6))
            if (i, j) in picked:
                name = str(int(ids[0, i]) * N + int(ids[1, j]))
                axes.text(j + 0.5, i + 0.5, name, ha="center", va="center", size=7.5, color="white")
    for n in range(N):
        axes.text(-0.15, n + 0.5, f"{values[0, n]:.1f}", ha="right", va="center", size=7, color="0.35")
        axes.text(n + 0.5, -0.2, f"{values[1, n]:.1f}", ha="center", va="bottom", size=7, color="0.35")
    axes.set(xlim=(-1.6, N + 0.1), ylim=(N + 0.1, -1.0), aspect="equal")
    axes.set_axis_off()
    num_candidates = sum(K // i for i in range(1, K + 1))
    axes.text(N / 2, -1.85, f"One token's choice: N = {N}, E = N · N = {N * N}, K = {K}", ha="center", weight="bold")
    axes.text(N / 2, -1.05, "column log-probabilities, best first", ha="center", size=8)
    axes.text(-1.5, N / 2, "row log-probabilities, best first", rotation=90, va="center", ha="center", size=8)
    legend = (
        (CHOSEN, f"the {K} chosen, with their ids i · N + j"),
        (CANDIDATE, f"the other candidates: rank · rank ≤ {K} leaves {num_candidates} of {N * N} sums"),
        ("white", f"never formed: {K} pairs come before each of these"),
    )
    for line, (colour, text) in enumerate(legend):
        y = N + 0.45 + 0.75 * line
        axes.add_patch(Rectangle((0, y), 0.5, 0.5, facecolor=colour, edgecolor="#c8c8c8", linewidth=0.6, clip_on=False))
        axes.text(0.8, y + 0.27, text, va="center", size=8)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=colour, edgecolor=INK, linewidth=0.9
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=8.5, linespacing=1.35)


def path(axes: Axes, *corners: tuple[float, float]) -> None:
    """Straight lines from corner to corner, the last one an arrow."""
    axes.plot(*zip(*corners[:-1], strict=True), color=INK, linewidth=0.9, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(*corners[-2:], color=INK, linewidth=0.9, **style))


if __name__ == "__main__":
    main()
