"""Run students on held-out prompts and write what is to be known of them.

Everything that takes a model is stored as it comes: answers line by line, log-probabilities in a
file per student. A killed evaluation goes on; a finished one is computed from the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plad_fast.data.chat import Content, is_blank
from plad_fast.data.prompts import Prompt, as_messages
from plad_fast.data.records import digest, model_digest, stored_scores
from plad_fast.evaluation.compare import Judge, StudentOutputs, evaluate_students, score_pairs
from plad_fast.evaluation.report.parts import draw_plots, example_answers, margin_unit
from plad_fast.evaluation.samples import (
    LENGTH_NORMALIZATION,
    HeldOutSamples,
    RougeL,
    StoredScorer,
    measure_calibration,
    require_samples,
    score_samples,
)
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_responses
from plad_fast.pairs.build import as_response
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.judge import Judge as EndpointJudge

if TYPE_CHECKING:
    from plad_fast.evaluation.intervals import FloatArray
    from plad_fast.pairs.scoring.scorers import Scorer

__all__ = [
    "HeldOut",
    "calibration_file",
    "draw_plots",
    "evaluate_models",
    "example_answers",
    "margin_unit",
    "scorer_file",
    "student_files",
]


@dataclass(frozen=True)
class HeldOut:
    """What students are measured on."""

    prompts: Sequence[Prompt]
    """With a teacher's answer each."""
    teacher_answers: Mapping[str, str]
    """Prompt id -> the teacher's answer."""
    pairs: Sequence[Mapping[str, Any]]
    """Rows of the preference format over some of the prompts: what is ranked."""
    pair_prompts: Sequence[str] = ()
    """The prompt's id of each pair; left out where a pair's own id is its prompt's."""

    def prompts_of_pairs(self) -> list[str]:
        """The prompt's id of each pair."""
        return list(self.pair_prompts) or [pair["id"] for pair in self.pairs]


def evaluate_models(
    students: Mapping[str, Path],
    held_out: HeldOut,
    folder: Path,
    *,
    sampling: Sampling,
    length_normalization: float = 0.0,
    max_length: int = 1024,
    precision: str = "auto",
    scorers: Mapping[str, Scorer] | None = None,
    judge: Judge | None = None,
    calibration_samples: int = 0,
    calibration_scorer: Scorer | None = None,
    others_aside: bool = False,
) -> tuple[dict[str, Any], list[StudentOutputs]]:
    """Measure students on held-out data.

    Args:
        students: name -> folder of the model, in the order of training.
        held_out: prompts, teacher's answers, pairs.
        folder: gets the answers and scores.
        sampling: of the students' own samples; the answers that ROUGE sees are greedy.
        length_normalization: alpha, as in the training.
        max_length: tokens of prompt and answer.
        precision: of generation; log-probabilities are always taken in float32.
        scorers: see `evaluate_students`; what they say is stored.
        judge: see `evaluate_students`. It is asked anew each time: give it a store of its own.
        calibration_samples: answers that each student samples to each prompt, over which the
            calibration of its likelihood is measured; 0 leaves that out.
        calibration_scorer: rates these samples; what it says is stored. Default: ROUGE-L to the
            reference where there is one, else to the teacher's answer.
        others_aside: what the folder has of other models or settings is no error: answers and
            scores of scorers are kept in files beside the new ones, log-probabilities replaced.

    Returns:
        The metrics of `evaluate_students`, to which `calibration` is added (see
        `calibration.evaluate_calibration`; None if it was not measured) and `judge` (see
        `Judge.summary`; None if there was none), and the students' outputs.

    Raises:
        UsageError: from loading, generation or storing; what is stored was made by other models
            or with other settings; and one sample to a prompt, or several at temperature 0.
    """
    require_samples(calibration_samples, sampling)
    for scorer in (*(scorers or {}).values(), *filter(None, [calibration_scorer])):
        scorer.check(held_out.prompts)
    quality: StoredScorer | RougeL = RougeL(held_out.prompts, held_out.teacher_answers)
    if calibration_scorer is not None:
        quality = StoredScorer(
            calibration_scorer,
            scorer_file(calibration_scorer.name, folder),
            others_aside=others_aside,
        )
    if others_aside and isinstance(judge, EndpointJudge) and judge.store is not None:
        set_aside(judge.store, judge.settings())
    runner = _Runner(
        held_out,
        folder,
        sampling,
        length_normalization,
        max_length,
        precision,
        calibration_samples,
        quality,
        others_aside,
    )
    ran = [runner.run(name, path) for name, path in students.items()]
    outputs = [output for output, _ in ran]
    references = {p.id: p.reference for p in held_out.prompts if p.reference is not None}
    if isinstance(judge, EndpointJudge):
        judge.restart()
    results = evaluate_students(
        outputs,
        held_out.teacher_answers,
        references or None,
        scorers={
            name: StoredScorer(scorer, scorer_file(scorer.name, folder), others_aside=others_aside)
            for name, scorer in (scorers or {}).items()
        },
        judge=judge,
        prompts={p.id: p.content for p in held_out.prompts},
    )
    results["judge"] = judge.summary() if isinstance(judge, EndpointJudge) else None
    results["calibration"] = None
    if rated := [samples for _, samples in ran if samples is not None]:
        results["calibration"] = measure_calibration(rated, calibration_samples, quality.name)
    return results, outputs


def calibration_file(name: str, folder: Path) -> Path:
    """Where the log-probabilities of a student's samples are stored."""
    return folder / f"{_slug(name)}-calibration.json"


def scorer_file(name: str, folder: Path) -> Path:
    """Where the scores of a scorer are stored, of all students."""
    return folder / f"scores-{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.jsonl"


