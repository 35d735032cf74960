"""Packages that a command needs, and the versions that a result was made with."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

from plad_fast.errors import UsageError

_INSTALL = {"rouge_score": '"plad-fast[eval]"', "matplotlib": '"plad-fast[eval]"'}
_REPORTED = ("plad-fast", "torch", "transformers", "datasets", "numpy")


def require_packages(*names: str) -> None:
    """Finds out at once what would be missed after hours. Nothing is imported.

    Raises:
        UsageError: some are not installed; it says how to install them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        wanted = dict.fromkeys(_INSTALL.get(name, name) for name in missing)
        raise UsageError(
            f"{' and '.join(missing)} must be installed for this; run: pip install "
            f"{' '.join(wanted)}"
        )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in _REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
