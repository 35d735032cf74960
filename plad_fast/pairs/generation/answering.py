"""Stored answers to prompts, by one process or by several."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import Row, RowStore
from plad_fast.errors import UsageError
from plad_fast.models.team import rank, size, together
from plad_fast.pairs.generation import answer_rows
from plad_fast.pairs.generation.answer_rows import Answered
from plad_fast.pairs.generation.reasoning import REASONING, holds_thought, is_all_thought
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside, set_rows_aside
from plad_fast.pairs.generation.shards import merge_shards, open_shard, share
from plad_fast.pairs.generation.text_model import Batches, Failure, TextModel, Wanted

logger = logging.getLogger(__name__)

_ENOUGH = 16  # prompts or answers, to see what is wrong with them while it is not too late


class AskingError(UsageError):
    """A model failed once it had begun to answer."""


def stored_answers(
    load: Callable[[], TextModel],
    prompts: Sequence[Prompt],
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    fingerprint: Mapping[str, Any],
    others_aside: bool = False,
    to_the_end: bool = False,
    reasoning: str = "drop",
) -> Answered:
    """Answers from a store, which is filled up first where it lacks some.

    Answers are stored as they come, so that a killed run can go on. Failures are logged, and listed
    with their reasons beside the store, in a file that ends in `.failed.jsonl`; another run asks
    for them again.

    In a run of several processes (see `plad_fast.models.led`) each of them answers its share with a
    model that says that it is `sharded`, as a `LocalModel` does and, without being loaded twice in
    the first one, a `LazyLocalModel`; any other model is asked by the first process alone.

    Args:
        load: makes the teacher or the student; not called if the store has all answers.
        prompts: with ids of their own.
        path: of the store. The shares of several processes lie beside it until they are complete;
            those that a killed run left are taken in first.
        sampling: how to draw the answers, `n` to a prompt.
        fingerprint: what else the answers depend on, such as the model's name.
        others_aside: keep answers of another fingerprint, and those to what these prompts were
            before, in files beside the store, rather than raise an error; see `set_aside`.
        to_the_end: answers that are cut off are of no use. Once sixteen prompts are answered, and
            before more are paid for, it is an error if no answer to them ended, and a warning if
            most did not. Models that several processes share are not watched.
        reasoning: what becomes of what a model thought before its answer: one of
            `reasoning.REASONING`. The store has all of it, whatever this is.

    Raises:
        UsageError: an unknown `reasoning`, two prompts have the same id, a prompt has another
            content than when its answer was stored, the model cannot answer, no answer came at
            all, as `RowStore.open`, and where another process failed. `AskingError` where the model
            failed on the way.
    """
    if reasoning not in REASONING:
        raise UsageError(f"reasoning is {reasoning!r}; it is one of {', '.join(REASONING)}")
    path, settings = Path(path).expanduser(), {**fingerprint, **sampling.settings()}
    every = answer_rows.all_wanted(prompts, sampling)
    order = {key: place for place, key in enumerate(every)}
    failures: dict[str, Failure] = {}
    if others_aside:
        set_aside(path, settings)
        renew_answers(path, prompts, sampling, settings)
    with RowStore.open(path, settings) as store:
        merge_shards(store, settings, order)
        wanted = [every[key] for key in answer_rows.missing_from(store, every)]
        model = load() if wanted else None
        if model is not None and size() > 1 and getattr(model, "sharded", False):
            for part in together(_ask_for_share, model, wanted, path, settings, sampling):
                failures |= part
            merge_shards(store, settings, order)
        elif model is not None:
            stored = len(every) - len(wanted)
            failures = _ask(model, wanted, store, sampling, stored, to_the_end=to_the_end)
        answered = answer_rows.collect(prompts, store, sampling, failures, reasoning)
        if model is not None:
            answer_rows.report_failures(answered, path, model.name)
        return answered


def _ask_for_share(
    model: TextModel,
    wanted: Wanted,
    path: Path,
    settings: Mapping[str, Any],
    sampling: Sampling,
) -> dict[str, Failure]:
    """The part of one process, stored in a file of its own; returns what failed."""
    mine = share(wanted, rank(), size())
    with open_shard(path, settings) as shard:
        return _ask(model, mine, shard, sampling) if mine else {}


def renew_answers(
    path: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    settings: Mapping[str, Any],
) -> None:
    """Moves answers to what prompts were before out of a store of this whole fingerprint."""
    wanted = answer_rows.all_wanted(prompts, sampling)
    digests = {key: prompt.digest for key, (prompt, _) in wanted.items()}
    set_rows_aside(path, settings, digests)


def _ask(
    model: TextModel,
    wanted: Wanted,
    store: RowStore,
    sampling: Sampling,
    stored: int = 0,  # before, for the bar
    *,
    to_the_end: bool = False,
) -> dict[str, Failure]:
    """Stores the answers that are wanted as they come, and returns what failed by row id."""
    from tqdm import tqdm

    digests = {prompt.id: prompt.digest for prompt, _ in wanted}
    failures: dict[str, Failure] = {}
    watched = to_the_end and not _is_limit_judged(model.name, store, sampling)
    seen = thoughts = 0
    told = False
    with tqdm(
        total=stored + len(wanted),
        initial=stored,
        desc=model.name,
        unit="prompt" if sampling.n == 1 else "answer",
        disable=rank() > 0,
    ) as bar:
        for batch in _asked(model.generate_samples(wanted, sampling)):
            new: list[Row] = []
            for item in batch:
                key = answer_rows.row_id(item.prompt_id, item.sample)
                if isinstance(item, Failure):
                    failures[key] = item
                else:
                    new.append(answer_rows.to_row(item, digests[item.prompt_id]))
                    thoughts += bool(item.reasoning) or holds_thought(item.text)
            store.append(new)
            bar.update(len(new))
            seen += len(new)
            if thoughts and not told and (seen >= _ENOUGH or seen + len(failures) == len(wanted)):
                told = True
                what = f"{thoughts} of {seen} answers so far have the model's reasoning"
                logger.warning("%s: %s; --reasoning says what becomes of it", model.name, what)
            watched = watched and not _is_limit_judged(model.name, store, sampling)
    return failures


def _asked(batches: Batches) -> Batches:
    try:
        yield from batches
    except UsageError as error:
        raise AskingError(str(error)) from error


def _ended(row: Row) -> bool:
    return row["finish_reason"] == "stop" and (not row["text"] or not is_all_thought(row["text"]))


def _is_limit_judged(name: str, store: RowStore, sampling: Sampling) -> bool:
    """Whether enough prompts are answered to see if answers fit their limit.

    Warns if most do not, and raises UsageError if none does.
    """
    rows = store.rows.values()
    prompts = {row["prompt"] for row in rows}
    count = len(prompts)
    cut = len(prompts - {row["prompt"] for row in rows if _ended(row)})
    if count < _ENOUGH:
        return False
    limit = f"max_new_tokens={sampling.max_new_tokens}"
    if cut == count:
        raise UsageError(
            f"{name}: the answers to the first {count} prompts are all cut off at {limit}, and "
            "none is of use; raise --max-new-tokens and choose another folder (or --overwrite)"
        )
    if cut > count / 2:
        what = f"to {cut} of the first {count} prompts no answer ended within {limit}"
        logger.warning("%s: %s, and they make no pairs; raise --max-new-tokens?", name, what)
    return True
