"""Dependencies of the recipe's stages: the settings each of them depends on, besides the files it
reads.

A setting that no stage is listed with belongs to all of them: better anew than stale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.records import model_digest
from plad_fast.recipe.inputs import prompts_digest
from plad_fast.recipe.pair_settings import PairSettings
from plad_fast.recipe.settings import DistillConfig

_OF_TRAINING = ("seed", "precision", "max_length")
_OF_SAMPLES = ("max_new_tokens", "student_temperature", "top_p", "seed", "precision")
_OF_TEACHER = ("teacher", "base_url", "teacher_temperature", "teacher_samples")
STAGES: dict[str, tuple[str, ...]] = {
    "student": ("student", "student_layers"),
    # What else its answers depend on, the folder is bound to: see `RecipeTexts.teacher_settings`.
    "teacher's answers": ("teacher_samples",),
    "fine-tuning": ("sft_epochs", "sft_learning_rate", "sft_batch_size", *_OF_TRAINING),
    "samples": ("student_samples", *_OF_SAMPLES),
    "pairs": tuple(
        f.name
        for f in dataclasses.fields(PairSettings)
        if f.metadata["affects_results"] and f.name not in (*_OF_TEACHER, "student_samples")
    ),
    "calibration": (
        *("loss", "beta", "loss_args", "sft_weight", "length_normalization"),
        *("epochs", "learning_rate", "batch_size", *_OF_TRAINING),
    ),
    "evaluation": (
        *("scorer", "eval_scorer", "calibration_samples", "length_normalization", "max_length"),
        *_OF_SAMPLES,
    ),
}
# They say which prompts there are, and stages depend on these.
_OF_PROMPTS = (
    *("prompts", "prompt_column", "prompt_template", "reference_column", "split", "limit"),
    *("held_out", "sft_share"),
)


def stage_settings(
    config: DistillConfig,
    stage: str,
    *,
    prompts: Sequence[Prompt] = (),
    references: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Settings by their names.

    Args:
        config: of the run.
        stage: a key of `STAGES`.
        prompts: what the stage is about.
        references: it also depends on the prompts' references.
        more: what else it depends on, as JSON values.
    """
    of_results = config.results_settings()
    listed = {name for names in STAGES.values() for name in names}
    others = [name for name in of_results if name not in {*listed, *_OF_PROMPTS, *_OF_TEACHER}]
    settings = {name: of_results[name] for name in (*STAGES[stage], *others)}
    if prompts:
        given = prompts if references else [Prompt(p.id, p.content) for p in prompts]
        settings["prompts"] = prompts_digest(given)
    return {**settings, **more}


def student_settings(config: DistillConfig, teacher_source: str) -> dict[str, Any]:
    """Of the stage that makes the student: of the teacher, or of a model of its own."""
    source = config.student or teacher_source
    return {**stage_settings(config, "student"), "student's weights": model_digest(source)}


def scorer_settings(scorers: Mapping[str, Any], judge: Any) -> dict[str, Any]:
    """Of the stages that ask scorers."""
    known = {name: scorer.settings() for name, scorer in scorers.items()}
    judged = {} if judge is None else {"judge": judge.settings()}
    return {f"settings of {name}": value for name, value in (known | judged).items()}
