"""What rows of a preference dataset hand to the chat template beside the messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from plad_fast.errors import UsageError

# Arguments of `apply_chat_template` that say what is done with the text.
_OURS = {
    *("conversation", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
}


def read_template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `apply_chat_template`, from a row's `tools` and `chat_template_kwargs`.

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
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise UsageError(f"tools is a {type(tools).__name__}; give a list of tools, or its JSON")
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(
            f"chat_template_kwargs is a {type(given).__name__}; it should map names to values, "
            'such as {"enable_thinking": false}'
        )
    options = _without_nulls(given or {})
    if wrong := sorted(_OURS & options.keys()):
        raise UsageError(
            f"chat_template_kwargs has {', '.join(wrong)}, which the tokenisation sets itself; "
            "leave it out"
        )
    if not isinstance(row.get("tools"), str):
        tools = _without_nulls(tools)
    return ({"tools": list(tools)} if tools else {}) | options


def _without_nulls(value: Any) -> Any:
    """Less the keys without a value: Arrow gives every row those that one of them has."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


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
