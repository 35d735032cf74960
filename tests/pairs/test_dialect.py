"""Parameters that a server refuses: left out, renamed, or the user's to change."""

from __future__ import annotations

import pytest

pytest.importorskip("openai")

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.chat import ChatRequest
from plad_fast.pairs.generation.endpoint.dialect import find_refusal
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from tests.support.endpoints import (
    CHAT,
    NOWHERE,
    answers,
    endpoint,
    generate,
    refused,
    refusing,
    teacher,
)
from tests.support.fault_server import FaultServer, Step, answer_to, reasoning, said

pytestmark = pytest.mark.usefixtures("key")


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
        ("Unknown parameter: max_tokens", "name"),
        ("'max_tokens' is not supported for the requested model", "name"),
        *((message, "value") for message in LIMIT_MESSAGES),
    ],
)  # fmt: skip
def test_the_name_of_the_limit_is_told_from_its_value(message, of):
    assert find_refusal("", message, {"max_tokens": 10000}) == ("max_tokens", of)


def test_a_parameter_that_the_error_names_is_the_one():
    sent = {"max_tokens": 5, "temperature": 1.0, "seed": 3}
    said_of_all = "temperature and seed are not supported; max_tokens is at most 9"
    assert find_refusal("seed", said_of_all, sent) == ("seed", "value")
    assert find_refusal("", said_of_all, sent) == ("max_tokens", "value")
    assert find_refusal("nothing", "no", sent).parameter == ""


@pytest.mark.parametrize("message", LIMIT_MESSAGES[:2])
def test_a_limit_that_is_refused_for_its_value_is_the_users_to_lower(message):
    def step(question, tries, body):
        return refused(message) if body.get("max_tokens", 0) > 8192 else Step()

    with FaultServer(step) as server:
        for options in ({}, {"reasoning_tokens": 9990}):
            sampling = Sampling(10000 - options.get("reasoning_tokens", 0))
            with pytest.raises(UsageError, match="--max-new-tokens, or --reasoning-tokens"):
                teacher(server, **options).try_out(sampling, NOWHERE)
            with pytest.raises(UsageError, match="--max-new-tokens, or --reasoning-tokens"):
                generate(teacher(server, **options), "ab", sampling)
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
            generate(teacher(server), "ab")
        assert sum(server.asked.values()) == 1


def test_a_limit_that_is_too_long_for_one_prompt_fails_that_one():
    message = (
        "'max_tokens' is too large: 64. This model's maximum context length is 4096 tokens and "
        "your request has 4090 input tokens"
    )
    with FaultServer(lambda q, *_: refused(message) if q == "a" else Step()) as server:
        found = generate(teacher(server), "abc")
        assert server.asked == {"a": 1, "b": 1, "c": 1}
    assert [type(item) for item in found] == [Failure, Answer, Answer]
    # To a word no prompt is too long.
    with (
        FaultServer(lambda *_: refused(message)) as server,
        pytest.raises(UsageError, match="--max-new-tokens"),
    ):
        teacher(server).try_out(Sampling(), NOWHERE)


@pytest.mark.parametrize(
    "message",
    [
        "[{'loc': ['body', 'max_tokens'], 'msg': 'Extra inputs are not permitted', 'input': 64}]",
    ],
)
def test_the_name_is_switched_once_and_the_limit_stays(message):
    def step(question, tries, body):
        return refused(message) if "max_tokens" in body else Step()

    with FaultServer(step) as server:
        found = generate(teacher(server, concurrency=3), "abcdef", Sampling(64))
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
            teacher(server).try_out(sampling, NOWHERE)
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
        found = generate(teacher(server), "abc", Sampling(64, n=2, temperature=1.0))
        assert all(isinstance(item, Answer) for item in found)
        assert server.faults["status"] == 1


@pytest.mark.parametrize(
    ("refused", "sent"),
    [
        (("seed",), {"temperature": 1.0, "max_tokens": 64, "n": 2}),
        (("n", "seed"), {"temperature": 1.0, "max_tokens": 64}),
        (("max_tokens", "temperature"), {"max_completion_tokens": 64, "n": 2}),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_parameters_that_are_refused_are_left_out(refused, sent, status):
    with FaultServer(refusing(*refused, status=status)) as server:
        items = answers(server, list("abcdef"), Sampling(n=2), concurrency=3)
        assert all(isinstance(item, Answer) for item in items.values())
        # Learnt once, by the requests that were under way.
        assert server.faults["status"] <= 3 * len(refused)
    last = server.bodies[-1]
    assert {k: last[k] for k in last.keys() - {"model", "messages", "seed"}} == sent
    assert ("seed" in last) == ("seed" not in refused)


def test_no_answer_is_asked_for_without_a_limit_to_its_length():
    with FaultServer(refusing("max_tokens", "max_completion_tokens")) as server:
        with pytest.raises(UsageError, match="max_completion_tokens"):
            answers(server, list("abcd"))
        assert all({"max_tokens", "max_completion_tokens"} & body.keys() for body in server.bodies)


def test_a_temperature_that_is_refused_is_the_users_to_change():
    """Answers at another temperature than the one that is recorded would be passed off."""
    with FaultServer(reasoning(0)) as server:
        with pytest.raises(UsageError, match=r"does not support 0 .*give --teacher-temperature 1"):
            answers(server, list("abcdefgh"), Sampling(temperature=0.0), concurrency=1)
        assert server.faults["status"] == 4  # one of them for max_tokens
        assert answers(server, ["a"], Sampling(temperature=1.0))["a", 0].text == answer_to("a")


def test_a_request_may_do_without_its_temperature(caplog):
    """With one warning; a request that needs it still sends it."""
    free = ChatRequest(CHAT, Sampling(5, temperature=0.0), any_temperature=True)
    with FaultServer(reasoning(0)) as server:
        model = endpoint(server)
        replies = [reply for _, reply in model.complete([free] * 12)]
        assert all(reply.own_temperature for reply in replies)
        ((_, refused),) = model.complete([ChatRequest(CHAT, Sampling(5, temperature=0.0))])
        assert "does not support 0 " in refused
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "takes no temperature of 0: going on at its own" in warnings[0]
    with FaultServer() as server:
        ((_, reply),) = endpoint(server).complete([free])
        assert not reply.own_temperature
        assert server.bodies[-1]["temperature"] == 0
