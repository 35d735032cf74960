"""Rows of a preference dataset as token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from plad_fast.data.plain_rows import made_by_arrow, plain_row, plain_rows, without_nulls
from plad_fast.data.row_sets import (
    checked_tokens,
    dataset_on_disk,
    holds_any,
    longest,
    require_ids,
    require_one_size,
    require_rows,
    token_dataset,
)
from plad_fast.data.rows import (
    TokenLimits,
    read_reference_logps,
    read_row,
    read_scores,
    require_columns,
    score_columns,
)
from plad_fast.data.streams import StreamedRows
from plad_fast.data.text_ids import TextIds, check_cut
from plad_fast.errors import UsageError, located

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def tokenize_dataset(
    dataset: Dataset | Sequence[Mapping[str, Any]] | StreamedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation_side: str = "left",
    first_only: bool = False,
    with_scores: bool | None = False,
    with_reference: bool = True,
    encoder_decoder: bool = False,
    split_special_tokens: bool = True,
    limits: TokenLimits | None = None,
    name: str = "dataset",
) -> Dataset:
    """Preference rows as token ids.

    Rows hold a `prompt` (text or chat messages) and one of

    * `chosen` and `rejected`: a text or a list of messages each, which may repeat those of the
      prompt; `rejected` may also be a list of those. Scores: `chosen_score` and
      `rejected_score` (a number, or one per rejected).
    * `responses`: a list, best first. Scores: `scores`, one per response.
    * `chosen` or `completion` alone: one response.

    Rows with `chosen` and `rejected` need no `prompt` if both begin with it: with the same
    messages, or with the same words. `tools` (a list, or its JSON text) and `chat_template_kwargs`
    go to the chat template, which plain text does not pass through.

    A message's content is text, a list of text parts, or null beside a tool call; its other keys go
    to the chat template too. Keys without a value are left out where Arrow made them, which gives
    all structs of a column the keys of each: in a `Dataset`, and in rows that were made of one.

    Args:
        dataset: rows as above, as a `datasets.Dataset` of any format, a DataFrame or a list; values
            of numpy, torch, pandas and Arrow count as the plain ones they stand for, and NaN in
            place of a text as none. One that holds `prompt_ids` and `response_ids` is taken as it
            is, long rows too. Of `StreamedRows` the token ids are written to their file, or are
            those that are there already.
        tokenizer, encoder_decoder, split_special_tokens: see `TextIds`.
        max_length, truncation_side: see `TextIds.encode`.
        first_only: keep the best response only, as fine-tuning on the teacher's answers does.
        with_scores: read the scores, which must then be there; None reads them if a row has some.
        with_reference: keep `reference_logps`, one per response, where a row has some. They are of
            whole prompts: a row whose prompt would be cut is refused.
        limits: `plad_fast.models.adapters.token_limits` of the model, which refuse the token ids
            that it does not know; None takes all.
        name: what to call the dataset in messages.

    Returns:
        A dataset with the columns `prompt_ids`, `response_ids` (K lists), `length` (tokens of the
        longest sequence; the prompt of an encoder is one of its own) and, if read, `scores` and
        `reference_logps` (K each).

    Raises:
        UsageError: no rows, missing columns, a row that is not as above, groups of different
            sizes, a token id beyond the limits, or every row dropped.
    """
    check_cut(max_length, truncation_side)
    if isinstance(dataset, StreamedRows):
        columns = dataset.columns
    else:
        dataset = plain_rows(dataset, name)
        columns = require_rows(dataset, name)
    if {"prompt_ids", "response_ids"} <= set(columns):
        if isinstance(dataset, StreamedRows):
            raise UsageError(f"{name} holds token ids, which are not streamed; give it as texts")
        return checked_tokens(
            token_dataset(dataset, name),
            first_only=first_only,
            encoder_decoder=encoder_decoder,
            limits=limits,
            name=name,
        )
    require_columns(columns, with_scores=bool(with_scores), name=name)
    if with_scores is None:
        with_scores = holds_any(dataset, [c for c in score_columns(columns) if c in columns])
    encoder = TextIds(
        tokenizer, encoder_decoder=encoder_decoder, split_special_tokens=split_special_tokens
    )
    with_reference = with_reference and "reference_logps" in columns
    with_reference = with_reference and holds_any(dataset, ["reference_logps"])

    def encode(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        with located(f"{name}, row {index + 1}"):
            prompt, responses, template = read_row(row)
            numbers: dict[str, list[float]] = {}
            if with_reference:
                numbers["reference_logps"] = read_reference_logps(row, len(responses))
            responses = responses[: 1 if first_only else None]
            if with_scores:
                numbers["scores"] = read_scores(row, len(responses))
            group = encoder.encode(
                prompt,
                responses,
                max_length=max_length,
                truncation_side=truncation_side,
                template=template,
            )
            if with_reference and group["truncated"] and group["fits"]:
                raise UsageError(
                    f"reference_logps are of the whole prompt, which max_length={max_length} cuts; "
                    "raise max_length, or leave the column out to have them computed"
                )
            if limits is not None:
                require_ids(group["prompt_ids"], group["response_ids"], limits)
        length = longest(group["prompt_ids"], group["response_ids"], encoder_decoder)
        kept = {key: values[: len(responses)] for key, values in numbers.items()}
        return {**group, "length": length, **kept}

    if isinstance(dataset, Dataset):
        encoded = dataset.map(
            lambda row, index: encode(without_nulls(row), index),
            with_indices=True,
            remove_columns=columns,
            desc=f"Tokenising {name}",
        )
    elif isinstance(dataset, StreamedRows):
        are_of_arrow = made_by_arrow(dataset)

        def groups() -> Iterator[dict[str, Any]]:
            for index, row in enumerate(map(plain_row, dataset)):
                group = encode(without_nulls(row) if are_of_arrow else row, index)
                sizes.add(len(group["response_ids"]))
                require_one_size(sizes, name)
                if group["fits"]:
                    yield group

        sizes: set[int] = set()
        encoded = dataset_on_disk(groups(), dataset.tokens)
    else:  # Arrow gets the ids only: rows may hold prompts of both forms
        encoded = Dataset.from_list([encode(row, index) for index, row in enumerate(dataset)])
    if not isinstance(dataset, StreamedRows):
        require_one_size({len(ids) for ids in encoded["response_ids"]}, name)
    fitting = [index for index, fits in enumerate(encoded["fits"]) if fits]
    if not fitting:
        raise UsageError(
            f"no row of {name} has responses that fit into max_length={max_length} tokens with a "
            "prompt; raise max_length"
        )
    fitted, count = encoded.select(fitting), len(dataset)
    cut, dropped = sum(fitted["truncated"]), count - len(fitting)
    if cut or dropped:
        logger.warning(
            f"{name}: {cut} of {count} prompts were cut and {dropped} rows dropped (a response "
            f"alone is too long) to fit max_length={max_length}"
        )
    report_texts(name, encoded["moved"], encoded["split"])
    return fitted.remove_columns(["truncated", "fits", "moved", "split"])


def report_texts(name: str, moved: Sequence[str], split: Sequence[str]) -> None:
    """Warn of groups, by their `EncodedGroup` fields, whose tokens are not what one might think."""
    if ends := [text for text in moved if text]:
        logger.warning(
            f"{name}: in {len(ends)} of {len(moved)} rows the prompt's last tokens are others once "
            f"a response follows, such as {max(ends, key=ends.count)!r}; there the responses begin "
            "where prompt and whole text part, and include what stands in its place"
        )
    if tokens := [token for token in split if token]:
        logger.warning(
            f"{name}: {len(tokens)} of {len(split)} rows hold special tokens in their messages, "
            f"such as {max(tokens, key=tokens.count)!r}; they are encoded as text. Set "
            "split_special_tokens=False to make tokens of them"
        )
