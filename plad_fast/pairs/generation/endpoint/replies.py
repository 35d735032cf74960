"""What is read from a chat completion, and what it cost.

Any server's reply, of any shape, comes here: a JSON value that nobody has validated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plad_fast.data.chat import is_blank
from plad_fast.data.unicode import mend
from plad_fast.pairs.generation.endpoint.retries import BadReplyError
from plad_fast.pairs.generation.endpoint.secrets import mask, one_line
from plad_fast.pairs.generation.finish import Finish, is_told, known_end
from plad_fast.pairs.generation.thoughts import after_thought, is_all_thought

_MOST_TOKENS = 10**9  # of one reply; what says more counts nothing
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
_THOUGHT_PARTS = frozenset(
    {"thinking", "redacted_thinking", "reasoning", "reasoning_content", "thought", "summary"}
)


@dataclass(frozen=True)
class Choice:
    """One of the answers in a reply."""

    text: str
    """Without surrounding white space; empty where the model said nothing."""

    finish_reason: Finish

    n_tokens: int = 0
    """0 where the reply does not say."""

    problem: str = ""
    """Why this is no answer, though the reply is whole and another would be like it."""

    @property
    def is_spent(self) -> bool:
        """The length limit was reached before there was any text but of a thought."""
        return self.finish_reason == "length" and not after_thought(self.text)


@dataclass(frozen=True)
class Reply:
    """What came of a request: at least one choice."""

    choices: list[Choice]

    missing: str = ""
    """Why there are fewer choices than `ChatRequest.n`, if there are."""

    left_out: frozenset[str] = frozenset()
    """Of `ChatRequest.optional`, what the endpoint did not take."""

    prompt_tokens: int = field(default=0, compare=False)
    answer_tokens: int = field(default=0, compare=False)


@dataclass
class Usage:
    """What an endpoint was asked so far, and what it used up."""

    prices: tuple[float, float] | None = None
    """Of a million tokens of prompts, and of answers."""

    requests: int = 0
    replies: int = 0
    """Requests that brought an answer."""
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    uncounted: int = 0
    """Answers of which no number of tokens is known."""
    lost: int = 0
    """Requests that may have been paid for, and whose reply came too late or could not be read.
    What they cost is estimated, and is in the numbers of tokens above."""

    @property
    def tokens(self) -> int:
        """Those of prompts and of answers."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def cost(self) -> float | None:
        """In the currency of the prices, if these are known."""
        return cost_of(self.prompt_tokens, self.answer_tokens, self.prices)

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        retries = f", {self.retries} of them again" if self.retries else ""
        lost = f", {self.lost} without a reply that could be read, at an estimate" * bool(self.lost)
        return f"{self.tokens:,} tokens in {self.requests:,} requests{retries}{lost}{cost}"


def cost_of(
    prompt_tokens: int, answer_tokens: int, prices: tuple[float, float] | None
) -> float | None:
    """By the prices of a million tokens; None where they are not known."""
    if prices is None:
        return None
    return (prompt_tokens * prices[0] + answer_tokens * prices[1]) / 1e6


def parse_reply(content: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
        BadReplyError: it holds none.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError, MemoryError):
        start = content[:1000].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
        if not start:
            raise BadReplyError("the reply is empty") from None
        if start.startswith("<"):
            raise BadReplyError(f"the reply is a web page: {start}", foreign=True) from None
        if start.startswith(("data:", "event:", "id:", "retry:", ":")):
            raise BadReplyError(f"the reply is a stream of events: {start}", foreign=True) from None
        raise BadReplyError(f"the reply is not valid JSON: {start}") from None
    if not isinstance(body, dict):
        raise BadReplyError(f"the reply is not valid: {_shown(body)}")
    return body


