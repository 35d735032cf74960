"""What an endpoint is asked, what is made of its replies, and when it is not asked any more."""

from __future__ import annotations

import email.utils
import re
import subprocess
import sys
import time
import traceback

import pytest

pytest.importorskip("openai")

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Choice, Reply
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import EndpointModel, request_seed
from plad_fast.pairs.generation.endpoint.retries import LONGEST_ASKED, pause, retry_after
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from plad_fast.pairs.scoring.trials import try_endpoints
from tests.support.fault_server import FaultServer, Step, answer_to, reasoning, said

KEY = "sk-planted-0123456789"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "chat"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def endpoint(server, **options):
    options = {"max_retries": 2, "timeout": 5, "first_pause": 0.005, **options}
    return Endpoint("m", base_url=server.url, **options)


def ask(server, questions=("a",), sampling=None, **options):
    """Answers and failures of an `EndpointModel` by (prompt, sample)."""
    prompts = [Prompt(q if isinstance(q, str) else "chat", q) for q in questions]
    model = EndpointModel(endpoint(server, **options))
    found = list(model.generate(prompts, sampling or Sampling()))
    items = {(item.prompt_id, item.sample): item for batch in found for item in batch}
    assert len(items) == sum(map(len, found))
    return items


def refusing(*parameters, status=400, say="Unsupported parameter: '{0}' is not supported"):
    """A server that refuses requests with any of these parameters."""

    def step(question, tries, body):
        for name in parameters:
            if name in body:
                error = {"message": say.format(name), "param": name, "type": "invalid"}
                return Step("status", status, {"error": error})
        return Step(choices=[said("x")] * body.get("n", 1))

    return step


