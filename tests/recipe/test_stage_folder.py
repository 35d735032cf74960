"""Folders of `plad-fast pairs` and `evaluate`: results of other data, models or settings are not
taken for those that were asked for."""

from __future__ import annotations

import re
import shutil

import pytest

from plad_fast.cli import main
from plad_fast.recipe.run_folder import RunFolder
from tests.support.recipe_runs import changed_copy, content, evaluate, pair, train, write_pairs

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 6)


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


def test_results_without_a_record_are_not_replaced(tiny_teacher, pairs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("of somebody")
    assert main(evaluate(tiny_teacher, pairs, tmp_path / "out")) == 2
    assert "holds report.html but no stage.json" in capsys.readouterr().err
    assert main(pair(tiny_teacher, tiny_teacher, pairs, tmp_path)) == 2
    assert "holds pairs.jsonl but no stage.json" in capsys.readouterr().err
    assert main([*evaluate(tiny_teacher, pairs, tmp_path / "out"), "--overwrite"]) == 0


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
        patch.setattr("plad_fast.models.loading.load_model", None)
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
    monkeypatch.setattr("plad_fast.models.loading.load_model", None)
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
        patch.setattr("plad_fast.recipe.teachers.stored_answers", interrupted)
        assert main([*anew, "--overwrite"]) == 130
    assert [path.name for path in output.iterdir()] == ["stage.json"]
    assert main(anew) == 0


def test_overwriting_that_is_refused_leaves_the_results(tiny_teacher, pairs, tmp_path, capsys):
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    assert main(command) == 0
    (output / "student.jsonl").write_text("notes\n")
    assert main([*command, "--overwrite"]) == 2
    assert "is not a store of rows" in capsys.readouterr().err
    assert (output / "pairs.jsonl").exists()
