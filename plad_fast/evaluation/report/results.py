"""The tables of the report: measures of every student, who wins, and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from plad_fast.evaluation.report.headline import p_text, pair_counts, verdict


class _Line(NamedTuple):
    key: str
    label: str
    decimals: int | str
    """Percentages are marked by "%"."""
    better: int = 1
    """1 where more is better, -1 where less is, 0 where neither."""


_MEASURES = (
    _Line("ranking_accuracy", "Prefers the teacher's answer", "%"),
    _Line("own_ranking_accuracy", "Prefers it to its own answer", "%"),
    _Line("margin", "Margin", 2),
    _Line("rouge1_teacher", "ROUGE-1 to the teacher", 3),
    _Line("rouge2_teacher", "ROUGE-2 to the teacher", 3),
    _Line("rougeL_teacher", "ROUGE-L to the teacher", 3),
    _Line("rouge1_reference", "ROUGE-1 to the reference", 3),
    _Line("rouge2_reference", "ROUGE-2 to the reference", 3),
    _Line("rougeL_reference", "ROUGE-L to the reference", 3),
    _Line("score", "Score", 3),
    _Line("mean_words", "Words in an answer", 1, 0),
    _Line("distinct_1", "Distinct words", 3),
    _Line("distinct_2", "Distinct word pairs", 3),
    _Line("repetition_4", "Repetition", 3, -1),
)
_CALIBRATION = (
    _Line("auroc_within", "Better of two samples is likelier", "%"),
    _Line("spearman_within", "Spearman, within prompts", 2),
    _Line("kendall_within", "Kendall, within prompts", 2),
    _Line("likeliest_gain", "Gain by taking the likeliest", 3),
    _Line("auroc_teacher", "Teacher's answer is likelier", "%"),
    _Line("auroc_pooled", "Better of any two is likelier", "%"),
    _Line("spearman_pooled", "Spearman, all samples", 2),
    _Line("kendall_pooled", "Kendall, all samples", 2),
    _Line("mean_quality", "Quality of a sample", 3),
)
_NONE = "<td>&ndash;</td>"


def results_section(metrics: Mapping[str, Any], margin_unit: str) -> str:
    """HTML of the measures and the wins in the result of `evaluate_students`."""
    rows = [metrics["teacher"], *metrics["students"]]
    change = metrics["comparisons"][0] if metrics["comparisons"] else None
    lines = []
    for line in _MEASURES:
        if line.key == "score" and _is_rouge_l(rows):
            continue
        if line.key == "margin":
            line = line._replace(label=f"{line.label} [{escape(margin_unit)}]")
        if line.key == "score":
            line = line._replace(label=f"Score: {escape(metrics['scored_by'])}")
        shown = [row.get("intervals", {}).get(line.key) or row[line.key] for row in rows]
        lines.append((line, shown, change and change.get(line.key)))
    for name in metrics["scorers"]:
        values = [row["scores"][name]["score"] for row in rows]
        difference = change and change["scores"][name]["difference"]
        lines.append((_Line("", f"Score: {escape(name)}", 3), values, difference))
    return (
        _wins(metrics)
        + _table([row["name"] for row in rows], lines, change)
        + f'<p class="note">{metrics["n_prompts"]} held-out prompts, {pair_counts(metrics)}; '
        "± is half of the 95% bootstrap interval, drawn by prompt; ▲ and ▼ mark a change whose "
        "interval excludes no change. <b>Margin</b>: log-probability of the teacher's answer minus "
        f"that of the rejected one. {_own_pairs(metrics)}"
        "<b>Distinct</b>: different words (word pairs) divided by all of them, over all answers. "
        "<b>Repetition</b>: share of four-word runs that came before in the same answer.</p>"
    )


def calibration_section(calibration: Mapping[str, Any] | None) -> str:
    """HTML of the result of `evaluate_calibration`, or nothing."""
    if calibration is None:
        return ""
    rows = calibration["students"]
    change = calibration["comparisons"][0] if calibration["comparisons"] else None
    lines = [
        (line, [row[line.key] for row in rows], change and change.get(line.key))
        for line in _CALIBRATION
    ]
    counts = "; ".join(
        f"{escape(row['name'])}: {row['n_samples']} samples, {row['n_ranked']} of "
        f"{row['n_prompts']} prompts can be ranked"
        + (f", {row['n_unfinished']} samples left out as unfinished" * bool(row["n_unfinished"]))
        for row in rows
    )
    return (
        _table([row["name"] for row in rows], lines, change)
        + '<p class="note">Does a student hold its better answers for likelier? It samples '
        f"{calibration['samples']} answers to each prompt; likelihood is its log-probability per "
        f"token, quality is {escape(calibration['quality'])}. Of a student that cannot tell, "
        "percentages are 50% and the other measures but the last one 0. Intervals are over "
        f"prompts, not over samples. {counts}.</p>"
    )


def _table(
    names: Sequence[str],
    lines: Sequence[tuple[_Line, Sequence[Any], Mapping[str, float] | None]],
    change: Mapping[str, Any] | None,
) -> str:
    """Measures down, students across, and in the last column what changed."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in names)
    if change is not None:
        last, first = escape(change["candidate"]), escape(change["baseline"])
        head += f"<th scope=col>Change <small>{last} &minus; {first}</small></th>"
    body = ""
    for line, values, difference in lines:
        if all(value is None for value in values):
            continue
        cells = "".join(f"<td>{_value(value, line.decimals)}</td>" for value in values)
        if change is not None:
            cells += _change(difference, line)
        body += f"<tr><th scope=row>{line.label}</th>{cells}</tr>"
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _wins(metrics: Mapping[str, Any]) -> str:
    """Who wins against whom: the last student against all before, and each against the teacher."""
    last = metrics["students"][-1]["name"]
    against = [c for c in metrics["comparisons"] if c["candidate"] == last]
    body = ""
    for judged_by, scorer in ((metrics["score"], None), *((n, n) for n in metrics["scorers"])):
        shown = ""
        for entry in against:
            found = entry if scorer is None else entry["scores"][scorer]
            shown += _win_line(last, entry["baseline"], found["win_rate"], found["wins"])
        for row in metrics["students"]:
            found = row if scorer is None else row["scores"][scorer]
            rate, wins = found["win_rate_teacher"], found["wins_teacher"]
            shown += _win_line(row["name"], "the teacher", rate, wins)
        if shown:
            title = f"<th scope=rowgroup colspan=4>Judged by {escape(judged_by)}</th>"
            body += f"<tbody><tr>{title}</tr>{shown}</tbody>"
    if not body:
        return ""
    return (
        '<div class="scroll"><table class="numbers wins"><thead><tr><th scope=col>Whose answer is '
        "better</th><th scope=col>Wins</th><th scope=col>Won, tied, lost</th>"
        f"<th scope=col>Sign test</th></tr></thead>{body}</table></div>"
        '<p class="note"><b>Wins</b>: share of the prompts, a tie counting half, with its 95% '
        "bootstrap interval; even is 50%. <b>Sign test</b>: how probable so lopsided a result "
        "would be by chance, ties left out.</p>"
    )


