"""One process to a folder or file: locks that end with the process, however it ends."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from plad_fast.data.files import disk_advice, make_folders
from plad_fast.errors import UsageError

logger = logging.getLogger("plad_fast")


@contextlib.contextmanager
def held_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An output folder that is this process's alone until the block ends; made where it is missing.

    Nothing is read of it, or written into it, by a command that does not hold it. One that leaves
    it empty leaves it as it was found: away, if it was made here. Raises UsageError where another
    process holds it, or it cannot be made.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output-dir {path} is a file; choose a folder")
    made = not path.exists()
    with ExitStack() as held:
        try:
            try:
                make_folders(path)
                held.enter_context(locked(path))
                # A training holds these until there is a model to put into the folder.
                checkpoints = path.with_name(f"{path.name}.checkpoints")
                if checkpoints.is_dir():
                    with locked(checkpoints):
                        pass
            except OSError as error:
                raise cannot_write(path, error) from error
            yield path
        finally:
            if made:
                with contextlib.suppress(OSError):  # there is something in it
                    path.rmdir()


def cannot_write(folder: Path, error: OSError) -> UsageError:
    """What to raise where an output folder refuses to be written."""
    advice = disk_advice(error) or "choose another --output-dir"
    what = error.strerror or error
    return UsageError(f"cannot write to {folder}: {what}; {advice} and run the same command again")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A folder or file that no other process locks until the block ends; raises UsageError where
    one does."""
    if os.name == "nt":  # which has no descriptors of folders
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path) -> None:
    """Lock what a descriptor has open until that is closed, by the process's end at the latest.

    A file system that has no locks, as some of networks, is used with a warning. Raises UsageError
    where another process has locked it, or has given its name to something else.
    """
    if os.name == "nt":  # whose locks keep others from reading, too
        return
    from filelock import lock_descriptor

    try:
        free = lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s)", path, error)
        return
    if not free or not _is_at(path, descriptor):
        raise UsageError(
            f"{path} is being filled by another process; wait for it to end, or choose another "
            "output folder"
        )


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether what is open still has its name, which who held it before may have given away."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
