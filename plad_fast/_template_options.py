"""What rows of a preference dataset hand to the chat template beside the messages."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any

from plad_fast.errors import UsageError

# What `apply_chat_template` takes, or sets itself, and a template does not get from a row: its
# further parameters, of whatever version of transformers, are added to these.
_RESERVED = frozenset(
    {
        *("conversation", "conversations", "messages", "tokenizer", "self", "tools"),
        *("chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
        *("raise_exception", "strftime_now", "kwargs", "namespace"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
        "mask_token",
    }
)
_FOR_TEMPLATES = {"documents"}


def read_template_options(row: Mapping[str, Any], *, from_arrow: bool = False) -> dict[str, Any]:
    """Arguments of `apply_chat_template`, from a row's `tools` and `chat_template_kwargs`.

    Args:
        row: with or without these columns.
        from_arrow: leave out keys without a value, see `without_nulls`.

    Raises:
        UsageError: tools that are no list, nor the JSON text of one, or other arguments than a
            chat template's.
    """
    tools, given = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UsageError(f"tools is a text and no JSON ({error}); give a list") from None
    elif from_arrow:
        tools = without_nulls(tools)
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise UsageError(f"tools is a {type(tools).__name__}; give a list of tools, or its JSON")
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(
            f"chat_template_kwargs is a {type(given).__name__}; it should map names to values, "
            'such as {"enable_thinking": false}'
        )
    options = {key: value for key, value in (given or {}).items() if value is not None}
    if from_arrow:
        options = without_nulls(options)
    if options and (wrong := sorted(_reserved() & options.keys())):
        raise UsageError(
            f"chat_template_kwargs has {', '.join(wrong)}, which the tokenisation sets itself; "
            "leave it out" + ("; tools have a column of their own" if "tools" in wrong else "")
        )
    return ({"tools": list(tools)} if tools else {}) | options


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


@functools.cache
def _reserved() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return _RESERVED | (taken.keys() - _FOR_TEMPLATES)


def refuse_template_options(row: Mapping[str, Any], name: str) -> None:
    """Raise a UsageError for a row that has some, where its prompt is asked without them."""
    try:
        if not read_template_options(row):
            return
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    raise UsageError(
        f"{name} has tools or chat_template_kwargs, and models are asked the prompt alone; leave "
        "such rows out, or these columns"
    )
