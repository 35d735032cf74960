"""A preference dataset as a whole: it has rows, groups of one size, and token ids to train on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset

from plad_fast.data.files import replacing
from plad_fast.data.rows import TokenLimits
from plad_fast.errors import UsageError, located

_AT_ONCE = 10_000  # rows
_WRITTEN_AT_ONCE = 1000  # rows
_IDS, _FLOATS = pyarrow.list_(pyarrow.int64()), pyarrow.list_(pyarrow.float64())
_GROUP = pyarrow.schema(
    {
        "prompt_ids": _IDS,
        "response_ids": pyarrow.list_(_IDS),
        **dict.fromkeys(("truncated", "fits"), pyarrow.bool_()),
        **dict.fromkeys(("moved", "split"), pyarrow.string()),
        "length": pyarrow.int64(),
    }
)
_NUMBERS = pyarrow.schema({"scores": _FLOATS, "reference_logps": _FLOATS})
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
    return bool(columns) and any(row.get(c) is not None for row in dataset for c in columns)


def token_dataset(rows: Dataset | Sequence[Mapping[str, Any]], name: str) -> Dataset:
    """Rows of token ids that somebody else made; which ids they are is not looked at.

    Raises UsageError unless `prompt_ids` are lists of whole numbers, and `response_ids` lists of
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


def dataset_on_disk(groups: Iterator[Mapping[str, Any]], path: Path | None) -> Dataset:
    """Groups of token ids that are mapped into memory from a file, written unless it is there."""
    assert path is not None
    if not path.exists():
        first = next(groups, None)
        schema = pyarrow.schema([*_GROUP, *(c for c in _NUMBERS if c.name in (first or ()))])
        rows = itertools.chain([] if first is None else [first], groups)
        with replacing(path) as file, pyarrow.ipc.new_stream(file, schema) as out:
            while some := [*itertools.islice(rows, _WRITTEN_AT_ONCE)]:
                out.write_table(pyarrow.Table.from_pylist(some, schema))
    return Dataset.from_file(str(path))


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
    if wrong:
        advice = "take the model's own tokenizer, or call model.resize_token_embeddings first"
        if wrong[0] is None or wrong[0] < 0:
            advice = "ids are those of tokens, not labels: leave out what is masked"
        known = f"the model knows the ids 0 to {limit - 1}"
        raise UsageError(f"the {part} has the token id {wrong[0]}, and {known}; {advice}")


def require_dataset_ids(dataset: Dataset, limits: TokenLimits, name: str) -> None:
    """Raises UsageError for a row of token ids of which the model does not know one."""
    for column in ("prompt_ids", "response_ids"):
        require_column_ids(dataset, column, limits, name)


def require_column_ids(dataset: Dataset, column: str, limits: TokenLimits, name: str) -> None:
    """Raises UsageError for a row with a token id that the model does not know. The column holds
    lists of ids, or lists of those; of prompts if its name begins so."""
    part = column.partition("_")[0]
    limit = limits.inputs if part == "prompt" else limits.outputs
    first = 1
    for table in dataset.select_columns(column).with_format("arrow").iter(_AT_ONCE):
        flat, depth = table[column], 0
        while pyarrow.types.is_nested(flat.type):
            flat, depth = pyarrow.compute.list_flatten(flat), depth + 1
        found = pyarrow.compute.min_max(flat).as_py()
        if flat.null_count or (found["min"] or 0) < 0 or (found["max"] or 0) >= limit:
            for number, row in enumerate(table[column].to_pylist(), start=first):
                with located(f"{name}, row {number}"):
                    for ids in [row] if depth == 1 else row or ():
                        _require_below(limit, part, ids or ())
        first += len(table)


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
