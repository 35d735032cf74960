"""Pairs as files with what was dropped beside them, and what is said of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast._recipe_data import read_jsonl, write_jsonl
from plad_fast.data_checks import (
    Finding,
    check_answers,
    check_drops,
    check_rows,
    data_block,
    require_learnable,
)
from plad_fast.pairs import PairReport

if TYPE_CHECKING:
    from plad_fast.evaluation import StudentOutputs


def dropped_file(pairs: Path) -> Path:
    """Where the records lie of what is missing from a file of pairs: dropped.jsonl beside it."""
    rest = pairs.name.removeprefix("pairs").removeprefix("train")
    return pairs.with_name(f"dropped{'' if rest.startswith(('.', '-')) else '-'}{rest}")


def write_pairs(path: Path, rows: Sequence[Mapping[str, Any]], report: PairReport) -> None:
    """The rows, and beside them what was dropped and why."""
    write_jsonl(dropped_file(path), report.drops)
    if rows:
        write_jsonl(path, rows)


def funnel_line(report: PairReport) -> str:
    """Such as "9 prompts > 8 answered (1 missing) > 8 finished > 8 paired > 7 kept (1 close)"."""
    steps = []
    for name, left, lost in report.funnel():
        why = f" ({', '.join(f'{count} {reason}' for reason, count in lost.items())})"
        steps.append(f"{left} {name}{why if lost else ''}")
    return " > ".join(steps)


def show_pairs(
    rows: Sequence[Mapping[str, Any]],
    report: PairReport,
    file: Path,
    what: str = "pairs",
    *,
    for_training: bool = True,
) -> None:
    """Prints the funnel, where to see what was dropped, and what to look at.

    Args:
        rows, report: of `build_pairs`.
        file: that the rows are in.
        what: they are called.
        for_training: see `check_rows`.

    Raises:
        UsageError: nothing can be learned from the rows.
    """
    where = f"; {dropped_file(file)} has what was dropped" if report.drops else ""
    name = "" if what == "pairs" else f"{what}: "
    print(f"   {name}{funnel_line(report)}{where}", flush=True)
    findings = check_rows(rows, what, for_training=for_training)
    findings += check_drops(report.drops, report.total, report.unit)
    show_findings(findings)
    require_learnable(findings, "give more or other prompts, or another teacher")


def show_findings(findings: Sequence[Finding | str]) -> None:
    """Prints what to look at, if there is anything."""
    if findings:
        print(data_block(findings), flush=True)


def check_students(students: Sequence[StudentOutputs]) -> list[Finding]:
    """Findings on what students answered to the held-out prompts."""
    return [
        finding
        for student in students
        for finding in check_answers(list(student.answers.values()), f"answers of {student.name}")
    ]


def data_of_run(
    files: Mapping[str, Path],
    *,
    unit: str,
    teacher: Sequence[str] = (),
    students: Sequence[StudentOutputs] = (),
) -> dict[str, Any]:
    """For the report, from what a run has stored: `funnels` by name, and `findings` as text.

    Args:
        files: name -> file of pairs; one without a record of what was dropped has no funnel.
        unit: of `PairReport`, of what is trained on.
        teacher: its finished answers.
        students: what they answered.
    """
    findings = check_answers(teacher, "teacher's answers")
    funnels = {}
    for name, file in files.items():
        rows, dropped = read_jsonl(file), dropped_file(file)
        if dropped.exists():
            # Held-out pairs are one of each prompt, whatever is trained on.
            kind = "prompts" if file.stem == "held-out" else unit
            report = PairReport.of_rows(len(rows), read_jsonl(dropped), unit=kind)
            funnels[name] = report.funnel()
            findings += check_drops(report.drops, report.total, f"{kind} ({name})")
        findings += check_rows(rows, name)
    findings += check_students(students)
    return {"funnels": funnels, "findings": list(dict.fromkeys(map(str, findings)))}
