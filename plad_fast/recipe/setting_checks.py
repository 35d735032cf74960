"""Checks of settings against one another; each by itself is checked by its field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.places import OFFLINE, lies_in
from plad_fast.data.places import expanded as expanded_path
from plad_fast.data.records import ELSEWHERE
from plad_fast.errors import UsageError
from plad_fast.recipe.fields import flag

if TYPE_CHECKING:
    from plad_fast.recipe.settings import DistillConfig


def check_together(config: DistillConfig) -> None:
    """Raises UsageError for settings that contradict each other, by the flags' names."""
    # `--help` loads no torch.
    from plad_fast.losses.objective import check_settings
    from plad_fast.losses.registry import get_loss
    from plad_fast.pairs.build import require_selection
    from plad_fast.pairs.generation.endpoint.access import check_variable

    check_variable(config.api_key_env)  # before it gets into any file
    _check_teachers(config)
    require_selection(
        config.select,
        has_scores=config.scorer is not None,
        filters=config.pair_filters(),
        list_size=config.list_size,
    )
    for name in ("actors", "gpus_per_actor"):
        if config.engine != "ray" and getattr(config, name) is not None:
            raise UsageError(f"{flag(name)} is of Ray's actors; add --engine ray, or drop it")
    if (config.price_in is None) != (config.price_out is None):
        raise UsageError("--price-in and --price-out belong together; give both")
    if get_loss(config.loss).needs_scores and config.scorer is None:
        raise UsageError(f"--loss {config.loss} needs scores of the answers; choose a --scorer")
    if config.select == "best-worst-student" and config.student_samples < 2:
        raise UsageError(
            "--select best-worst-student chooses among samples of a prompt; give --student-samples "
            "2 or more"
        )
    temperatures, turns = config.temperatures, len(config.sample_turns)
    for samples, temperature, are_same in (
        ("teacher_samples", "teacher_temperature", config.teacher_temperature == 0),
        ("student_samples", "student_temperature", min(temperatures) == 0),
        ("calibration_samples", "student_temperature", max(temperatures) == 0),
    ):
        count = getattr(config, samples)
        if are_same and count > (turns if samples == "student_samples" else 1):
            raise UsageError(
                f"{flag(samples)} {count} would give the same answer several times at "
                f"{flag(temperature)} 0; raise it"
            )
    check_settings(config.loss, vars(config), flag)
    check_adapters(vars(config))
    if config.load_in_4bit and not config.merge:
        raise UsageError(
            "--load-in-4bit: preference training begins with the fine-tuned student, which can be "
            "quantised only as a whole model; add --merge"
        )
    size = config.micro_batch_size
    if size is not None and (config.batch_size % size or config.sft_batch_size % size):
        raise UsageError(
            f"--micro-batch-size must divide --batch-size {config.batch_size} and "
            f"--sft-batch-size {config.sft_batch_size}, got {size}"
        )


def _check_teachers(config: DistillConfig) -> None:
    from plad_fast.pairs.generation.sources import require_teacher

    teachers = config.teachers
    for teacher in teachers:
        if teacher != OFFLINE:
            require_teacher(teacher, "--teacher")
        if teachers.count(teacher) > 1:
            raise UsageError(
                f"--teacher {teacher} stands there twice; for several answers of one teacher give "
                "--teacher-samples"
            )
    if len(teachers) > 1 and config.scorer is None:
        raise UsageError(
            f"no scorer decides between the teachers {', '.join(teachers)}; choose a --scorer"
        )
    if config.batch and not any(name.startswith("openai:") for name in teachers):
        raise UsageError(
            f"--batch is for teachers of openai:MODEL, and there is {', '.join(teachers)}"
        )


def check_adapters(settings: Mapping[str, Any]) -> None:
    """Raises UsageError for settings of adapters where there are none."""
    names = ("lora_alpha", "lora_targets", "lora_dropout", "load_in_4bit", "merge")
    require_with("lora_r", settings, names)


def require_with(needed: str, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises UsageError where one of the named settings is given without the one that it needs."""
    given = [name for name in names if settings.get(name)]
    if given and settings.get(needed) is None:
        raise UsageError(f"{flag(given[0])} does nothing without {flag(needed)}")


def expanded(output_dir: str) -> str:
    """An output folder with `~` spelt out, which a shell leaves to us in `--output-dir=~/runs`;
    UsageError where nobody has that home folder, or it is no name of a folder."""
    if not output_dir.strip():
        raise UsageError("--output-dir is empty; give a folder to write into")
    try:
        return str(expanded_path(output_dir))
    except UsageError as error:
        raise UsageError(f"--output-dir {error}") from None


def require_outside(folder: Path, config: DistillConfig) -> None:
    """Raises UsageError where emptying the folder would remove what the run is to read."""
    names = ("student", "prompts", "scorer", "eval_scorer")
    given = [(name, getattr(config, name) or "") for name in names]
    for name, text in [*(("teacher", teacher) for teacher in config.teachers), *given]:
        place = re.sub("^(likelihood|reward|vllm):", "", text)
        if text and (lies_in(place, folder) or lies_in(place.partition("#")[0], folder)):
            raise UsageError(
                f"{flag(name)} {text} lies in --output-dir {folder}, which --overwrite would empty "
                f"before it is read; {ELSEWHERE}"
            )
