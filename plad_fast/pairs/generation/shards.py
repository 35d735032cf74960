"""Shares of several processes: which prompts each has, and the files that it keeps its rows in.

Each process stores its share in a file of its own, beside the store; the first one puts them
together. On several machines the folder has to be one that all of them see.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.models.team import rank, require_seen, size
from plad_fast.pairs.generation.text_model import Wanted


def share(wanted: Wanted, number: int, count: int) -> list[tuple[Prompt, int]]:
    """The part of process `number`: about as many prompts as the others have, about as long, and
    all samples of each."""
    prompts = {prompt.id: prompt for prompt, _ in wanted}.values()
    ids = [p.id for p in sorted(prompts, key=lambda p: (-len(json.dumps(p.content)), p.id))]
    # Back and forth: in one direction alone the first process would get the longer ones.
    order = [*range(count), *reversed(range(count))]
    mine = {prompt_id for i, prompt_id in enumerate(ids) if order[i % len(order)] == number}
    return [(prompt, sample) for prompt, sample in wanted if prompt.id in mine]


def open_shard(store: Path, fingerprint: Mapping[str, Any]) -> RowStore:
    """This process's share of a store that the first one has open; UsageError as `RowStore.open`,
    and where this process does not see the store."""
    require_seen(store)
    name = f"{store.stem}.rank{rank()}of{size()}{store.suffix}"
    return RowStore.open(store.with_name(name), fingerprint)


def merge_shards(store: RowStore, fingerprint: Mapping[str, Any], order: Mapping[str, int]) -> None:
    """Moves all shares into the store, of this run or of one that was killed; raises UsageError for
    one of other settings, or still open.

    Rows are added in `order`, row id -> place; others come last.
    """
    stem, suffix = store.path.stem, store.path.suffix
    name = re.compile(rf"{re.escape(stem)}\.rank\d+of\d+{re.escape(suffix)}")
    found = store.path.parent.glob(f"{glob.escape(stem)}.rank*")
    paths = sorted(path for path in found if name.fullmatch(path.name))
    rows: list[dict[str, Any]] = []
    for path in paths:
        with RowStore.open(path, fingerprint) as shard:
            rows += shard.rows.values()
    rows.sort(key=lambda row: order.get(row["id"], len(order)))
    store.append(rows)
    for path in paths:
        path.unlink()
