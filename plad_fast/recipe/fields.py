"""Fields of settings: their help, the type and the range of their values, and how these are read.

A field's annotation says its type and its rule the range; flags, files of settings and calls from
Python are all read by them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from plad_fast.checks import shown
from plad_fast.errors import UsageError


class Rule(NamedTuple):
    """A range of values, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Rule("must be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Rule("must be at least 0", lambda value: value >= 0)
POSITIVE = Rule("must be positive", lambda value: value > 0)
NOT_NEGATIVE_EACH = Rule(
    "must be a number of at least 0, or several different ones",
    lambda value: min(each(value)) >= 0 and len(set(each(value))) == len(each(value)),
)
SHARE = Rule("must be above 0 and at most 1", lambda value: 0 < value <= 1)
SEED = Rule("must be from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def each(value: Any) -> tuple[Any, ...]:
    """The values of a setting that may have one or several."""
    return value if isinstance(value, tuple) else (value,)


def one_of(*values: str) -> Rule:
    return Rule(f"must be one of {values}", lambda value: value in values)


def setting(
    default: Any, help_text: str, rule: Rule | None = None, *, is_free: bool = False
) -> Any:
    """A field with its one-line help."""
    metadata = {"help": help_text, "rule": rule, "affects_results": not is_free}
    return dataclasses.field(default=default, metadata=metadata)


def free_setting(default: Any, help_text: str, rule: Rule | None = None) -> Any:
    """A `setting` on which no result depends: it may change between restarts."""
    return setting(default, help_text, rule, is_free=True)


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value in the type of its field, and in its range; else UsageError with the flag and the
    value."""
    value = read_value(str(field.type), value, flag(field.name))
    rule = field.metadata["rule"]
    if value is not None and rule is not None and not rule.holds(value):
        raise UsageError(f"{flag(field.name)} {rule.text}, got {shown(value)}")
    return value


def read_value(kind: str, value: Any, where: str) -> Any:
    """A value from a flag, a file or a call, in the type that the annotation `kind` of its setting
    names; UsageError that begins with `where` if it does not read as one."""
    if value is None:
        if "None" not in kind:
            raise UsageError(f"{where} needs a value")
        return None
    if kind.startswith("str"):
        if "tuple" in kind and isinstance(value, (list, tuple)) and value:
            first, *others = (read_value("str", text, where) for text in value)
            return (first, *others) if others else first
        if not isinstance(value, str):  # of 007, "no" or a date YAML keeps no spelling
            advice = "it takes one" if isinstance(value, (list, tuple)) else "put it in quotes"
            raise UsageError(f"{where} must be text, got {shown(value)}; {advice}")
        return value
    for name, read, what in (
        ("Mapping", _mapping, "KEY=VALUE, or a mapping in a file"),
        ("tuple[int", _several(_whole), "a whole number or several"),
        ("tuple[float", _several(_finite), "a number or several"),
        ("int", _whole, "a whole number"),
        ("float", _finite, "a finite number"),
        ("bool", _truth, "true or false"),
    ):
        if name in kind:
            try:
                return read(value)
            except (TypeError, ValueError, OverflowError, KeyError):
                raise UsageError(f"{where} must be {what}, got {shown(value)}") from None
    raise AssertionError(kind)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    """Also from "1e3", which YAML takes for text."""
    number = _finite(value)
    if number != int(number):
        raise ValueError
    # Of integers beyond 2**53 a float knows only a neighbour.
    return value if isinstance(value, int) else int(number)


def _truth(value: Any) -> bool:
    return {"true": True, "yes": True, "false": False, "no": False}[str(value).lower()]


def _several(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Reads a value, or a tuple of a list or of a text with commas."""

    def read_each(value: Any) -> Any:
        if isinstance(value, str) and "," in value:
            value = value.split(",")
        if not isinstance(value, (list, tuple)):
            return read(value)
        if not value:
            raise ValueError
        return tuple(map(read, value))

    return read_each


def _mapping(value: Any) -> dict[str, Any]:
    """Of a mapping, or of texts KEY=VALUE, whose values are read as in a YAML file."""
    import yaml

    if not isinstance(value, dict):
        texts = [text.partition("=") for text in value]
        if not all(key and equals for key, equals, _ in texts):
            raise ValueError
        try:
            value = {key: yaml.safe_load(text) for key, _, text in texts}
        except yaml.YAMLError:
            raise ValueError from None
    return {str(key).replace("-", "_"): inner for key, inner in value.items()}
