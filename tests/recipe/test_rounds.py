"""A run of two rounds: what each makes is kept apart, and kills change nothing."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time

import pytest

from plad_fast.cli import main
from tests.support.recipe_runs import arguments

pytestmark = pytest.mark.usefixtures("no_plots")


PAIR_FILES = ("train.jsonl", "train-2.jsonl", "held-out.jsonl")


def pairs(folder):
    return {name: (folder / "pairs" / name).read_bytes() for name in PAIR_FILES}


@pytest.fixture(scope="module")
def two_rounds(finished_run, tiny_teacher, tmp_path_factory):
    """A run of one round that was then asked for another."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("rounds") / "run")
    answers = {file: file.stat().st_mtime_ns for file in (folder / "evaluation").glob("plad-*")}
    assert len(answers) == 3
    assert main(arguments(tiny_teacher, folder, "--rounds", "2")) == 0
    # The first round's student is not evaluated again.
    assert {file: file.stat().st_mtime_ns for file in answers} == answers
    for name in ("train.jsonl", "held-out.jsonl"):
        assert pairs(folder)[name] == (finished_run / "pairs" / name).read_bytes()
    return folder


def test_every_round_is_kept_apart(two_rounds):
    """Samples, pairs and models of both; the second round samples the first one's student anew."""
    stages = json.loads((two_rounds / "run.json").read_text())["stages"]
    assert list(stages)[-4:] == [
        "student's samples, round 2", "pairs, round 2", "preference training, round 2",
        "evaluation, round 2",
    ]  # fmt: skip
    first, second = (
        [json.loads(line) for line in (two_rounds / "pairs" / name).read_text().splitlines()]
        for name in PAIR_FILES[:2]
    )
    shared = {row["id"]: row for row in first}
    rejected = [(row["rejected"], shared[row["id"]]["rejected"]) for row in second]
    assert rejected
    assert all(new != old for new, old in rejected)
    assert (two_rounds / "plad" / "config.json").is_file()
    record = json.loads((two_rounds / "plad-2" / "training.json").read_text())
    assert (
        record["source"]
        != json.loads((two_rounds / "plad" / "training.json").read_text())["source"]
    )
    metrics = json.loads((two_rounds / "metrics.json").read_text())
    names = [row["name"] for row in metrics["students"]]
    assert names == ["SFT student", "PLaD student", "PLaD student 2"]


def test_fewer_rounds_with_another_setting_and_back(two_rounds, tiny_teacher, tmp_path, capsys):
    """Each has evaluations of its own in the same folder."""
    folder = shutil.copytree(two_rounds, tmp_path / "run")
    for rounds, epochs in (("1", "1"), ("2", "1"), ("1", "2")):
        changed = ("--rounds", rounds, "--sft-epochs", epochs)
        assert main(arguments(tiny_teacher, folder, *changed)) == 0
    said = capsys.readouterr().out
    assert "evaluation/sft-student-logps.json is another: evaluation, round 2 runs anew" in said
    assert "in place of" not in said
    names = [row["name"] for row in json.loads((folder / "metrics.json").read_text())["students"]]
    assert names == ["SFT student", "PLaD student"]


@pytest.mark.slow
def test_three_kills_at_random_change_no_byte_of_the_pairs(two_rounds, tiny_teacher, tmp_path):
    """Whatever the moment after loading: the moments differ from run to run of this test."""
    folder = tmp_path / "run"
    run = [sys.executable, "-m", "plad_fast", *arguments(tiny_teacher, folder, "--rounds", "2")]
    kills = 0
    while kills < 3:
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline()  # loading libraries takes a while
            time.sleep(random.uniform(0, 3))
            if process.poll() is not None:
                break
            process.kill()
            kills += 1
    assert kills, "every run ended before it could be killed"
    assert main(arguments(tiny_teacher, folder, "--rounds", "2")) == 0
    assert pairs(folder) == pairs(two_rounds)
