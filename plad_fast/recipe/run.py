"""What the stages of a run share: its settings, prompts, texts, scorers and folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.places import OFFLINE
from plad_fast.models.devices import autocast_dtype, best_device
from plad_fast.models.loading import find_model, load_model, load_tokenizer, offline_teacher_path
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.recipe.inputs import RunPrompts
from plad_fast.recipe.run_folder import RunFolder
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.texts import RecipeTexts
from plad_fast.training.train import train_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SFT, PLAD = "SFT student", "PLaD student"
_OF_TRAINING = (
    *("micro_batch_size", "max_tokens_per_batch", "gradient_checkpointing"),
    *("seed", "precision", "max_length", "training"),
    *("lora_r", "lora_alpha", "lora_targets", "load_in_4bit", "merge"),
)


class LocalTeacher:
    """The teacher's model, loaded once for the student and the answers: a GGUF file takes its
    time."""

    def __init__(self, config: DistillConfig) -> None:
        is_offline = config.teacher == OFFLINE
        self.source = str(offline_teacher_path()) if is_offline else config.teachers[0]
        self._precision = config.precision

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.source, merge_adapters=True)

    def __getstate__(self) -> dict[str, Any]:
        """Another process loads the model itself."""
        return {name: value for name, value in vars(self).items() if name != "model"}

    def as_text(self) -> LocalModel:
        model = self.model.to(device=best_device(), dtype=autocast_dtype(self._precision))
        return LocalModel(model, load_tokenizer(self.source), "teacher")


@dataclass(frozen=True)
class Run:
    """What was read and opened for a run."""

    config: DistillConfig
    prompts: RunPrompts
    teacher: LocalTeacher
    texts: RecipeTexts
    evaluation: Mapping[str, Any]
    """Options of `evaluate_models`."""
    folder: RunFolder

    @property
    def students(self) -> dict[str, str]:
        """Folder -> name of every student that is evaluated, in the order of training."""
        rounds = self.config.rounds
        names = {"sft": SFT}
        for number in range(1, rounds + 1):
            name = PLAD if rounds == 1 else f"PLaD round {number}"
            names[numbered("plad", number)] = name
        return names

    @property
    def teacher_files(self) -> list[str]:
        return [f"answers/{store.name}" for store in self.texts.teachers.stores]

    @property
    def student_source(self) -> str:
        """Of the model that the student is made of."""
        student = self.config.student
        return self.teacher.source if student is None else find_model(student, "--student")

    def train(
        self, source: str, rows: Sequence[Mapping[str, Any]], output: str, **options: Any
    ) -> list[dict[str, Any]]:
        options |= {name: getattr(self.config, name) for name in _OF_TRAINING}
        options["training"] = named_run(self.config, output)
        saves = self.config.saves_per_stage
        folder = self.folder
        return train_model(
            folder / source,
            rows,
            folder / output,
            saves=saves,
            replace=True,
            base=f"../{source}",
            **options,
        )


def named_run(config: DistillConfig, stage: str) -> dict[str, Any]:
    """The settings of the trainer, with a name of its own for the log of this stage where there is
    one: W&B and others would else put stages under the same name."""
    given = dict(config.training or {})
    if given.get("report_to") not in (None, "none"):
        given["run_name"] = f"{given.get('run_name') or Path(config.output_dir).name}-{stage}"
    return given


def numbered(name: str, number: int) -> str:
    """A file or folder of a round. The first has no number: most runs have no other."""
    return name if number == 1 else f"{name}-{number}"


def of_round(name: str, number: int) -> str:
    """In words, as `numbered`."""
    return name if number == 1 else f"{name}, round {number}"


def last_logged(log: Sequence[Mapping[str, Any]], name: str, text: str) -> str:
    """The last logged value of a metric, in words."""
    values = [entry[name] for entry in log if name in entry]
    return text.format(values[-1]) if values else f"no {name} logged"
