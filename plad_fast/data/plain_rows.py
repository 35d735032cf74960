"""Rows of any table as plain dictionaries: values of Python's own kinds, without Arrow's nulls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

_PLAIN = {str, int, float, bool, type(None)}
_NUMBERS = {"chosen_score", "rejected_score", "scores", "reference_logps"}
"""Columns in which NaN is a number that went wrong; elsewhere pandas writes it for nothing."""
_TABLES = {"datasets", "pandas", "polars", "pyarrow"}
"""Packages whose structs have the keys of each other, null where a row has none."""
_ADVICE = "pass a datasets.Dataset, a DataFrame or a list of rows"


def plain_rows(dataset: Any, name: str) -> Dataset | list[dict[str, Any]]:
    """A data set without a format of its own, or a list of rows, with plain values in both.

    Takes a `datasets.Dataset` of any format or transform, a DataFrame of pandas or polars, a table
    of Arrow, or a sized collection of rows, whose values may be of numpy, torch, pandas or Arrow.
    Anything else, such as several splits or a stream, is refused (UsageError).

    Structs of a `Dataset` still have the keys of each other, see `without_nulls`. Every row keeps
    the columns in which it has no value.
    """
    package = _package(dataset)
    if package == "datasets":
        from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
            return dataset.with_format(None)
        if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
            raise UsageError(
                f"{name} is a {type(dataset).__name__} with the splits "
                f"{', '.join(map(repr, dataset))}; pass one of them, as in "
                f"data[{next(iter(dataset), 'train')!r}]"
            )
        if isinstance(dataset, IterableDataset):
            raise UsageError(
                f"{name} is an IterableDataset, a stream, and every row is read before the first "
                "step; load it without streaming=True, or pass list(data)"
            )
        # A transform of the caller's makes them.
        rows = list(dataset) if isinstance(dataset, Dataset) else _of_a_collection(dataset, name)
    elif package == "pandas" and hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):
        # In a frame a missing number is NaN as well.
        rows = dataset.astype(object).where(dataset.notna(), None).to_dict("records")
    elif package == "polars" and hasattr(dataset, "to_dicts"):
        rows = dataset.to_dicts()
    elif package == "pyarrow" and hasattr(dataset, "column_names"):
        rows = dataset.to_pylist()
    else:
        rows = _of_a_collection(dataset, name)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UsageError(
                f"{name}, row {number} is a {type(row).__name__}; every row must map column names "
                "to values"
            )
    rows = [*map(plain_row, rows)]
    if not package and not made_by_arrow(rows):
        return rows
    return [{column: without_nulls(value) for column, value in row.items()} for row in rows]


def plain_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row with `plain` values."""
    return {
        str(column): plain(value, nan=column in _NUMBERS) for column, value in dict(row).items()
    }


def _package(dataset: Any) -> str:
    """The library of tables that the class of a data set is of, or is derived from; "" for none."""
    packages = (kind.__module__.partition(".")[0] for kind in type(dataset).__mro__)
    return next((package for package in packages if package in _TABLES), "")


def _of_a_collection(dataset: Any, name: str) -> list[Any]:
    kind = type(dataset).__name__
    if isinstance(dataset, (str, bytes, Mapping)):
        raise UsageError(f"{name} is a {kind}; {_ADVICE}")
    if isinstance(dataset, (Sequence, Sized)) and hasattr(dataset, "__getitem__"):
        return [dataset[index] for index in range(len(dataset))]
    if isinstance(dataset, Sized) and isinstance(dataset, Iterable):
        return list(dataset)
    if isinstance(dataset, Iterable):
        raise UsageError(f"{name} is a {kind}, which can be read once only; pass list(...) of it")
    raise UsageError(f"{name} is a {kind}; {_ADVICE}")


def plain(value: Any, *, nan: bool = False) -> Any:
    """A value of Python, numpy, torch, pandas or Arrow, nested in any way, as JSON's kinds; what is
    unknown stays as it is. NaN is None, as pandas has it, unless `nan` keeps it as a number."""
    if type(value) is float:
        return value if nan or not math.isnan(value) else None
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {key: plain(item, nan=nan) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, nan=nan) for item in value]
    if isinstance(value, Decimal):
        return plain(float(value), nan=nan)
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas
        return None
    # Scalars and arrays of Arrow, then of numpy, torch, jax, pandas and polars: all of them say
    # what they are in Python's own types, or in those of numpy.
    for method in ("as_py", "to_pylist", "tolist", "to_list"):
        convert = getattr(value, method, None)
        if callable(convert) and not isinstance(value, type):
            return plain(convert(), nan=nan)
    return value


def without_nulls(value: Any) -> Any:
    """Less the keys without a value, at every depth: Arrow gives every row those that one has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def made_by_arrow(rows: Any) -> bool:
    """Whether nulls in the structs of these rows are Arrow's rather than somebody's.

    They are in a `datasets.Dataset`, and so are they in a list or file that was made of one: all
    structs at one place have the same keys, of which some have a value in one and none in another.
    """
    if hasattr(rows, "column_names"):  # without importing datasets
        return True
    keys: dict[tuple[str, ...], Any] = {}
    nulls: set[tuple[str, ...]] = set()
    values: set[tuple[str, ...]] = set()

    def uniform(value: Any, place: tuple[str, ...]) -> bool:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                (nulls if inner is None else values).add((*place, key))
            return keys.setdefault(place, value.keys()) == value.keys() and all(
                uniform(inner, (*place, key)) for key, inner in value.items()
            )
        return not isinstance(value, (list, tuple)) or all(uniform(item, place) for item in value)

    columns = (column for row in rows if isinstance(row, Mapping) for column in row.items())
    return all(uniform(value, (name,)) for name, value in columns) and not nulls.isdisjoint(values)
