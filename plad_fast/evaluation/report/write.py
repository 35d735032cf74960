"""The files of an evaluation: metrics, plots and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.evaluation.compare import write_metrics
from plad_fast.evaluation.report.html import write_report
from plad_fast.evaluation.report.parts import draw_plots, example_answers, margin_unit

if TYPE_CHECKING:
    from plad_fast.evaluation.held_out import HeldOut
    from plad_fast.evaluation.students import StudentOutputs


def write_results(
    folder: Path,
    results: Mapping[str, Any],
    outputs: Sequence[StudentOutputs],
    held_out: HeldOut,
    *,
    title: str,
    config: Mapping[str, Any],
    length_normalization: float,
    trainings: Mapping[str, Path] | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    data: Mapping[str, Any] | None = None,
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write `metrics.json`, `plots/` and `report.html` into a folder.

    Args:
        folder: of the run.
        results, outputs: of `evaluate_models`.
        held_out: what the students were measured on.
        title: heading of the report.
        config: settings of the run; nested mappings are flattened to dotted names.
        length_normalization: alpha, for the unit of the margins.
        trainings: stage name -> folder of the model it made, for the training curves.
        stages: `{"name", "seconds", "summary"}` in order; the summary is text or a mapping.
        data: `findings`, lines on what to look at in the data, and `funnels`: name -> the steps of
            `PairReport.funnel`.
        command: what to type to run it again.
        versions: package -> version.

    Returns:
        The path of the report.
    """
    write_metrics(results, folder / "metrics.json")
    drawn = draw_plots(
        results,
        outputs,
        trainings or {},
        folder / "plots",
        length_normalization=length_normalization,
    )
    return write_report(
        folder / "report.html",
        title=title,
        config=config,
        stages=stages,
        metrics=results,
        data=data,
        plots=drawn,
        examples=example_answers(held_out, outputs),
        margin_unit=margin_unit(length_normalization),
        command=command,
        versions=versions,
    )
