"""One HTML file that says what a distillation bought; it needs no network and no other file."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plad_fast.data.chat import written_out
from plad_fast.data.files import write_atomically
from plad_fast.errors import UsageError
from plad_fast.evaluation.report.headline import headline
from plad_fast.evaluation.report.page import PAGE, STYLE
from plad_fast.evaluation.report.results import calibration_section, results_section
from plad_fast.evaluation.report.tables import judge_line

__all__ = ["headline", "write_report"]

_LONG = 400  # characters of a prompt that are shown before it has to be unfolded
_SECRET = re.compile(
    r"api_?key(?!_env$)|secret|password|credential|(?:^|hub_|hf_|auth_|access_)token$",
    re.IGNORECASE,
)
_SECRET_OPTION = re.compile(
    r"(--[\w-]*(?:api[-_]?key|secret|password|credential|token)[=\s]+)\S+", re.IGNORECASE
)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    plots: Sequence[tuple[str, str | os.PathLike[str]]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
    margin_unit: str = "nat",
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of one distillation as a single HTML file.

    All text is escaped, and the page forbids itself scripts and requests. Values of `config` and
    options of `command` that are named like a key or a password are masked.

    Args:
        path: of the HTML file; it is complete or not there.
        title: heading of the page.
        config: settings of the run; nested mappings are flattened to dotted names.
        stages: `{"name", "seconds", "summary"}` in order; the summary is text or a mapping.
        data: `findings`, lines on what to look at in the data, and `funnels`: name -> the steps of
            `PairReport.funnel`.
        metrics: from `evaluation.evaluate_students`, or `held_out.evaluate_models`.
        plots: (caption, PNG file), embedded.
        examples: `{"prompt", "teacher", "students"}` and optionally "reference": texts, or chat
            messages for the prompt; "students" maps the name of each to its answer, in order.
        margin_unit: of the margins in `metrics`, such as "nat per token".
        command: what to type to run it again.
        versions: package -> version.

    Returns:
        `path`.

    Raises:
        UsageError: a plot that is missing or not a PNG file.
    """
    sections = [
        ("Check your data", _findings(data or {})),
        ("Results", results_section(metrics, margin_unit)),
        ("Judge", _judge(metrics.get("judge"))),
        ("Likelihood and quality", calibration_section(metrics.get("calibration"))),
        ("Plots", "".join(_figure(caption, file) for caption, file in plots)),
        ("Example answers", "".join(map(_example, examples))),
        ("What became of the prompts", _funnels(data or {})),
        ("How long it took", _stages(stages)),
        ("Run it again", _reproduce(command, versions or {})),
        ("Settings", _settings(config)),
    ]
    body = "".join(
        f'<section class="{name.split()[0].lower()}"><h2>{name}</h2>{content}</section>\n'
        for name, content in sections
        if content
    )
    page = PAGE.format(
        title=escape(title), style=STYLE, headline=escape(headline(metrics)), body=body
    )
    return write_atomically(path, page)


def _judge(summary: Mapping[str, Any] | None) -> str:
    return f"<p>{escape(judge_line(summary))}.</p>" if summary else ""


def _findings(data: Mapping[str, Any]) -> str:
    lines = "".join(f"<li>{escape(str(text))}</li>" for text in data.get("findings", ()))
    return f"<ul>{lines}</ul>" if lines else ""


def _funnels(data: Mapping[str, Any]) -> str:
    tables = ""
    for name, steps in data.get("funnels", {}).items():
        lines = "".join(
            f"<tr><th scope=row>{escape(step)}</th><td>{left}</td>"
            f"<td>{escape(', '.join(f'{n} {reason}' for reason, n in lost.items()))}</td></tr>"
            for step, left, lost in steps
        )
        tables += (
            f'<table class="stages"><caption>{escape(name)}</caption><thead><tr><th></th>'
            f"<th>left</th><th>dropped</th></tr></thead><tbody>{lines}</tbody></table>"
        )
    note = '<p class="note">dropped.jsonl beside the pairs holds every one with its reason.</p>'
    return tables + note if tables else ""


def _figure(caption: str, file: str | os.PathLike[str]) -> str:
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read the plot {file} ({error.strerror}); draw it first"
        ) from error
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UsageError(f"the plot {file} is not a PNG file; save it as PNG")
    width, height = struct.unpack(">II", data[16:24])
    text = escape(caption)
    return (
        f'<figure><img width="{width}" height="{height}" alt="{text}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _example(example: Mapping[str, Any]) -> str:
    prompt = _plain(example["prompt"])
    shown = f'<p class="text">{escape(prompt)}</p>'
    if len(prompt) > _LONG:
        shown = (
            f"<details><summary><span class=start>{escape(prompt[:_LONG])} […]</span></summary>"
            f'<p class="text">{escape(prompt)}</p></details>'
        )
    students = list(example.get("students", {}).items())
    # The colours are those of the plots: orange for the first student, blue for the last.
    kinds = ["student"] * len(students)
    kinds[:1], kinds[-1:] = ["first"], ["last"]
    shown_answers = [
        *[(key, key.title(), example.get(key)) for key in ("reference", "teacher")],
        *[(kind, name, text) for kind, (name, text) in zip(kinds, students, strict=False)],
    ]
    answers = "".join(
        f'<div class="{kind}"><h3>{escape(name)}</h3>'
        f'<p class="text">{escape(_plain(text))}</p></div>'
        for kind, name, text in shown_answers
        if text is not None
    )
    return f'<article><h3>Prompt</h3>{shown}<div class="answers">{answers}</div></article>'


def _plain(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return written_out(content)


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    lines = "".join(
        f"<tr><th scope=row>{escape(str(stage['name']))}</th><td>{_duration(stage['seconds'])}</td>"
        f"<td>{_summary(stage['summary'])}</td></tr>"
        for stage in stages
    )
    total = _duration(sum(stage["seconds"] for stage in stages))
    return (
        f'<table class="stages"><tbody>{lines}</tbody>'
        f"<tfoot><tr><th scope=row>total</th><td>{total}</td><td></td></tr></tfoot></table>"
    )


def _summary(summary: Any) -> str:
    if isinstance(summary, Mapping):
        return "; ".join(f"{escape(str(k))}: {escape(_setting(v))}" for k, v in summary.items())
    return escape(str(summary))


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _reproduce(command: str, versions: Mapping[str, str]) -> str:
    html = ""
    if command:
        masked = _SECRET_OPTION.sub(r"\1***", command)
        html += f"<pre>{escape(masked)}</pre>"
    if versions:
        listed = ", ".join(f"{escape(k)} {escape(str(v))}" for k, v in versions.items())
        html += f'<p class="note">Made with {listed}.</p>'
    return html


def _settings(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    lines = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(_setting(value))}</td></tr>"
        for name, value in _flatten(config)
    )
    return (
        "<details><summary>All settings of this run</summary>"
        f'<table class="settings"><tbody>{lines}</tbody></table></details>'
    )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        elif _SECRET.search(str(key)) and value:
            rows.append((f"{prefix}{key}", "***"))
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
