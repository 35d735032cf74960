"""What ends a run of requests, what changes them, and what they may cost."""

from __future__ import annotations

import collections
import json
import logging
import socket

import pytest

pytest.importorskip("openai")

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.access import check_variable, one_line, warn_of_clear_text
from plad_fast.pairs.generation.endpoint.chat import ChatRequest
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.endpoint.refusals import find_refusal
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from plad_fast.recipe.settings import DistillConfig
from tests.support.fault_server import FaultServer, Step, answer_to, said
from tests.support.reply_fuzz import Fuzzed, install

CHAT = [{"role": "user", "content": "chat"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def model(server, **options):
    options = {"max_retries": 6, "timeout": 5, "first_pause": 0.005, "concurrency": 1, **options}
    return EndpointModel(Endpoint("m", base_url=server.url, **options), "teacher")


def generate(teacher, questions, sampling=None):
    prompts = [Prompt(q, q) for q in questions]
    return [i for batch in teacher.generate(prompts, sampling or Sampling()) for i in batch]


def refused(message, status=400, **error):
    return Step("status", status, {"error": {"message": message, **error}})


LIMIT_MESSAGES = [
    "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
    "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less "
    "than the `context_window` for this model",
    "max_tokens is too large: 10000. This model supports at most 8192 completion tokens, whereas "
    "you provided 10000.",
    "max_tokens: ensure this value is less than or equal to 8192",
    "max_tokens: 10000 > 8192, which is the maximum allowed number of output tokens",
    "it has a maxOutputTokens value of 10000 but the supported range is from 1 to 8193",
    "'max_tokens' or 'max_completion_tokens' is too large: 10000",
    "Range of max_tokens should be [1, 8192]",
    "max_tokens is illegal",
    "The value of max_tokens is not supported by this model",
    "max_tokens=10000 is not supported",
    "max_tokens is not supported, the limit is 8192",
]


@pytest.mark.parametrize("message", LIMIT_MESSAGES)
def test_a_limit_that_is_refused_for_its_value_is_the_users_to_lower(message):
    def step(question, tries, body):
        return refused(message) if body.get("max_tokens", 0) > 8192 else Step()

    with FaultServer(step) as server:
        for options in ({}, {"reasoning_tokens": 9990}):
            sampling = Sampling(10000 - options.get("reasoning_tokens", 0))
            with pytest.raises(UsageError, match="--max-new-tokens, or --reasoning-tokens"):
                model(server, **options).try_out(sampling)
            with pytest.raises(UsageError, match="--max-new-tokens, or --reasoning-tokens"):
                generate(model(server, **options), "ab", sampling)
        assert sum(server.asked.values()) == 4
        # Of what the server does not know it sees no limit at all.
        assert all(body["max_tokens"] == 10000 for body in server.bodies)
        assert "max_completion_tokens" not in {name for body in server.bodies for name in body}


def test_a_list_of_errors_that_quotes_its_input_is_read_alike():
    detail = {
        "type": "less_than_equal",
        "loc": ["body", "max_tokens"],
        "msg": "Input should be less than or equal to 32",
        "input": 64,
    }
    with FaultServer(lambda *_: Step("status", 422, {"detail": [detail]})) as server:
        with pytest.raises(UsageError, match="--max-new-tokens"):
            generate(model(server), "ab")
        assert sum(server.asked.values()) == 1


def test_a_limit_that_is_too_long_for_one_prompt_fails_that_one():
    message = (
        "'max_tokens' is too large: 64. This model's maximum context length is 4096 tokens and "
        "your request has 4090 input tokens"
    )
    with FaultServer(lambda q, *_: refused(message) if q == "a" else Step()) as server:
        found = generate(model(server), "abc")
        assert server.asked == {"a": 1, "b": 1, "c": 1}
    assert [type(item) for item in found] == [Failure, Answer, Answer]
    # To a word no prompt is too long.
    with (
        FaultServer(lambda *_: refused(message)) as server,
        pytest.raises(UsageError, match="--max-new-tokens"),
    ):
        model(server).try_out(Sampling())


@pytest.mark.parametrize(
    ("message", "of"),
    [
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
         "'max_completion_tokens' instead.", "name"),
        ("max_tokens is deprecated in favor of max_completion_tokens", "name"),
        ("Please use max_completion_tokens; max_tokens has no effect", "name"),
        ("Unrecognized request argument supplied: max_tokens", "name"),
        ("[{'type': 'extra_forbidden', 'loc': ['body', 'max_tokens']}]", "name"),
        ("<400> InternalError: Unsupported parameter max_tokens", "name"),
        *((message, "value") for message in LIMIT_MESSAGES),
    ],
)  # fmt: skip
def test_the_name_of_the_limit_is_told_from_its_value(message, of):
    assert find_refusal("", message, {"max_tokens": 10000}) == ("max_tokens", of)


@pytest.mark.parametrize(
    "message",
    [
        "Unknown parameter: max_tokens",
        "'max_tokens' is not supported for the requested model",
        "[{'loc': ['body', 'max_tokens'], 'msg': 'Extra inputs are not permitted', 'input': 64}]",
    ],
)
def test_the_name_is_switched_once_and_the_limit_stays(message):
    def step(question, tries, body):
        return refused(message) if "max_tokens" in body else Step()

    with FaultServer(step) as server:
        found = generate(model(server, concurrency=3), "abcdef", Sampling(64))
        assert all(isinstance(item, Answer) for item in found)
        assert server.bodies[-1]["max_completion_tokens"] == 64
        assert server.faults["status"] <= 3


@pytest.mark.parametrize(
    ("sampling", "message", "says"),
    [
        (Sampling(64, top_p=0.9), "Unsupported parameter: 'top_p' is not supported", "top_p at 1"),
        (Sampling(64, top_p=0.9), "top_p must be between 0 and 0.5", "top_p at 1"),
        (Sampling(64, temperature=2.5), "temperature must be <= 2", "--teacher-temperature"),
        (Sampling(64, temperature=0.0), "`temperature` 0.0 must be > 0", "--teacher-temperature"),
        (Sampling(64, temperature=1.0), "temperature must be below 1", "--teacher-temperature"),
        (
            Sampling(64, temperature=0.7, top_p=0.9),
            "temperature and top_p cannot both be specified for this model",
            "--teacher-temperature 1",
        ),
        (Sampling(64), "This model only support stream mode, please enable it", "no streams"),
    ],
)
def test_what_cannot_be_left_out_is_named_with_its_setting(sampling, message, says):
    with FaultServer(lambda *_: refused(message)) as server:
        with pytest.raises(UsageError, match=says):
            model(server).try_out(sampling)
        assert sum(server.asked.values()) == 1


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("n", "'n' : number must be at most 1"),
        ("n", "Invalid n value (currently only n = 1 is supported)"),
        ("n", "n must be 1"),
        ("seed", "seed: Extra inputs are not permitted"),
        ("seed", "seed must be less than 65536"),
        ("temperature", "temperature is not supported by this model"),
    ],
)
def test_what_can_be_left_out_is(parameter, message):
    def step(question, tries, body):
        many = [said(f"{tries} {k}") for k in range(body.get("n", 1))]
        return refused(message) if parameter in body else Step(choices=many)

    with FaultServer(step) as server:
        found = generate(model(server), "abc", Sampling(64, n=2, temperature=1.0))
        assert all(isinstance(item, Answer) for item in found)
        assert server.faults["status"] == 1


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
        return Step(delay=0.3) if question == "c" else Step()

    with FaultServer(step) as server:
        replies = model(server, concurrency=2).endpoint.complete(
            [ChatRequest([{"role": "user", "content": q}], 5) for q in "abcdefgh"]
        )
        found: list[int] = []
        with pytest.raises(UsageError, match="run the same command again"):
            collections.deque((found.append(index) for index, _ in replies), maxlen=0)
        assert sorted(found) == [0, 1, 2]
        assert sum(server.asked.values()) == 4


