"""Checkpoints that are verified before a training resumes from them; the newest two are kept, and
the one that a validation, or evaluations, found best."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from plad_fast.data.file_states import MANIFEST, damage, write_manifest
from plad_fast.data.files import sync_folder, sync_tree
from plad_fast.models.team import largest, rank
from plad_fast.training.signals import Asked
from plad_fast.training.validation import best_check, has_stalled

logger = logging.getLogger("plad_fast")

OF_TRAINING = (
    *("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", TRAINER_STATE_NAME, MANIFEST),
    *("pytorch_model_fsdp*", "global_step*", "latest", "zero_to_*.py"),  # of FSDP and DeepSpeed
)
"""Patterns of what a checkpoint has beside a model's files."""
_KEPT = 2  # the one before is there for the case that the newest is damaged
_SECONDS = 600.0  # between checkpoints at most
_SHARE = 0.05  # of the time, at most, goes into those that are made by the clock


def newest_checkpoint(folder: Path, training: str) -> Path | None:
    """The newest checkpoint of a training that is as it was written, if there is one.

    Newer ones that are not are removed, and a warning says which and why: a run that was killed
    while it saved leaves one behind, a power cut or a full disk may. What has not the name of a
    checkpoint is left alone. `training` is as `Checkpoints` has it.
    """
    found, broken = None, []
    for step, path in reversed(_checkpoints(folder)):
        reason = damage(path, step=step, training=training)
        best = best_checkpoint(path) if reason is None else None
        if best not in (None, path):
            reason = damage(best, training=training)
            reason = reason and f"of {best.name}, the best until then, {reason}"
        if reason is None:
            found = path
            break
        broken.append(f"{path.name} ({reason})")
        _remove(path)
    if broken:
        logger.warning(
            "%s: not whole, and removed: %s; the training goes on from %s",
            folder,
            ", ".join(broken),
            "its start" if found is None else found.name,
        )
    return found


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state as it was saved."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def has_ended(checkpoint: Path, patience: int | None = None) -> bool:
    """Whether a checkpoint is that of its training's last step, or of the one at which the
    `patience` of its validation came to an end."""
    state = trainer_state(checkpoint)
    stalled = patience is not None and has_stalled(state["log_history"], patience)
    return stalled or state["global_step"] >= state["max_steps"]


def best_checkpoint(last: Path) -> Path | None:
    """The one that the validation or the evaluations until `last` found best, or this where there
    were none; None for the model that the training began with."""
    state = trainer_state(last)
    check = best_check(state["log_history"])
    if check is not None and check["step"] == 0:
        return None
    step = state.get("best_global_step") if check is None else check["step"]
    return last.with_name(f"checkpoint-{step}") if step else last


class Checkpoints(TrainerCallback):
    """Adds to the Trainer's checkpoints what makes them safe to go on from.

    A list of their files is written when all of them are on the disk; older ones go after that,
    by their step: clocks may be wrong. Beside the Trainer's own steps it saves after every ten
    minutes, with every evaluation, and at the next step when the process is asked to end, which
    also ends the training.

    Args:
        folder: of the checkpoints, the Trainer's `output_dir`.
        training: what tells this training from others.
        asked: whether to end.
    """

    def __init__(self, folder: Path, training: str, asked: Asked) -> None:
        self._folder = folder
        self._training = training
        self._asked = asked

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._began = self._saved = time.monotonic()
        self._wait = _SECONDS

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint where one is due, after the Trainer's own callback."""
        self._began = time.monotonic()
        is_due = rank() == 0 and self._began - self._saved >= self._wait
        # All end at the same step, or save at it.
        asked_by, due = largest(self._asked.by or 0, int(is_due))
        if asked_by:
            self._asked.by = asked_by
            control.should_training_stop = True
        control.should_save |= bool(asked_by or due)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whether it is the best so far is found out after this."""
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the new checkpoint count, and removes older ones."""
        largest(0)  # every process has written its part
        if rank() > 0:
            return
        path = self._folder / f"checkpoint-{state.global_step}"
        sync_tree(path)
        write_manifest(path, step=state.global_step, training=self._training)
        sync_folder(self._folder)
        paths = [path for _, path in _checkpoints(self._folder)]
        kept = {*paths[-_KEPT:], *map(best_checkpoint, paths[-_KEPT:])}
        for old in [path for path in paths if path not in kept]:
            shutil.rmtree(old, ignore_errors=True)
        self._saved = time.monotonic()
        self._wait = max(_SECONDS, (self._saved - self._began) / _SHARE)


def remove_checkpoints(folder: Path) -> None:
    """Removes all of them."""
    for _, path in _checkpoints(folder):
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that have the name of a checkpoint, the oldest first."""
    named = ((re.fullmatch("checkpoint-(0|[1-9][0-9]*)", p.name), p) for p in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in named if name and path.is_dir())
