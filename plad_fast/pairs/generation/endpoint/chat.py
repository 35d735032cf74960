"""Requests to a chat endpoint, the replies to them, and what they cost, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plad_fast.data.chat import Messages
from plad_fast.pairs.generation.reasoning import Finish
from plad_fast.pairs.generation.sampling import Sampling


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
