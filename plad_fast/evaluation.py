"""Did distillation help? Held-out texts and log-probabilities in, a JSON-able dict out.

`score_pairs` is the only function here that runs a model; `evaluate_students` is pure, so an
evaluation can be repeated from what was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plad_fast import metrics
from plad_fast._pair_scores import score_pairs
from plad_fast._tables import comparison_table
from plad_fast.chat import Content
from plad_fast.errors import UsageError
from plad_fast.metrics import FloatArray

__all__ = [
    "StudentOutputs",
    "comparison_table",
    "evaluate_students",
    "score_pairs",
    "write_atomically",
    "write_metrics",
]

ScoreFn = Callable[[Any, str, str], float]

_ROUGE = tuple(
    f"{name}_{target}" for target in ("teacher", "reference") for name in metrics.ROUGE_NAMES
)
_ROW_INTERVALS = ("ranking_accuracy", "margin", "own_ranking_accuracy", *_ROUGE, "score")
_COMPARED = ("ranking_accuracy", "margin", *_ROUGE, "score")


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


def evaluate_students(
    students: Sequence[StudentOutputs],
    teacher_answers: Mapping[str, str],
    references: Mapping[str, str | None] | None = None,
    *,
    score_fn: ScoreFn | None = None,
    prompts: Mapping[str, Content] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare students, given in the order of training, on held-out prompts and pairs.

    Args:
        students: the untrained or fine-tuned one first, the distilled one last.
        teacher_answers: prompt id -> answer; these prompts are evaluated.
        references: prompt id -> reference answer, for all or some of the prompts.
        score_fn: `(prompt, answer, target) -> float`, larger is better; decides win rates. Default:
            ROUGE-L to the target, which is the reference where there is one, else the teacher's
            answer.
        prompts: prompt id -> prompt, for `score_fn`.
        n_resamples: bootstrap resamples behind each interval (`metrics.paired_bootstrap`).
        seed: of the bootstrap.

    Returns:
        A dict for `json.dumps`. An interval is `{"mean", "low", "high", "standard_error"}`; what
        cannot be computed is None.

        * `n_prompts`, `n_pairs`, `n_references`, `score` (what decides wins), `confidence`,
          `n_resamples`, `seed`.
        * `students`: one row each: `name`, `n` (prompts), `n_pairs`, `n_own_pairs` (those behind
          `own_ranking_accuracy`); intervals `ranking_accuracy`,
          `margin`, `own_ranking_accuracy`, `rouge{1,2,L}_teacher`, `rouge{1,2,L}_reference`,
          `score`, `win_rate_teacher`; numbers `mean_words`, `distinct_1`, `distinct_2`,
          `repetition_4`.
        * `teacher`: the same row. Its likeness to itself is None, and so is its default score
          unless every prompt has a reference.
        * `comparisons`: for every two students, last against first before all others:
          `candidate`, `baseline` and the paired intervals of the candidate minus the baseline in
          `ranking_accuracy`, `margin`, the ROUGE scores and `score`; and `win_rate` of the
          candidate.

    Raises:
        UsageError: no students or no teacher answers, two students of one name, a student that left
            evaluated prompts unanswered, students scored on different pairs, a score that is not
            finite, or `score_fn` without its prompts.
    """
    _check_students(students, teacher_answers)
    ids = list(teacher_answers)
    if score_fn is not None and (prompts is None or any(key not in prompts for key in ids)):
        raise UsageError("score_fn needs the prompts; pass prompts={id: prompt} for every prompt")
    references = references or {}
    known = {key: text for key in ids if (text := references.get(key)) is not None}
    task = _Task(teacher_answers, known, score_fn, prompts or {}, n_resamples, seed)

    teacher = StudentOutputs("teacher", teacher_answers)
    teacher_values = task.per_example(teacher, is_teacher=True)
    values = [task.per_example(student) for student in students]
    last = len(students) - 1
    couples = [(j, i) for j in range(last, 0, -1) for i in range(j)]
    return {
        "n_prompts": len(ids),
        "n_pairs": max(len(student.pair_ids) for student in students),
        "n_references": len(known),
        "score": task.score_label(),
        "confidence": metrics.CONFIDENCE,
        "n_resamples": n_resamples,
        "seed": seed,
        "teacher": task.row(teacher, teacher_values),
        "students": [
            task.row(student, own, teacher_values)
            for student, own in zip(students, values, strict=True)
        ],
        "comparisons": [
            {
                "candidate": students[j].name,
                "baseline": students[i].name,
                **task.compare(values[j], values[i]),
            }
            for j, i in couples
        ],
    }


