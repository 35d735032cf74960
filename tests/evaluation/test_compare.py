"""The comparison of students that is computed from their answers and scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from plad_fast.errors import UsageError
from plad_fast.evaluation.compare import evaluate_students, write_metrics
from plad_fast.evaluation.students import StudentOutputs

TEACHER = {"p1": "the cat sat", "p2": "dogs run fast"}
IDS = ["p1", "p2"]


def sft(**changes):
    fields = {
        "name": "SFT",
        "answers": {"p1": "a dog", "p2": "dogs run"},
        "chosen_logps": [-3.0, -2.0],
        "rejected_logps": [-2.0, -2.0],
        "pair_ids": IDS,
    }
    return StudentOutputs(**{**fields, **changes})


def plad(**changes):
    fields = {
        "name": "PLaD",
        "answers": {"p1": "the cat sat", "p2": "dogs run"},
        "chosen_logps": [-1.0, -2.0],
        "rejected_logps": [-3.0, -5.0],
    }
    return sft(**{**fields, **changes})


def test_evaluation_by_hand():
    results = evaluate_students([sft(), plad()], TEACHER)
    first, last = results["students"]
    assert (first["ranking_accuracy"]["mean"], last["ranking_accuracy"]["mean"]) == (0.25, 1.0)
    assert (first["margin"]["mean"], last["margin"]["mean"]) == (-0.5, 2.5)
    # "dogs run" against "dogs run fast": precision 1, recall 2/3.
    assert first["rougeL_teacher"]["mean"] == pytest.approx((0.0 + 0.8) / 2)
    assert last["rougeL_teacher"]["mean"] == pytest.approx((1.0 + 0.8) / 2)
    assert (first["mean_words"], last["mean_words"]) == (2.0, 2.5)
    assert first["win_rate_teacher"] is None
    assert first["rougeL_reference"] is None
    (change,) = results["comparisons"]
    assert (change["candidate"], change["baseline"]) == ("PLaD", "SFT")
    assert change["ranking_accuracy"]["mean"] == 0.75
    assert change["margin"]["mean"] == 3.0
    assert change["rougeL_teacher"]["mean"] == pytest.approx(0.5)
    assert change["win_rate"]["mean"] == 0.75  # a win and a tie
    assert results["by_prompt"] == {
        "p1": {"outcome": 1.0, "difference": 1.0},
        "p2": {"outcome": 0.5, "difference": 0.0},
    }
    assert results["score"] == "ROUGE-L to the teacher's answer"


def test_the_teacher_is_not_measured_against_itself():
    alone = evaluate_students([sft()], TEACHER)["teacher"]
    assert alone["rougeL_teacher"] is None
    assert alone["score"] is None
    assert alone["mean_words"] == 3.0
    references = {"p1": "the cat sat", "p2": "no words shared"}
    results = evaluate_students([plad()], TEACHER, references)
    assert results["teacher"]["rougeL_reference"]["mean"] == 0.5
    assert results["teacher"]["score"]["mean"] == 0.5
    assert results["students"][0]["win_rate_teacher"]["mean"] == 0.5


@pytest.mark.parametrize("none", [None, "", " "])
def test_some_references(none):
    """Where one is missing, or blank, the teacher's answer takes its place in the score."""
    results = evaluate_students([sft()], TEACHER, {"p1": "a dog", "p2": none})
    row = results["students"][0]
    assert results["n_references"] == 1
    assert row["rougeL_reference"]["mean"] == 1.0
    assert row["score"]["mean"] == pytest.approx((1.0 + 0.8) / 2)
    assert results["teacher"]["score"] is None


class Scorer:
    """Counts a letter; what it was asked is kept."""

    def __init__(self, letter, nan=()):
        self.letter, self.nan, self.asked = letter, nan, []

    def score(self, items):
        self.asked.append([(prompt.id, prompt.content, prompt.reference, t) for prompt, t in items])
        return [float("nan") if t in self.nan else t.count(self.letter) for _, t in items]


