"""Picture of the CSV of `benchmarks.loss`: time against peak memory, one panel per head and dtype.

python -m benchmarks.plot [CSV] [PNG]
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

from benchmarks.common import RESULTS

# Okabe and Ito's colours, which people with any colour vision tell apart; ours are filled.
STYLE: dict[str, tuple[str, str]] = {
    "one-pass": ("#D55E00", "o"),
    "op": ("#E69F00", "s"),
    "naive": ("#000000", "X"),
    "trl": ("#0072B2", "^"),
    "liger": ("#009E73", "D"),
    "cut-cross-entropy": ("#CC79A7", "v"),
    "torch-lce": ("#56B4E9", "P"),
}
LABEL = {
    "one-pass": "plad_fast, one pass",
    "op": "plad_fast, op",
    "naive": "plain torch",
    "trl": "TRL",
    "liger": "Liger",
    "cut-cross-entropy": "cut-cross-entropy",
    "torch-lce": "torch linear_cross_entropy",
}
FLOOR = "3 products"

Row = dict[str, str]


def read(path: Path, share: float) -> dict[tuple[str, ...], list[Row]]:
    """Rows of one active share, by panel."""
    panels: dict[tuple[str, ...], list[Row]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if float(row["active"]) == share:
                key = row["tokens"], row["hidden"], row["vocab"], row["dtype"]
                panels.setdefault(key, []).append(row)
    return panels


def draw(source: Path, target: Path, share: float) -> None:
    """Writes a PNG.

    Raises:
        ValueError: the CSV has no row with this active share.
    """
    panels = read(source, share)
    if not panels:
        raise ValueError(f"{source} has no rows with an active share of {share}")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.1 * rows + 0.6), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (key, found) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, key, found)
    handles = {
        label: handle
        for axis in axes.flat[: len(panels)]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="upper center", ncols=4, frameon=False, fontsize=8
    )
    facts = next(iter(panels.values()))[0]
    figure.supxlabel(
        f"lower left is better; hinge loss, {share:.0%} of pairs active, forward + backward; "
        f"{facts['device_model']}, CPU threads: {facts['threads']}",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / (3.1 * rows + 0.6)))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _panel(axis: Any, key: tuple[str, ...], rows: list[Row]) -> None:
    tokens, hidden, vocab, dtype = key
    for row in rows:
        name = row["impl"]
        if name in STYLE and row["extra_mib"]:
            colour, marker = STYLE[name]
            seconds = [float(row[column]) / 1e3 for column in ("q1_ms", "median_ms", "q3_ms")]
            memory = float(row["extra_mib"])
            axis.plot(seconds[::2], [memory] * 2, color=colour, linewidth=1)
            axis.plot(
                seconds[1], memory, marker, color=colour, markersize=8, label=LABEL[name], ls=""
            )
        elif name == FLOOR:
            axis.axvline(
                float(row["median_ms"]) / 1e3, color="0.6", ls=":", label="three bare products"
            )
    axis.axhline(
        float(rows[0]["gradients_mib"]), color="0.6", ls="--", label="size of the gradients"
    )
    axis.set_title(f"{tokens} tokens x {hidden}, vocabulary {vocab}, {dtype}", fontsize=9)
    axis.set_xlabel("seconds", fontsize=8)
    axis.set_ylabel("peak extra memory, MiB", fontsize=8)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("csv", nargs="?", type=Path, default=RESULTS / "loss_cpu.csv")
    parser.add_argument("png", nargs="?", type=Path, help="default: beside the CSV")
    parser.add_argument("--active", type=float, default=0.5, help="share of active pairs to draw")
    args = parser.parse_args(argv)
    try:
        draw(args.csv, args.png or args.csv.with_suffix(".png"), args.active)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
