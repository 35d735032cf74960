"""Failed requests, and what follows: again, otherwise, not this one, or none at all."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import random
import re
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

from plad_fast.errors import UsageError, causes_of
from plad_fast.pairs.generation.endpoint.access import one_line
from plad_fast.pairs.generation.endpoint.dialect import LIMITS, OF_PROMPT, find_refusal

AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 of what may work later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
LONGEST_ASKED = 900.0
"""Seconds that a server may ask to wait for; a longer wait is the user's."""
_TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "anyio"})

_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|maximum context|too long|too many tokens|prompt is longer",
    re.IGNORECASE,
)
_FILTERED = re.compile(
    r"content[ _](filter|policy|management)|moderation|flagged|safety system", re.IGNORECASE
)
_LONG_QUOTA = re.compile(
    r"per[ _-]?(?:1[ _-])?(?:day|week|month)|/ ?(?:day|week|month)\b|\ba (?:day|month)\b"
    r"|\b24[ -]?h(?:ours?)?\b|\b[RT]PD\b|\b(?:daily|weekly|monthly)\b",
    re.IGNORECASE,
)
_OF_ONE_PROMPT = frozenset(
    {"context_length_exceeded", "string_above_max_length", "invalid_prompt", "content_filter",
     "content_policy_violation"}
)  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """Why a request failed, and what follows from it."""

    then: Literal["again", "once", "adapt", "skip", "unclear", "stop"]
    """`again`: it may work later. `once`: it is tried once more, for it is unlikely to change.
    `adapt`: without this `parameter`. `skip`: this request will not work, others may. `unclear`:
    this one will not, and perhaps none. `stop`: none will."""

    reason: str
    """A line without anything secret."""

    status: int | None = None
    retry_after: float | None = None

    parameter: str = ""
    """What is refused: to be left out where `then` is `adapt`, to be told to the user else."""

    advice: str = ""
    """What the user is to do, where that follows from no status."""

    unreachable: bool = False
    """No server was there to be asked."""

    lost: bool = False
    """The server may have answered, and be paid for it."""


class BadReplyError(ValueError):
    """A reply of status 200 that holds no answer; the message says what it is instead."""

    def __init__(
        self,
        reason: str,
        then: Literal["again", "once"] = "again",
        *,
        advice: str = "",
        code: Any = None,
    ) -> None:
        super().__init__(reason)
        self.trouble = Trouble(then, reason, advice=advice, lost=True)
        if str(code) == "429" and _LONG_QUOTA.search(reason):
            self.trouble = Trouble("stop", reason, 429, advice=_LATER)


def judge(
    error: Exception, sent: Mapping[str, Any], refused: Set[str], key: str, any_temperature: bool
) -> Trouble:
    """What to do about whatever was raised while a request was made or its reply was read.

    `refused` are parameters that are left out or replaced already; the key is kept out of the
    reason.
    """
    import openai

    try:
        if isinstance(error, openai.APIStatusError):
            trouble = _of_status(error, sent, refused, any_temperature)
        else:
            trouble = _of_transport(error)
        return replace(trouble, reason=one_line(trouble.reason, key))
    except Exception as unread:  # a body too deep to be shown, say
        return Trouble("again", f"the reply cannot be read: {type(unread).__name__}", lost=True)


def _of_transport(error: Exception) -> Trouble:
    import openai

    causes = list(causes_of(error))
    if bad := next((cause for cause in causes if isinstance(cause, BadReplyError)), None):
        return bad.trouble
    names = {type(cause).__name__ for cause in causes}
    # A connection that was never made: no server, no such name, a proxy that refuses.
    unreachable = not names.isdisjoint({"ConnectError", "ConnectTimeout", "ProxyError"})
    transport = type(error).__module__.partition(".")[0] in _TRANSPORTS
    if isinstance(error, (openai.APITimeoutError, asyncio.TimeoutError, TimeoutError)):
        reason = "no connection in time" if unreachable else "no reply in time"
    elif isinstance(error, UnicodeEncodeError):
        return Trouble("skip", "the prompt holds half of a surrogate pair and no character")
    elif "DecodingError" not in names and (
        transport or isinstance(error, (openai.APIConnectionError, OSError))
    ):
        reason = f"no connection: {error.__cause__ or error}"
    else:
        reason = f"the reply cannot be read: {type(error).__name__}: {error}"
        unreachable = False
    return Trouble("again", reason, unreachable=unreachable, lost=not unreachable)


