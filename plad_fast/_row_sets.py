"""A preference dataset as a whole: it has rows, groups of one size, and token ids to train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.compute
from datasets import Dataset

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from plad_fast._token_limits import TokenLimits

_AT_ONCE = 10_000  # rows


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
    if not len(ids) or (min(ids) >= 0 and max(ids) < limit):
        return
    wrong = next(token for token in ids if not 0 <= token < limit)
    advice = (
        "ids are those of tokens, not labels: leave out what is masked"
        if wrong < 0
        else "take the model's own tokenizer, or call model.resize_token_embeddings first"
    )
    raise UsageError(
        f"the {part} has the token id {wrong}, and the model knows the ids 0 to {limit - 1}; "
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
        low, high = _bounds(table[column])
        if low < 0 or high >= limit:
            for number, row in enumerate(table[column], start=first):
                ids = row.as_py() or []
                flat = [token for one in ids for token in one] if _holds_lists(ids) else ids
                try:
                    _require_below(limit, part, flat)
                except UsageError as error:
                    raise UsageError(f"{name}, row {number}: {error}") from None
        first += len(table)


def _holds_lists(ids: Sequence[Any]) -> bool:
    return bool(ids) and isinstance(ids[0], list)


def _bounds(column: Any) -> tuple[int, int]:
    """The smallest and the largest number in a column of lists, or of lists of them."""
    while pyarrow.types.is_nested(column.type):
        column = pyarrow.compute.list_flatten(column)
    found = pyarrow.compute.min_max(column).as_py()
    return (0, 0) if found["min"] is None else (found["min"], found["max"])


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
