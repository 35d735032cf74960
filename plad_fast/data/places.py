"""Texts of users that name a path, or else something on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path

from plad_fast.checks import shown
from plad_fast.errors import UsageError, located

BUILTIN = {"builtin": "builtin_prompts.jsonl", "builtin:calendar": "builtin_calendar.jsonl"}
"""Prompts that ship with the package: general ones, and messages to make calendar entries of, both
with a written `answer` -> their file."""
OFFLINE = "offline"
"""The name of the model that needs no hub."""

_FOLDERS = ("runs", "checkpoints", "output", "outputs")  # of nobody on the hub
_LONGEST_HUB_ID = 200


def expanded(source: str | os.PathLike[str]) -> Path:
    """With `~` spelt out, which a shell leaves to us in `--model=~/student`; raises UsageError
    where nobody has that home folder, or no file system takes such a name."""
    text = os.fspath(source)
    if "\0" in text:
        raise UsageError(f"{shown(text)} holds a NUL character, which no path may; remove it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{shown(text)}: {error}; write the folder out") from None


def from_folder(source: str, folder: Path) -> str:
    """The path of a name that begins with a dot, as it is meant in a folder that may be moved; any
    other text as it is, and what is in the working folder alone: some libraries mean that."""
    here = folder / source
    meant = source.startswith(".") and (is_there(here) or not is_there(Path(source)))
    return str(here.resolve()) if meant else source


def is_there(path: Path) -> bool:
    """Whether there is a file or a folder; also for names that are too long to be one's."""
    try:
        return path.exists()
    except OSError:
        return False


def names_path(source: str | os.PathLike[str]) -> bool:
    """Whether a text can be nothing but a path, though nothing need be there.

    A hub id has one slash at most and begins with a letter, a digit or a line. `mine/sft` beside a
    folder `mine` is a path too, and so is `runs/sft` anywhere: they are what is mistyped most.
    """
    text = os.fspath(source)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text:
        return True
    if len(text) > _LONGEST_HUB_ID:
        return True
    first, slash, second = text.partition("/")
    return bool(slash) and (not second or first in _FOLDERS or is_there(Path(first)))


def lies_in(source: str | os.PathLike[str], folder: Path) -> bool:
    """Whether a text names something that is there, and is the folder or is in it."""
    path = expanded(source)
    return is_there(path) and path.resolve().is_relative_to(folder.resolve())


def holds_model(folder: Path) -> bool:
    """Whether there is something in a folder that `load_model` may be able to load."""
    names = ("config.json", "adapter_config.json")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.gguf"))


def require_there(source: str, option: str) -> None:
    """Raises UsageError, with the option it was given under, for a model's path at which there is
    none; `source` is a hub id, a folder or a .gguf file, and no hub is asked."""
    with located(option):
        path = expanded(source)
    if not source.strip():
        raise UsageError(f"{option}: no model is named; give a hub id, a folder or a .gguf file")
    is_gguf = path.suffix.lower() == ".gguf"
    if is_there(path):
        if path.is_dir() and not holds_model(path):
            raise UsageError(
                f"{option}: {shown(source)} is no folder of a model, which has a config.json, an "
                "adapter_config.json or a .gguf file; check the path"
            )
        if path.is_file() and not is_gguf:
            raise UsageError(f"{option}: {shown(source)} is a file and no .gguf; give its folder")
        return
    if not (is_gguf or names_path(source)):
        return
    other = ""
    if source.count("/") == 1 and is_there(path.parent) and not source.startswith(("/", ".", "~")):
        other = f"; a hub id is not looked for where there is a folder {path.parts[0]!r}"
    raise UsageError(f"{option}: {nothing_at(source, is_file=is_gguf)}{other}")


def nothing_at(source: str | os.PathLike[str], *, is_file: bool = False) -> str:
    """That there is nothing at a path, with a close name of its folder beside it."""
    path, close = expanded(source), []
    with contextlib.suppress(OSError):
        names = [entry.name for entry in path.parent.iterdir()]
        close = difflib.get_close_matches(path.name, names, n=1)
    advice = f"did you mean {shown(str(path.with_name(close[0])))}?" if close else "check the path"
    return f"there is {'no file' if is_file else 'nothing at'} {shown(os.fspath(source))}; {advice}"
