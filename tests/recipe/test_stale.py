"""Results of other data, models or settings are never taken for those that were asked for."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch

from plad_fast.cli import main
from plad_fast.data.locks import locked
from plad_fast.models.loading import load_model
from plad_fast.recipe.run_folder import RunFolder
from tests.support.recipe_runs import kill_at, write_pairs

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 6)


def train(model, pairs, output, *extra: str) -> list[str]:
    return ["train", "--model", str(model), "--pairs", str(pairs), "--output-dir", str(output),
            "--batch-size", "2", "--precision", "float32", *extra]  # fmt: skip


def test_a_finished_training_is_recognised_and_another_refused(
    tiny_teacher, pairs, tmp_path, capsys
):
    output = tmp_path / "out"
    assert main(train(tiny_teacher, pairs, output)) == 0
    assert "done before" not in capsys.readouterr().out
    weights = (output / "model.safetensors").read_bytes()
    # Micro-batches and checkpoints change memory and safety, not the model.
    same = train(tiny_teacher, pairs, output, "--micro-batch-size", "1", "--saves-per-stage", "1")
    assert main(same) == 0
    assert "done before" in capsys.readouterr().out

    more = write_pairs(tmp_path / "more.jsonl", 7)
    retrained = changed_copy(tiny_teacher, tmp_path / "retrained")
    others = {
        "beta was None and is 3.0": train(tiny_teacher, pairs, output, "--beta", "3"),
        "rows was '6 rows, .* and is '7 rows, ": train(tiny_teacher, more, output),
        "source was ": train(retrained, pairs, output),
    }
    for message, command in others.items():
        assert main(command) == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert "choose another --output-dir, or pass --overwrite" in error
    assert (output / "model.safetensors").read_bytes() == weights
    assert main([*train(tiny_teacher, pairs, output, "--beta", "3"), "--overwrite"]) == 0
    assert json.loads((output / "training.json").read_text())["beta"] == 3.0


def changed_copy(model_folder, copy):
    """The same model in every size, with one other number."""
    shutil.copytree(model_folder, copy)
    model = load_model(copy)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(copy)
    return copy


def test_checkpoints_of_another_training_are_not_resumed(tiny_teacher, pairs, tmp_path, capsys):
    output = tmp_path / "out"
    loss = "training.trainer.fused_linear_preference_loss"
    kill_at(loss, 3, train(tiny_teacher, pairs, output))
    assert list(output.with_name("out.checkpoints").glob("checkpoint-*"))
    assert main(train(tiny_teacher, pairs, output, "--epochs", "2")) == 2
    assert "epochs was 1.0 and is 2.0" in capsys.readouterr().err
    (tmp_path / "out.checkpoints" / "training.json").unlink()
    assert main(train(tiny_teacher, pairs, output)) == 2
    assert "out.checkpoints is there already and has no record" in capsys.readouterr().err
    assert not output.exists()


def test_a_training_that_was_refused_keeps_nobody_from_another(
    tiny_teacher, pairs, tmp_path, capsys
):
    output = tmp_path / "out"
    broken = changed_copy(tiny_teacher, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 1000)
    assert main(train(broken, pairs, output)) == 2
    assert "cannot load" in capsys.readouterr().err
    assert main(train(tiny_teacher, pairs, output)) == 0


def test_two_trainings_cannot_share_a_folder(tiny_teacher, pairs, tmp_path, capsys):
    (tmp_path / "out.checkpoints").mkdir()
    with locked(tmp_path / "out.checkpoints"):
        assert main(train(tiny_teacher, pairs, tmp_path / "out")) == 2
    assert "being filled by another process" in capsys.readouterr().err


def evaluate(student, pairs, output, *extra: str) -> list[str]:
    return ["evaluate", "--student", f"A={student}", "--pairs", str(pairs), "--output-dir",
            str(output), "--max-new-tokens", "20", "--precision", "float32", *extra]  # fmt: skip


def test_a_stale_evaluation_is_refused(tiny_teacher, pairs, tmp_path, capsys):
    """Another model under the same path, other pairs, other settings: each by its name."""
    student = tmp_path / "student"
    shutil.copytree(tiny_teacher, student)
    output = tmp_path / "out"
    assert main(evaluate(student, pairs, output)) == 0
    # Elsewhere and with other times it is the same model.
    shutil.copytree(student, tmp_path / "moved", copy_function=shutil.copyfile)
    assert main(evaluate(tmp_path / "moved", pairs, output)) == 0
    capsys.readouterr()

    text = pairs.read_text()
    cases = {
        "length_normalization was 1.0 and is 0.0": ["--length-normalization", "0"],
        "max_length was 1024 and is 512": ["--max-length", "512"],
        "temperature was 1.0 and is 0.5": ["--student-temperature", "0.5"],
        "precision was 'float32' and is 'auto'": ["--precision", "auto"],
        "pairs was '6 pairs, ": [],
        "weights was ": [],
    }
    for message, extra in cases.items():
        if message.startswith("pairs"):
            pairs.write_text(text.replace(" x", " y"))
        if message.startswith("weights"):
            shutil.rmtree(student)
            changed_copy(tiny_teacher, student)
        command = evaluate(student, pairs, output, *extra)
        assert main(command) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert "--overwrite" in error
    assert main([*command, "--overwrite"]) == 0
    assert main(command) == 0


def test_pairs_of_a_retrained_student_are_made_anew(tiny_teacher, pairs, tmp_path, capsys):
    student = changed_copy(tiny_teacher, tmp_path / "student")
    command = pair(tiny_teacher, student, pairs, tmp_path / "p")
    assert main(command) == 0
    shutil.rmtree(student)
    shutil.copytree(tiny_teacher, student)
    capsys.readouterr()
    assert main(command) == 2
    assert "weights was " in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main([*command, "--precision", "bfloat16"]) == 2
    assert "precision was 'float32' and is 'bfloat16'" in capsys.readouterr().err


def content(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_the_folder_of_a_run_or_a_model_is_no_place_for_other_results(
    overwrite, tiny_teacher, pairs, tmp_path, capsys
):
    """Its metrics.json, report.html and plots have the names of an evaluation's."""
    run, model = tmp_path / "run", tmp_path / "model"
    RunFolder(run, {}).close()
    model.mkdir()
    (model / "training.json").write_text("{}")
    (run / "metrics.json").write_text("of the run")
    before = content(tmp_path)
    for folder, what in ((run, "holds run.json, so it is the"), (model, "holds training.json")):
        for command in (
            evaluate(tiny_teacher, pairs, folder),
            pair(tiny_teacher, tiny_teacher, pairs, folder),
        ):
            assert main([*command, *overwrite]) == 2
            assert what in capsys.readouterr().err
    assert content(tmp_path) == before


