"""Comparison of students on held-out prompts and pairs: intervals, wins, and who scored what.

No model runs here but those of the scorers and the judge, so that an evaluation can be repeated
from what was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plad_fast.data.chat import Content, is_blank
from plad_fast.data.files import write_atomically
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.evaluation import metrics
from plad_fast.evaluation.metrics import FloatArray
from plad_fast.evaluation.students import (
    Judge,
    Scorer,
    StudentOutputs,
    check_students,
    couples,
)
from plad_fast.pairs import text_metrics

_ROUGE = tuple(
    f"{name}_{target}" for target in ("teacher", "reference") for name in text_metrics.ROUGE_NAMES
)
_OF_PAIRS = ("ranking_accuracy", "margin", "own_ranking_accuracy")
_TEXT = ("mean_words", "repetition_4")


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
    score = rouge_l_label(len(known), len(ids))
    task = _Task(teacher_answers, known, prompts or {}, scorers or {}, judge, n_resamples, seed)
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
        "score": score if judge is None else judge.name,
        "scored_by": score,
        "scorers": list(scorers or {}),
        "confidence": metrics.CONFIDENCE,
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


@dataclass(frozen=True)
class _Measured:
    """One value per example."""

    values: dict[str, FloatArray]
    """Metric -> one value per pair, per prompt, or per prompt with a reference; `_by(scorer)` ->
    one per prompt. NaN for none."""
    texts: Sequence[str]
    """(prompts,); none of a student without answers."""
    pair_prompts: Sequence[str]
    """(pairs,) the prompt of each value of a metric over pairs."""

    def minus(self, other: _Measured | None, name: str) -> FloatArray | None:
        """Differences of the values, if both have some."""
        if other is None or name not in self.values or name not in other.values:
            return None
        return self.values[name] - other.values[name]


@dataclass(frozen=True)
class _Task:
    """What all students are measured against, and how. Rows are in the order of the answers."""

    teacher_answers: Mapping[str, str]
    references: Mapping[str, str]
    prompts: Mapping[str, Content]
    scorers: Mapping[str, Scorer]
    judge: Judge | None
    n_resamples: int
    seed: int

    def measure_all(self, systems: Sequence[StudentOutputs]) -> list[_Measured]:
        """The first of the systems is the teacher."""
        every = [self._measure(system, is_teacher=not n) for n, system in enumerate(systems)]
        rated = [measured for measured in every if measured.texts]
        prompts = self._prompts() if self.scorers else []
        items = [(prompt, own.texts[i]) for i, prompt in enumerate(prompts) for own in rated]
        for name, scorer in self.scorers.items():
            scores = metrics.vector(scorer.score(items), name, len(items), may_lack=True)
            for number, own in enumerate(rated):
                own.values[_by(name)] = scores[number :: len(rated)]
        return every

    def _measure(self, student: StudentOutputs, *, is_teacher: bool) -> _Measured:
        values: dict[str, FloatArray] = {}
        if len(student.pair_ids):
            chosen, rejected = student.chosen_logps, student.rejected_logps
            values["margin"] = metrics.margins(chosen, rejected)
            values["ranking_accuracy"] = metrics.won(values["margin"])
            if student.own_rejected_logps is not None:
                values["own_ranking_accuracy"] = metrics.won(chosen - student.own_rejected_logps)
        if not student.answers:
            return _Measured(values, [], student.pair_prompts)
        keys = list(self.teacher_answers)
        score = np.full(len(keys), np.nan)  # to the reference, else to the teacher
        targets = {"teacher": {} if is_teacher else self.teacher_answers}
        for target, texts in (targets | {"reference": self.references}).items():
            if texts:
                likeness = text_metrics.rouge(
                    [student.answers[k] for k in texts], [*texts.values()]
                )
                values |= {f"{name}_{target}": array for name, array in likeness.items()}
                score[[key in texts for key in keys]] = likeness["rougeL"]
        if not np.isnan(score).any():
            values["score"] = score
        answers = [student.answers[key] for key in keys]
        values["mean_words"] = text_metrics.word_counts(answers)
        values["repetition_4"] = text_metrics.repetition_shares(answers)
        return _Measured(values, answers, student.pair_prompts)

    def row(
        self, student: StudentOutputs, own: _Measured, teacher: _Measured | None = None
    ) -> dict[str, Any]:
        texts, values = own.texts, own.values
        outcomes = self._outcomes(own, teacher) if teacher else None
        return {
            "name": student.name,
            "n": len(texts),
            "n_pairs": len(student.pair_ids),
            "n_own_pairs": int(np.isfinite(values.get("own_ranking_accuracy", ())).sum()),
            **{
                name: self._interval(values.get(name), _groups(own, name))
                for name in (*_OF_PAIRS, *_ROUGE, "score")
            },
            **self._wins(outcomes, "_teacher"),
            **{name: float(values[name].mean()) if texts else None for name in _TEXT},
            "distinct_1": text_metrics.distinct_n(texts, 1) if texts else None,
            "distinct_2": text_metrics.distinct_n(texts, 2) if texts else None,
            "intervals": {name: self._interval(values.get(name)) for name in _TEXT},
            "scores": {
                name: {
                    "score": self._interval(values.get(_by(name))),
                    **self._wins(_won(own.minus(teacher, _by(name))), "_teacher"),
                }
                for name in self.scorers
            },
        }

    def compare(self, candidate: _Measured, baseline: _Measured) -> dict[str, Any]:
        outcomes = self._outcomes(candidate, baseline)
        by_scorer = {name: candidate.minus(baseline, _by(name)) for name in self.scorers}
        return {
            **{
                name: self._interval(candidate.minus(baseline, name), _groups(candidate, name))
                for name in (*_OF_PAIRS[:2], *_ROUGE, "score", *_TEXT)
            },
            **self._wins(outcomes),
            "scores": {
                name: {"difference": self._interval(change), **self._wins(_won(change))}
                for name, change in by_scorer.items()
            },
            "by_prompt": self._by_prompt(outcomes, candidate.minus(baseline, "score")),
        }

    def _outcomes(self, a: _Measured, b: _Measured) -> FloatArray | None:
        """Who wins each prompt, by the judge if there is one, else by the score."""
        if self.judge is None:
            return _won(a.minus(b, "score"))
        if not (a.texts and b.texts):
            return None
        texts = list(zip(self._prompts(), a.texts, b.texts, strict=True))
        asked = [item for item in texts if item[1] != item[2]]
        verdicts = np.full(len(texts), 0.5)
        if asked:
            answered = self.judge.compare(asked)
            verdicts[[item[1] != item[2] for item in texts]] = metrics.vector(
                answered, self.judge.name, len(asked), may_lack=True
            )
        wrong = ~np.isin(verdicts, (0.0, 0.5, 1.0)) & ~np.isnan(verdicts)
        if wrong.any():
            raise UsageError(
                f"judge {self.judge.name} gave {verdicts[wrong][0]}; it must give 1, 0.5 or 0 "
                "(NaN: no verdict)"
            )
        return verdicts

    def _by_prompt(
        self, outcomes: FloatArray | None, differences: FloatArray | None
    ) -> dict[str, dict[str, float | None]]:
        if outcomes is None:
            return {}
        shown = np.full(len(outcomes), np.nan) if differences is None else differences
        columns = {"outcome": outcomes, "difference": shown}
        return {
            key: {n: None if np.isnan(v[i]) else float(v[i]) for n, v in columns.items()}
            for i, key in enumerate(self.teacher_answers)
        }

    def _prompts(self) -> list[Prompt]:
        return [
            Prompt(key, self.prompts[key], self.references.get(key)) for key in self.teacher_answers
        ]

    def _wins(self, outcomes: FloatArray | None, suffix: str = "") -> dict[str, Any]:
        counts = None
        if outcomes is not None and not np.isnan(outcomes).all():
            counts = asdict(metrics.sign_test(outcomes[~np.isnan(outcomes)]))
        return {f"win_rate{suffix}": self._interval(outcomes), f"wins{suffix}": counts}

    def _interval(
        self, values: FloatArray | None, groups: Sequence[str] | None = None
    ) -> dict[str, float] | None:
        """Over the values that are not NaN, if there are any."""
        if values is None or np.isnan(values).all():
            return None
        there = ~np.isnan(values)
        if groups is not None:
            groups = [group for group, known in zip(groups, there, strict=True) if known]
        interval = metrics.paired_bootstrap(
            values[there], groups=groups, n_resamples=self.n_resamples, seed=self.seed
        )
        return asdict(interval)


def rouge_l_label(n_references: int, n_prompts: int) -> str:
    """The name of ROUGE-L to the reference where there is one, else to the teacher's answer."""
    if not n_references:
        return "ROUGE-L to the teacher's answer"
    some = ", or to the teacher's answer where there is none" * (n_references < n_prompts)
    return "ROUGE-L to the reference" + some


def _by(scorer: str) -> str:
    """Where the scores of a scorer are, apart from the metrics' names."""
    return f"by {scorer}"


def _groups(of: _Measured, metric: str) -> Sequence[str] | None:
    """Pairs of one prompt are drawn together."""
    return of.pair_prompts if metric in _OF_PAIRS else None


def _won(difference: FloatArray | None) -> FloatArray | None:
    return None if difference is None else metrics.won(difference)
