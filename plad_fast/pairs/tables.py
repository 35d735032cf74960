"""Rows of a JSONL, JSON, CSV or Parquet file, or of a data set on the Hugging Face Hub.

JSON and CSV are read with the standard library: it names the bad line, and leaves text such as
"NA" or "007" alone.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plad_fast.errors import UsageError

Row = Mapping[str, Any]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
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
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        table = _read_hub(source, path, split)
    else:
        rows = _read_file(path, reader)
        table = Table(source, list(dict.fromkeys(name for row in rows for name in row)), rows)
    if not len(table.rows):
        raise UsageError(f"{source} has no rows; give a file or data set with at least one prompt")
    return table


def _read_file(path: Path, reader: Any) -> list[Row]:
    try:
        return reader(path)
    except FileNotFoundError:
        raise UsageError(_missing(path)) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _missing(path: Path) -> str:
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, neighbours, n=1)
    hint = f"did you mean {path.with_name(close[0])}?" if close else "check the path"
    return f"there is no file {path}; {hint}"


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = _parse(text, path, first_line=1)
    else:
        # Not splitlines(): a JSON string may hold U+2028 and the like as they are.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_parse(line, path, first_line=n) for n, line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UsageError(
                f"{path}, row {number} is a {type(row).__name__}; every row must be an object "
                'such as {"prompt": "..."}'
            )
    return rows


def _parse(text: str, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UsageError(
            f"{path}, line {line}, column {error.colno} is not valid JSON: {error.msg}; write one "
            "object a line, or a list of objects"
        ) from None
    except (ValueError, RecursionError) as error:  # too many digits, or brackets
        place = f"line {first_line}" if first_line > 1 else "line 1 or after"
        raise UsageError(
            f"{path}, {place} holds a number too long or lists too deep to be read ({error}); "
            "drop that row"
        ) from None


def _read_csv(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    before = csv.field_size_limit(_LONGEST_CSV_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row:
                raise UsageError(
                    f"{path}, line {reader.line_num} has more fields than the header; put fields "
                    "that contain commas in double quotes"
                )
            rows.append(row)
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {reader.reader.line_num} is not valid CSV: {error}; quote fields "
            "that contain commas, quotes or line breaks"
        ) from None
    finally:
        csv.field_size_limit(before)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}; write it anew") from None


_READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, path: Path, split: str) -> Table:
    if path.is_file():
        raise UsageError(
            f"cannot tell the format of {source}; prompts come from files that end in "
            f"{', '.join(_READERS)}, or from a hub data set"
        )
    if not path.is_dir() and not _HUB_ID.fullmatch(source):
        raise UsageError(_missing(path))

    import datasets

    name, _, config = (str(path), "", "") if path.is_dir() else source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except ConnectionError:
        raise UsageError(
            f"the hub data set {source!r} cannot be reached and is not in the local cache; check "
            f"the network, or give a file that ends in {', '.join(_READERS)}"
        ) from None
    except datasets.exceptions.DatasetNotFoundError:
        raise UsageError(
            f"there is neither a file nor an accessible hub data set {source!r}; check the "
            "spelling, and log in with `hf auth login` if it is gated or private"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"cannot load split {split!r} of the hub data set {source!r}: {reason}; name a split "
            "it has, and a config as in 'owner/name:config' where it has several"
        ) from error
    return Table(source, data.column_names, data)
