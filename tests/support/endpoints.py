"""Models behind a `FaultServer`, and what they make of its replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from tests.support.fault_server import FaultServer, Step

KEY = "sk-planted-0123456789"
NOBODY = "http://127.0.0.1:1/v1"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "chat"}]
NOWHERE = Path("no-answers-yet.jsonl")
PAUSE = "plad_fast.pairs.generation.endpoint.retries.pause"


def endpoint(server: FaultServer, **options: Any) -> Endpoint:
    given = {"max_retries": 2, "timeout": 5, "concurrency": 1, **options}
    return Endpoint("m", base_url=server.url, **given)


def teacher(server: FaultServer, **options: Any) -> EndpointModel:
    return EndpointModel(endpoint(server, **options), "teacher")


def generate(
    model: EndpointModel, questions: Sequence[Any], sampling: Sampling | None = None
) -> list[Answer | Failure]:
    """Of questions that are texts, or chats, which have the id "chat"."""
    prompts = [Prompt(q if isinstance(q, str) else "chat", q) for q in questions]
    return [item for batch in model.generate(prompts, sampling or Sampling()) for item in batch]


def answers(
    server: FaultServer,
    questions: Sequence[Any] = ("a",),
    sampling: Sampling | None = None,
    **options: Any,
) -> dict[tuple[str, int], Answer | Failure]:
    """By (prompt, sample), each of which comes once."""
    found = generate(teacher(server, **options), questions, sampling)
    items = {(item.prompt_id, item.sample): item for item in found}
    assert len(items) == len(found)
    return items


def replied(
    choice: Any, questions: Sequence[Any] = ("a",), sampling: Sampling | None = None, **options: Any
) -> tuple[list[Answer | Failure], int]:
    """What becomes of the questions where each reply is this choice, and the number of requests."""
    choices = choice if isinstance(choice, list) else [choice]
    with FaultServer(lambda *_: Step(choices=choices)) as server:
        found = generate(teacher(server, **options), questions, sampling)
    return found, sum(server.asked.values())


def refused(message: str, status: int = 400, **error: Any) -> Step:
    return Step("status", status, {"error": {"message": message, **error}})


def refusing(*parameters: str, status: int = 400, message: str = "'{0}' is not supported") -> Any:
    """A server's step that refuses requests with any of these parameters by their name."""

    def step(question: str, tries: int, body: Mapping[str, Any]) -> Step:
        for name in parameters:
            if name in body:
                return refused(message.format(name), status, param=name, type="invalid")
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": "x"}}
        return Step(choices=[choice] * body.get("n", 1))

    return step
