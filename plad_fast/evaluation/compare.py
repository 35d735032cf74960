"""Did distillation help? Held-out texts and log-probabilities in, a JSON-able dict out.

`score_pairs` is the only function here that runs a model. `evaluate_students` runs none but those
of the scorers and the judge it is given, so an evaluation can be repeated from what was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plad_fast.data.chat import Content, is_blank
from plad_fast.data.files import write_atomically
from plad_fast.errors import UsageError
from plad_fast.evaluation import intervals
from plad_fast.evaluation.intervals import FloatArray
from plad_fast.evaluation.measures import Judge, ScoreFn, Scorer, Task
from plad_fast.evaluation.report.tables import comparison_table
from plad_fast.models.response_scores import score_pairs

__all__ = [
    "Judge",
    "ScoreFn",
    "Scorer",
    "StudentOutputs",
    "comparison_table",
    "evaluate_students",
    "score_pairs",
    "write_metrics",
]


def _no_logps() -> FloatArray:
    return np.empty(0)


@dataclass(frozen=True, eq=False)
class StudentOutputs:
    """What one student said and thought of the held-out data; arrays become float64.

    P is the number of held-out pairs. A student without pairs has no ranking metrics, one without
    answers no text metrics.

    Raises:
        UsageError: an array whose length is not that of `pair_ids`.
    """

    name: str
    answers: Mapping[str, str]
    """Prompt id -> the student's answer."""
    chosen_logps: FloatArray = field(default_factory=_no_logps)
    """(P,) log-probability of the teacher's answer, in nats, normalised as in training."""
    rejected_logps: FloatArray = field(default_factory=_no_logps)
    """(P,) log-probability of the pair's rejected answer."""
    pair_ids: Sequence[str] = ()
    """(P,) the pair that each log-probability belongs to."""
    own_rejected_logps: FloatArray | None = None
    """(P,) log-probability of this student's own present answer; NaN where it gave none to score,
    for a cut-off one, say. Those pairs are left out of `own_ranking_accuracy`."""
    pair_prompts: Sequence[str] = ()
    """(P,) the prompt of each pair: pairs of one prompt are no independent evidence, and intervals
    are drawn by prompt. Left out, every pair has a prompt of its own."""

    def __post_init__(self) -> None:
        for name in ("chosen_logps", "rejected_logps", "own_rejected_logps"):
            values = getattr(self, name)
            if values is None:
                continue
            vector = np.asarray(values, dtype=np.float64)
            if vector.shape != (len(self.pair_ids),):
                raise UsageError(
                    f"{name} of {self.name} has shape {vector.shape}, but there are "
                    f"{len(self.pair_ids)} pair_ids; give one log-probability for each pair"
                )
            object.__setattr__(self, name, vector)
        prompts = self.pair_prompts or list(map(str, range(len(self.pair_ids))))
        if len(prompts) != len(self.pair_ids):
            raise UsageError(
                f"pair_prompts of {self.name} has {len(prompts)} entries, but there are "
                f"{len(self.pair_ids)} pair_ids; give the prompt of each pair"
            )
        object.__setattr__(self, "pair_prompts", prompts)


