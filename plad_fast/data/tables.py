"""Rows of a JSONL, JSON, CSV or Parquet file, or of a data set on the Hugging Face Hub.

JSON and CSV are read with the standard library: it names the bad line, and leaves text such as
"NA" or "007" alone.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plad_fast.checks import shown
from plad_fast.data.places import expanded, is_there, names_path, nothing_at
from plad_fast.data.plain_rows import without_nulls
from plad_fast.errors import UsageError

Row = Mapping[str, Any]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# Endings of files that are no data of ours, and that no data set on the hub is called by.
_FOREIGN = re.compile(r"\.(txt|tsv|md|ya?ml|xlsx?|arrow|gz|bz2|xz|zst|zip|tar)$", re.IGNORECASE)
_MOST_DIGITS = 300  # of a number: a float holds no more, and Python reads no more than 4,300
_WRITTEN_MESSAGES = re.compile(
    r"\s*\[\s*\{\s*(['\"])(?:role|content|from)\1\s*:.*\}\s*\]\s*", re.DOTALL
)
_DEEPEST = 200  # lists and objects in one another
_PACKED = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive, as an Excel file is,",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PAR1": "a Parquet file",
}
_AT_ONCE = 1000  # rows of a Parquet file
_LONGEST_CSV_FIELD = 2**31 - 1  # the default, 128 KiB, is shorter than many a document


@dataclass(frozen=True)
class Table:
    """Rows with named columns; a row may lack a column."""

    source: str
    columns: Sequence[str]
    rows: Sequence[Row]

    def column(self, name: str) -> list[Any]:
        """The values of one column, None where a row has none."""
        if isinstance(self.rows, list):
            return [row.get(name) for row in self.rows]
        return list(self.rows[name])  # type: ignore[call-overload]  # a datasets.Dataset


def read_table(source: str, split: str) -> Table:
    """Reads a file by its ending, and takes anything else for a hub data set.

    Args:
        source: path of a `.jsonl`, `.json`, `.csv` or `.parquet` file (UTF-8), or `owner/name` of a
            hub data set, with `:config` appended where it has several, or a folder of data files.
        split: which split of a hub data set; files have only one.

    Raises:
        UsageError: there is no such file or data set, or it cannot be read, or it has no rows.
    """
    if not source:
        raise UsageError("the name of a file or data set is empty; give one")
    path = expanded(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        data = read_hub(source, path, split)
        table = Table(source, data.column_names, data)
    else:
        with reading(path):
            rows = list(reader(path, True))
        table = Table(source, list(dict.fromkeys(name for row in rows for name in row)), rows)
    if not len(table.rows):
        raise UsageError(f"{source} has no rows; give a file or data set with at least one row")
    return table


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with a file of rows is raised as a UsageError that names it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    except OSError as error:
        if not is_there(path):
            raise UsageError(nothing_at(path, is_file=True)) from None
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply to be read; flatten it") from None


def _json_rows(path: Path, whole: bool) -> Iterator[Row]:
    """Rows of a file of one object a line or, if it may be read as a whole, of one list."""
    lines, count = enumerate(_lines(path), start=1), 0
    for number, line in lines:
        if not line.strip():
            continue
        is_list = not count and line.lstrip().startswith("[")
        if is_list and not whole:
            raise UsageError(
                "it is one JSON list, which can only be read whole; write one object a line"
            )
        text = line + "".join(rest for _, rest in lines) if is_list else line.rstrip("\n")
        value = _parse_json(text, first_line=number)
        for row in value if is_list else [value]:
            count += 1
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UsageError(f"row {count} is a {kind}; every row must be an object of columns")
            yield row


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        head = file.read(max(map(len, _PACKED)))
    for start, kind in _PACKED.items():
        if head.startswith(start):
            raise UsageError(f"it is {kind}, whatever its name says; unpack or rename it first")
    # Line breaks are those of the system that wrote it.
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if "\0" in line:
                text = "it holds NUL bytes, as UTF-16 does; convert it to UTF-8 text first"
                raise UsageError(text)
            yield line


def _parse_json(text: str, *, first_line: int) -> Any:
    """A JSON value; raises UsageError with the line of what is wrong."""

    def integer(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            line = first_line + text.count("\n", 0, text.index(digits))
            found = f"line {line} holds a number of {len(digits)} digits"
            raise UsageError(f"{found}; write it as text, or leave it out")
        return int(digits)

    try:
        value = json.loads(text, parse_int=integer)
        if text.count("[") + text.count("{") > _DEEPEST and _is_deep(value):
            raise RecursionError
        return value
    except RecursionError:
        found = f"line {first_line} is nested more than {_DEEPEST} deep"
        raise UsageError(f"{found}; flatten it") from None
    except json.JSONDecodeError as error:
        found = f"line {first_line + error.lineno - 1}, column {error.colno} is not valid JSON"
        advice = "write one object a line, or a list of objects"
        raise UsageError(f"{found}: {error.msg}; {advice}") from None


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in one another so deeply that working on them may fail."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        if not level:
            return False
    return True


def _csv_rows(path: Path, whole: bool) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_CSV_FIELD)
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        _require_different(name for name in reader.fieldnames or () if name)
        for row in reader:
            if None in row:
                found = f"line {reader.line_num} has more fields than the header"
                raise UsageError(f"{found}; put fields that contain commas in double quotes")
            yield row
    except csv.Error as error:
        found = f"line {reader.reader.line_num} is not valid CSV: {error}"
        advice = "quote fields that contain commas, quotes or line breaks"
        raise UsageError(f"{found}; {advice}") from None
    finally:
        csv.field_size_limit(before)


def _require_different(names: Iterable[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"several columns are named {shown(twice[0])}; rename all but one")


def _parquet_rows(path: Path, whole: bool) -> Iterator[Row]:
    """Rows of a Parquet file, or a folder of them, some of which are in memory at once."""
    import pyarrow
    import pyarrow.parquet

    try:
        for part in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
            with pyarrow.parquet.ParquetFile(part) as file:
                _require_different(file.schema_arrow.names)
                for batch in file.iter_batches(_AT_ONCE):
                    for row in batch.to_pylist():
                        yield {name: without_nulls(value) for name, value in row.items()}
    except (UsageError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    # Of what a file may hold, dates beyond Python's years for example raise errors of their own.
    except (pyarrow.ArrowException, OSError, ArithmeticError, ValueError, TypeError) as error:
        text = f"it is not a readable Parquet file: {one_line(error)}; write it anew"
        raise UsageError(text) from None


READERS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
"""By a file's ending: its rows as they are gone through, and whether it may be read as a whole."""


