"""Dependencies of the recipe's stages: the settings each of them depends on, besides the files it
reads.

A setting that no stage is listed with belongs to all of them: better anew than stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plad_fast.recipe.settings import SELECTION, DistillConfig

if TYPE_CHECKING:
    from plad_fast.data.prompts import Prompt

OF_TRAINING = (
    *("seed", "precision", "max_length", "training"),
    *("lora_r", "lora_alpha", "lora_targets", "load_in_4bit", "merge"),
)
_OF_SAMPLES = ("max_new_tokens", "student_temperature", "top_p", "seed", "precision")
_OF_TEACHER = ("teacher", "base_url", "teacher_temperature", "teacher_samples")
STAGES: dict[str, tuple[str, ...]] = {
    "student": ("student", "student_layers"),
    # What else its answers depend on, the folder is bound to: see `bound_settings`.
    "teacher's answers": ("teacher_samples",),
    "fine-tuning": (
        *("reasoning", "sft_epochs", "sft_learning_rate", "sft_batch_size", "lora_dropout"),
        *OF_TRAINING,
    ),
    "samples": ("reasoning", "student_samples", "rejected_from", *_OF_SAMPLES),
    "pairs": SELECTION,
    "preference training": (
        *("loss", "beta", "loss_args", "sft_weight", "length_normalization", "rank_end_token"),
        *("epochs", "learning_rate", "batch_size", *OF_TRAINING),
    ),
    # Of preference training, where it is validated.
    "validation": ("patience", "max_new_tokens", "reasoning"),
    "evaluation": (
        *("reasoning", "scorer", "eval_scorer", "calibration_samples"),
        *("length_normalization", "max_length", *_OF_SAMPLES),
    ),
}
# They say which prompts there are, and stages depend on these.
_OF_PROMPTS = (
    *("prompts", "prompt_column", "prompt_template", "reference_column", "split", "limit"),
    *("held_out", "validation", "sft_share"),
)


def stage_settings(
    config: DistillConfig,
    stage: str,
    *,
    prompts: Sequence[Prompt] = (),
    references: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """All that a stage of `STAGES` depends on, by name: settings, the prompts that it is about, of
    which references count with `references` only, and `more` JSON values."""
    of_results = config.results_settings()
    listed = {name for names in STAGES.values() for name in names}
    others = [name for name in of_results if name not in {*listed, *_OF_PROMPTS, *_OF_TEACHER}]
    settings = {name: of_results[name] for name in (*STAGES[stage], *others)}
    if "max_new_tokens" in settings:
        settings["max_new_tokens"] = config.student_tokens
    if prompts:
        from plad_fast.recipe.inputs import prompts_digest  # `--help` loads no torch

        given = prompts if references else [replace(p, reference=None) for p in prompts]
        settings["prompts"] = prompts_digest(given)
    return {**settings, **more}


def bound_settings(config: DistillConfig, teacher_made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run folder with answers is bound to, by names that a user knows.
    `teacher_made_by` is that of `Teachers`."""
    settings = {
        name if name in ("teacher", "base_url") else f"teacher's {name}": value
        for name, value in teacher_made_by.items()
    }
    names = ["teacher_temperature", "max_new_tokens", "seed"]
    # An endpoint adds them itself, as room that an answer need not use: there they are free.
    if config.reasoning_tokens and not all(name.startswith("openai:") for name in config.teachers):
        names.append("reasoning_tokens")
    return settings | {name: getattr(config, name) for name in names}
