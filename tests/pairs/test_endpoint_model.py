"""Prompts and samples as requests, and the early end of runs that bring no answer."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("openai")

from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint.model import EndpointModel, request_seed
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Failure
from tests.support.endpoints import CHAT, NOWHERE, answers, endpoint, replied
from tests.support.fault_server import FaultServer, Step, answer_to, reasoning, said

pytestmark = pytest.mark.usefixtures("key")


def test_text_is_asked_as_a_message_and_messages_as_they_are():
    sampling = Sampling(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    with FaultServer() as server:
        items = answers(server, ["a", CHAT], sampling)
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
        answers(server, ["a"], Sampling(top_k=5))


@pytest.mark.parametrize("given", [1, 2, 3, 9])
def test_samples_that_do_not_come_are_asked_for_again(given):
    """With another seed, or a server that gives one choice would give the same one again."""

    def step(question, tries, body):
        many = min(given, body.get("n", 1)) if given < 9 else given  # 9: more than asked for
        return Step(choices=[said(f"{body['seed'] + i}") for i in range(many)])

    with FaultServer(step) as server:
        items = answers(server, ["a", "b"], Sampling(n=3))
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
        items = answers(server, ["a"], Sampling(n=3))
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


def test_tokens_that_went_into_reasoning_are_told_and_can_be_added():
    says = r"all 48 tokens were spent before any answer \(reasoning\?\); raise --reasoning-tokens"
    sampling = Sampling(max_new_tokens=48, n=2)
    with FaultServer(reasoning(100)) as server:
        items = answers(server, ["a"], sampling)
        assert all(re.match(says, item.reason) for item in items.values())
        server.bodies.clear()
        with pytest.raises(UsageError, match=f"each of the first 8 replies is empty: {says}"):
            answers(server, [f"q{i}" for i in range(100)], sampling, concurrency=2)
        assert server.faults["answer"] < 14  # none is paid for after it is known
        items = answers(server, ["a"], sampling, reasoning_tokens=60)
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
        model.try_out(Sampling(), store)
        items = [item for batch in model.generate(asked, Sampling()) for item in batch]
    assert sum(isinstance(item, Failure) for item in items) == 10
    assert len(items) == 20


def test_a_model_is_tried_out_with_one_request():
    def tried(step, sampling, **options):
        with FaultServer(step) as server:
            EndpointModel(endpoint(server, **options), "teacher").try_out(sampling, NOWHERE)
        assert set(server.asked) == {"Say yes."}

    tried(reasoning(100), Sampling(200, temperature=1.0))
    greedy = Sampling(200, temperature=0.0)
    for step, sampling, says in [
        (reasoning(0), greedy, "refuses all requests .* --teacher-temperature 1"),
        (reasoning(100), Sampling(48), "no answer to a first request: all 48 tokens"),
        (lambda *_: Step("status", 404), greedy, "check the model's name"),
        (lambda *_: Step("cut"), greedy, "no answer to a first request: .*no connection"),
    ]:
        with pytest.raises(UsageError, match=says):
            tried(step, sampling)


def test_a_trial_does_not_speak_for_the_requests_that_follow():
    """What is refused for a reason unknown still ends a run that has no answer of its own."""
    refusal = Step("status", 400, {"error": {"message": "no roles but user"}})
    with FaultServer(lambda question, *_: Step() if "yes" in question else refusal) as server:
        model = EndpointModel(endpoint(server, concurrency=1))
        model.try_out(Sampling(), NOWHERE)
        with pytest.raises(UsageError, match="no roles but user"):
            list(model.generate([Prompt(f"{i}", f"q{i}") for i in range(9)], Sampling()))
    assert sum(server.asked.values()) == 4


@pytest.mark.parametrize(
    "choice", [said(None, reasoning_content="4"), said("half", "tool_calls"), said("<think>hm")]
)
def test_a_model_that_never_answers_is_found_out_early(choice):
    with pytest.raises(UsageError, match="each of the first 8 replies is empty: the "):
        replied(choice, [f"q{i}" for i in range(100)])
