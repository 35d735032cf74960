"""Rows in an append-only file that outlives a killed run: answers, scores, log-probabilities.

The first line is a header with the settings that made the rows; every other line is one row, a
JSON object with an `id`. A run killed at any moment loses at most the rows it was writing.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.checks import shown
from plad_fast.data.files import disk_advice
from plad_fast.data.locks import lock
from plad_fast.data.records import RecordFormat, as_json, require_equal
from plad_fast.data.unicode import mend
from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

FORMAT = RecordFormat("plad-fast rows", 1)
_OR_ANEW = "choose another output folder, or pass --overwrite to start anew"

Row = dict[str, Any]


class RowStore:
    """Rows by id. Make one with `open`; it is a context manager that closes the file."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        """Those stored so far, by id, in the order they came; `append` adds to them."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: after a failed write nothing is left behind to be written later.
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            lock(self._file.fileno(), path)
            self._file.seek(0)
            self._load(self._file.read(), settings)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> RowStore:
        """Opens a store of JSONL, or makes one together with its folder.

        A last line without an end, left by a killed run or a full disk, is cut off. Of rows with
        the same id the first counts. A store without rows takes the fingerprint that it is given:
        the settings the rows depend on, as JSON values.

        Raises:
            UsageError: the file cannot be written, is no store or is damaged, is open in another
                process, or holds rows that were made with another fingerprint.
        """
        return cls(Path(path).expanduser(), as_json(fingerprint))

    def append(self, rows: Sequence[Row]) -> None:
        """Writes rows through to the disk; a row whose id is stored already is left out.

        Either all rows are stored or, after an exception, none: UsageError for a full disk.
        """
        new: dict[str, Row] = {}
        for row in map(mend, rows):
            if row["id"] not in self.rows:
                new.setdefault(row["id"], row)
        self._write(b"".join(map(_line, new.values())))
        self.rows.update(new)

    def require(self, fits: Callable[[Row], bool]) -> None:
        """Raises UsageError for a stored row that lacks what rows of its kind have, as `fits` says;
        none has passed a check but that it has an id."""
        for row in self.rows.values():
            if not fits(row):
                raise UsageError(
                    f"{self.path}: the line with the id {shown(row['id'])} is damaged; delete that "
                    "line, or pass --overwrite to start anew"
                )

    def close(self) -> None:
        """Closes the file, and lets other processes have it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _load(self, content: bytes, settings: dict[str, Any]) -> None:
        # Nothing of a file that is not ours is ever cut off or overwritten.
        if not FORMAT.begins(content):
            raise UsageError(f"{self.path} is not a store of rows; choose another output folder")
        header = {**FORMAT.header, "fingerprint": settings}
        first, *lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1] or [b""]
        found = self._parse(first, 1, ("version", "fingerprint")) if first else None
        if found is not None and found["version"] != FORMAT.version:
            raise UsageError(
                f"{self.path} has format version {found['version']}, this plad_fast writes version "
                f"{FORMAT.version}; {_OR_ANEW}"
            )
        if found is None or (not lines and found != header):
            self._file.truncate(0)
            self._write(_line(header))
            return
        require_equal(found["fingerprint"], settings, self.path, _OR_ANEW)
        for number, line in enumerate(lines, start=2):
            row = self._parse(line, number, ("id",))
            self.rows.setdefault(row["id"], row)
        if not content.endswith(b"\n"):
            logger.info("%s: cut off an unfinished last line", self.path)
            self._file.truncate(content.rfind(b"\n") + 1)

    def _parse(self, line: bytes, number: int, keys: Sequence[str]) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if (
            not isinstance(row, dict)
            or not row.keys() >= set(keys)
            or not isinstance(row.get("id", ""), str)
        ):
            raise UsageError(
                f"{self.path}, line {number} is damaged; delete that line, or pass --overwrite"
            )
        return mend(row)  # it may be older than the mending where texts come in

    def _write(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            self._file.truncate(end)
            if isinstance(error, OSError):
                raise _unwritable(self.path, error) from error
            raise


def has_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a store is there and has anything after its header."""
    path = Path(path).expanduser()
    if not path.exists():
        return False
    with path.open("rb") as file:
        return sum(1 for _ in itertools.islice(file, 2)) == 2


def fingerprint_of(path: Path) -> dict[str, Any] | None:
    """What a store says it was made with; None where there is no store, or a damaged one."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
        return header["fingerprint"] if header["format"] == FORMAT.name else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate has no UTF-8 form; the replacement is also its JSON escape.
    text = json.dumps(row, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _unwritable(path: Path, error: OSError) -> UsageError:
    advice = disk_advice(error) or "choose another output folder"
    return UsageError(
        f"cannot write {path}: {error.strerror or error}; what was stored before is safe: "
        f"{advice} and run again"
    )
