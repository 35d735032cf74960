"""Runs against an endpoint that fails in every way: each prompt is answered once, or listed."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections import Counter

import pytest

pytest.importorskip("openai")

from plad_fast.data.prompts import Prompt
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer
from tests.support.endpoints import KEY, answers, generate, teacher
from tests.support.fault_server import FAULTS, FaultServer, Step, answer_to, said, schedule
from tests.support.launched import Started, python

PROMPTS = [Prompt(f"p{i}", f"question {i}") for i in range(200)]
QUESTION = {prompt.id: prompt.content for prompt in PROMPTS}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # Nobody listens there: a request for loopback must not go through it.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")


def run(teacher, path, prompts=PROMPTS, **sampling):
    return stored_answers(lambda: teacher, prompts, path, Sampling(**sampling), fingerprint={})


def stored(path) -> list[dict]:
    """The rows of a store, as they lie in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_200_prompts_through_every_fault(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)  # of the client and its transport too
    never = frozenset({"question 3", "question 77", "question 150"})
    path = tmp_path / "run" / "teacher.jsonl"
    with FaultServer(schedule(0, never=never)) as server:
        result = run(teacher(server, concurrency=8, timeout=0.3, max_retries=6), path)
        assert set(server.faults) >= set(FAULTS)  # each one happened
        assert 2 <= server.most_at_once <= 8
        assert server.keys == {KEY}

        failed = {failure.prompt_id for failure in result.failures}
        assert {QUESTION[i] for i in failed} == never
        assert all("this one never works" in failure.reason for failure in result.failures)
        rows = stored(path)
        assert Counter(row["id"] for row in rows) == Counter(set(QUESTION) - failed)
        assert all(row["text"] == answer_to(QUESTION[row["id"]]) for row in rows)
        listed = [json.loads(line) for line in path.with_suffix(".failed.jsonl").open()]
        assert {row["id"] for row in listed} == failed
        with capfd.disabled():
            tries = sum(server.asked.values())
            print(f"\n{len(rows)} answers, {len(listed)} failures, {tries} requests;", end=" ")
            print(", ".join(f"{n} {what}" for what, n in sorted(server.faults.items())))

        server.asked.clear()
        server.step = lambda question, tries, body: Step()
        assert run(teacher(server), path).failures == []
        assert server.asked == dict.fromkeys(never, 1)
        assert not path.with_suffix(".failed.jsonl").exists()
    assert len(stored(path)) == 200
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    written = "".join(file.read_text() for file in files)
    assert len(files) == 1
    assert KEY not in written + caplog.text + "".join(capfd.readouterr())


