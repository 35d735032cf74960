"""From prompts to stored answers, in one process or in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt, content_digest
from plad_fast.data.store import Row, RowStore, locked_store
from plad_fast.pairs.generation.answer_rows import (
    Answered,
    all_wanted,
    ask,
    check_prompts,
    collect,
    failure_list,
    missing_from,
    report_failures,
    row_id,
)
from plad_fast.pairs.generation.ranks import (
    Ranks,
    joined,
    merge_shards,
    shard_path,
    shard_paths,
    share,
)
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.set_aside import set_aside, set_rows_aside
from plad_fast.pairs.generation.text_model import Failure, TextModel


def generate_answers(
    model: TextModel,
    prompts: Sequence[Prompt],
    store: RowStore,
    sampling: Sampling,
    progress: bool = True,
) -> Answered:
    """Asks the model for every answer that the store does not hold, and stores what comes.

    Args:
        model: the teacher or the student.
        prompts: with ids of their own.
        store: written as answers come, so that a killed run can go on.
        sampling: how to draw the answers, `n` to a prompt; for the store's fingerprint to cover
            it is up to you.
        progress: show a bar on the standard error stream.

    Returns:
        The answers to these prompts. Failures are logged, and listed with their reasons beside the
        store, in a file that ends in `.failed.jsonl`; another run asks for them again.

    Raises:
        UsageError: two prompts have the same id, a prompt has another content than when its answer
            was stored, the model cannot answer, or no answer came at all.
    """
    check_prompts(prompts, store, sampling)
    wanted = missing_from(store, prompts, sampling)
    stored = len(prompts) * sampling.n - len(wanted)
    failures = ask(model, wanted, store, sampling, stored=stored, progress=progress)
    answered = collect(prompts, store, sampling, failures)
    report_failures(answered, store.path, model.name)
    return answered


def stored_answers(
    load: Callable[[], TextModel],
    prompts: Sequence[Prompt],
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    fingerprint: Mapping[str, Any],
    overwrite: bool = False,
    others_aside: bool = False,
    progress: bool = True,
    to_the_end: bool = False,
) -> Answered:
    """Answers from a store, which is filled up first where it lacks some.

    In a run of several processes, as `torchrun` starts them, all are to call this, and all return
    the same. If the model says that it is `sharded`, as a `LocalModel` does, each process loads one
    and answers its share; any other model is loaded and asked by the first process alone.

    Args:
        load: makes the model; not called if the store has all answers.
        prompts, sampling, progress: see `generate_answers`.
        path: of the store. The shares of several processes lie beside it until they are complete;
            those that a killed run left are taken in first.
        fingerprint: what else the answers depend on, such as the model's name.
        overwrite: discard what is stored.
        others_aside: keep answers of another fingerprint, and those to what these prompts were
            before, in files beside the store, rather than raise an error; see `_set_aside`.
        to_the_end: answers that are cut off are of no use. Once sixteen prompts are answered, and
            before more are paid for, it is an error if no answer to them ended, and a warning if
            most did not. Models that several processes share are not watched.

    Raises:
        UsageError: as `RowStore.open` and `generate_answers`, and where another process failed.
    """
    settings = {**fingerprint, **sampling.settings()}
    with joined() as ranks, ExitStack() as stack:
        run = _Run(ranks, prompts, sampling, Path(path).expanduser(), settings)
        missing = ranks.from_first(lambda: run.open(stack, overwrite, others_aside))
        if missing:
            sharded = ranks.from_first(lambda: run.load(load))
            run.ask(load, frozenset(missing), sharded, progress, to_the_end)
        return ranks.from_first(run.close)


def discard_answers(*paths: str | os.PathLike[str]) -> None:
    """Removes stores, and the shares and the lists of failures beside them, where there are any.

    Raises:
        UsageError: a file is no store, or is open in another process; all are left alone.
    """
    stores = [Path(path).expanduser() for path in paths]
    with ExitStack() as held:
        files = [f for store in stores for f in (store, *shard_paths(store)) if f.exists()]
        for file in files:
            held.enter_context(locked_store(file))
        for file in files:
            file.unlink()
        for store in stores:
            failure_list(store).unlink(missing_ok=True)


def renew_answers(
    path: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    settings: Mapping[str, Any],
) -> None:
    """Moves answers to what prompts were before out of a store; see `_set_aside`.

    Args:
        path: of the store, which nobody has open.
        prompts, sampling: see `generate_answers`.
        settings: the store's whole fingerprint.
    """
    digests = {
        row_id(prompt.id, k): content_digest(prompt.content)
        for prompt, k in all_wanted(prompts, sampling)
    }

    def is_current(row: Row) -> bool:
        prompt = row.get("prompt")  # of a damaged row there is none, which is said later
        return prompt in (None, digests.get(row["id"], prompt))

    set_rows_aside(path, settings, is_current)


class _Run:
    """One process's part in `stored_answers`. Only the first one holds the store."""

    def __init__(
        self,
        ranks: Ranks,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        path: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self._ranks = ranks
        self._prompts = prompts
        self._sampling = sampling
        self._path = path
        self._settings = settings
        wanted = all_wanted(prompts, sampling)
        self._order = {row_id(prompt.id, k): place for place, (prompt, k) in enumerate(wanted)}
        self._store: RowStore | None = None
        self._model: TextModel | None = None
        self._failures: dict[str, Failure] = {}

    def open(self, stack: ExitStack, overwrite: bool, others_aside: bool) -> list[str]:
        """Ids of the rows that the store lacks."""
        if overwrite:
            discard_answers(self._path)
        if others_aside:
            set_aside(self._path, self._settings)
            renew_answers(self._path, self._prompts, self._sampling, self._settings)
        store = stack.enter_context(RowStore.open(self._path, self._settings))
        merge_shards(store, self._settings, self._order)
        check_prompts(self._prompts, store, self._sampling)
        self._store = store
        missing = missing_from(store, self._prompts, self._sampling)
        return [row_id(prompt.id, k) for prompt, k in missing]

    def load(self, load: Callable[[], TextModel]) -> bool:
        self._model = load()
        return getattr(self._model, "sharded", False)

    def ask(
        self,
        load: Callable[[], TextModel],
        missing: frozenset[str],
        sharded: bool,
        progress: bool,
        to_the_end: bool,
    ) -> None:
        every = all_wanted(self._prompts, self._sampling)
        wanted = [(prompt, k) for prompt, k in every if row_id(prompt.id, k) in missing]
        rank, size = self._ranks.rank, self._ranks.size
        found: dict[str, Failure] = {}
        if sharded and size > 1:
            mine = share(wanted, rank, size)
            with RowStore.open(shard_path(self._path, rank, size), self._settings) as shard:
                if mine:
                    model = self._model or load()
                    progress = progress and rank == 0
                    found = ask(model, mine, shard, self._sampling, progress=progress)
        elif self._store is not None:
            assert self._model is not None
            stored = len(every) - len(wanted)
            found = ask(
                self._model,
                wanted,
                self._store,
                self._sampling,
                stored=stored,
                progress=progress,
                to_the_end=to_the_end,
            )
        for part in self._ranks.gather(found):
            self._failures.update(part)

    def close(self) -> Answered:
        assert self._store is not None
        merge_shards(self._store, self._settings, self._order)
        answered = collect(self._prompts, self._store, self._sampling, self._failures)
        if self._model is not None:
            report_failures(answered, self._path, self._model.name)
        return answered
