"""Tables of a report: measures of every student, who wins, and calibration; and the three tiles
above them: wins, ranking, and length and repetition of the last student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

PERCENT = -1
"""In place of a number of decimals."""
NOTHING = "\u2013"
"""In place of a value that there is none of."""

# Below this many held-out prompts a bootstrap interval is too narrow to conclude from.
MIN_PROMPTS = 20


class _Measure(NamedTuple):
    key: str
    label: str
    decimals: int
    better: int = 1
    """1 where more is better, -1 where less is, 0 where neither."""


_MEASURES = (
    _Measure("ranking_accuracy", "Prefers the teacher's answer", PERCENT),
    _Measure("own_ranking_accuracy", "Prefers it to its own answer", PERCENT),
    _Measure("margin", "Margin", 2),
    _Measure("rouge1_teacher", "ROUGE-1 to the teacher", 3),
    _Measure("rouge2_teacher", "ROUGE-2 to the teacher", 3),
    _Measure("rougeL_teacher", "ROUGE-L to the teacher", 3),
    _Measure("rouge1_reference", "ROUGE-1 to the reference", 3),
    _Measure("rouge2_reference", "ROUGE-2 to the reference", 3),
    _Measure("rougeL_reference", "ROUGE-L to the reference", 3),
    _Measure("score", "Score", 3),
    _Measure("mean_words", "Words in an answer", 1, 0),
    _Measure("distinct_1", "Distinct words", 3),
    _Measure("distinct_2", "Distinct word pairs", 3),
    _Measure("repetition_4", "Repetition", 3, -1),
)
_CALIBRATION = (
    _Measure("auroc_within", "Better of two samples is likelier", PERCENT),
    _Measure("spearman_within", "Spearman", 2),
    _Measure("kendall_within", "Kendall", 2),
    _Measure("likeliest_gain", "Gain by taking the likeliest", 3),
    _Measure("auroc_teacher", "Teacher's answer is likelier", PERCENT),
    _Measure("mean_quality", "Quality of a sample", 3),
)


class Cell(NamedTuple):
    text: str
    small: str = ""
    kind: str = ""
    """up or down for a change for the better or the worse, same for neither."""


class Table(NamedTuple):
    """Measures down, students across, and in the last column what changed."""

    names: list[str]
    change: Mapping[str, Any] | None
    rows: list[tuple[str, list[Cell]]]


def measures_table(metrics: Mapping[str, Any], margin_unit: str) -> Table:
    """The measures in the result of `evaluate_students`."""
    systems = [metrics["teacher"], *metrics["students"]]
    change = metrics["comparisons"][0] if metrics["comparisons"] else None
    lines: list[tuple[_Measure, list[Any], Any]] = []
    for measure in _MEASURES:
        values = [row.get("intervals", {}).get(measure.key) or row[measure.key] for row in systems]
        if measure.key == "score":
            copies = ("rougeL_teacher", "rougeL_reference")
            if any(all(row["score"] == row[key] for row in systems) for key in copies):
                continue
            measure = measure._replace(label=f"Score: {metrics['scored_by']}")
        elif measure.key == "margin":
            measure = measure._replace(label=f"Margin [{margin_unit}]")
        lines.append((measure, values, change and change.get(measure.key)))
    for name in metrics["scorers"]:
        values = [row["scores"][name]["score"] for row in systems]
        gain = change and change["scores"][name]["difference"]
        lines.append((_Measure("", f"Score: {name}", 3), values, gain))
    return _table([row["name"] for row in systems], lines, change)


def calibration_table(calibration: Mapping[str, Any]) -> Table:
    """The result of `evaluate_calibration`."""
    students = calibration["students"]
    change = calibration["comparisons"][0] if calibration["comparisons"] else None
    lines = [
        (measure, [row[measure.key] for row in students], change and change.get(measure.key))
        for measure in _CALIBRATION
    ]
    return _table([row["name"] for row in students], lines, change)


def wins_tables(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, list[Cell]]]]]:
    """By whom wins are judged, and who won against whom: the last student against all before, and
    each student against the teacher."""
    last = metrics["students"][-1]["name"]
    against = [entry for entry in metrics["comparisons"] if entry["candidate"] == last]
    tables = []
    for judged_by, scorer in ((metrics["score"], None), *((n, n) for n in metrics["scorers"])):
        lines = []
        for name, other, entry, suffix in (
            *((last, entry["baseline"], entry, "") for entry in against),
            *((row["name"], "the teacher", row, "_teacher") for row in metrics["students"]),
        ):
            found = entry if scorer is None else entry["scores"][scorer]
            rate, wins = found[f"win_rate{suffix}"], found[f"wins{suffix}"]
            if rate is not None:
                counts = "\u2009/\u2009".join(str(wins[k]) for k in ("wins", "ties", "losses"))
                share = _marked(rate, 0.5, number(rate["mean"]), bounds(rate))
                lines.append((name, other, [share, Cell(counts), Cell(p_text(wins["p_value"]))]))
        if lines:
            tables.append((judged_by, lines))
    return tables


def judge_line(summary: Mapping[str, Any]) -> str:
    """What became of a judge's comparisons and what they cost, of `Judge.summary`."""
    kinds = (
        ("ties", "ties"),
        ("order_dependent", "of them changed with the order of the answers"),
        ("unparsable", "of them without a verdict that could be read"),
        ("failed", "could not be had"),
    )
    counts = [f"{summary[key]} {text}" for key, text in kinds if summary[key] or key == "ties"]
    tokens = summary["prompt_tokens"] + summary["answer_tokens"]
    cost = "" if summary["cost"] is None else f", cost {summary['cost']:.4f}"
    return (
        f"judge: {summary['comparisons']} comparisons, {', '.join(counts)}; "
        f"{summary['verdicts']} verdicts by {tokens:,} tokens{cost}"
    )


