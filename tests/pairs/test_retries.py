"""Failed requests: tried again, given up, or the end of a run."""

from __future__ import annotations

import collections
import email.utils
import json
import socket
import time
import traceback

import pytest

pytest.importorskip("openai")

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.chat import ChatRequest
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.endpoint.retries import (
    LONGEST_ASKED,
    LONGEST_PAUSE,
    pause,
    retry_after,
)
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from tests.support.endpoints import (
    CHAT,
    KEY,
    NOBODY,
    NOWHERE,
    PAUSE,
    answers,
    generate,
    refused,
    teacher,
)
from tests.support.fault_server import FaultServer, Step, answer_to, said
from tests.support.reply_fuzz import Fuzzed, install

pytestmark = pytest.mark.usefixtures("key")


def test_waits():
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({"retry-after": "-1"}) is None
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 97 < retry_after({"retry-after": later}) < 101
    assert retry_after({"retry-after": email.utils.formatdate(0)}) == 0
    for tries, most in [(0, 0.005), (1, 0.01), (2, 0.02), (20, LONGEST_PAUSE)]:
        waits = [pause(tries, None) for _ in range(50)]
        assert most / 2 <= min(waits) <= max(waits) <= most
    assert 5 <= pause(0, 5) <= 5.1
    assert 300 <= pause(0, 300) <= 301
    assert pause(0, 1e9) <= LONGEST_ASKED + 1


def test_the_wait_that_is_asked_for_is_kept_to():
    with FaultServer(
        lambda _, tries, __: (
            Step() if tries else Step("status", 429, headers={"retry-after": "0.4"})
        )
    ) as server:
        answers(server, ["a"])
        assert 0.4 <= server.times[1] - server.times[0] < 2


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (Step("status", 401, {"error": {"message": f"Incorrect API key: {KEY}"}}), "set OPENAI_"),
        (Step("status", 402, {"error": {"message": f"no credit for {KEY}"}}), "add credit"),
        (Step("status", 403, {"detail": f"{KEY} may not"}), r"\*\*\* may not"),
        (Step("status", 404, {"error": f"no model for {KEY}"}), "--base-url"),
        (Step("status", 429, {"error": {"code": "insufficient_quota"}}), "quota"),
        (Step("status", 400, {"error": {"message": "temperature too high"}}), "too high"),
    ],
)
def test_what_all_requests_would_meet_ends_the_run_at_once(step, says):
    with FaultServer(lambda *_: step) as server:
        with pytest.raises(UsageError, match=says) as caught:
            answers(server, [f"q{i}" for i in range(50)], Sampling(temperature=2.0), concurrency=2)
        assert sum(server.asked.values()) <= 5
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "error",
    [
        {"message": "This model's maximum context length is 4096 tokens; reduce max_tokens"},
        {"message": "no", "code": "content_filter"},
        {"message": "Your input was flagged by moderation"},
        {"message": "for some reason"},
    ],
)
def test_a_prompt_that_is_refused_fails_alone(error):
    """Even the first; what nobody can explain concerns one prompt while others get replies."""
    bad = Step("status", 403 if "flagged" in error["message"] else 400, {"error": error})
    with FaultServer(lambda question, *_: bad if question in "adefg" else Step()) as server:
        items = answers(server, list("abcdefg"), concurrency=1)
        assert server.asked == dict.fromkeys("abcdefg", 1)
    failed = [item for item in items.values() if isinstance(item, Failure)]
    assert "".join(item.prompt_id for item in failed) == "adefg"
    assert error["message"][:20] in failed[0].reason


def test_a_status_of_one_request_is_its_own_where_others_have_replies():
    def step(question, *_):
        return Step("status", 404, {"error": "no route"}) if question == "b" else Step()

    with FaultServer(step) as server:
        found = generate(teacher(server), "abc")
    assert [type(item) for item in found] == [Answer, Failure, Answer]
    assert "no route" in found[1].reason


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"message": "limit: 50 PerDay. Please retry in 34.07s."}, {}),
        ({"message": "Rate limit reached on requests per day (RPD): Limit 200"}, {}),
        ({"message": "tokens per day (TPD): Limit 100000. Try again in 12m"}, {}),
        ({"message": "Your daily quota is exhausted"}, {}),
        ({"message": "free-models-per-day"}, {}),
        ({"message": "slow", "details": [{"quotaId": "RequestsPerDayPerProject"}]}, {}),
        ({"message": "slow down"}, {"retry-after": "86400"}),
    ],
)
def test_a_quota_of_a_day_stops_the_run_at_once(body, headers):
    """What has come before is handed out, and what was under way comes."""
    full = Step("status", 429, {"error": body}, headers=headers)

    def step(question, tries, _):
        if question == "d":
            return full
        return Step(delay=0.1) if question == "c" else Step()

    with FaultServer(step) as server:
        replies = teacher(server, concurrency=2).endpoint.complete(
            [ChatRequest([{"role": "user", "content": q}], Sampling(5)) for q in "abcdefgh"]
        )
        found: list[int] = []
        with pytest.raises(UsageError, match="run the same command again"):
            collections.deque((found.append(index) for index, _ in replies), maxlen=0)
        assert sorted(found) == [0, 1, 2]
        assert sum(server.asked.values()) == 4


