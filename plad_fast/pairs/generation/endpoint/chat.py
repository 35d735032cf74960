"""Requests to a chat endpoint, what they cost, and replies to them, which may be of any shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plad_fast.data.chat import Messages, is_blank, written_calls
from plad_fast.data.unicode import mend
from plad_fast.pairs.generation.endpoint.access import mask, one_line
from plad_fast.pairs.generation.endpoint.retries import BadReplyError
from plad_fast.pairs.generation.reasoning import (
    Finish,
    after_thought,
    is_all_thought,
    is_told,
    known_end,
)
from plad_fast.pairs.generation.sampling import Sampling

_MOST_TOKENS = 10**9  # of one reply; what says more counts nothing
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
_THOUGHT_PARTS = frozenset(
    {"thinking", "redacted_thinking", "reasoning", "reasoning_content", "thought", "summary"}
)


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to continue."""

    messages: Messages

    sampling: Sampling
    """`n` answers, of `max_new_tokens` at most: `Endpoint.reasoning_tokens` come on top. The first
    one has the seed, the one after it the next number; not all endpoints use seeds."""

    tools: Sequence[Mapping[str, Any]] = ()
    """What the model may call."""

    any_temperature: bool = False
    """Go on at the endpoint's own temperature where it refuses this one, and send no seed."""

    @property
    def guessed_tokens(self) -> int:
        """Of the prompt: four bytes make a token, about."""
        sent = [*self.messages, *self.tools]
        return -(-len(json.dumps(sent, ensure_ascii=False, default=str)) // 4)


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

    reasoning: str = ""
    """What the reply gives of it apart from the text."""

    tool_calls: Sequence[Mapping[str, Any]] = ()
    """Those that the text ends in, as `data.chat.written_calls` writes them."""


@dataclass(frozen=True)
class Reply:
    """What came of a request: at least one choice."""

    choices: list[Choice]

    missing: str = ""
    """Why there are fewer choices than `ChatRequest.n`, if there are."""

    own_temperature: bool = False
    """The endpoint refused the temperature, and answered at its own."""

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

    def add(self, prompt_tokens: int, answer_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.answer_tokens += answer_tokens

    @property
    def tokens(self) -> int:
        """Those of prompts and of answers."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def cost(self) -> float | None:
        """In the currency of the prices, if these are known."""
        if self.prices is None:
            return None
        return (self.prompt_tokens * self.prices[0] + self.answer_tokens * self.prices[1]) / 1e6

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        retries = f", {self.retries} of them again" if self.retries else ""
        lost = f", {self.lost} without a reply that could be read, at an estimate" * bool(self.lost)
        return f"{self.tokens:,} tokens in {self.requests:,} requests{retries}{lost}{cost}"


def parse_reply(content: bytes) -> dict[str, Any]:
    """The JSON object that a body holds; raises BadReplyError where it holds none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError, MemoryError):
        start = content[:1000].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
        if not start:
            raise BadReplyError("the reply is empty") from None
        if start.startswith("<"):
            raise _foreign(f"a web page: {start}") from None
        if start.startswith(("data:", "event:", "id:", "retry:", ":")):
            raise _foreign(f"a stream of events: {start}") from None
        raise BadReplyError(f"the reply is not valid JSON: {start}") from None
    if not isinstance(body, dict):
        raise BadReplyError(f"the reply is not valid: {_shown(body)}")
    return body


def _foreign(what: str) -> BadReplyError:
    advice = "check --base-url, which usually ends in /v1, and that it is of a chat API"
    return BadReplyError(f"the reply is {what}", "once", advice=advice)


def read_usage(body: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt and of the answers; 0 where the reply does not say."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))


def tells_ends(body: Mapping[str, Any]) -> bool:
    """Whether a reply says of any choice how it ended."""
    found = body.get("choices")
    return isinstance(found, list) and any(
        isinstance(choice, dict) and is_told(choice.get("finish_reason")) for choice in found
    )


def read_choices(
    body: Mapping[str, Any], key: str, *, n: int, told: bool, limit: int, tools: bool = False
) -> list[Choice]:
    """The answers in a reply, at most `n`; bad ones are left out, and BadReplyError if all are.

    Args:
        key: masked in texts: some servers play back what they were sent.
        told: the server is known to say how a reply ended: one that does not was interrupted.
        limit: tokens that an answer could have.
        tools: whether the model could call any.
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
    choices, bad = [], []
    for choice in found[:n]:
        try:
            choices.append(_read_choice(choice, n_tokens, key, told, limit, tools))
        except BadReplyError as error:
            bad.append(error)
    if not choices:
        raise bad[0]
    return choices


def _read_choice(
    choice: Any, n_tokens: int, key: str, told: bool, limit: int, tools: bool
) -> Choice:
    if not isinstance(choice, dict):
        raise BadReplyError(f"the reply holds an answer that is none: {_shown(choice)}")
    message, reason = choice.get("message"), choice.get("finish_reason")
    inner = message.get("error") if isinstance(message, dict) else None
    if error := choice.get("error") or inner:
        raise BadReplyError(f"the answer is an error: {_shown(error)}", code=_code(error))
    is_said = is_told(reason)
    end = known_end(reason) if is_said else None if told else "stop"
    if end is None:
        why = f"ended by {_shown(reason)}, which is no end of a whole one"
        none = "was interrupted: the reply says no finish_reason"
        raise BadReplyError(f"the answer {why if is_said else none}")

    def problem(kind: Finish, why: str) -> Choice:
        # What it is about may stand in the text, and may be the half of an answer.
        return Choice("", kind, n_tokens, one_line(why, key))

    withheld = "the endpoint's content filter withheld it"
    if end == "content_filter":
        return problem(end, f"{withheld} (finish_reason {reason!r})")
    if not isinstance(message, dict):
        raise BadReplyError("the reply holds an answer without a message")
    if refusal := message.get("refusal"):
        return problem("content_filter", f"{withheld} (refusal {_shown(refusal)})")
    calls = _calls(message.get("tool_calls"), key) if tools and end != "length" else []
    if (
        not calls
        and (end == "tool_calls" or message.get("tool_calls") or message.get("function_call"))
        and not (tools and end == "length")
    ):
        named = f"finish_reason {reason!r}" if end == "tool_calls" else "a tool call"
        return problem("tool_calls", f"the model called a tool, and none was offered ({named})")
    text, parts = _text(message.get("content"))
    text = "" if is_blank(mend(text)) else mask(mend(text).strip(), key)
    thoughts = {name: message[name] for name in _THOUGHTS if message.get(name)} | parts
    # Servers that give it under several names give it twice.
    said = next(filter(None, map(_thought_text, thoughts.values())), "")
    if calls:
        text = "\n".join(filter(None, (text, written_calls(calls))))
    why = ""
    if end == "length" and not after_thought(text):
        why = (
            f"all {limit:,} tokens were spent before any answer (reasoning?); raise "
            "--reasoning-tokens, or a teacher's --max-new-tokens"
        )
    elif end == "stop" and text:
        why = "the answer ends inside its thought" if is_all_thought(text) else ""
    elif end == "stop" and thoughts:
        why = f"the answer is empty: all that was said is in {next(iter(thoughts))}"
    return Choice(text, end, n_tokens, why, mask(mend(said).strip(), key), tuple(calls))


def _text(content: Any) -> tuple[str, dict[str, Any]]:
    """Text of a message, and the parts that are the model's thoughts by what they are called."""
    if content is None or isinstance(content, str):
        return content or "", {}
    texts: list[str] = []
    thoughts: dict[str, Any] = {}
    for part in content if isinstance(content, list) else [content]:
        kind, text = (part.get(k) if isinstance(part, dict) else None for k in ("type", "text"))
        if isinstance(kind, str) and kind in _THOUGHT_PARTS:
            thoughts.setdefault(f"content of type {kind!r}", []).append(part)
        elif isinstance(text, str) and (kind is None or kind in ("text", "output_text")):
            texts.append(text)
        else:
            raise BadReplyError(f"the answer is not text: {_shown(part)}", "once")
    return "".join(texts), thoughts


def _calls(value: Any, key: str) -> list[dict[str, Any]]:
    """Calls of functions as chat templates take them: without ids, which are drawn at random, and
    with arguments as an object."""
    calls = []
    for call in value if isinstance(value, list) else [value] * bool(value):
        try:
            function = call["function"]
            name, arguments = function["name"], function.get("arguments") or "{}"
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            arguments = mend(json.loads(mask(text, key)))
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
            raise BadReplyError(f"a call that cannot be read: {_shown(call)}", "once") from None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BadReplyError(f"a call that cannot be read: {_shown(call)}", "once")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _thought_text(value: Any) -> str:
    """Text of a thought: a text, a part that has one, or a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        named = (
            value.get(name) for name in ("text", "thinking", "reasoning", "summary", "thought")
        )
        return next((text for text in map(_thought_text, named) if text), "")
    return "".join(map(_thought_text, value)) if isinstance(value, list) else ""


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0
    return int(value) if 0 < value < _MOST_TOKENS else 0


def _shown(value: Any) -> str:
    """A value of a reply for a message, which is cut later."""
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        return value["message"]
    return ascii(value)[:1000] if not isinstance(value, str) else repr(value[:1000])


def _code(error: Any) -> int | str | None:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, (int, str)) else None