def number(value: float, decimals: int = PERCENT, signed: bool = False) -> str:
    """With a minus sign as wide as a plus."""
    kind = ".0%" if decimals == PERCENT else f".{decimals}f"
    return format(value, f"{'+' * signed}{kind}").replace("-", "\u2212")


def bounds(interval: Mapping[str, float]) -> str:
    """Such as "53% to 71%"."""
    return f"{number(interval['low'])} to {number(interval['high'])}"


def difference(interval: Mapping[str, float], decimals: int = PERCENT) -> tuple[str, str]:
    """Such as "+12 pts" and "+3 to +21": percentages differ by percentage points."""
    mean, low, high = (number(interval[k], decimals, signed=True) for k in ("mean", "low", "high"))
    return mean.replace("%", " pts"), f"{low} to {high}".replace("%", "")


def verdict(interval: Mapping[str, float] | None, neutral: float) -> int:
    """1 or -1 where the interval lies above or below `neutral`, else 0."""
    if interval is None or interval["low"] <= neutral <= interval["high"]:
        return 0
    return 1 if interval["mean"] > neutral else -1


def p_text(p_value: float) -> str:
    """Such as "p = 0.012" or "p < 0.001"."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def pair_counts(metrics: Mapping[str, Any]) -> str:
    """Such as "60 pairs", or "60 pairs of 20 prompts" where some have several."""
    pairs, prompts = metrics["n_pairs"], metrics["n_pair_prompts"]
    return f"{pairs} pairs" + f" of {prompts} prompts" * (prompts < pairs)


def _table(
    names: list[str],
    lines: Iterable[tuple[_Measure, Sequence[Any], Mapping[str, float] | None]],
    change: Mapping[str, Any] | None,
) -> Table:
    rows = []
    for measure, values, gain in lines:
        if any(value is not None for value in values):
            cells = [_cell(value, measure.decimals) for value in values]
            if change is not None and gain is None:
                cells.append(Cell(NOTHING))
            elif gain is not None:
                cells.append(
                    _marked(gain, 0.0, *difference(gain, measure.decimals), measure.better)
                )
            rows.append((measure.label, cells))
    return Table(names, change, rows)


def _cell(value: Mapping[str, float] | float | None, decimals: int) -> Cell:
    if value is None:
        return Cell(NOTHING)
    if not isinstance(value, Mapping):
        return Cell(number(value, decimals))
    half = (value["high"] - value["low"]) / 2
    return Cell(number(value["mean"], decimals), f"±{number(half, decimals)}")


def _marked(
    interval: Mapping[str, float], neutral: float, text: str, small: str, better: int = 1
) -> Cell:
    """With an arrow where the interval excludes `neutral`."""
    direction = verdict(interval, neutral)
    kind = ("same", "up", "down")[direction * better]
    return Cell(("", "▲ ", "▼ ")[direction] + text, small, kind)


class Tile(NamedTuple):
    title: str
    value: str
    finding: str
    details: str
    direction: int = 0
    """1 for a gain, -1 for a loss, 0 for neither."""


def tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    """What the last student has over the first, and no more than the data say.

    A difference counts only when its 95 % interval excludes zero (for a win rate: one half) and
    there are at least `MIN_PROMPTS` held-out prompts (with pairs, for the ranking; with
    comparisons, for the wins).
    """
    change = metrics["comparisons"][0] if metrics["comparisons"] else None
    return [_wins(metrics, change), _ranking(metrics, change), _texts(metrics, change)]


def _wins(metrics: Mapping[str, Any], change: Mapping[str, Any] | None) -> Tile:
    students = metrics["students"]
    if change is None:
        return Tile("Wins", NOTHING, f"{students[-1]['name']} was evaluated alone.", "")
    if change["win_rate"] is None:
        return Tile("Wins", NOTHING, "The students' own answers were not compared.", "")
    new, old, rate, wins = (change[k] for k in ("candidate", "baseline", "win_rate", "wins"))
    # A judge may have left some prompts open.
    n = wins["wins"] + wins["ties"] + wins["losses"]
    share = number(rate["mean"])
    finding, direction = _finding(
        rate,
        0.5,
        n,
        f"{new} answers better than {old}.",
        f"{new} answers worse than {old}.",
        f"No measurable difference between the answers of {new} and {old}.",
    )
    details = (
        f"Share of {n} held-out prompts on which its answer is the better one, a tie counting half "
        f"({_interval(rate)}; even is 50%; sign test {p_text(wins['p_value'])}), judged by "
        f"{metrics['score']}."
    )
    if len(students) > 2:
        # Some or all of the gain may be that of the stage before.
        previous = students[-2]["name"]
        rate = next(c["win_rate"] for c in metrics["comparisons"] if c["baseline"] == previous)
        if rate is not None:
            words = ("fewer than half", "no measurable difference", "more than half")
            details += (
                f" Against {previous} it wins {number(rate['mean'])} ({_interval(rate)}): "
                f"{words[verdict(rate, 0.5) + 1]}."
            )
    return Tile("Wins", share, finding, details, direction)


def _ranking(metrics: Mapping[str, Any], change: Mapping[str, Any] | None) -> Tile:
    row = metrics["students"][-1]
    title = "Ranking"
    if row["ranking_accuracy"] is None:
        return Tile(title, NOTHING, "There were no pairs to rank.", "")
    value = number(row["ranking_accuracy"]["mean"])
    details = (
        f"Share of {pair_counts(metrics)} in which it gives the teacher's answer a higher "
        f"probability than the rejected one ({_interval(row['ranking_accuracy'])})"
    )
    if change is None or (gain := change["ranking_accuracy"]) is None:
        return Tile(title, value, _alone(change, "ranked no pairs"), f"{details}.")
    new, old = change["candidate"], change["baseline"]
    finding, direction = _finding(
        gain,
        0.0,
        metrics["n_pair_prompts"],
        f"{new} prefers the teacher's answers more often than {old}.",
        f"{new} prefers the teacher's answers less often than {old}.",
        f"{new} ranks measurably neither better nor worse than {old}.",
    )
    before = next(r for r in metrics["students"] if r["name"] == old)["ranking_accuracy"]["mean"]
    points, ends = difference(gain)
    details += f"; {old}: {number(before)}, a change of {points} ({ends})."
    return Tile(title, value, finding, details, direction)


def _texts(metrics: Mapping[str, Any], change: Mapping[str, Any] | None) -> Tile:
    title, row = "Length and repetition", metrics["students"][-1]
    if row["mean_words"] is None:
        return Tile(title, NOTHING, "It wrote no answers.", "")
    others = [metrics["teacher"], *(r for r in metrics["students"][:1] if r is not row)]
    words = [f"{r['name']}: {r['mean_words']:.0f}" for r in others if r["mean_words"] is not None]
    repeated = [f"{r['name']}: {number(r['repetition_4'])}" for r in others if r["n"]]
    details = (
        f"Words in an answer ({', '.join(words)}). {number(row['repetition_4'])} of its runs of "
        f"four words occurred earlier in the same answer ({', '.join(repeated)})."
    )
    finding, direction = _alone(change, "wrote no answers"), 0
    if change is not None and change["mean_words"] is not None:
        old = change["baseline"]
        finding, _ = _finding(
            change["mean_words"],
            0.0,
            metrics["n_prompts"],
            f"Longer answers than those of {old}",
            f"Shorter answers than those of {old}",
            f"Answers about as long as those of {old}",
        )
        if metrics["n_prompts"] >= MIN_PROMPTS:
            direction = -verdict(change["repetition_4"], 0.0)
            more = ("more repetition", "no measurable change in repetition", "less repetition")
            finding += f", {more[direction + 1]}."
    return Tile(title, f"{row['mean_words']:.0f} words", finding, details, direction)


def _alone(change: Mapping[str, Any] | None, lack: str) -> str:
    """Why there is no comparison: what the other student lacks, or that there is none."""
    if change is None:
        return "There is no other student to compare with."
    return f"{change['baseline']} {lack} to compare with."


def _finding(
    interval: Mapping[str, float], neutral: float, n: int, above: str, below: str, neither: str
) -> tuple[str, int]:
    """The sentence that the interval allows, and its direction."""
    if n < MIN_PROMPTS:
        few = f"Too few prompts to tell: {n}; use {MIN_PROMPTS} or more, better some hundreds."
        return few, 0
    direction = verdict(interval, neutral)
    return (below, neither, above)[direction + 1], direction


def _interval(interval: Mapping[str, float]) -> str:
    return f"95% interval {bounds(interval)}"
