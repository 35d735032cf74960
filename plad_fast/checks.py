"""Checks of plain numbers and flags, and of packages: what was expected, what came."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from plad_fast.errors import UsageError

_LONGEST = 200  # characters of a value in a message
_NESTED = (list, tuple, set, dict)
_EXTRAS = {
    "rouge_score": "eval",
    "matplotlib": "eval",
    "gguf": "gguf",
    "openai": "api",
    "peft": "peft",
    "bitsandbytes": "4bit",
    "optuna": "tune",
    "ray": "ray",
}
"""Extras of plad-fast that bring a package."""


def require_packages(*names: str) -> None:
    """Finds out at once what would be missed after hours, and says how to install it (UsageError).
    Nothing is imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(_EXTRAS[name] for name in missing if name in _EXTRAS))
        others = [name for name in missing if name not in _EXTRAS]
        wanted = " ".join([*([f"-e '.[{extras}]'"] if extras else []), *others])
        raise UsageError(f"{' and '.join(missing)} must be installed; run: pip install {wanted}")


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


def listed(names: Sequence[str]) -> str:
    """Such as "--model, --pairs and --output-dir"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def shown(value: Any) -> str:
    """A value for a message: in its own spelling where that is short, else what it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…")
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:
        return f"a number of more than {_LONGEST} digits"  # repr() refuses those of thousands
    if value is None or isinstance(value, (bool, int, float, complex)):
        return repr(value)
    kind = "mapping" if isinstance(value, dict) else type(value).__name__
    if isinstance(value, (list, tuple)) and not any(isinstance(v, _NESTED) for v in value[:9]):
        text = ", ".join(map(shown, value[:9]))
        if len(value) <= 9 and len(text) <= _LONGEST:
            return f"[{text}]"
    return f"a {kind} of {len(value)}" if isinstance(value, _NESTED) else f"a {kind}"
