"""The files of an evaluation: metrics, plots, and an HTML report that needs no network and no
other file."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from plad_fast.data.chat import written_out
from plad_fast.data.files import write_atomically
from plad_fast.data.records import flattened
from plad_fast.evaluation.compare import write_metrics
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.report.plots import (
    plot_comparison,
    plot_margins,
    plot_reliability,
    plot_training,
)
from plad_fast.evaluation.report.tables import (
    calibration_table,
    judge_line,
    measures_table,
    pair_counts,
    tiles,
    wins_tables,
)
from plad_fast.evaluation.students import StudentOutputs
from plad_fast.training.trained_folders import log_history

_EXAMPLES = 8
_EXTREMES = 2
"""Of them, of the biggest wins and of the biggest losses each."""
_SECRET = re.compile(
    r"api_?key(?!_env$)|secret|password|credential|(?:^|\.|hub_|hf_|auth_|access_)token$",
    re.IGNORECASE,
)
_SECRET_OPTION = re.compile(
    r"(--[\w-]*(?:api[-_]?key|secret|password|credential|token)[=\s]+)\S+", re.IGNORECASE
)


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
        page: what else `write_report` takes.

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
    logs = {name: log for name, path in trainings.items() if (log := log_history(path))}
    drawn = {
        "Held-out results with 95 % intervals.": plot_comparison(
            results, folder / "comparison.png"
        ),
        "How far each student puts the teacher's answer above the rejected one.": plot_margins(
            outputs, folder / "margins.png", unit=unit
        ),
        "Reliability: mean quality of a student's samples from the least likely to the likeliest, "
        "with 95 % intervals. For a calibrated student it rises.": plot_reliability(
            results.get("calibration") or {"students": ()}, folder / "reliability.png"
        ),
        "Training logs; long curves are smoothed over the faint values.": plot_training(
            logs, folder / "training.png"
        ),
    }
    return [(caption, file) for caption, file in drawn.items() if file is not None]


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


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]] = (),
    data: Mapping[str, Any] | None = None,
    about: str = "",
    validations: Sequence[tuple[str, Sequence[Sequence[str]]]] = (),
    plots: Sequence[tuple[str, str | os.PathLike[str]]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
    margin_unit: str = "nat",
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of one run as a single HTML file.

    All text is escaped, and the page forbids itself scripts and requests. Values of `config` and
    options of `command` that are named like a key or a password are masked.

    Args:
        path: of the HTML file; it is complete or not there.
        title: heading of the page.
        config: settings of the run; nested mappings are flattened to dotted names.
        metrics: from `evaluate_students` or `evaluate_models`.
        stages: `{"name", "seconds", "summary"}` in order; the summary is text or a mapping.
        data: `findings`, lines on what to look at in the data, and `funnels`: name -> the steps of
            `PairReport.funnel`.
        about: how the students came about, in a sentence or two.
        validations: what was kept of each preference training, and why, and the table behind it:
            a line of titles, then lines of values.
        plots: (caption, PNG file), embedded.
        examples: `{"prompt", "teacher", "students"}` and optionally `reference`, `badge` (won, tied
            or lost), `group` (a heading) and `cut_off` (names of students): texts, or chat messages
            for the prompt; `students` maps the name of each to its answer, in order.
        margin_unit: of the margins in `metrics`, such as "nat per token".
        command: what to type to run it again.
        versions: package -> version.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "setting": _setting, "plain": _plain}
    calibration = metrics.get("calibration")
    page = environment.get_template("report.html.j2").render(
        title=title,
        metrics=metrics,
        tiles=tiles(metrics),
        data={"findings": (), "funnels": {}, **(data or {})},
        about=about,
        validations=validations,
        table=measures_table(metrics, margin_unit),
        pair_counts=pair_counts(metrics),
        wins=wins_tables(metrics),
        judge=judge_line(metrics["judge"]) if metrics.get("judge") else None,
        calibration=calibration,
        calibration_table=calibration and calibration_table(calibration),
        plots=[(caption, *_image(file)) for caption, file in plots],
        examples=[{"badge": None, "group": None, "cut_off": (), **e} for e in examples],
        stages=stages,
        command=_SECRET_OPTION.sub(r"\1***", command),
        versions=versions or {},
        settings=[
            (name, "***" if value and _SECRET.search(name) else value)
            for name, value in flattened(config).items()
        ],
    )
    return write_atomically(path, page)


def _image(file: str | os.PathLike[str]) -> tuple[int, int, str]:
    """Width, height and content of a PNG file."""
    data = Path(file).read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return width, height, base64.b64encode(data).decode()


def _plain(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else written_out(content)


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
