"""Requests to a chat endpoint and the replies to them, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from plad_fast.data.chat import Messages
from plad_fast.pairs.generation.completions import Finish, after_thought


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to continue."""

    messages: Messages

    max_tokens: int
    """Longest answer; `Endpoint.reasoning_tokens` come on top."""

    n: int = 1
    """Answers to give."""

    temperature: float = 1.0

    top_p: float = 1.0

    seed: int | None = None
    """Of the first answer; the one after it has the next number. Not all endpoints use seeds."""

    optional: frozenset[str] = frozenset()
    """Parameters to do without where the endpoint refuses them, such as "temperature", which is
    else left out only where it is 1."""

    def body(
        self, model: str, *, had: int, refused: Set[str], reasoning_tokens: int, newest: bool
    ) -> dict[str, Any]:
        """The request for what is left to be asked for.

        Args:
            model: as the endpoint calls it.
            had: choices that have come.
            refused: parameters that the endpoint does not take.
            reasoning_tokens: see `Endpoint`.
            newest: take the newest name of the length limit first.
        """
        limits = ["max_tokens", "max_completion_tokens"]
        if newest:
            limits.reverse()
        limit = next((name for name in limits if name not in refused), limits[0])
        body: dict[str, Any] = {
            "model": model,
            "messages": self.messages,
            "temperature": self.temperature,
            limit: self.max_tokens + reasoning_tokens,
        }
        if self.top_p < 1:
            body["top_p"] = self.top_p
        if self.n - had > 1:
            body["n"] = self.n - had
        if self.seed is not None:
            # Servers that take no `n` are asked again, and must not say the same again.
            body["seed"] = self.seed + had
        left_out = set(refused) - {limit}  # a request without a limit may cost anything
        if self.temperature != 1 and "temperature" not in self.optional:
            left_out.discard("temperature")
        return {name: value for name, value in body.items() if name not in left_out}


def estimated_tokens(body: Mapping[str, Any]) -> tuple[int, int]:
    """What a request may have cost whose reply is not there to say so: of prompt and of answers.

    Four bytes make a token, about, and the answers are taken to be as long as they may be: it is
    the long ones that come too late.
    """
    size = len(json.dumps(body["messages"], ensure_ascii=False, default=str))
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or 0
    return -(-size // 4), limit * body.get("n", 1)


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


def spent_reason(limit: int, what: str, raise_flags: str) -> str:
    """Why a reply is empty that used up all its tokens."""
    return f"all {limit:,} tokens were spent before any {what} (reasoning?); raise {raise_flags}"
