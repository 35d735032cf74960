"""Several processes of one command: the first leads, and the others help where it asks them to.

`torchrun` and `accelerate launch` start the same program several times. In the block of `led` the
first process goes on as if it were alone, and what it gives to `together` runs in all of them at
the same time. So prompts, folders, records and what is printed are its own, and the others train,
generate and score.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from plad_fast.errors import UsageError

T = TypeVar("T")

# All wait for the slowest: a process that dies closes its connections, which is noticed.
_PATIENCE = datetime.timedelta(days=30)
_MOMENT = 2.0  # seconds: what ended another process may reach this one, too
_ENDED, _STATUS = "plad_fast/ended", "plad_fast/status"


@dataclass
class _Team:
    rank: int = 0
    size: int = 1
    group: Any = None
    works: bool = False
    """Whether the first process has given them something and not got it back."""
    follows: bool = False
    """Whether the first process has said why it ends, and this one ends with it."""

    def broadcast(self, message: Any = None) -> Any:
        """The first process's message, in all of them."""
        box = [message]
        self._talk(lambda: dist.broadcast_object_list(box, group=self.group, group_src=0))
        return box[0]

    def work(self, function: Callable[..., T], given: tuple[Any, ...]) -> list[T]:
        """This process's part, and what all of them have found."""
        self.works = True
        try:
            found = function(*given)
        except RuntimeError as error:
            if isinstance(error, dist.DistBackendError) or "by peer" in str(error):
                raise self._alone() from error
            raise
        every = self.gather(found)
        self.works = False
        return every

    def gather(self, value: T) -> list[T]:
        found = [value] * self.size
        self._talk(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def largest(self, values: tuple[int, ...]) -> list[int]:
        numbers = torch.tensor(values)
        self._talk(lambda: dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group))
        return numbers.tolist()

    def help(self) -> None:
        """Does the parts of this process until the first one has ended, and ends like it."""
        logging.getLogger("plad_fast").setLevel(logging.ERROR)  # the first process warns
        while (message := self.broadcast()) is not None:
            if isinstance(message, BaseException):
                self.follows = True
                raise message
            self.work(*message)

    def _talk(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise self._alone() from error

    def _alone(self) -> UsageError:
        time.sleep(_MOMENT)  # a signal that has come meanwhile is the better reason
        return UsageError(
            f"process {self.rank} of {self.size} goes no further, since another one has failed or "
            "was killed; what is stored is safe, run again"
        )


_team = _Team()


@contextlib.contextmanager
def led() -> Iterator[bool]:
    """Connects the processes of a run; True in the first of them, which is to do the work.

    The others are here until the block of the first one ends, then get False. A single process
    gets True. An exception that ends the first one's block is raised in the others. Where another
    process fails or is killed, all that wait for it get a UsageError, as they do where the
    environment names processes that do not answer.
    """
    global _team
    if not _connected():
        yield True
        return
    # Its own group: the training's may be one that only sends from GPU to GPU.
    group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _team = team = _Team(dist.get_rank(), dist.get_world_size(), group)
    # Or transformers would leave all models but the first process's empty, also those that answer.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        if team.rank:
            team.help()
            yield False
        else:
            try:
                yield True
            except BaseException as error:
                if not team.works:
                    team.broadcast(_sendable(error))
                raise
            team.broadcast(None)
        _team = _Team()
    finally:
        dist.destroy_process_group(group)
        # Not kept by the traceback of an exception either: a group whose threads still run when
        # the interpreter ends aborts it.
        team.group = group = None


def together(function: Callable[..., T], *given: Any) -> list[T]:
    """What `function(*given)` returns in every process of a run, in their order.

    To be called in the first one (see `led`), or outside of any such run. `function` is one that
    pickle knows by its name, or a method, and all that it is given can be pickled. An exception in
    one of the processes ends them all.
    """
    if _team.size == 1:
        return [function(*given)]
    assert _team.rank == 0
    _team.works = True
    _team.broadcast((function, given))
    return _team.work(function, given)


def rank() -> int:
    """The number of this process in its run, from 0 on."""
    return _team.rank


def size() -> int:
    """How many processes work together."""
    return _team.size


def of_all(value: T) -> list[T]:
    """The value of every process, in their order; all of them are to ask."""
    return [value] if _team.size == 1 else _team.gather(value)


def largest(*values: int) -> list[int]:
    """The largest of each value over all processes, which are all to ask."""
    return list(values) if _team.size == 1 else _team.largest(values)


def require_seen(path: Path) -> None:
    """Raises UsageError for something that the first process has made and this one does not see."""
    if not path.exists():
        raise UsageError(
            f"{path} is not there for process {rank()}, and the first process has made it; on "
            "several machines --output-dir must be a folder that all of them see"
        )


def settled(status: int) -> tuple[int, bool]:
    """The exit status of a run that fails, and whether this process is to say why.

    The first process that fails decides both, for all of them.
    """
    if _team.size == 1:
        return status, True
    if _team.follows:
        return status, False
    if _team.rank:
        time.sleep(0.5)  # what all of them find is said by the first one
    try:
        store = dist.distributed_c10d._get_default_store()
        if store.add(_ENDED, 1) > 1:
            return int(store.get(_STATUS)), False
        store.set(_STATUS, str(status))
    except RuntimeError:  # the process that has the store is gone, and has said why
        return status, False
    return status, True


def leave(status: int) -> None:
    """Ends this process at once if it is one of several and fails: others may be stuck in an
    exchange with it, which an orderly end would wait for."""
    if _team.size > 1 and status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def launched() -> bool:
    """Whether the environment names further processes of this run."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _connected() -> bool:
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not launched():
            return False
        # The way the trainer does it, which will find it done.
        from accelerate import PartialState

        PartialState()
        atexit.register(_disconnect)
        if not dist.is_initialized():
            raise UsageError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but there is no other process; use "
                "torchrun, or unset it"
            )
    return dist.get_world_size() > 1


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        kind = UsageError if isinstance(error, UsageError) else RuntimeError
        return kind(str(error))
    return error
