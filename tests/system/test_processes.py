"""Commands in several processes: what they make is what a single process makes, also where they
were ended in between; and one of them says why they end."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plad_fast.cli import main
from tests.support.launched import FSDP2, ZERO3, Started, environment
from tests.support.recipe_runs import arguments, evaluate, train, write_pairs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks, and sends POSIX signals")

AGAIN = 75
IN_TRAINING = "training.trainer.fused_linear_preference_loss"
DEEPSPEED = "ACCELERATE_DEEPSPEED_"
OF_DEEPSPEED = ("--max-tokens-per-batch", "none", "--micro-batch-size", "1")

with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture(scope="module")
def teacher(tiny_teacher, tmp_path_factory):
    """A copy of its own: the folders of a run are known by its path too."""
    return shutil.copytree(tiny_teacher, tmp_path_factory.mktemp("processes") / "teacher")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(folder: Path, other: Path, atol: float = 1e-6) -> None:
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=atol)


def assert_same_run(folder: Path, other: Path, atol: float = 1e-6) -> None:
    for name in ("pairs/train.jsonl", "pairs/held-out.jsonl"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("sft", "plad"):
        assert_same_weights(folder / name, other / name, atol)
    assert not [path.name for path in folder.rglob("*") if ".rank" in path.name]
    assert (folder / "report.html").is_file()


def small(teacher: Path, folder: Path) -> list[str]:
    """Trainings whose last steps have fewer rows than processes, and three validations."""
    return arguments(
        teacher, folder, "--limit", "18", "--held-out", "4", "--sft-epochs", "1", "--epochs", "1",
        "--validation", "3", "--patience", "9",
        "--calibration-samples", "2", "--student-samples", "2", "--select", "best-worst",
        "--scorer", f"likelihood:{teacher}", "--saves-per-stage", "3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(small(teacher, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 9)


def training(teacher: Path, pairs: Path, folder: Path) -> list[str]:
    """Two steps of four pairs, and one of one, twice; a pair at a time."""
    more = ("--learning-rate", "1e-4", "--epochs", "2", "--saves-per-stage", "1")
    parts = ("--batch-size", "4", "--max-tokens-per-batch", "20")
    return train(teacher, pairs, folder, *more, *parts)


@pytest.fixture(scope="module")
def trained_alone(teacher, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "trained"
    assert main(training(teacher, pairs, folder)) == 0
    return folder


def checks(folder: Path) -> list[dict[str, float]]:
    """What was measured of the student at each validation."""
    log = json.loads((folder / "plad" / "log_history.json").read_text())
    return [{**entry, "epoch": 0} for entry in log if "validation/score" in entry]


@pytest.mark.parametrize(
    "variables", [{}, pytest.param(FSDP2, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"]
)
def test_distill_in_two_processes_equals_one(variables, teacher, alone, tmp_path):
    started = Started(2, small(teacher, tmp_path / "run"), tmp_path / "logs", **variables)
    assert started.statuses() == [0, 0], started.said()
    assert_same_run(tmp_path / "run", alone)
    assert "%" not in started.logs[1].read_text()  # the first process alone shows progress
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (tmp_path / "run", alone)]
    for ours, theirs in zip(*(found["students"] for found in metrics), strict=True):
        assert ours["ranking_accuracy"] == theirs["ranking_accuracy"]
        assert ours["margin"]["mean"] == pytest.approx(theirs["margin"]["mean"], abs=1e-5)
    assert len(checks(alone)) == 3
    for ours, theirs in zip(checks(tmp_path / "run"), checks(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_the_last_student_of_two_processes_equals_that_of_one(variables, teacher, tmp_path):
    """Which validation would give up for the student before."""

    def command(folder: str) -> list[str]:
        return [*small(teacher, tmp_path / folder), "--validation", "0"]

    assert main(command("alone")) == 0
    started = Started(2, command("run"), tmp_path / "logs", **variables)
    assert started.statuses() == [0, 0], started.said()
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "alone" / "plad", tmp_path / "alone" / "sft")


@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_training_in_two_processes_equals_one(variables, teacher, pairs, trained_alone, tmp_path):
    folder = tmp_path / "out"
    started = Started(2, training(teacher, pairs, folder), tmp_path / "logs", **variables)
    assert started.statuses() == [0, 0], started.said()
    assert_same_weights(folder, trained_alone)
    assert {path.name for path in folder.iterdir()} == {p.name for p in trained_alone.iterdir()}


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_in_a_training_and_another_number_of_processes(
    count, teacher, pairs, trained_alone, tmp_path
):
    """A checkpoint is saved at the end of the step, and the other number goes on from there."""
    command = training(teacher, pairs, tmp_path / "out")
    started = Started(count, command, tmp_path / "logs", f"{IN_TRAINING} 3 wait")
    started.wait_for("REACHED")
    started.send(signal.SIGTERM)
    assert started.statuses(30) == [AGAIN] * count, started.said()
    assert len(started.errors()) == 1, started.said()
    assert "ended by SIGTERM; what was finished is kept: run the same" in started.errors()[0]
    assert len([*(tmp_path / "out.checkpoints").glob("checkpoint-*")]) == 1
    again = Started(3 - count, command, tmp_path / "logs")
    assert again.statuses() == [0] * (3 - count), again.said()
    assert_same_weights(tmp_path / "out", trained_alone)


@pytest.mark.parametrize(
    "variables", [{}, pytest.param(FSDP2, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"]
)
def test_adapters_and_the_best_evaluation(variables, teacher, pairs, tmp_path):
    def command(folder: str) -> list[str]:
        more = ("--lora-r", "2", "--eval-pairs", str(pairs), "--eval-steps", "3")
        return [*training(teacher, pairs, tmp_path / folder), *more]

    assert main(command("alone")) == 0
    started = Started(2, command("out"), tmp_path / "logs", f"{IN_TRAINING} 5 wait", **variables)
    started.wait_for("REACHED")
    started.send(signal.SIGTERM)
    assert started.statuses(30) == [AGAIN, AGAIN], started.said()
    started = Started(2, command("out"), tmp_path / "logs", **variables)
    assert started.statuses() == [0, 0], started.said()
    assert_same_weights(tmp_path / "out", tmp_path / "alone")
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("out", "alone")]
    assert names[0] == names[1]
    best = [
        json.loads((tmp_path / r / "log_history.json").read_text())[-1] for r in ("out", "alone")
    ]
    assert best[0] == pytest.approx(best[1], abs=1e-5)


def test_a_validation_is_refused_under_deepspeed(teacher, tmp_path):
    command = [*small(teacher, tmp_path / "run"), "--max-tokens-per-batch", "none"]
    started = Started(1, command, tmp_path / "logs", ACCELERATE_USE_DEEPSPEED="true")
    assert started.statuses() == [2], started.said()
    assert "--validation takes a whole model in every process" in started.errors()[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_of_fsdp2_goes_on_under_fsdp2_alone(teacher, pairs, trained_alone, tmp_path):
    command = training(teacher, pairs, tmp_path / "out")
    started = Started(2, command, tmp_path / "logs", f"{IN_TRAINING} 3 wait", **FSDP2)
    started.wait_for("REACHED")
    started.send(signal.SIGTERM)
    assert started.statuses(30) == [AGAIN, AGAIN], started.said()
    refused = Started(1, command, tmp_path / "logs")
    assert refused.statuses() == [2], refused.said()
    assert "checkpoint-2 was saved under FSDP, and this run is under neither" in refused.errors()[0]
    again = Started(2, command, tmp_path / "logs", **FSDP2)
    assert again.statuses() == [0, 0], again.said()
    assert_same_weights(tmp_path / "out", trained_alone)


@pytest.mark.slow
@with_deepspeed
@pytest.mark.parametrize("more", [(), ("--lora-r", "2")], ids=["weights", "adapters"])
def test_distill_under_deepspeed_equals_one_process(more, teacher, tmp_path):
    """Models that answer are whole again after a training; adapters are merged for the next."""

    def command(folder: str) -> list[str]:
        return [*small(teacher, tmp_path / folder), "--validation", "0", *OF_DEEPSPEED, *more]

    assert main(command("alone")) == 0
    started = Started(2, command("out"), tmp_path / "logs", **ZERO3)
    assert started.statuses() == [0, 0], started.said()
    assert_same_run(tmp_path / "out", tmp_path / "alone", atol=1e-5)


@pytest.mark.slow
@with_deepspeed
@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("more", [(), ("--lora-r", "2")], ids=["weights", "adapters"])
def test_a_checkpoint_of_deepspeed_goes_on_in_as_many_processes(
    more, stage, teacher, pairs, tmp_path
):
    def command(folder: str) -> list[str]:
        evaluates = ("--eval-pairs", str(pairs), "--eval-steps", "3")
        return [*training(teacher, pairs, tmp_path / folder), *evaluates, *OF_DEEPSPEED, *more]

    assert main(command("alone")) == 0
    variables = {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    started = Started(2, command("out"), tmp_path / "logs", f"{IN_TRAINING} 5 wait", **variables)
    started.wait_for("REACHED")
    started.send(signal.SIGTERM)
    assert started.statuses(60) == [AGAIN, AGAIN], started.said()
    for count, own, said in (
        (1, variables, "saved by 2 processes, whose shares DeepSpeed does not divide among 1"),
        (2, {}, "was saved under DeepSpeed, and this run is under neither"),
    ):
        refused = Started(count, command("out"), tmp_path / "logs", **own)
        assert refused.statuses() == [2] * count, refused.said()
        assert said in refused.errors()[0]
    again = Started(2, command("out"), tmp_path / "logs", **variables)
    assert again.statuses() == [0, 0], again.said()
    assert_same_weights(tmp_path / "out", tmp_path / "alone", atol=1e-5)
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("out", "alone")]
    assert names[0] == names[1]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_failure_in_one_process_ends_all_with_one_message(command, teacher, pairs, tmp_path):
    typed, plant = training(teacher, pairs, tmp_path / "out"), f"{IN_TRAINING} 2 raise"
    if command == "evaluate":
        typed = evaluate(teacher, pairs, tmp_path / "out")
        plant = "evaluation.run_students.score_rows 1 raise"
    started = Started(2, typed, tmp_path / "logs", plant)
    assert started.statuses(60) == [1, 1], started.said()
    (error,) = started.errors()
    assert "process 1: unexpected RuntimeError: planted" in error


@pytest.mark.parametrize(
    ("typed", "variables", "said"),
    [
        (("--batch-size", "3"), {}, "--batch-size 3 is no multiple of the 2 processes"),
        (("--micro-batch-size", "4"), {}, "--micro-batch-size 4 in each of 2 processes must div"),
        (("--loss", "dpo"), FSDP2, "--loss dpo compares with the model before training"),
        ((), FSDP2 | {"FSDP_VERSION": "1"}, "fsdp_version 1"),
        ((), FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "SHARDED_STATE_DICT"),
        ((), {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16"),
        ((), {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend inductor"),
        ((), ZERO3, "--max-tokens-per-batch none"),
        (
            OF_DEEPSPEED,
            ZERO3 | {DEEPSPEED + "ZERO3_SAVE_16BIT_MODEL": "false"},
            "zero3_save_16bit_model",
        ),
        (OF_DEEPSPEED, ZERO3 | {DEEPSPEED + "CONFIG_FILE": "no.json"}, "settings of DeepSpeed"),
        (
            OF_DEEPSPEED,
            ZERO3 | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
            "gradient_accumulation_steps is 1",
        ),
    ],
)
def test_refused_before_any_work(typed, variables, said, teacher, pairs, tmp_path):
    """What a launcher asks for, in a single process; and batches, in two."""
    command = [*training(teacher, pairs, tmp_path / "out"), *typed]
    started = Started(1 if variables else 2, command, tmp_path / "logs", **variables)
    assert set(started.statuses()) == {2}, started.said()
    (error,) = started.errors()
    assert said in error
    assert not (tmp_path / "out.checkpoints").exists()


MOMENTS = (
    "recipe.inputs.builtin_prompts 1",
    "recipe.distillation.drop_layers 1",
    "pairs.generation.answering._ask 1",
    f"{IN_TRAINING} 2",
    "pairs.generation.answering._ask 1",
    "recipe.texts.build_pairs 1",
    f"{IN_TRAINING} 2",
    "pairs.generation.answering._ask 2",
    "evaluation.run_students.score_rows 1",
    "evaluation.report.write.write_metrics 1",
)
"""Of every stage, in their order: a run that was ended at one gets as far as the next."""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_in_every_stage(count, teacher, alone, tmp_path):
    command = small(teacher, tmp_path / "run")
    for moment in MOMENTS:
        started = Started(count, command, tmp_path / "logs", f"{moment} wait")
        started.wait_for("REACHED")
        started.send(signal.SIGTERM)
        assert started.statuses(30) == [AGAIN] * count, (moment, started.said())
        assert len(started.errors()) == 1, (moment, started.said())
    started = Started(count, command, tmp_path / "logs")
    assert started.statuses() == [0] * count, started.said()
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(seed, teacher, alone, tmp_path):
    """A process, which takes the other one with it; the next run may have another number."""
    draw = random.Random(seed)
    command = small(teacher, tmp_path / "run")
    for count in (2, 1, 2):
        started = Started(count, command, tmp_path / "logs")
        time.sleep(draw.uniform(1, 12))
        draw.choice(started.processes).kill()
        assert None not in started.statuses(60), started.said()
    started = Started(2, command, tmp_path / "logs")
    assert started.statuses() == [0, 0], started.said()
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_torchrun_forwards_sigterm(teacher, alone, tmp_path):
    """Its own exit status is 1 whatever that of its processes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "plad_fast", *small(teacher, tmp_path / "run")),
    ]
    options = {"env": environment(), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options, stdout=subprocess.PIPE) as ran:
        while "fine-tuning" not in (line := ran.stdout.readline()):
            assert line, ran.stderr.read()
        ran.send_signal(signal.SIGTERM)
        _, said = ran.communicate(timeout=60)
    assert ran.returncode != 0
    # Told by whichever of them is the first to end.
    assert said.count("ended by SIGTERM; what was finished is kept") == 1, said
    done = subprocess.run(command, **options, stdout=subprocess.PIPE, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", alone)