@dataclass(frozen=True)
class _Task:
    """What all students are measured against, and how. Rows are in the order of the answers."""

    teacher_answers: Mapping[str, str]
    references: Mapping[str, str]
    score_fn: ScoreFn | None
    prompts: Mapping[str, Content]
    n_resamples: int
    seed: int

    def per_example(
        self, student: StudentOutputs, *, is_teacher: bool = False
    ) -> dict[str, FloatArray]:
        """Metric name -> one value per pair, per prompt, or per prompt with a reference."""
        values: dict[str, FloatArray] = {}
        if len(student.pair_ids):
            chosen, rejected = student.chosen_logps, student.rejected_logps
            values["ranking_accuracy"] = metrics.outcomes(chosen, rejected)
            values["margin"] = metrics.margins(chosen, rejected)
            own = student.own_rejected_logps
            if own is not None and not np.isnan(own).all():
                scored = ~np.isnan(own)
                values["own_ranking_accuracy"] = metrics.outcomes(chosen[scored], own[scored])
        if not student.answers:
            return values
        answers = [student.answers[key] for key in self.teacher_answers]
        rouge_l = np.empty(0)
        if not is_teacher:
            by_name = metrics.rouge(answers, list(self.teacher_answers.values()))
            values |= {f"{name}_teacher": array for name, array in by_name.items()}
            rouge_l = by_name["rougeL"]
        if self.references:
            some = [student.answers[key] for key in self.references]
            by_name = metrics.rouge(some, list(self.references.values()))
            values |= {f"{name}_reference": array for name, array in by_name.items()}
            if len(some) == len(answers):
                rouge_l = by_name["rougeL"]
            elif not is_teacher:
                rouge_l = rouge_l.copy()
                rouge_l[[key in self.references for key in self.teacher_answers]] = by_name[
                    "rougeL"
                ]
        if self.score_fn is not None:
            values["score"] = self._custom_scores(self.score_fn, answers)
        elif len(rouge_l):
            values["score"] = rouge_l
        return values

    def row(
        self,
        student: StudentOutputs,
        values: Mapping[str, FloatArray],
        teacher_values: Mapping[str, FloatArray] | None = None,
    ) -> dict[str, Any]:
        texts = [student.answers[key] for key in self.teacher_answers] if student.answers else []
        wins = None
        if teacher_values and "score" in values and "score" in teacher_values:
            wins = metrics.outcomes(values["score"], teacher_values["score"])
        return {
            "name": student.name,
            "n": len(texts),
            "n_pairs": len(student.pair_ids),
            "n_own_pairs": len(values.get("own_ranking_accuracy", ())),
            **{name: self._interval(values.get(name)) for name in _ROW_INTERVALS},
            "win_rate_teacher": self._interval(wins),
            "mean_words": metrics.mean_words(texts) if texts else None,
            "distinct_1": metrics.distinct_n(texts, 1) if texts else None,
            "distinct_2": metrics.distinct_n(texts, 2) if texts else None,
            "repetition_4": metrics.repetition(texts, 4) if texts else None,
        }

    def compare(
        self, candidate: Mapping[str, FloatArray], baseline: Mapping[str, FloatArray]
    ) -> dict[str, Any]:
        both = candidate.keys() & baseline.keys()
        differences = {
            name: self._interval(candidate[name], baseline[name]) if name in both else None
            for name in _COMPARED
        }
        wins = None
        if "score" in both:
            wins = metrics.outcomes(candidate["score"], baseline["score"])
        return {**differences, "win_rate": self._interval(wins)}

    def score_label(self) -> str:
        if self.score_fn is not None:
            return getattr(self.score_fn, "__name__", type(self.score_fn).__name__)
        if not self.references:
            return "ROUGE-L to the teacher's answer"
        if len(self.references) == len(self.teacher_answers):
            return "ROUGE-L to the reference"
        return "ROUGE-L to the reference, or to the teacher's answer where there is none"

    def _custom_scores(self, score_fn: ScoreFn, answers: Sequence[str]) -> FloatArray:
        scores = []
        for (key, teacher_answer), answer in zip(
            self.teacher_answers.items(), answers, strict=True
        ):
            target = self.references.get(key, teacher_answer)
            scores.append(float(score_fn(self.prompts[key], answer, target)))
            if not np.isfinite(scores[-1]):
                raise UsageError(
                    f"score_fn gave {scores[-1]} for prompt {key}; it must return a finite number"
                )
        return np.array(scores)

    def _interval(
        self, a: FloatArray | None, b: FloatArray | None = None
    ) -> dict[str, float] | None:
        if a is None:
            return None
        return asdict(metrics.paired_bootstrap(a, b, n_resamples=self.n_resamples, seed=self.seed))


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
            if pair_ids is not None and list(student.pair_ids) != pair_ids:
                raise UsageError(
                    f"{student.name} was scored on other pairs than the students before it; score "
                    "every student on the same pairs, in the same order"
                )
            pair_ids = list(student.pair_ids)


def write_metrics(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the result of `evaluate_students` as JSON; the file is complete or not there."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomically(path, text + "\n")


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text next to `path`, then rename it into place; folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
