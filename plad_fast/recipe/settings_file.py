"""A file of settings: YAML of `name: value` lines, and nothing that could be meant otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plad_fast.data.places import expanded, is_there, nothing_at, shown
from plad_fast.errors import UsageError

_MOST_BYTES = 2**20
_LONGEST = 200  # characters of what the YAML library says


def read_settings_file(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, by names as they stand there, with dashes or underscores.

    Raises:
        UsageError: no such file, not YAML, not a mapping of names, a name that stands there twice,
            or aliases, by which a short file can stand for one of any length.
    """
    import yaml

    path, where = expanded(file), f"--config {file}"
    try:
        if not path.is_file() and is_there(path):
            raise UsageError(f"{where} is no file; give a YAML file of `name: value` lines")
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text ({error}); convert it first") from error
    except OSError as error:
        if not is_there(path):
            raise UsageError(f"--config: {nothing_at(file, is_file=True)}") from None
        raise UsageError(f"cannot read {where}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{where} has {len(data)} bytes; settings are a few lines")
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{where}: *{event.anchor} is an alias; write out what it means")
        node: Any = yaml.compose(text, yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        line = f", line {mark.line + 1}," if mark is not None else ""
        said = " ".join(str(problem or error).split())[:_LONGEST]
        raise UsageError(f"{where}{line} is not YAML: {said}") from error
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply; write `name: value` lines") from None
    except (ValueError, ArithmeticError, TypeError, AttributeError) as error:  # numbers and dates
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
