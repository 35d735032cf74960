"""What is asked of a chat endpoint, and the body of the request that asks it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from plad_fast.data.chat import Messages


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
    left_out = set(refused) - {limit}  # a request without a limit may cost anything
    if request.temperature != 1 and "temperature" not in request.optional:
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