def evaluate_students(
    students: Sequence[StudentOutputs],
    teacher_answers: Mapping[str, str],
    references: Mapping[str, str | None] | None = None,
    *,
    score_fn: ScoreFn | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    judge: Judge | None = None,
    prompts: Mapping[str, Content] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare students, given in the order of training, on held-out prompts and pairs.

    Args:
        students: the untrained or fine-tuned one first, the distilled one last.
        teacher_answers: prompt id -> answer; these prompts are evaluated.
        references: prompt id -> reference answer, for all or some of the prompts; a blank one is
            none.
        score_fn: `(prompt, answer, target) -> float`, larger is better; decides win rates. Default:
            ROUGE-L to the target, which is the reference where there is one, else the teacher's
            answer.
        scorers: name -> scorer, reported beside `score_fn`: one that the training did not see
            says more than the one it was trained on.
        judge: decides win rates instead of `score_fn`. It is asked about every two students and
            about every student and the teacher, on every prompt where their texts differ; equal
            ones are a tie.
        prompts: prompt id -> prompt, for `score_fn`, `scorers` and `judge`.
        n_resamples: bootstrap resamples behind each interval (`intervals.paired_bootstrap`).
        seed: of the bootstrap.

    Returns:
        A dict for `json.dumps`. An interval is `{"mean", "low", "high", "standard_error"}`, counts
        are `{"wins", "ties", "losses", "p_value"}` of the exact two-sided sign test
        (`intervals.sign_test`); what cannot be computed is None.

        * `n_prompts`, `n_pairs`, `n_pair_prompts` (those that the pairs are of, fewer where one has
          several pairs), `n_references`, `score` (what decides wins), `scored_by` (what
          the rows' `score` is), `scorers` (names), `confidence`, `n_resamples`, `seed`.
        * `students`: one row each: `name`, `n` (prompts), `n_pairs`, `n_own_pairs` (those behind
          `own_ranking_accuracy`); intervals `ranking_accuracy`,
          `margin`, `own_ranking_accuracy`, `rouge{1,2,L}_teacher`, `rouge{1,2,L}_reference`,
          `score`, `win_rate_teacher`; counts `wins_teacher`; numbers `mean_words`, `distinct_1`,
          `distinct_2`, `repetition_4`; `intervals` of `mean_words` and `repetition_4`; and
          `scores`: scorer -> `score` and `win_rate_teacher` (intervals), `wins_teacher` (counts).
        * `teacher`: the same row. Its likeness to itself is None, and so is its default score
          unless every prompt has a reference.
        * `comparisons`: for every two students, last against first before all others:
          `candidate`, `baseline` and the paired intervals of the candidate minus the baseline in
          `ranking_accuracy`, `margin`, the ROUGE scores, `score`, `mean_words` and `repetition_4`;
          `win_rate` (interval) and `wins` (counts) of the candidate; and `scores`: scorer ->
          `difference` and `win_rate` (intervals), `wins` (counts).

    Raises:
        UsageError: no students or no teacher answers, two students of one name, a student that left
            evaluated prompts unanswered, students scored on different pairs, a score that is not
            finite (a scorer or judge may give NaN for what it could not decide, which is then left
            out), or `score_fn`, `scorers` or `judge` without the prompts.
    """
    _check_students(students, teacher_answers)
    ids = list(teacher_answers)
    for name, asks in (("score_fn", score_fn), ("scorers", scorers), ("judge", judge)):
        if asks and (prompts is None or any(key not in prompts for key in ids)):
            raise UsageError(
                f"{name} needs the prompts; pass prompts={{id: prompt}} for every prompt"
            )
    references = references or {}
    known = {key: text for key in ids if (text := references.get(key)) and not is_blank(text)}
    task = Task(
        teacher_answers,
        known,
        prompts or {},
        score_fn=score_fn,
        scorers=scorers or {},
        judge=judge,
        n_resamples=n_resamples,
        seed=seed,
    )
    teacher = StudentOutputs("teacher", teacher_answers)
    measured_teacher, *measured = task.measure_all([teacher, *students])
    last = len(students) - 1
    couples = [(j, i) for j in range(last, 0, -1) for i in range(j)]
    return {
        "n_prompts": len(ids),
        "n_pairs": max(len(student.pair_ids) for student in students),
        "n_pair_prompts": max(len(set(student.pair_prompts)) for student in students),
        "n_references": len(known),
        "score": task.win_label(),
        "scored_by": task.score_label(),
        "scorers": list(scorers or {}),
        "confidence": intervals.CONFIDENCE,
        "n_resamples": n_resamples,
        "seed": seed,
        "teacher": task.row(teacher, measured_teacher),
        "students": [
            task.row(student, own, measured_teacher)
            for student, own in zip(students, measured, strict=True)
        ],
        "comparisons": [
            {
                "candidate": students[j].name,
                "baseline": students[i].name,
                **task.compare(measured[j], measured[i]),
            }
            for j, i in couples
        ],
    }


def _check_students(students: Sequence[StudentOutputs], teacher_answers: Mapping[str, str]) -> None:
    if not students:
        raise UsageError("there is no student to evaluate; pass at least one")
    if not teacher_answers:
        raise UsageError("teacher_answers is empty; generate the teacher's held-out answers first")
    names = [student.name for student in students]
    if len(set(names)) < len(names):
        raise UsageError(f"students need different names, not {names}")
    pair_ids = None
    for student in students:
        missing = [key for key in teacher_answers if key not in student.answers]
        if student.answers and missing:
            raise UsageError(
                f"{student.name} has no answer to {len(missing)} of {len(teacher_answers)} "
                f"prompts, the first is {missing[0]}; generate the missing answers, or leave those "
                "prompts out of teacher_answers"
            )
        if len(student.pair_ids):
            these = [*student.pair_ids, *student.pair_prompts]
            if pair_ids is not None and these != pair_ids:
                raise UsageError(
                    f"{student.name} was scored on other pairs than the students before it; score "
                    "every student on the same pairs, in the same order"
                )
            pair_ids = these


def write_metrics(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the result of `evaluate_students` as JSON; the file is complete or not there."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomically(path, text + "\n")
