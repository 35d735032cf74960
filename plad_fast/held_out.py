"""Run students on held-out prompts and write what is to be known of them.

Everything that takes a model is stored as it comes: answers line by line, log-probabilities in a
file per student. A killed evaluation goes on; a finished one is computed from the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plad_fast import plots
from plad_fast._devices import autocast_dtype, best_device
from plad_fast._records import digest, model_digest, require_equal
from plad_fast.errors import UsageError
from plad_fast.evaluation import (
    StudentOutputs,
    evaluate_students,
    score_pairs,
    write_atomically,
)
from plad_fast.pairs import (
    Answer,
    LocalModel,
    Prompt,
    Sampling,
    as_response,
    stored_answers,
)
from plad_fast.students import load_model, load_tokenizer
from plad_fast.training import log_history

_FORMAT = {"format": "plad-fast scores", "version": 1}


@dataclass(frozen=True)
class HeldOut:
    """What students are measured on."""

    prompts: Sequence[Prompt]
    """With a teacher's answer each."""
    teacher_answers: Mapping[str, str]
    """Prompt id -> the teacher's answer."""
    pairs: Sequence[Mapping[str, Any]]
    """Rows of the preference format over some of the prompts: what is ranked."""


def evaluate_models(
    students: Mapping[str, Path],
    held_out: HeldOut,
    folder: Path,
    *,
    sampling: Sampling,
    length_normalization: float = 0.0,
    max_length: int = 1024,
    precision: str = "auto",
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

    Returns:
        The metrics of `evaluate_students`, and the students' outputs.

    Raises:
        UsageError: from loading, generation or storing; and what is stored was made by other models
            or with other settings.
    """
    outputs = [
        _run_student(
            name, path, held_out, folder, sampling, length_normalization, max_length, precision
        )
        for name, path in students.items()
    ]
    references = {p.id: p.reference for p in held_out.prompts if p.reference is not None}
    return evaluate_students(outputs, held_out.teacher_answers, references or None), outputs


def draw_plots(
    results: Mapping[str, Any],
    outputs: Sequence[StudentOutputs],
    trainings: Mapping[str, Path],
    folder: Path,
    *,
    length_normalization: float,
) -> list[tuple[str, Path]]:
    """PNG files of a run, with their captions.

    Args:
        results, outputs: of `evaluate_models`.
        trainings: stage name -> folder of the model it made.
        folder: for the files.
        length_normalization: alpha, for the unit of the axis.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        (
            "Held-out results with 95 % intervals.",
            plots.plot_comparison(results, folder / "comparison.png"),
        ),
        (
            "How far each student puts the teacher's answer above the rejected one.",
            plots.plot_margins(
                outputs, folder / "margins.png", unit=margin_unit(length_normalization)
            ),
        ),
    ]
    logs = {name: log for name, path in trainings.items() if (log := log_history(path))}
    if logs:
        caption = "What the trainings logged."
        drawn.append((caption, plots.plot_training(logs, folder / "training.png")))
    return drawn


def margin_unit(length_normalization: float) -> str:
    """Of s(y) / |y|**alpha."""
    named = {0.0: "nat", 1.0: "nat per token"}
    return named.get(length_normalization, f"nat per token^{length_normalization:g}")


def example_answers(
    held_out: HeldOut, students: Sequence[StudentOutputs], count: int = 8
) -> list[dict[str, Any]]:
    """Prompt, teacher's and students' answers side by side, for the report."""
    return [
        {
            "prompt": prompt.content,
            "teacher": held_out.teacher_answers[prompt.id],
            "students": {student.name: student.answers[prompt.id] for student in students},
            **({} if prompt.reference is None else {"reference": prompt.reference}),
        }
        for prompt in held_out.prompts[:count]
    ]


def student_files(name: str, folder: Path) -> tuple[list[Path], Path]:
    """Where a student's answers are stored, greedy and sampled, and where its scores."""
    slug = name.lower().replace(" ", "-")
    answers = [folder / f"{slug}-{kind}.jsonl" for kind in ("greedy", "sampled")]
    return answers, folder / f"{slug}-logps.json"