def read_hub(source: str, path: Path, split: str, *, streaming: bool = False) -> Any:
    """A `datasets.Dataset`, or with `streaming` an `IterableDataset`, of the hub or of a folder;
    raises UsageError as `read_table`."""
    found = is_there(path)
    if found and path.is_file():
        raise UsageError(
            f"cannot tell the format of {source}; give a file that ends in {', '.join(READERS)}"
        )
    if not found and (
        names_path(source) or _FOREIGN.search(source) or not _HUB_ID.fullmatch(source)
    ):
        raise UsageError(nothing_at(source, is_file=True))

    import datasets

    name, _, config = (str(path), "", "") if found else source.partition(":")
    what = f"split {split!r} of the hub data set {source!r}"
    advice = "name a split it has, and a config as in 'owner/name:config' where it has several"
    files = f"give a file that ends in {', '.join(READERS)}"
    if found:
        what, advice = f"the folder {source!r} as a data set", f"{files}, or a folder of such files"
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except ConnectionError:
        raise UsageError(
            f"the hub data set {source!r} cannot be reached and is not in the local cache; check "
            f"the network, or {files}"
        ) from None
    except datasets.exceptions.DatasetNotFoundError:
        raise UsageError(
            f"there is neither a file nor an accessible hub data set {source!r}; check the "
            "spelling, and log in with `hf auth login` if it is gated or private"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"cannot load {what}: {one_line(error)}; {advice}") from error


def refuse_written_lists(value: Any, where: str) -> None:
    """Raises UsageError for a text that is chat messages written out, as CSV files have them.

    A model would be asked brackets and quotes.
    """
    if isinstance(value, str) and _WRITTEN_MESSAGES.fullmatch(value):
        raise UsageError(
            f"{where} holds a list of chat messages written out as text, for CSV has no lists: "
            "give the data as JSONL or Parquet"
        )


def one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
