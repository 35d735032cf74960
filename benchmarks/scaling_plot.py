"""Picture of results/scaling.csv: memory of a GPU and pairs a second against the number of GPUs.

python -m benchmarks.scaling_plot [CSV] [PNG]
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.common import RESULTS
from benchmarks.scaling_count import GIB
from benchmarks.scaling_rates import H100, Assumptions

# Okabe and Ito's colours.
STYLE = {
    "DDP, float32": ("#000000", "o"),
    "DDP, bfloat16": ("#56B4E9", "X"),
    "DDP, LoRA": ("#009E73", "D"),
    "FSDP2, float32": ("#D55E00", "s"),
    "FSDP2, LoRA": ("#E69F00", "v"),
    "FSDP2, vocabulary-parallel": ("#0072B2", "^"),
}


def draw(source: Path, target: Path) -> None:
    """Writes a PNG.

    Raises:
        ValueError: the CSV has no rows of the GPU that is drawn.
    """
    with source.open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row.get("gpu") == H100.name and row["checkpointing"] == "1"
        ]
    if not rows:
        raise ValueError(f"{source} has no rows of the {H100.name}")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(2, len(models), figsize=(3.5 * len(models), 5.6), squeeze=False)
    usable = (H100.memory_bytes - Assumptions().reserve_bytes) / GIB
    for column, model in enumerate(models):
        of_model = [row for row in rows if row["model"] == model]
        axes[0][column].set_title(model, fontsize=9)
        axes[0][column].axhline(usable, color="0.6", ls="--", label=f"{usable:.0f} GiB usable")
        _panel(axes[0][column], of_model, "total_gib", "GiB of a GPU")
        fitting = [row for row in of_model if row["fits"] == "1"]
        _panel(axes[1][column], fitting, "pairs_per_s", "pairs a second, where it fits")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=8)
    facts = rows[0]
    figure.supxlabel(
        f"GPUs ({H100.name}); {facts['pairs_per_gpu']} pairs a GPU, checkpointing; counted work "
        "over assumed rates, never run",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(target, dpi=100)
    plt.close(figure)


def _panel(axis: Any, rows: Sequence[dict[str, str]], column: str, label: str) -> None:
    for name, (colour, marker) in STYLE.items():
        found = [row for row in rows if row["strategy"] == name]
        if found:
            gpus = [int(row["gpus"]) for row in found]
            values = [float(row[column]) for row in found]
            axis.plot(gpus, values, color=colour, marker=marker, ms=5, lw=1, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axis.set_ylabel(label, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_plot", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("csv", nargs="?", type=Path, default=RESULTS / "scaling.csv")
    parser.add_argument("png", nargs="?", type=Path, help="default: beside the CSV")
    args = parser.parse_args(argv)
    try:
        draw(args.csv, args.png or args.csv.with_suffix(".png"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
