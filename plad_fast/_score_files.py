"""Numbers that took a model to compute, one JSON file for each set; complete or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plad_fast._files import write_atomically
from plad_fast._records import digest, require_equal
from plad_fast.errors import UsageError

_FORMAT = {"format": "plad-fast scores", "version": 2}


def stored_scores(
    file: Path,
    fingerprint: Mapping[str, Any],
    compute: Callable[[], dict[str, Any]],
    *,
    replace: bool = False,
) -> dict[str, Any]:
    """The scores in a file, which is computed and written first where it is not there.

    What is left of such a file after a power cut, or is not what was written, counts for nothing.

    Args:
        file: of one set of scores.
        fingerprint: what they depend on.
        compute: gives the scores as JSON values; not called if the file is there.
        replace: compute them anew where the file has those of another fingerprint.

    Raises:
        UsageError: the file is not one of scores, or was made with another fingerprint.
    """
    settings = json.loads(json.dumps(fingerprint))
    scores = _read(file, settings, replace) if file.is_file() else None
    if scores is None:
        scores = compute()
        record = {**_FORMAT, "fingerprint": settings, "digest": digest(scores), "scores": scores}
        write_atomically(file, json.dumps(record))
    return scores


def _read(file: Path, settings: dict[str, Any], replace: bool) -> dict[str, Any] | None:
    """None where they are to be computed."""
    content = file.read_bytes().rstrip(b"\0")
    start = json.dumps({"format": _FORMAT["format"]}).encode()[:-1]
    if not content.startswith(start) and not start.startswith(content):
        raise UsageError(f"{file} does not hold scores; choose another --output-dir")
    try:
        record = json.loads(content)
        version, found, scores = record["version"], record["fingerprint"], record["scores"]
        is_whole = version == _FORMAT["version"] and record["digest"] == digest(scores)
    except (ValueError, KeyError, TypeError):
        return None
    if not is_whole:
        return None
    if found != settings and not replace:
        advice = "choose another --output-dir, or pass --overwrite to start anew"
        require_equal(found, settings, file, advice)
    return scores if found == settings else None
