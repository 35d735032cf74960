"""Bodies of requests, less the parameters that an endpoint was seen to refuse."""

from __future__ import annotations

import logging
from typing import Any

from plad_fast.pairs.generation.endpoint.chat import ChatRequest
from plad_fast.pairs.generation.endpoint.retries import Trouble

logger = logging.getLogger(__name__)


class Dialect:
    """The parameters that an endpoint takes.

    Args:
        model: as the endpoint calls it.
        reasoning_tokens: added to the length limit of every request.
        limits: names of the length limit, the one to begin with first.
    """

    def __init__(self, model: str, reasoning_tokens: int, limits: tuple[str, str]) -> None:
        self.model = model
        self.reasoning_tokens = reasoning_tokens
        self.refused: set[str] = set()
        self._limits = limits

    def limit(self, request: ChatRequest) -> int:
        """Tokens that an answer may have, those of reasoning among them."""
        return request.sampling.max_new_tokens + self.reasoning_tokens

    def body(self, request: ChatRequest, had: int = 0) -> dict[str, Any]:
        """The request for what is left to be asked for, where `had` choices have come."""
        named = (name for name in self._limits if name not in self.refused)
        limit = next(named, self._limits[0])
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "temperature": sampling.temperature,
            limit: self.limit(request),
        }
        if request.tools:
            body["tools"] = list(request.tools)
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.n - had > 1:
            body["n"] = sampling.n - had
        if not request.any_temperature:
            # Servers that take no `n` are asked again, and must not say the same again.
            body["seed"] = sampling.seed + had
        left_out = self.refused - {limit}  # a request without a limit may cost anything
        if sampling.temperature != 1 and not request.any_temperature:
            left_out.discard("temperature")
        return {name: value for name, value in body.items() if name not in left_out}

    def adapt(self, trouble: Trouble, request: ChatRequest) -> None:
        """Does without the parameter that was refused from now on."""
        name, value = trouble.parameter, request.sampling.temperature
        if name in self.refused:
            return
        self.refused.add(name)
        if name == "temperature" and value != 1:
            what = f"model {self.model!r} takes no temperature of {value:g}: going on at its own"
            logger.warning("%s, so that replies are samples (%s)", what, trouble.reason)
        else:
            logger.info("%s takes no %s: going on without (%s)", self.model, name, trouble.reason)
