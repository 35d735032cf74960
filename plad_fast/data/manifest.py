"""The list of a folder's files, by which it is later told whole from damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plad_fast.data.file_states import State, changes, is_state_of_file, state_of
from plad_fast.data.records import RecordFormat
from plad_fast.errors import UsageError

NAME = "files.json"

_FORMAT = RecordFormat("plad-fast files", 1)


def write_manifest(folder: Path, **about: Any) -> None:
    """Write `files.json`: the states (`state_of`) of all files in the folder, at any depth, and
    beside them `about`. `sync_tree` or `publish_folder` make it durable."""
    states = state_of(folder)
    assert states is not None
    files = {name: state for name, state in states["files"].items() if name != NAME}
    _FORMAT.write(folder / NAME, **about, files=files)


def listed_files(folder: Path) -> dict[str, State]:
    """Names of files with what is recorded of each; empty where there is no list to be read."""
    try:
        return _FORMAT.read(folder / NAME, files=dict).fields.get("files", {})
    except OSError:
        return {}


def damage(folder: Path, **about: Any) -> str | None:
    """Reason why a folder is not as its list says, in words; None if all of it is as it was
    written.

    Files that are not listed do not count; the list has to have recorded `about`. Raises OSError
    where a file is there and cannot be read.
    """
    kinds = {name: type(value) for name, value in about.items()}
    try:
        record, problem = _FORMAT.read(folder / NAME, files=dict, **kinds)
    except IsADirectoryError:
        return f"{NAME} is damaged"
    if problem:
        what = {"missing": "missing", "damaged": "damaged"}.get(problem, "of another version")
        return f"{NAME} is {what}"
    if not all(map(is_state_of_file, record["files"].values())):
        return f"{NAME} is damaged"
    if any(record[name] != value for name, value in about.items()):
        return f"{NAME} is of another folder"
    found = (
        change.text
        for name, state in record["files"].items()
        for change in changes(name, folder / name, state, grown=False)
    )
    return next(found, None)


def require_whole(folder: Path, advice: str) -> None:
    """Raise a UsageError that names the file unless a model's folder is as it was written; `advice`
    says what else to do than to put the file back."""
    if reason := damage(folder):
        raise UsageError(f"{folder} is damaged: {reason}; put that file back, or {advice}")
