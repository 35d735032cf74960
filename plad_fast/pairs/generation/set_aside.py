"""Stored rows of other settings, kept beside the store: they may be wanted again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plad_fast.data.files import sync_folder
from plad_fast.data.records import as_json, digest
from plad_fast.data.store import RowStore, fingerprint_of, has_rows

logger = logging.getLogger(__name__)


def set_aside(path: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
    """Makes room for rows of this fingerprint where a store, not open, holds those of another.

    These may have been paid for: the file is renamed, `answers.1a2b3c4d.jsonl`, and takes its name
    back when its fingerprint comes again.
    """
    path = Path(path).expanduser()
    wanted = as_json(fingerprint)
    found = fingerprint_of(path)
    if found == wanted:
        return
    if found is not None and has_rows(path):
        aside = _aside(path, found)
        logger.info("%s was made with other settings and is kept as %s", path, aside.name)
        if aside.exists():
            with RowStore.open(path, found) as store, RowStore.open(aside, found) as other:
                other.append(list(store.rows.values()))
            path.unlink()
        else:
            path.rename(aside)
    if (found is not None or not path.exists()) and (back := _aside(path, wanted)).exists():
        os.replace(back, path)


def set_rows_aside(
    path: str | os.PathLike[str], fingerprint: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Moves rows whose prompt has another digest now out of a store, to `answers.old.jsonl`.

    The store is not open; one of another fingerprint is left alone.
    """
    path = Path(path).expanduser()
    if fingerprint_of(path) != as_json(fingerprint):
        return
    with RowStore.open(path, fingerprint) as store:
        rows = list(store.rows.values())
    # A damaged row has no prompt, which is said later.
    old = {row["id"] for row in rows if row.get("prompt") not in (None, digests.get(row["id"]))}
    old &= digests.keys()  # not rows of other prompts
    moved = [row for row in rows if row["id"] in old]
    kept = [row for row in rows if row["id"] not in old]
    if not moved:
        return
    beside = path.with_name(f"{path.stem}.old{path.suffix}")
    set_aside(beside, fingerprint)
    with RowStore.open(beside, fingerprint) as store:
        # Of one id there may be several, each to another prompt.
        taken = {row["id"] for row in moved if store.rows.get(row["id"], row) != row}
        for row in moved:
            if row["id"] in taken:
                row["id"] += f"\t{row['prompt']}"
        store.append(moved)
    whole = path.with_name(f".{path.name}.tmp")
    whole.unlink(missing_ok=True)
    with RowStore.open(whole, fingerprint) as store:
        store.append(kept)
    os.replace(whole, path)
    sync_folder(path.parent)


def _aside(path: Path, fingerprint: Mapping[str, Any]) -> Path:
    return path.with_name(f"{path.stem}.{digest(fingerprint)[:8]}{path.suffix}")
