"""A folder that `plad-fast pairs` or `plad-fast evaluate` fills: of one set of settings and data.

`stage.json` records which, so that results are told from those of another command, and never
replaced by others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast._files import write_atomically
from plad_fast._records import require_equal
from plad_fast.errors import UsageError

_RECORD = "stage.json"
_FORMAT = {"format": "plad-fast stage", "version": 1}
_OF_OTHERS = {"run.json": "a run of `plad-fast distill`", "training.json": "a trained model"}


def claim_folder(
    folder: Path,
    command: str,
    settings: Mapping[str, Any],
    *,
    results: Sequence[str],
    overwrite: bool,
    discard: Callable[[Mapping[str, Any]], None],
    extends: Callable[[Mapping[str, Any]], bool] = lambda found: False,
) -> None:
    """Makes the folder of a command, or finds that these very settings have made its results.

    Where there are none yet, other settings may go on: what is stored of answers and scores has
    records of its own.

    Args:
        folder: of the command's results.
        command: that fills it.
        settings: what the results depend on, as JSON values.
        results: files that the command will replace.
        overwrite: remove these and what `discard` removes, whatever made them. The folder of
            another command is refused all the same.
        discard: removes what else is stored there; gets the settings that made it, if known.
        extends: whether results of other settings, which it gets, are a part of those to come.

    Raises:
        UsageError: the folder is that of another command, other settings made it, it holds such
            results without a record, or it cannot be written.
    """
    settings = json.loads(json.dumps(settings))
    try:
        found = _recorded(folder, command)
        there = [name for name in results if (folder / name).exists()]
        if overwrite:
            discard(found or {})  # which may be refused: the results go last
            for name in there:
                (folder / name).unlink()
        elif there and found is not None and not extends(found):
            advice = (
                "choose another --output-dir (copies of its stored answers, *.jsonl but for pairs, "
                "spare making the same ones again), or pass --overwrite to start anew"
            )
            require_equal(found, settings, folder, advice)
        elif there and found is None:
            raise UsageError(
                f"{folder} holds {there[0]} but no {_RECORD}, which would say what it was made "
                "from; choose another --output-dir, or pass --overwrite to replace it"
            )
        record = {**_FORMAT, "command": command, "settings": settings}
        write_atomically(folder / _RECORD, json.dumps(record, indent=2))
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --output-dir"
        ) from error


def _recorded(folder: Path, command: str) -> dict[str, Any] | None:
    """The settings that made the folder, if the command has been there before."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir {folder} is a file; choose a folder")
    for name, what in _OF_OTHERS.items():
        if (folder / name).exists():
            raise UsageError(
                f"{folder} holds {name}, so it is the folder of {what}; choose another --output-dir"
            )
    path = folder / _RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        header = {name: record[name] for name in _FORMAT}
        maker, settings = record["command"], dict(record["settings"])
    except (ValueError, KeyError, TypeError):
        header = {}
    if header != _FORMAT:
        raise UsageError(
            f"{path} is damaged, or no record of this version of plad_fast; choose another "
            "--output-dir, or delete the file"
        )
    if maker != command:
        raise UsageError(
            f"{folder} holds the results of `plad-fast {maker}`; choose another --output-dir"
        )
    return settings
