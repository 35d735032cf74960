"""Students run on held-out prompts and pairs, with every answer and score stored.

Everything that takes a model is stored as it comes: answers line by line, log-probabilities in a
file per student. A killed evaluation goes on; a finished one is computed from the files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from plad_fast.data.chat import is_blank
from plad_fast.data.prompts import as_messages
from plad_fast.data.records import digest, model_digest, recorded_scores
from plad_fast.evaluation.compare import evaluate_students
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.samples import (
    LENGTH_NORMALIZATION,
    RougeL,
    StoredScorer,
    measure_calibration,
    require_samples,
    score_samples,
)
from plad_fast.evaluation.students import Judge, StudentOutputs
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_pairs, score_responses
from plad_fast.pairs.build import as_response
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.judge import Judge as EndpointJudge

if TYPE_CHECKING:
    from plad_fast.evaluation.calibration import ScoredSamples
    from plad_fast.pairs.scoring.scorers import Scorer

_UNFIT = re.compile(r"[\s/\\:*?\"<>|\x00-\x1f\x7f]+")  # for the name of a file, on some system


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


class StudentFiles(NamedTuple):
    """Files of one student in the folder of an evaluation."""

    greedy: Path
    sampled: Path
    logps: Path
    """Log-probabilities of the pairs."""
    calibration: Path
    """Log-probabilities of the samples."""


def student_files(name: str, folder: Path) -> StudentFiles:
    """Where the answers and the log-probabilities of a student are stored."""
    stem = file_stem(name)
    names = ("greedy.jsonl", "sampled.jsonl", "logps.json", "calibration.json")
    return StudentFiles(*(folder / f"{stem}-{end}" for end in names))


def scorer_file(name: str, folder: Path) -> Path:
    """Where the scores of a scorer are stored, of all students."""
    return folder / f"scores-{file_stem(name)}.jsonl"


def file_stem(name: str) -> str:
    """A name as part of a file's; one for names that some file system cannot tell apart."""
    return _UNFIT.sub("-", unicodedata.normalize("NFKC", name).casefold()).strip("-")


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

    def run(self, name: str, path: Path) -> tuple[StudentOutputs, ScoredSamples | None]:
        held_out, sampling = self.held_out, self.sampling
        files = student_files(name, self.folder)
        model = _Student(path, self.precision, self.max_length)
        # The weights rather than the path: a run folder may move, and a path get other weights.
        made_by = {"student": name, "weights": model_digest(path), "precision": self.precision}
        # Plain-text pairs are continued as they stand: an answer is scored after what it was given.
        chat = not any(isinstance(pair["prompt"], str) for pair in held_out.pairs)
        greedy, sampled = (
            stored_answers(
                partial(model.for_answers, file.stem, chat=chat),
                held_out.prompts,
                file,
                how,
                fingerprint=made_by,
                others_aside=self.others_aside,
            )
            for file, how in (
                (
                    files.greedy,
                    Sampling(
                        sampling.max_new_tokens, temperature=0.0, batch_size=sampling.batch_size
                    ),
                ),
                (files.sampled, replace(sampling, n=max(sampling.n, self.calibration_samples))),
            )
        )
        own = [sampled.first[prompt_id] for prompt_id in held_out.prompts_of_pairs()]
        fingerprint = {**made_by, "max_length": self.max_length, **sampling.settings()}
        score = partial(model.pairs, length_normalization=self.length_normalization)
        logps = recorded_scores(
            files.logps,
            {
                **fingerprint,
                "pairs": f"{len(held_out.pairs)} pairs, {digest(list(held_out.pairs))}",
                "samples": digest([[answer.text, answer.finish_reason] for answer in own]),
                "length_normalization": self.length_normalization,
            },
            lambda: _score(score, held_out.pairs, own),
            replace=self.others_aside,
        )
        samples = None
        if self.calibration_samples:
            samples = score_samples(
                name,
                held_out,
                sampled.answers,
                files.calibration,
                fingerprint={**fingerprint, "length_normalization": LENGTH_NORMALIZATION},
                content_of=lambda p: as_messages(model.tokenizer, p.content) if chat else p.content,
                score_responses=partial(model.responses, length_normalization=LENGTH_NORMALIZATION),
                quality=self.quality,
                replace=self.others_aside,
            )
        outputs = StudentOutputs(
            name,
            {prompt_id: answer.text for prompt_id, answer in greedy.first.items()},
            chosen_logps=np.array(logps["chosen"]),
            rejected_logps=np.array(logps["rejected"]),
            pair_ids=[pair["id"] for pair in held_out.pairs],
            own_rejected_logps=np.array(logps["own"], dtype=np.float64),  # None becomes NaN
            pair_prompts=held_out.prompts_of_pairs(),
            cut_off={key for key, answer in greedy.first.items() if answer.finish_reason != "stop"},
        )
        return outputs, samples


class _Student:
    """A saved model: loaded for every set of answers, and once in float32 for log-probabilities."""

    def __init__(self, path: Path, precision: str, max_length: int) -> None:
        self._path = path
        self._precision = precision
        self._max_length = max_length
        self.tokenizer = load_tokenizer(path)

    def for_answers(self, name: str, *, chat: bool) -> LocalModel:
        dtype = autocast_dtype(self._precision)
        model = load_model(self._path, dtype=dtype, device=best_device())
        return LocalModel(model, self.tokenizer, name, chat=chat)

    def pairs(self, rows: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        return score_pairs(
            self._for_logps, self.tokenizer, rows, max_length=self._max_length, **options
        )

    def responses(self, rows: Sequence[tuple[Any, Sequence[Any]]], **options: Any) -> Sequence[Any]:
        return score_responses(
            self._for_logps, self.tokenizer, rows, max_length=self._max_length, **options
        )

    @cached_property
    def _for_logps(self) -> Any:
        return load_model(self._path, dtype="float32", device=best_device())


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
