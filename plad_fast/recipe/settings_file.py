"""A file of settings: YAML of `name: value` lines."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from plad_fast.checks import shown
from plad_fast.data.places import expanded, is_there, nothing_at
from plad_fast.errors import UsageError
from plad_fast.recipe.fields import read_value
from plad_fast.recipe.search import TuneConfig
from plad_fast.recipe.settings import DistillConfig, PairsConfig, TrainConfig
from plad_fast.training.setting_names import advice, spellings

_LONGEST = 200  # characters of what the YAML library says
_OF_ONE_FILE = ("pairs", "eval_pairs", "prompts")
FIELDS = {
    field.name: field
    for settings in (DistillConfig, TrainConfig, PairsConfig, TuneConfig)
    for field in dataclasses.fields(settings)
}
"""Of all commands' settings, by name."""


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
        UsageError: no such file, not a mapping of names to values of their types, or a name that is
            no setting or stands there twice.
    """
    known = sorted(FIELDS if names is None else names)
    settings = {}
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        if name not in known:
            meant = [_as_keys(text) for text in spellings(name)]
            close = [text for text in meant if re.split(r"\W", text)[0] in known]
            close = close or difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(known)}"
            raise UsageError(f"--config {path}: unknown setting {shown(key)} of {command}; {hint}")
        if name == "training" and isinstance(value, dict):
            _check_training(value, f"--config {path}: training")
        settings[name] = value if name in raw else coerce(name, value, f"--config {path}: {name}")
    return settings


def coerce(name: str, value: Any, where: str) -> Any:
    """A value from a flag or a file in the type of the setting, else UsageError; none and null
    stand for no value."""
    if isinstance(value, str) and value.lower() in ("none", "null"):
        value = None
    if name in _OF_ONE_FILE and isinstance(value, list):
        raise UsageError(f"{where} takes one file, got {shown(value)}; join several into one first")
    return read_value(str(FIELDS[name].type) if name in FIELDS else "str", value, where)


def _check_training(settings: dict[Any, Any], where: str) -> None:
    """Raises UsageError, with the keys of the file, for what another setting sets."""
    for key, value in settings.items():
        instead = advice(str(key).replace("-", "_"))
        if instead is not None and value is not None:
            if instead.startswith("use --"):
                instead = _as_keys(instead.replace("use", "set", 1))
            raise UsageError(f"{where}.{key}: {instead}")


def _as_keys(text: str) -> str:
    """With the names that stand in a file for flags."""
    text = re.sub(r"--training (\w+)=\.\.\.", r"training.\1", text)
    return re.sub(r"--([\w-]+)", lambda found: found[1].replace("-", "_"), text)


def _read(file: str | Path) -> dict[str, Any]:
    """The mapping in a file, by names as they stand there."""
    import yaml

    where = f"--config {file}"
    text = _text(file, where)
    try:
        # One may hold itself, or mean more than memory holds.
        if alias := next((e for e in yaml.parse(text) if isinstance(e, yaml.AliasEvent)), None):
            raise UsageError(f"{where}: *{alias.anchor} is an alias; write out what it means")
        node: Any = yaml.compose(text, yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        # Where what was not ended began; of an escape in a text of several lines, its own line.
        if isinstance(error, yaml.scanner.ScannerError) and "escape" not in str(problem):
            mark = error.context_mark or mark
        line = f", line {mark.line + 1}," if mark is not None else ""
        said = " ".join(str(problem or error).split())[:_LONGEST]
        raise UsageError(f"{where}{line} is not YAML: {said}") from error
    except UsageError:
        raise
    except Exception as error:  # of numbers, dates and lists in lists without end
        said = " ".join(str(error).split())[:_LONGEST]
        raise UsageError(f"{where} holds a value that YAML cannot read: {said}") from error
    if not isinstance(loaded, dict):
        found = "it is empty" if loaded is None else f"not {shown(loaded)}"
        raise UsageError(f"{where} must hold `name: value` lines; {found}")
    for key in loaded:
        if not isinstance(key, str):
            raise UsageError(f"{where}: {shown(key)} is no name of a setting")
    names = [key.value.replace("-", "_") for key, _ in node.value]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"{where} sets {shown(twice[0])} twice; leave one of them")
    return loaded


def _text(file: str | Path, where: str) -> str:
    path = expanded(file)
    try:
        if not path.is_file() and is_there(path):
            raise UsageError(f"{where} is no file; give a YAML file of `name: value` lines")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text ({error}); convert it first") from error
    except OSError as error:
        if not is_there(path):
            raise UsageError(f"--config: {nothing_at(file, is_file=True)}") from None
        raise UsageError(f"cannot read {where}: {error.strerror}") from error
