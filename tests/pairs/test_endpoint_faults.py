"""A run against an endpoint that fails in every way: each prompt is answered once, or listed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("openai")

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.pairs.generation.answering import generate_answers
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.sampling import Sampling
from tests.support.fault_server import FAULTS, FaultServer, Step, answer_to, schedule

KEY = "sk-planted-0123456789"
PROMPTS = [Prompt(f"p{i}", f"question {i}") for i in range(200)]
QUESTION = {prompt.id: prompt.content for prompt in PROMPTS}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    # Nobody listens there: a request for loopback must not go through it.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")


def model(server, **options):
    options = {"max_retries": 6, "timeout": 10, "first_pause": 0.005, **options}
    endpoint = Endpoint("m", base_url=server.url, api_key_env="TEACHER_KEY", **options)
    return EndpointModel(endpoint, "teacher")


def run(teacher, path, prompts=PROMPTS, **sampling):
    with RowStore.open(path, {}) as store:
        return generate_answers(teacher, prompts, store, Sampling(**sampling), progress=False)


def stored(path) -> list[dict]:
    """The rows of a store, as they lie in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_200_prompts_through_every_fault(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)  # of the client and its transport too
    never = frozenset({"question 3", "question 77", "question 150"})
    path = tmp_path / "run" / "teacher.jsonl"
    with FaultServer(schedule(0, never=never)) as server:
        result = run(model(server, concurrency=8, timeout=0.3), path)
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
        assert run(model(server), path).failures == []
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
from plad_fast.data.store import RowStore
from plad_fast.pairs import Endpoint, EndpointModel, Sampling, generate_answers
url, path = sys.argv[1:]
teacher = EndpointModel(Endpoint("m", base_url=url, timeout=60, concurrency=4))
prompts = [Prompt(f"p{i}", f"question {i}") for i in range(200)]
with RowStore.open(path, {}) as store:
    generate_answers(teacher, prompts, store, Sampling(), progress=False)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_where_it_was(ending, tmp_path):
    """At its 40th request the endpoint starts to hang: Ctrl-C must not wait for the timeout."""
    path = tmp_path / "teacher.jsonl"

    def step(question, tries, body):
        return Step("hang") if sum(server.asked.values()) >= 40 else Step(delay=0.002)

    with FaultServer(step) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, server.url, str(path)], stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while server.faults["hang"] < 4 or len(stored(path)) < 40:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, ending)
        start = time.monotonic()
        _, error = process.communicate(timeout=30)
        assert time.monotonic() - start < 20  # the timeout is 60
        assert (b"KeyboardInterrupt" in error) == (ending == signal.SIGINT)
        before = {row["id"] for row in stored(path)}
        assert len(before) >= 39  # the store takes back a row in whose writing it is interrupted

        server.asked.clear()
        server.step = lambda question, tries, body: Step()
        result = run(model(server), path)
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
        teacher = model(server, concurrency=4, **budget)
        result = run(teacher, path)
        # Four were under way when the last token was spent.
        assert answers <= len(result.answers) <= answers + 3
        assert sum(server.asked.values()) == len(result.answers)
        assert len(result.failures) == 200 - len(result.answers)
        assert "budget" in result.failures[0].reason
        assert teacher.endpoint.usage.tokens == 8 * len(result.answers)
        run(model(server), path)  # without a budget
    assert set(server.asked.values()) == {1}
    assert len(stored(path)) == 200


def test_a_dead_endpoint_is_not_asked_for_hours(tmp_path):
    """After as many failures in a row as there are requests at once, the rest is listed at once."""
    path = tmp_path / "teacher.jsonl"

    def step(question, tries, body):
        return Step() if sum(server.answered.values()) < 50 else Step("cut")

    with FaultServer(step) as server:
        result = run(model(server, max_retries=1), path)
        assert len(result.answers) + len(result.failures) == 200
        assert 50 <= len(result.answers) < 60
        assert sum(server.asked.values()) < 100
    assert sum("no connection" in failure.reason for failure in result.failures) >= 8
    assert result.failures[-1].reason.startswith("not asked: ")


def test_failures_among_answers_do_not_end_a_run(tmp_path):
    never = frozenset(f"question {i}" for i in range(0, 60, 2))
    with FaultServer(schedule(0, share=0, never=never)) as server:
        teacher = model(server, max_retries=1, concurrency=2)
        result = run(teacher, tmp_path / "teacher.jsonl", PROMPTS[:60])
    assert len(result.answers) == len(result.failures) == 30
    assert all("given up" in failure.reason for failure in result.failures)
