"""Plots of training and evaluation as small PNG files, legible at the width of a phone.

Every function draws into a file, and returns its path, or None where there is nothing to draw.
Colours are those of Okabe and Ito, which readers with any colour vision tell apart: the first
student is orange, the last one blue, the teacher grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from plad_fast.evaluation.metrics import FloatArray, margins
from plad_fast.evaluation.students import StudentOutputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Panel = TypeVar("_Panel")

_FIRST, _LAST, _TEACHER = "#E69F00", "#0072B2", "#555555"
_BETWEEN = ("#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_INK = "#333333"
_WIDTH = 5.0  # inches; shown 350 px wide on a phone, 10 pt is still 10 px high
_STYLE = Path(__file__).with_name("report.mplstyle")

# Title, axis label, and the name under which `PLaDTrainer` logs the value.
_CURVES = (
    ("loss", "loss [nat]", "loss"),
    ("pairs ranked right", "share of pairs", "ranking_accuracy"),
    ("teacher's lead over the student", "margin [nat]", "margin"),
    ("pairs that still push the model", "share of pairs", "active_pairs"),
)
# Key, title, axis label, and where a student would be that cannot tell.
_COMPARED = (
    ("ranking_accuracy", "Prefers the teacher's answer", "share of pairs (dotted: chance)", 0.5),
    ("rougeL_teacher", "Likeness to the teacher's answer", "ROUGE-L F-measure", None),
    ("rougeL_reference", "Likeness to the reference", "ROUGE-L F-measure", None),
)
_LONG = 20  # steps; longer curves are smoothed


def plot_training(stages: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path | None:
    """Curves over the optimizer steps of each training stage, smoothed where they are long.

    `stages` maps names to the trainer's `state.log_history`. What was logged is drawn: loss,
    ranking accuracy, margin, share of active pairs; dashed for `eval_...` values.
    """
    panels = [
        (stage, title, label, series)
        for stage, history in stages.items()
        for title, label, key in _CURVES
        if (series := _series(history, key))
    ]
    if not panels:
        return None
    last_of_stage = {stage: title for stage, title, _, _ in panels}.items()
    with _drawing(path, panels, lambda panel: 1.35) as drawn:
        for axis, (stage, title, label, series) in drawn:
            for name, (steps, values) in series.items():
                look: dict[str, Any] = {"color": _LAST, "label": "training"}
                if name == "eval":
                    look = {"color": _FIRST, "label": "held-out", "linestyle": "--", "marker": "o"}
                elif len(steps) < _LONG:
                    look["marker"] = "o"
                else:
                    axis.plot(steps, values, color=_LAST, alpha=0.25, linewidth=0.8)
                    values = _smoothed(values)
                axis.plot(steps, values, markersize=3.5, **look)
            axis.set_title(f"{stage}: {title}")
            axis.set_ylabel(label)
            if (stage, title) in last_of_stage:
                axis.set_xlabel(f"optimizer step of {stage}")
            axis.locator_params(axis="x", integer=True)
            if label == "share of pairs":
                axis.set_ylim(-0.03, 1.03)
            if len(series) > 1:
                axis.legend()
    return path


def plot_margins(
    students: Sequence[StudentOutputs], path: Path, *, unit: str = "nat"
) -> Path | None:
    """Histograms of the margins on the held-out pairs, one for each student that has pairs, in the
    order of training; `unit` is that of the log-probabilities."""
    colours = _colours([student.name for student in students])
    values = {
        student.name: margins(student.chosen_logps, student.rejected_logps)
        for student in students
        if len(student.pair_ids)
    }
    if not values:
        return None
    edges, panels = _edges(list(values.values())), list(values.items())
    with _drawing(path, panels, lambda panel: 1.5, sharex=True, sharey=True) as drawn:
        for axis, (name, vector) in drawn:
            axis.hist(
                np.clip(vector, edges[0], edges[-1]), bins=edges, color=colours[name], alpha=0.85
            )
            axis.axvline(0.0, color=_INK, linewidth=1)
            median = float(np.median(vector))
            axis.axvline(median, color=_INK, linewidth=1, linestyle=":")
            right = float(np.mean(np.sign(vector) + 1) / 2)
            axis.set_title(f"{name}: {right:.0%} right of zero, median {median:+.2f}")
            axis.set_ylabel("pairs")
            axis.locator_params(axis="y", integer=True)
        axis.set_xlabel(f"log p(teacher's answer) \u2212 log p(rejected answer)  [{unit}]")
    return path


def plot_comparison(metrics: Mapping[str, Any], path: Path) -> Path | None:
    """Dots with 95 % intervals: ranking accuracy and ROUGE-L of every student, and the teacher."""
    students = metrics["students"]
    colours = _colours([row["name"] for row in students])
    rows = [*students[::-1], metrics["teacher"]]  # drawn from the bottom up
    panels = [
        (title, label, dots, chance)
        for key, title, label, chance in _COMPARED
        if (dots := [(row["name"], row[key]) for row in rows if row[key] is not None])
    ]
    if not panels:
        return None
    with _drawing(path, panels, lambda panel: 0.75 + 0.27 * len(panel[2])) as drawn:
        for axis, (title, label, dots, chance) in drawn:
            for height, (name, interval) in enumerate(dots):
                axis.errorbar(
                    interval["mean"],
                    height,
                    xerr=_errors([interval]),
                    fmt="o",
                    color=colours.get(name, _TEACHER),
                    capsize=4,
                    elinewidth=2,
                    markersize=7,
                )
            if chance is not None:
                axis.axvline(chance, color=_INK, linewidth=1, linestyle=":")
                axis.set_xlim(-0.02, 1.02)
            axis.set_title(title)
            axis.set_yticks(range(len(dots)), [name for name, _ in dots])
            axis.set_ylim(-0.6, len(dots) - 0.4)
            axis.set_xlabel(f"{label}, with 95 % interval")
            axis.grid(axis="x")
    return path


def plot_reliability(calibration: Mapping[str, Any], path: Path) -> Path | None:
    """Mean quality of samples by their place among those of their prompt, one curve with 95 %
    intervals per student."""
    rows = calibration["students"]
    if not any(row["reliability"] for row in rows):
        return None
    colours = _colours([row["name"] for row in rows])
    with _drawing(path, [rows], lambda panel: 2.4) as drawn:
        ((axis, _),) = drawn
        for number, row in enumerate(rows):
            # Points at one place would hide each other's intervals.
            shift = 0.006 * (number - (len(rows) - 1) / 2)
            qualities = [b["quality"] for b in row["reliability"]]
            axis.errorbar(
                [(b["low"] + b["high"]) / 2 + shift for b in row["reliability"]],
                [quality["mean"] for quality in qualities],
                yerr=_errors(qualities),
                fmt="o-",
                color=colours[row["name"]],
                capsize=3,
                markersize=5,
                label=row["name"],
            )
        axis.set_title("Among the samples of a prompt")
        axis.set_xlabel("place by likelihood")
        axis.set_ylabel("mean quality")
        axis.grid(axis="y")
        axis.set_xlim(-0.02, 1.02)
        axis.set_xticks([0, 0.5, 1], ["least likely", "median", "likeliest"])
        axis.legend()
    return path


@contextmanager
def _drawing(
    path: Path,
    panels: Sequence[_Panel],
    height: Callable[[_Panel], float],
    **options: Any,
) -> Iterator[list[tuple[Axes, _Panel]]]:
    """Panels one above the other, of a height in inches each; written to `path` at the end."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.rc_context(fname=_STYLE):
        # Figure without pyplot: no window system, no global list of figures to leak into.
        heights = [height(panel) for panel in panels]
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.35), layout="constrained")
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights, **options)
        yield list(zip(axes[:, 0], panels, strict=True))
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Line art needs few colours; a palette makes the file three times smaller.
    Image.open(buffer).convert("RGB").quantize(64).save(path, format="PNG", optimize=True)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Name -> colour, of students in the order of training."""
    between = [_BETWEEN[index % len(_BETWEEN)] for index in range(max(0, len(names) - 2))]
    return dict(zip(names, [_FIRST, *between, _LAST] if len(names) > 1 else [_LAST], strict=True))


def _errors(intervals: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Lengths of the error bars, down and up."""
    return [
        [interval["mean"] - interval["low"] for interval in intervals],
        [interval["high"] - interval["mean"] for interval in intervals],
    ]


def _series(
    history: Sequence[Mapping[str, Any]], key: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values under "train" and under "eval", where there are any."""
    series = {}
    for name, logged in (("train", key), ("eval", f"eval_{key}")):
        entries = [entry for entry in history if logged in entry]
        if entries:
            series[name] = ([e["step"] for e in entries], [e[logged] for e in entries])
    return series


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running means over a tenth of the curve; towards its ends, over as much as is there."""
    widest = len(values) // 20
    means = []
    for place in range(len(values)):
        reach = min(widest, place, len(values) - 1 - place)
        means.append(float(np.mean(values[place - reach : place + reach + 1])))
    return means


def _edges(vectors: Sequence[FloatArray]) -> list[float]:
    """Edges of equal bars, one of them at zero.

    A few far outliers would squeeze all others into one bar, so they count in the outermost ones.
    """
    pooled = np.concatenate(vectors)
    n_bars = int(np.clip(2 * round((len(pooled) // len(vectors)) ** 0.5), 8, 40))
    low, high = np.quantile(pooled, [0.005, 0.995])
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / n_bars or 1.0
    first = int(np.floor(low / width))
    last = max(int(np.ceil(high / width)), first + 1)
    return [width * index for index in range(first, last + 1)]
