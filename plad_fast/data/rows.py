"""Rows of a preference dataset: prompt, responses, scores, and what the chat template gets."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from plad_fast.checks import shown
from plad_fast.data.chat import Content, Message, is_blank
from plad_fast.data.chat_template import common_length
from plad_fast.data.plain_rows import plain_row
from plad_fast.data.unicode import require_unicode
from plad_fast.errors import UsageError, located

# What `apply_chat_template` sets itself for a template, or takes in some version of transformers;
# its further parameters are added to these.
_RESERVED = frozenset(
    {
        *("conversations", "messages", "tokenizer", "self", "processor_kwargs"),
        *("raise_exception", "strftime_now", "kwargs", "namespace"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
        "mask_token",
    }
)
_FOR_TEMPLATES = {"documents"}


def read_template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `apply_chat_template`, from a row's `tools` (a list, or its JSON text) and
    `chat_template_kwargs`; raises UsageError for arguments that are not a chat template's."""
    tools, given = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UsageError(f"tools is a text and no JSON ({error}); give a list") from None
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise UsageError(f"tools is a {type(tools).__name__}; give a list of tools, or its JSON")
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(
            f"chat_template_kwargs is a {type(given).__name__}; it should map names to values, "
            'such as {"enable_thinking": false}'
        )
    options = {key: value for key, value in (given or {}).items() if value is not None}
    if options and (wrong := sorted(_reserved() & options.keys())):
        raise UsageError(
            f"chat_template_kwargs has {', '.join(wrong)}, which the tokenisation sets itself; "
            "leave it out" + ("; tools have a column of their own" if "tools" in wrong else "")
        )
    return ({"tools": list(tools)} if tools else {}) | options


@functools.cache
def _reserved() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return _RESERVED | (taken.keys() - _FOR_TEMPLATES)


def read_tools(row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The tools of a row whose prompt is asked; raises UsageError for `chat_template_kwargs`, with
    which it is not."""
    with located(name):
        options = read_template_options(row)
    tools = options.pop("tools", [])
    if options:
        raise UsageError(
            f"{name} has chat_template_kwargs, and models are asked without them; leave such rows "
            "out, or this column"
        )
    return tools


_MOST_LISTED = 20  # columns in a message
_RESPONSE = 'text or a list of {"role", "content"} messages'


class PreferenceRow(NamedTuple):
    """A prompt and its K responses, best first."""

    prompt: Content
    responses: list[Content]
    template: Mapping[str, Any]
    """What the chat template gets beside messages."""


class TokenLimits(NamedTuple):
    """What token ids a model has weights for."""

    inputs: int
    """Ids of a prompt are below it: the embeddings."""
    outputs: int
    """Ids of a response are below it: the embeddings and the rows of the head."""
    positions: int | None
    """Tokens of a sequence, where the configuration names a number."""


def require_columns(columns: Collection[str], *, with_scores: bool, name: str) -> None:
    """Raises UsageError if no row of these columns can be read; see `tokenize_dataset`."""
    there = set(columns)
    found = f"{name} has the columns {_listed(sorted(map(str, there)))}"
    with_prompt = "prompt" in there and there & {"responses", "chosen", "completion"}
    if not with_prompt and not there >= {"chosen", "rejected"}:
        raise UsageError(
            f"{found}; it needs prompt with chosen and rejected, prompt with responses, prompt "
            "with chosen or completion alone, or chosen and rejected that both begin with the "
            "prompt"
        )
    if with_scores:
        wanted = score_columns(there)
        if not there.issuperset(wanted):
            raise UsageError(f"{found}; this loss needs scores in {' and '.join(wanted)}")


def require_pairs(
    rows: Iterable[Mapping[str, Any]], *, compares: bool, with_scores: bool, name: str
) -> int:
    """Raises UsageError for the first row of a file that cannot be read, lacks the scores that the
    loss needs or, where this compares responses, has one alone or another number than those before;
    `name` is the file's. Returns how many responses its last row has, 0 without rows."""
    size = 0
    for number, row in enumerate(map(plain_row, rows), start=1):
        try:
            _, responses, _ = read_row(row)
        except UsageError as error:
            lacks = "" if number > 1 or "prompt" in row else f"{_lacks('prompt', row, name)}; "
            place = f"row {number}" if lacks else f"{name}, row {number}"
            raise UsageError(f"{lacks}{place}: {error}") from None
        if compares and len(responses) == 1:
            lacks = f"{name}, row {number} has no rejected response"
            if number == 1 and not {"rejected", "responses"} & row.keys():
                lacks = _lacks("rejected", row, name)
            raise UsageError(
                f"{lacks}, and the loss compares responses; add it, or fine-tune on the chosen "
                "ones with loss='sft'"
            )
        if compares and size not in (0, len(responses)):
            raise UsageError(
                f"{name}, row {number} has {len(responses)} responses, and the rows before it have "
                f"{size}; keep that many of each, or train on them one after the other"
            )
        size = len(responses)
        if with_scores:
            with located(f"{name}, row {number}"):
                read_scores(row, size if compares else 1)
    return size


def _lacks(column: str, row: Mapping[str, Any], name: str) -> str:
    close = difflib.get_close_matches(column, map(str, row), n=1, cutoff=0.8)
    hint = f"; rename {close[0]}" if close else ""
    return f"{name} has no column {column} (it has {_listed([*map(str, row)])}{hint})"


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns[:_MOST_LISTED]) + ", …" * (len(columns) > _MOST_LISTED)


def score_columns(columns: Collection[str]) -> list[str]:
    """Where rows of these columns have their scores."""
    return ["scores"] if "responses" in columns else ["chosen_score", "rejected_score"]