def test_scorers_stand_beside_the_score_that_decides():
    scorers = {"a's": Scorer("a"), "s's": Scorer("s", nan=("the cat sat",))}
    results = evaluate_students(
        [sft(), plad()], TEACHER, {"p1": "r"}, scorers=scorers, prompts={"p1": "q1", "p2": "q2"}
    )
    # One call for all systems: a scorer may rate a text by the others to the same prompt.
    assert scorers["a's"].asked == [
        [
            ("p1", "q1", "r", "the cat sat"),
            ("p1", "q1", "r", "a dog"),
            ("p1", "q1", "r", "the cat sat"),
            ("p2", "q2", None, "dogs run fast"),
            ("p2", "q2", None, "dogs run"),
            ("p2", "q2", None, "dogs run"),
        ]
    ]
    assert results["scorers"] == ["a's", "s's"]
    assert results["score"] == results["scored_by"]  # ROUGE-L still decides
    teacher = results["teacher"]["scores"]
    first, last = (row["scores"]["a's"] for row in results["students"])
    assert teacher["a's"]["score"]["mean"] == (2 + 1) / 2
    assert (first["score"]["mean"], last["score"]["mean"]) == ((1 + 0) / 2, (2 + 0) / 2)
    assert (first["win_rate_teacher"]["mean"], last["win_rate_teacher"]["mean"]) == (0.0, 0.25)
    assert last["wins_teacher"] == {"wins": 0, "ties": 1, "losses": 1, "p_value": 1.0}
    (change,) = results["comparisons"]
    assert change["scores"]["a's"]["difference"]["mean"] == 0.5
    assert change["scores"]["a's"]["win_rate"]["mean"] == 0.75
    assert change["scores"]["a's"]["wins"] == {"wins": 1, "ties": 1, "losses": 0, "p_value": 1.0}
    # What could not be rated is left out of its comparisons, and of nothing else.
    assert change["scores"]["s's"]["wins"] == {"wins": 0, "ties": 1, "losses": 0, "p_value": 1.0}
    assert teacher["s's"]["score"]["mean"] == 2.0
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_a_student_may_be_called_teacher():
    options = {"scorers": {"a's": Scorer("a")}, "prompts": TEACHER}
    named, other = (
        evaluate_students([sft(name=name), plad()], TEACHER, **options)
        for name in ("teacher", "SFT")
    )
    assert named["teacher"]["scores"] == other["teacher"]["scores"]
    assert named["students"][0]["scores"] == other["students"][0]["scores"]


class Few:
    def score(self, items):
        return [1.0]


class Judge:
    name = "a judge"

    def __init__(self, verdict):
        self.verdict, self.asked = verdict, []

    def compare(self, items):
        self.asked += [(prompt.content, a, b) for prompt, a, b in items]
        return [self.verdict(a, b) for _, a, b in items]


def test_a_judge_decides_the_wins():
    judge = Judge(lambda a, b: 1.0 if len(a) < len(b) else 0.0)
    results = evaluate_students(
        [sft(), plad()], TEACHER, judge=judge, prompts={"p1": "q1", "p2": "q2"}
    )
    assert results["score"] == "a judge"
    assert results["scored_by"] == "ROUGE-L to the teacher's answer"
    # Equal texts are a tie that nobody is asked about.
    assert sorted(judge.asked) == [
        ("q1", "a dog", "the cat sat"),
        ("q1", "the cat sat", "a dog"),
        ("q2", "dogs run", "dogs run fast"),
        ("q2", "dogs run", "dogs run fast"),
    ]
    first, last = results["students"]
    assert first["wins_teacher"] == {"wins": 2, "ties": 0, "losses": 0, "p_value": 0.5}
    assert last["wins_teacher"] == {"wins": 1, "ties": 1, "losses": 0, "p_value": 1.0}
    (change,) = results["comparisons"]
    assert change["wins"] == {"wins": 0, "ties": 1, "losses": 1, "p_value": 1.0}
    assert change["win_rate"]["mean"] == 0.25
    assert change["score"]["mean"] > 0  # by the score it is the other way round


def test_what_a_judge_cannot_decide_is_left_out():
    judge = Judge(lambda a, b: None if a == "a dog" else 0.0)
    results = evaluate_students([plad(), sft()], TEACHER, judge=judge, prompts=TEACHER)
    assert [e["outcome"] for e in results["by_prompt"].values()] == [None, 0.5]
    row = results["students"][1]
    assert row["wins_teacher"] == {"wins": 0, "ties": 0, "losses": 1, "p_value": 1.0}


def test_length_and_repetition_have_intervals():
    loop = sft(name="loop", answers={"p1": "a b c d a b c d", "p2": "dogs run fast"})
    results = evaluate_students([sft(), loop], TEACHER)
    row = results["students"][1]
    assert row["intervals"]["mean_words"]["mean"] == row["mean_words"] == 5.5
    assert row["intervals"]["repetition_4"]["mean"] == row["repetition_4"] == pytest.approx(0.1)
    assert row["intervals"]["mean_words"]["low"] == 3.0
    (change,) = results["comparisons"]
    assert change["mean_words"]["mean"] == 3.5
    assert (change["mean_words"]["low"], change["mean_words"]["high"]) == (1.0, 6.0)
    assert change["repetition_4"]["mean"] == pytest.approx(0.1)