def _run_student(
    name: str,
    path: Path,
    held_out: HeldOut,
    folder: Path,
    sampling: Sampling,
    length_normalization: float,
    max_length: int,
    precision: str,
) -> StudentOutputs:
    tokenizer = load_tokenizer(path)
    greedy = Sampling(sampling.max_new_tokens, temperature=0.0, batch_size=sampling.batch_size)
    # The weights rather than the path: a run folder may move, and a path get other weights.
    made_by = {"student": name, "weights": model_digest(path), "precision": precision}
    # Plain-text pairs are continued as they stand: an answer is scored after what it was given to.
    chat = not any(isinstance(pair["prompt"], str) for pair in held_out.pairs)
    answer_files, scores_file = student_files(name, folder)
    answers = []
    for file, how in zip(answer_files, (greedy, sampling), strict=True):

        def load(kind: str = file.stem) -> LocalModel:
            model = load_model(path, dtype=autocast_dtype(precision), device=best_device())
            return LocalModel(model, tokenizer, kind, chat=chat)

        answered = stored_answers(load, held_out.prompts, file, how, fingerprint=made_by)
        answers.append(answered.first)
    greedy_answers, samples = answers
    fingerprint = {
        **made_by,
        "pairs": f"{len(held_out.pairs)} pairs, {digest(list(held_out.pairs))}",
        "length_normalization": length_normalization,
        "max_length": max_length,
        **sampling.settings(),
    }
    scores = _stored_scores(scores_file, fingerprint)
    if scores is None:
        model = load_model(path, dtype="float32", device=best_device())

        def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            return score_pairs(
                model,
                tokenizer,
                rows,
                length_normalization=length_normalization,
                max_length=max_length,
            )

        scores = _score(score, held_out.pairs, samples)
        record = {**_FORMAT, "fingerprint": fingerprint, "scores": scores}
        write_atomically(scores_file, json.dumps(record))
    return StudentOutputs(
        name,
        {prompt_id: answer.text for prompt_id, answer in greedy_answers.items()},
        chosen_logps=np.array(scores["chosen"]),
        rejected_logps=np.array(scores["rejected"]),
        pair_ids=[pair["id"] for pair in held_out.pairs],
        own_rejected_logps=np.array(scores["own"], dtype=np.float64),  # None becomes NaN
    )


def _stored_scores(
    file: Path, fingerprint: Mapping[str, Any]
) -> dict[str, list[float | None]] | None:
    """The scores in a file of this fingerprint, or None if there is no file.

    Raises:
        UsageError: the file is not one of scores, or was made with another fingerprint.
    """
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        header = {name: record[name] for name in _FORMAT}
        found, scores = record["fingerprint"], record["scores"]
    except (ValueError, KeyError, TypeError):
        header = {}
    if header != _FORMAT:
        raise UsageError(
            f"{file} does not hold scores of this version of plad_fast; choose another "
            "--output-dir, or delete the file"
        )
    advice = "choose another --output-dir, or pass --overwrite to start anew"
    require_equal(found, json.loads(json.dumps(fingerprint)), file, advice)
    return scores


def _score(
    score: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    samples: Mapping[str, Answer],
) -> dict[str, list[float | None]]:
    """Log-probabilities of chosen, rejected and the student's own sample, one per pair.

    A sample that is empty, or was cut off by the length limit, is not an answer: scoring adds the
    end token, which the student did not choose. Such samples get None.
    """
    scores = score(pairs)
    usable = [
        index
        for index, pair in enumerate(pairs)
        if samples[pair["id"]].finish_reason == "stop" and samples[pair["id"]].text.strip()
    ]
    own: list[float | None] = [None] * len(pairs)
    if usable:
        rows = [
            {**pair, "rejected": as_response(pair["prompt"], samples[pair["id"]].text)}
            for pair in (pairs[index] for index in usable)
        ]
        for index, logp in zip(usable, score(rows)["rejected"].tolist(), strict=True):
            own[index] = logp
    return {
        "chosen": scores["chosen"].tolist(),
        "rejected": scores["rejected"].tolist(),
        "own": own,
    }
