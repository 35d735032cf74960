"""Answers do not depend on the number of processes, nor on how many of them were killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from plad_fast.cli import main
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.shards import share
from tests.support import two_answerers
from tests.support.launched import SPAWN, environment
from tests.support.two_answerers import PROMPTS

SETTINGS = {"max_new_tokens": 10, "batch_size": 3, "n": 2}


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "run")


@pytest.fixture(scope="module")
def expected(tiny_teacher, tmp_path_factory):
    """All answers by a single process, and the model that gave them."""
    return single(tiny_teacher, tmp_path_factory.mktemp("single"))


def single(model, folder, **options):
    answered = stored_answers(
        lambda: LocalModel(load_model(model), load_tokenizer(model), "tiny"),
        PROMPTS,
        folder / "answers.jsonl",
        Sampling(**SETTINGS),
        fingerprint={},
        **options,
    )
    rows = [vars(a) for answers in answered.answers.values() for a in answers]
    return json.loads(json.dumps(rows))  # as those of other processes come


def two_processes(folder, **more):
    """Exit statuses and what the two wrote to stderr."""
    rendezvous = {"PLAD_TEST_RENDEZVOUS": (folder / f"meet{len(os.listdir(folder))}").as_uri()}
    logs = [folder.parent / f"stderr{rank}" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        variables = environment(RANK=str(rank), WORLD_SIZE="2", **rendezvous, **more)
        given = (folder, json.dumps(SETTINGS), variables, log)
        processes.append(SPAWN.Process(target=two_answerers.run, args=given))
        processes[-1].start()
    try:
        for process in processes:
            process.join(timeout=120)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def test_two_processes_give_the_answers_of_one(folder, expected):
    statuses, errors = two_processes(folder)
    assert statuses == [0, 0], errors
    assert json.loads((folder / "result.json").read_text()) == expected
    assert (folder / "loaded0").exists()
    assert (folder / "loaded1").exists()
    assert not list(folder.glob("*rank*"))
    with RowStore.open(folder / "answers.jsonl", Sampling(**SETTINGS).settings()) as store:
        assert [(r.partition("\t")[0], int("\t" in r)) for r in store.rows] == [
            (p.id, k) for p in PROMPTS for k in range(2)
        ]
    assert "".join(errors).count("tiny:   0%") == 1  # one bar


def test_torchrun_makes_the_pairs_of_one_process(tiny_teacher, tmp_path):
    """Through the environment that torchrun sets, with no group made before."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p.content}) + "\n" for p in PROMPTS))

    def command(folder):
        return [
            *("pairs", "--teacher", str(tiny_teacher), "--student", str(tiny_teacher)),
            *("--prompts", str(prompts), "--teacher-temperature", "1", "--student-samples", "2"),
            *("--scorer", "length", "--select", "best-worst", "--max-new-tokens", "40"),
            *("--precision", "float32", "--output-dir", str(tmp_path / folder)),
        ]  # fmt: skip

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launcher, "2", "-m", "plad_fast", *command("two")],
        env=environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pairs: ") == 1
    assert main(command("one")) == 0
    pairs = [(tmp_path / folder / "pairs.jsonl").read_bytes() for folder in ("one", "two")]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("failure", ["kill", "raise"])
def test_a_failed_run_ends_and_another_goes_on(folder, expected, failure):
    """The other process ends too, and a single one then asks for nothing twice."""
    (alive, failed), (stderr, _) = two_processes(folder, PLAD_TEST_FAILURE=failure)
    assert failed == (-9 if failure == "kill" else 1)
    assert alive == 1
    assert "another one has failed or was killed" in stderr
    left = sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("*.rank?of2.jsonl"))
    assert 11 < left < 22
    assert single(folder, folder) == expected
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(expected)
    assert not list(folder.glob("*rank*"))


def test_what_the_first_process_refuses_ends_both(folder):
    with RowStore.open(folder / "answers.jsonl", {"seed": 9}) as store:
        store.append([{"id": "a"}])
    statuses, errors = two_processes(folder)
    assert statuses == [1, 1]
    assert all("was made with other settings" in error for error in errors)


def test_shares_of_other_settings_are_refused(tiny_teacher, tmp_path):
    share = tmp_path / "answers.rank1of3.jsonl"
    with RowStore.open(share, {"seed": 9}) as store:
        store.append([{"id": "a"}])
    with pytest.raises(UsageError, match=r"answers.rank1of3.jsonl was made with other settings"):
        single(tiny_teacher, tmp_path)
    assert share.exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_even_and_whole(size):
    wanted = [(p, k) for p in PROMPTS for k in range(2) if (p.id, k) != ("p4", 0)]
    shares = [share(wanted, rank, size) for rank in range(size)]
    assert sorted((p.id, k) for s in shares for p, k in s) == sorted((p.id, k) for p, k in wanted)
    prompts = [{p.id for p, _ in s} for s in shares]
    assert sum(map(len, prompts)) == len(PROMPTS)
    assert max(map(len, prompts)) - min(map(len, prompts)) <= 1
    lengths = [sum(len(p.content) for p, k in s) for s in shares]
    assert max(lengths) - min(lengths) <= 2 * max(len(p.content) for p in PROMPTS)


def test_a_variable_of_another_program_is_no_run_of_several(tiny_teacher, tmp_path, monkeypatch):
    """WORLD_SIZE alone, as some clusters set it, starts nothing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert len(single(tiny_teacher, tmp_path)) == 22