def test_text_is_asked_as_a_message_and_messages_as_they_are():
    sampling = Sampling(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    with FaultServer() as server:
        items = ask(server, ["a", CHAT], sampling)
        assert items["a", 0] == Answer("a", answer_to("a"), "stop", 3)
        assert items["chat", 0].text == answer_to("chat")
    bodies = {body["messages"][-1]["content"]: body for body in server.bodies}
    assert bodies["chat"]["messages"] == CHAT
    assert bodies["a"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 9,
        "seed": request_seed(3, "a"),
    }
    assert bodies["chat"]["seed"] != bodies["a"]["seed"]
    with pytest.raises(UsageError, match="no top_k"):
        ask(server, ["a"], Sampling(top_k=5))


@pytest.mark.parametrize("given", [1, 2, 3, 9])
def test_samples_that_do_not_come_are_asked_for_again(given):
    """With another seed, or a server that gives one choice would give the same one again."""

    def step(question, tries, body):
        many = min(given, body.get("n", 1)) if given < 9 else given  # 9: more than asked for
        return Step(choices=[said(f"{body['seed'] + i}") for i in range(many)])

    with FaultServer(step) as server:
        items = ask(server, ["a", "b"], Sampling(n=3))
    first = request_seed(0, "a")
    assert [items["a", k].text for k in range(3)] == [str(first + k) for k in range(3)]
    assert len(items) == 6
    assert server.asked == dict.fromkeys("ab", -(-3 // given))


def test_samples_that_never_come_fail_alone_and_are_asked_for_alone():
    def step(question, tries, body):
        if tries == 0:
            return Step(choices=[said("one")])
        return Step("status", 503) if tries < 9 else Step(choices=[said(str(body["seed"]))] * 2)

    with FaultServer(step) as server:
        items = ask(server, ["a"], Sampling(n=3))
        assert items["a", 0].text == "one"
        assert "status 503" in items["a", 1].reason
        assert items["a", 2] == Failure("a", items["a", 1].reason, 2)

        server.asked["a"] = 9
        model = EndpointModel(endpoint(server))
        lost = [(Prompt("a", "a"), 1), (Prompt("a", "a"), 2), (Prompt("b", "b"), 2)]
        again = [item for batch in model.generate_samples(lost, Sampling(n=3)) for item in batch]
    first = request_seed(0, "a") + 1
    assert [a for a in again if a.prompt_id == "a"] == [
        Answer("a", str(first), "stop", 0, sample) for sample in (1, 2)
    ]
    assert [(item.prompt_id, item.sample) for item in again if item.prompt_id == "b"] == [("b", 2)]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (said(" cut ", "length"), Answer("a", "cut", "length", 3)),
        (said(f"you sent {KEY}"), Answer("a", "you sent ***", "stop", 3)),
        (said(None), "the answer is empty"),
        (said("half", "content_filter"), "content filter"),
        (said(None, refusal="I cannot"), "content filter"),
        (said(["parts"]), "not text"),
        ({"index": 0}, "without a message"),
    ],
)
def test_replies_of_every_kind(choice, expected):
    with FaultServer(lambda *_: Step(choices=[choice])) as server:
        item = ask(server)["a", 0]
    if isinstance(expected, str):
        assert isinstance(item, Failure)
        assert expected in item.reason
    else:
        assert item == expected


@pytest.mark.parametrize("body", [{"choices": None}, {"error": {"message": "overloaded"}}, [1], 5])
def test_what_is_no_completion_is_tried_again(body):
    with FaultServer(lambda _, tries, __: Step(body=body) if tries < 2 else Step()) as server:
        assert ask(server)["a", 0].text == answer_to("a")


def test_replies_without_an_answer_are_not_asked_for_for_ever():
    with FaultServer(lambda *_: Step("no choice")) as server:
        reason = ask(server)["a", 0].reason
        assert server.asked["a"] == 3
    assert reason == "given up after 3 tries; the last one: the reply holds no answer"


def test_replies_without_usage_count_no_tokens_and_keep_no_budget():
    """A budget that cannot be kept spends nothing more than the requests under way."""
    body = {"choices": [said("x")]}
    with FaultServer(lambda *_: Step(body=body)) as server:
        assert ask(server)["a", 0] == Answer("a", "x", "stop", 0)
        items = ask(server, ["b", "c", "d"], token_budget=10**6, concurrency=1)
    assert items["b", 0].text == "x"
    assert "no count of tokens" in items["d", 0].reason


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
        items = ask(server, list("abcdef"), Sampling(n=2), concurrency=3)
        assert all(isinstance(item, Answer) for item in items.values())
        # Learnt once, by the requests that were under way.
        assert server.faults["status"] <= 3 * len(refused)
    last = server.bodies[-1]
    assert {k: last[k] for k in last.keys() - {"model", "messages", "seed"}} == sent
    assert ("seed" in last) == ("seed" not in refused)


def test_no_answer_is_asked_for_without_a_limit_to_its_length():
    with FaultServer(refusing("max_tokens", "max_completion_tokens")) as server:
        with pytest.raises(UsageError, match="max_completion_tokens"):
            ask(server, list("abcd"))
        assert all({"max_tokens", "max_completion_tokens"} & body.keys() for body in server.bodies)


def test_a_temperature_that_is_refused_is_the_users_to_change():
    """Answers at another temperature than the one that is recorded would be passed off."""
    with FaultServer(reasoning(0)) as server:
        with pytest.raises(UsageError, match=r"does not support 0 .*give --teacher-temperature 1"):
            ask(server, list("abcdefgh"), Sampling(temperature=0.0), concurrency=1)
        assert server.faults["status"] == 4  # one of them for max_tokens
        assert ask(server, ["a"], Sampling(temperature=1.0))["a", 0].text == answer_to("a")


def test_a_request_may_do_without_its_temperature(caplog):
    """With one warning; a request that needs it still sends it."""
    free = ChatRequest(CHAT, 5, temperature=0.0, optional=frozenset({"temperature"}))
    with FaultServer(reasoning(0)) as server:
        model = endpoint(server)
        replies = [reply for _, reply in model.complete([free] * 12)]
        assert {reply.left_out for reply in replies} == {frozenset({"temperature"})}
        ((_, refused),) = model.complete([ChatRequest(CHAT, 5, temperature=0.0)])
        assert "does not support 0 " in refused
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "takes no temperature of 0: going on at its own" in warnings[0]
    with FaultServer() as server:
        ((_, reply),) = endpoint(server).complete([free])
        assert reply.left_out == frozenset()
        assert server.bodies[-1]["temperature"] == 0


def test_tokens_that_went_into_reasoning_are_told_and_can_be_added():
    says = r"all 48 tokens were spent before any answer \(reasoning\?\); raise --reasoning-tokens"
    sampling = Sampling(max_new_tokens=48, n=2)
    with FaultServer(reasoning(100)) as server:
        items = ask(server, ["a"], sampling)
        assert all(re.match(says, item.reason) for item in items.values())
        server.bodies.clear()
        with pytest.raises(UsageError, match=f"of the first 8 replies each is empty: {says}"):
            ask(server, [f"q{i}" for i in range(100)], sampling, concurrency=2)
        assert server.faults["answer"] < 14  # none is paid for after it is known
        items = ask(server, ["a"], sampling, reasoning_tokens=60)
        assert items["a", 1].text == answer_to("a")


def test_what_spent_its_tokens_is_asked_again_of_a_model_that_has_answered(tmp_path):
    """They come first in another run, and eight of them say nothing of the others."""
    asked = [Prompt(f"{i}", f"hard {i}" if i < 10 else f"easy {i}") for i in range(20)]
    store = tmp_path / "answers.jsonl"
    store.write_text("{}\n{}\n")  # a header and a row

    def step(question, *_):
        return Step(choices=[said("", "length")]) if "hard" in question else Step()

    with FaultServer(step) as server:
        model = EndpointModel(endpoint(server))
        try_endpoints(teacher=model, sampling=Sampling(), answers=store)
        items = [item for batch in model.generate(asked, Sampling()) for item in batch]
    assert sum(isinstance(item, Failure) for item in items) == 10
    assert len(items) == 20


def test_a_model_is_tried_out_with_one_request():
    def tried(step, sampling, **options):
        with FaultServer(step) as server:
            EndpointModel(endpoint(server, **options), "teacher").try_out(sampling)
        assert set(server.asked) == {"Say yes."}

    tried(reasoning(100), Sampling(200, temperature=1.0))
    greedy = Sampling(200, temperature=0.0)
    for step, sampling, says in [
        (reasoning(0), greedy, "refuses all requests .* --teacher-temperature 1"),
        (reasoning(100), Sampling(48), "teacher: asked for a word, all 48 tokens were spent"),
        (lambda *_: Step("status", 404), greedy, "check the model's name"),
        (lambda *_: Step("cut"), greedy, "no reply to a first request .*no connection"),
    ]:
        with pytest.raises(UsageError, match=says):
            tried(step, sampling)


def test_a_trial_does_not_speak_for_the_requests_that_follow():
    """What is refused for a reason unknown still ends a run that has no answer of its own."""
    refusal = Step("status", 400, {"error": {"message": "no roles but user"}})
    with FaultServer(lambda question, *_: Step() if "yes" in question else refusal) as server:
        model = EndpointModel(endpoint(server, concurrency=1))
        model.try_out(Sampling())
        with pytest.raises(UsageError, match="no roles but user"):
            list(model.generate([Prompt(f"{i}", f"q{i}") for i in range(9)], Sampling()))
    assert sum(server.asked.values()) == 4


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
            ask(server, [f"q{i}" for i in range(50)], Sampling(temperature=2.0), concurrency=2)
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
        items = ask(server, list("abcdefg"), concurrency=1)
        assert server.asked == dict.fromkeys("abcdefg", 1)
    failed = [item for item in items.values() if isinstance(item, Failure)]
    assert "".join(item.prompt_id for item in failed) == "adefg"
    assert error["message"][:20] in failed[0].reason


def test_the_wait_that_is_asked_for_is_kept_to():
    with FaultServer(
        lambda _, tries, __: (
            Step() if tries else Step("status", 429, headers={"retry-after": "0.4"})
        )
    ) as server:
        ask(server, ["a"])
        assert 0.4 <= server.times[1] - server.times[0] < 2
        # Its own pauses have a bound that is lower.
        ask(server, ["b"], longest_pause=0.1)
        assert server.times[3] - server.times[2] >= 0.4


def test_waits():
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({"retry-after": "-1"}) is None
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 97 < retry_after({"retry-after": later}) < 101
    assert retry_after({"retry-after": email.utils.formatdate(0)}) == 0
    for tries, most in [(0, 1), (1, 2), (2, 4), (9, 10)]:
        waits = [pause(tries, None, first=1, longest=10) for _ in range(50)]
        assert most / 2 <= min(waits) <= max(waits) <= most
    assert 5 <= pause(0, 5, first=1, longest=10) <= 5.1
    assert 300 <= pause(0, 300, first=1, longest=10) <= 301
    assert pause(0, 1e9, first=1, longest=10) <= LONGEST_ASKED + 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "http://10.0.0.1/v1", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not"),
        ({"api_key_env": "BAD_KEY"}, "BAD_KEY holds characters"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "holds a user"),
        ({"base_url": "host:8000/v1"}, "begins with http"),
        ({"base_url": f"user:{KEY[:12]}@host/v1"}, "begins with http"),
        ({"base_url": "http://host:port/v1"}, "begins with http"),
        ({"base_url": "http://[::1/v1"}, "begins with http"),
        ({"api_key_env": KEY}, "is the key itself"),
        ({"api_key_env": KEY.replace("-", "_")}, "is the key itself"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": float("nan")}, "timeout"),
        ({"cost_budget": 1.0}, "prices"),
        ({"token_budget": 0}, "token_budget"),
        ({"reasoning_tokens": -1}, "reasoning_tokens"),
        ({"prices": (1.0, -1.0)}, "prices"),
    ],
)
def test_bad_options_are_found_at_once_and_told_without_secrets(options, says, monkeypatch):
    monkeypatch.setenv("BAD_KEY", KEY + "\nü")
    monkeypatch.setenv("OTHER_KEY", KEY.replace("-", "_"))
    with pytest.raises(UsageError, match=says) as caught:
        Endpoint("m", **options)
    assert KEY[:12] not in str(caught.value).replace("_", "-")


