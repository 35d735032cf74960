"""A preference dataset as a whole: it has rows, groups of one size, and token ids to train on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from decimal import Decimal
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from plad_fast.data.rows import TokenLimits
from plad_fast.errors import UsageError

_AT_ONCE = 10_000  # rows
_DEPTHS = {"prompt_ids": 1, "response_ids": 2}  # lists around a token id


def require_rows(dataset: Dataset | Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The columns of `plain_rows` that has rows."""
    if len(dataset) == 0:
        raise UsageError(f"{name} has no rows; check how it was loaded or filtered")
    if isinstance(dataset, Dataset):
        return dataset.column_names
    return list({column: None for row in dataset for column in row})


def holds_any(dataset: Dataset | Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bool:
    """Whether a row has a value in one of the columns."""
    if isinstance(dataset, Dataset):
        there = [column for column in columns if column in dataset.column_names]
        dataset = dataset.select_columns(there) if there else []
    return any(row.get(column) is not None for row in dataset for column in columns)


def token_dataset(rows: Dataset | Sequence[Mapping[str, Any]], name: str) -> Dataset:
    """Rows of token ids that somebody else made; which ids they are is not looked at.

    Raises:
        UsageError: `prompt_ids` are not lists of whole numbers, or `response_ids` not lists of
            those.
    """
    try:
        dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise UsageError(
            f"{name}: the rows of token ids do not make a table ({error}); give every column "
            "values of one kind, and ids of at most 64 bits"
        ) from error
    for column, depth in _DEPTHS.items():
        found = kind = dataset.data.schema.field(column).type
        levels = 0
        while not pyarrow.types.is_struct(kind) and pyarrow.types.is_nested(kind):
            kind, levels = kind.value_type, levels + 1
        empty = pyarrow.types.is_null(kind) and levels <= depth
        if not empty and (levels != depth or not pyarrow.types.is_integer(kind)):
            wanted = f"{'lists of ' * depth}whole numbers"
            raise UsageError(f"{name}: {column} should be {wanted}, and is of the type {found}")
    return dataset


def checked_tokens(
    dataset: Dataset,
    *,
    first_only: bool,
    encoder_decoder: bool,
    limits: TokenLimits | None,
    name: str,
) -> Dataset:
    """Rows of token ids that somebody else made, with the column `length`."""
    if limits is not None:
        require_dataset_ids(dataset, limits, name)
    lengths, sizes = [], set()
    for index, row in enumerate(dataset.select_columns(["prompt_ids", "response_ids"])):
        prompt, responses = row["prompt_ids"], row["response_ids"]
        if not prompt or not responses or None in responses:
            missing = "response_ids are" if prompt else "prompt_ids are"
            raise UsageError(
                f"{name}, row {index + 1}: the {missing} empty; every row needs a token of a "
                "prompt, which predicts the first one of a response, and a response"
            )
        sizes.add(1 if first_only else len(responses))
        kept = responses[: 1 if first_only else None]
        lengths.append(longest(prompt, kept, encoder_decoder))
    require_one_size(sizes, name)
    if first_only:
        given = {"response_ids", "scores", "reference_logps"} & set(dataset.column_names)
        dataset = dataset.map(lambda row: {name: row[name][:1] for name in given})
    if "length" in dataset.column_names:
        dataset = dataset.remove_columns("length")
    return dataset.add_column("length", lengths)


def require_ids(
    prompt: Sequence[int], responses: Iterable[Sequence[int]], limits: TokenLimits
) -> None:
    """Raises UsageError for a token id that the model has no embedding or no logit for.

    The message does not say which row it is: the caller knows.
    """
    _require_below(limits.inputs, "prompt", prompt)
    for response in responses:
        _require_below(limits.outputs, "response", response)


def _require_below(limit: int, part: str, ids: Sequence[int]) -> None:
    wrong = [token for token in ids if token is None or not 0 <= token < limit]
    if not wrong:
        return
    if wrong[0] is None:
        raise UsageError(f"the {part} has null among its token ids; leave it out")
    advice = (
        "ids are those of tokens, not labels: leave out what is masked"
        if wrong[0] < 0
        else "take the model's own tokenizer, or call model.resize_token_embeddings first"
    )
    raise UsageError(
        f"the {part} has the token id {wrong[0]}, and the model knows the ids 0 to {limit - 1}; "
        f"{advice}"
    )


def require_dataset_ids(dataset: Dataset, limits: TokenLimits, name: str) -> None:
    """Raises UsageError for a row of token ids of which the model does not know one."""
    for column in ("prompt_ids", "response_ids"):
        require_column_ids(dataset, column, limits, name)


def require_column_ids(dataset: Dataset, column: str, limits: TokenLimits, name: str) -> None:
    """Raises UsageError for a row with a token id that the model does not know.

    Args:
        dataset: of any format but a transform.
        column: lists of ids, or lists of those; of prompts if its name begins so.
        limits: of the model.
        name: what to call the dataset in messages.
    """
    part = column.partition("_")[0]
    limit = limits.inputs if part == "prompt" else limits.outputs
    first = 1
    for table in dataset.select_columns(column).with_format("arrow").iter(_AT_ONCE):
        low, high, nulls = _bounds(table[column])
        if low < 0 or high >= limit or nulls:
            for number, row in enumerate(table[column], start=first):
                ids = row.as_py() or []
                flat = [token for one in ids for token in one or ()] if _holds_lists(ids) else ids
                try:
                    _require_below(limit, part, flat)
                except UsageError as error:
                    raise UsageError(f"{name}, row {number}: {error}") from None
        first += len(table)


def _holds_lists(ids: Sequence[Any]) -> bool:
    return any(isinstance(one, list) for one in ids)


def _bounds(column: Any) -> tuple[int, int, int]:
    """The smallest and the largest number in a column of lists, or of lists of them, and how many
    are null."""
    while pyarrow.types.is_nested(column.type):
        column = pyarrow.compute.list_flatten(column)
    found = pyarrow.compute.min_max(column).as_py()
    return found["min"] or 0, found["max"] or 0, column.null_count


def require_one_size(sizes: set[int], name: str) -> None:
    if len(sizes) > 1:
        raise UsageError(
            f"the rows of {name} have {' or '.join(map(str, sorted(sizes)))} responses; a batch "
            "needs groups of one size: keep that many of each, or train on them one after the other"
        )


def longest(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], encoder_decoder: bool
) -> int:
    """Tokens of the longest sequence that passes through one stack of layers."""
    response = max(map(len, responses))
    return max(len(prompt), response) if encoder_decoder else len(prompt) + response


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
