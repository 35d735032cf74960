"""A model behind an API as a source of text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from plad_fast.data.chat import Content, Messages
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Reply
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Batches, Failure, TextModel, Wanted


class EndpointModel(TextModel):
    """Asks an endpoint every prompt; plain text is asked as a message of the user.

    All of a prompt's samples are asked for in one request, which costs the prompt once; those that
    do not come are asked for again. Whether a seed makes answers repeatable is up to the endpoint.

    Args:
        endpoint: where to ask. Its `usage` says what was spent so far.
        name: for progress and messages.
    """

    def __init__(self, endpoint: Endpoint, name: str | None = None) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model if name is None else name

    def try_out(self, sampling: Sampling, store: Path, *, overwrite: bool = False) -> None:
        """Asks for a word, unless the store has answers already; see `Endpoint.try_out`."""
        self.endpoint.try_out(self.trial(sampling), store, overwrite=overwrite)

    def trial(self, sampling: Sampling) -> ChatRequest:
        """A short question, in all else like the others."""
        return as_request(Prompt("", "Say yes."), range(1), sampling)

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
        """Yields a prompt's answers together, as they come.

        Raises:
            UsageError: from this call: the sampling wants what the API does not have. From the
                iterator: as `Endpoint.complete`.
        """
        self.require_settings(sampling)
        asked = runs_of_samples(wanted)
        replies = self.endpoint.complete([as_request(*run, sampling) for run in asked])
        return (read_reply(asked[i][0].id, asked[i][1], reply) for i, reply in replies)

    @staticmethod
    def require_settings(sampling: Sampling) -> None:
        """Raises UsageError for what the API does not have."""
        if sampling.top_k:
            raise UsageError(
                f"the chat API has no top_k, which is {sampling.top_k}; leave it 0, and use top_p"
            )


def as_chat(content: Content) -> Messages:
    """Plain text as what the user says, and messages as they are; but that the API takes the
    arguments of a call as JSON text."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    return [
        {**message, "tool_calls": [*map(_with_json, message["tool_calls"])]}
        if message.get("tool_calls")
        else message
        for message in content
    ]


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", {})
    given = function.get("arguments", {})
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def request_seed(seed: int, prompt_id: str) -> int:
    """A seed of the prompt's own; those of its further samples follow it. Below 2**30 + n."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 2


def as_request(prompt: Prompt, samples: range, sampling: Sampling) -> ChatRequest:
    """A request for these samples of a prompt's answers, whose numbers follow one another."""
    seed = request_seed(sampling.seed, prompt.id) + samples[0]
    drawn = replace(sampling, n=len(samples), seed=seed)
    return ChatRequest(as_chat(prompt.content), drawn, prompt.tools)


def runs_of_samples(wanted: Sequence[tuple[Prompt, int]]) -> list[tuple[Prompt, range]]:
    """A prompt's samples of successive numbers together."""
    runs: list[tuple[Prompt, range]] = []
    for prompt, sample in wanted:
        if runs and runs[-1][0].id == prompt.id and runs[-1][1].stop == sample:
            runs[-1] = (prompt, range(runs[-1][1].start, sample + 1))
        else:
            runs.append((prompt, range(sample, sample + 1)))
    return runs


def read_reply(prompt_id: str, samples: range, reply: Reply | str) -> list[Answer | Failure]:
    """What came of a request for these samples."""
    choices, missing = ([], reply) if isinstance(reply, str) else (reply.choices, reply.missing)
    found: list[Answer | Failure] = []
    for sample, choice in zip(samples, choices, strict=False):
        if choice.problem or not choice.text:
            problem = choice.problem or "the answer is empty"
            found.append(Failure(prompt_id, problem, sample))
        else:
            end: Literal["stop", "length"] = (
                "length" if choice.finish_reason == "length" else "stop"
            )
            said = (choice.text, end, choice.n_tokens)
            calls = choice.tool_calls
            found.append(Answer(prompt_id, *said, sample, choice.reasoning, tool_calls=calls))
    return found + [Failure(prompt_id, missing, sample) for sample in samples[len(choices) :]]
