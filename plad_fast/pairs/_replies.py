"""What is read from a chat completion, and what it cost.

The `openai` client does not validate: any server's reply, of any shape, arrives as an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from plad_fast.pairs._retries import BadReplyError
from plad_fast.pairs._secrets import mask

_CUT_OFF = frozenset({"length", "max_tokens", "model_length"})


@dataclass(frozen=True)
class Choice:
    """One of the answers in a reply."""

    text: str
    """Without surrounding white space; empty where the model said nothing."""

    finish_reason: Literal["stop", "length", "content_filter"]

    n_tokens: int = 0
    """0 where the reply does not say."""

    @property
    def is_spent(self) -> bool:
        """The length limit was reached before there was any text."""
        return not self.text and self.finish_reason == "length"


@dataclass(frozen=True)
class Reply:
    """What came of a request: at least one choice."""

    choices: list[Choice]

    missing: str = ""
    """Why there are fewer choices than `ChatRequest.n`, if there are."""

    left_out: frozenset[str] = frozenset()
    """Of `ChatRequest.optional`, what the endpoint did not take."""


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
        return f"{self.tokens:,} tokens in {self.requests:,} requests{retries}{cost}"


def read_choices(completion: Any, key: str) -> list[Choice]:
    """The answers in a reply, at least one.

    Args:
        completion: whatever the client made of the reply.
        key: masked in texts: some servers play back what they were sent.

    Raises:
        BadReplyError: there are none.
    """
    found = getattr(completion, "choices", None)
    if not isinstance(found, list):
        error = getattr(completion, "error", None)
        raise BadReplyError(
            f"the reply is an error: {error}" if error else "the reply is not valid"
        )
    if not found:
        raise BadReplyError("the reply holds no answer")
    # With several answers, the reply counts the tokens of all of them together.
    n_tokens = read_usage(completion)[1] if len(found) == 1 else 0
    return [_read_choice(choice, n_tokens, key) for choice in found]


def _read_choice(choice: Any, n_tokens: int, key: str) -> Choice:
    message = getattr(choice, "message", None)
    if message is None:
        raise BadReplyError("the reply holds an answer without a message")
    text = getattr(message, "content", None)
    reason = getattr(choice, "finish_reason", None)
    if reason == "content_filter" or getattr(message, "refusal", None):
        return Choice("", "content_filter", n_tokens)
    if text is not None and not isinstance(text, str):
        raise BadReplyError("the reply holds an answer that is not text")
    text = mask((text or "").strip(), key)
    return Choice(text, "length" if reason in _CUT_OFF else "stop", n_tokens)


def spent_reason(limit: int, what: str, raise_flags: str) -> str:
    """Why a reply is empty that used up all its tokens."""
    return f"all {limit:,} tokens were spent before any {what} (reasoning?); raise {raise_flags}"


def read_usage(completion: Any) -> tuple[int, int]:
    """Tokens of the prompt and of the answers; 0 where the reply does not say."""
    usage = getattr(completion, "usage", None)
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    first, second = (n if isinstance(n, int) and n > 0 else 0 for n in counts)
    return first, second
