"""How a model's reply ended, in the words of the servers that are about.

Only ends that are known count: of a word nobody knows it cannot be said whether the text before it
is whole.
"""

from __future__ import annotations

import re
from typing import Any, Literal

Finish = Literal["stop", "length", "content_filter", "tool_calls"]

# OpenAI's own word first; then those of Anthropic, TGI, Together, Gemini, Cohere, Bedrock, Qianfan,
# watsonx, AI21, Aleph Alpha, llama.cpp and others, all as `_plain` makes them.
_ENDS: dict[str, Finish] = {
    **dict.fromkeys(
        (
            *("stop", "end_turn", "end_of_turn", "stop_sequence", "stop_word", "stop_words"),
            *("stop_token", "eos", "eos_token", "eos_found", "stop_string_found", "endoftext"),
            *("end_of_text", "eot", "complete", "completed", "finish", "normal", "word"),
        ),
        "stop",
    ),
    **dict.fromkeys(
        (
            *("length", "max_tokens", "max_token", "model_length", "max_output_tokens"),
            *("max_completion_tokens", "max_new_tokens", "maximum_tokens", "max_length"),
            *("max_output_reached", "max_tokens_reached", "max_predicted_tokens_reached"),
            *("token_limit", "error_limit", "limit", "output_limit", "length_limit"),
            *("model_context_window_exceeded", "context_window_exceeded", "context_length"),
            *("context_length_exceeded", "context_length_reached"),
        ),
        "length",
    ),
    **dict.fromkeys(
        (
            *("content_filter", "content_filtered", "content_policy_violation", "safety"),
            *("sensitive", "recitation", "blocklist", "prohibited_content", "spii", "language"),
            *("image_safety", "refusal", "guardrail_intervened", "error_toxic", "moderation"),
            *("moderated", "blocked", "flagged", "model_armor"),
        ),
        "content_filter",
    ),
    **dict.fromkeys(
        (
            *("tool_calls", "tool_call", "tool_use", "function_call", "function_calls"),
            *("malformed_function_call", "malformed_tool_call", "malformed_tool_use"),
            *("unexpected_tool_call", "too_many_tool_calls"),
        ),
        "tool_calls",
    ),
}


_NOTHING = frozenset({"", "null", "none"})


def is_told(reason: Any) -> bool:
    """Whether a reply says how it ended, if only in a word that nobody knows."""
    return not (reason is None or (isinstance(reason, str) and _plain(reason) in _NOTHING))


def known_end(reason: Any) -> Finish | None:
    """The end that a word stands for; None for one that is not known, or is no word."""
    if not isinstance(reason, str):
        return None
    plain = _plain(reason)
    # Gemini's "content_filter: RECITATION".
    return "content_filter" if plain.startswith("content_filter") else _ENDS.get(plain)


def _plain(reason: str) -> str:
    """`FinishReason.MAX_TOKENS`, `maxTokens` and `max-tokens` are one word."""
    word = re.sub(r"^\w+\.(?=\w)", "", reason.strip())
    word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower()
    return re.sub(r"[\s-]+", "_", word).removeprefix("finish_reason_")
