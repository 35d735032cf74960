"""The recipe end to end on a tiny model: its files, its resumption after kill -9, its stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from plad_fast import UsageError
from plad_fast.cli import main
from plad_fast.distill import split_prompts
from plad_fast.pairs import Prompt, builtin_prompts
from plad_fast.recipe import DistillConfig
from plad_fast.run_folder import RunFolder
from plad_fast.training import latest_checkpoint

STAGES = [
    "student", "teacher's answers", "fine-tuning", "student's samples", "pairs", "calibration",
    "evaluation",
]  # fmt: skip


def arguments(teacher, output, *extra: str) -> list[str]:
    return [
        "distill", "--teacher", str(teacher), "--student-layers", "1", "--limit", "24",
        "--held-out", "8", "--teacher-temperature", "1", "--student-temperature", "1",
        "--max-new-tokens", "60", "--batch-size", "2", "--precision", "float32",
        "--output-dir", str(output), *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_teacher, tmp_path_factory):
    """A run folder that the command line filled."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(arguments(tiny_teacher, folder)) == 0
    return folder


def test_the_run_folder_holds_what_was_promised(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert list(json.loads((finished / "run.json").read_text())["stages"]) == STAGES
    student = AutoModelForCausalLM.from_pretrained(finished / "plad")
    assert student.config.num_hidden_layers == 1
    tokenizer = AutoTokenizer.from_pretrained(finished / "plad")
    ids = tokenizer("hello", return_tensors="pt")
    assert student.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    pair = json.loads((finished / "pairs" / "train.jsonl").read_text().splitlines()[0])
    assert {"prompt", "chosen", "rejected", "id", "source"} <= pair.keys()
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [row["name"] for row in metrics["students"]] == ["SFT student", "PLaD student"]
    assert metrics["students"][0]["ranking_accuracy"]["mean"] is not None
    assert metrics["students"][0]["own_ranking_accuracy"] is not None
    assert {p.name for p in (finished / "plots").iterdir()} == {
        "comparison.png", "margins.png", "training.png",
    }  # fmt: skip
    assert "<html" in (finished / "report.html").read_text()
    assert not list(finished.glob("*.checkpoints"))
    assert not list(finished.glob(".*"))


def test_a_finished_run_is_not_done_again(finished, tiny_teacher, capsys, monkeypatch):
    """No model is loaded; tables and report come from the files."""
    monkeypatch.setattr("plad_fast.distill.load_model", None)
    monkeypatch.setattr("plad_fast.held_out.load_model", None)
    before = (finished / "metrics.json").read_text()
    assert main(arguments(tiny_teacher, finished)) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == len(STAGES)
    assert (finished / "metrics.json").read_text() == before


def test_two_runs_give_the_same_numbers(finished, tiny_teacher, tmp_path):
    assert main(arguments(tiny_teacher, tmp_path / "again")) == 0
    names = ("metrics.json", "pairs/train.jsonl", "answers/student.jsonl")
    for name in names:
        assert (tmp_path / "again" / name).read_text() == (finished / name).read_text(), name


def test_other_settings_in_the_same_folder_are_refused(finished, tiny_teacher, capsys):
    assert main(arguments(tiny_teacher, finished, "--beta", "9")) == 2
    error = capsys.readouterr().err
    assert "beta was 0.5 and is 9.0" in error or "and is 9.0" in error
    assert "--overwrite" in error
    assert (finished / "report.html").is_file()


KILLABLE = """
import sys, time
import plad_fast.{module} as module
from plad_fast.cli import main
real = module.{name}
count = 0
def wait(*args, **kwargs):
    global count
    count += 1
    if count == {at}:
        print("REACHED", flush=True)
        time.sleep(60)
    return real(*args, **kwargs)
module.{name} = wait
sys.exit(main({arguments!r}))
"""


def kill_at(module: str, name: str, at: int, arguments: list[str]) -> None:
    """Run a command and kill -9 it at the given call of a function."""
    code = KILLABLE.format(module=module, name=name, at=at, arguments=arguments)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "REACHED" in line:
                break
        else:
            pytest.fail(f"{name} was never called {at} times: {process.stderr.read()}")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signal")
@pytest.mark.parametrize(
    ("module", "name", "at", "stage"),
    [
        ("pairs.store", "_line", 12, "teacher's answers"),
        ("trainer", "fused_linear_preference_loss", 6, "fine-tuning"),
        ("pairs.store", "_line", 38, "student's samples"),
        ("trainer", "fused_linear_preference_loss", 14, "calibration"),
        ("held_out", "score_pairs", 3, "evaluation"),
    ],
    ids=["pairs", "sft", "samples", "calibration", "evaluation"],
)
def test_kill_and_go_on(module, name, at, stage, finished, tiny_teacher, tmp_path, capfd):
    """After kill -9 in any stage the same command ends with the numbers of a run left alone."""
    folder = tmp_path / "run"
    command = arguments(tiny_teacher, folder, "--generation-batch-size", "4")
    kill_at(module, name, at, command)
    done = json.loads((folder / "run.json").read_text())["stages"]
    assert list(done) == STAGES[: STAGES.index(stage)]
    stored = sum(len(path.read_text().splitlines()) for path in folder.rglob("*.jsonl"))
    checkpoints = list(folder.glob("*.checkpoints/checkpoint-4/trainer_state.json"))
    assert main(command) == 0
    out = capfd.readouterr().out
    assert out.count("done before") == len(done)
    if stage in ("teacher's answers", "student's samples"):
        assert stored > 4  # what had been answered was kept
    if stage in ("fine-tuning", "calibration"):
        assert checkpoints  # there was something to go on from
    for file in ("metrics.json", "pairs/train.jsonl"):
        assert (folder / file).read_text() == (finished / file).read_text(), file


def test_training_goes_on_from_its_checkpoint(tiny_teacher, tmp_path, capfd):
    """`train` killed after a checkpoint takes up the step count and ends with the same weights."""
    from safetensors.torch import load_file

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p.content, "chosen": f" yes {i}", "rejected": f" no {i}"}
            for i, p in enumerate(builtin_prompts()[:12])]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(output):
        return [
            "train", "--model", str(tiny_teacher), "--pairs", str(pairs), "--batch-size", "2",
            "--learning-rate", "1e-3", "--precision", "float32", "--saves-per-stage", "3",
            "--output-dir", str(output),
        ]  # fmt: skip

    kill_at("trainer", "fused_linear_preference_loss", 4, command(tmp_path / "killed"))
    checkpoint = latest_checkpoint(tmp_path / "killed.checkpoints")
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-2")
    # A half-written newer checkpoint, as a kill during saving leaves it, is passed over.
    (tmp_path / "killed.checkpoints" / "checkpoint-4").mkdir()
    (tmp_path / "killed.checkpoints" / "checkpoint-4" / "trainer_state.json").write_text('{"a')
    assert latest_checkpoint(tmp_path / "killed.checkpoints") == checkpoint
    assert main(command(tmp_path / "killed")) == 0
    assert main(command(tmp_path / "straight")) == 0
    for name, tensor in load_file(tmp_path / "straight" / "model.safetensors").items():
        other = load_file(tmp_path / "killed" / "model.safetensors")[name]
        torch.testing.assert_close(other, tensor)