def test_a_quota_of_a_minute_is_waited_for():
    busy = Step("status", 429, {"error": {"message": "60 requests per minute"}})
    with FaultServer(lambda _, tries, __: Step() if tries else busy) as server:
        assert generate(model(server), "a")[0].text == answer_to("a")


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
            generate(model(server), "abcd")
        assert sum(server.asked.values()) == 2
    # A page in place of a reply, among replies, will pass.
    with FaultServer(
        lambda q, tries, _: Step(body=body) if q == "b" and tries < 3 else Step()
    ) as server:
        found = generate(model(server), "abc")
    assert all(isinstance(item, Answer) for item in found)


def test_a_status_of_one_request_is_its_own_where_others_have_replies():
    def step(question, *_):
        return Step("status", 404, {"error": "no route"}) if question == "b" else Step()

    with FaultServer(step) as server:
        found = generate(model(server), "abc")
    assert [type(item) for item in found] == [Answer, Failure, Answer]
    assert "no route" in found[1].reason


def test_redirections_are_followed_within_the_server_alone():
    with FaultServer() as other:
        for target, status in ((f"{other.url}/chat/completions", 307), (other.url, 302)):
            moved = Step("status", status, {}, headers={"location": target})
            with FaultServer(lambda *_, moved=moved: moved) as server:
                with pytest.raises(UsageError, match=r"redirection to .*--base-url"):
                    generate(model(server), "ab")
                assert sum(server.asked.values()) == 1
        assert not other.asked
    here = Step("status", 308, {}, headers={"location": "/v1/chat/completions/"})
    with FaultServer(lambda _, tries, __: Step() if tries else here) as server:
        assert generate(model(server), "a")[0].text == answer_to("a")
    for_ever = Step("status", 308, {}, headers={"location": "/v1/chat/completions/"})
    with (
        FaultServer(lambda *_: for_ever) as server,
        pytest.raises(UsageError, match="redirection"),
    ):
        generate(model(server), "a")


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (Step("hang"), {"timeout": 0.2}),
        (Step("malformed"), {}),
        (Step("cut"), {}),
        (Step(body={"choices": []}), {}),
    ],
)
def test_what_was_paid_for_and_did_not_come_counts_at_an_estimate(step, options):
    with FaultServer(lambda *_: step) as server:
        teacher = model(server, token_budget=500, max_retries=9, **options)
        found = generate(teacher, "ab", Sampling(200))
        # A prompt of a few tokens and 200 of an answer: three are more than the budget.
        assert sum(server.asked.values()) == 3
    assert "budget of 500 is spent" in found[0].reason
    usage = teacher.endpoint.usage
    assert usage.lost == 3
    assert 600 < usage.tokens < 700
    assert "3 without a reply that could be read" in str(usage)


