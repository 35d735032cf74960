"""Draws kernels/tiling.svg, the picture of kernels/README.md: `python -m benchmarks.tiling`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKEN_TILES = 3
PARTS = 4
TILES_PER_PART = 3

INK, PALE, HIDDEN, WEIGHT, LIVE = "#24292f", "#d0d7de", "#9ecae1", "#a1d99b", "#fdae6b"


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text as text keeps the file small; ids that do not change from run to run.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tiling", "font.size": 9})
    figure, axes = pyplot.subplots(figsize=(9.6, 3.9))
    axes.set_xlim(-4.6, 15.6)
    axes.set_ylim(-5.4, 3.6)
    axes.set_aspect("equal")
    axes.axis("off")
    _operands(axes)
    _logits(axes)
    _statistics(axes)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _operands(axes: Any) -> None:
    width = TILES_PER_PART * PARTS
    _box(axes, -2.4, -TOKEN_TILES, 1.8, TOKEN_TILES, PALE)
    _box(axes, 0, 0.6, width, 1.8, PALE)
    axes.text(-2.5, -TOKEN_TILES / 2, "hidden\n(N, D)", ha="right", va="center")
    axes.text(width / 2, 2.55, "weight (V, D), as its transpose", ha="center", va="bottom")
    # What one step of one tile reads.
    _box(axes, -2.4, -2, 0.6, 1, HIDDEN)
    _box(axes, 4, 1.8, 1, 0.6, WEIGHT)
    axes.annotate("", (-0.7, -1.5), (-1.75, -1.5), arrowprops={"arrowstyle": "->", "color": INK})
    axes.annotate("", (4.5, 0.7), (4.5, 1.75), arrowprops={"arrowstyle": "->", "color": INK})
    axes.text(-2.4, -TOKEN_TILES - 0.12, "BLOCK_D a step", ha="left", va="top", fontsize=7)
    axes.text(5.1, 2.1, "BLOCK_D a step", ha="left", va="center", fontsize=7)


def _logits(axes: Any) -> None:
    for part in range(PARTS):
        for row in range(TOKEN_TILES):
            left, bottom = part * TILES_PER_PART, -row - 1
            for tile in range(TILES_PER_PART):
                live = (part, row, tile) == (1, 1, 1)
                _box(axes, left + tile, bottom, 1, 1, LIVE if live else "white", PALE)
            _box(axes, left, bottom, TILES_PER_PART, 1, "none")
            program = part * TOKEN_TILES + row
            axes.text(left + 0.08, bottom + 0.9, str(program), ha="left", va="top", fontsize=7)
            axes.annotate(
                "",
                (left + TILES_PER_PART - 0.15, bottom + 0.3),
                (left + 0.15, bottom + 0.3),
                arrowprops={"arrowstyle": "->", "color": INK, "lw": 0.7},
            )
    axes.text(4.5, -1.4, "in registers", ha="center", va="center", fontsize=5)
    right = TILES_PER_PART * PARTS + 0.25
    text = (
        "logits (N, V):\nnever in memory.\nNumber: program,\narrow: its tiles,\nBLOCK_N x BLOCK_V"
    )
    axes.text(right, -TOKEN_TILES / 2, text, ha="left", va="center", fontsize=7.5)


def _statistics(axes: Any) -> None:
    for part in range(PARTS):
        left = part * TILES_PER_PART
        _box(axes, left + 1, -TOKEN_TILES - 1.3, 1, 0.6, LIVE if part == 1 else "white")
        axes.annotate(
            "",
            (left + 1.5, -TOKEN_TILES - 0.68),
            (left + 1.5, -TOKEN_TILES - 0.05),
            arrowprops={"arrowstyle": "->", "color": INK},
        )
        axes.annotate(
            "",
            (6, -TOKEN_TILES - 2.0),
            (left + 1.5, -TOKEN_TILES - 1.35),
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.7},
        )
    axes.text(
        -0.2,
        -TOKEN_TILES - 1.1,
        "max, sum of exp of\neach token and part",
        ha="right",
        va="center",
        fontsize=7.5,
    )
    axes.text(
        6,
        -TOKEN_TILES - 2.05,
        "combined in a fixed order: log-probabilities (N,), sums (S,)",
        ha="center",
        va="top",
    )


def _box(
    axes: Any, left: float, bottom: float, width: float, height: float, fill: str, edge: str = INK
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((left, bottom), width, height, facecolor=fill, edgecolor=edge, linewidth=0.8)
    )


if __name__ == "__main__":
    draw(Path(__file__).parent.parent / "kernels" / "tiling.svg")
