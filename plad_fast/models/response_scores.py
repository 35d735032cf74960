"""Log-probabilities of given responses under a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from plad_fast.data.chat import Content
from plad_fast.data.packing import PreferenceCollator, to_device
from plad_fast.data.plain_rows import plain_rows, without_nulls
from plad_fast.data.row_sets import longest, require_ids
from plad_fast.data.rows import TokenLimits, read_row
from plad_fast.data.text_ids import EncodedGroup, TextIds
from plad_fast.data.tokenization import report_texts
from plad_fast.errors import NotFiniteError, UsageError, located
from plad_fast.models.adapters import pad_token_id, token_limits, warn_of_length
from plad_fast.models.encoder_decoder import decoder_start_token
from plad_fast.models.head import causal_lm_logprobs, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOLD: set[tuple[str, str]] = set()
"""Tokenizers of whose texts one was warned already."""


class _Row(NamedTuple):
    name: str
    """In messages: "pair 3", say."""
    prompt: Content
    responses: Sequence[Content]
    template: Mapping[str, Any]
    """What the chat template gets beside messages, such as `tools`."""


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, Any]],
    **options: Any,
) -> dict[str, NDArray[np.float64]]:
    """Log-probabilities of the chosen and the rejected response of every pair.

    Args:
        pairs: rows of the standard preference format (`prompt`, `chosen`, `rejected`; text or chat
            messages), in any of the forms that `tokenize_dataset` takes.
        model, tokenizer: as in `score_responses`.
        options: its `length_normalization`, `batch_size`, `max_length`, `progress` and `part`.

    Returns:
        {"chosen": (P,), "rejected": (P,)} in the order of `pairs`, float64, in nats.

    Raises:
        UsageError: a pair that is not as above, or as `score_responses`.
    """
    logps, _ = _score(model, tokenizer, _read_rows(pairs, responses=2), "pair", **options)
    chosen, rejected = np.stack(logps, axis=1)
    return {"chosen": chosen, "rejected": rejected}


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    **options: Any,
) -> list[NDArray[np.float64]]:
    """As `score_pairs` for rows whose `rejected` may be a list of several responses.

    Returns:
        For each row the log-probabilities of its responses, chosen first, in nats.
    """
    return _score(model, tokenizer, _read_rows(rows), "pair", **options)[0]


def check_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, Any]],
    *,
    max_length: int,
    encoder_decoder: bool = False,
) -> None:
    """Raises UsageError for pairs that `score_pairs` would refuse to a model with this tokenizer.

    Args:
        tokenizer, pairs, max_length: as `score_pairs` will get them.
        encoder_decoder: whether the model is one.
    """
    _encode(tokenizer, _read_rows(pairs, responses=2), "pair", max_length, encoder_decoder)


def _read_rows(pairs: Sequence[Mapping[str, Any]], *, responses: int | None = None) -> list[_Row]:
    """Rows of so many responses each, or of any number."""
    found = plain_rows(pairs, "pairs")
    rows = []
    for index, pair in enumerate(found if isinstance(found, list) else map(without_nulls, found)):
        name = f"pair {pair.get('id', f'number {index}')}"
        with located(name):
            row = _Row(name, *read_row(pair))
        if responses not in (None, count := len(row.responses)):
            raise UsageError(f"{name}: {count} responses; give one chosen and one rejected")
        rows.append(row)
    return rows


def score_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Content, Sequence[Content]]],
    *,
    length_normalization: float = 0.0,
    batch_size: int = 8,
    max_length: int = 1024,
    progress: bool = True,
    names: Sequence[str] | None = None,
    templates: Sequence[Mapping[str, Any]] | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[NDArray[np.float64]]:
    """Log-probabilities of all responses to every prompt, which is computed once where it can be.

    Args:
        model: a causal or an encoder-decoder language model; in eval mode meanwhile.
        tokenizer: the model's tokenizer.
        rows: a prompt and its responses each, as many as it has; text or chat messages.
        length_normalization: alpha; a log-probability is divided by its token count ** alpha.
        batch_size: rows in one forward pass; the numbers do not depend on it but for rounding.
        max_length: tokens of prompt and response, of an encoder-decoder model of each; a longer
            prompt loses its beginning.
        progress: show a progress bar.
        names: of the prompts in messages; by default their numbers.
        templates: what the chat template gets beside the messages of each, such as `tools`.
        part: of several processes that share the batches, the number of this one and how many there
            are; the rows of the others are NaN.

    Returns:
        For each row a float64 array with one log-probability a response, in nats.

    Raises:
        UsageError: no rows, one that is not as above, a response longer than `max_length`, or a
            log-probability that is not finite.
    """
    logps, _ = _score(
        model,
        tokenizer,
        _prompts(rows, names, templates),
        "prompt",
        length_normalization=length_normalization,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
        part=part,
    )
    return logps


def score_with_ends(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Content, Content]],
    *,
    templates: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities per token of one response to every prompt, and those of the last tokens.

    The last token of a response to chat messages is the one that ends it.

    Args:
        model, tokenizer, templates: as in `score_responses`.
        rows: a prompt and a response each.
        options: `max_length` and `part` of `score_responses`.

    Returns:
        ((P,), (P,)) float64, in nats.

    Raises:
        UsageError: as `score_responses`.
    """
    logps, ends = _score(
        model,
        tokenizer,
        _prompts([(prompt, [response]) for prompt, response in rows], None, templates),
        "prompt",
        length_normalization=1.0,
        progress=False,
        **options,
    )
    return np.concatenate(logps), np.concatenate(ends)


