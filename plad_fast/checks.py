"""Checks of plain numbers and flags: what was expected, what came, in one sentence."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from plad_fast.errors import UsageError


def check_length_normalization(alpha: float) -> None:
    check_number("length_normalization", alpha)
    if not 0 <= alpha < math.inf:
        raise UsageError(f"length_normalization must be at least 0 and finite, got {alpha}")


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise UsageError(f"{name} must be True or False, got {shown(flag)}")


def check_number(name: str, number: float) -> None:
    """A real number, be it from numpy; no tensor, text or truth value. Its range is for others."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise UsageError(f"{name} must be a number, got {shown(number)}")


def check_weight(name: str, weight: float) -> None:
    """A finite number that is not negative."""
    check_number(name, weight)
    if not 0 <= weight < math.inf:
        raise UsageError(f"{name} must not be negative, and must be finite, got {weight}")


def check_group_size(group_size: int) -> None:
    if not is_whole(group_size) or group_size < 1:
        raise UsageError(
            f"group_size must be a whole number of at least 1, got {shown(group_size)}"
        )


def is_whole(number: Any) -> bool:
    """An integer, be it from numpy."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def shown(value: Any) -> str:
    """A value for a message, or what kind of thing it is."""
    brief = value is None or isinstance(value, (bool, int, float, complex, str))
    return repr(value) if brief else f"a {type(value).__name__}"
