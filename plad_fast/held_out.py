"""Run students on held-out prompts and write what is to be known of them.

Everything that takes a model is stored as it comes: answers line by line, log-probabilities in a
file per student. A killed evaluation goes on; a finished one is computed from the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plad_fast import plots
from plad_fast.evaluation import (
    StudentOutputs,
    evaluate_students,
    score_pairs,
    write_atomically,
)
from plad_fast.pairs import (
    LocalModel,
    Prompt,
    Sampling,
    as_response,
    stored_answers,
)
from plad_fast.students import load_model, load_tokenizer
from plad_fast.training import autocast_dtype, best_device, log_history


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
        UsageError: from loading, generation or storing.
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
    unit = "nat per token" if length_normalization == 1 else "nat"
    drawn = [
        (
            "Held-out results with 95 % intervals.",
            plots.plot_comparison(results, folder / "comparison.png"),
        ),
        (
            "How far each student puts the teacher's answer above the rejected one.",
            plots.plot_margins(outputs, folder / "margins.png", unit=unit),
        ),
    ]
    logs = {name: log for name, path in trainings.items() if (log := log_history(path))}
    if logs:
        caption = "What the trainings logged."
        drawn.append((caption, plots.plot_training(logs, folder / "training.png")))
    return drawn


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
    slug = name.lower().replace(" ", "-")
    tokenizer = load_tokenizer(path)
    greedy = Sampling(sampling.max_new_tokens, temperature=0.0, batch_size=sampling.batch_size)
    answers = {}
    for kind, how in (("greedy", greedy), ("sampled", sampling)):

        def load(kind: str = kind) -> LocalModel:
            model = load_model(path, dtype=autocast_dtype(precision), device=best_device())
            return LocalModel(model, tokenizer, f"{name}, {kind}")

        answers[kind] = stored_answers(
            load,
            held_out.prompts,
            folder / f"{slug}-{kind}.jsonl",
            how,
            fingerprint={"student": name},
        )
    texts = {
        kind: {prompt_id: answer.text for prompt_id, answer in by_id.items()}
        for kind, by_id in answers.items()
    }
    scores = _scores(
        folder / f"{slug}-logps.json",
        path,
        tokenizer,
        held_out.pairs,
        texts["sampled"],
        length_normalization,
        max_length,
    )
    return StudentOutputs(
        name,
        texts["greedy"],
        chosen_logps=np.array(scores["chosen"]),
        rejected_logps=np.array(scores["rejected"]),
        pair_ids=[pair["id"] for pair in held_out.pairs],
        own_rejected_logps=np.array(scores["own"]),
    )


def _scores(
    file: Path,
    path: Path,
    tokenizer: Any,
    pairs: Sequence[Mapping[str, Any]],
    own_answers: Mapping[str, str],
    length_normalization: float,
    max_length: int,
) -> dict[str, list[float]]:
    """Log-probabilities of chosen, rejected and the student's own sample, one per pair."""
    if file.is_file():
        return json.loads(file.read_text())
    model = load_model(path, dtype="float32", device=best_device())

    def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return score_pairs(
            model,
            tokenizer,
            rows,
            length_normalization=length_normalization,
            max_length=max_length,
        )

    scores = score(pairs)
    own_pairs = [
        {**pair, "rejected": as_response(pair["prompt"], own_answers[pair["id"]])} for pair in pairs
    ]
    own = score(own_pairs)
    result = {
        "chosen": scores["chosen"].tolist(),
        "rejected": scores["rejected"].tolist(),
        "own": own["rejected"].tolist(),
    }
    write_atomically(file, json.dumps(result))
    return result