def test_an_evaluation_of_others_is_not_replaced(tiny_teacher, pairs, tmp_path, capsys):
    output = tmp_path / "out"
    first = evaluate(tiny_teacher, pairs, output)
    assert main(first) == 0
    before = content(output)
    other = [part.replace("A=", "B=") for part in first]
    assert main(other) == 2
    assert "students was ['A'] and is ['B']" in capsys.readouterr().err
    assert main([*first, "--calibration-samples", "2"]) == 2
    assert "calibration_samples was 0 and is 2" in capsys.readouterr().err
    assert main(pair(tiny_teacher, tiny_teacher, pairs, output)) == 2
    assert "holds the results of `plad-fast evaluate`" in capsys.readouterr().err
    assert content(output) == before
    assert main(first) == 0
    assert main([*other, "--overwrite"]) == 0
    assert {path.name for path in output.glob("*-*.json*")} == {
        "b-greedy.jsonl", "b-logps.json", "b-sampled.jsonl",
    }  # fmt: skip


def test_results_without_a_record_are_not_replaced(tiny_teacher, pairs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("of somebody")
    assert main(evaluate(tiny_teacher, pairs, tmp_path / "out")) == 2
    assert "holds report.html but no stage.json" in capsys.readouterr().err
    assert main(pair(tiny_teacher, tiny_teacher, pairs, tmp_path)) == 2
    assert "holds pairs.jsonl but no stage.json" in capsys.readouterr().err
    assert main([*evaluate(tiny_teacher, pairs, tmp_path / "out"), "--overwrite"]) == 0


def pair(teacher, student, prompts, output, *extra: str) -> list[str]:
    return ["pairs", "--teacher", str(teacher), "--student", str(student), "--prompts",
            str(prompts), "--output-dir", str(output), "--max-new-tokens", "60", "--precision",
            "float32", "--teacher-temperature", "1", *extra]  # fmt: skip


def test_pairs_of_other_prompts_or_settings_are_not_replaced(
    tiny_teacher, pairs, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    # Nothing came of these settings, and the message advises others.
    assert main([*command, "--scorer", "length", "--min-gap", "9999"]) == 2
    assert "no pair is left" in capsys.readouterr().err
    assert main(command) == 0
    before = content(output)
    assert main(command) == 0
    assert content(output) == before
    capsys.readouterr()
    more = write_pairs(tmp_path / "more.jsonl", 7)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(more.read_text().splitlines(keepends=True)[:0:-1]))
    others = {
        "prompts was '6 prompts, .* and is '6 prompts, ": [*command, "--prompts", str(fewer)],
        "student_temperature was 1.0 and is 0.5": [*command, "--student-temperature", "0.5"],
    }
    with monkeypatch.context() as patch:
        patch.setattr("plad_fast.pairs.generation.sources.open_local_model", None)
        for message, other in others.items():
            assert main(other) == 2
            error = capsys.readouterr().err
            assert re.search(message, error), error
            assert "--overwrite" in error
            assert "copies of its stored answers" in error
    assert content(output) == before
    # What was answered stays where more prompts follow after those.
    assert main([*command, "--prompts", str(more)]) == 0
    answers = (output / "teacher.jsonl").read_bytes()
    assert answers.startswith(before[output / "teacher.jsonl"])
    assert len(answers) > len(before[output / "teacher.jsonl"])
    assert main([*others["student_temperature was 1.0 and is 0.5"], "--overwrite"]) == 0


def test_other_pairs_are_made_of_the_answers_that_are_there(
    tiny_teacher, pairs, tmp_path, capsys, monkeypatch
):
    """How pairs are chosen has no part in the answers, which may have been paid for."""
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    assert main(command) == 0
    first = (output / "pairs.jsonl").read_bytes()
    monkeypatch.setattr("plad_fast.pairs.generation.sources.open_local_model", None)
    for scorer in ("length", "brevity", "length"):
        by_score = [*command, "--scorer", scorer, "--select", "best-worst-pooled"]
        assert main(by_score) == 0
    out = capsys.readouterr().out
    assert "select was 'teacher' and is 'best-worst-pooled': pairs.jsonl is made anew" in out
    assert (output / "pairs.jsonl").read_bytes() != first
    assert main(command) == 0
    assert (output / "pairs.jsonl").read_bytes() == first
    # Scores of the other scorer are kept, and taken back with it.
    assert len(list(output.glob("scores.*.jsonl"))) == 1


def test_pairs_that_were_edited_or_cut_off(tiny_teacher, pairs, tmp_path, capsys):
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    assert main(command) == 0
    file = output / "pairs.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[1:]))
    assert main(command) == 2
    assert "pairs.jsonl was edited" in capsys.readouterr().err
    assert file.read_bytes() == b"".join(lines[1:])
    # What reads as whole rows is no whole file: nobody trains on half.
    for half in (b"".join(lines[:2]), whole[: len(whole) // 2], b""):
        file.write_bytes(half)
        for trained in (
            train(tiny_teacher, file, tmp_path / "t"),
            evaluate(tiny_teacher, file, tmp_path / "e"),
        ):
            assert main(trained) == 2
        if half.endswith(b"\n"):
            assert f"pairs.jsonl has 2 of its {len(lines)} rows" in capsys.readouterr().err
        assert main(command) == 0
        assert file.read_bytes() == whole
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "e").exists()
    # Elsewhere it is a file like any other.
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:2]))
    assert main(train(tiny_teacher, tmp_path / "part.jsonl", tmp_path / "t")) == 0


