"""What a report shows of a run besides numbers: plots, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.evaluation.report import plots
from plad_fast.evaluation.report.plots import plot_reliability
from plad_fast.training.trained_folders import log_history

if TYPE_CHECKING:
    from plad_fast.evaluation.held_out import HeldOut
    from plad_fast.evaluation.students import StudentOutputs


def draw_plots(
    results: Mapping[str, Any],
    outputs: Sequence[StudentOutputs],
    trainings: Mapping[str, Path],
    folder: Path,
    *,
    length_normalization: float,
) -> list[tuple[str, Path]]:
    """PNG files of a run, with their captions.

    Args:
        results, outputs: of `evaluate_models`.
        trainings: stage name -> folder of the model it made.
        folder: for the files.
        length_normalization: alpha, for the unit of the axis.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        (
            "Held-out results with 95 % intervals.",
            plots.plot_comparison(results, folder / "comparison.png"),
        ),
        (
            "How far each student puts the teacher's answer above the rejected one.",
            plots.plot_margins(
                outputs, folder / "margins.png", unit=margin_unit(length_normalization)
            ),
        ),
    ]
    if results.get("calibration"):
        caption = (
            "Reliability: mean quality of a student's samples from the least likely to the "
            "likeliest, with 95 % intervals. Of a calibrated student it rises."
        )
        drawn.append(
            (caption, plot_reliability(results["calibration"], folder / "reliability.png"))
        )
    logs = {name: log for name, path in trainings.items() if (log := log_history(path))}
    if logs:
        caption = "What the trainings logged."
        drawn.append((caption, plots.plot_training(logs, folder / "training.png")))
    return drawn


def margin_unit(length_normalization: float) -> str:
    """Of s(y) / |y|**alpha."""
    named = {0.0: "nat", 1.0: "nat per token"}
    return named.get(length_normalization, f"nat per token^{length_normalization:g}")


def example_answers(
    held_out: HeldOut, students: Sequence[StudentOutputs], count: int = 8
) -> list[dict[str, Any]]:
    """Prompt, teacher's and students' answers side by side, for the report."""
    return [
        {
            "prompt": prompt.content,
            "teacher": held_out.teacher_answers[prompt.id],
            "students": {student.name: student.answers[prompt.id] for student in students},
            **({} if prompt.reference is None else {"reference": prompt.reference}),
        }
        for prompt in held_out.prompts[:count]
    ]