def student_files(name: str, folder: Path) -> tuple[list[Path], Path]:
    """Where a student's answers are stored, greedy and sampled, and where its scores."""
    answers = [folder / f"{_slug(name)}-{kind}.jsonl" for kind in ("greedy", "sampled")]
    return answers, folder / f"{_slug(name)}-logps.json"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


@dataclass(frozen=True)
class _Runner:
    """Runs students on held-out data, or reads what they gave before; see `evaluate_models`."""

    held_out: HeldOut
    folder: Path
    sampling: Sampling
    length_normalization: float
    max_length: int
    precision: str
    calibration_samples: int
    quality: StoredScorer | RougeL
    others_aside: bool

    def run(self, name: str, path: Path) -> tuple[StudentOutputs, HeldOutSamples | None]:
        held_out, sampling = self.held_out, self.sampling
        tokenizer = load_tokenizer(path)
        greedy = Sampling(sampling.max_new_tokens, temperature=0.0, batch_size=sampling.batch_size)
        several = replace(sampling, n=max(sampling.n, self.calibration_samples))
        # The weights rather than the path: a run folder may move, and a path get other weights.
        made_by = {"student": name, "weights": model_digest(path), "precision": self.precision}
        # Plain-text pairs are continued as they stand: an answer is scored after what it was given.
        chat = not any(isinstance(pair["prompt"], str) for pair in held_out.pairs)
        answer_files, scores_file = student_files(name, self.folder)
        answered = []
        for file, how in zip(answer_files, (greedy, several), strict=True):

            def load(kind: str = file.stem) -> LocalModel:
                dtype = autocast_dtype(self.precision)
                model = load_model(path, dtype=dtype, device=best_device())
                return LocalModel(model, tokenizer, kind, chat=chat)

            answered.append(
                stored_answers(
                    load,
                    held_out.prompts,
                    file,
                    how,
                    fingerprint=made_by,
                    others_aside=self.others_aside,
                )
            )
        own = [answered[1].first[prompt_id] for prompt_id in held_out.prompts_of_pairs()]
        scoring = _Scoring(path, tokenizer, self.max_length)
        fingerprint = {**made_by, "max_length": self.max_length, **sampling.settings()}
        pair_scores = stored_scores(
            scores_file,
            {
                **fingerprint,
                "pairs": f"{len(held_out.pairs)} pairs, {digest(list(held_out.pairs))}",
                "samples": digest([[answer.text, answer.finish_reason] for answer in own]),
                "length_normalization": self.length_normalization,
            },
            lambda: _score(
                partial(scoring.pairs, length_normalization=self.length_normalization),
                held_out.pairs,
                own,
            ),
            replace=self.others_aside,
        )
        samples = None
        if self.calibration_samples:
            samples = score_samples(
                name,
                held_out.prompts,
                held_out.teacher_answers,
                answered[1].answers,
                calibration_file(name, self.folder),
                fingerprint={**fingerprint, "length_normalization": LENGTH_NORMALIZATION},
                content_of=lambda p: as_messages(tokenizer, p.content) if chat else p.content,
                score_responses=scoring.responses,
                quality=self.quality,
                replace=self.others_aside,
            )
        outputs = StudentOutputs(
            name,
            {prompt_id: answer.text for prompt_id, answer in answered[0].first.items()},
            chosen_logps=np.array(pair_scores["chosen"]),
            rejected_logps=np.array(pair_scores["rejected"]),
            pair_ids=[pair["id"] for pair in held_out.pairs],
            own_rejected_logps=np.array(pair_scores["own"], dtype=np.float64),  # None becomes NaN
            pair_prompts=held_out.prompts_of_pairs(),
        )
        return outputs, samples


class _Scoring:
    """Log-probabilities of a student in float32, loaded at the first call."""

    def __init__(self, path: Path, tokenizer: Any, max_length: int) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._model: Any = None

    def pairs(
        self, rows: Sequence[Mapping[str, Any]], *, length_normalization: float
    ) -> dict[str, Any]:
        return score_pairs(
            self._loaded(),
            self._tokenizer,
            rows,
            length_normalization=length_normalization,
            max_length=self._max_length,
        )

    def responses(self, rows: Sequence[tuple[Content, Sequence[Content]]]) -> list[FloatArray]:
        return score_responses(
            self._loaded(),
            self._tokenizer,
            rows,
            length_normalization=LENGTH_NORMALIZATION,
            max_length=self._max_length,
        )

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = load_model(self._path, dtype="float32", device=best_device())
        return self._model


def _score(
    score: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    samples: Sequence[Answer],
) -> dict[str, list[float | None]]:
    """Log-probabilities of chosen, rejected and the student's own sample, one per pair.

    Pairs of one prompt have the same sample, which is scored once.

    A sample that is empty, or was cut off by the length limit, is not an answer: scoring adds the
    end token, which the student did not choose. Such samples get None.
    """
    scores = score(pairs)
    rows: dict[str, dict[str, Any]] = {}
    for pair, sample in zip(pairs, samples, strict=True):
        if sample.finish_reason == "stop" and not is_blank(sample.text):
            rejected = as_response(pair["prompt"], sample.text)
            rows.setdefault(sample.prompt_id, {**pair, "rejected": rejected})
    logps = score(list(rows.values()))["rejected"].tolist() if rows else []
    own = dict(zip(rows, logps, strict=True))
    return {
        "chosen": scores["chosen"].tolist(),
        "rejected": scores["rejected"].tolist(),
        "own": [own.get(sample.prompt_id) for sample in samples],
    }
