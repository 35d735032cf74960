"""Equal servers of one model: the one with the least to do is asked, one that is down is not."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plad_fast.pairs.generation.endpoint.retries import Trouble

logger = logging.getLogger(__name__)

LEFT_OUT = 30.0
"""Seconds for which a server that is down is left out; then one request tries it."""

_FAILURES = 3  # in a row, without a reply between them, after which a server counts as down


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