def test_a_key_is_needed_away_from_this_machine_only(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        Endpoint("m", base_url=f"http://{host}:1/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1/")
    assert Endpoint("m").settings() == {"model": "m", "base_url": "http://localhost:1/v1"}
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost.example.org/v1")
    with pytest.raises(UsageError, match="needs a key"):
        Endpoint("m")


def test_an_endpoint_says_nothing_of_its_key():
    with FaultServer() as server:
        model = endpoint(server, prices=(1, 2), concurrency=1)
        assert list(model.complete([ChatRequest(CHAT, 5)] * 2)) == [
            (i, Reply([Choice(answer_to("chat"), "stop", 3)])) for i in (0, 1)
        ]
    assert server.keys == {KEY}
    assert KEY not in f"{model} {vars(model)} {model.settings()}"
    assert str(model.usage) == "16 tokens in 2 requests, cost 0.0000"


def test_reading_may_stop_at_any_answer():
    """What is under way then is cancelled: the endpoint here would hang for half a minute."""

    def step(question, tries, body):
        return Step() if question == "0" else Step("hang")

    with FaultServer(step) as server:
        requests = [ChatRequest([{"role": "user", "content": f"{i}"}], 5) for i in range(20)]
        replies = endpoint(server, timeout=30, concurrency=4).complete(requests)
        assert next(replies)[0] == 0
        start = time.monotonic()
        replies.close()
        assert time.monotonic() - start < 2
        assert list(replies) == []


def test_no_request_starts_once_nobody_reads():
    """Some replies come at the very moment of the cancelling, which must not get lost."""
    requests = [ChatRequest([{"role": "user", "content": f"{i}"}], 5) for i in range(300)]
    with FaultServer() as server:
        for _ in range(8):
            server.asked.clear()
            replies = endpoint(server, concurrency=8).complete(requests)
            next(replies)
            replies.close()
            assert sum(server.asked.values()) < 100


def test_without_the_package_it_says_how_to_install_it():
    code = """
import sys
sys.modules["openai"] = None
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.sources import open_teacher
try:
    open_teacher("openai:m", base_url="http://127.0.0.1:1/v1")
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "plad-fast[api]"' in done.stdout
