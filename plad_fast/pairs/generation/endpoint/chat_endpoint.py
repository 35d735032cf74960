"""Chat completions from any OpenAI-compatible endpoint: many at once, each until it has come.

Endpoints fail in many ways, and a run of thousands of requests meets most of them. What may pass
is tried again, what concerns one prompt is that prompt's failure, and what concerns all of them
ends the run at once, with what has come already in the caller's hands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from plad_fast.checks import check_weight, require_packages
from plad_fast.data.store import has_rows
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint import access, chat, retries
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Choice, Reply, Usage
from plad_fast.pairs.generation.endpoint.client import (
    Server,
    Servers,
    iterate_in_thread,
    open_client,
)
from plad_fast.pairs.generation.endpoint.dialect import Dialect

logger = logging.getLogger(__name__)

_FIRST_EMPTY = 8  # replies from the first on without an answer, after which no more is paid
_UNCLEAR = 3  # unexplained refusals before any reply, after which the run ends
_LASTING = frozenset({401, 402, 429})  # stop a run that has replies too: key, credit, quota
_FIRST_CONNECTION = 4.0  # seconds for a server to take its first connection


@dataclass(eq=False, repr=False)
class Endpoint:
    """A model behind an OpenAI-compatible chat API.

    Raises UsageError where the `openai` package or the key is missing, or a value is out of range.
    """

    model: str
    """As the endpoint calls it."""

    _: KW_ONLY

    base_url: str | None = None
    """Of the API, usually ending in `/v1`; else the environment variable OPENAI_BASE_URL, else
    OpenAI's own. Several with commas between them are servers of the same model, any of which may
    answer: the one with the fewest requests under way is asked, one that is down is left out and
    tried again later, and the first address stands for all of them in `settings`."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. The key itself is passed to the client and to
    nothing else; an endpoint on this machine may do without."""

    concurrency: int = 8
    """Requests under way at once, at most, at all servers together."""

    timeout: float = 60.0
    """Seconds for a whole request, after which it counts as failed."""

    max_retries: int = 6
    """How often a failed request is tried again, after half a second first and up to a minute
    later. What the server asks for by Retry-After is kept to, up to a quarter of an hour; a longer
    wait ends the run."""
    reasoning_tokens: int = 0
    """Added to the length limit of every request, for a model that reasons before it answers: what
    it spends on that counts as part of its answer."""

    token_budget: int | None = None
    """Tokens, of prompts and answers, that may be spent over the life of this object. Once they
    are, no request starts; those under way are let finish, so that up to `concurrency` requests
    come on top. A request whose reply came too late or could not be read counts at an estimate: its
    whole length limit."""

    cost_budget: float | None = None
    """Likewise, in the currency of `prices`."""

    prices: tuple[float, float] | None = None
    """Of a million tokens of prompts, and of answers."""

    def __post_init__(self) -> None:
        self._urls = access.find_urls(self.base_url)
        self.base_url = ",".join(self._urls)
        self._servers = Servers(self._urls)
        self.usage = Usage(prices=self.prices)
        self.stopped = ""  # why `complete` left requests out the last time, if it did
        self.has_answered = False  # whether the first replies need no watching any more
        limits = ("max_tokens", "max_completion_tokens")
        if access.OPENAI_URL in self._urls:  # its newer models refuse the old, others the new
            limits = limits[::-1]
        self.dialect = Dialect(self.model, self.reasoning_tokens, limits)
        self._tells_ends = False  # whether any reply had a finish_reason
        self._is_trial = False
        self._empty = self._given_up_in_a_row = 0
        self._check()

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, base_url={self.base_url!r})"

    def settings(self) -> dict[str, str]:
        """What answers depend on, as JSON; without anything secret."""
        return {"model": self.model, "base_url": self._urls[0]}

    def complete(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, Reply | str]]:
        """Yields the index of every request once, with its reply or why it failed, as they come.

        To stop early (by `close`, an exception or Ctrl-C) cancels the requests under way.

        Raises:
            UsageError: from the iterator: the endpoint refuses the key or the model, or all
                requests, or the first replies hold no answer at all: their tokens are spent
                before, or they are a thought or a tool call alone.
        """
        key = access.read_key(self.api_key_env, self._urls)
        return iterate_in_thread(lambda emit: self._answer_all(requests, key, emit))

    def try_out(
        self, request: ChatRequest, store: str | os.PathLike[str] | None, *, overwrite: bool
    ) -> None:
        """Makes one plain request of each server, to find out before long work whether any will be
        answered. A server that is not there is passed over as long as another one answers.

        Args:
            request: to make, unless there are replies to such requests in the store.
            store: of rows that are made of replies.
            overwrite: the store is about to be discarded.

        Raises:
            UsageError: as `complete`, no reply came, or all its tokens were spent before an answer.
        """
        self.has_answered = store is not None and has_rows(store) and not overwrite
        if not self.has_answered:
            self.require_reply(request)

    def require_reply(self, request: ChatRequest) -> None:
        """As `try_out`, whatever is stored."""
        self._is_trial = True
        try:
            found = [reply for _, reply in self.complete([request] * len(self._urls))]
        finally:
            self._is_trial = False
        for reply in found:
            problem = reply
            if isinstance(reply, Reply):
                is_spent = reply.choices[0].finish_reason == "length"
                problem = reply.choices[0].problem if is_spent else ""
            if problem:
                raise UsageError(f"{self!r} gave no answer to a first request: {problem}")

    def require_budget(self, requests: Sequence[ChatRequest]) -> None:
        """Raises UsageError where requests that are all made at once may exceed a budget."""
        guess = Usage(prices=self.prices)
        for request in requests:
            guess.add(request.guessed_tokens, self.dialect.limit(request) * request.sampling.n)
        more_of = {"token": guess.tokens, "cost": guess.cost or 0.0}
        for name, budget, spent in self._budgets():
            if spent + (more := more_of[name]) > budget:
                raise UsageError(
                    f"a batch of {len(requests):,} requests may take {more:,.6g} of the {name} "
                    f"budget of {budget:,}, every answer at its whole length, and {spent:,.6g} is "
                    f"spent; raise --{name}-budget, or lower --limit or --max-new-tokens"
                )

    async def _answer_all(
        self,
        requests: Sequence[ChatRequest],
        key: str,
        emit: Callable[[tuple[int, Reply | str]], None],
    ) -> None:
        self._given_up_in_a_row = 0  # the endpoint may be back
        self._empty = 0
        self.stopped = ""
        waiting = iter(enumerate(requests))
        halted = asyncio.Event()

        async def work() -> None:
            for index, request in waiting:
                reply = await self._ask(clients, request, key, halted)
                emit((index, reply))
                if isinstance(reply, Reply) and not self._is_trial and not self.has_answered:
                    self._look_for_answer(reply.choices)
                if halted.is_set():
                    return

        def client(server: Server) -> Any:
            first = min(self.timeout, _FIRST_CONNECTION)
            return open_client(
                key=key,
                base_url=server.url,
                timeout=self.timeout,
                connect=self.timeout if server.is_reached else first,
                # A proxy named in the environment is not meant for this machine itself.
                proxies=not access.is_loopback(server.url),
                tokens=max((r.sampling.n * self.dialect.limit(r) for r in requests), default=0),
            )

        async with contextlib.AsyncExitStack() as stack:
            clients = {
                server: await stack.enter_async_context(client(server))
                for server in self._servers.every
            }
            count = min(self.concurrency, len(requests))
            workers = [asyncio.create_task(work()) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            except Exception:
                halted.set()
                if self.usage.replies:  # those under way may bring more, and are paid for
                    await asyncio.gather(*workers, return_exceptions=True)
                raise
            finally:
                # Until all have ended: `wait_for` loses a cancellation that meets a reply.
                while left := [worker for worker in workers if not worker.done()]:
                    for worker in left:
                        worker.cancel()
                    await asyncio.wait(left, timeout=0.1)

    def _look_for_answer(self, choices: Sequence[Choice]) -> None:
        """Raises UsageError where the first replies hold none."""
        # What a filter withheld concerns one prompt.
        self.has_answered = any(
            not choice.problem or choice.finish_reason == "content_filter" for choice in choices
        )
        self._empty += not self.has_answered
        if self._empty == _FIRST_EMPTY:
            raise UsageError(
                f"{self!r}: each of the first {self._empty} replies is empty: {choices[0].problem}"
            )

    async def _ask(
        self, clients: dict[Server, Any], request: ChatRequest, key: str, halted: asyncio.Event
    ) -> Reply | str:
        choices: list[Choice] = []
        failed: list[Server] = []
        n, limit = request.sampling.n, self.dialect.limit(request)
        spent = Usage()  # of tokens
        tries, last, reason = 0, "", ""
        while len(choices) < n:
            stop = self._stop_reason()
            if halted.is_set() or stop:
                self.stopped = stop or self.stopped
                again = " again" if choices or last else ""
                reason = f"not asked{again}: {stop or 'another request ended the run'}{last}"
                break
            body = self.dialect.body(request, len(choices))
            counted = (0, 0)
            try:
                self.usage.requests += 1
                with self._servers.least_loaded(failed) as server:
                    create = clients[server].chat.completions.with_raw_response.create
                    response = await asyncio.wait_for(create(**body), self.timeout)
                reply = chat.parse_reply(response.content)
                counted = chat.read_usage(reply)
                self.usage.add(*counted)
                spent.add(*counted)
                self._tells_ends |= chat.tells_ends(reply)
                missing = n - len(choices)
                choices += chat.read_choices(
                    reply,
                    key,
                    n=missing,
                    told=self._tells_ends,
                    limit=limit,
                    tools=bool(request.tools),
                )
            except Exception as error:
                trouble = retries.judge(
                    error, body, self.dialect.refused, key, request.any_temperature
                )
                self._servers.note_failure(server, trouble)
                if trouble.lost and not any(counted):
                    self.usage.lost += 1
                    # The answers are taken to be as long as they may be: it is the long ones that
                    # come too late.
                    guess = request.guessed_tokens, limit * body.get("n", 1)
                    self.usage.add(*guess)
                    spent.add(*guess)
                if trouble.then == "adapt":
                    self.dialect.adapt(trouble, request)
                    continue
                failed.append(server)
                moves = self._moves(trouble, server, failed)
                if moves or tries < self._most_retries(trouble, server):
                    logger.debug("%s: trying again: %s", self.model, trouble.reason)
                    last = f"; the last try: {trouble.reason}"
                    self.usage.retries += 1
                    if not moves:
                        await self._rest(tries, trouble, halted)
                        tries += 1
                else:
                    reason = self._give_up(trouble, tries, server)
                    break
            else:
                self._servers.note_reply(server, is_trial=self._is_trial)
                self._given_up_in_a_row = 0
                self.usage.replies += 1
                self.usage.uncounted += not any(counted)
        if not choices:
            return reason
        own_temperature = request.any_temperature and "temperature" in self.dialect.refused
        return Reply(choices, reason, own_temperature, spent.prompt_tokens, spent.answer_tokens)

    def _moves(self, trouble: retries.Trouble, server: Server, failed: Sequence[Server]) -> bool:
        """Whether a request goes on at another server, at once, rather than wait for this one."""
        refuses = trouble.then == "stop"
        away = trouble.unreachable or refuses or trouble.status == 429  # it is busy
        return away and not self._ends(trouble, server) and self._servers.has_other(failed)

    def _most_retries(self, trouble: retries.Trouble, server: Server) -> int:
        if trouble.then == "once":
            # Where replies have come, a page or a stream in place of one will pass.
            passes = server.replies and trouble.advice
            return self.max_retries if passes else min(1, self.max_retries)
        if trouble.then != "again":
            return 0
        if trouble.unreachable and not self._servers.is_reached:
            # No server there: said at once, rather than after all the pauses.
            return min(self.max_retries, 0 if trouble.reason.endswith("in time") else 1)
        return self.max_retries

    async def _rest(self, tries: int, trouble: retries.Trouble, halted: asyncio.Event) -> None:
        seconds = retries.pause(tries, trouble.retry_after)
        if seconds > 1.2 * retries.LONGEST_PAUSE:
            logger.warning("%r asks to wait for %.0f s (%s)", self, seconds, trouble.reason)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(halted.wait(), seconds)

    def _ends(self, trouble: retries.Trouble, server: Server) -> bool:
        """Whether a failure concerns all requests."""
        # A server that has answered may refuse one request by any status; not so its key, the
        # credit and the quota, nor for a wait of hours.
        lasts = trouble.status in _LASTING or trouble.retry_after is not None
        ends = {
            "stop": lasts or not server.replies,
            "once": bool(trouble.advice) and not server.replies,
            # A request that tries the endpoint out is not refused for its text.
            "unclear": self._is_trial or (server.unclear >= _UNCLEAR and not server.has_replied),
        }.get(trouble.then, False)
        # In a trial a refused parameter is the length limit: no prompt is too long for it there.
        return ends or (self._is_trial and bool(trouble.parameter))

    def _give_up(self, trouble: retries.Trouble, tries: int, server: Server) -> str:
        """The reason for one failure; raises UsageError where it concerns all requests."""
        server.unclear += trouble.then == "unclear" and not server.has_replied
        if self._ends(trouble, server):
            # `from None`: a traceback would show the client's own error too, with the key, maybe.
            raise retries.refusal(trouble, self.model, server.url, self.api_key_env) from None
        if trouble.then in ("again", "once", "stop") and not trouble.parameter:
            self._given_up_in_a_row += 1
        if trouble.then in ("again", "once"):
            return f"given up after {tries + 1} tries; the last one: {trouble.reason}"
        return trouble.reason

    def _stop_reason(self) -> str:
        """Why no request may start any more, if so."""
        if self._given_up_in_a_row >= max(4, self.concurrency):
            return f"{self._given_up_in_a_row} requests before it failed one after another"
        for name, budget, spent in self._budgets():
            if spent >= budget:
                return f"the {name} budget of {budget:,} is spent"
            if self.usage.uncounted:
                return f"there is a {name} budget, and replies say no count of tokens"
        return ""

    def _budgets(self) -> Iterator[tuple[str, float, float]]:
        """Names of those that are set, their limits, and what is spent of them."""
        if self.token_budget is not None:
            yield "token", self.token_budget, self.usage.tokens
        if self.cost_budget is not None:
            yield "cost", self.cost_budget, self.usage.cost or 0.0

    def _check(self) -> None:
        require_packages("openai")
        if not self.model:
            raise UsageError("no model is named; write openai:MODEL")
        for name in ("concurrency", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("token_budget", "cost_budget"):
            if (budget := getattr(self, name)) is not None and not budget > 0:
                raise UsageError(f"{name} must be positive, not {budget}")
        for name in ("max_retries", "reasoning_tokens"):
            check_weight(name, getattr(self, name))
        for price in self.prices or ():
            check_weight("prices", price)
        if self.cost_budget is not None and self.prices is None:
            raise UsageError("cost_budget needs prices; give them, or a token_budget instead")
        access.read_key(self.api_key_env, self._urls)
        for url in self._urls:
            access.warn_of_clear_text(url)
