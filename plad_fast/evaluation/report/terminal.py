"""Comparison of students as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from plad_fast.evaluation.report.tables import judge_line, p_text, pair_counts

# Key, title, decimals.
_COLUMNS = (
    ("ranking_accuracy", "rank acc.", 3),
    ("margin", "margin", 2),
    ("rougeL_teacher", "R-L teacher", 3),
    ("rougeL_reference", "R-L reference", 3),
    ("mean_words", "words", 0),
    ("distinct_2", "dist-2", 2),
    ("repetition_4", "rep-4", 2),
)
_LEGEND = {
    "ranking_accuracy": "rank acc.: share of pairs in which the teacher's answer is the likelier",
    "distinct_2": "dist-2: different word pairs divided by all word pairs",
    "repetition_4": "rep-4: share of four-word runs that occurred earlier in the same answer",
}
_COMPARED = (
    ("ranking_accuracy", "ranking accuracy", 3),
    ("margin", "margin", 2),
    ("rougeL_teacher", "ROUGE-L to the teacher", 3),
    ("rougeL_reference", "ROUGE-L to the reference", 3),
    ("mean_words", "words", 1),
    ("repetition_4", "repetition", 3),
)
_CALIBRATION_COMPARED = (
    ("auroc_within", "better sample is likelier", 3),
    ("kendall_within", "Kendall, within prompts", 3),
)


def comparison_table(results: Mapping[str, Any]) -> str:
    """The result of `evaluate_students` as plain text for a terminal, at most 100 columns wide.

    A mean stands with half the width of its 95 % interval. Columns that nobody has a value for are
    left out. Below the table, the last student is compared with each one before it.
    """
    rows = [results["teacher"], *results["students"]]
    table = [["", *(_shorten(row["name"], 16) for row in rows)]]
    for key, title, decimals in _COLUMNS:
        if any(row[key] is not None for row in rows):
            table.append([title, *(_cell(row[key], decimals) for row in rows)])
    for number, column in enumerate(table):
        width = max(map(len, column))
        table[number] = [c.rjust(width) if number else c.ljust(width) for c in column]
    lines = ["  ".join(line).rstrip() for line in zip(*table, strict=True)]
    last = results["students"][-1]["name"]
    for entry in results["comparisons"]:
        if entry["candidate"] != last:
            continue
        lines += ["", f"{_shorten(last, 40)} compared with {_shorten(entry['baseline'], 40)}:"]
        lines += _changes(entry, _COMPARED)
        lines += _wins("win rate", entry)
        for name, scores in entry["scores"].items():
            lines += _wins(f"win rate, {name}", scores)
        for change in (results.get("calibration") or {}).get("comparisons", ()):
            if all(change[key] == entry[key] for key in ("candidate", "baseline")):
                lines += _changes(change, _CALIBRATION_COMPARED)
    counts = f"{results['n_prompts']} held-out prompts, {pair_counts(results)}"
    lines += ["", f"{counts}; 95 % intervals; wins: {_shorten(results['score'], 40)}"]
    if results.get("judge"):
        lines += textwrap.wrap(judge_line(results["judge"]), 100, subsequent_indent="  ")
    legend = [text for key, text in _LEGEND.items() if any(row[key] is not None for row in rows)]
    lines += textwrap.wrap("; ".join(legend), 100, subsequent_indent="  ")
    return "\n".join(lines)


def _changes(entry: Mapping[str, Any], measures: Sequence[tuple[str, str, int]]) -> list[str]:
    return [
        f"  {title:<26}{_bracket(entry[key], decimals, sign='+')}"
        for key, title, decimals in measures
        if entry[key] is not None
    ]


def _wins(title: str, scores: Mapping[str, Any]) -> list[str]:
    if scores["win_rate"] is None:
        return []
    counts = "{wins} won, {ties} tied, {losses} lost".format_map(scores["wins"])
    p_value = p_text(scores["wins"]["p_value"])
    rate = _bracket(scores["win_rate"], 3)
    return [f"  {_shorten(title, 25):<26}{rate}  {counts}, {p_value}"]


def _cell(value: Mapping[str, float] | float | None, decimals: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        half = (value["high"] - value["low"]) / 2
        return f"{value['mean']:.{decimals}f} ±{half:.{decimals}f}"
    return f"{value:.{decimals}f}"


def _bracket(value: Mapping[str, float], decimals: int, sign: str = "") -> str:
    mean, low, high = (f"{value[name]:{sign}.{decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean}  [{low}, {high}]"


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
