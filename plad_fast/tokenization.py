"""Preference data as token ids: text to ids, rows of a dataset to ids."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from datasets import Dataset

from plad_fast._plain_rows import plain_rows
from plad_fast._row_sets import (
    checked_tokens,
    holds_any,
    longest,
    require_ids,
    require_one_size,
    require_rows,
)
from plad_fast._rows import (
    read_content,
    read_contents,
    read_reference_logps,
    read_row,
    read_scores,
    require_columns,
    score_columns,
)
from plad_fast.chat import Content, as_conversation, render_prompt, render_response
from plad_fast.errors import UsageError
from plad_fast.validation import is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from plad_fast._token_limits import TokenLimits

logger = logging.getLogger(__name__)

TRUNCATION_SIDES = ("left", "right")


class EncodedGroup(TypedDict):
    """One prompt and its K responses as token ids."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    truncated: bool
    """The prompt was cut."""
    fits: bool
    """False: a response is too long, or leaves the prompt no room for a token; drop the group."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Content, *, encoder_decoder: bool = False
) -> list[int]:
    """Token ids after which the model starts to answer.

    A chat template writes its special tokens itself. Plain text gets the ones the tokenizer puts
    in front (BOS), once, and never those it puts behind (EOS): the text goes on. For an encoder,
    which reads the prompt as a text of its own, plain text gets all of the tokenizer's.

    Raises:
        UsageError: the prompt has no tokens, so nothing could predict the first response token.
    """
    return _prompt_ids(tokenizer, prompt, None, _specials(tokenizer), encoder_decoder)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Content,
    template: Mapping[str, Any] | None,
    specials: _Specials,
    encoder_decoder: bool,
) -> list[int]:
    if encoder_decoder and isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = _ids(tokenizer, render_prompt(tokenizer, prompt, template))
        front = specials.front if isinstance(prompt, str) else []
        if ids[: len(front)] != front:
            ids = front + ids
    if not ids:
        raise UsageError(
            "a prompt is empty and the tokenizer has no BOS token, so nothing precedes the first "
            "response token; drop empty prompts"
        )
    return ids


def encode_group(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Content,
    responses: Sequence[Content],
    *,
    max_length: int,
    truncation_side: str = "left",
    encoder_decoder: bool = False,
    template: Mapping[str, Any] | None = None,
) -> EncodedGroup:
    """Tokenises one prompt and its responses apart, so that the border never moves.

    All responses see the same prompt. It is cut, if it must be, so that the longest response fits
    into `max_length` tokens behind it; a BOS token in front survives the cut. Responses are never
    cut: a text cut short is not what its author preferred.

    For an encoder-decoder model the prompt is the encoder's text and the responses are the
    decoder's: each has `max_length` tokens to itself, with the special tokens the tokenizer gives
    a source and a target, which survive a cut; an EOS token ends every response in any case.

    Args:
        tokenizer: of the student.
        prompt: plain text or chat messages.
        responses: K texts or lists of messages, best first; see `plad_fast.chat.as_conversation`.
        max_length: of prompt and response together; of an encoder-decoder model, of each.
        truncation_side: the side from which a long prompt loses tokens, "left" or "right".
        encoder_decoder: whether the student is such a model.
        template: what the chat template gets beside messages, such as `tools`.

    Raises:
        UsageError: a prompt or a response that is neither text nor messages, no responses, or a
            `max_length` or `truncation_side` that is none.
    """
    return _encode(
        tokenizer,
        prompt,
        responses,
        max_length=max_length,
        truncation_side=truncation_side,
        encoder_decoder=encoder_decoder,
        template=template,
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Content,
    responses: Sequence[Content],
    *,
    max_length: int,
    truncation_side: str,
    encoder_decoder: bool,
    template: Mapping[str, Any] | None = None,
    specials: _Specials | None = None,
) -> EncodedGroup:
    """`encode_group`, with the tokenizer's special tokens if they are known already."""
    check_cut(max_length, truncation_side)
    prompt, texts = as_conversation(
        read_content(prompt, "prompt"), read_contents(responses, "responses")
    )
    specials = specials or _specials(tokenizer)
    prompt_ids = _prompt_ids(tokenizer, prompt, template, specials, encoder_decoder)
    if encoder_decoder and isinstance(prompt, str):
        response_ids = [_target_ids(tokenizer, text) for text in texts]
    else:
        rendered = (render_response(tokenizer, prompt, text, template) for text in texts)
        response_ids = [_ids(tokenizer, text) for text in rendered]
    if encoder_decoder:
        if not isinstance(prompt, str):
            specials = _Specials([], 0)
        return _two_texts(prompt_ids, response_ids, specials, max_length, truncation_side)
    room = max_length - max(len(ids) for ids in response_ids)
    truncated = len(prompt_ids) > room
    # A group that does not fit is left whole: the caller reports and drops it.
    if truncated and room >= 1:
        prompt_ids = _cut(prompt_ids, room, truncation_side, tokenizer.bos_token_id)
    return EncodedGroup(
        prompt_ids=prompt_ids, response_ids=response_ids, truncated=truncated, fits=room >= 1
    )


def check_cut(max_length: int, truncation_side: str) -> None:
    """Raise a UsageError unless `max_length` is a whole number and `truncation_side` a side."""
    if not is_whole(max_length):
        raise UsageError(f"max_length must be a whole number of tokens, got {max_length!r}")
    if truncation_side not in TRUNCATION_SIDES:
        raise UsageError(f"truncation_side must be left or right, got {truncation_side!r}")


