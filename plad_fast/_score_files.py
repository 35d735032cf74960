"""Numbers that took a model to compute, one JSON file for each set; complete or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plad_fast._files import write_atomically
from plad_fast._records import require_equal
from plad_fast.errors import UsageError

_FORMAT = {"format": "plad-fast scores", "version": 1}


def stored_scores(
    file: Path, fingerprint: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The scores in a file, which is computed and written first where it is not there.

    Args:
        file: of one set of scores.
        fingerprint: what they depend on.
        compute: gives the scores as JSON values; not called if the file is there.

    Raises:
        UsageError: the file is not one of scores, or was made with another fingerprint.
    """
    if not file.is_file():
        scores = compute()
        record = {**_FORMAT, "fingerprint": fingerprint, "scores": scores}
        write_atomically(file, json.dumps(record))
        return scores
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        header = {name: record[name] for name in _FORMAT}
        found, scores = record["fingerprint"], record["scores"]
    except (ValueError, KeyError, TypeError):
        header = {}
    if header != _FORMAT:
        raise UsageError(
            f"{file} does not hold scores of this version of plad_fast; choose another "
            "--output-dir, or delete the file"
        )
    advice = "choose another --output-dir, or pass --overwrite to start anew"
    require_equal(found, json.loads(json.dumps(fingerprint)), file, advice)
    return scores