def test_texts_or_pairs_may_be_missing():
    texts_only = sft(chosen_logps=[], rejected_logps=[], pair_ids=[])
    pairs_only = plad(answers={}, own_rejected_logps=[-1.0, -9.0])
    results = evaluate_students([texts_only, pairs_only], TEACHER)
    assert results["students"][0]["ranking_accuracy"] is None
    assert results["students"][1]["own_ranking_accuracy"]["mean"] == 0.75
    assert results["students"][1]["mean_words"] is None
    change = results["comparisons"][0]
    assert change["margin"] is None
    assert change["win_rate"] is None


def test_pairs_without_an_own_answer_are_left_out_of_that_metric_alone():
    nan = float("nan")
    row, none = evaluate_students(
        [sft(own_rejected_logps=[nan, -9.0]), plad(own_rejected_logps=[nan, nan])], TEACHER
    )["students"]
    assert (row["own_ranking_accuracy"]["mean"], row["n_own_pairs"], row["n_pairs"]) == (1.0, 1, 2)
    assert row["ranking_accuracy"]["mean"] == 0.25
    assert (none["own_ranking_accuracy"], none["n_own_pairs"]) == (None, 0)


def test_pairs_of_one_prompt_are_no_independent_evidence():
    """Each pair three times: the same means and intervals as once, over three times the pairs."""

    def times(student, count):
        logps = {
            name: np.tile(getattr(student, name), count)
            for name in ("chosen_logps", "rejected_logps", "own_rejected_logps")
        }
        ids = [f"{key} {k}" for k in range(count) for key in IDS]
        return StudentOutputs(
            student.name, student.answers, pair_ids=ids, pair_prompts=IDS * count, **logps
        )

    pair = sft(own_rejected_logps=[-4.0, -1.0]), plad(own_rejected_logps=[-4.0, float("nan")])
    once, thrice = (
        evaluate_students([times(student, count) for student in pair], TEACHER) for count in (1, 3)
    )
    assert [once[f"n_{key}"] for key in ("prompts", "pairs", "pair_prompts")] == [2, 2, 2]
    assert [thrice[f"n_{key}"] for key in ("prompts", "pairs", "pair_prompts")] == [2, 6, 2]
    for mine, theirs in zip(
        [*once["students"], *once["comparisons"]],
        [*thrice["students"], *thrice["comparisons"]],
        strict=True,
    ):
        for name in ("ranking_accuracy", "margin", "own_ranking_accuracy"):
            if mine.get(name):
                assert theirs[name] == pytest.approx(mine[name])


def test_last_against_first_comes_first():
    students = [sft(name=name) for name in ("a", "b", "c")]
    couples = [
        (entry["candidate"], entry["baseline"])
        for entry in evaluate_students(students, TEACHER)["comparisons"]
    ]
    assert couples == [("c", "a"), ("c", "b"), ("b", "a")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate_students([], TEACHER), "no student"),
        (lambda: evaluate_students([sft()], {}), "teacher_answers is empty"),
        (lambda: evaluate_students([sft(), sft()], TEACHER), "different names"),
        (
            lambda: evaluate_students([sft(answers={"p2": ""})], TEACHER),
            "no answer to 1 of 2 prompts, the first is p1",
        ),
        (
            lambda: evaluate_students([sft(), plad(pair_ids=["p2", "p1"])], TEACHER),
            "scored on other pairs",
        ),
        (
            lambda: evaluate_students([sft(), plad(pair_prompts=["p1", "p1"])], TEACHER),
            "scored on other pairs",
        ),
        (lambda: sft(chosen_logps=[1.0]), "chosen_logps of SFT has shape"),
        (lambda: sft(pair_prompts=["p1"]), "pair_prompts of SFT has 1 entries"),
        (lambda: evaluate_students([sft()], TEACHER, judge=Judge(min)), "judge needs the prompts"),
        (
            lambda: evaluate_students(
                [sft()], TEACHER, judge=Judge(lambda *_: 0.7), prompts=TEACHER
            ),
            "judge a judge gave 0.7; it must give 1, 0.5 or 0",
        ),
        (
            lambda: evaluate_students([sft()], TEACHER, scorers={"few": Few()}, prompts=TEACHER),
            r"few has shape \(1,\); give one value for each of 4",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_metrics_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "run" / "metrics.json"
    results = evaluate_students([sft(), plad()], TEACHER)
    assert write_metrics(results, path) == path
    assert json.loads(path.read_text()) == results

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_metrics({"other": 1}, path)
    assert json.loads(path.read_text()) == results
    assert list(path.parent.iterdir()) == [path]