@pytest.mark.parametrize("damage", [b"", b'{"form', b"\0" * 40, b"[1]", b"no JSON"])
def test_a_damaged_record_is_replaced_where_that_is_asked_for(
    damage, tiny_teacher, pairs, tmp_path, capsys
):
    made, model = tmp_path / "p", tmp_path / "m"
    commands = [
        (made / "stage.json", pair(tiny_teacher, tiny_teacher, pairs, made)),
        (model / "training.json", train(tiny_teacher, pairs, model)),
    ]
    for record, command in commands:
        assert main(command) == 0
        results = content(record.parent)
        record.write_bytes(damage)
        assert main(command) == 2
        error = capsys.readouterr().err
        assert record.name in error
        assert "damaged" in error
        assert "--overwrite" in error
        assert content(record.parent) == {**results, record: damage}
        assert main([*command, "--overwrite"]) == 0
        assert main(command) == 0


def test_only_a_model_that_was_trained_here_is_overwritten(tiny_teacher, pairs, tmp_path, capsys):
    """Nobody is advised to delete what is not ours, and nothing of it is removed."""
    foreign, mixed = tmp_path / "foreign", tmp_path / "mixed"
    shutil.copytree(tiny_teacher, foreign)
    assert main(train(tiny_teacher, pairs, mixed)) == 0
    (mixed / "notes.txt").write_text("of somebody")
    before = content(tmp_path)
    for folder, what in ((foreign, "training.json"), (mixed, "notes.txt")):
        for extra in (["--epochs", "2"], ["--epochs", "2", "--overwrite"]):
            assert main(train(tiny_teacher, pairs, folder, *extra)) == 2
            assert "delete" not in (error := capsys.readouterr().err)
        assert what in error
    command = train(foreign, pairs, foreign, "--overwrite")
    assert main(command) == 2
    assert "--model and --output-dir are both" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_an_interrupted_overwriting_goes_on_without_the_flag(
    tiny_teacher, pairs, tmp_path, monkeypatch
):
    """All that other settings made is gone at once, also what is not reached before the end."""
    output = tmp_path / "p"
    assert main(pair(tiny_teacher, tiny_teacher, pairs, output)) == 0
    anew = pair(tiny_teacher, tiny_teacher, pairs, output, "--seed", "5")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("plad_fast.recipe.stages.stored_answers", interrupted)
        assert main([*anew, "--overwrite"]) == 130
    assert [path.name for path in output.iterdir()] == ["stage.json"]
    assert main(anew) == 0


