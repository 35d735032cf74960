"""Rows of data that does not fit into memory, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from plad_fast.data.places import expanded
from plad_fast.data.plain_rows import without_nulls
from plad_fast.data.records import digest_of_list
from plad_fast.data.tables import (
    Row,
    csv_rows,
    one_line,
    parquet_rows,
    parse_json,
    read_hub,
    reading,
    require_object,
    require_text,
)
from plad_fast.errors import UsageError

_HEAD = 4096  # bytes


def stream_rows(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of `plad_fast.data.tables.read_table`, of which few are in memory at a time.

    Raises UsageError from the iterator, as `read_table` and for JSON that is one list.
    """
    path = expanded(source)
    stream = _STREAMS.get(path.suffix.lower())
    if stream is None:
        rows = read_hub(source, path, split, streaming=True)
        try:
            yield from map(without_nulls, rows)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"cannot read on in {source!r}: {one_line(error)}; try again, or give a file"
            ) from error
        return
    with reading(path):
        yield from stream(path)


def _json_rows(path: Path) -> Iterator[Row]:
    numbers = itertools.count(1)
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        if (row_number := next(numbers)) == 1 and line.lstrip().startswith("["):
            raise UsageError(
                "it is one JSON list, which can only be read whole; write one object a line"
            )
        row = parse_json(line, first_line=number)
        require_object(row, row_number)
        yield row


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        require_text(file.read(_HEAD))
    # Line breaks are those of the system that wrote it.
    with path.open(encoding="utf-8-sig") as lines:
        yield from lines


_STREAMS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": lambda path: csv_rows(_lines(path)),
    ".parquet": parquet_rows,
}


@dataclass
class StreamedRows:
    """Rows that are read anew whenever they are gone through; none is held.

    Made by going through them once; raises UsageError where there are none.
    """

    read: Callable[[], Iterator[Row]]
    """Makes the iterator; pickle knows it by its name."""
    name: str
    """In messages."""
    tokens: Path | None = None
    """File that keeps their token ids, which are mapped into memory from there."""
    columns: list[str] = field(init=False)
    digest: str = field(init=False)
    """That of the list of them."""
    _count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        columns: dict[str, None] = {}

        def counted() -> Iterator[Row]:
            for row in self.read():
                self._count += 1
                columns.update(dict.fromkeys(row))
                yield row

        self.digest = digest_of_list(counted())
        self.columns = list(columns)
        if not self._count:
            raise UsageError(f"{self.name} has no rows; give a file or data set with some")

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def __len__(self) -> int:
        return self._count
