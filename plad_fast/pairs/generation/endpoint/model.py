"""A model behind an API as a source of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

from plad_fast.data.chat import Content, Messages
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.completions import watched
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Choice, Reply, spent_reason
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure, SampleModel, Wanted

FIRST_SPENT = 8
"""Replies from the first on that end before any answer, after which no more is paid."""

_REASONING_PARSER = (
    "start the server with a reasoning parser (vLLM: --reasoning-parser), or switch the model's "
    "thinking off"
)


class EndpointModel(SampleModel):
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
        self.has_answered = False
        """Set, also from outside, where the first replies need no watching any more."""

    def try_out(self, sampling: Sampling) -> None:
        """Makes one short request, to find out before long work whether such requests are answered.

        Raises:
            UsageError: the endpoint cannot be reached, refuses the key, the model or the sampling,
                or spends all tokens before an answer.
        """
        request = self._request(as_chat("Say yes."), sampling, request_seed(sampling.seed, ""))
        if self.endpoint.try_out(request).choices[0].is_spent:
            raise UsageError(f"{self.name}: asked for a word, {self._spent(sampling)}")

    def generate_samples(
        self, wanted: Wanted, sampling: Sampling
    ) -> Iterator[list[Answer | Failure]]:
        """Yields a prompt's answers together, as they come.

        Raises:
            UsageError: from this call: the sampling wants what the API does not have. From the
                iterator: as `Endpoint.complete`, or the first replies hold no answer at all: their
                tokens are spent before, or they are a thought or a tool call alone.
        """
        if sampling.top_k:
            raise UsageError(
                f"the chat API has no top_k, which is {sampling.top_k}; leave it 0, and use top_p"
            )
        asked = _runs(wanted)
        requests = [
            self._request(
                as_chat(prompt.content),
                sampling,
                request_seed(sampling.seed, prompt.id) + samples[0],
                len(samples),
            )
            for prompt, samples in asked
        ]
        return watched(
            self.name, self._answers(asked, requests, self._spent(sampling)), _REASONING_PARSER
        )

    def _answers(
        self, asked: Sequence[tuple[Prompt, range]], requests: Sequence[ChatRequest], spent: str
    ) -> Iterator[list[Answer | Failure]]:
        empty = 0
        for i, reply in self.endpoint.complete(requests):
            yield _read(asked[i][0].id, asked[i][1], reply, spent)
            if isinstance(reply, Reply):
                is_empty = all(map(_is_empty, reply.choices))
                self.has_answered |= not is_empty
                empty += is_empty
                if empty == FIRST_SPENT and not self.has_answered:
                    why = reply.choices[0].problem or spent
                    raise UsageError(
                        f"{self.name}: of the first {empty} replies each is empty: {why}"
                    )

    def _request(
        self, messages: Messages, sampling: Sampling, seed: int, n: int = 1
    ) -> ChatRequest:
        return ChatRequest(
            messages, sampling.max_new_tokens, n, sampling.temperature, sampling.top_p, seed
        )

    def _spent(self, sampling: Sampling) -> str:
        limit = sampling.max_new_tokens + self.endpoint.reasoning_tokens
        return spent_reason(limit, "answer", "--reasoning-tokens, or --max-new-tokens")


def as_chat(content: Content) -> Messages:
    """Messages as they are, and plain text as what the user says."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def request_seed(seed: int, prompt_id: str) -> int:
    """A seed of the prompt's own; those of its further samples follow it. Below 2**30 + n."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 2


def _runs(wanted: Sequence[tuple[Prompt, int]]) -> list[tuple[Prompt, range]]:
    """A prompt's samples of successive numbers together."""
    runs: list[tuple[Prompt, range]] = []
    for prompt, sample in wanted:
        if runs and runs[-1][0].id == prompt.id and runs[-1][1].stop == sample:
            runs[-1] = (prompt, range(runs[-1][1].start, sample + 1))
        else:
            runs.append((prompt, range(sample, sample + 1)))
    return runs


def _is_empty(choice: Choice) -> bool:
    """Whether it is of no use for a reason that other prompts may have too."""
    return choice.is_spent or bool(choice.problem and choice.finish_reason != "content_filter")


def _read(prompt_id: str, samples: range, reply: Reply | str, spent: str) -> list[Answer | Failure]:
    if isinstance(reply, str):
        return [Failure(prompt_id, reply, sample) for sample in samples]
    found: list[Answer | Failure] = []
    for sample, choice in zip(samples, reply.choices, strict=False):
        if choice.problem:
            found.append(Failure(prompt_id, choice.problem, sample))
        elif choice.is_spent:
            found.append(Failure(prompt_id, spent, sample))
        elif not choice.text:
            found.append(Failure(prompt_id, "the answer is empty", sample))
        else:
            end: Literal["stop", "length"] = (
                "length" if choice.finish_reason == "length" else "stop"
            )
            found.append(Answer(prompt_id, choice.text, end, choice.n_tokens, sample))
    return found + [Failure(prompt_id, reply.missing, k) for k in samples[len(reply.choices) :]]
