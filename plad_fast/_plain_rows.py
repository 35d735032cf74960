"""Rows in whatever form their library hands them over, as plain Python values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from decimal import Decimal
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from plad_fast.errors import UsageError

_PLAIN = {str, int, float, bool, type(None)}
_NUMBERS = {"chosen_score", "rejected_score", "scores", "reference_logps"}
"""Columns in which NaN is a number that went wrong; elsewhere pandas writes it for nothing."""
_ADVICE = "pass a datasets.Dataset, a DataFrame or a list of rows"


def plain_rows(dataset: Any, name: str) -> Dataset | list[dict[str, Any]]:
    """A data set without a format of its own, or a list of rows, with plain values in both.

    Args:
        dataset: a `datasets.Dataset` of any format or transform, a DataFrame of pandas or polars, a
            table of Arrow, or a sized collection of rows, whose values may be of numpy, torch,
            pandas or Arrow.
        name: what to call it in messages.

    Raises:
        UsageError: something else, such as several splits or a stream; says what to pass instead.
    """
    if isinstance(dataset, Dataset):
        if dataset.format["type"] != "custom":
            return dataset.with_format(None)
        return [_plain_row(row) for row in dataset]  # a transform of the caller's makes the rows
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        splits = ", ".join(map(repr, dataset))
        raise UsageError(
            f"{name} is a {type(dataset).__name__} with the splits {splits}; pass one of them, as "
            f"in data[{next(iter(dataset), 'train')!r}]"
        )
    if isinstance(dataset, IterableDataset):
        raise UsageError(
            f"{name} is an IterableDataset, a stream, and every row is read before the first step; "
            "load it without streaming=True, or pass list(data)"
        )
    rows = _of_a_table(dataset)
    if rows is None:
        rows = _of_a_collection(dataset, name)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UsageError(
                f"{name}, row {number} is a {type(row).__name__}; every row must map column names "
                "to values"
            )
    return [_plain_row(row) for row in rows]


def is_of_arrow(dataset: Any) -> bool:
    """Whether every struct of a column has the keys that one of them has, null in the others."""
    package = type(dataset).__module__.partition(".")[0]
    return package in ("datasets", "pandas", "polars", "pyarrow")


def _of_a_table(dataset: Any) -> list[Any] | None:
    """The rows of a DataFrame or of Arrow's table; None for anything else."""
    package = type(dataset).__module__.partition(".")[0]
    if package == "pandas" and hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):
        # In a frame a missing number is NaN as well.
        return dataset.astype(object).where(dataset.notna(), None).to_dict("records")
    if package == "polars" and hasattr(dataset, "to_dicts"):
        return dataset.to_dicts()
    if package == "pyarrow" and hasattr(dataset, "column_names"):
        return dataset.to_pylist()
    return None


def _of_a_collection(dataset: Any, name: str) -> list[Any]:
    kind = type(dataset).__name__
    if isinstance(dataset, (str, bytes, Mapping)):
        raise UsageError(f"{name} is a {kind}; {_ADVICE}")
    if isinstance(dataset, (Sequence, Sized)) and hasattr(dataset, "__getitem__"):
        return [dataset[index] for index in range(len(dataset))]
    if isinstance(dataset, Sized) and isinstance(dataset, Iterable):
        return list(dataset)
    if isinstance(dataset, Iterable):
        raise UsageError(
            f"{name} is a {kind}, which can be read once only, and rows are read more often; pass "
            "list(...) of it, or a datasets.Dataset"
        )
    raise UsageError(f"{name} is a {kind}; {_ADVICE}")


def _plain_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(column): plain(value, nan=column in _NUMBERS) for column, value in dict(row).items()
    }


def plain(value: Any, *, nan: bool = False) -> Any:
    """A value as JSON's kinds, as far as it is made of them; what is unknown stays as it is.

    Args:
        value: of Python, numpy, torch, pandas or Arrow, nested in any way.
        nan: keep NaN as a number; else it is None, as pandas has it.
    """
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
