"""Settings of the whole recipe: one dataclass that is the flags, the YAML file and the record."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plad_fast.data.places import expanded as expanded_path
from plad_fast.data.places import shown
from plad_fast.errors import UsageError
from plad_fast.losses.registry import get_loss
from plad_fast.recipe.pair_settings import OFFLINE_TEACHER, PairSettings, flag, setting
from plad_fast.recipe.settings_file import read_settings_file
from plad_fast.recipe.training_checks import check_training

__all__ = ["BUILTIN_PROMPTS", "OFFLINE_TEACHER", "DistillConfig", "coerce", "flag", "load_settings"]

BUILTIN_PROMPTS = "builtin"


@dataclass(frozen=True)
class DistillConfig(PairSettings):
    """Everything `plad-fast distill` can be told.

    Raises:
        UsageError: a value out of range, in one sentence with the flag's name.
    """

    output_dir: str = setting("runs/distill", "run folder", affects_results=False)
    student: str | None = setting(
        None, "hub id or folder to start the student from; default: the teacher with fewer layers"
    )
    student_layers: int | tuple[int, ...] | None = setting(
        None, "layers to keep: a number, evenly spaced, or indices such as 0,2,4; default: 9 of 10"
    )
    prompts: str = setting(
        BUILTIN_PROMPTS, "JSONL, JSON, CSV or Parquet file, hub dataset id, or 'builtin'"
    )
    prompt_column: str | None = setting(None, "column that holds the prompt; default: prompt")
    prompt_template: str | None = setting(
        None,
        "text with {columns} to build the prompt from; in the flag \\n is a line break and \\\\n a "
        "backslash and an n",
    )
    reference_column: str | None = setting(
        None, "column with reference answers, for evaluation and for ROUGE as a scorer"
    )
    split: str = setting("train", "split of a hub dataset")
    limit: int | None = setting(None, "use the first so many prompts; default: all")
    held_out: float = setting(
        0.22, "prompts kept for evaluation: a share below 1, or a number of prompts"
    )
    sft_share: float = setting(
        0.46,
        "share of the training prompts for fine-tuning; the others make pairs (all do if it is 1)",
    )
    seed: int = setting(0, "of the split, of sampling and of training")

    max_new_tokens: int = setting(
        256, "tokens of an answer at most; those that are cut off there make no pairs"
    )
    teacher_temperature: float = setting(0.0, "of the teacher's answers; 0 is greedy")
    student_temperature: float = setting(
        1.0, "of the student's samples that become rejected answers"
    )
    top_p: float = setting(1.0, "nucleus of the student's samples")
    generation_batch_size: int = setting(16, "prompts answered together", affects_results=False)

    sft_epochs: float = setting(2.0, "passes over the fine-tuning data")
    sft_learning_rate: float = setting(2e-4, "peak learning rate of fine-tuning")
    sft_batch_size: int = setting(8, "prompts in an optimizer step of the fine-tuning")
    rounds: int = setting(
        1,
        "times to sample the student anew, pair and calibrate; more may be asked for later",
        affects_results=False,
    )
    loss: str = setting("plad_ranking", "preference loss of the calibration")
    beta: float | None = setting(
        None, "margin of the loss, or its weight of the reference; default: the loss's own"
    )
    loss_args: str | None = setting(None, 'further options of the loss as JSON: {"gamma": 0.5}')
    sft_weight: float | None = setting(
        None, "weight of the NLL regulariser; default: 1 for plad_*, slic, cpo and orpo, else 0"
    )
    length_normalization: float | None = setting(
        None,
        "alpha of s(y) / |y|**alpha: 1 ranks by nat per token; default: 1 for plad_* and losses "
        "on means over tokens, else 0",
    )
    epochs: float = setting(2.0, "passes over the pairs")
    learning_rate: float = setting(3e-5, "peak learning rate of the calibration")
    batch_size: int = setting(4, "pairs in an optimizer step of the calibration")
    micro_batch_size: int | None = setting(
        None, "prompts in memory together; default: the batch size", affects_results=False
    )
    max_tokens_per_batch: int = setting(
        4096,
        "tokens in memory together; an optimizer step takes as many such parts as it needs",
        affects_results=False,
    )
    max_length: int = setting(1024, "tokens of prompt and answer; longer prompts are cut")
    precision: str = setting(
        "auto", "float32, or bfloat16 autocast; 'auto' takes bfloat16 where it is fast"
    )
    eval_scorer: str | None = setting(None, "rates the held-out answers beside ROUGE; as --scorer")
    calibration_samples: int = setting(
        0,
        "samples of each student to each held-out prompt, to see whether its likelihood tells "
        "good answers from bad; 0 leaves that out",
    )
    gradient_checkpointing: bool = setting(
        False,
        "compute activations again in the backward: less memory, more time",
        affects_results=False,
    )
    saves_per_stage: int = setting(2, "checkpoints in each training", affects_results=False)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _require_type(f, getattr(self, f.name))
        object.__setattr__(self, "output_dir", expanded(self.output_dir))
        super().__post_init__()
        if self.loss == "sft":
            raise UsageError(
                "--loss sft is not a calibration: fine-tuning is the recipe's first stage already"
            )
        if get_loss(self.loss).needs_scores and self.scorer is None:
            raise UsageError(f"--loss {self.loss} needs scores of the answers; choose a --scorer")
        if self.teacher_samples > 1 and self.teacher_temperature == 0:
            raise UsageError(
                f"--teacher-samples {self.teacher_samples} would all be the same at "
                "--teacher-temperature 0; raise it"
            )
        if self.student_samples > 1 and self.student_temperature == 0:
            raise UsageError(
                f"--student-samples {self.student_samples} would all be the same at "
                "--student-temperature 0; raise it"
            )
        # The message about a micro-batch names both sizes that it has to divide.
        check_training({**vars(self), "micro_batch_size": None})
        self._require("held_out", self.held_out > 0, "must be positive")
        self._require("sft_share", 0 < self.sft_share <= 1, "must be above 0 and at most 1")
        self._require("limit", self.limit is None or self.limit >= 1, "must be at least 1")
        self._require("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1")
        for name in ("max_new_tokens", "sft_batch_size", "rounds", "generation_batch_size"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("sft_epochs", "sft_learning_rate"):
            self._require(name, getattr(self, name) > 0, "must be positive")
        for name in ("teacher_temperature", "student_temperature"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        size = self.micro_batch_size
        self._require(
            "micro_batch_size",
            size is None
            or (size >= 1 and self.batch_size % size == 0 and self.sft_batch_size % size == 0),
            f"must divide --batch-size {self.batch_size} and --sft-batch-size "
            f"{self.sft_batch_size}",
        )
        self._require(
            "calibration_samples",
            self.calibration_samples == 0 or self.calibration_samples >= 2,
            "must be 0, or at least 2 samples to compare",
        )
        if self.calibration_samples and self.student_temperature == 0:
            raise UsageError(
                f"--calibration-samples {self.calibration_samples} would all be the same at "
                "--student-temperature 0; raise it"
            )

    def require_room(self) -> None:
        """Raises UsageError unless an answer of the greatest length can be scored.

        That is for those who score their answers: `plad-fast pairs` does not.
        """
        self._require(
            "max_length",
            self.max_length > self.max_new_tokens,
            f"must exceed --max-new-tokens {self.max_new_tokens}",
        )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{flag(name)} {rule}, got {shown(getattr(self, name))}")

    @property
    def alpha(self) -> float:
        """`length_normalization`, or what the loss has it at."""
        return self._terms[1]

    @property
    def _terms(self) -> tuple[float, float]:
        return get_loss(self.loss).terms(self.sft_weight, self.length_normalization)

    def results_settings(self) -> dict[str, Any]:
        """The settings on which results depend, as plain values, the loss's own among them."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.metadata["affects_results"]
        } | dict(zip(("sft_weight", "length_normalization"), self._terms, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain values, for YAML and the report."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def expanded(output_dir: str) -> str:
    """The folder with `~` spelt out, which a shell leaves to us in `--output-dir=~/runs`.

    Raises:
        UsageError: nobody has that home folder, or it is no name of a folder.
    """
    if not output_dir.strip():
        raise UsageError("--output-dir is empty; give a folder to write into")
    try:
        return str(expanded_path(output_dir))
    except UsageError as error:
        raise UsageError(f"--output-dir {error}") from None


def load_settings(
    path: str | Path,
    names: Collection[str] | None = None,
    *,
    command: str = "distill",
    raw: Collection[str] = (),
) -> dict[str, Any]:
    """Settings of a YAML file under the names of `DistillConfig`, with dashes or underscores.

    Args:
        path: of the file.
        names: those of the command; all by default. One that is none of `DistillConfig` is text.
        command: whose settings they are, for messages.
        raw: names whose values are returned as they stand in the file.

    Raises:
        UsageError: no such file, not a mapping, or a name that is no setting.
    """
    fields = [f.name for f in dataclasses.fields(DistillConfig)]
    known = fields if names is None else list(names)
    settings = {}
    for key, value in read_settings_file(path).items():
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(sorted(known))}"
            raise UsageError(f"--config {path}: unknown setting {shown(key)} of {command}; {hint}")
        settings[name] = value if name in raw else coerce(name, value, f"--config {path}: {name}")
    return settings


def coerce(name: str, value: Any, where: str) -> Any:
    """A value from a flag or a YAML file in the type of the setting.

    Raises:
        UsageError: it does not read as one.
    """
    kinds = {f.name: str(f.type) for f in dataclasses.fields(DistillConfig)}
    kind = kinds.get(name, "str")
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if "None" not in kind:
            raise UsageError(f"{where} needs a value")
        return None
    try:
        if "tuple" in kind:
            return _layers(value)
        if kind.startswith("int"):
            return _whole(value)
        if kind.startswith("float"):
            return _finite(value)
        if kind.startswith("bool"):
            return _truth(value)
    except (TypeError, ValueError, OverflowError):
        whats = {"int": "a whole number", "bool": "true or false"}
        what = next((w for k, w in whats.items() if kind.startswith(k)), "a finite number")
        raise UsageError(f"{where} must be {what}, got {shown(value)}") from None
    if not isinstance(value, str):  # of 007, "no" or a date YAML keeps no spelling
        raise UsageError(f"{where} must be text, got {shown(value)}; put it in quotes")
    return value


def _whole(value: Any) -> int:
    """Also from "1e3", which YAML takes for text."""
    number = _finite(value)
    if number != int(number):
        raise ValueError
    # Of integers beyond 2**53 a float knows only a neighbour.
    return value if isinstance(value, int) else int(number)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "false": False, "no": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, bool):
        raise ValueError
    return value


def _layers(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    return tuple(map(_whole, value)) if isinstance(value, (list, tuple)) else _whole(value)


def _require_type(setting: dataclasses.Field[Any], value: Any) -> None:
    """Raises UsageError for a value that its annotation does not allow; an int is also a float."""
    kind = str(setting.type)
    if value is None and "None" in kind:
        return
    if kind.startswith("str"):
        fits, what = isinstance(value, str), "text"
    elif kind.startswith("bool"):
        fits, what = isinstance(value, bool), "true or false"
    elif kind.startswith("float"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN compares false, and an integer may be larger than any float.
        fits, what = number and abs(value) <= sys.float_info.max, "a finite number"
    else:
        values = value if isinstance(value, tuple) and "tuple" in kind else (value,)
        fits = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        what = "a whole number" + (" or a tuple of them" if "tuple" in kind else "")
    if not fits:
        raise UsageError(f"{flag(setting.name)} must be {what}, got {shown(value)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
