"""The recipe end to end on a tiny model: its files, its resumption after kill -9, its stages."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from plad_fast.cli import main
from plad_fast.pairs import builtin_prompts
from tests.recipe_runs import arguments, kill_at

STAGES = [
    "student", "teacher's answers", "fine-tuning", "student's samples", "pairs", "calibration",
    "evaluation",
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
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    assert student.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
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


@pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signal")
@pytest.mark.parametrize(
    ("module", "name", "at", "stage"),
    [
        ("pairs.store", "_line", 12, "teacher's answers"),
        ("trainer", "fused_linear_preference_loss", 6, "fine-tuning"),
        ("pairs.store", "_line", 38, "student's samples"),
        ("trainer", "fused_linear_preference_loss", 14, "calibration"),
        ("held_out", "score_pairs", 3, "evaluation"),
        # The model is in its place, and run.json does not know yet.
        ("run_folder", "write_atomically", 4, "fine-tuning"),
    ],
    ids=["pairs", "sft", "samples", "calibration", "evaluation", "unrecorded"],
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
    assert (folder / "sft").is_dir() == (stage not in STAGES[:3] or module == "run_folder")
    assert main(command) == 0
    out = capfd.readouterr().out
    assert out.count("done before") == len(done)
    if stage in ("teacher's answers", "student's samples"):
        assert stored > 4  # what had been answered was kept
    if module == "trainer":
        assert checkpoints  # there was something to go on from
    for file in ("metrics.json", "pairs/train.jsonl"):
        assert (folder / file).read_text() == (finished / file).read_text(), file


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
        "--max-new-tokens", "60",
    ]  # fmt: skip
    assert main(evaluate) == 0
    assert "PLaD compared with SFT" in capsys.readouterr().out
    assert (tmp_path / "e" / "report.html").is_file()


def test_a_finished_run_may_be_moved(finished, tiny_teacher, tmp_path, capsys, monkeypatch):
    """A copy has other times and another path; nothing is computed again, nothing refused."""
    shutil.copytree(finished, tmp_path / "moved", copy_function=shutil.copyfile)
    monkeypatch.setattr("plad_fast.held_out.load_model", None)
    assert main(arguments(tiny_teacher, tmp_path / "moved")) == 0
    assert capsys.readouterr().out.count("done before") == len(STAGES)


def test_a_changed_prompts_file_is_refused_at_once(tiny_teacher, tmp_path, capsys, monkeypatch):
    """Under the same path there is one more prompt: the answers there are not to these."""
    file = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": p.content}) + "\n" for p in builtin_prompts()[:12]]
    file.write_text("".join(rows[:11]))
    monkeypatch.setattr("plad_fast.distill._Distillation.run", lambda run: {})
    command = [*arguments(tiny_teacher, tmp_path / "run"), "--prompts", str(file)]
    command[command.index("--held-out") + 1] = "4"
    assert main(command) == 0
    file.write_text("".join(rows))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "prompts_digest was '11 prompts, " in error
    assert "and is '12 prompts, " in error
