"""Replies of any shape, size and headers, and a transport inside this process that gives them."""

from __future__ import annotations

import copy
import gzip
import json
import random
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "4"}}
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
}
PIECE = 2**16  # bytes, as they come from a socket
NAMES = (
    *("choices", "message", "content", "finish_reason", "usage", "prompt_tokens", "error"),
    *("completion_tokens", "code", "type", "text", "refusal", "tool_calls", "param", "detail"),
    *("reasoning_content", "thinking", "", "\ud83d", "\x1b[31m"),
)
WORDS = (
    *("", " ", "stop", "length", "error", "SAFETY", "tool_calls", "abort", "null", "text"),
    *("thinking", "<think>", "<think>\nno end", "a</think>b", "Nice \ud83d", "\x1b]0;t\x07\x9b2J"),
    *("\u202eevil", "\u0000", "\ufeff", "insufficient_quota", "per day", "max_tokens is too large"),
    *("unsupported parameter: 'seed'", "'n' must be 1", "temperature", "x" * 100_000, "{" * 3000),
)
NUMBERS = (0, -1, 1, 7, 2**63, 10**400, -(10**30), 0.5, 1e308, float("nan"), float("inf"), True)
STATUSES = (
    *(201, 204, 206, 301, 302, 304, 307, 308),
    *(400, 400, 400, 401, 402, 403, 404, 405, 408, 409, 413, 418, 422, 422, 425, 429, 429),
    *(500, 502, 503, 529, 599, 999),
)
HEADERS = (
    (b"content-type", (b"text/html", b"", b"application/json; charset=base64", b"a/b; charset=")),
    (b"retry-after", (b"0", b"-1", b"nan", b"1e400", b"9" * 5000, b"soon", b"\xff", b"86400")),
    (b"retry-after-ms", (b"1", b"inf", b"x")),
    (b"location", (b"http://127.0.0.1:9/v1", b"http://evil.test/", b"//", b"\xff", b"http://[::")),
    (b"content-encoding", (b"gzip", b"deflate", b"br", b"gzip, gzip", b"\xfe", b"identity")),
    (b"content-length", (b"7", b"-1", b"x")),
    (b"x-request-id", (b"\x1b[31m", b"")),
    (b"x-should-retry", (b"true",)),
)


@dataclass
class Fuzzed:
    """A reply, in pieces that are made when they are asked for."""

    status: int
    headers: list[tuple[bytes, bytes]]
    pieces: Callable[[], Any]


def any_value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.random()
    if depth > 4 or kind < 0.25:
        return chance.choice(WORDS)
    if kind < 0.45:
        return chance.choice(NUMBERS)
    if kind < 0.55:
        return None
    if kind < 0.75:
        return [any_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind < 0.78:
        return _nested(chance.choice((50, 300, 900)))
    return {chance.choice(NAMES): any_value(chance, depth + 1) for _ in range(chance.randrange(5))}


def any_reply(chance: random.Random) -> Fuzzed:
    status = 200 if chance.random() < 0.85 else chance.choice(STATUSES)
    headers = [(name, chance.choice(values)) for name, values in HEADERS if chance.random() < 0.12]
    kind = chance.random()
    if kind < 0.06:  # far longer than any answer that was asked for
        piece = (chance.choice((b"[", b" ", b'{"choices":', b"9", b"\xff")) * PIECE)[:PIECE]
        return Fuzzed(status, headers, lambda: (piece for _ in range(4000)))
    if kind < 0.12:
        return Fuzzed(status, headers, lambda: iter([_raw(chance.random())]))
    if kind < 0.3:
        body = any_value(chance)
    else:
        body = copy.deepcopy(COMPLETION)
        for _ in range(chance.choice((0, 1, 1, 2, 5))):
            _mutate(body, chance)
        if status != 200 and chance.random() < 0.5:
            body = {"error": any_value(chance)}
    data = json.dumps(body).encode()
    if (b"content-encoding", b"gzip") in headers and chance.random() < 0.7:
        data = gzip.compress(data)
    if (b"content-encoding", b"deflate") in headers and chance.random() < 0.7:
        data = zlib.compress(data)
    return Fuzzed(status, headers, lambda: iter([data]))


def bomb(size: int) -> bytes:
    """So many zero bytes, by gzip."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(bytes(2**20)) for _ in range(size // 2**20)]
    return b"".join([*parts, packer.flush()])


def _nested(depth: int) -> Any:
    value: Any = "deep"
    for level in range(depth):
        value = [value] if level % 2 else {"message": value}
    return value


def _raw(at: float) -> bytes:
    deep = b'{"choices":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    number = b'{"choices": [], "usage": ' + b"1" * 5000 + b"}"
    page, events = b"\xef\xbb\xbf<!doctype html>", b'data: {"choices": []}\n\n'
    raws = (deep, number, page, events, b"", b"null", b"\xff\xfe", b'"\xed\xa0\xbd"', b"nan", b"[")
    return raws[int(at * len(raws))]


def _mutate(body: Any, chance: random.Random) -> None:
    """Somewhere inside, something else: a value, or nothing, or one more."""
    while isinstance(body, (dict, list)) and body:
        keys = list(body) if isinstance(body, dict) else range(len(body))
        key = chance.choice(list(keys))
        inner = body[key]
        if not (isinstance(inner, (dict, list)) and inner) or chance.random() < 0.25:
            what = chance.random()
            if what < 0.2:
                del body[key]
            elif what < 0.4 and isinstance(body, dict):
                body[chance.choice(NAMES)] = any_value(chance)
            else:
                body[key] = any_value(chance)
            return
        body = inner


@dataclass
class Served:
    """What a transport has given so far."""

    replies: int = 0
    read: list[int] = field(default_factory=list)  # bytes of each


def install(monkeypatch: Any, make: Callable[[Any, Any], Fuzzed]) -> Served:
    """Puts a transport in the place of HTTP that answers each request by one of these replies.

    Args:
        make: from the client's httpx, of whichever name, and the request.
    """
    import openai

    base = next(c for c in openai.DefaultAsyncHttpxClient.__mro__ if c.__name__ == "AsyncClient")
    httpx = sys.modules[base.__module__.partition(".")[0]]  # httpx2 for newer clients
    served = Served()

    class Stream(httpx.AsyncByteStream):
        def __init__(self, pieces: Any) -> None:
            self.pieces = pieces

        async def __aiter__(self) -> AsyncIterator[bytes]:
            served.read.append(0)
            place = len(served.read) - 1
            for piece in self.pieces:
                served.read[place] += len(piece)
                yield piece

    class Transport(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: Any) -> Any:
            served.replies += 1
            reply = make(httpx, request)
            return httpx.Response(
                reply.status, headers=reply.headers, stream=Stream(reply.pieces())
            )

    monkeypatch.setattr(httpx._client, "AsyncHTTPTransport", lambda **_: Transport())
    return served
