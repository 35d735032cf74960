"""Bounded replies from the server that was asked, until nobody reads on; and of several servers who
is asked, what a dead one costs, and what is the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

pytest.importorskip("openai")

from plad_fast.cli import main
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.endpoint import client
from plad_fast.pairs.generation.endpoint.chat import ChatRequest, Reply
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.client import most_bytes
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.sources import open_teacher, teacher_fingerprint
from tests.support.endpoints import NOBODY, NOWHERE, PAUSE, endpoint, generate, refused, teacher
from tests.support.fault_server import FaultServer, Step, answer_to
from tests.support.recipe_runs import pair
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


PROMPTS = [Prompt(f"p{i}", f"question {i}") for i in range(60)]
ANSWERS = {prompt.id: answer_to(prompt.content) for prompt in PROMPTS}

SERVER = """
import time
from tests.support.fault_server import FaultServer, Step
with FaultServer(lambda *_: Step(delay=0.005)) as server:
    print(server.url, flush=True)
    time.sleep(600)
"""


def teacher_at(*urls, **options):
    given = {"max_retries": 2, "timeout": 5, "concurrency": 4, **options}
    return EndpointModel(Endpoint("m", base_url=",".join(urls), **given), "teacher")


def run(model, folder, prompts=PROMPTS):
    path = folder / "teacher.jsonl"
    return stored_answers(lambda: model, prompts, path, Sampling(), fingerprint={})


def texts(answered):
    return {prompt_id: answer.text for prompt_id, answer in answered.first.items()}


@contextlib.contextmanager
def apart():
    """A server in a process of its own, which can be killed."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def test_a_server_killed_mid_run_changes_nothing(tiny_teacher, tmp_path, caplog):
    """The pairs are those of one server, though the first address was that of the dead one; and
    its companions may come and go between runs."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(60)))

    def command(out, urls):
        extra = ["--base-url", urls, "--concurrency", "6"]
        return pair("openai:m", tiny_teacher, prompts, tmp_path / out, *extra)

    with apart() as (first, process):

        def step(question, tries, body):
            if sum(server.asked.values()) == 15:
                os.kill(process.pid, signal.SIGKILL)
            return Step(delay=0.005)

        with FaultServer(step) as server:
            assert main(command("two", f"{first},{server.url}")) == 0
            assert 30 < sum(server.asked.values()) < 60  # the first had its share
            assert "left out, 1 of 2 servers are up" in caplog.text
            server.step = lambda *_: Step()
            assert main(command("one", server.url)) == 0
    assert not (tmp_path / "two" / "teacher.failed.jsonl").exists()
    two, one = ((tmp_path / out / "pairs.jsonl").read_bytes() for out in ("two", "one"))
    assert two == one
    assert two.count(b"answer to question") > 20
    assert main(command("two", first)) == 0  # nobody listens there, and nothing is asked
    assert (tmp_path / "two" / "pairs.jsonl").read_bytes() == two


def test_the_least_loaded_server_is_asked(tmp_path):
    quick, slowly = Step(), Step(delay=0.4)
    with FaultServer(lambda *_: quick) as fast, FaultServer(lambda *_: slowly) as slow:
        model = teacher_at(slow.url, fast.url, concurrency=4)
        model.try_out(Sampling(), NOWHERE)
        assert slow.asked == fast.asked == {"Say yes.": 1}
        assert texts(run(model, tmp_path)) == ANSWERS
        assert slow.most_at_once <= 2
        assert slow.asked.total() < fast.asked.total() / 2
        assert slow.asked.total() + fast.asked.total() == 62


def test_a_failing_server_is_left_out_and_tried_again(tmp_path, monkeypatch, caplog):
    """Three failures in a row, then one request at a time until it is up again."""
    monkeypatch.setattr(client, "LEFT_OUT", 0.1)

    def step(question, tries, body):
        return Step() if sick.asked.total() > 4 else Step("status", 503)

    with FaultServer(step) as sick, FaultServer(lambda *_: Step(delay=0.01)) as well:
        model = teacher_at(sick.url, well.url, concurrency=2)
        assert texts(run(model, tmp_path)) == ANSWERS
    gaps = [after - before for before, after in itertools.pairwise(sick.times)]
    assert all(gap > 0.09 for gap in gaps[2:5])  # by the server's clock
    assert sick.faults["answer"] > 3
    told = [record.message for record in caplog.records if sick.url in record.message]
    assert len(told) == 2
    assert "left out, 1 of 2 servers are up (status 503" in told[0]
    assert told[1].endswith("up again")


def test_a_server_that_hangs_costs_some_time_and_no_answer(tmp_path):
    with FaultServer(lambda *_: Step("hang")) as hung, FaultServer() as well:
        model = teacher_at(hung.url, well.url, timeout=0.3)
        assert texts(run(model, tmp_path)) == ANSWERS
        assert hung.asked.total() <= 5
        assert well.asked.total() == 60


def test_a_request_does_not_wait_for_a_busy_server(tmp_path, caplog):
    busy = Step("status", 429, headers={"retry-after": "600"})
    with FaultServer(lambda *_: busy) as full, FaultServer() as free:
        assert texts(run(teacher_at(full.url, free.url), tmp_path)) == ANSWERS
        assert full.asked.total() > 10
    assert "left out" not in caplog.text


def test_a_server_that_is_not_there_yet_is_passed_over(tmp_path, caplog):
    with FaultServer() as server:
        model = teacher_at(NOBODY, server.url)
        model.try_out(Sampling(), NOWHERE)
        assert texts(run(model, tmp_path)) == ANSWERS
    assert "127.0.0.1:1/v1: left out" in caplog.text


@pytest.mark.parametrize("end", ["cut", "status"])
def test_when_all_are_dead_the_run_stops(end, tmp_path):
    def step(question, tries, body):
        return Step() if a.answered.total() + b.answered.total() < 30 else Step(end)

    with FaultServer(step) as a, FaultServer(step) as b:
        result = run(teacher_at(a.url, b.url, max_retries=1, concurrency=8), tmp_path)
    assert 30 <= len(result.answers) < 40
    assert len(result.answers) + len(result.failures) == 60
    assert result.failures[-1].reason.startswith("not asked: ")
    assert "requests before it failed one after another" in result.failures[-1].reason


def test_a_server_without_the_model_is_named(tmp_path):
    """Not taken for a server that is fast to fail, and would get most of the prompts."""
    missing = refused("the model 'm' does not exist", 404)
    with FaultServer() as right, FaultServer(lambda *_: missing) as wrong:
        for ask in (lambda m: m.try_out(Sampling(), NOWHERE), lambda m: run(m, tmp_path)):
            with pytest.raises(UsageError, match=f"{wrong.url} refuses all requests"):
                ask(teacher_at(right.url, wrong.url))


def test_a_server_that_loses_its_model_is_left_out(tmp_path):
    missing = refused("the model 'm' does not exist", 404)

    def step(question, tries, body):
        return Step() if changed.asked.total() < 10 else missing

    with FaultServer(lambda *_: Step(delay=0.005)) as right, FaultServer(step) as changed:
        assert texts(run(teacher_at(right.url, changed.url), tmp_path)) == ANSWERS
        assert changed.faults["status"] <= 6


def test_a_budget_is_of_all_servers_together(tmp_path):
    with FaultServer(lambda *_: Step(delay=0.01)) as a, FaultServer(lambda *_: Step()) as b:
        result = run(teacher_at(a.url, b.url, token_budget=80), tmp_path)
        assert 10 <= len(result.answers) <= 13  # of eight tokens; four are under way
        assert a.asked.total() + b.asked.total() == len(result.answers)


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("http://127.0.0.1:1/v1,", "base URL '' is none"),
        ("http://127.0.0.1:1/v1,host:2/v1", "'host:2/v1' is none"),
        ("http://127.0.0.1:1/v1, http://127.0.0.1:1/v1/", "given twice"),
    ],
)
def test_addresses_are_checked_one_by_one(urls, says):
    with pytest.raises(UsageError, match=says):
        Endpoint("m", base_url=urls)


def test_each_server_away_from_this_machine_needs_the_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match=r"http://10\.0\.0\.1/v1 needs a key"):
        Endpoint("m", base_url="http://127.0.0.1:1/v1,http://10.0.0.1/v1")


def test_the_first_address_stands_for_all_in_records():
    several = f"{NOBODY},http://127.0.0.1:2/v1"
    assert Endpoint("m", base_url=several).settings() == {"model": "m", "base_url": NOBODY}
    found, alone = (teacher_fingerprint("openai:m", base_url=url) for url in (several, NOBODY))
    assert found == alone


def test_batches_are_asked_of_one_server(tmp_path):
    with pytest.raises(UsageError, match=f"--batch asks one server, but --base-url is {NOBODY},"):
        open_teacher("openai:m", base_url=f"{NOBODY},http://127.0.0.1:2/v1", batches=tmp_path / "b")