def test_a_quota_of_a_minute_is_waited_for():
    busy = Step("status", 429, {"error": {"message": "60 requests per minute"}})
    with FaultServer(lambda _, tries, __: Step() if tries else busy) as server:
        assert generate(teacher(server), "a")[0].text == answer_to("a")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html><body>Welcome</body></html>", "web page"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html>", "web page"),
        (b'data: {"choices":[]}\n\ndata: [DONE]\n\n', "stream of events"),
        (b": keep-alive\n\ndata: [DONE]", "stream of events"),
    ],
)
def test_what_no_chat_api_says_is_tried_once_more_and_ends_the_run(body, says):
    with FaultServer(lambda *_: Step(body=body)) as server:
        with pytest.raises(UsageError, match=f"{says}.*--base-url"):
            generate(teacher(server), "abcd")
        assert sum(server.asked.values()) == 2
    # A page in place of a reply, among replies, will pass.
    with FaultServer(
        lambda q, tries, _: Step(body=body) if q == "b" and tries < 3 else Step()
    ) as server:
        found = generate(teacher(server, max_retries=3), "abc")
    assert all(isinstance(item, Answer) for item in found)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_endpoint_that_is_not_there_says_so_at_once(host, monkeypatch):
    """Not after all the pauses between tries that a server gets which is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits = []
    monkeypatch.setattr(PAUSE, lambda *_, **__: waits.append(1) or 0.0)
    teacher = EndpointModel(Endpoint("m", base_url=f"http://{host}:{port}/v1"), "teacher")
    with pytest.raises(UsageError, match=f"{host}:{port}.*no connection"):
        teacher.try_out(Sampling(), NOWHERE)
    assert len(waits) == 1
    ((_, reason),) = teacher.endpoint.complete([ChatRequest(CHAT, Sampling(5))])
    assert "given up after 2 tries" in reason


def test_a_server_that_was_there_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(PAUSE, lambda *_, **__: waits.append(1) or 0.0)
    body = json.dumps({"choices": [said("4")]}).encode()

    def gone_after_one(httpx, request):
        if served.replies > 1:
            raise httpx.ConnectError("refused", request=request)
        return Fuzzed(200, [], lambda: [body])

    served = install(monkeypatch, gone_after_one)
    found = generate(EndpointModel(Endpoint("m", base_url=NOBODY, concurrency=1)), "ab")
    assert [type(item) for item in found] == [Answer, Failure]
    assert len(waits) == 6


def test_a_server_that_takes_no_connection_is_given_seconds_in_a_trial(monkeypatch):
    """A firewall that drops what is sent; a whole request may take a minute."""
    asked = []

    def dropped(httpx, request):
        asked.append(request.extensions["timeout"]["connect"])
        raise httpx.ConnectTimeout("", request=request)

    install(monkeypatch, dropped)
    teacher = EndpointModel(Endpoint("m", base_url=NOBODY))
    with pytest.raises(UsageError, match="no connection in time"):
        teacher.try_out(Sampling(), NOWHERE)
    assert len(asked) == 1
    assert asked[0] < 5
    teacher.endpoint._servers.every[0].is_reached = True
    list(teacher.endpoint.complete([ChatRequest(CHAT, Sampling(5))]))
    assert asked[1:] == [60.0] * 7


def test_retries_of_the_client_itself_would_break_promises():
    """Why they are off: it asks on where a quota of the day is spent, and waits no five minutes."""
    import openai

    full = refused("requests per day: limit 200", 429)
    for step in (full, Step("status", 429, full.body, headers={"retry-after": "300"})):
        with FaultServer(lambda *_, step=step: step) as server:
            client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=1)
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="m", messages=CHAT)
            asked, times = sum(server.asked.values()), server.times
            assert asked == 2 or step.headers
            assert asked == 1 or times[1] - times[0] < 30  # gives up, or is back too early
