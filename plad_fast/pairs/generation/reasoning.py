"""Finish reasons and thoughts of answers, as models and servers write them.

Only known finish reasons count: after an unknown one the text may not be whole. Stores keep answers
as they came. An endpoint may give the reasoning apart; any other model writes it in front of its
answer, in its own marks. It is left out, stays in the text, or stands beside it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from plad_fast.data.chat import is_blank
from plad_fast.pairs.generation.text_model import Answer

REASONING = ("drop", "keep", "column")
"""The answer alone; reasoning and answer as one text; the answer, with the reasoning beside it."""

Finish = Literal["stop", "length", "content_filter", "tool_calls"]

# OpenAI's own word first; then those of Anthropic, TGI, Together, Gemini, Cohere, Bedrock, Qianfan,
# watsonx, AI21, Aleph Alpha, llama.cpp and others, all as `_plain` makes them.
_WORDS: dict[Finish, str] = {
    "stop": "stop end_turn end_of_turn stop_sequence stop_word stop_words stop_token eos eos_token "
    "eos_found stop_string_found endoftext end_of_text eot complete completed finish normal word",
    "length": "length max_tokens max_token model_length max_output_tokens max_completion_tokens "
    "max_new_tokens maximum_tokens max_length max_output_reached max_tokens_reached "
    "max_predicted_tokens_reached token_limit error_limit limit output_limit length_limit "
    "model_context_window_exceeded context_window_exceeded context_length context_length_exceeded "
    "context_length_reached",
    "content_filter": "content_filter content_filtered content_policy_violation safety sensitive "
    "recitation blocklist prohibited_content spii language image_safety refusal "
    "guardrail_intervened error_toxic moderation moderated blocked flagged model_armor",
    "tool_calls": "tool_calls tool_call tool_use function_call function_calls "
    "malformed_function_call malformed_tool_call malformed_tool_use unexpected_tool_call "
    "too_many_tool_calls",
}
_ENDS = {word: end for end, words in _WORDS.items() for word in words.split()}
_NOTHING = frozenset({"", "null", "none"})

_NAME = r"(?:[\w-]+:)?(?:think|thinking|thoughts?|reasoning)"
# Tags of DeepSeek, Qwen and their like, then Mistral, Kimi, OpenThinker, Cohere, Gemma and gpt-oss,
# whose marks may have lost their special tokens. Only what begins a line opens a thought: a tag in
# the middle of a sentence is spoken of.
_OPEN = re.compile(
    rf"^[ \t]*(?:<{_NAME}(?:\s[^<>]*)?>|\[think\]|◁think▷"
    r"|<\|(?:begin_of_)?(?:thought|thinking|think)\|>|<\|start_thinking\|>"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought)|<unused94>\s*thought"
    r"|(?-i:\Aanalysis(?=[A-Z])))",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSE = re.compile(
    rf"(?<!`)(?:</{_NAME}\s*>|\[/think\]|◁/think▷"
    r"|<\|/(?:thought|thinking|think)\|>|<\|end_of_(?:thought|thinking|think)\|>"
    r"|<\|end_thinking\|>|<\|channel\|>\s*final(?:\s*<\|message\|>)?|<channel\|>|<unused95>"
    r"|(?-i:assistantfinal))",
    re.IGNORECASE,
)
# Where the prompt opened the thought, its end alone is written, on a line's edge.
_CLOSE_ALONE = re.compile(
    rf"^[ \t]*{_CLOSE.pattern}|{_CLOSE.pattern}[ \t]*$", re.IGNORECASE | re.MULTILINE
)
_INSIDE = re.compile(r"<\|(?:message|end|start)\|>(?:assistant)?")  # of gpt-oss's thoughts


def is_told(reason: Any) -> bool:
    """Whether a reply gives a finish reason, be it an unknown one."""
    return not (reason is None or (isinstance(reason, str) and _plain(reason) in _NOTHING))


def known_end(reason: Any) -> Finish | None:
    """The finish reason that a server's word stands for; None for an unknown one."""
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


def holds_thought(text: str) -> bool:
    """Whether a thought, or part of one, stands in the text."""
    return _OPEN.search(text) is not None or _CLOSE.search(text) is not None


def after_thought(text: str) -> str:
    """The answer proper; empty where the text ends inside its thought, or with it."""
    rest = text[_closed(text) :]
    return "" if _OPEN.search(rest) else rest.strip()


def is_all_thought(text: str) -> bool:
    """Whether the text ends inside its thought, or is nothing but a thought."""
    if after_thought(text):
        return False
    opened = _OPEN.search(text)
    before = text[: opened.start()] if opened else ""
    if not before.strip() or _CLOSE.search(before):
        return True
    # An answer stands before it, which may be asked to end in its reasons; they are closed then.
    return _OPEN.search(text, _closed(text)) is not None


def split_thought(text: str) -> tuple[str, str]:
    """The thought before an answer, without its marks, and the answer; see `is_all_thought` for a
    text without one. What stands in the middle of an answer stays there."""
    thoughts, rest = [], text.strip()
    while (opened := _OPEN.match(rest)) and (closed := _CLOSE.search(rest, opened.end())):
        thoughts.append(rest[opened.end() : closed.start()])
        rest = rest[closed.end() :].strip()
    if not thoughts and (closed := _CLOSE_ALONE.search(rest)):
        before = rest[: closed.start()]
        if _OPEN.search(before) is None:
            thoughts, rest = [before], rest[closed.end() :].strip()
    return "\n\n".join(_INSIDE.sub("", thought).strip() for thought in thoughts), rest


def _closed(text: str) -> int:
    """The place behind the last thought that is closed."""
    *_, closed = [0, *(mark.end() for mark in _CLOSE.finditer(text))]
    return closed


def with_reasoning(answer: Answer, reasoning: str) -> Answer:
    """An answer, as it is stored, with its reasoning as `REASONING` has it.

    One that ends inside its reasoning counts as cut off, and its text stays as it is. Under "keep"
    a reasoning that was given apart gets the marks `<think>` and `</think>`.
    """
    text, thought = answer.text, answer.reasoning
    if not is_blank(text) and is_all_thought(text):
        return replace(answer, finish_reason="length")
    if reasoning == "keep":
        if thought:
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        return replace(answer, text=text, reasoning="")
    written, text = split_thought(text)
    parts = [part for part in (thought, written) if part]
    return replace(answer, text=text, reasoning="\n\n".join(parts) if reasoning == "column" else "")


def spoken(text: str, reasoning: str) -> str:
    """A text as it is compared with answers of `with_reasoning`."""
    return with_reasoning(Answer("", text, "stop", 0), reasoning).text
