"""Students run on held-out prompts and pairs, with every answer and score stored.

Everything that takes a model is stored as it comes: answers line by line, log-probabilities in a
file per student. A killed evaluation goes on; a finished one is computed from the files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from plad_fast.data.prompts import as_messages
from plad_fast.data.records import digest, recorded_scores
from plad_fast.evaluation.calibration import ScoredSamples
from plad_fast.evaluation.compare import evaluate_students
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.samples import (
    LENGTH_NORMALIZATION,
    RougeL,
    StoredScorer,
    measure_calibration,
    require_samples,
)
from plad_fast.evaluation.students import Judge, StudentOutputs
from plad_fast.models.adapters import merge_for_inference
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.models.response_scores import score_responses, score_rows
from plad_fast.models.team import rank, size, together
from plad_fast.pairs.build import as_response
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside
from plad_fast.pairs.generation.sources import LazyLocalModel, student_fingerprint
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.judge import Judge as EndpointJudge
from plad_fast.pairs.select import is_usable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plad_fast.pairs.generation.answer_rows import Answered
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
    reasoning: str = "drop",
    scorers: Mapping[str, Scorer] | None = None,
    judge: Judge | None = None,
    calibration_samples: int = 0,
    calibration_scorer: Scorer | None = None,
    samples: Mapping[str, Path] | None = None,
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
        reasoning: of the students' answers; see `stored_answers`. Only under "keep" do students go
            on with a thought that their chat template opens.
        scorers: see `evaluate_students`; what they say is stored.
        judge: see `evaluate_students`. It is asked anew each time: give it a store of its own.
        calibration_samples: answers that each student samples to each prompt, over which the
            calibration of its likelihood is measured; 0 leaves that out.
        calibration_scorer: rates these samples; what it says is stored. Default: ROUGE-L to the
            reference where there is one, else to the teacher's answer.
        samples: name -> store that has this student's samples already; others are drawn and stored
            in the folder.
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

    def stored(scorer: Scorer) -> StoredScorer:
        scorer.check(held_out.prompts)
        file = scorer_file(scorer.name, folder)
        if others_aside:
            set_aside(file, scorer.settings())
        return StoredScorer(scorer, file)

    rating = {name: stored(scorer) for name, scorer in (scorers or {}).items()}
    quality: StoredScorer | RougeL = RougeL(held_out.prompts, held_out.teacher_answers)
    if calibration_scorer is not None:
        quality = stored(calibration_scorer)
    endpoint_judge = judge if isinstance(judge, EndpointJudge) else None
    if others_aside and endpoint_judge is not None and endpoint_judge.store is not None:
        set_aside(endpoint_judge.store, endpoint_judge.settings())

    def run(name: str, path: Path) -> tuple[StudentOutputs, ScoredSamples | None]:
        """Nothing holds a student's models after this."""
        files = student_files(name, folder)
        student = _Student(
            name,
            path,
            held_out,
            files._replace(sampled=(samples or {}).get(name, files.sampled)),
            replace(sampling, n=max(sampling.n, calibration_samples)),
            length_normalization,
            max_length,
            precision,
            others_aside,
            reasoning,
        )
        outputs = student.outputs()
        return outputs, student.scored_samples(quality) if calibration_samples else None

    ran = [run(name, path) for name, path in students.items()]
    outputs = [output for output, _ in ran]
    if endpoint_judge is not None:
        endpoint_judge.restart()
    results = evaluate_students(
        outputs,
        held_out.teacher_answers,
        {p.id: p.reference for p in held_out.prompts if p.reference is not None} or None,
        scorers=rating,
        judge=judge,
        prompts={p.id: p.content for p in held_out.prompts},
    )
    results["judge"] = None if endpoint_judge is None else endpoint_judge.summary()
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
class _Student:
    """A saved model on held-out data: it is run, or what it gave before is read; see
    `evaluate_models`.

    It is loaded for its answers, and in float32 for log-probabilities.
    """

    name: str
    path: Path
    held_out: HeldOut
    files: StudentFiles
    sampling: Sampling
    length_normalization: float
    max_length: int
    precision: str
    others_aside: bool
    reasoning: str

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    @cached_property
    def chat(self) -> bool:
        """Plain-text pairs are continued as they stand: an answer is scored after what it was
        given."""
        return not any(isinstance(pair["prompt"], str) for pair in self.held_out.pairs)

    @cached_property
    def sampled(self) -> Answered:
        return self._answers(self.files.sampled, self.sampling)

    def outputs(self) -> StudentOutputs:
        """Greedy answers, and the log-probabilities of the pairs and of an own sample for each."""
        pairs, pair_prompts = self.held_out.pairs, self.held_out.pair_prompts
        limit, batch_size = self.sampling.max_new_tokens, self.sampling.batch_size
        greedy = self._answers(
            self.files.greedy, Sampling(limit, temperature=0.0, batch_size=batch_size)
        ).first
        own = [self.sampled.first[prompt_id] for prompt_id in pair_prompts]
        logps = recorded_scores(
            self.files.logps,
            {
                **self._fingerprint(),
                "pairs": f"{len(pairs)} pairs, {digest(list(pairs))}",
                "samples": digest([[answer.text, answer.finish_reason] for answer in own]),
                "length_normalization": self.length_normalization,
            },
            lambda: self._score_pairs(own),
            replace=self.others_aside,
        )
        return StudentOutputs(
            self.name,
            {prompt_id: answer.text for prompt_id, answer in greedy.items()},
            chosen_logps=np.array(logps["chosen"]),
            rejected_logps=np.array(logps["rejected"]),
            pair_ids=[pair["id"] for pair in pairs],
            own_rejected_logps=np.array(logps["own"], dtype=np.float64),  # None becomes NaN
            pair_prompts=pair_prompts,
            cut_off={key for key, answer in greedy.items() if answer.finish_reason != "stop"},
        )

    def scored_samples(self, quality: StoredScorer | RougeL) -> ScoredSamples:
        """The samples, with their log-probabilities, which are stored, and their quality.

        A sample that is empty, or was cut off by the length limit, is left out: scoring adds the
        end token, which the student did not choose.
        """
        prompts, samples = self.held_out.prompts, self.sampled.answers
        teacher = [self.held_out.teacher_answers[p.id] for p in prompts]
        finished = [[a.text for a in samples.get(p.id, ()) if is_usable(a)] for p in prompts]
        # Equal texts are scored once: their likelihoods tie exactly, and it takes no time.
        texts = [
            list(dict.fromkeys([*own, best])) for own, best in zip(finished, teacher, strict=True)
        ]
        contents = [
            as_messages(self.tokenizer, p.content) if self.chat else p.content for p in prompts
        ]

        def score() -> dict[str, Any]:
            rows = [
                (content, [as_response(content, text) for text in answers])
                for content, answers in zip(contents, texts, strict=True)
            ]
            templates = [prompt.template for prompt in prompts]
            return {"logps": self._scores(rows, LENGTH_NORMALIZATION, templates)}

        stored = recorded_scores(
            self.files.calibration,
            {
                **self._fingerprint(),
                "length_normalization": LENGTH_NORMALIZATION,
                "texts": f"{sum(map(len, texts))} answers, {digest([contents, texts])}",
            },
            score,
            replace=self.others_aside,
        )
        logps = [dict(zip(t, v, strict=True)) for t, v in zip(texts, stored["logps"], strict=True)]
        items = [(p, text) for p, own in zip(prompts, finished, strict=True) for text in own]
        flat = np.asarray(quality.score(items) if items else [], dtype=np.float64)
        rated = np.split(flat, np.cumsum([len(own) for own in finished])[:-1])
        there = [np.isfinite(values) for values in rated]  # NaN where the scorer gave none
        return ScoredSamples(
            self.name,
            [p.id for p in prompts],
            [
                np.array([known[text] for text in own])[kept]
                for known, own, kept in zip(logps, finished, there, strict=True)
            ],
            [values[kept] for values, kept in zip(rated, there, strict=True)],
            np.array([known[best] for known, best in zip(logps, teacher, strict=True)]),
            n_unfinished=sum(len(samples.get(p.id, ())) for p in prompts) - len(items),
        )

    def _fingerprint(self) -> dict[str, Any]:
        """Of log-probabilities."""
        return {**self._made_by, "max_length": self.max_length, **self.sampling.settings()}

    @cached_property
    def _made_by(self) -> dict[str, Any]:
        return student_fingerprint(
            self.name, self.path, precision=self.precision, reasoning=self.reasoning
        )

    def _answers(self, file: Path, sampling: Sampling) -> Answered:
        load = partial(self._text_model, file.stem)
        return stored_answers(
            lambda: LazyLocalModel(load, file.stem),
            self.held_out.prompts,
            file,
            sampling,
            fingerprint=self._made_by,
            others_aside=self.others_aside,
            reasoning=self.reasoning,
        )

    @cached_property
    def _loaded(self) -> list[PreTrainedModel]:
        return []

    def _model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model, of which there is one at a time."""
        if not self._loaded or self._loaded[0].dtype != dtype:
            self._loaded.clear()  # makes room
            model = load_model(self.path, dtype=dtype, device=best_device())
            self._loaded.append(merge_for_inference(model))
        return self._loaded[0]

    def _text_model(self, name: str) -> LocalModel:
        model, thinks = self._model(autocast_dtype(self.precision)), self.reasoning == "keep"
        return LocalModel(model, self.tokenizer, name, chat=self.chat, thinks=thinks)

    def __getstate__(self) -> dict[str, Any]:
        """Another process loads the model itself."""
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    def _score_pairs(self, samples: Sequence[Answer]) -> dict[str, list[float | None]]:
        """Log-probabilities of chosen, rejected and the student's own sample, one per pair.

        Pairs of one prompt have the same sample, which is scored once, and not again where it is
        what a pair rejects. One that is no whole answer gets None, as in `scored_samples`.
        """
        rows: list[dict[str, Any]] = []
        places: dict[str, tuple[int, int]] = {}  # of the samples: row, response
        for pair, sample in zip(self.held_out.pairs, samples, strict=True):
            rejected = [pair["rejected"]]
            if is_usable(sample) and sample.prompt_id not in places:
                own = as_response(pair["prompt"], sample.text, sample.tool_calls)
                if own != pair["rejected"]:
                    rejected.append(own)
                places[sample.prompt_id] = len(rows), len(rejected)
            rows.append({**pair, "rejected": rejected})
        logps = self._scores(rows, self.length_normalization)
        by_prompt = {key: logps[row][place] for key, (row, place) in places.items()}
        return {
            "chosen": [row[0] for row in logps],
            "rejected": [row[1] for row in logps],
            "own": [by_prompt.get(sample.prompt_id) for sample in samples],
        }

    def _scores(
        self,
        rows: Sequence[Any],
        length_normalization: float,
        templates: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[list[float]]:
        """Log-probabilities of the responses in rows of pairs or, with `templates`, in what
        `score_responses` takes; all processes of a run share the batches."""
        parts = together(self._scored_part, rows, length_normalization, templates)
        return [np.nanmax(of_row, axis=0).tolist() for of_row in zip(*parts, strict=True)]

    def _scored_part(
        self,
        rows: Sequence[Any],
        length_normalization: float,
        templates: Sequence[Mapping[str, Any]] | None,
    ) -> list[NDArray[np.float64]]:
        model = self._model(torch.float32)
        options: dict[str, Any] = {
            "length_normalization": length_normalization,
            "max_length": self.max_length,
            "progress": rank() == 0,
            "part": (rank(), size()),
        }
        if templates is None:
            return score_rows(model, self.tokenizer, rows, **options)
        return score_responses(model, self.tokenizer, rows, templates=templates, **options)
