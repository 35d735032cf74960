"""The tiles of a report claim no more than the intervals allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plad_fast.evaluation.compare import evaluate_students
from plad_fast.evaluation.report.tables import tiles
from plad_fast.evaluation.students import StudentOutputs
from tests.support.evaluations import SFT, evaluate, student


@pytest.mark.parametrize(
    ("first", "last", "wins", "ranking"),
    [
        ((0.0, 4), (3.0, 8), 1, 1),
        ((0.0, 8), (3.0, 4), -1, 1),
        ((0.0, 4), (3.0, 4), 0, 1),
        ((3.0, 4), (0.0, 4), 0, -1),
        ((0.0, 4), (0.0, 4), 0, 0),
    ],
)
def test_findings_are_what_the_intervals_allow(first, last, wins, ranking):
    students = [
        student(name, lead=lead, kept=kept)
        for name, (lead, kept) in zip("ab", (first, last), strict=True)
    ]
    of_wins, of_ranking, _ = tiles(evaluate(*students))
    words = ("No measurable difference", "b answers better than a", "b answers worse than a")
    assert of_wins.direction == wins
    assert of_wins.finding.startswith(words[wins])
    words = ("neither better nor worse than a", "more often than a", "less often than a")
    assert of_ranking.direction == ranking
    assert words[ranking] in of_ranking.finding


def test_length_and_repetition():
    loop = StudentOutputs("loop", dict.fromkeys(SFT.answers, "a b c d a b c d"))
    tile = tiles(evaluate(SFT, loop))[2]
    assert (tile.value, tile.direction) == ("8 words", -1)
    assert tile.finding == "Longer answers than those of SFT student, more repetition."
    assert "20% of its runs of four words" in tile.details
    assert tiles(evaluate(loop, SFT))[2].direction == 1


def test_a_handful_of_prompts_allows_no_conclusion():
    students = [student("a", lead=0.0, kept=4, n=5), student("b", lead=9.0, kept=9, n=5)]
    for tile in tiles(evaluate(*students)):
        assert (tile.finding[:27], tile.direction) == ("Too few prompts to tell: 5;", 0)


def test_many_pairs_of_a_handful_of_prompts_allow_no_conclusion():
    students = [student("a", lead=0.0, kept=4), student("b", lead=3.0, kept=4)]
    few = [replace(s, pair_prompts=[f"p{i % 8}" for i in range(40)]) for s in students]
    tile = tiles(evaluate(*few))[1]
    assert (tile.finding[:27], tile.direction) == ("Too few prompts to tell: 8;", 0)
    assert "Share of 40 pairs of 8 prompts" in tile.details


def test_a_handful_of_verdicts_allows_no_conclusion():
    """Of many prompts a judge decided few."""
    metrics = evaluate(*(student(name, lead=0.0, kept=kept) for name, kept in (("a", 4), ("b", 8))))
    metrics["comparisons"][0]["wins"] = {"wins": 5, "ties": 0, "losses": 0, "p_value": 0.0625}
    tile = tiles(metrics)[0]
    assert (tile.finding[:27], tile.direction) == ("Too few prompts to tell: 5;", 0)


def test_a_gain_of_the_stage_before_is_told_apart():
    """Both beat the untrained student; the last stage added nothing."""
    students = [
        student(name, lead=3.0, kept=kept) for name, kept in (("base", 2), ("SFT", 8), ("PLaD", 8))
    ]
    tile = tiles(evaluate(*students))[0]
    assert tile.finding == "PLaD answers better than base."
    assert tile.details.endswith(
        "Against SFT it wins 50% (95% interval 50% to 50%): no measurable difference."
    )


def test_one_student_is_compared_with_nobody():
    findings = [tile.finding for tile in tiles(evaluate(SFT))]
    assert findings[0] == "SFT student was evaluated alone."
    assert findings[1] == findings[2] == "There is no other student to compare with."


def test_what_was_not_measured_is_said():
    texts_only = StudentOutputs("texts", SFT.answers)
    pairs_only = replace(SFT, name="pairs", answers={})
    wins, ranking, _ = tiles(evaluate(SFT, texts_only))
    assert (ranking.value, ranking.finding) == ("\u2013", "There were no pairs to rank.")
    wins, _, texts = tiles(evaluate(SFT, pairs_only))
    assert (wins.value, texts.value) == ("\u2013", "\u2013")
    assert tiles(evaluate(texts_only, SFT))[1].finding == "texts ranked no pairs to compare with."
    metrics = evaluate_students([pairs_only, SFT], SFT.answers, n_resamples=20)
    assert tiles(metrics)[2].finding == "pairs wrote no answers to compare with."
