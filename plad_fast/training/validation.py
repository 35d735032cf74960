"""The checkpoint that answers best, rather than the last.

A preference loss goes on improving the ranking that it trains when the model's own answers already
get worse. So a model is measured before the training and at its checkpoints, on data that it is not
trained on; the best of them is kept, and a training that only gets worse ends. What was measured is
in the log history, which every checkpoint has: a killed training needs no other record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from plad_fast.training.processes import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plad_fast.training.trainer import PLaDTrainer

PREFIX = "validation/"
"""Of the metrics in the log history."""
SCORE = f"{PREFIX}score"


@dataclass(frozen=True)
class Validation:
    """How a model is measured in the course of its training."""

    measure: Callable[[PreTrainedModel], Mapping[str, float]]
    """Metrics by name; the best model is the one with the largest `score`. It has to leave the
    model, and PyTorch's random numbers, as they were. All processes of a run call it at the same
    time, on a whole model each, and have to get the same."""
    made_by: Mapping[str, Any]
    """What the metrics depend on besides the model, as JSON values."""
    patience: int = 2
    """Checks in a row without a new best after which the training ends."""
    start: Mapping[str, float] | None = None
    """The metrics of the model before the training, where they are known already."""

    def settings(self) -> dict[str, Any]:
        """What the weights that are kept depend on, for the record of the training."""
        return {**self.made_by, "patience": self.patience}


def checks(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a log history has of them, in order; the first, of step 0, is of the model that the
    training began with."""
    return [entry for entry in history if SCORE in entry]


def best_check(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The check with the largest score, the first of those that are equal; None without any."""
    return max(checks(history), key=lambda entry: (entry[SCORE], -entry["step"]), default=None)


def has_stalled(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the last `patience` checks brought no new best."""
    found, best = checks(history), best_check(history)
    return best is not None and len(found) - 1 - found.index(best) >= patience


class Validator(TrainerCallback):
    """Measures the trainer's model before the first step and where a checkpoint is planned."""

    def __init__(self, validation: Validation, trainer: PLaDTrainer) -> None:
        self._validation = validation
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures the model that the training begins with, unless one that goes on has."""
        if not checks(state.log_history):
            start = self._validation.start
            self._check() if start is None else self._log(start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures before the checkpoint is saved, which then has the log of it."""
        step = state.global_step
        if step % state.save_steps and step < state.max_steps:
            return
        self._check()
        if has_stalled(state.log_history, self._validation.patience):
            control.should_training_stop = True

    def _check(self) -> None:
        trainer = self._trainer
        with trainer.paused(), whole(trainer.model, trainer.accelerator) as model:
            self._log(self._validation.measure(model))

    def _log(self, metrics: Mapping[str, float]) -> None:
        trainer, was_due = self._trainer, self._trainer.control.should_log
        trainer.log({f"{PREFIX}{name}": value for name, value in metrics.items()})
        trainer.control.should_log = was_due  # a log of the training, at the same step