def _win_line(
    name: str, other: str, rate: Mapping[str, float] | None, wins: Mapping[str, float] | None
) -> str:
    if rate is None or wins is None:
        return ""
    kind, mark = _verdict(rate, 0.5, 1)
    share, low, high = (_number(rate[key], "%") for key in ("mean", "low", "high"))
    counts = "&thinsp;/&thinsp;".join(str(wins[key]) for key in ("wins", "ties", "losses"))
    return (
        f"<tr><th scope=row>{escape(name)} <small>against {escape(other)}</small></th>"
        f'<td class="{kind}">{mark}{share}<small>{low} to {high}</small></td>'
        f"<td>{counts}</td><td>{escape(p_text(wins['p_value']))}</td></tr>"
    )


def _own_pairs(metrics: Mapping[str, Any]) -> str:
    """Over how many pairs students were compared with their own answers, where not over all."""
    counts = [
        f"{row['n_own_pairs']} for {escape(row['name'])}"
        for row in metrics["students"]
        if 0 < row["n_own_pairs"] < row["n_pairs"]
    ]
    if not counts:
        return ""
    return f"<b>Its own answer</b>: over the pairs for which it finished one, {', '.join(counts)}. "


def _is_rouge_l(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the score repeats a line of the table."""
    return any(
        all(row["score"] == row[key] for row in rows)
        for key in ("rougeL_teacher", "rougeL_reference")
    )


def _value(value: Mapping[str, float] | float | None, decimals: int | str) -> str:
    if value is None:
        return "&ndash;"
    if not isinstance(value, Mapping):
        return _number(value, decimals)
    half = _number((value["high"] - value["low"]) / 2, decimals)
    return f"{_number(value['mean'], decimals)}<small>±{half}</small>"


def _change(value: Mapping[str, float] | None, line: _Line) -> str:
    """A signed difference; that of two percentages is in percentage points."""
    if value is None:
        return _NONE
    mean, low, high = (_number(value[key], line.decimals, True) for key in ("mean", "low", "high"))
    if line.decimals == "%":
        mean, low, high = mean.replace("%", " pts"), low.replace("%", ""), high.replace("%", "")
    kind, mark = _verdict(value, 0.0, line.better)
    return f'<td class="{kind}">{mark}{mean}<small>{low} to {high}</small></td>'


def _verdict(value: Mapping[str, float], neutral: float, better: int) -> tuple[str, str]:
    """Class of the cell, by which it gets its colour, and arrow."""
    direction = verdict(value, neutral)
    kind = {1: "up", -1: "down", 0: "same"}[direction * better]
    return kind, {1: "▲ ", -1: "▼ ", 0: ""}[direction]


def _number(value: float, decimals: int | str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{value:{sign}.0%}" if decimals == "%" else f"{value:{sign}.{decimals}f}"
    return text.replace("-", "&minus;")