SCRIPT = """
import sys
from plad_fast.data.prompts import Prompt
from plad_fast.pairs import Endpoint, EndpointModel, Sampling, stored_answers
url, path = sys.argv[1:]
teacher = EndpointModel(Endpoint("m", base_url=url, timeout=60, concurrency=4))
prompts = [Prompt(f"p{i}", f"question {i}") for i in range(200)]
stored_answers(lambda: teacher, prompts, path, Sampling(), fingerprint={})
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_where_it_was(ending, tmp_path):
    """At its 40th request the endpoint starts to hang: Ctrl-C must not wait for the timeout."""
    path = tmp_path / "teacher.jsonl"

    def step(question, tries, body):
        return Step("hang") if sum(server.asked.values()) >= 40 else Step(delay=0.002)

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with FaultServer(step) as server:
        command = [str(script), server.url, str(path)]
        started = Started(1, command, tmp_path / "logs", program=python)
        deadline = time.monotonic() + 120
        while server.faults["hang"] < 4 or len(stored(path)) < 40:
            assert started.processes[0].is_alive(), started.said()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started.send(ending)
        start = time.monotonic()
        assert started.statuses(30) == [1 if ending == signal.SIGINT else -ending]
        assert time.monotonic() - start < 20  # the timeout is 60
        assert ("KeyboardInterrupt" in started.said()) == (ending == signal.SIGINT)
        before = {row["id"] for row in stored(path)}
        assert len(before) >= 39  # the store takes back a row in whose writing it is interrupted

        server.asked.clear()
        server.step = lambda question, tries, body: Step()
        result = run(teacher(server), path)
    assert len(result.answers) == 200
    assert set(server.asked) == {QUESTION[i] for i in set(QUESTION) - before}
    assert Counter(row["id"] for row in stored(path)) == Counter(list(QUESTION))


@pytest.mark.parametrize(
    ("budget", "answers"),
    [
        ({"token_budget": 80}, 10),
        ({"cost_budget": 0.9, "prices": (1e4, 1e4)}, 12),  # 0.08 for each
    ],
)
def test_when_a_budget_is_spent_no_request_starts(budget, answers, tmp_path):
    path = tmp_path / "teacher.jsonl"
    with FaultServer(lambda *_: Step(delay=0.01)) as server:
        model = teacher(server, concurrency=4, **budget)
        result = run(model, path)
        # Four were under way when the last token was spent.
        assert answers <= len(result.answers) <= answers + 3
        assert sum(server.asked.values()) == len(result.answers)
        assert len(result.failures) == 200 - len(result.answers)
        assert "budget" in result.failures[0].reason
        assert model.endpoint.usage.tokens == 8 * len(result.answers)
        run(teacher(server, concurrency=8), path)  # without a budget
    assert set(server.asked.values()) == {1}
    assert len(stored(path)) == 200


def test_a_dead_endpoint_is_not_asked_for_hours(tmp_path):
    """After as many failures in a row as there are requests at once, the rest is listed at once."""
    path = tmp_path / "teacher.jsonl"

    def step(question, tries, body):
        return Step() if sum(server.answered.values()) < 50 else Step("cut")

    with FaultServer(step) as server:
        result = run(teacher(server, max_retries=1, concurrency=8), path)
        assert len(result.answers) + len(result.failures) == 200
        assert 50 <= len(result.answers) < 60
        assert sum(server.asked.values()) < 100
    assert sum("no connection" in failure.reason for failure in result.failures) >= 8
    assert result.failures[-1].reason.startswith("not asked: ")


def test_failures_among_answers_do_not_end_a_run(tmp_path):
    never = frozenset(f"question {i}" for i in range(0, 60, 2))
    with FaultServer(schedule(0, share=0, never=never)) as server:
        model = teacher(server, max_retries=1, concurrency=2)
        result = run(model, tmp_path / "teacher.jsonl", PROMPTS[:60])
    assert len(result.answers) == len(result.failures) == 30
    assert all("given up" in failure.reason for failure in result.failures)


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
        model = teacher(server, token_budget=500, max_retries=9, **options)
        found = generate(model, "ab", Sampling(200))
        # A prompt of a few tokens and 200 of an answer: three are more than the budget.
        assert sum(server.asked.values()) == 3
    assert "budget of 500 is spent" in found[0].reason
    usage = model.endpoint.usage
    assert usage.lost == 3
    assert 600 < usage.tokens < 700
    assert "3 without a reply that could be read" in str(usage)


def test_what_cannot_have_been_paid_for_costs_nothing():
    with FaultServer(lambda *_: Step("status", 503)) as server:
        model = teacher(server, token_budget=500, max_retries=2)
        generate(model, "ab", Sampling(200))
    assert model.endpoint.usage.tokens == 0


def test_replies_without_usage_count_no_tokens_and_keep_no_budget():
    """A budget that cannot be kept spends nothing more than the requests under way."""
    body = {"choices": [said("x")]}
    with FaultServer(lambda *_: Step(body=body)) as server:
        assert answers(server)["a", 0] == Answer("a", "x", "stop", 0)
        items = answers(server, ["b", "c", "d"], token_budget=10**6, concurrency=1)
    assert items["b", 0].text == "x"
    assert "no count of tokens" in items["d", 0].reason
