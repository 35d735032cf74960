"""One process to a folder: locks that the system drops with the process, however that ends."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from plad_fast.data.files import disk_advice, make_folders
from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("plad_fast")

try:
    import fcntl
except ImportError:  # not a POSIX system; two runs in one folder are then not told apart
    fcntl = None  # type: ignore[assignment]


class HeldFolder:
    """An output folder that is this process's alone until it is closed; made where it is missing.

    Nothing is read of it, or written into it, by a command that does not hold it. One that leaves
    it empty leaves it as it was found: away, if it was made here.

    Raises:
        UsageError: another process holds the folder, there is a file in its place, or it cannot be
            made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output-dir {self.path} is a file; choose a folder")
        self._made = not self.path.exists()
        self._lock: int | None = None
        try:
            make_folders(self.path)
            self._lock = lock_folder(self.path)
            # A training holds these until there is a model to put into the folder.
            checkpoints = self.path.with_name(f"{self.path.name}.checkpoints")
            if checkpoints.is_dir() and (lock := lock_folder(checkpoints)) is not None:
                os.close(lock)
        except UsageError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._made:
            with contextlib.suppress(OSError):  # there is something in it
                self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def cannot_write(folder: Path, error: OSError) -> UsageError:
    """What to raise where an output folder refuses to be written."""
    advice = disk_advice(error) or "choose another --output-dir"
    return UsageError(
        f"cannot write to {folder}: {error.strerror or error}; {advice} and run the same command "
        "again"
    )


def lock_folder(path: Path) -> int | None:
    """Held as long as this process; the system drops it however that ends.

    Returns:
        The descriptor to close when done, or None where the file system has no locks.

    Raises:
        UsageError: another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        busy = not _is_at(path, descriptor)
    except BlockingIOError:
        busy = True
    except OSError as error:
        os.close(descriptor)
        logger.warning("%s: this file system has no locks (%s)", path, error)
        return None
    if busy:
        os.close(descriptor)
        raise UsageError(
            f"{path} is being filled by another process; wait for it to end, or choose another "
            "--output-dir"
        )
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a folder still has its name, which who held it before may have given to another."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
