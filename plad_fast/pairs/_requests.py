"""What is asked of a chat endpoint, and the body of the request that asks it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from plad_fast.chat import Messages


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


def request_body(
    request: ChatRequest,
    model: str,
    *,
    had: int,
    refused: Set[str],
    reasoning_tokens: int,
    newest: bool,
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
        "messages": request.messages,
        "temperature": request.temperature,
        limit: request.max_tokens + reasoning_tokens,
    }
    if request.top_p < 1:
        body["top_p"] = request.top_p
    if request.n - had > 1:
        body["n"] = request.n - had
    if request.seed is not None:
        # Servers that take no `n` are asked again, and must not say the same again.
        body["seed"] = request.seed + had
    left_out = set(refused)
    if request.temperature != 1 and "temperature" not in request.optional:
        left_out.discard("temperature")
    return {name: value for name, value in body.items() if name not in left_out}
