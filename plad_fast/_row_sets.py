"""A preference dataset as a whole: it has rows, groups of one size, and token ids to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from plad_fast.errors import UsageError


def require_rows(dataset: Dataset | Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The columns of a dataset that has rows."""
    if isinstance(dataset, (str, Mapping)) or not isinstance(dataset, (Dataset, Sequence)):
        raise UsageError(
            f"{name} is a {type(dataset).__name__}; pass a datasets.Dataset or a list of rows"
        )
    if len(dataset) == 0:
        raise UsageError(f"{name} has no rows; check how it was loaded or filtered")
    if isinstance(dataset, Dataset):
        return dataset.column_names
    for number, row in enumerate(dataset, start=1):
        if not isinstance(row, Mapping):
            raise UsageError(
                f"{name}, row {number} is a {type(row).__name__}; every row must map column names "
                "to values"
            )
    return list({column: None for row in dataset for column in row})


def holds_any(dataset: Dataset | Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bool:
    """Whether a row has a value in one of the columns."""
    if isinstance(dataset, Dataset):
        there = [column for column in columns if column in dataset.column_names]
        dataset = dataset.select_columns(there).with_format(None) if there else []
    return any(row.get(column) is not None for row in dataset for column in columns)


def checked_tokens(
    dataset: Dataset, *, first_only: bool, encoder_decoder: bool, name: str
) -> Dataset:
    """Rows of token ids that somebody else made, with the column `length`."""
    dataset = dataset.with_format(None)
    lengths, sizes = [], set()
    for index, row in enumerate(dataset.select_columns(["prompt_ids", "response_ids"])):
        prompt, responses = row["prompt_ids"], row["response_ids"]
        if len(prompt) == 0 or len(responses) == 0:
            missing = "prompt_ids are" if len(prompt) == 0 else "response_ids are"
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
