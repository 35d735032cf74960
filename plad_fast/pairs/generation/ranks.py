"""Processes of one run: their shares of the prompts, and their files put together.

`torchrun` and `accelerate launch` start the same program several times. Each process answers its
share into a file of its own, beside the store; the first one puts them together. On several
machines the folder has to be one that all of them see.
"""

from __future__ import annotations

import atexit
import datetime
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.text_model import Wanted

T = TypeVar("T")

# All wait for the slowest: a process that dies closes its connections, which is noticed.
_PATIENCE = datetime.timedelta(days=30)


@dataclass
class Ranks:
    """The processes of this run; make it with `joined`."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; a UsageError there is raised in all."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except UsageError as error:
                outcome[1] = str(error)
        self._talk(lambda: dist.broadcast_object_list(outcome, group=self.group, group_src=0))
        if outcome[1] is not None:
            raise UsageError(outcome[1])
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in everybody."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._talk(lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def _talk(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise UsageError(
                f"process {self.rank} of {self.size} goes no further, since another one has failed "
                "or was killed, as its own message says; what is stored is safe, run again"
            ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes of this run, connected until the block ends.

    A process that leaves the block by an exception disconnects, and the others get a UsageError
    where they wait for it, as all do where the environment names processes that do not answer.
    """
    if not has_others():
        yield Ranks()
        return
    # Its own group: the training's may be one that only sends from GPU to GPU.
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), group)
    try:
        yield ranks
        ranks.gather(None)  # no process disconnects while another one still reads
    finally:
        dist.destroy_process_group(group)
        # Not kept by the traceback of an exception either: a group whose threads still run when
        # the interpreter ends aborts it.
        ranks.group = group = None


def by_first(make: Callable[[], T]) -> T:
    """What the first process of this run makes, in all of them; see `Ranks.from_first`."""
    with joined() as ranks:
        return ranks.from_first(make)


def has_others() -> bool:
    """Whether there are other processes of this run."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        size = os.environ.get("WORLD_SIZE", "1")
        if size in ("", "1") or "RANK" not in os.environ:
            return False
        # The way the trainer does it, which will find it done.
        from accelerate import PartialState

        PartialState()
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        if not dist.is_initialized():
            raise UsageError(
                f"WORLD_SIZE={size}, but there is no other process; use torchrun, or unset it"
            )
    return dist.get_world_size() > 1


def share(wanted: Wanted, rank: int, size: int) -> list[tuple[Prompt, int]]:
    """The part of one process: about as many, about as long, and all samples of a prompt."""
    prompts = {prompt.id: prompt for prompt, _ in wanted}.values()
    ids = [p.id for p in sorted(prompts, key=lambda p: (-len(json.dumps(p.content)), p.id))]
    # Back and forth: in one direction alone the first process would get the longer ones.
    order = [*range(size), *reversed(range(size))]
    mine = {prompt_id for i, prompt_id in enumerate(ids) if order[i % len(order)] == rank}
    return [(prompt, sample) for prompt, sample in wanted if prompt.id in mine]


def shard_path(store: Path, ranks: Ranks) -> Path:
    """Where this process keeps its share of a store."""
    return store.with_name(f"{store.stem}.rank{ranks.rank}of{ranks.size}{store.suffix}")


def shard_paths(store: Path) -> list[Path]:
    """The shares that there are, of this run or of one that was killed."""
    name = re.compile(rf"{re.escape(store.stem)}\.rank\d+of\d+{re.escape(store.suffix)}")
    found = store.parent.glob(f"{glob.escape(store.stem)}.rank*")
    return sorted(path for path in found if name.fullmatch(path.name))


def merge_shards(store: RowStore, fingerprint: Mapping[str, Any], order: Mapping[str, int]) -> None:
    """Moves all shares into the store; raises UsageError for one of another run, or still open.

    Rows are added in `order`, row id -> place; others come last.
    """
    paths = shard_paths(store.path)
    rows: list[dict[str, Any]] = []
    for path in paths:
        with RowStore.open(path, fingerprint) as shard:
            rows += shard.rows.values()
    rows.sort(key=lambda row: order.get(row["id"], len(order)))
    store.append(rows)
    for path in paths:
        path.unlink()