def read_row(row: Mapping[str, Any]) -> PreferenceRow:
    """Prompt and responses of a row in any of the forms that `tokenize_dataset` lists, less Arrow's
    nulls (`data.plain_rows.without_nulls`).

    Raises UsageError for a value that is missing or of another type than it should be. The message
    does not say which row it is: the caller knows.
    """
    prompt, responses = _read_texts(row)
    # Plain text does not pass through a template: such columns may be anything then.
    is_text = isinstance(prompt, str) and all(isinstance(item, str) for item in responses)
    return PreferenceRow(prompt, responses, {} if is_text else read_template_options(row))


def _read_texts(row: Mapping[str, Any]) -> tuple[Content, list[Content]]:
    if row.get("prompt") is None and row.get("chosen") and row.get("rejected"):
        return _without_prompt(row["chosen"], row["rejected"])
    prompt = read_content(row.get("prompt"), "prompt")
    if row.get("responses") is not None:
        return prompt, read_contents(row["responses"], "responses")
    best = "completion" if row.get("chosen") is None and "completion" in row else "chosen"
    responses = [read_content(row.get(best), best)]
    rejected = row.get("rejected")
    if best == "completion" and rejected is None and row.get("label") is not None:
        raise UsageError(
            "unpaired rows (completion, label) are not read; pair them, or keep the good ones, "
            "without the column label, for loss='sft'"
        )
    if isinstance(rejected, (list, tuple)) and not _is_messages(rejected):
        responses += read_contents(rejected, "rejected")
    elif rejected is not None:
        responses.append(read_content(rejected, "rejected"))
    return prompt, responses


def read_scores(row: Mapping[str, Any], count: int) -> list[float]:
    """The scores of a row's first `count` responses; raises UsageError where one has none."""
    if row.get("responses") is not None:
        scores = row.get("scores")
    else:
        rejected = row.get("rejected_score")
        rejected = rejected if isinstance(rejected, (list, tuple)) else [rejected]
        scores = [row.get("chosen_score"), *rejected]
    numbers = _numbers(scores)
    if len(numbers) < count or any(map(math.isnan, numbers)):
        raise UsageError(f"the scores are {shown(scores)} for {count} responses; give one each")
    return numbers[:count]


def read_reference_logps(row: Mapping[str, Any], count: int) -> list[float]:
    """The log-probabilities of a row's `count` responses under a reference model, all finite."""
    logps = _numbers(row.get("reference_logps"))
    if len(logps) != count or not all(map(math.isfinite, logps)):
        raise UsageError(
            f"reference_logps are {shown(row.get('reference_logps'))} for {count} responses; give "
            "a finite number each, or leave the column out"
        )
    return logps


def _numbers(values: Any) -> list[float]:
    """A list of numbers, or an empty one if it is anything else."""
    if not isinstance(values, (list, tuple)):
        return []
    numbers = [v for v in values if isinstance(v, Real) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(values) else []  # type: ignore[return-value]


def _without_prompt(chosen: Any, rejected: Any) -> tuple[Content, list[Content]]:
    """What both responses begin with is the prompt: whole messages, or text up to white space."""
    first, second = read_content(chosen, "chosen"), read_content(rejected, "rejected")
    shared = common_length(first, second)
    if isinstance(first, str):
        # Inside of a word, the two sides would be other tokens than a model writes.
        shared = max((i for i in range(shared) if first[i].isspace()), default=0)
    else:  # the last message is an answer, also where both conversations are equal
        shared = min(shared, len(first) - 1, len(second) - 1)
    if not shared or (isinstance(first, str) and is_blank(first[:shared])):
        raise UsageError(
            "prompt is None, and chosen and rejected do not begin with the same one (the same "
            "messages, or the same words up to white space); add it"
        )
    return first[:shared], [first[shared:], second[shared:]]


def read_contents(value: Any, column: str) -> list[Content]:
    """Responses, at least one; see `read_content`."""
    if not isinstance(value, (list, tuple)) or not value:
        raise UsageError(
            f"{column} is {shown(value)}; it should be a list of responses, best first"
        )
    return [read_content(item, f"an entry of {column}") for item in value]


def read_content(value: Any, column: str) -> Content:
    """A text or chat messages, checked; raises UsageError with the name of the column for anything
    else, and for what no tokenizer takes."""
    if isinstance(value, str):
        require_unicode(value, column)
        return value
    if not isinstance(value, (list, tuple)) or not _is_messages(value):
        raise UsageError(f"{column} is {shown(value)}; it should be {_RESPONSE}")
    return [_read_message(message, column) for message in value]


def _read_message(message: Mapping[str, Any], column: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UsageError(f"{column} has a message whose role is {shown(role)}; it should be text")
    # Keys without a value are as good as none: servers send them, and Arrow makes them.
    others = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    if isinstance(content, (list, tuple)):
        content = "".join(_part_text(part, column) for part in content)
    # A message that calls a tool need not say anything.
    calls = role == "assistant" and content is None and any(others.values())
    if not isinstance(content, str) and not calls:
        raise UsageError(
            f"{column} has a message whose content is {shown(content)}; it should be text"
        )
    found = {"role": role, "content": content, **others}
    require_unicode(found, column)
    return found


def _part_text(part: Any, column: str) -> str:
    """Text of one of the parts of a message's content, as OpenAI's format has them."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
    if is_text and kind in ("text", "input_text", "output_text", None):
        return part["text"]
    what = f"of type {kind!r}" if kind is not None else f"that is {shown(part)}"
    raise UsageError(
        f"{column} has a message with a part {what}; only parts of type 'text' are read: leave the "
        "row out, or write what the part says as text"
    )


def _is_messages(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(item, Mapping) for item in value)
