"""Whatever an endpoint replies, it is an answer, a failure with a reason, or a message."""

from __future__ import annotations

import random
import re
import tracemalloc

import pytest

pytest.importorskip("openai")

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint import chat_endpoint as module
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Reply
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.client import most_bytes
from tests.support.reply_fuzz import PIECE, Fuzzed, any_reply, bomb, install

REQUEST = ChatRequest([{"role": "user", "content": "2+2?"}], 64, n=2, temperature=0.7, seed=1)
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(module, "pause", lambda *_, **__: 0.0)


def make_endpoint(**options):
    return Endpoint("m", base_url="http://127.0.0.1:1/v1", **options)


@pytest.mark.parametrize("seed", range(4))
def test_no_reply_ends_a_run_otherwise_than_by_a_message(seed, monkeypatch):
    chance = random.Random(seed)
    served = install(monkeypatch, lambda *_: any_reply(chance))
    messages: list[str] = []
    counts = {"answers": 0, "failures": 0}
    while served.replies < 500:
        # So many at once that failures in a row do not end it before.
        endpoint = make_endpoint(concurrency=50, max_retries=seed % 2, prices=(1.0, 2.0))
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


@pytest.mark.parametrize("status", [200, 500, 404])
def test_a_small_body_does_not_grow_without_bound(status, monkeypatch):
    data = bomb(400 * 2**20)
    assert len(data) < 2**20

    def make(*_):
        headers = [(b"content-encoding", b"gzip")]
        pieces = (data[i : i + 2**14] for i in range(0, len(data), 2**14))
        return Fuzzed(status, headers, lambda: pieces)

    install(monkeypatch, make)
    tracemalloc.start()
    try:
        ((_, reply),) = make_endpoint(max_retries=1).complete([REQUEST])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "longer than" in reply
    assert peak < 100 * 2**20
