"""Teachers asked by the Batch API, through the command line: nothing is paid for twice."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openai")

from plad_fast.cli import main
from plad_fast.pairs.generation.endpoint import batch, batch_client
from tests.support.batch_server import BatchServer
from tests.support.fault_server import said
from tests.support.recipe_runs import arguments, kill_at, pair

COUNT = 10
CLIENT = "pairs.generation.endpoint.batch_client.BatchClient"
RECORD = "pairs.generation.endpoint.batch._Run"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(batch_client, "_FIRST_POLL", 0.01)
    monkeypatch.setattr("plad_fast.pairs.generation.endpoint.retries.pause", lambda *_: 0.0)
    with BatchServer() as running:
        yield running


@pytest.fixture
def command(server, tiny_teacher, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {n}"} for n in range(COUNT)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extra = ["--base-url", server.url, "--batch"]
    return pair("openai:m", tiny_teacher, prompts, tmp_path / "out", *extra)


def stored(tmp_path):
    lines = (tmp_path / "out" / "teacher.jsonl").read_text().splitlines()[1:]
    return {json.loads(line)["text"] for line in lines}


def all_answers():
    return {f"answer to say {n}" for n in range(COUNT)}


def test_a_batch_is_made_watched_and_read(server, command, tmp_path, capsys):
    server.polls = 2
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"batch batch_0: in_progress, 0 of {COUNT} requests done" in told
    assert f"batch batch_0: completed, {COUNT} of {COUNT} requests done" in told
    assert f"teacher: {8 * (COUNT + 1)} tokens in {COUNT + 1} requests" in told  # with the first
    assert stored(tmp_path) == all_answers()
    assert not (tmp_path / "out" / "teacher.batches.json").exists()
    assert {body["max_tokens"] for body in server.bodies} == {60}
    assert main(command) == 0
    assert list(server.batches) == ["batch_0"]


@pytest.mark.parametrize(
    ("function", "at"),
    [
        (f"{CLIENT}.upload", 1),
        (f"{CLIENT}.create", 1),  # the file is there, and no batch
        (f"{RECORD}._write", 2),  # the batch is there, and its id is not recorded
        (f"{CLIENT}.wait", 1),
        (f"{CLIENT}.lines", 1),
        ("data.store.RowStore.append", 2),  # the answers have come, and are not stored
        (f"{RECORD}._write", 3),  # they are stored, and the batch is still recorded
    ],
)
def test_an_interrupted_batch_is_paid_for_once(
    function, at, server, command, tmp_path, monkeypatch
):
    import pkgutil

    owner, _, name = f"plad_fast.{function}".rpartition(".")
    owner = pkgutil.resolve_name(owner)
    real, calls = getattr(owner, name), []

    def interrupted(*args, **options):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert main(command) == 130
    assert len(calls) == at
    assert main(command) == 0
    assert stored(tmp_path) == all_answers()
    assert list(server.batches) == ["batch_0"]
    assert set(server.paid.values()) == {1}
    assert not (tmp_path / "out" / "teacher.batches.json").exists()


@pytest.mark.slow
def test_a_batch_of_a_killed_run_is_found_again(server, command, tmp_path):
    kill_at(f"{RECORD}._write", 2, command)
    assert list(server.batches) == ["batch_0"]
    assert main(command) == 0
    assert stored(tmp_path) == all_answers()
    assert list(server.batches) == ["batch_0"]


def test_a_reply_that_is_lost_while_a_batch_is_made(server, command, monkeypatch, capsys):
    """It may have been made: the next run looks for it."""
    real = batch_client.BatchClient.create

    def create(client, file_id):
        server.faults.append(504)
        return real(client, file_id)

    monkeypatch.setattr(batch_client.BatchClient, "create", create)
    assert main(command) == 2
    assert "no batch is made twice" in capsys.readouterr().err
    assert main(command) == 0
    assert list(server.batches) == ["batch_0"]


@pytest.mark.parametrize("first", ["expired", "lost", 500, 429, said("half", "abort")])
def test_what_a_batch_did_not_get_to_is_asked_for_in_another(first, server, command, tmp_path):
    server.outcome = lambda question, times: (
        first if question in ("say 3", "say 7") and not times else "answer"
    )
    assert main(command) == 0
    assert stored(tmp_path) == all_answers()
    assert len(server.batches) == 2
    assert server.asked.total() == COUNT + 2


def test_what_no_batch_has_is_listed_with_its_reason(server, command, tmp_path):
    outcomes = {"say 3": 500, "say 5": 400, "say 7": said("", "tool_calls")}
    server.outcome = lambda question, times: outcomes.get(question, "answer")
    assert main(command) == 0
    failed = (tmp_path / "out" / "teacher.failed.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in failed]
    assert reasons[0] == "not had from 3 batches; the last time: status 500: planted"
    assert reasons[1] == "status 400: planted"
    assert "called a tool" in reasons[2]
    assert len(stored(tmp_path)) == COUNT - 3
    assert (server.asked["say 3"], server.asked["say 5"], server.asked["say 7"]) == (3, 1, 1)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("cancelled", "batch batch_0 was cancelled where it ran; what it had answered is kept"),
        ("failed", "batch batch_0 was refused as a whole (this file is none)"),
        ("melting", "batch batch_0 has the status 'melting'"),
    ],
)
def test_a_batch_that_comes_to_nothing(status, message, server, command, tmp_path, capsys):
    """A cancelled one has answered part; one of an unknown status is looked at again."""
    server.status = status
    server.outcome = lambda question, times: "answer" if question < "say 4" else "expired"
    assert main(command) == 2
    assert message in capsys.readouterr().err
    server.status, server.outcome = "", lambda question, times: "answer"
    if status == "melting":
        server.batches["batch_0"]["status"] = "in_progress"
    assert main(command) == 0
    assert stored(tmp_path) == all_answers()
    assert set(server.paid.values()) == {1}
    assert len(server.batches) == (1 if status == "melting" else 2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--token-budget", "500"], "token budget of 500"),
        (["--cost-budget", "1", "--price-in", "0", "--price-out", "1e4"], "cost budget of 1.0"),
    ],
)
def test_a_budget_is_compared_before_the_upload(extra, message, server, command, capsys):
    assert main([*command, *extra]) == 2
    error = capsys.readouterr().err
    assert f"a batch of {COUNT} requests may take" in error
    assert message in error
    assert not server.files


def test_samples_and_files_of_limited_size(server, command, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_MOST_REQUESTS", 4)
    assert main([*command, "--teacher-samples", "2"]) == 0
    assert {body["n"] for body in server.bodies} == {2}
    assert len(server.batches) == 3
    assert len((tmp_path / "out" / "teacher.jsonl").read_text().splitlines()) == 2 * COUNT + 1


def test_what_is_under_way_is_not_asked_for_in_another_way(
    server, command, tiny_teacher, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(batch_client.BatchClient, "wait", lambda *_: 1 / 0)
        assert main(command) == 1
    capsys.readouterr()
    assert main([part for part in command if part != "--batch"]) == 2
    assert "add --batch to take its answers" in capsys.readouterr().err
    assert main([*command, "--max-new-tokens", "61"]) == 2
    assert "max_new_tokens was 60 and is 61" in capsys.readouterr().err
    assert main([*command, "--limit", "2"]) == 2
    assert f"under way for {COUNT - 2} prompts that are asked no more" in capsys.readouterr().err
    assert main(command) == 0
    assert list(server.batches) == ["batch_0"]
    assert main(arguments(tiny_teacher, tmp_path / "run", "--batch")) == 2
    assert "--batch is for teachers of openai:MODEL" in capsys.readouterr().err
