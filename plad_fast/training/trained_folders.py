"""The folder of a trained model: its record and log, and replacing nothing but its own files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from plad_fast.data.file_states import CARD, MANIFEST, listed_files, write_manifest
from plad_fast.data.files import publish_folder, write_atomically
from plad_fast.data.locks import locked
from plad_fast.data.records import RecordFormat, as_json, require_equal
from plad_fast.errors import UsageError
from plad_fast.models.loading import ADAPTER_CONFIG, load_model, load_tokenizer
from plad_fast.training.card import is_as_written
from plad_fast.training.checkpoints import (
    OF_TRAINING,
    best_checkpoint,
    remove_checkpoints,
    trainer_state,
)

RECORD = "training.json"
"""Settings that the weights depend on; in the folder of the model, and of its checkpoints."""

_FORMAT = RecordFormat("plad-fast training", 1)

LOG = "log_history.json"

REFERENCE = "reference"  # see `PLaDConfig.reference_cache`
TOKENS = ".tokens"  # begins the names of files of `StreamedRows`
LOGS = "runs"  # where TensorBoard writes if it is asked to; they stay

# What transformers writes beside a model, where the list of our files cannot be read.
_OF_MODELS = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    ADAPTER_CONFIG,
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*", "training_args.bin"),
)


def is_trained(output: Path) -> bool:
    """Whether there is something at the place of a trained model."""
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))


def checkpoints_of(output: Path) -> Path:
    """The folder of the checkpoints of the training that makes `output`."""
    return output.with_name(f"{output.name}.checkpoints")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Says which training a folder is of."""
    _FORMAT.write(folder / RECORD, **record)


def found_record(folder: Path) -> dict[str, Any] | None:
    """The record of the training that made a folder; None where there is none that can be read."""
    try:
        found = _FORMAT.read(folder / RECORD)
    except OSError:
        return None
    fields = {name: value for name, value in found.fields.items() if name not in _FORMAT.header}
    return None if found.problem else fields


def require_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises UsageError unless the training of this record made the folder."""
    found = found_record(folder)
    if found is None:
        is_there = (folder / RECORD).exists()
        what = f"a damaged {RECORD}" if is_there else f"no record of a training ({RECORD})"
        advice = "choose another --output-dir" + ", or pass --overwrite to replace it" * is_there
        raise UsageError(f"{folder} is there already and has {what}; {advice}")
    advice = "choose another --output-dir, or pass --overwrite to replace it"
    require_equal(found, as_json(record), folder, advice)


def log_history(model_folder: Path) -> list[dict[str, Any]]:
    """The log of the training that made a folder of `train_model`; empty if there is none."""
    path = model_folder / LOG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def publish(
    last: Path,
    output: Path,
    source: str | Path,
    *,
    merge: bool = False,
    base: str | None = None,
) -> None:
    """Makes the model's folder of the training's last checkpoint, or of the best one if there was a
    validation or were evaluations; that may be the `source`, which had no step. With `merge`, its
    adapters become a part of their base model's weights; else they name it `base`, if given."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint = best_checkpoint(last)
    if checkpoint is not None:
        left_out = [*OF_TRAINING, CARD, *(["adapter_*"] if merge else [])]
        ignored = shutil.ignore_patterns(*left_out)
        # What is merged writes the tokenizer again, in place.
        copy = shutil.copy2 if merge else _link
        shutil.copytree(checkpoint, partial, ignore=ignored, copy_function=copy)
    if checkpoint is None or merge:
        found = source if checkpoint is None else checkpoint
        load_model(found, dtype=torch.float32, merge_adapters=True).save_pretrained(partial)
        load_tokenizer(found).save_pretrained(partial)
    config = partial / ADAPTER_CONFIG
    if base is not None and config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = base
        write_atomically(config, json.dumps(settings, indent=2))  # the checkpoint has the other
    state = trainer_state(last)
    log = state["log_history"]
    if step := state.get("best_global_step"):
        log = [*log, {"best_step": step, "best_metric": state["best_metric"]}]
    (partial / LOG).write_text(json.dumps(log, indent=1), encoding="utf-8")
    shutil.copy(last.with_name(RECORD), partial / RECORD)
    write_manifest(partial)
    if is_trained(output):  # to be replaced, as was found before
        remove_model(output)
    publish_folder(partial, output)


def _link(source: str, target: str) -> None:
    """Gives a file a second name where the file system can; weights are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def require_ours(model: Path) -> None:
    """Raises UsageError unless a folder holds a model that we trained, and nothing else."""
    if not model.is_dir() or not any((model / name).exists() for name in (RECORD, MANIFEST)):
        raise UsageError(
            f"{model} is there already and has no record of a training ({RECORD}), so it is not "
            "replaced; choose another --output-dir"
        )
    others = sorted(set(_files(model)) - set(_ours(model)))
    if others:
        raise UsageError(
            f"{model} also holds {others[0]}, which the training did not make, so it is not "
            "replaced; move that elsewhere, or choose another --output-dir"
        )


def remove_model(model: Path) -> None:
    """Empties a folder that `require_ours` found to be ours; whoever holds it goes on to."""
    # The record goes last: what a kill leaves is still known.
    for name in sorted(_ours(model), key=lambda name: name in (RECORD, MANIFEST)):
        (model / name).unlink(missing_ok=True)
    for folder in sorted((path for path in model.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()


def _files(model: Path) -> list[str]:
    return [p.relative_to(model).as_posix() for p in model.rglob("*") if not p.is_dir()]


def _ours(model: Path) -> list[str]:
    known = {RECORD, LOG, MANIFEST, *listed_files(model)}
    if is_as_written(model / CARD):
        known.add(CARD)
    return [
        name
        for name in _files(model)
        if name in known
        or any(fnmatch(name, pattern) for pattern in _OF_MODELS)
        or name.startswith((f".{RECORD}.", f".{MANIFEST}."))
    ]


def discard_training(output: Path) -> None:
    """Removes a model that a training made, and the checkpoints of one beside it.

    Nothing is removed, and a UsageError raised, where the folder holds something else or another
    process trains there.
    """
    checkpoints = checkpoints_of(output)
    if is_trained(output):
        require_ours(output)
    with locked(checkpoints) if checkpoints.is_dir() else contextlib.nullcontext():
        if is_trained(output):
            remove_model(output)
        discard_checkpoints(output)


def discard_checkpoints(output: Path) -> None:
    """Removes what a training left beside its model, and nothing that others put there."""
    checkpoints = checkpoints_of(output)
    if not (checkpoints / RECORD).is_file():  # which goes last
        return
    with contextlib.suppress(OSError):  # the next call removes the rest
        remove_training(checkpoints)
        for path in [*checkpoints.glob(f".{RECORD}.*"), checkpoints / RECORD]:
            path.unlink(missing_ok=True)
        checkpoints.rmdir()


def remove_training(checkpoints: Path) -> None:
    """Removes the checkpoints of a training, its token ids and what it knows of its reference."""
    remove_checkpoints(checkpoints)
    for path in checkpoints.glob(f"{TOKENS}-*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(checkpoints / REFERENCE, ignore_errors=True)
