"""What the cards of trained models say, and the line that sums a training up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.data.places import BUILTIN
from plad_fast.models.loading import ADAPTER_CONFIG
from plad_fast.recipe.doctor import versions
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.validation import verdict
from plad_fast.training.card import without_folders, write_card
from plad_fast.training.trained_folders import found_record
from plad_fast.training.validation import best_check

_SHOWN = (
    *("loss", "nll", "ranking_accuracy", "margin"),
    *("rewards/accuracies", "rewards/margins", "active_pairs"),
)
_NOT_SETTINGS = ("source", "rows", "eval_pairs")  # of the record of a training
# Free to change in a run that goes on; a new one depends on them.
_OF_NEW_RUNS = ("rounds", "saves_per_stage", "reasoning_tokens")


def training_summary(log: Sequence[Mapping[str, Any]]) -> str:
    """The last metrics of a training, and of an evaluation the best."""
    last: Mapping[str, Any] = next((entry for entry in reversed(log) if "nll" in entry), {})
    told = [", ".join(f"{name} {last[name]:.3f}" for name in _SHOWN if name in last)]
    if log and "best_step" in log[-1]:
        step, names = log[-1]["best_step"], [f"eval_{name}" for name in _SHOWN]
        best = next(entry for entry in log if entry["step"] == step and "eval_nll" in entry)
        metrics = ", ".join(f"{name} {best[name]:.3f}" for name in names if name in best)
        told.append(f"best checkpoint: step {step}, {metrics}")
    return "; ".join(told)


def describe_training(
    folder: Path,
    model: str,
    data: Mapping[str, str | None],
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the card of a model of `plad-fast train`; `data` has the settings that name it."""
    pairs = data["pairs"] or ""
    record = found_record(folder) or {}
    settings = {name: value for name, value in record.items() if name not in _NOT_SETTINGS}
    settings = {"model": model, **data, **settings}
    write_card(
        folder,
        base_model=model,
        facts={
            "data": f"{without_folders(pairs)}: {record.get('rows', 'rows unknown')}",
            **_facts(record, folder),
            "outcome": training_summary(log),
        },
        command="plad-fast train",
        settings={name: value for name, value in settings.items() if value is not None},
        versions=versions(),
        datasets=[pairs],
    )


def describe_student(
    folder: Path, config: DistillConfig, log: Sequence[Mapping[str, Any]], evaluation: str
) -> None:
    """Writes the card of a student of `plad-fast distill`, with the table of its evaluation, and
    the step that validation kept."""
    record, kept = found_record(folder) or {}, verdict(log, "student before this training")
    best = best_check(log)
    until = [entry for entry in log if best is None or entry["step"] <= best["step"]]
    prompts = without_folders(config.prompts)
    settings = config.results_settings() | {name: getattr(config, name) for name in _OF_NEW_RUNS}
    write_card(
        folder,
        base_model=config.student or config.teachers[0],
        facts={
            "teacher": ", ".join(map(without_folders, config.teachers)),
            "data": f"{prompts}: {record.get('rows', 'rows unknown')}",
            **_facts(record, folder),
            **({"outcome": told} if (told := training_summary(until)) else {}),
            **({"kept by validation": kept} if kept else {}),
        },
        evaluation=evaluation,
        command="plad-fast distill",
        settings={name: value for name, value in settings.items() if value is not None},
        versions=versions(),
        datasets=[] if config.prompts in BUILTIN else [config.prompts],
    )


def _facts(record: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Loss and adapters, of the record of a training and its model."""
    names = ("loss", "beta", "loss_args", "sft_weight", "length_normalization", "rank_end_token")
    loss = ", ".join(f"{n} {record[n]}" for n in names if record.get(n))
    trained = "all weights"
    if "lora_r" in record:
        trained = (
            f"LoRA adapters of rank {record['lora_r']}, alpha {record['lora_alpha']:g}, on "
            f"{record['lora_targets']}"
            + ", frozen weights in 4 bits" * record["load_in_4bit"]
            # Also where validation has kept the student before the training.
            + ", merged" * (not (folder / ADAPTER_CONFIG).exists())
        )
    return {"loss": loss.removeprefix("loss "), "trained": trained}
