"""The HTTP client of an endpoint, and equal servers of one model.

The client reads whole replies, of a bounded size, from where they were asked. Of the servers the
one with the least to do is asked, and one that is down is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from plad_fast.pairs.generation.endpoint.retries import BadReplyError, Trouble

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)
T = TypeVar("T")

LEFT_OUT = 30.0
"""Seconds for which a server that is down is left out; then one request tries it."""

_FAILURES = 3  # in a row, without a reply between them, after which a server counts as down
# A token is a few characters as a rule, of six bytes each where JSON escapes them, and some servers
# say all twice; but some tokens are long, and there is more in a reply than its text.
_BYTES_PER_TOKEN = 256
_BYTES_BESIDE = 4 * 2**20
_REDIRECTIONS = 3
_CODINGS = frozenset({"", "identity", "gzip", "deflate"})
_KEPT = frozenset({b"retry-after", b"retry-after-ms", b"location"})
_PATIENCE = 5.0  # seconds in which cancelled work should have ended


def most_bytes(tokens: int) -> int:
    """Of a reply to a request for so many tokens, in all its answers."""
    return _BYTES_BESIDE + _BYTES_PER_TOKEN * tokens


def open_client(
    *, key: str, base_url: str, timeout: float, connect: float, proxies: bool, tokens: int
) -> openai.AsyncOpenAI:
    """A client for some requests; it is an asynchronous context manager.

    A redirection is followed within the server that was asked, and no further: the next one would
    get the prompts. The client's own retries are off: it waits for no Retry-After of more than two
    minutes, asks again where a quota of a day is spent, and keeps no budget.

    It waits `timeout` seconds for each phase of a request and `connect` for a connection, takes
    proxies from the environment or none, and reads no more than belongs to `tokens`.
    """
    import openai

    most = most_bytes(tokens)

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            options.update(stream=True, follow_redirects=False)
            for _ in range(_REDIRECTIONS):
                response = await super().send(request, **options)
                try:
                    body = await _read(response, most)
                finally:
                    await response.aclose()
                target = response.next_request
                # Most statuses make a GET of it, which asks nothing.
                if target is None or _way(target) != _way(request):
                    break
                request = target
            # A new response, for what its headers say of the body is true no more, or never was.
            kept = [(name, value) for name, value in response.headers.raw if name.lower() in _KEPT]
            kept.append((b"content-type", b"application/json; charset=utf-8"))
            return type(response)(
                response.status_code, headers=kept, content=body, request=response.request
            )

    return openai.AsyncOpenAI(
        api_key=key,
        base_url=base_url,
        timeout=openai.Timeout(timeout, connect=connect),
        max_retries=0,
        default_headers={"Accept-Encoding": "gzip, deflate"},
        http_client=Client(trust_env=proxies),
    )


async def _read(response: Any, most: int) -> bytes:
    """The body, decompressed; of one that is too long no more than the bound is held."""
    coding = response.headers.get("content-encoding", "").strip().lower()
    # One alone, and of those that are decompressed piece by piece.
    if coding not in _CODINGS:
        raise BadReplyError(f"the reply is compressed by {coding!r}, which was not asked for")
    body = bytearray()
    async with contextlib.aclosing(response.aiter_bytes()) as parts:
        async for part in parts:
            if len(body) + len(part) > most:
                # The traceback keeps this frame for longer than the text is of use.
                del part
                body.clear()
                raise BadReplyError(f"the reply is longer than {most:,} bytes")
            body += part
    return bytes(body)


def _way(request: Any) -> tuple[str, str, str, int | None]:
    """Method and server of a request."""
    url = request.url
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return request.method, url.scheme, url.host, port


def iterate_in_thread(
    work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]],
) -> Iterator[T]:
    """Yields what asynchronous work hands to its argument, and raises what it raises.

    Its thread has an event loop of its own, so it does not matter whether the caller has one, as
    notebooks do. When the reader stops early (`close`, an exception, Ctrl-C), the work is cancelled
    at once, wherever it waits.
    """
    items: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(lambda value: items.put((value,))))

    def run() -> None:
        end: BaseException | None = None
        try:
            loop.run_until_complete(task)
        except BaseException as error:
            end = error
        finally:
            loop.close()
            items.put(end)

    thread = threading.Thread(target=run, name="plad-fast-requests", daemon=True)
    thread.start()
    try:
        while isinstance(item := items.get(), tuple):
            yield item[0]
        if item is not None:
            raise item
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join(_PATIENCE)


@dataclass(eq=False)
class Server:
    """An address, and how it fared so far."""

    url: str
    under_way: int = 0
    """Requests that it has at the moment."""
    asked: int = 0
    """Requests that it had so far."""
    replies: int = 0
    is_reached: bool = False
    """There was a server at this address once."""
    has_replied: bool = False
    """To anything but a trial."""
    unclear: int = 0
    """Refusals that nothing explains, before any reply."""
    failures: int = 0
    """In a row, up to now."""
    is_down: bool = False
    out_until: float = 0.0
    """When it is tried again, by `time.monotonic`."""


class Servers:
    """Servers of which any may answer any request.

    Where all are down, as one is that stands alone, all are asked: to wait, to try again and to
    give up is the caller's.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.every = [Server(url) for url in urls]

    @property
    def is_reached(self) -> bool:
        """There was a server at one of the addresses once."""
        return any(server.is_reached for server in self.every)

    @contextlib.contextmanager
    def least_loaded(self, failed: Sequence[Server]) -> Iterator[Server]:
        """The server for a request that these have failed at; it has the request until the block
        ends."""
        now = time.monotonic()
        server = min(
            self.every,
            key=lambda s: (s.out_until > now, s in failed, s.under_way, s.asked),
        )
        if server.is_down:  # this request alone finds out whether it still is
            server.out_until = now + LEFT_OUT
        server.under_way += 1
        server.asked += 1
        try:
            yield server
        finally:
            server.under_way -= 1

    def has_other(self, failed: Sequence[Server]) -> bool:
        """Whether one is up that has not failed at a request."""
        return any(server not in failed for server in self.every if not server.is_down)

    def note_failure(self, server: Server, trouble: Trouble) -> None:
        """Leaves the server out for a while if it is the server that fails, not the request."""
        server.is_reached |= not trouble.unreachable
        if trouble.then not in ("again", "once", "stop") or trouble.status == 429:
            return
        server.failures += 1
        if not trouble.unreachable and server.failures < _FAILURES:
            return
        server.out_until = time.monotonic() + LEFT_OUT
        if not server.is_down and len(self.every) > 1:
            up = sum(not other.is_down for other in self.every) - 1
            what = f"left out, {up} of {len(self.every)} servers are up"
            logger.warning("%s: %s (%s)", server.url, what, trouble.reason)
        server.is_down = True

    def note_reply(self, server: Server, *, is_trial: bool) -> None:
        server.is_reached = True
        server.has_replied |= not is_trial
        server.replies += 1
        server.failures, server.out_until = 0, 0.0
        if server.is_down and len(self.every) > 1:
            logger.warning("%s: up again", server.url)
        server.is_down = False