def test_cut_off_samples_are_no_answers(tiny_teacher, pairs, tmp_path):
    """Scoring adds an end token; to a sample that did not end it would be a token never chosen."""
    output = tmp_path / "out"
    assert main(evaluate(tiny_teacher, pairs, output, "--student-temperature", "1")) == 0
    lines = (output / "a-sampled.jsonl").read_text().splitlines()[1:]
    samples = {row["id"]: row for row in map(json.loads, lines)}
    usable = [row["finish_reason"] == "stop" and bool(row["text"]) for row in samples.values()]
    assert 0 < sum(usable) < len(usable)
    own = json.loads((output / "a-logps.json").read_text())["scores"]["own"]
    assert [value is not None for value in own] == [
        samples[str(i)]["finish_reason"] == "stop" and bool(samples[str(i)]["text"])
        for i in range(len(own))
    ]
    row = json.loads((output / "metrics.json").read_text())["students"][0]
    assert (row["n_own_pairs"], row["n_pairs"]) == (sum(usable), len(usable))
    assert f"{sum(usable)} for A" in (output / "report.html").read_text()


def test_overwriting_that_is_refused_leaves_the_results(tiny_teacher, pairs, tmp_path, capsys):
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    assert main(command) == 0
    (output / "student.jsonl").write_text("notes\n")
    assert main([*command, "--overwrite"]) == 2
    assert "is not a store of rows" in capsys.readouterr().err
    assert (output / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A", "a"], "A and --student a would share"),
        (["e\u0301", "\u00e9"], "would share"),
        (["a b", "A-b"], "would share"),
        (["a\nb"], "control"),
        (["a\x1b[2J"], "control"),
        (["a/b"], "must not contain /"),
        (["x" * 120], "100 bytes"),
        (["Teacher"], "--student Teacher"),
        (["scores"], "--student scores"),
    ],
)
def test_students_that_could_not_be_told_apart(
    names, message, tiny_teacher, pairs, tmp_path, capsys
):
    command = evaluate(tiny_teacher, pairs, tmp_path / "out")
    students = [part for name in names for part in ("--student", f"{name}={tiny_teacher}")]
    assert main([command[0], *students, *command[3:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "\x1b" not in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_that_were_the_same_file(tiny_teacher, pairs, tmp_path):
    """The samples of `a` and the log-probabilities of `a-samples`."""
    other = changed_copy(tiny_teacher, tmp_path / "other")
    command = evaluate(tiny_teacher, pairs, tmp_path / "out", "--calibration-samples", "2")
    command[1:3] = ["--student", f"a={tiny_teacher}", "--student", f"a-samples={other}"]
    for _ in range(2):
        assert main(command) == 0
        rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["students"]
        assert [row["name"] for row in rows] == ["a", "a-samples"]
        assert rows[0]["margin"] != rows[1]["margin"]
