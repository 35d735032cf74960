"""What to do about a request that failed: again, otherwise, not this one, or none at all."""

from __future__ import annotations

import asyncio
import email.utils
import random
import re
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from plad_fast.errors import UsageError
from plad_fast.pairs._secrets import one_line

_AGAIN = frozenset({408, 409, 425, 429})
_LIMITS = frozenset({"max_tokens", "max_completion_tokens"})
_TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "anyio"})

_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|maximum context|too long|too many tokens|prompt is longer",
    re.IGNORECASE,
)
_FILTERED = re.compile(
    r"content[ _](filter|policy|management)|moderation|flagged|safety system", re.IGNORECASE
)
_OF_ONE_PROMPT = frozenset(
    {"context_length_exceeded", "string_above_max_length", "invalid_prompt", "content_filter",
     "content_policy_violation"}
)  # fmt: skip


class BadReplyError(ValueError):
    """A reply of status 200 that holds no answer; the message says what it is instead."""


@dataclass(frozen=True)
class Trouble:
    """Why a request failed, and what follows from it."""

    then: Literal["again", "adapt", "skip", "unclear", "stop"]
    """`again`: it may work later. `adapt`: without this `parameter`. `skip`: this request will not
    work, others may. `unclear`: this one will not, and perhaps none. `stop`: none will."""

    reason: str
    """A line without anything secret."""

    status: int | None = None
    retry_after: float | None = None

    parameter: str = ""
    """What is refused: to be left out where `then` is `adapt`, to be told to the user else."""


def judge(
    error: Exception,
    sent: Mapping[str, Any],
    refused: Set[str],
    key: str,
    optional: Set[str] = frozenset(),
) -> Trouble | None:
    """What to do about an exception of the `openai` client.

    Args:
        error: from the client, or a `BadReplyError`.
        sent: the request's body.
        refused: parameters that are left out or replaced already.
        key: to keep out of the reason.
        optional: parameters that this request can do without, whatever their value.

    Returns:
        None for an exception that is no failure of the request.
    """
    import openai

    if isinstance(error, (openai.APITimeoutError, asyncio.TimeoutError, TimeoutError)):
        return Trouble("again", "no reply in time")
    if isinstance(error, openai.APIStatusError):
        return _judge_status(error, sent, refused, key, optional)
    if isinstance(error, BadReplyError):
        return Trouble("again", one_line(str(error), key))
    if isinstance(error, UnicodeEncodeError):
        return Trouble("skip", "the prompt holds half of a surrogate pair and no character")
    if isinstance(error, (ValueError, openai.APIResponseValidationError)):
        return Trouble("again", "the reply is not valid JSON")
    transport = type(error).__module__.partition(".")[0] in _TRANSPORTS
    if transport or isinstance(error, (openai.APIConnectionError, OSError)):
        cause = error.__cause__ or error
        return Trouble("again", one_line(f"no connection: {cause}", key))
    return None


def _judge_status(
    error: Any, sent: Mapping[str, Any], refused: Set[str], key: str, optional: Set[str]
) -> Trouble:
    status: int = error.status_code
    said = _message(error)
    reason = one_line(f"status {status}: {said}" if said else f"status {status}", key)
    if error.code == "insufficient_quota" or status in (401, 402, 404):
        return Trouble("stop", reason, status)
    if status in _AGAIN or status >= 500:
        return Trouble("again", reason, status, retry_after=retry_after(error.response.headers))
    of_prompt = error.code in _OF_ONE_PROMPT or status == 413
    if of_prompt or _FILTERED.search(said) or _TOO_LONG.search(said):
        return Trouble("skip", reason, status)
    if status in (400, 422):
        parameter = _refused_parameter(error.param, said, sent)
        if parameter in _LIMITS and refused & (_LIMITS - {parameter}):
            parameter = ""  # the other name was refused before
        # Left out, the server's own temperature would be used, which is 1 as a rule.
        if parameter == "temperature" and sent[parameter] != 1 and parameter not in optional:
            return Trouble("unclear", reason, status, parameter=parameter)
        if parameter:
            return Trouble("adapt", reason, status, parameter=parameter)
        return Trouble("unclear", reason, status)
    return Trouble("stop", reason, status)


def _message(error: Any) -> str:
    """What the server said, from the several forms in which servers say it."""
    body = error.body
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, Mapping):
            inner = inner.get("message", inner.get("detail", inner))
        return str(inner)
    text = str(body) if body is not None else ""
    return "" if text.lstrip().startswith("<") else text  # a proxy's page


def _refused_parameter(named: object, said: str, sent: Mapping[str, Any]) -> str:
    """A parameter that was sent and is refused; or nothing."""
    for name in ("seed", "n", "temperature", *sorted(_LIMITS)):
        # A name of one letter is only believed in quotes.
        mentioned = named == name or re.search(rf"""['"`]{name}['"`]""", said) is not None
        if len(name) > 1:
            mentioned = mentioned or re.search(rf"\b{name}\b", said) is not None
        if mentioned and name in sent:
            return name
    return ""


def refusal(trouble: Trouble, model: str, url: str, variable: str) -> UsageError:
    """What to tell the user about an endpoint that refuses all requests."""
    if trouble.status == 401:
        # What the server says here may quote the key in part, so it is left out.
        return UsageError(
            f"{url} refuses the key (status 401); set {variable} to a key of this endpoint, or "
            "name another variable with --api-key-env"
        )
    advice = {
        402: "add credit to the account, and run again: what has come is kept",
        403: f"check that the key in {variable} may use this model",
        404: "check the model's name, and --base-url, which usually ends in /v1",
        429: "raise the account's quota, and run again: what has come is kept",
    }.get(trouble.status or 0, "check the model's name, --base-url and the sampling settings")
    if trouble.parameter == "temperature":
        advice = (
            "give --teacher-temperature 1: its answers are then samples, which come out otherwise "
            "when they are asked for anew"
        )
    return UsageError(f"model {model!r} at {url} refuses all requests ({trouble.reason}); {advice}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait for, from any of the forms in use."""
    if (value := _seconds(headers.get("retry-after-ms"))) is not None:
        return value / 1000
    header = headers.get("retry-after")
    if (value := _seconds(header)) is not None:
        return value
    if header is None:
        return None
    try:
        date = email.utils.parsedate_to_datetime(header)
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _seconds(header: str | None) -> float | None:
    try:
        value = float(header) if header is not None else -1.0
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def pause(tries: int, asked: float | None, *, first: float, longest: float) -> float:
    """Seconds before the next try: twice as long each time, and at least as the server asked.

    Jitter keeps requests that failed together from coming back together.
    """
    backoff = min(longest, first * 2**tries) * random.uniform(0.5, 1.0)
    return backoff if asked is None else min(longest, asked) + 0.1 * backoff