def _prompts(
    rows: Sequence[tuple[Content, Sequence[Content]]],
    names: Sequence[str] | None,
    templates: Sequence[Mapping[str, Any]] | None,
) -> list[_Row]:
    named = names or [f"number {index}" for index in range(len(rows))]
    given = zip(named, rows, templates or [{}] * len(rows), strict=True)
    return [_Row(f"prompt {name}", *row, template) for name, row, template in given]


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[_Row],
    unit: str,
    *,
    length_normalization: float = 0.0,
    batch_size: int = 8,
    max_length: int = 1024,
    progress: bool = True,
    part: tuple[int, int] = (0, 1),
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """For each row the log-probabilities of its responses, and those of their last tokens."""
    from plad_fast.models.sharing import prepare  # brings in transformers

    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; pass 1 or more")
    start = decoder_start_token(model)
    features = _encode(tokenizer, rows, unit, max_length, start is not None, token_limits(model))
    lengths = (longest(group["prompt_ids"], group["response_ids"], False) for group in features)
    warn_of_length(model, max(lengths), f"the {unit}s")
    pad, layout = pad_token_id(tokenizer, model), prepare(model)
    device = next(model.parameters()).device
    logps, ends = ([np.full(len(row.responses), np.nan) for row in rows] for _ in range(2))
    number, count = part
    own = [*_batches(features, batch_size)][number::count]
    with (
        evaluating(model),
        torch.inference_mode(),
        tqdm(
            total=sum(len(indices) for _, indices in own),
            desc="scoring",
            unit=unit,
            disable=not progress,
        ) as bar,
    ):
        for size, indices in own:
            collate = PreferenceCollator(
                pad, group_size=size, layout=layout, decoder_start_token_id=start
            )
            batch = to_device(collate([features[index] for index in indices]), device)
            result = causal_lm_logprobs(model, batch, length_normalization=length_normalization)
            last = result.token_logprobs[(batch["cu_seqlens"][1:] - 1).to(device)]
            for found, values in ((logps, result.sums), (ends, last)):
                by_row = values.double().cpu().numpy().reshape(-1, size)
                for index, of_row in zip(indices, by_row, strict=True):
                    found[index] = of_row
            bar.update(len(indices))
    scored = sorted(index for _, indices in own for index in indices)
    bad = [index for index in scored if not np.isfinite(logps[index]).all()]
    if bad:
        raise NotFiniteError(
            f"{len(bad)} of {len(rows)} {unit}s have a log-probability that is not finite, the "
            f"first is {rows[bad[0]].name}; the model has diverged or overflows "
            "in its dtype: train with a lower learning rate, or load it in float32"
        )
    return logps, ends


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[_Row],
    unit: str,
    max_length: int,
    encoder_decoder: bool,
    limits: TokenLimits | None = None,
) -> list[EncodedGroup]:
    """Rows as token ids that fit; with limits, ids and lengths that the model has weights for."""
    if not rows:
        raise UsageError(f"there are no {unit}s to score; pass at least one")
    encoder = TextIds(tokenizer, encoder_decoder=encoder_decoder)
    features = []
    for name, prompt, responses, template in rows:
        with located(name):
            group = encoder.encode(prompt, responses, max_length=max_length, template=template)
            if limits is not None:
                _require_room(group, limits, encoder_decoder)
        features.append(group)
    too_long = [row for row, group in zip(rows, features, strict=True) if not group["fits"]]
    if too_long:
        raise UsageError(
            f"{len(too_long)} of {len(rows)} {unit}s hold a response longer than "
            f"max_length={max_length} tokens, the first is {too_long[0].name}; "
            f"raise max_length, or leave those {unit}s out"
        )
    moved, split = ([group[key] for group in features] for key in ("moved", "split"))
    told = (unit, tokenizer.name_or_path)
    if told not in _TOLD and any([*moved, *split]):
        _TOLD.add(told)  # a scorer asks batch by batch
        report_texts(f"the {unit}s to score", moved, split)
    return features


def _require_room(group: EncodedGroup, limits: TokenLimits, encoder_decoder: bool) -> None:
    prompt, responses = group["prompt_ids"], group["response_ids"]
    require_ids(prompt, responses, limits)
    length = longest(prompt, responses, encoder_decoder)
    if group["fits"] and limits.positions is not None and length > limits.positions:
        raise UsageError(
            f"{length} tokens, and the model has {limits.positions} positions; set "
            f"max_length={limits.positions} or less"
        )


def _batches(features: Sequence[EncodedGroup], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Group size and row numbers; the largest first, so that a lack of memory shows at once.

    Rows of like length share a batch, which leaves little padding.
    """
    by_size: dict[int, list[int]] = {}
    lengths = [longest(row["prompt_ids"], row["response_ids"], False) for row in features]
    for index in sorted(range(len(features)), key=lambda index: -lengths[index]):
        by_size.setdefault(len(features[index]["response_ids"]), []).append(index)
    for size in sorted(by_size, reverse=True):
        indices = by_size[size]
        for start in range(0, len(indices), batch_size):
            yield size, indices[start : start + batch_size]
