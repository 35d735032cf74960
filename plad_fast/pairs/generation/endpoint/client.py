"""The HTTP client of an endpoint: whole replies, of a bounded size, from where they were asked."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from plad_fast.pairs.generation.endpoint.retries import BadReplyError

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

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
