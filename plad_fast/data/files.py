"""Files and folders that are on the disk, whole, once they bear their names.

A rename alone is kept by the system's memory: after a power cut a file may have its name and none
of its content. So the content is synced before the rename, and the folder of the name after it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Of file systems that know no sync of a folder: some of networks and of user space.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EISDIR}
_MAKE_ROOM = "make room"
_ADVICE = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): _MAKE_ROOM,
    (errno.EROFS,): "choose a folder on another disk, or make this one writable,",
    (errno.EACCES, errno.EPERM): "choose a folder that you may write to, or change permissions,",
}
# What torch.save says when a write came out short.
_OF_TORCH = ("pytorchstreamwriter failed writing", "iostream error", "unexpected pos ")


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text in place of what is at `path`; see `replacing`."""
    path = Path(path)
    with replacing(path) as file:
        file.write(text.encode())
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file next to `path` that is renamed into its place at the end of the block; folders are
    made as needed.

    It is on the disk then. After an exception what was at `path` before is still there.
    """
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folders(path: Path) -> None:
    """Make a folder and those above it, where they are missing, and their names durable."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def publish_folder(partial: Path, final: Path) -> Path:
    """Give a filled folder its name; all that is in it is on the disk when this returns.

    `partial` lies beside `final`, which is not there or an empty folder; raises OSError.
    """
    sync_tree(partial)
    if final.is_dir() and not final.is_symlink():
        final.rmdir()  # which a folder with anything in it refuses
    partial.rename(final)
    sync_folder(final.parent)
    return final


def sync_tree(folder: Path) -> None:
    """Write through what is in a folder: every file, at any depth, and the names of all."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                # Windows syncs only what is open for writing.
                with path.open("r+b" if os.name == "nt" else "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(path: Path) -> None:
    """Write the names in a folder through to the disk, where its file system can."""
    if os.name == "nt":  # which has no descriptors of folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def disk_advice(error: BaseException | None) -> str | None:
    """What helps against a disk that is full or refuses to be written; None for other errors.

    Libraries wrap the system's errors, or replace them by texts of their own.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        text = str(error).lower()
        for numbers, advice in _ADVICE.items():
            # "Operation not permitted" is said by others than disks, too.
            named = any(os.strerror(n).lower() in text for n in numbers if n != errno.EPERM)
            if number in numbers or (number is None and named):
                return advice
        if number is None and any(own in text for own in _OF_TORCH):
            return _MAKE_ROOM
        error = error.__cause__ or error.__context__
    return None
