"""The files of an evaluation: metrics, plots and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.evaluation.compare import write_metrics
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.report.page import write_report
from plad_fast.evaluation.report.plots import (
    plot_comparison,
    plot_margins,
    plot_reliability,
    plot_training,
)
from plad_fast.evaluation.students import StudentOutputs
from plad_fast.training.trained_folders import log_history

_EXAMPLES = 8
_EXTREMES = 2
"""Of them, of the biggest wins and of the biggest losses each."""


def write_results(
    folder: Path,
    results: Mapping[str, Any],
    outputs: Sequence[StudentOutputs],
    held_out: HeldOut,
    *,
    length_normalization: float,
    trainings: Mapping[str, Path] | None = None,
    **page: Any,
) -> Path:
    """Write `metrics.json`, `plots/` and `report.html` into a folder.

    Args:
        folder: of the run.
        results, outputs: of `evaluate_models`.
        held_out: what the students were measured on.
        length_normalization: alpha, for the unit of the margins.
        trainings: stage name -> folder of the model it made, for the training curves.
        page: title, config, stages, data, about, validations, command and versions, see
            `write_report`.

    Returns:
        The path of the report.
    """
    unit = margin_unit(length_normalization)
    write_metrics(results, folder / "metrics.json")
    return write_report(
        folder / "report.html",
        metrics=results,
        plots=draw_plots(results, outputs, trainings or {}, folder / "plots", unit=unit),
        examples=example_answers(held_out, outputs, results),
        margin_unit=unit,
        **page,
    )


def draw_plots(
    results: Mapping[str, Any],
    outputs: Sequence[StudentOutputs],
    trainings: Mapping[str, Path],
    folder: Path,
    *,
    unit: str,
) -> list[tuple[str, Path]]:
    """Draw a run's plots as PNG files and return them with their captions; see `write_results`."""
    drawn = {
        "Held-out results with 95 % intervals.": plot_comparison(
            results, folder / "comparison.png"
        ),
        "How far each student puts the teacher's answer above the rejected one.": plot_margins(
            outputs, folder / "margins.png", unit=unit
        ),
    }
    calibration = results.get("calibration")
    if calibration and any(row["reliability"] for row in calibration["students"]):
        caption = (
            "Reliability: mean quality of a student's samples from the least likely to the "
            "likeliest, with 95 % intervals. For a calibrated student it rises."
        )
        drawn[caption] = plot_reliability(calibration, folder / "reliability.png")
    if logs := {name: log for name, path in trainings.items() if (log := log_history(path))}:
        caption = "Training logs; long curves are smoothed over the faint values."
        drawn[caption] = plot_training(logs, folder / "training.png")
    return list(drawn.items())


def margin_unit(length_normalization: float) -> str:
    """The unit of s(y) / |y|**alpha."""
    named = {0.0: "nat", 1.0: "nat per token"}
    return named.get(length_normalization, f"nat per token^{length_normalization:g}")


def example_answers(
    held_out: HeldOut, outputs: Sequence[StudentOutputs], results: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Prompts with the teacher's and the students' answers, for `write_report`.

    The prompts that the last student won and lost by most, then the first of the others.
    """
    by_prompt = results["by_prompt"]
    badges = {1.0: "won", 0.5: "tied", 0.0: "lost"}

    def largest(outcome: float, sign: int) -> list[str]:
        found = {k: e["difference"] or 0.0 for k, e in by_prompt.items() if e["outcome"] == outcome}
        return sorted(found, key=lambda key: sign * found[key])[:_EXTREMES]

    groups = {"Biggest wins": largest(1.0, -1), "Biggest losses": largest(0.0, 1)}
    taken = {key for keys in groups.values() for key in keys}
    others = [prompt.id for prompt in held_out.prompts if prompt.id not in taken]
    groups["Other prompts" if taken else ""] = others[: _EXAMPLES - len(taken)]
    prompts = {prompt.id: prompt for prompt in held_out.prompts}
    return [
        {
            "group": group,
            "badge": badges.get(by_prompt.get(key, {}).get("outcome")),
            "prompt": prompts[key].written,
            "reference": prompts[key].reference,
            "teacher": held_out.teacher_answers[key],
            "students": {student.name: student.answers[key] for student in outputs},
            "cut_off": [student.name for student in outputs if key in student.cut_off],
        }
        for group, keys in groups.items()
        for key in keys
    ]