def _of_status(
    error: Any, sent: Mapping[str, Any], refused: Set[str], any_temperature: bool
) -> Trouble:
    status: int = error.status_code
    code, named = (v if isinstance(v, str) else "" for v in (error.code, error.param))
    said = _message(error)
    reason = f"status {status}: {said}" if said else f"status {status}"
    if code == "insufficient_quota" or status in (401, 402, 404):
        return Trouble("stop", reason, status)
    if 300 <= status < 400:
        target = error.response.headers.get("location", "nowhere")
        reason = f"status {status}: a redirection to {target}"
        return Trouble("stop", reason, status, advice=_REDIRECTED)
    if status in AGAIN or status >= 500:
        wait = retry_after(error.response.headers)
        if status == 429 and _LONG_QUOTA.search(str(error.body)):
            return Trouble("stop", reason, status, advice=_LATER)
        if wait is not None and wait > LONGEST_ASKED:
            reason = f"it asks to wait for {wait / 60:.0f} minutes, {reason}"
            return Trouble("stop", reason, status, retry_after=wait, advice=_LATER)
        return Trouble("again", reason, status, retry_after=wait)
    of_prompt = code in _OF_ONE_PROMPT or status == 413
    if status not in (400, 422):
        is_its_own = of_prompt or _FILTERED.search(said) or _TOO_LONG.search(said)
        return Trouble("skip" if is_its_own else "stop", reason, status)
    refusal = find_refusal(named, said or code, sent)
    parameter = refusal.parameter
    trouble = Trouble("unclear", reason, status, parameter=parameter)
    can_drop = refusal.can_drop(sent, any_temperature)
    if parameter in LIMITS and not (
        of_prompt or (refusal.of == "value" and OF_PROMPT.search(said))
    ):
        # Where the other name was refused before, this one is not: the request keeps a limit.
        if can_drop and not refused & (LIMITS - {parameter}):
            return replace(trouble, then="adapt")
        if refusal.of == "value":
            return replace(trouble, then="stop")
        return replace(trouble, parameter="")
    if of_prompt or _FILTERED.search(said) or _TOO_LONG.search(said):
        return replace(trouble, then="skip")
    return replace(trouble, then="adapt") if can_drop and parameter not in LIMITS else trouble


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


_LATER = "run the same command again then, or raise the account's quota: what has come is kept"
_REDIRECTED = "it is not followed, for the key and the prompts would go there: check --base-url"
_STREAM = re.compile(r"\bstream(?:ing)?\b", re.IGNORECASE)
_OF_PARAMETERS = {
    **dict.fromkeys(
        LIMITS,
        "lower --max-new-tokens, or --reasoning-tokens: the limit is their sum (for a judge, of "
        "512 and the latter)",
    ),
    "temperature": "give --teacher-temperature 1, or another that it takes: answers are samples",
    "top_p": "leave top_p at 1, where it is not sent (--top-p is of the student alone)",
}


def refusal(trouble: Trouble, model: str, url: str, variable: str) -> UsageError:
    """What to tell the user about an endpoint that refuses all requests."""
    if trouble.status == 401:
        # What the server says here may quote the key in part, so it is left out.
        return UsageError(
            f"{url} refuses the key (status 401); set {variable} to a key of this endpoint, or "
            "name another variable with --api-key-env"
        )
    advice = trouble.advice or {
        402: "add credit to the account, and run again: what has come is kept",
        403: f"check that the key in {variable} may use this model",
        404: "check the model's name, and --base-url, which usually ends in /v1",
        429: "raise the account's quota, and run again: what has come is kept",
    }.get(trouble.status or 0, "check the model's name, --base-url and the sampling settings")
    if trouble.parameter in _OF_PARAMETERS:
        advice = _OF_PARAMETERS[trouble.parameter]
    elif trouble.then == "unclear" and not trouble.parameter and _STREAM.search(trouble.reason):
        advice = "plad_fast reads no streams: switch the model's thinking off, or choose another"
    return UsageError(f"model {model!r} at {url} refuses all requests ({trouble.reason}); {advice}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait for, from any of the forms in use."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(KeyError, ValueError):
            seconds = float(headers[name]) / unit
            if 0 <= seconds < math.inf:
                return seconds
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(0.0, date.timestamp() - time.time())
    return None


def pause(tries: int, asked: float | None) -> float:
    """Seconds before the next try: twice as long each time, or as long as the server asked.

    Jitter keeps requests that failed together from coming back together.
    """
    backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2**tries) * random.uniform(0.5, 1.0)
    return backoff if asked is None else min(LONGEST_ASKED, asked) + 0.1 * backoff
