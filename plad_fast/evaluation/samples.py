"""A student's own samples on held-out prompts, with their likelihood and quality."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plad_fast.data.chat import Content, is_blank
from plad_fast.data.prompts import Prompt
from plad_fast.data.records import digest, recorded_scores
from plad_fast.errors import UsageError
from plad_fast.evaluation.calibration import ScoredSamples, evaluate_calibration
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.intervals import FloatArray
from plad_fast.evaluation.measures import rouge_l_label
from plad_fast.evaluation.students import Scorer
from plad_fast.pairs.build import as_response
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring import scorers as scoring
from plad_fast.pairs.scoring.stored import stored_scores
from plad_fast.pairs.text_metrics import rouge

logger = logging.getLogger(__name__)

LENGTH_NORMALIZATION = 1.0
"""Log-probability per token, whatever the training used: answers of unlike length are compared."""

ScoreResponses = Callable[[Sequence[tuple[Content, Sequence[Content]]]], Sequence[FloatArray]]


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


class StoredScorer:
    """A scorer that keeps what it said in a file, line by line."""

    def __init__(self, scorer: scoring.Scorer, file: Path, *, others_aside: bool = False) -> None:
        self.name = scorer.name
        self._scorer = scorer
        self._file = file
        if others_aside:
            set_aside(file, scorer.settings())

    def score(self, items: Sequence[tuple[Prompt, str]]) -> Sequence[float]:
        return stored_scores(self._scorer, items, self._file)


def require_samples(count: int, sampling: Sampling) -> None:
    """Raises UsageError where a calibration could not be measured on so many samples."""
    if count < 0 or count == 1:
        raise UsageError(
            f"calibration_samples is {count}; it takes 2 or more answers to a prompt to rank them "
            "(4 to 8 are usual), or 0 to leave it out"
        )
    if count and sampling.temperature == 0:
        raise UsageError(
            "calibration_samples needs a temperature above 0: without one all samples of a prompt "
            "are the same"
        )


def score_samples(
    name: str,
    held_out: HeldOut,
    samples: Mapping[str, Sequence[Answer]],
    file: Path,
    *,
    fingerprint: Mapping[str, Any],
    content_of: Callable[[Prompt], Content],
    score_responses: ScoreResponses,
    quality: Scorer,
    replace: bool = False,
) -> ScoredSamples:
    """Rate the samples of one student; log-probabilities are stored in `file`.

    A sample that is empty, or was cut off by the length limit, is left out: scoring adds the end
    token, which the student did not choose.

    Args:
        name: of the student.
        held_out: the prompts, in the order of the result, and the teacher's answers, which are
            scored beside the samples.
        samples: prompt id -> answers of the student.
        file, fingerprint, replace: see `recorded_scores`; it adds the texts and the prompts.
        content_of: a prompt as the student was given it.
        score_responses: prompts and their answers -> log-probabilities of these, per token.
        quality: rates the samples; it is asked anew each time, for all prompts at once.

    Raises:
        UsageError: from scoring, and as `recorded_scores`.
    """
    prompts = held_out.prompts
    teacher = [held_out.teacher_answers[p.id] for p in prompts]
    finished = [
        [
            a.text
            for a in samples.get(p.id, ())
            if a.finish_reason == "stop" and not is_blank(a.text)
        ]
        for p in prompts
    ]
    # Equal texts are scored once: their likelihoods tie exactly, and it takes no time.
    texts = [list(dict.fromkeys([*own, best])) for own, best in zip(finished, teacher, strict=True)]
    contents = [content_of(p) for p in prompts]
    stored = recorded_scores(
        file,
        {**fingerprint, "texts": f"{sum(map(len, texts))} answers, {digest([contents, texts])}"},
        lambda: {"logps": _score_texts(score_responses, contents, texts)},
        replace=replace,
    )
    logps = [dict(zip(t, v, strict=True)) for t, v in zip(texts, stored["logps"], strict=True)]
    rated = _rate(quality, prompts, finished)
    there = [np.isfinite(values) for values in rated]
    return ScoredSamples(
        name,
        [p.id for p in prompts],
        [
            np.array([known[text] for text in own])[kept]
            for known, own, kept in zip(logps, finished, there, strict=True)
        ],
        [values[kept] for values, kept in zip(rated, there, strict=True)],
        np.array([known[best] for known, best in zip(logps, teacher, strict=True)]),
        n_unfinished=sum(len(samples.get(p.id, ())) for p in prompts) - sum(map(len, finished)),
    )


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


def _score_texts(
    score_responses: ScoreResponses, contents: Sequence[Content], texts: Sequence[Sequence[str]]
) -> list[list[float]]:
    rows = [
        (content, [as_response(content, text) for text in answers])
        for content, answers in zip(contents, texts, strict=True)
    ]
    return [logps.tolist() for logps in score_responses(rows)]


def _rate(
    quality: Scorer, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> list[FloatArray]:
    """The quality of each sample, NaN where there is none."""
    items = [(p, text) for p, own in zip(prompts, texts, strict=True) for text in own]
    flat = np.asarray(quality.score(items) if items else [], dtype=np.float64)
    if flat.shape != (len(items),):
        raise UsageError(f"the scorer gave {len(flat)} numbers for {len(items)} answers")
    return np.split(flat, np.cumsum([len(own) for own in texts])[:-1])
