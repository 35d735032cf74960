"""Students whose margins, answers and samples are known, for the tests of reports and plots."""

from __future__ import annotations

import numpy as np

from plad_fast.evaluation.calibration import ScoredSamples
from plad_fast.evaluation.compare import evaluate_students
from plad_fast.evaluation.samples import measure_calibration
from plad_fast.evaluation.students import StudentOutputs

WORDS = [f"w{i}" for i in range(13)]


def student(name, *, lead, kept, n=40):
    """Its margins are about `lead`, and it keeps that many of the teacher's words."""
    rng = np.random.default_rng(len(name))
    ids = [f"p{i}" for i in range(n)]
    answers = {key: " ".join(WORDS[: kept + i % 3]) for i, key in enumerate(ids)}
    rejected = rng.normal(-20.0, 3.0, n)
    return StudentOutputs(name, answers, rejected + rng.normal(lead, 1.0, n), rejected, ids)


def evaluate(*students, **options):
    return evaluate_students(
        students, dict.fromkeys(students[0].answers, " ".join(WORDS)), n_resamples=200, **options
    )


def samples(name, sign):
    """Quality rises with likelihood, or falls; one prompt of five has a single sample."""
    logps = [[-3.0, -2.0, -1.0]] * 4 + [[-1.0]]
    quality = [[0.5 + sign * x / 10 for x in row] for row in logps]
    return ScoredSamples(name, list("abcde"), logps, quality, [-2.0] * 5, n_unfinished=2)


def calibration(*students, quality="ROUGE-L to the reference"):
    return measure_calibration(students, 3, quality)


class Words:
    """Scorer and judge by the number of words."""

    name = "words"

    def score(self, items):
        return [len(text.split()) for _, text in items]

    def compare(self, items):
        return [1.0 if len(a) > len(b) else 0.0 for _, a, b in items]


SFT = student("SFT student", lead=0.0, kept=4)
PLAD = student("PLaD student", lead=3.0, kept=8)