def test_the_stages_alone(finished, tiny_teacher, tmp_path, capsys):
    """pairs, train and evaluate, each on what the one before wrote."""
    pairs = [
        "pairs", "--teacher", str(tiny_teacher), "--student", str(finished / "student"),
        "--limit", "12", "--teacher-temperature", "1", "--student-temperature", "1",
        "--max-new-tokens", "60", "--precision", "float32", "--output-dir", str(tmp_path / "p"),
    ]  # fmt: skip
    assert main(pairs) == 0
    file = str(tmp_path / "p" / "pairs.jsonl")
    train = ["train", "--model", str(finished / "student"), "--pairs", file]
    assert main([*train, "--output-dir", str(tmp_path / "sft"), "--loss", "sft"]) == 0
    assert main([*train, "--output-dir", str(tmp_path / "plad"), "--beta", "0.1"]) == 0
    assert "ranking_accuracy" in capsys.readouterr().out
    evaluate = [
        "evaluate",
        "--student", f"SFT={tmp_path / 'sft'}",
        "--student", f"PLaD={tmp_path / 'plad'}",
        "--pairs", file, "--output-dir", str(tmp_path / "e"), "--precision", "float32",
    ]  # fmt: skip
    assert main(evaluate) == 0
    assert "PLaD compared with SFT" in capsys.readouterr().out
    assert (tmp_path / "e" / "report.html").is_file()


def test_split_is_disjoint_complete_and_seeded():
    prompts = [Prompt(str(i), f"p{i}") for i in range(20)]
    train, held_out = split_prompts(prompts, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert {p.id for p in train} | {p.id for p in held_out} == {str(i) for i in range(20)}
    assert split_prompts(prompts, 0.25, seed=3) == (train, held_out)
    assert split_prompts(prompts, 0.25, seed=4) != (train, held_out)
    assert len(split_prompts(prompts, 6, seed=3)[1]) == 6
    with pytest.raises(UsageError, match="each needs at least"):
        split_prompts(prompts, 19.0, seed=0)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})

    def fail(path):
        (path / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        folder.make_folder("model", fail)
    assert not (folder / "model").exists()
    made = folder.make_folder("model", lambda path: (path / "whole").write_text("x") and None)
    assert [p.name for p in made.iterdir()] == ["whole"]


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    first = RunFolder(tmp_path / "run", {})
    with pytest.raises(UsageError, match="another process"):
        RunFolder(tmp_path / "run", {})
    first.close()
    RunFolder(tmp_path / "run", {}).close()


def test_the_defaults_are_valid_and_round_trip_through_yaml(tmp_path):
    import yaml

    from plad_fast.recipe import load_settings

    config = DistillConfig(student_layers=(0, 1, 5), limit=7)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert DistillConfig(**load_settings(path)) == config


def test_interruption_by_hand_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("plad_fast.distill.distill", interrupt)
    assert main(["quickstart", "--output-dir", str(tmp_path / "q")]) == 130
    assert "run the same command again" in capsys.readouterr().err
