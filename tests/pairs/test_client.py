"""Bounded replies from the server that was asked, until nobody reads on."""

from __future__ import annotations

import random
import re
import time
import tracemalloc

import pytest

pytest.importorskip("openai")

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Reply
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.client import most_bytes
from plad_fast.pairs.generation.sampling import Sampling
from tests.support.endpoints import NOBODY, PAUSE, endpoint, generate, teacher
from tests.support.fault_server import FaultServer, Step, answer_to
from tests.support.reply_fuzz import PIECE, Fuzzed, any_reply, bomb, install

pytestmark = pytest.mark.usefixtures("key")


REQUEST = ChatRequest(
    [{"role": "user", "content": "2+2?"}], Sampling(64, n=2, temperature=0.7, seed=1)
)
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def asked(question):
    return ChatRequest([{"role": "user", "content": question}], Sampling(5))


def test_redirections_are_followed_within_the_server_alone():
    with FaultServer() as other:
        for target, status in ((f"{other.url}/chat/completions", 307), (other.url, 302)):
            moved = Step("status", status, {}, headers={"location": target})
            with FaultServer(lambda *_, moved=moved: moved) as server:
                with pytest.raises(UsageError, match=r"redirection to .*--base-url"):
                    generate(teacher(server), "ab")
                assert sum(server.asked.values()) == 1
        assert not other.asked
    here = Step("status", 308, {}, headers={"location": "/v1/chat/completions/"})
    with FaultServer(lambda _, tries, __: Step() if tries else here) as server:
        assert generate(teacher(server), "a")[0].text == answer_to("a")
    again = Step("status", 308, {}, headers={"location": "/v1/chat/completions/"})
    with (
        FaultServer(lambda *_: again) as server,
        pytest.raises(UsageError, match="redirection"),
    ):
        generate(teacher(server), "a")


def test_reading_may_stop_at_any_answer():
    """What is under way then is cancelled: the endpoint here would hang for half a minute."""

    def step(question, tries, body):
        return Step() if question == "0" else Step("hang")

    with FaultServer(step) as server:
        requests = [asked(f"{i}") for i in range(20)]
        replies = endpoint(server, timeout=30, concurrency=4).complete(requests)
        assert next(replies)[0] == 0
        start = time.monotonic()
        replies.close()
        assert time.monotonic() - start < 2
        assert list(replies) == []


def test_no_request_starts_once_nobody_reads():
    """Some replies come at the very moment of the cancelling, which must not get lost."""
    requests = [asked(f"{i}") for i in range(300)]
    with FaultServer() as server:
        for _ in range(8):
            server.asked.clear()
            replies = endpoint(server, concurrency=8).complete(requests)
            next(replies)
            replies.close()
            assert sum(server.asked.values()) < 100


@pytest.mark.parametrize("seed", range(4))
def test_no_reply_ends_a_run_otherwise_than_by_a_message(seed, monkeypatch):
    monkeypatch.setattr(PAUSE, lambda *_, **__: 0.0)
    chance = random.Random(seed)
    served = install(monkeypatch, lambda *_: any_reply(chance))
    messages: list[str] = []
    counts = {"answers": 0, "failures": 0}
    while served.replies < 500:
        # So many at once that failures in a row do not end it before.
        options = {"concurrency": 50, "max_retries": seed % 2, "prices": (1.0, 2.0)}
        endpoint = Endpoint("m", base_url=NOBODY, **options)
        try:
            for _, reply in endpoint.complete([REQUEST] * 50):
                if isinstance(reply, Reply):
                    counts["answers"] += 1
                    for choice in reply.choices:
                        choice.text.encode()
                        assert CONTROLS.search(choice.problem) is None
                    reply = reply.missing
                else:
                    counts["failures"] += 1
                    assert reply
                assert CONTROLS.search(reply) is None
                assert len(reply) < 600
        except UsageError as error:
            messages.append(str(error))
        assert 0 <= endpoint.usage.tokens < 10**12
        str(endpoint.usage)
    assert all(counts.values()), counts
    assert messages
    assert not any(map(CONTROLS.search, messages))
    # Two choices of 64 tokens were asked for; what came last was one piece too many.
    assert max(served.read) <= most_bytes(2 * 64) + PIECE


@pytest.mark.parametrize("status", [200, 500])
def test_a_small_body_does_not_grow_without_bound(status, monkeypatch):
    data = bomb(400 * 2**20)
    assert len(data) < 2**20

    def make(*_):
        headers = [(b"content-encoding", b"gzip")]
        pieces = (data[i : i + 2**14] for i in range(0, len(data), 2**14))
        return Fuzzed(status, headers, lambda: pieces)

    monkeypatch.setattr(PAUSE, lambda *_, **__: 0.0)
    install(monkeypatch, make)
    tracemalloc.start()
    try:
        ((_, reply),) = Endpoint("m", base_url=NOBODY, max_retries=1).complete([REQUEST])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "longer than" in reply
    assert peak < 100 * 2**20
