"""Pictures of the CSVs of the step benchmarks.

python -m benchmarks.plot_step                     # results/step_cpu.csv: rates and memory
python -m benchmarks.plot_step --rates             # the same: pairs a second beside TRL's, README
python -m benchmarks.plot_step --satisfaction      # results/satisfaction_cpu.csv: step by step
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

# Okabe and Ito's colours, which people with any colour vision tell apart.
STYLE: dict[str, tuple[str, str]] = {
    "plad_fast": ("#D55E00", "plad_fast"),
    "plad_fast one pair": ("#F0E442", "plad_fast, one pair at a time"),
    "plad_fast padded": ("#E69F00", "plad_fast, padded"),
    "trl": ("#0072B2", "TRL, one pair at a time"),
    "trl batched": ("#56B4E9", "TRL, four at once"),
    "naive": ("#000000", "plain torch"),
}
TITLE = {
    "fixed": "prompt 256, responses 48",
    "dialogsum": "DialogSum, true lengths",
    "short-prompt": "prompt 32, responses 160",
}
COLUMNS = 3
RATES = {
    "fixed": "prompt 256,\nresponse 48",
    "dialogsum": "DialogSum,\nreal lengths",
    "short-prompt": "prompt 32,\nresponse 160",
}

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Raises ValueError where there is nothing to draw."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def draw_steps(source: Path, target: Path) -> None:
    """A pair of bars for each implementation, rate and peak memory; one panel per case."""
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in read(source):
        key = (row["kind"], row["dtype"], row["active"], row["checkpointing"])
        panels.setdefault(key, []).append(row)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    height = 2.1 * lines + 0.7
    figure, axes = plt.subplots(
        lines, 2 * columns, figsize=(4.3 * columns, height), squeeze=False, sharey=False
    )
    places = [(line, 2 * column) for line in range(lines) for column in range(columns)]
    for (line, column), (key, rows) in zip(places, panels.items(), strict=False):
        _panel(axes[line][column], axes[line][column + 1], key, rows)
    for line, column in places[len(panels) :]:
        axes[line][column].remove()
        axes[line][column + 1].remove()
    facts = next(iter(panels.values()))[0]
    seen = dict.fromkeys(row["impl"] for rows in panels.values() for row in rows)
    handles = [plt.Rectangle((0, 0), 1, 1, color=STYLE[name][0]) for name in seen]
    labels = [STYLE[name][1] for name in seen]
    figure.legend(handles, labels, loc="upper center", ncols=5, frameon=False, fontsize=8)
    figure.supxlabel(
        f"{facts['pairs_per_step']} pairs a step, AdamW included; whiskers: quartiles over steps; "
        f"{facts['device_model']}, threads: {facts['threads']}",
        fontsize=8,
    )
    figure.tight_layout(h_pad=2.2, rect=(0, 0, 1, 1 - 0.5 / height))
    _save(figure, target)


def _panel(rates: Any, memory: Any, key: tuple[str, ...], rows: list[Row]) -> None:
    kind, dtype, active, checkpointing = key
    places = range(len(rows))
    colours = [STYLE[row["impl"]][0] for row in rows]
    middle = [float(row["pairs_per_s"]) for row in rows]
    pairs = float(rows[0]["pairs_per_step"])
    # A slow step is a low rate: the quartiles change places. The rate over all steps may lie
    # outside of them where a few steps are much longer than the others.
    low = [max(0.0, m - pairs / float(row["q3_s"])) for m, row in zip(middle, rows, strict=True)]
    high = [max(0.0, pairs / float(row["q1_s"]) - m) for m, row in zip(middle, rows, strict=True)]
    rates.bar(places, middle, color=colours, yerr=(low, high), ecolor="0.45", capsize=2)
    memory.bar(places, [float(row["process_mib"]) / 1024 for row in rows], color=colours)
    for axis, label in ((rates, "pairs/s"), (memory, "peak, GiB")):
        axis.set_title(label, fontsize=7, loc="left", pad=2)
        axis.set_xticks([])
        axis.tick_params(labelsize=7)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    name = kind if rows[0]["quick"] == "True" else TITLE.get(kind, kind)
    facts = [dtype, f"{float(active):.0%} active"]
    facts += ["checkpointing"] if checkpointing == "True" else []
    title = rates.text(
        0, 1.17, f"{name}; {', '.join(facts)}",
        transform=rates.transAxes, fontsize=7.5, fontweight="bold",
    )  # fmt: skip
    title.set_in_layout(False)  # it stands over both axes


def draw_rates(source: Path, target: Path) -> None:
    """Pairs a second of TRL and of plad_fast in float32, every pair active, as labelled bars."""
    found: dict[str, dict[str, Row]] = {}
    for row in read(source):
        if (row["dtype"], float(row["active"]), row["checkpointing"]) == ("float32", 1.0, "False"):
            found.setdefault(row["kind"], {})[row["impl"]] = row
    kinds = [kind for kind in found if {"trl", "plad_fast"} <= found[kind].keys()]
    if not kinds:
        raise ValueError(f"{source} has no float32 rows of both trl and plad_fast")
    kinds.sort(key=lambda kind: float(found[kind]["plad_fast"]["ratio"]), reverse=True)
    figure, axis = plt.subplots(figsize=(6.4, 1.1 * len(kinds) + 1.7))
    for offset, name, label in ((-0.2, "trl", "TRL DPOTrainer"), (0.2, "plad_fast", "plad_fast")):
        rows = [found[kind][name] for kind in kinds]
        values = [float(row["pairs_per_s"]) for row in rows]
        places = [place + offset for place in range(len(kinds))]
        bars = axis.barh(places, values, height=0.38, color=STYLE[name][0], label=label)
        texts = [f"{value:.2f}" for value in values]
        if name == "plad_fast":
            texts = [
                f"{text}  ({float(row['ratio']):.1f}x)"
                for text, row in zip(texts, rows, strict=True)
            ]
        axis.bar_label(bars, texts, padding=4, fontsize=14)
    axis.set_yticks(range(len(kinds)), [RATES.get(kind, kind) for kind in kinds], fontsize=13)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.set_xlim(0, 1.35 * axis.get_xlim()[1])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle("Preference pairs a second (longer is better)", fontsize=14)
    axis.legend(fontsize=13, frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
    figure.supxlabel(
        f"SmolLM2-135M, all weights, float32; {rows[0]['device_model']}, "
        f"{rows[0]['threads']} CPU cores; no GPU",
        fontsize=11,
    )
    figure.tight_layout()
    _save(figure, target)


def draw_satisfaction(source: Path, target: Path) -> None:
    """Time of every step, and below it the shares of active pairs and of skipped backwards."""
    rows = read(source)
    steps = [int(row["step"]) for row in rows]
    figure, (times, shares) = plt.subplots(2, 1, figsize=(6.4, 4.2), sharex=True)
    milliseconds = [float(row["seconds"]) * 1e3 for row in rows]
    times.plot(steps, milliseconds, ".", color="0.7", markersize=4, label="a step")
    times.plot(
        steps, _running_median(milliseconds), color="#D55E00", label="median of 11 around it"
    )
    times.set_ylabel("ms", fontsize=8)
    # The first steps meet cold code; they would set the scale.
    times.set_ylim(0, 1.15 * max(milliseconds[2:] or milliseconds))
    lines = (("active_pairs", "#0072B2", "active pairs"),
             ("skipped_backwards", "#009E73", "skipped backwards"))  # fmt: skip
    for column, colour, label in lines:
        known = [(s, float(row[column])) for s, row in zip(steps, rows, strict=True) if row[column]]
        if known:
            shares.plot(*zip(*known, strict=True), color=colour, label=label, linewidth=1)
    shares.set_ylabel("share", fontsize=8)
    shares.set_ylim(-0.03, 1.03)
    shares.set_xlabel(f"step; {rows[0]['device_model']}, threads: {rows[0]['threads']}", fontsize=8)
    for axis in (times, shares):
        axis.legend(fontsize=8, frameon=False)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    _save(figure, target)


def _running_median(values: Sequence[float], reach: int = 5) -> list[float]:
    def middle(index: int) -> float:
        around = sorted(values[max(0, index - reach) : index + reach + 1])
        return around[len(around) // 2]

    return [middle(index) for index in range(len(values))]


def _save(figure: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_step", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("csv", nargs="?", type=Path, help="default: in benchmarks/results")
    parser.add_argument("png", nargs="?", type=Path, help="default: beside the CSV")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rates", action="store_true", help="one bar chart beside TRL")
    which.add_argument(
        "--satisfaction", action="store_true", help="of benchmarks.step_satisfaction"
    )
    args = parser.parse_args(argv)
    name, ending, draw = "step_cpu.csv", ".png", draw_steps
    if args.satisfaction:
        name, draw = "satisfaction_cpu.csv", draw_satisfaction
    elif args.rates:
        ending, draw = "_rates.png", draw_rates
    source = args.csv or RESULTS / name
    try:
        draw(source, args.png or source.with_name(source.stem + ending))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