def read_usage(body: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt and of the answers; 0 where the reply does not say."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))


def tells_ends(body: Mapping[str, Any]) -> bool:
    """Whether a reply says of any choice how it ended."""
    choices = body.get("choices")
    found = choices if isinstance(choices, list) else ()
    return any(isinstance(c, dict) and is_told(c.get("finish_reason")) for c in found)


def read_choices(body: Mapping[str, Any], key: str, *, n: int, told: bool) -> list[Choice]:
    """The answers in a reply, at least one and at most `n`; those that are bad are left out.

    Args:
        body: of the reply.
        key: masked in texts: some servers play back what they were sent.
        n: answers that were asked for.
        told: the server is known to say how a reply ended: one that does not was interrupted.

    Raises:
        BadReplyError: there are none.
    """
    if error := body.get("error"):
        raise BadReplyError(f"the reply is an error: {_shown(error)}", code=_code(error))
    found = body.get("choices")
    if not isinstance(found, list):
        raise BadReplyError(f"the reply is not valid: {_shown(body)}")
    if not found:
        raise BadReplyError("the reply holds no answer")
    # With several answers, the reply counts the tokens of all of them together.
    n_tokens = read_usage(body)[1] if len(found) == 1 else 0
    choices = []
    first: BadReplyError | None = None
    for choice in found[:n]:
        try:
            choices.append(_read_choice(choice, n_tokens, key, told))
        except BadReplyError as error:
            first = first or error
    if not choices and first is not None:
        raise first
    return choices


def _read_choice(choice: Any, n_tokens: int, key: str, told: bool) -> Choice:
    if not isinstance(choice, dict):
        raise BadReplyError(f"the reply holds an answer that is none: {_shown(choice)}")
    message, reason = choice.get("message"), choice.get("finish_reason")
    inner = message.get("error") if isinstance(message, dict) else None
    if error := choice.get("error") or inner:
        raise BadReplyError(f"the answer is an error: {_shown(error)}", code=_code(error))
    end = known_end(reason) if is_told(reason) else None if told else "stop"
    if end is None and is_told(reason):
        raise BadReplyError(
            f"the answer ended by {_shown(reason)}, which is no end of a whole answer "
            "(finish_reason)"
        )
    if end is None:
        raise BadReplyError("the answer was interrupted: the reply says no finish_reason")
    if end == "content_filter":
        # What it is about may stand in the text, and may be the half of an answer.
        problem = f"the endpoint's content filter withheld it (finish_reason {reason!r})"
        return Choice("", end, n_tokens, one_line(problem, key))
    if not isinstance(message, dict):
        raise BadReplyError("the reply holds an answer without a message")
    if refusal := message.get("refusal"):
        problem = f"the endpoint's content filter withheld it (refusal {_shown(refusal)})"
        return Choice("", "content_filter", n_tokens, one_line(problem, key))
    if end == "tool_calls" or message.get("tool_calls") or message.get("function_call"):
        named = f"finish_reason {reason!r}" if end == "tool_calls" else "a tool call"
        problem = f"the model called a tool, and none was offered ({named})"
        return Choice("", "tool_calls", n_tokens, problem)
    text, parts = _text(message.get("content"))
    text = mask(mend(text).strip(), key)
    problem = ""
    if is_blank(text):
        text = ""
        thoughts = [name for name in _THOUGHTS if message.get(name)] + parts
        if thoughts:
            problem = f"the answer is empty: all that was said is in {thoughts[0]}"
    elif is_all_thought(text):
        problem = "the answer ends inside its thought"
    # A limit that was reached says more, and has a remedy.
    return Choice(text, end, n_tokens, problem if end == "stop" else "")


def _text(content: Any) -> tuple[str, list[str]]:
    """Text of a message and the names of parts that are left out: the model's thoughts."""
    if content is None or isinstance(content, str):
        return content or "", []
    texts, thoughts = [], []
    for part in content if isinstance(content, list) else [content]:
        kind, text = (part.get(k) if isinstance(part, dict) else None for k in ("type", "text"))
        if isinstance(kind, str) and kind in _THOUGHT_PARTS:
            thoughts.append(f"content of type {kind!r}")
        elif isinstance(text, str) and (kind is None or kind in ("text", "output_text")):
            texts.append(text)
        else:
            raise BadReplyError(
                f"the reply holds an answer that is not text: {_shown(part)}", lasting=True
            )
    return "".join(texts), thoughts


def spent_reason(limit: int, what: str, raise_flags: str) -> str:
    """Why a reply is empty that used up all its tokens."""
    return f"all {limit:,} tokens were spent before any {what} (reasoning?); raise {raise_flags}"


def _count(value: Any) -> int:
    if isinstance(value, float) and 0 < value < _MOST_TOKENS:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return value if 0 < value < _MOST_TOKENS else 0


def _shown(value: Any) -> str:
    """A value of a reply for a message, which is cut later."""
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        return value["message"]
    return ascii(value)[:1000] if not isinstance(value, str) else repr(value[:1000])


def _code(error: Any) -> int | str | None:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, (int, str)) else None
