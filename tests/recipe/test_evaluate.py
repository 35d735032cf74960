"""`plad-fast evaluate`: its students, and the evaluations that are not replaced."""

from __future__ import annotations

import json
import shutil

import pytest

from plad_fast.cli import main
from tests.support.recipe_runs import changed_copy, content, evaluate, pair, write_pairs

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 6)


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


def test_students_are_sampled_at_one_temperature(tiny_teacher, pairs, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(evaluate(tiny_teacher, pairs, output, "--student-temperature", "0.5,1")) == 2
    assert "--student-temperature 0.5, 1.0: all students are" in capsys.readouterr().err
    assert not output.exists()


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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A", "a"], "A and --student a would share"),
        (["e\u0301", "\u00e9"], "would share"),
        (["a b", "A-b"], "would share"),
        (["a\nb"], "control"),
        (["a\x1b[2J"], "control"),
        (["a/b"], "without / "),
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
