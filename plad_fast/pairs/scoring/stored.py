"""Scores that outlive a killed run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt, require_unique_ids
from plad_fast.data.records import digest
from plad_fast.data.store import RowStore
from plad_fast.models.team import rank, size, together
from plad_fast.pairs.generation.shards import merge_shards, open_shard
from plad_fast.pairs.generation.text_model import Answer
from plad_fast.pairs.scoring.scorers import Item, Scorer, by_prompt
from plad_fast.pairs.select import Scores, is_usable


def score_answers(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    answers: Sequence[Mapping[str, Sequence[Answer]]],
    path: str | os.PathLike[str],
) -> Scores:
    """Scores of all answers that can stand in a pair, in the form that `build_pairs` takes.

    Args:
        scorer: from `open_scorer`, or your own.
        prompts: with ids of their own.
        answers: of the teacher, of the student and so on, each by prompt id.
        path: see `stored_scores`.

    Returns:
        (Prompt id, text) -> score, without those that could not be had.

    Raises:
        UsageError: as `stored_scores`.
    """
    require_unique_ids(prompts)
    items = [
        (prompt, answer.text)
        for prompt in prompts
        for given in answers
        for answer in given.get(prompt.id, ())
        if is_usable(answer)
    ]
    scores = stored_scores(scorer, items, path)
    pairs = zip(items, scores, strict=True)
    return {(prompt.id, text): score for (prompt, text), score in pairs if not math.isnan(score)}


def stored_scores(
    scorer: Scorer,
    items: Sequence[Item],
    path: str | os.PathLike[str],
    *,
    batch_size: int = 64,
) -> list[float]:
    """Scores from a store, which is filled up first where it lacks some.

    They are computed batch by batch, all answers to a prompt in one, and a batch of which a score
    is missing is computed as a whole: rounding then does not tell where a run was killed, nor how
    many processes (`plad_fast.models.led`) have shared the batches of a scorer that is `sharded`.

    Args:
        scorer: not asked if the store has all scores.
        items: what to score; equal ones are scored once.
        path: of the store, whose fingerprint are the scorer's settings.
        batch_size: items between two writes, at least.

    Returns:
        For each item its score; NaN where the scorer could not have it, which another run tries
        again.

    Raises:
        UsageError: an item cannot be scored, or as `RowStore.open`.
    """
    scorer.check([prompt for prompt, _ in items])
    keys, settings = _keys(scorer, items), scorer.settings()
    order = {key: index for index, key in reversed([*enumerate(keys)])}
    with RowStore.open(path, settings) as store:
        merge_shards(store, settings, order)
        store.require(lambda row: type(row.get("score")) in (int, float))
        batches = [
            {keys[index]: items[index] for index in batch}
            for batch in _batches(items, batch_size)
            if any(keys[index] not in store.rows for index in batch)
        ]
        if batches and size() > 1 and getattr(scorer, "sharded", False):
            together(_score_share, scorer, batches, store.path, settings)
            merge_shards(store, settings, order)
        elif batches:
            _score(scorer, batches, store)
        return [store.rows[key]["score"] if key in store.rows else math.nan for key in keys]


def _score_share(
    scorer: Scorer,
    batches: Sequence[Mapping[str, Item]],
    path: Path,
    settings: Mapping[str, Any],
) -> None:
    """The part of one process, stored in a file of its own."""
    with open_shard(path, settings) as shard:
        _score(scorer, batches[rank() :: size()], shard)


def _score(scorer: Scorer, batches: Sequence[Mapping[str, Item]], store: RowStore) -> None:
    """Stores the scores that can be had, batch by batch."""
    from tqdm import tqdm

    total = sum(map(len, batches))
    with tqdm(total=total, desc=scorer.name, unit="answer", disable=rank() > 0) as bar:
        for batch in batches:
            scores = zip(batch.items(), scorer.score([*batch.values()]), strict=True)
            store.append(
                [
                    {"id": key, "prompt": prompt.id, "score": score}
                    for (key, (prompt, _)), score in scores
                    if not math.isnan(score)
                ]
            )
            bar.update(len(batch))


def _keys(scorer: Scorer, items: Sequence[Item]) -> list[str]:
    """What a score depends on, item by item."""
    keys = [""] * len(items)
    for group in by_prompt(items):
        rivals = sorted({items[index][1] for index in group}) if scorer.relative else None
        for index in group:
            prompt, text = items[index]
            reference = prompt.reference if scorer.uses_reference else None
            keys[index] = digest([prompt.written, reference, text, rivals])
    return keys


def _batches(items: Sequence[Item], size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for group in by_prompt(items):
        batch += group
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch
