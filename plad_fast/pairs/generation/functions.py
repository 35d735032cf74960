"""Functions of the user's, by name."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.secrets import one_line


def import_function(path: str) -> Callable[..., Any]:
    """The function `package.module.function`; modules in the working directory are found too.

    Raises:
        UsageError: there is none, or its module cannot be imported.
    """
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UsageError(f"python:{path} names no module; write python:MODULE.FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # whatever the user's module does when it is imported
        raise UsageError(
            f"cannot import {module_name} for python:{path} "
            f"({one_line(f'{type(error).__name__}: {error}')}); check the name, and run where the "
            "module lies or install it"
        ) from error
    if not callable(function):
        raise UsageError(f"{module_name} has no function {attribute!r}; check python:{path}")
    return function


def source_digest(function: Callable[..., Any]) -> str | None:
    """Sixteen hexadecimal digits of the file that a function, or an object's class, is in.

    None where it is in none. What it imports from other files is not covered.
    """
    function = inspect.unwrap(function)
    for thing in (function, type(function)):
        try:
            source = Path(inspect.getsourcefile(thing) or "").read_bytes()
        except (TypeError, OSError):
            continue
        return hashlib.sha256(source).hexdigest()[:16]
    return None
