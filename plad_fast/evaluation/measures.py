"""Measures of one student and of two, example by example; see `evaluate_students`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from plad_fast.data.chat import Content
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.evaluation import metrics
from plad_fast.evaluation.metrics import FloatArray
from plad_fast.evaluation.students import Judge, Scorer, StudentOutputs
from plad_fast.pairs import text_metrics

_ROUGE = tuple(
    f"{name}_{target}" for target in ("teacher", "reference") for name in text_metrics.ROUGE_NAMES
)
_ROW_INTERVALS = ("ranking_accuracy", "margin", "own_ranking_accuracy", *_ROUGE, "score")
_OF_PAIRS = ("ranking_accuracy", "margin", "own_ranking_accuracy")
_TEXT = ("mean_words", "repetition_4")
_COMPARED = ("ranking_accuracy", "margin", *_ROUGE, "score", *_TEXT)


@dataclass(frozen=True)
class Measured:
    """One value per example."""

    values: Mapping[str, FloatArray]
    """Metric -> one value per pair, per prompt, or per prompt with a reference; NaN for none."""
    scores: Mapping[str, FloatArray]
    """Scorer -> (prompts,), NaN where it gave none."""
    texts: Sequence[str]
    """(prompts,); none of a student without answers."""
    pair_prompts: Sequence[str]
    """(pairs,) the prompt of each value of a metric over pairs."""


@dataclass(frozen=True)
class Task:
    """What all students are measured against, and how. Rows are in the order of the answers."""

    teacher_answers: Mapping[str, str]
    references: Mapping[str, str]
    prompts: Mapping[str, Content]
    scorers: Mapping[str, Scorer]
    judge: Judge | None
    n_resamples: int
    seed: int

    def measure_all(self, systems: Sequence[StudentOutputs]) -> list[Measured]:
        """The first of the systems is the teacher."""
        rated = iter(self._rated([system for system in systems if system.answers]))
        return [
            self._measure(system, next(rated) if system.answers else {}, is_teacher=number == 0)
            for number, system in enumerate(systems)
        ]

    def _measure(
        self, student: StudentOutputs, scores: Mapping[str, FloatArray], *, is_teacher: bool
    ) -> Measured:
        values: dict[str, FloatArray] = {}
        if len(student.pair_ids):
            chosen, rejected = student.chosen_logps, student.rejected_logps
            values["ranking_accuracy"] = metrics.outcomes(chosen, rejected)
            values["margin"] = metrics.margins(chosen, rejected)
            if student.own_rejected_logps is not None:
                values["own_ranking_accuracy"] = _won(chosen - student.own_rejected_logps)
        if not student.answers:
            return Measured(values, {}, [], student.pair_prompts)
        answers = [student.answers[key] for key in self.teacher_answers]
        values |= self._likeness(student.answers, answers, is_teacher)
        values["mean_words"] = text_metrics.word_counts(answers)
        values["repetition_4"] = text_metrics.repetition_shares(answers, 4)
        return Measured(values, scores, answers, student.pair_prompts)

    def row(
        self, student: StudentOutputs, own: Measured, teacher: Measured | None = None
    ) -> dict[str, Any]:
        texts, values = own.texts, own.values
        outcomes = self._outcomes(own, teacher) if teacher else None
        return {
            "name": student.name,
            "n": len(texts),
            "n_pairs": len(student.pair_ids),
            "n_own_pairs": int(np.isfinite(values.get("own_ranking_accuracy", ())).sum()),
            **{name: self._mean(own, name, values.get(name)) for name in _ROW_INTERVALS},
            **self._wins(outcomes, "_teacher"),
            **{name: float(values[name].mean()) if texts else None for name in _TEXT},
            "distinct_1": text_metrics.distinct_n(texts, 1) if texts else None,
            "distinct_2": text_metrics.distinct_n(texts, 2) if texts else None,
            "intervals": {name: self._interval(values.get(name)) for name in _TEXT},
            "scores": {
                name: {
                    "score": self._interval(own.scores.get(name)),
                    **self._wins(_outcomes_by(own, teacher, name), "_teacher"),
                }
                for name in self.scorers
            },
        }

    def compare(self, candidate: Measured, baseline: Measured) -> dict[str, Any]:
        a, b = candidate.values, baseline.values
        both = {name: a[name] - b[name] for name in _COMPARED if name in a and name in b}
        outcomes = self._outcomes(candidate, baseline)
        return {
            **{name: self._mean(candidate, name, both.get(name)) for name in _COMPARED},
            **self._wins(outcomes),
            "scores": {
                name: {
                    "difference": self._interval(_difference(candidate, baseline, name)),
                    **self._wins(_outcomes_by(candidate, baseline, name)),
                }
                for name in self.scorers
            },
            "by_prompt": self._by_prompt(outcomes, both.get("score")),
        }

    def win_label(self) -> str:
        return self.score_label() if self.judge is None else self.judge.name

    def score_label(self) -> str:
        return rouge_l_label(len(self.references), len(self.teacher_answers))

    def _likeness(
        self, by_id: Mapping[str, str], answers: Sequence[str], is_teacher: bool
    ) -> dict[str, FloatArray]:
        """ROUGE, and what of it is the default score."""
        values: dict[str, FloatArray] = {}
        rouge_l = np.empty(0)
        if not is_teacher:
            by_name = text_metrics.rouge(answers, list(self.teacher_answers.values()))
            values |= {f"{name}_teacher": array for name, array in by_name.items()}
            rouge_l = by_name["rougeL"]
        if self.references:
            some = [by_id[key] for key in self.references]
            by_name = text_metrics.rouge(some, list(self.references.values()))
            values |= {f"{name}_reference": array for name, array in by_name.items()}
            if len(some) == len(answers):
                rouge_l = by_name["rougeL"]
            elif not is_teacher:
                rouge_l = rouge_l.copy()
                rouge_l[[key in self.references for key in self.teacher_answers]] = by_name[
                    "rougeL"
                ]
        if len(rouge_l):
            values["score"] = rouge_l
        return values

    def _rated(self, systems: Sequence[StudentOutputs]) -> list[dict[str, FloatArray]]:
        """Of each system, whatever its name, scorer -> (prompts,)."""
        prompts = self._prompts() if self.scorers else []
        items = [(p, system.answers[p.id]) for p in prompts for system in systems]
        rated: list[dict[str, FloatArray]] = [{} for _ in systems]
        for name, scorer in self.scorers.items():
            scores = _vector(scorer.score(items), len(items), f"scorer {name}")
            for number, own in enumerate(rated):
                own[name] = scores[number :: len(systems)]
        return rated

    def _outcomes(self, a: Measured, b: Measured) -> FloatArray | None:
        """Who wins each prompt, by the judge if there is one, else by the score."""
        if self.judge is None:
            both = "score" in a.values and "score" in b.values
            return metrics.outcomes(a.values["score"], b.values["score"]) if both else None
        if not (a.texts and b.texts):
            return None
        texts = list(zip(self._prompts(), a.texts, b.texts, strict=True))
        asked = [item for item in texts if item[1] != item[2]]
        where = f"judge {self.judge.name}"
        answered = _vector(self.judge.compare(asked) if asked else [], len(asked), where)
        verdicts = np.full(len(texts), 0.5)
        verdicts[[item[1] != item[2] for item in texts]] = answered
        wrong = ~np.isin(verdicts, (0.0, 0.5, 1.0)) & ~np.isnan(verdicts)
        if wrong.any():
            raise UsageError(
                f"{where} gave {verdicts[wrong][0]}; it must give 1, 0.5 or 0 (NaN: no verdict)"
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
        there = _there(outcomes)
        return {
            f"win_rate{suffix}": self._interval(there),
            f"wins{suffix}": None if there is None else asdict(metrics.sign_test(there)),
        }

    def _mean(self, of: Measured, name: str, values: FloatArray | None) -> dict[str, float] | None:
        """The interval of a metric; pairs of one prompt are drawn together."""
        if values is None or name not in _OF_PAIRS:
            return self._interval(values)
        there = np.isfinite(values)
        groups = [p for p, known in zip(of.pair_prompts, there, strict=True) if known]
        return self._interval(values, groups)

    def _interval(
        self, values: FloatArray | None, groups: Sequence[str] | None = None
    ) -> dict[str, float] | None:
        """Over the values that are not NaN, if there are any."""
        if (there := _there(values)) is None:
            return None
        bootstrap: dict[str, Any] = {"n_resamples": self.n_resamples, "seed": self.seed}
        return asdict(metrics.paired_bootstrap(there, groups=groups, **bootstrap))


def rouge_l_label(n_references: int, n_prompts: int) -> str:
    """The name of ROUGE-L to the reference where there is one, else to the teacher's answer."""
    if not n_references:
        return "ROUGE-L to the teacher's answer"
    some = ", or to the teacher's answer where there is none" * (n_references < n_prompts)
    return "ROUGE-L to the reference" + some


def _outcomes_by(a: Measured, b: Measured | None, name: str) -> FloatArray | None:
    """Who wins each prompt by a scorer; NaN where it did not rate both answers."""
    difference = None if b is None else _difference(a, b, name)
    return None if difference is None else _won(difference)


def _won(difference: FloatArray) -> FloatArray:
    """1 for a positive difference, 0.5 for none, 0 for a negative one; NaN stays."""
    return 0.5 * (1.0 + np.sign(difference))


def _difference(a: Measured, b: Measured, name: str) -> FloatArray | None:
    both = name in a.scores and name in b.scores
    return a.scores[name] - b.scores[name] if both else None


def _there(values: FloatArray | None) -> FloatArray | None:
    """The values that are not NaN, or None if there are none."""
    if values is None or np.isnan(values).all():
        return None
    return values[~np.isnan(values)]


def _vector(values: Sequence[float | None], count: int, where: str) -> FloatArray:
    vector = np.asarray(values, dtype=np.float64)  # None becomes NaN
    if vector.shape != (count,):
        raise UsageError(f"{where} gave {len(values)} numbers for {count} items; give one each")
    if np.isinf(vector).any():
        raise UsageError(f"{where} gave an infinite number; it must give finite ones, or NaN")
    return vector
