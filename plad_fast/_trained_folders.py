"""The folder of a trained model: whether we made what lies there, and its removal."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from plad_fast._manifest import NAME as MANIFEST
from plad_fast.errors import UsageError

RECORD = "training.json"
"""What the weights depend on; in the folder of the model, and in that of its checkpoints."""

LOG = "log_history.json"

# What transformers writes beside a model, where the list of our files cannot be read.
_OF_MODELS = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*", "training_args.bin"),
)


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
    try:
        listed = set(json.loads((model / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    known = {RECORD, LOG, MANIFEST, *listed}
    return [
        name
        for name in _files(model)
        if name in known
        or any(fnmatch(name, pattern) for pattern in _OF_MODELS)
        or name.startswith((f".{RECORD}.", f".{MANIFEST}."))
    ]
