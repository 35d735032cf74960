"""An asynchronous generator that runs in a thread of its own and is read like a plain one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

_PATIENCE = 5.0  # seconds in which cancelled work should have ended


class _End(NamedTuple):
    error: BaseException | None


@dataclasses.dataclass(frozen=True)
class _Item(Generic[T]):  # Python 3.10 has no generic NamedTuple
    value: T


def iterate_in_thread(make: Callable[[], AsyncGenerator[T, None]]) -> Iterator[T]:
    """Yields what the generator yields, and raises what it raises.

    The thread has an event loop of its own, so it does not matter whether the caller has one, as
    notebooks do. When the reader stops early (`close`, an exception, Ctrl-C), the generator is
    cancelled at once, wherever it waits.
    """
    items: queue.SimpleQueue[_Item[T] | _End] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()

    async def pump() -> None:
        async with contextlib.aclosing(make()) as source:
            async for value in source:
                items.put(_Item(value))

    task = loop.create_task(pump())

    def run() -> None:
        error: BaseException | None = None
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except BaseException as raised:
            error = raised
        finally:
            loop.close()
            items.put(_End(error))

    thread = threading.Thread(target=run, name="plad-fast-requests", daemon=True)
    thread.start()
    try:
        while isinstance(item := items.get(), _Item):
            yield item.value
        if item.error is not None:
            raise item.error
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join(_PATIENCE)
