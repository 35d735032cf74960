"""Measures of quality for a student's own samples, and the calibration over these."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.evaluation.calibration import ScoredSamples, evaluate_calibration
from plad_fast.evaluation.compare import rouge_l_label
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.scoring.scorers import Scorer
from plad_fast.pairs.scoring.stored import stored_scores
from plad_fast.pairs.text_metrics import rouge

logger = logging.getLogger(__name__)

LENGTH_NORMALIZATION = 1.0
"""Log-probability per token, whatever the training used: answers of unlike length are compared."""


class RougeL:
    """ROUGE-L to the reference where there is one, else to the teacher's answer."""

    def __init__(self, prompts: Sequence[Prompt], teacher_answers: Mapping[str, str]) -> None:
        self._teacher_answers = teacher_answers
        known = sum(prompt.reference is not None for prompt in prompts)
        self.name = rouge_l_label(known, len(prompts))

    def score(self, items: Sequence[tuple[Prompt, str]]) -> Sequence[float]:
        targets = [
            self._teacher_answers[p.id] if p.reference is None else p.reference for p, _ in items
        ]
        return rouge([text for _, text in items], targets)["rougeL"].tolist()


class StoredScorer(NamedTuple):
    """A scorer that keeps what it said in a file, line by line."""

    scorer: Scorer
    file: Path

    @property
    def name(self) -> str:
        return self.scorer.name

    def score(self, items: Sequence[tuple[Prompt, str]]) -> Sequence[float]:
        return stored_scores(self.scorer, items, self.file)


def require_samples(count: int, sampling: Sampling) -> None:
    """Raises UsageError where a calibration could not be measured on so many samples."""
    if count < 0 or count == 1:
        raise UsageError(
            f"calibration_samples is {count}; it takes 2 or more answers to a prompt to rank them "
            "(4 to 8 are usual), or 0 to leave it out"
        )
    if count and sampling.temperature == 0:
        raise UsageError("calibration_samples needs a temperature above 0, to differ")


def measure_calibration(
    students: Sequence[ScoredSamples], count: int, quality_name: str
) -> dict[str, Any] | None:
    """`evaluate_calibration`, and what was measured; None if a student finished no sample.

    It adds `samples` (asked for each prompt), `quality` (what rated them) and
    `length_normalization`.
    """
    for student in students:
        if not any(map(len, student.logps)):
            logger.warning(
                "%s finished none of its samples, so its calibration cannot be measured; raise "
                "max_new_tokens",
                student.name,
            )
            return None
    return {
        "samples": count,
        "quality": quality_name,
        "length_normalization": LENGTH_NORMALIZATION,
        **evaluate_calibration(students),
    }
