"""Rows of data that does not fit into memory, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from plad_fast.data.places import expanded
from plad_fast.data.plain_rows import without_nulls
from plad_fast.data.records import digest_of_list
from plad_fast.data.tables import READERS, Row, one_line, read_hub, reading
from plad_fast.errors import UsageError


def stream_rows(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of `plad_fast.data.tables.read_table`, of which few are in memory at a time.

    Raises UsageError from the iterator, as `read_table` and for JSON that is one list.
    """
    path = expanded(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        rows = read_hub(source, path, split, streaming=True)
        try:
            yield from map(without_nulls, rows)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"cannot read on in {source!r}: {one_line(error)}; try again, or give a file"
            ) from error
        return
    with reading(path):
        yield from reader(path, False)


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
