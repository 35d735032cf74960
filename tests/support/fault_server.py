"""An OpenAI-compatible chat endpoint on loopback that fails as real ones do, as it is told."""

from __future__ import annotations

import email.utils
import functools
import json
import random
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support import loopback
from tests.support.loopback import LoopbackServer, completion, said

FAULTS = ("busy", "busy until", "broken", "malformed", "no choice", "cut", "cut short", "hang")


@dataclass(frozen=True)
class Step:
    """How to treat one request."""

    what: str = "answer"
    """`answer`, `status`, or one of FAULTS."""

    status: int = 500
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    choices: list[dict[str, Any]] | None = None
    delay: float = 0.0


def answer_to(question: str) -> str:
    return f"answer to {question}"


def schedule(seed: int, *, share: float = 0.4, most: int = 3, never: frozenset[str] = frozenset()):
    """Faults by chance, but for each question and try always the same; at most so many in a row.

    Questions in `never` get status 500 each time.
    """

    def step(question: str, tries: int, body: Mapping[str, Any]) -> Step:
        if question in never:
            return Step("status", 500, {"error": {"message": "this one never works"}})
        chance = random.Random(f"{seed}:{question}:{tries}")
        if tries >= most or chance.random() > share:
            return Step(delay=chance.random() * 0.01)
        return Step(chance.choice(FAULTS))

    return step


def reasoning(tokens: int, say: Callable[[str], str] = answer_to):
    """Behaves as OpenAI's reasoning models do, and spends so many tokens before each answer."""

    def step(question: str, tries: int, body: Mapping[str, Any]) -> Step:
        if "max_tokens" in body:
            return _unsupported(
                "max_tokens",
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
            )
        if body.get("temperature", 1) != 1:
            return _unsupported(
                "temperature",
                f"Unsupported value: 'temperature' does not support {body['temperature']:g} with "
                "this model. Only the default (1) value is supported.",
            )
        spent = body["max_completion_tokens"] <= tokens
        choice = said("", "length") if spent else said(say(question))
        return Step(choices=[choice] * body.get("n", 1))

    return step


def _unsupported(parameter: str, message: str) -> Step:
    error = {
        "message": message,
        "type": "invalid_request_error",
        "param": parameter,
        "code": "unsupported_value",
    }
    return Step("status", 400, {"error": error})


class FaultServer(LoopbackServer):
    """Listens while the `with` block lasts.

    Args:
        step: from the question, how often it was asked before, and the request's body.
    """

    def __init__(self, step: Callable[[str, int, Mapping[str, Any]], Step] | None = None) -> None:
        self.step = step or (lambda question, tries, body: Step())
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        body = json.loads(content)
        question = body["messages"][-1]["content"]
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            step = self.step(question, self.asked[question], body)
            self.asked[question] += 1
            self.faults[step.what] += 1
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.keys.add(handler.headers["authorization"].removeprefix("Bearer "))
        time.sleep(step.delay)
        # Before the reply: the client may send its next request before this thread runs again.
        # Nor is a request counted that hangs, for it is the client who ends it.
        with self._lock:
            self._at_once -= 1
            self.answered[question] += step.what == "answer"
        self._respond(handler, step, question)

    def _respond(self, handler: BaseHTTPRequestHandler, step: Step, question: str) -> None:
        reply = completion([said(answer_to(question))] if step.choices is None else step.choices)
        send = functools.partial(loopback.send, handler, **step.headers)
        if step.what == "answer":
            send(200, step.body or reply)
        elif step.what == "status":
            send(step.status, step.body or {})
        elif step.what == "busy":
            send(429, {"error": {"message": "slow down"}}, **{"retry-after": "0.02"})
        elif step.what == "busy until":
            date = email.utils.formatdate(usegmt=True)
            send(429, {"error": {"message": "slow down"}}, **{"retry-after": date})
        elif step.what == "broken":
            send(500, b"<html>Bad gateway</html>")
        elif step.what == "malformed":
            send(200, json.dumps(reply).encode()[:-20])
        elif step.what == "no choice":
            send(200, {**reply, "choices": []})
        elif step.what == "cut":
            handler.close_connection = True  # without a byte of a reply
        elif step.what == "cut short":
            send(200, json.dumps(reply).encode()[:30], length="9999")
            handler.close_connection = True
        elif step.what == "hang":
            select.select([handler.connection], [], [], 30)  # until the client leaves
            handler.close_connection = True
