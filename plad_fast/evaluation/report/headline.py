"""The outcome of an evaluation in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Below this many held-out prompts a bootstrap interval is too narrow to conclude from.
MIN_PROMPTS = 20


def headline(metrics: Mapping[str, Any]) -> str:
    """What the last student has over the first, in plain words and no more than the data say.

    A difference counts only when its 95 % interval excludes zero (for a win rate: one half) and
    there are at least `MIN_PROMPTS` held-out prompts (with pairs, for the ranking; with
    comparisons, for the wins).
    """
    students = metrics["students"]
    new = students[-1]["name"]
    if not metrics["comparisons"]:
        return f"{new} was evaluated alone, so nothing can be said about a gain. " + _level(
            students[-1]
        )
    change = metrics["comparisons"][0]
    old = change["baseline"]
    if metrics["n_prompts"] < MIN_PROMPTS:
        return (
            f"With {metrics['n_prompts']} held-out prompts this run is too small to tell whether "
            f"{new} is better than {old}; use {MIN_PROMPTS} or more, better some hundreds."
        )
    sentences = [_opening(change, metrics["n_pair_prompts"]), *_evidence(metrics, change)]
    if len(students) > 2:
        # Some or all of the gain may be that of the stage before.
        before = next(c for c in metrics["comparisons"] if c["baseline"] == students[-2]["name"])
        sentences.append(_aside(before))
    return " ".join(sentences)


def p_text(p_value: float) -> str:
    """Such as "p = 0.012" or "p < 0.001"."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def verdict(interval: Mapping[str, float] | None, neutral: float) -> int:
    """1 or -1 where the interval lies above or below `neutral`, else 0."""
    if interval is None or interval["low"] <= neutral <= interval["high"]:
        return 0
    return 1 if interval["mean"] > neutral else -1


def pair_counts(metrics: Mapping[str, Any]) -> str:
    """Such as "60 pairs", or "60 pairs of 20 prompts" where some have several."""
    pairs, prompts = metrics["n_pairs"], metrics["n_pair_prompts"]
    return f"{pairs} pairs" + f" of {prompts} prompts" * (prompts < pairs)


def _opening(change: Mapping[str, Any], n_pair_prompts: int) -> str:
    new, old = change["candidate"], change["baseline"]
    answers = verdict(change["win_rate"], 0.5) if _decided(change) >= MIN_PROMPTS else 0
    ranking = verdict(change["ranking_accuracy"], 0.0) if n_pair_prompts >= MIN_PROMPTS else 0
    if answers > 0:
        return f"Distillation paid off: {new} answers better than {old}."
    if answers < 0:
        return f"Distillation did harm: {new} answers worse than {old}."
    if ranking < 0:
        return f"Distillation did harm: {new} prefers the teacher's answers less than {old}."
    if ranking > 0 and change["win_rate"] is None:
        return f"{new} learned to prefer the teacher's answers; its own answers were not compared."
    if ranking > 0:
        return (
            f"{new} learned to prefer the teacher's answers, but its own answers are not "
            f"measurably better than those of {old}."
        )
    return f"Distillation bought nothing measurable: {new} is no better than {old}."


def _decided(change: Mapping[str, Any]) -> int:
    """Prompts on which it is known who wins: a judge may have left some open."""
    wins = change["wins"]
    return 0 if wins is None else wins["wins"] + wins["ties"] + wins["losses"]


def _evidence(metrics: Mapping[str, Any], change: Mapping[str, Any]) -> list[str]:
    sentences = []
    wins = change["win_rate"]
    if wins is not None:
        sentences.append(
            f"On {_decided(change)} held-out prompts its answer wins {wins['mean']:.0%} of the "
            f"comparisons, a tie counting half ({_range(wins)}; even is 50%; sign test "
            f"{p_text(change['wins']['p_value'])}), judged by {metrics['score']}."
        )
    ranking = change["ranking_accuracy"]
    if ranking is not None:
        shares = {row["name"]: row["ranking_accuracy"] for row in metrics["students"]}
        new, old = (shares[change[key]]["mean"] for key in ("candidate", "baseline"))
        sentences.append(
            f"It gives the teacher's answer the higher probability in {new:.0%} of "
            f"{pair_counts(metrics)}, {change['baseline']} in {old:.0%} (difference "
            f"{100 * ranking['mean']:+.0f} points, 95% interval {100 * ranking['low']:+.0f} to "
            f"{100 * ranking['high']:+.0f})."
        )
    return sentences


def _aside(change: Mapping[str, Any]) -> str:
    wins = change["win_rate"]
    if wins is None:
        return ""
    words = {1: "more than half", 0: "no measurable difference", -1: "fewer than half"}
    return (
        f"Against {change['baseline']} it wins {wins['mean']:.0%} ({_range(wins)}): "
        f"{words[verdict(wins, 0.5)]}."
    )


def _range(interval: Mapping[str, float]) -> str:
    return f"95% interval {interval['low']:.0%} to {interval['high']:.0%}"


def _level(row: Mapping[str, Any]) -> str:
    parts = []
    if row["ranking_accuracy"] is not None:
        share = row["ranking_accuracy"]["mean"]
        parts.append(f"It prefers the teacher's answer in {share:.0%} of {row['n_pairs']} pairs.")
    if row["rougeL_teacher"] is not None:
        parts.append(f"ROUGE-L to the teacher's answer: {row['rougeL_teacher']['mean']:.3f}.")
    return " ".join(parts)
