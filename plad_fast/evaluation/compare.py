"""Comparison of students on held-out prompts and pairs: intervals, wins, and who scored what.

No model runs here but those of the scorers and the judge, so that an evaluation can be repeated
from what was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.data.chat import Content, is_blank
from plad_fast.data.files import write_atomically
from plad_fast.errors import UsageError
from plad_fast.evaluation.measures import Task
from plad_fast.evaluation.metrics import CONFIDENCE
from plad_fast.evaluation.students import (
    Judge,
    Scorer,
    StudentOutputs,
    check_students,
    couples,
)


def evaluate_students(
    students: Sequence[StudentOutputs],
    teacher_answers: Mapping[str, str],
    references: Mapping[str, str | None] | None = None,
    *,
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
        scorers: name -> scorer, reported beside the score that decides win rates (ROUGE-L to the
            reference where there is one, else to the teacher's answer): one that the training did
            not see says more than the one it was trained on.
        judge: decides win rates instead of ROUGE-L. It is asked about every two students and
            about every student and the teacher, on every prompt where their texts differ; equal
            ones are a tie.
        prompts: prompt id -> prompt, for `scorers` and `judge`.
        n_resamples: bootstrap resamples behind each interval (`metrics.paired_bootstrap`).
        seed: of the bootstrap.

    Returns:
        A dict for `json.dumps`. An interval is `{"mean", "low", "high", "standard_error"}`, counts
        are `{"wins", "ties", "losses", "p_value"}` of the exact two-sided sign test
        (`metrics.sign_test`); what cannot be computed is None.

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
        * `by_prompt`: prompt id -> `outcome` (1 won, 0.5 tied, 0 lost, None undecided) and
          `difference` of the `score`, of the first comparison.

    Raises:
        UsageError: no students or no teacher answers, two students of one name, a student that left
            evaluated prompts unanswered, students scored on different pairs, a score that is not
            finite (a scorer or judge may give NaN for what it could not decide, which is then left
            out), or `scorers` or `judge` without the prompts.
    """
    check_students(students, teacher_answers)
    ids = list(teacher_answers)
    for name, asks in (("scorers", scorers), ("judge", judge)):
        if asks and (prompts is None or any(key not in prompts for key in ids)):
            raise UsageError(f"{name} needs the prompts; pass prompts={{id: prompt}} for all")
    references = references or {}
    known = {key: text for key in ids if (text := references.get(key)) and not is_blank(text)}
    task = Task(
        teacher_answers,
        known,
        prompts or {},
        scorers=scorers or {},
        judge=judge,
        n_resamples=n_resamples,
        seed=seed,
    )
    teacher = StudentOutputs("teacher", teacher_answers)
    measured_teacher, *measured = task.measure_all([teacher, *students])
    comparisons = [
        {
            "candidate": students[j].name,
            "baseline": students[i].name,
            **task.compare(measured[j], measured[i]),
        }
        for j, i in couples(len(students))
    ]
    # For every couple they would fill the file of the metrics.
    by_prompt = [comparison.pop("by_prompt") for comparison in comparisons][:1]
    return {
        "n_prompts": len(ids),
        "n_pairs": max(len(student.pair_ids) for student in students),
        "n_pair_prompts": max(len(set(student.pair_prompts)) for student in students),
        "n_references": len(known),
        "score": task.win_label(),
        "scored_by": task.score_label(),
        "scorers": list(scorers or {}),
        "confidence": CONFIDENCE,
        "n_resamples": n_resamples,
        "seed": seed,
        "teacher": task.row(teacher, measured_teacher),
        "students": [
            task.row(student, own, measured_teacher)
            for student, own in zip(students, measured, strict=True)
        ],
        "comparisons": comparisons,
        "by_prompt": by_prompt[0] if by_prompt else {},
    }


def write_metrics(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the result of `evaluate_students` as JSON; the file is complete or not there."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomically(path, text + "\n")