def _two_texts(
    prompt_ids: list[int],
    response_ids: list[list[int]],
    specials: _Specials,
    max_length: int,
    truncation_side: str,
) -> EncodedGroup:
    """The prompt for an encoder and its responses for a decoder."""
    front, back = len(specials.front), specials.back
    truncated = len(prompt_ids) > max_length
    fits = max(map(len, response_ids)) <= max_length and front + back < max_length
    if truncated and fits:
        end = len(prompt_ids) - back
        body = _cut(prompt_ids[front:end], max_length - front - back, truncation_side, None)
        prompt_ids = [*prompt_ids[:front], *body, *prompt_ids[end:]]
    return EncodedGroup(
        prompt_ids=prompt_ids, response_ids=response_ids, truncated=truncated, fits=fits
    )


def _target_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    # The tokenizer adds an EOS of its own.
    ids = tokenizer(text_target=response.removesuffix(tokenizer.eos_token or ""))["input_ids"]
    end = tokenizer.eos_token_id
    # Behind it may stand a mark of the language, as mBART's tokenizer writes.
    marked = ids[-2:-1] == [end] and ids[-1] in tokenizer.all_special_ids
    return ids if end is None or ids[-1:] == [end] or marked else [*ids, end]


def tokenize_dataset(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation_side: str = "left",
    first_only: bool = False,
    with_scores: bool | None = False,
    with_reference: bool = True,
    encoder_decoder: bool = False,
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

    Args:
        dataset: rows as above, as a `datasets.Dataset` of any format, a DataFrame or a list; values
            of numpy, torch, pandas and Arrow count as the plain ones they stand for, and NaN in
            place of a text as none. One that holds `prompt_ids` and `response_ids` is taken as it
            is, long rows too.
        tokenizer, max_length, truncation_side, encoder_decoder: see `encode_group`.
        first_only: keep the best response only, as fine-tuning on the teacher's answers does.
        with_scores: read the scores, which must then be there; None reads them if a row has some.
        with_reference: keep `reference_logps`, one per response, where a row has some. They are of
            whole prompts: a row whose prompt would be cut is refused.
        limits: `plad_fast.adapted_layers.token_limits` of the model, which refuse the token ids
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
    dataset = plain_rows(dataset, name)
    columns = require_rows(dataset, name)
    if {"prompt_ids", "response_ids"} <= set(columns):
        tokenized = dataset if isinstance(dataset, Dataset) else Dataset.from_list(dataset)
        return checked_tokens(
            tokenized,
            first_only=first_only,
            encoder_decoder=encoder_decoder,
            limits=limits,
            name=name,
        )
    require_columns(columns, with_scores=bool(with_scores), name=name)
    if with_scores is None:
        with_scores = holds_any(dataset, score_columns(columns))
    specials = _specials(tokenizer)
    with_reference = with_reference and holds_any(dataset, ["reference_logps"])

    def encode(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            prompt, responses, template = read_row(row)
            numbers: dict[str, list[float]] = {}
            if with_reference:
                numbers["reference_logps"] = read_reference_logps(row, len(responses))
            responses = responses[: 1 if first_only else None]
            if with_scores:
                numbers["scores"] = read_scores(row, len(responses))
            group = _encode(
                tokenizer,
                prompt,
                responses,
                max_length=max_length,
                truncation_side=truncation_side,
                encoder_decoder=encoder_decoder,
                template=template,
                specials=specials,
            )
            if with_reference and group["truncated"] and group["fits"]:
                raise UsageError(
                    f"reference_logps are of the whole prompt, which max_length={max_length} cuts; "
                    "raise max_length, or leave the column out to have them computed"
                )
            if limits is not None:
                require_ids(group["prompt_ids"], group["response_ids"], limits)
        except UsageError as error:
            raise UsageError(f"{name}, row {index + 1}: {error}") from None
        length = longest(group["prompt_ids"], group["response_ids"], encoder_decoder)
        kept = {key: values[: len(responses)] for key, values in numbers.items()}
        return {**group, "length": length, **kept}

    if isinstance(dataset, Dataset):
        encoded = dataset.map(
            encode, with_indices=True, remove_columns=columns, desc=f"Tokenising {name}"
        )
    else:  # Arrow gets the ids only: rows may hold prompts of both forms
        encoded = Dataset.from_list([encode(row, index) for index, row in enumerate(dataset)])
    require_one_size({len(ids) for ids in encoded["response_ids"]}, name)
    fitting = [index for index, fits in enumerate(encoded["fits"]) if fits]
    _report(name, encoded["truncated"], kept=fitting, max_length=max_length)
    return encoded.select(fitting).remove_columns(["truncated", "fits"])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class _Specials(NamedTuple):
    """The special tokens a tokenizer puts in front of a text, and how many behind it."""

    front: list[int]
    back: int


def _specials(tokenizer: PreTrainedTokenizerBase) -> _Specials:
    plain = _ids(tokenizer, "a")
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(plain) + 1)
    front = next((i for i in starts if full[i : i + len(plain)] == plain), 0)
    return _Specials(full[:front], len(full) - front - len(plain))


def _cut(ids: list[int], length: int, side: str, bos: int | None) -> list[int]:
    assert side in TRUNCATION_SIDES, side
    if side == "right":
        return ids[:length]
    if ids[0] == bos and length > 1:
        return [bos, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


def _report(name: str, truncated: list[bool], *, kept: list[int], max_length: int) -> None:
    dropped = len(truncated) - len(kept)
    if not kept:
        raise UsageError(
            f"no row of {name} has responses that fit into max_length={max_length} tokens with a "
            "prompt; raise max_length"
        )
    cut = sum(truncated[index] for index in kept)
    if cut or dropped:
        logger.warning(
            "%s: %d of %d prompts were cut and %d rows dropped (a response alone is too long) to "
            "fit max_length=%d",
            name,
            cut,
            len(truncated),
            dropped,
            max_length,
        )
