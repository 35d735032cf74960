"""Reliability curves of students, in the colours of the other plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.errors import UsageError
from plad_fast.plots import FAINT, INK, colours_of, drawing


def plot_reliability(calibration: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Mean quality of samples of like log-probability, one curve with 95 % intervals per student.

    Above by the place of a sample among those of its prompt, below by its log-probability.

    Args:
        calibration: from `calibration.evaluate_calibration`; `quality`, if there, names the axis.
        path: of the PNG file to write.

    Returns:
        `path`.

    Raises:
        UsageError: there is no curve, or matplotlib is not installed.
    """
    rows = calibration["students"]
    colours = colours_of([row["name"] for row in rows])
    panels = [
        (by, title, label)
        for by, title, label in (
            ("rank", "Among the samples of a prompt", "place by likelihood"),
            ("quantile", "Among all samples", "log-probability [nat per token]"),
        )
        if any(row["reliability"][by] for row in rows)
    ]
    if not panels:
        raise UsageError("no student has samples to draw; sample two or more answers to a prompt")
    with drawing(path, [2.4] * len(panels)) as axes:
        for axis, (by, title, label) in zip(axes, panels, strict=True):
            for number, row in enumerate(rows):
                curve = row["reliability"][by]
                # Points at one place would hide each other's intervals.
                shift = 0.0 if by == "quantile" else 0.006 * (number - (len(rows) - 1) / 2)
                drawn = [b for b in curve if b["quality"] is not None]
                places = [_place(b, by) + shift for b in drawn]
                axis.errorbar(
                    places,
                    [b["quality"]["mean"] for b in drawn],
                    yerr=_errors(drawn),
                    fmt="o-",
                    color=colours[row["name"]],
                    capsize=3,
                    linewidth=1.6,
                    markersize=5,
                    label=row["name"],
                )
            axis.set_title(title)
            axis.set_xlabel(label)
            axis.set_ylabel("mean quality")
            axis.grid(axis="y", color=FAINT, linewidth=0.6)
            axis.set_axisbelow(True)
            if by == "rank":
                axis.set_xlim(-0.02, 1.02)
                axis.set_xticks([0, 0.5, 1], ["least likely", "median", "likeliest"])
                axis.tick_params(axis="x", labelcolor=INK)
        axes[0].legend()
    return Path(path)


def _place(point: Mapping[str, Any], by: str) -> float:
    return (point["low"] + point["high"]) / 2 if by == "rank" else point["logp"]


def _errors(points: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    intervals = [point["quality"] for point in points]
    return [
        [interval["mean"] - interval["low"] for interval in intervals],
        [interval["high"] - interval["mean"] for interval in intervals],
    ]