def test_what_cannot_have_been_paid_for_costs_nothing():
    with FaultServer(lambda *_: Step("status", 503)) as server:
        teacher = model(server, token_budget=500, max_retries=2)
        generate(teacher, "ab", Sampling(200))
    assert teacher.endpoint.usage.tokens == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_endpoint_that_is_not_there_says_so_at_once(host, monkeypatch):
    """Not after all the pauses between tries that a server gets which is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits = []
    monkeypatch.setattr(
        "plad_fast.pairs.generation.endpoint.chat_endpoint.pause",
        lambda *_, **__: waits.append(1) or 0.0,
    )
    teacher = EndpointModel(Endpoint("m", base_url=f"http://{host}:{port}/v1"), "teacher")
    with pytest.raises(UsageError, match=f"{host}:{port}.*no connection"):
        teacher.try_out(Sampling())
    assert len(waits) == 1
    ((_, reason),) = teacher.endpoint.complete([ChatRequest(CHAT, 5)])
    assert "given up after 2 tries" in reason


def test_a_server_that_was_there_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(
        "plad_fast.pairs.generation.endpoint.chat_endpoint.pause",
        lambda *_, **__: waits.append(1) or 0.0,
    )
    body = json.dumps({"choices": [said("4")]}).encode()

    def gone_after_one(httpx, request):
        if served.replies > 1:
            raise httpx.ConnectError("refused", request=request)
        return Fuzzed(200, [], lambda: [body])

    served = install(monkeypatch, gone_after_one)
    found = generate(
        EndpointModel(Endpoint("m", base_url="http://127.0.0.1:1/v1", concurrency=1)), "ab"
    )
    assert [type(item) for item in found] == [Answer, Failure]
    assert len(waits) == 6


def test_a_server_that_takes_no_connection_is_given_seconds_in_a_trial(monkeypatch):
    """A firewall that drops what is sent; a whole request may take a minute."""
    asked = []

    def dropped(httpx, request):
        asked.append(request.extensions["timeout"]["connect"])
        raise httpx.ConnectTimeout("", request=request)

    install(monkeypatch, dropped)
    teacher = EndpointModel(Endpoint("m", base_url="http://127.0.0.1:1/v1", first_pause=0.001))
    with pytest.raises(UsageError, match="no connection in time"):
        teacher.try_out(Sampling())
    assert len(asked) == 1
    assert asked[0] < 5
    teacher.endpoint._is_reached = True
    list(teacher.endpoint.complete([ChatRequest(CHAT, 5)]))
    assert asked[1:] == [60.0] * 7


def test_what_a_terminal_would_obey_is_replaced():
    evil = "\x1b]0;title\x07red\x1b[31m \x9b2J \u202eright\u2066 \x00\ud83d end"
    assert (
        one_line(evil)
        == "\ufffd]0;title\ufffdred\ufffd[31m \ufffd2J \ufffdright\ufffd \ufffd\ufffd end"
    )
    with FaultServer(lambda *_: refused(evil)) as server, pytest.raises(UsageError) as caught:
        generate(model(server), "abcd")
    assert str(caught.value).replace("\ufffd", "").isprintable()


@pytest.mark.parametrize(
    "key", ["gsk_a1B2c3D4e5F6", "hf_abcdefghijklmn", "sk_live_0123456789", "AIzaSyD3abc", "r8_Ab3",
            "AKIAIOSFODNN7EXAMPLE", "0123456789abcdef", "xai-0123", "MY_API"]
)  # fmt: skip
def test_a_key_in_place_of_its_name_is_refused_and_not_shown(key):
    for make in (
        lambda: DistillConfig(api_key_env=key),
        lambda: Endpoint("m", base_url="http://127.0.0.1:1/v1", api_key_env=key),
    ):
        with pytest.raises(UsageError, match="--api-key-env") as caught:
            make()
        assert key not in str(caught.value)


def test_names_of_variables_are_taken(monkeypatch):
    for name in ("OPENROUTER_API_KEY", "HF_TOKEN", "OPENAI_API_KEY_2", "MY_APIKEY", "_KEY"):
        check_variable(name)
    monkeypatch.setenv("mine", "0123456789")
    check_variable("mine")


def test_a_remote_address_in_clear_is_warned_of_once(caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        Endpoint("m", base_url="http://clear.example.org/v1")
        Endpoint("m", base_url="https://safe.example.org/v1")
        Endpoint("m", base_url="http://127.0.0.1:1/v1")
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "http://clear.example.org/v1 is not encrypted" in warning
    warn_of_clear_text.cache_clear()


def test_a_parameter_that_the_error_names_is_the_one():
    sent = {"max_tokens": 5, "temperature": 1.0, "seed": 3}
    said_of_all = "temperature and seed are not supported; max_tokens is at most 9"
    assert find_refusal("seed", said_of_all, sent) == ("seed", "value")
    assert find_refusal("", said_of_all, sent) == ("max_tokens", "value")
    assert find_refusal("nothing", "no", sent).parameter == ""
