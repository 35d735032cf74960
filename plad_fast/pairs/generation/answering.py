"""Stored answers to prompts, by one process or by several."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.records import digest
from plad_fast.data.store import Row, RowStore
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.answer_rows import (
    Answered,
    all_wanted,
    collect,
    failure_list,
    missing_from,
    report_failures,
    row_id,
    to_row,
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
from plad_fast.pairs.generation.text_model import Answer, Failure, SampleModel, TextModel, Wanted

logger = logging.getLogger(__name__)

_ENOUGH = 16  # prompts, to see whether the length limit fits their answers


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
    wanted = [*missing_from(store, prompts, sampling).values()]
    stored = len(prompts) * sampling.n - len(wanted)
    failures = _ask(model, wanted, store, sampling, stored=stored, progress=progress)
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
            before, in files beside the store, rather than raise an error; see `set_aside`.
        to_the_end: answers that are cut off are of no use. Once sixteen prompts are answered, and
            before more are paid for, it is an error if no answer to them ended, and a warning if
            most did not. Models that several processes share are not watched.

    Raises:
        UsageError: as `RowStore.open` and `generate_answers`, and where another process failed.
    """
    settings = {**fingerprint, **sampling.settings()}
    with joined() as ranks, ExitStack() as stack:
        run = _Run(ranks, prompts, sampling, Path(path).expanduser(), settings, load)
        missing = ranks.from_first(lambda: run.open(stack, overwrite, others_aside))
        if missing:
            run.ask(missing, progress, to_the_end)
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
            held.enter_context(RowStore(file))
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
    """Moves answers to what prompts were before out of a store; see `set_rows_aside`.

    Args:
        path: of the store, which is not open.
        prompts, sampling: see `generate_answers`.
        settings: the store's whole fingerprint.
    """
    wanted = all_wanted(prompts, sampling)
    digests = {key: digest(prompt.content) for key, (prompt, _) in wanted.items()}

    def is_current(row: Row) -> bool:
        prompt = row.get("prompt")  # of a damaged row there is none, which is said later
        return prompt in (None, digests.get(row["id"], prompt))

    set_rows_aside(path, settings, is_current)


@dataclass
class _Run:
    """One process's part in `stored_answers`. Only the first one holds the store."""

    ranks: Ranks
    prompts: Sequence[Prompt]
    sampling: Sampling
    path: Path
    settings: Mapping[str, Any]
    load: Callable[[], TextModel]
    store: RowStore | None = None
    model: TextModel | None = None
    failures: dict[str, Failure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.every = all_wanted(self.prompts, self.sampling)
        self._order = {key: place for place, key in enumerate(self.every)}

    def open(self, stack: ExitStack, overwrite: bool, others_aside: bool) -> list[str]:
        """Ids of the rows that the store lacks."""
        if overwrite:
            discard_answers(self.path)
        if others_aside:
            set_aside(self.path, self.settings)
            renew_answers(self.path, self.prompts, self.sampling, self.settings)
        self.store = stack.enter_context(RowStore.open(self.path, self.settings))
        merge_shards(self.store, self.settings, self._order)
        return [*missing_from(self.store, self.prompts, self.sampling)]

    def ask(self, missing: Sequence[str], progress: bool, to_the_end: bool) -> None:
        sharded = self.ranks.from_first(self._load)
        wanted = [self.every[key] for key in missing]
        rank, size = self.ranks.rank, self.ranks.size
        found: dict[str, Failure] = {}
        if sharded and size > 1:
            mine = share(wanted, rank, size)
            with RowStore.open(shard_path(self.path, rank, size), self.settings) as shard:
                if mine:
                    model = self.model or self.load()
                    bar = progress and rank == 0
                    found = _ask(model, mine, shard, self.sampling, progress=bar)
        elif self.store is not None:
            assert self.model is not None
            found = _ask(
                self.model,
                wanted,
                self.store,
                self.sampling,
                stored=len(self.every) - len(wanted),
                progress=progress,
                to_the_end=to_the_end,
            )
        for part in self.ranks.gather(found):
            self.failures |= part

    def close(self) -> Answered:
        assert self.store is not None
        merge_shards(self.store, self.settings, self._order)
        answered = collect(self.prompts, self.store, self.sampling, self.failures)
        if self.model is not None:
            report_failures(answered, self.path, self.model.name)
        return answered

    def _load(self) -> bool:
        """Makes the model, and tells whether every process is to have one."""
        self.model = self.load()
        return getattr(self.model, "sharded", False)


def _ask(
    model: TextModel,
    wanted: Wanted,
    store: RowStore,
    sampling: Sampling,
    *,
    stored: int = 0,
    progress: bool = True,
    to_the_end: bool = False,
) -> dict[str, Failure]:
    """Stores the answers that are wanted as they come, and returns what failed by row id.

    Args:
        stored: answers that were there before, for the bar.
        to_the_end: see `stored_answers`.
    """
    from tqdm import tqdm

    digests = {prompt.id: digest(prompt.content) for prompt, _ in wanted}
    failures: dict[str, Failure] = {}
    watched = to_the_end and bool(wanted) and not _is_limit_judged(model.name, store, sampling)
    with tqdm(
        total=stored + len(wanted),
        initial=stored,
        desc=model.name,
        unit="prompt" if sampling.n == 1 else "answer",
        disable=not progress,
    ) as bar:
        for batch in _generate(model, wanted, sampling):
            new: list[Row] = []
            for item in batch:
                key = row_id(item.prompt_id, item.sample)
                if isinstance(item, Failure):
                    failures[key] = item
                elif key not in store.done:
                    new.append(to_row(item, digests[item.prompt_id]))
            store.append(new)
            bar.update(len(new))
            watched = watched and not _is_limit_judged(model.name, store, sampling)
    return failures


def _generate(
    model: TextModel, wanted: Wanted, sampling: Sampling
) -> Iterator[Sequence[Answer | Failure]]:
    if not wanted:
        return iter(())
    if isinstance(model, SampleModel):
        return model.generate_samples(wanted, sampling)
    # Of a prompt that lacks some samples the others come again, and are not stored.
    return model.generate(list({prompt.id: prompt for prompt, _ in wanted}.values()), sampling)


def _is_limit_judged(name: str, store: RowStore, sampling: Sampling) -> bool:
    """Whether enough prompts are answered to see if answers fit their limit; warns if most do not.

    Raises UsageError if not one of them is answered to the end.
    """
    finished: dict[str, bool] = {}
    for key, row in store.rows.items():
        prompt = key.removesuffix(f"\t{row['sample']}") if row.get("sample") else key
        finished[prompt] = finished.get(prompt, False) or row["finish_reason"] != "length"
    count, cut = len(finished), len(finished) - sum(finished.values())
    if count < _ENOUGH:
        return False
    limit = f"max_new_tokens={sampling.max_new_tokens}"
    if cut == count:
        raise UsageError(
            f"{name}: the answers to the first {count} prompts are all cut off at {limit}, and "
            "none is of use; raise --max-new-tokens, or ask for short answers. What is stored "
            "was made with other settings then: choose another folder, or pass --overwrite"
        )
    if cut > count / 2:
        logger.warning(
            "%s: to %d of the first %d prompts no answer ended within %s, and they make no pairs; "
            "interrupt and raise --max-new-tokens if that is not meant",
            name,
            cut,
            count,
            limit,
        )
    return True
