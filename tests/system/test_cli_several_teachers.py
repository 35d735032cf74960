"""Several teachers through the command line: a scorer decides, and one that fails fails alone."""

from __future__ import annotations

import json

import pytest

from plad_fast.cli import main
from tests.support.fault_server import FaultServer, Step
from tests.support.recipe_runs import arguments, pair

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def prompts(tmp_path):
    """The first teacher's answer is the longer one to even prompts; to the last one of all it has
    none."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"say {n}", "a": f"It is {n}." + " So it is." * (n % 2 == 0),
         "b": f"It is {n} then."}
        for n in range(12)
    ]  # fmt: skip
    rows[-1]["a"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def both(student, prompts, output, *extra):
    first = pair("column:a", student, prompts, output, "--scorer", "length", *extra)
    return [*first, "--teacher", "column:b"]


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    return {int(row["prompt"][0]["content"].split()[-1]): row for row in rows}


def test_the_scorer_decides_between_teachers(tiny_teacher, prompts, tmp_path):
    out = tmp_path / "out"
    assert main(both(tiny_teacher, prompts, out)) == 0
    rows = rows_of(out)
    assert rows
    for number, row in rows.items():
        assert row["chosen_by"] == ("column:b" if number % 2 else "column:a")
        assert row["rejected_by"] == "student"
        assert row["chosen"][0]["content"].startswith(f"It is {number}")
    names = {"teacher.jsonl", "teacher-2.jsonl", "teacher.failed.jsonl", "scores-teachers.jsonl"}
    assert names <= {path.name for path in out.iterdir()}
    # Ranked lists of all; nobody is asked anew.
    assert main([*both(tiny_teacher, prompts, out), "--select", "ranked"]) == 0
    for number, row in rows_of(out).items():
        assert len(row["by"]) == len(row["responses"])
        assert {"column:a", "column:b"} & set(row["by"])
        scores = row["scores"]
        assert scores == sorted(scores, reverse=True), number


def test_another_judge_decides_anew(tiny_teacher, prompts, tmp_path, capsys):
    """What the first one said is kept beside it, between teachers too."""
    out = tmp_path / "out"
    verdict = {"finish_reason": "stop", "message": {"content": "Verdict: A"}}
    with FaultServer(lambda *_: Step(choices=[verdict])) as running:
        for name in ("one", "two", "one"):
            judged = ["--scorer", f"judge:openai:{name}", "--base-url", running.url]
            assert main([*both(tiny_teacher, prompts, out), *judged]) == 0
            asked = sum(running.asked.values())
        assert main([*both(tiny_teacher, prompts, out), *judged]) == 0
        assert sum(running.asked.values()) == asked
    assert "== pairs: anew, " in capsys.readouterr().out
    assert len([*out.glob("verdicts.*.jsonl")]) == 1


def test_teachers_of_a_file_of_settings_and_the_whole_recipe(tiny_teacher, prompts, tmp_path):
    settings, folder = tmp_path / "run.yaml", tmp_path / "run"
    settings.write_text("teacher:\n- column:a\n- column:b\nscorer: length\n")
    extra = ["--config", str(settings), "--student", str(tiny_teacher), "--prompts", str(prompts)]
    command = arguments(tiny_teacher, folder, *extra, "--held-out", "4")
    at = command.index("--teacher")
    del command[at : at + 2]
    assert main(command) == 0
    by = {json.loads(line)["chosen_by"] for line in (folder / "pairs" / "train.jsonl").open()}
    assert by == {"column:a", "column:b"}
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert set(stages["fine-tuning"]["read"]) >= {"answers/teacher-2.jsonl"}
    assert (
        "Distillation of the column &#39;a&#39; and the column &#39;b&#39;"
        in (folder / "report.html").read_text()
    )


def test_a_teacher_that_fails_on_the_way_loses_its_own_answers_alone(
    tiny_teacher, prompts, tmp_path, capsys, caplog
):
    pytest.importorskip("openai")

    def step(question, tries, body):
        gone = {"error": {"message": "no more", "code": "insufficient_quota"}}
        return Step("status", 429, gone) if sum(running.answered.values()) > 3 else Step()

    out = tmp_path / "out"
    with FaultServer(step) as running:
        extra = ["--base-url", running.url, "--concurrency", "1", "--teacher", "openai:m"]
        command = both(tiny_teacher, prompts, out, *extra)
        assert main(command) == 0, capsys.readouterr().err
        assert "openai:m is asked no more, and the others are" in caplog.text
        first = rows_of(out)
        running.step = lambda *_: Step()
        assert main(command) == 0
    assert "openai:m" not in {first[n]["chosen_by"] for n in first if n > 6}
    # The order of the flags is that of the stores.
    assert len((out / "teacher-2.jsonl").read_text().splitlines()) == 13


def test_teachers_at_addresses_of_their_own(tiny_teacher, prompts, tmp_path, capsys):
    pytest.importorskip("openai")
    with FaultServer() as first, FaultServer() as second:
        names = [f"openai:m@{first.url}", f"openai:n@{second.url}"]
        command = pair(names[0], tiny_teacher, prompts, tmp_path / "out", "--scorer", "length")
        assert main([*command, "--teacher", names[1]]) == 0, capsys.readouterr().err
    for server, model in ((first, "m"), (second, "n")):
        assert {body["model"] for body in server.bodies} == {model}
        assert len(server.bodies) == 13  # one to try it out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--teacher", "column:b"], "no scorer decides between the teachers column:a, column:b"),
        (["--teacher", "column:a"], "--teacher column:a stands there twice"),
        (["--teacher", "opnai:b", "--scorer", "length"], "unknown kind of teacher"),
        (["--teacher", "column:c", "--scorer", "length"], "no column 'c'"),
    ],
)
def test_what_cannot_be_decided_is_refused(extra, message, tiny_teacher, prompts, tmp_path, capsys):
    assert main([*pair("column:a", tiny_teacher, prompts, tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "teacher.jsonl").exists()
