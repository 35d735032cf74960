"""The three tiles above a report: wins, ranking, and length and repetition of the last student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from plad_fast.evaluation.report.tables import (
    NOTHING,
    bounds,
    difference,
    number,
    p_text,
    pair_counts,
    verdict,
)

# Below this many held-out prompts a bootstrap interval is too narrow to conclude from.
MIN_PROMPTS = 20


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
        f"four words stood before in the same answer ({', '.join(repeated)})."
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
