"""Files and batches of OpenAI's Batch API: what it is asked, one call at a time.

https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint import access, retries

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHAT: Final = "/v1/chat/completions"
_UNDER_WAY = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
_OVER = frozenset({"completed", "failed", "expired", "cancelled"})
_FIRST_POLL, _LAST_POLL = 2.0, 60.0  # seconds between two looks at a batch
_SLOWEST = 600.0  # seconds for a file of 200 MB
_EARLIER = 600  # seconds by which clocks may differ


class BatchClient:
    """The batches of an endpoint's account.

    What may pass is tried again, but for the making of a batch: that would be paid for twice.

    Raises:
        UsageError: from all methods: the endpoint refuses what is asked, or cannot be reached.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._url = endpoint.settings()["base_url"]
        self.key = access.read_key(endpoint.api_key_env, [self._url])

    def upload(self, lines: Sequence[bytes]) -> str:
        """The id of a file with these lines."""
        content = ("requests.jsonl", b"\n".join(lines) + b"\n")
        return self._call(lambda c: c.files.create(file=content, purpose="batch")).id

    def create(self, file_id: str) -> str:
        """The id of a new batch of an uploaded file."""
        return self._call(
            lambda c: c.with_options(max_retries=0).batches.create(
                input_file_id=file_id, endpoint=CHAT, completion_window="24h"
            ),
            tries=0,
        ).id

    def find(self, file_id: str, since: float) -> str | None:
        """The id of the batch that was made of a file, not long before a time (Unix) at the
        earliest; None if none was."""

        def search(client: OpenAI) -> str | None:
            for batch in client.batches.list(limit=100):
                if batch.input_file_id == file_id:
                    return batch.id
                if batch.created_at < since - _EARLIER:  # the newest come first
                    return None
            return None

        return self._call(search)

    def wait(self, batch_id: str) -> Batch:
        """A batch once it is over, in whatever way; its progress is printed."""
        pause, told = _FIRST_POLL, ""
        while True:
            batch = self._call(lambda c: c.batches.retrieve(batch_id))
            counts, status = batch.request_counts, str(batch.status)
            done = f", {counts.completed:,} of {counts.total:,} requests done" if counts else ""
            if told != (told := f"batch {batch_id}: {status}{done}"):
                print(f"   {told}", flush=True)
            if status in _OVER:
                return batch
            if status not in _UNDER_WAY:
                raise UsageError(
                    f"batch {batch_id} has the status {access.one_line(status)!r}, which this "
                    "plad_fast does not know; look at it where it runs, then run again: it is not "
                    "made anew"
                )
            time.sleep(pause)
            pause = min(_LAST_POLL, 2 * pause)

    def lines(self, file_id: str | None) -> Iterator[dict[str, Any]]:
        """The objects in a file, which may be none at all; a damaged line is left out."""
        if file_id is None:
            return
        content = self._call(lambda c: c.files.content(file_id).read())
        for line in content.split(b"\n"):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                yield found
            elif line.strip():
                logger.warning("file %s of a batch has a line that cannot be read", file_id)

    def _call(self, ask: Callable[[OpenAI], T], tries: int | None = None) -> T:
        import openai

        endpoint = self._endpoint
        most = endpoint.max_retries if tries is None else tries
        with openai.OpenAI(
            api_key=self.key,
            base_url=self._url,
            max_retries=0,
            timeout=openai.Timeout(max(_SLOWEST, endpoint.timeout), connect=endpoint.timeout),
            # A redirection would take the prompts elsewhere.
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, trust_env=not access.is_loopback(self._url)
            ),
        ) as client:
            for count in range(most + 1):
                try:
                    return ask(client)
                except Exception as error:
                    trouble = retries.judge(error, {}, frozenset(), self.key, False)
                    if trouble.then not in ("again", "once"):
                        raise retries.refusal(
                            trouble, endpoint.model, self._url, endpoint.api_key_env
                        ) from None
                    if count == most:
                        raise UncertainError(
                            f"the batch API at {self._url} is out of reach ({trouble.reason}); run "
                            "the same command again: no batch is made twice"
                        ) from None
                time.sleep(retries.pause(count, trouble.retry_after))
        raise AssertionError


class UncertainError(UsageError):
    """What was asked may have been done all the same."""
