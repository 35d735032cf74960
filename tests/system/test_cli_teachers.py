"""Teachers that show only text, scores and calibration through the command line, on tiny models."""

from __future__ import annotations

import json
import re

import pytest

from plad_fast.cli import main
from plad_fast.data.prompts import Prompt
from plad_fast.errors import UsageError
from tests.support.fault_server import FaultServer, Step, reasoning, said
from tests.support.recipe_runs import arguments

pytestmark = pytest.mark.usefixtures("no_plots")

KEY = "sk-planted-0123456789"


@pytest.fixture
def server(monkeypatch):
    """An endpoint that answers everything, and fails half of the first tries."""
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def step(question, tries, body):
        return Step("busy") if not tries and len(question) % 2 else Step()

    with FaultServer(step) as running:
        yield running


def endpoint(server):
    return ["--base-url", server.url, "--api-key-env", "TEACHER_KEY"]


def write_rows(path, count=12):
    rows = [
        {"prompt": f"say {n}", "answer": f"It is {n} then.", "reference": f"It is {n}."}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files_with(text, folder):
    return [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


def test_pairs_from_an_endpoint(server, tiny_teacher, tmp_path, capfd, monkeypatch):
    """Best and worst by score; the key is in no file and on no stream; nothing is asked twice."""
    run = [
        *("pairs", "--teacher", "openai:m", "--student", str(tiny_teacher), *endpoint(server)),
        *("--prompts", write_rows(tmp_path / "prompts.jsonl"), "--output-dir"),
        *(str(tmp_path / "out"), "--reference-column", "reference", "--scorer", "rougeL"),
        *("--select", "best-worst", "--student-samples", "3", "--max-new-tokens", "40"),
        *("--drop-contradicted", "--verbose"),
    ]  # fmt: skip
    assert main(run) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").open()]
    assert rows
    assert all(row["chosen_score"] >= row["rejected_score"] for row in rows)
    streams = capfd.readouterr()
    assert "tokens in" in streams.out
    assert KEY not in streams.out + streams.err
    assert files_with("answer to", tmp_path)
    assert not files_with(KEY, tmp_path)
    before = (tmp_path / "out" / "pairs.jsonl").read_bytes()
    monkeypatch.setattr("plad_fast.models.loading.load_model", None)
    monkeypatch.setattr("plad_fast.pairs.generation.endpoint.chat_endpoint.Endpoint.complete", None)
    assert main(run) == 0
    assert (tmp_path / "out" / "pairs.jsonl").read_bytes() == before


def test_the_recipe_with_an_endpoint(server, tiny_teacher, tmp_path, capfd):
    """Scored pairs, margin loss, two scorers and calibration; no key in the whole run folder."""
    folder = tmp_path / "run"
    extra = [
        *("--teacher", "openai:m", "--student", str(tiny_teacher), *endpoint(server)),
        *("--teacher-temperature", "1", "--teacher-samples", "2", "--student-samples", "2"),
        *("--scorer", "length", "--select", "best-worst-pooled", "--loss", "plad_margin"),
        *("--eval-scorer", "brevity", "--calibration-samples", "3"),
    ]
    assert main(arguments(tiny_teacher, folder, *extra)) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["scorers"]) == ["length", "brevity"]
    assert metrics["calibration"] is not None
    assert 'class="calibration"' in (folder / "report.html").read_text()
    assert "TEACHER_KEY" in (folder / "report.html").read_text()
    streams = capfd.readouterr()
    assert KEY not in streams.out + streams.err
    assert not files_with(KEY, folder)


def test_a_teacher_that_reasons(tiny_teacher, tmp_path, capsys, monkeypatch):
    """What it refuses is found before any work, and the same folder then takes what the messages
    say to give."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr("plad_fast.recipe.distillation.Distillation.run", lambda *_: {})
    rows = write_rows(tmp_path / "prompts.jsonl", 12)
    with FaultServer(reasoning(500)) as running:
        extra = ["--teacher", "openai:m", "--student", str(tiny_teacher), *endpoint(running)]
        for command in (
            arguments(tiny_teacher, tmp_path / "run", *extra, "--prompts", rows),
            ["pairs", *extra, "--prompts", rows, "--output-dir", str(tmp_path / "pairs"),
             "--max-new-tokens", "60"],
        ):  # fmt: skip
            assert main([*command, "--teacher-temperature", "0"]) == 2
            assert "give --teacher-temperature 1" in capsys.readouterr().err
            command += ["--teacher-temperature", "1"]
            assert main(command) == 2
            error = capsys.readouterr().err
            assert "all 60 tokens were spent before any answer" in error
            assert "raise --reasoning-tokens" in error
            assert {path.name for path in tmp_path.iterdir()} <= {"prompts.jsonl", "run"}
            assert main([*command, "--reasoning-tokens", "600"]) == 0, capsys.readouterr().err


def test_a_judge_is_tried_out_before_students_are_run(tiny_teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    pairs = tmp_path / "pairs.jsonl"
    pair = {"prompt": "say 1", "chosen": "It is 1.", "rejected": "2"}
    pairs.write_text(json.dumps(pair) + "\n")
    judged = ["judge:openai:m", "--select", "best-worst"]
    with FaultServer(lambda *_: Step(choices=[said("", "length")])) as running:
        for command in (
            ["evaluate", "--student", f"S={tiny_teacher}", "--pairs", str(pairs),
             "--max-new-tokens", "60", "--eval-scorer", judged[0],
             "--output-dir", str(tmp_path / "e")],
            ["pairs", "--teacher", str(tiny_teacher), "--student", str(tiny_teacher),
             "--max-new-tokens", "60", "--output-dir", str(tmp_path / "p"), "--scorer", *judged],
            arguments(tiny_teacher, tmp_path / "d", "--scorer", *judged),
            arguments(tiny_teacher, tmp_path / "d", "--eval-scorer", judged[0]),
        ):  # fmt: skip
            assert main([*command, *endpoint(running)]) == 2
            error = capsys.readouterr().err
            assert "no answer to a first request: all 512 tokens were spent" in error
    assert list(tmp_path.iterdir()) == [pairs]


def test_an_evaluation_tells_what_its_judge_said_and_cost(tiny_teacher, tmp_path, capsys):
    pairs, folder = tmp_path / "pairs.jsonl", tmp_path / "e"
    pair = {"prompt": "say 1", "chosen": "It is 1.", "rejected": "2"}
    pairs.write_text(json.dumps(pair) + "\n")
    with FaultServer(lambda *_: Step(choices=[said("Verdict: A")])) as running:
        command = [
            *("evaluate", "--student", f"S={tiny_teacher}", "--pairs", str(pairs)),
            *("--max-new-tokens", "8", "--eval-scorer", "judge:openai:m", "--output-dir"),
            *(str(folder), "--base-url", running.url, "--price-in", "1e6", "--price-out", "1e6"),
        ]
        for _ in range(2):
            assert main(command) == 0
            told = " ".join(capsys.readouterr().out.split())
            told_by_report = (folder / "report.html").read_text()
            for text in (told, told_by_report):
                assert "1 comparisons, 1 ties, 1 of them changed with the order" in text
                assert "2 verdicts by 16 tokens, cost 16.0000" in text
            assert json.loads((folder / "metrics.json").read_text())["judge"]["cost"] == 16
        assert "0 tokens in 0 requests" in told
    assert sum(running.asked.values()) == 3  # one of them to try it out


def test_pairs_that_a_judge_chose_tell_what_it_said_and_cost(tiny_teacher, tmp_path, capsys):
    rows = write_rows(tmp_path / "prompts.jsonl", 8)
    with FaultServer(lambda *_: Step(choices=[said("Verdict: A")])) as running:
        command = [
            *("pairs", "--teacher", "column:answer", "--student", str(tiny_teacher), "--prompts"),
            *(rows, "--output-dir", str(tmp_path / "out"), "--scorer", "judge:openai:m"),
            *("--base-url", running.url, "--max-new-tokens", "60"),
            *("--price-in", "1e6", "--price-out", "1e6"),
        ]
        assert main(command) == 0
    told = capsys.readouterr().out
    ((count, cost),) = re.findall(r"judge: (\d+) comparisons, \1 ties .*, cost ([\d.]+)", told)
    # Both orders of each, and one to try it out: 8 tokens a request.
    requests = sum(running.asked.values())
    assert requests == 2 * int(count) + 1 > 1
    assert float(cost) == 8 * requests


def test_a_key_for_a_name_gets_into_no_file(tiny_teacher, tmp_path, capsys):
    for key in ("gsk_planted0123456789", "AIzaPlanted0123456789"):
        command = arguments(tiny_teacher, tmp_path / "run", "--api-key-env", key)
        assert main(command) == 2
        assert key not in capsys.readouterr().err
    assert not files_with("lanted0123456789", tmp_path)


def test_half_an_emoji_passes_through_every_door(tiny_teacher, tmp_path, monkeypatch):
    """From a server, a column, a function, ids and references: none of them ends the recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    half = "Nice \ud83d"
    rows = [
        {"id": f"{n}" + half * (n in (0, 3)), "prompt": f"say {n:02d}"}
        | dict.fromkeys(("answer", "reference"), f"It is {n}.")
        for n in range(24)
    ]
    for n in (0, 3, 7, 20):
        rows[n]["answer"] = rows[n]["reference"] = f"{half} {n}"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "of_mine.py").write_text("def ask(prompt):\n    return 'Nice \\ud83d ' + prompt\n")
    extra = ["--student", str(tiny_teacher), "--prompts", "p.jsonl", "--scorer", "rougeL"]
    extra += ["--reference-column", "reference"]
    with FaultServer(lambda q, *_: Step(choices=[said(f"Nice \ud83d {q}")])) as running:
        mine = [*extra, "--teacher", "openai:m", "--base-url", running.url]
        command = arguments(tiny_teacher, tmp_path / "run", *mine)
        assert main(command) == 0
        assert main(command) == 0
    assert set(running.asked.values()) == {1}
    assert "Nice \ufffd" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for teacher in ("column:answer", "python:of_mine.ask"):
        folder = tmp_path / teacher.partition(":")[0]
        command = ["pairs", "--teacher", teacher, *extra, "--max-new-tokens", "8"]
        assert main([*command, "--output-dir", str(folder), "--limit", "8"]) == 0
        assert "Nice \ufffd" in (folder / "teacher.jsonl").read_text(encoding="utf-8")
    for file in tmp_path.glob("*/**/*.jsonl"):
        assert "ud83d" not in file.read_text(encoding="utf-8")


def test_what_the_teacher_failed_at_is_missing_from_all_stages(tiny_teacher, tmp_path, monkeypatch):
    """An answer that came after the teacher's stage would be in the data of the others."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    rows = write_rows(tmp_path / "prompts.jsonl", 24)

    def step(question, tries, body):
        return Step("status", 400) if "say 7" in question and not tries else Step()

    with FaultServer(step) as running:
        extra = [
            *("--teacher", "openai:m", "--student", str(tiny_teacher), *endpoint(running)),
            *("--teacher-temperature", "1", "--prompts", rows),
        ]
        run = arguments(tiny_teacher, tmp_path / "run", *extra)
        assert main(run) == 0
        assert main(run) == 0
        assert set(running.asked.values()) == {1}
    answers = (tmp_path / "run" / "answers" / "teacher.jsonl").read_text()
    assert len(answers.splitlines()) == 24
    assert "; 1 could not be had; " in (tmp_path / "run" / "run.json").read_text()


def test_a_run_has_one_judge_with_one_budget(tiny_teacher, tmp_path, monkeypatch):
    """The judge of the pairs and that of the evaluation."""
    runs = []
    monkeypatch.setattr(
        "plad_fast.recipe.distillation.Distillation.run", lambda run, *_: runs.append(run)
    )
    with FaultServer(lambda *_: Step(choices=[said("Verdict: tie")])) as running:
        extra = [
            *("--scorer", "judge:openai:m", "--select", "best-worst", "--rounds", "2"),
            *("--token-budget", "40", "--concurrency", "1", *endpoint(running)),
        ]
        assert main(arguments(tiny_teacher, tmp_path / "run", *extra)) == 0
        judges = [runs[0].texts.scorer, runs[0].evaluation["judge"]]
        items = [(Prompt("p", "?"), "x", f"{n}") for n in range(9)]
        judges[0].compare(items[:1])
        judges[1].compare(items)
    # One to try it out, and two for each comparison: 8 tokens each.
    assert sum(running.asked.values()) == 5
    assert [judge.report.failed for judge in judges] == [0, 8]


@pytest.mark.parametrize("reason", ["token budget of 80 is spent", "failed one after another"])
def test_the_recipe_ends_where_the_asking_does(reason, tiny_teacher, tmp_path, monkeypatch, capsys):
    """Rather than train on part of the answers; run again it asks for the others alone."""

    def done(run):
        raise UsageError("fine-tuning is reached")

    monkeypatch.setattr("plad_fast.recipe.distillation.Distillation._fine_tune", done)
    gone = Step("status", 503, headers={"retry-after": "0"})

    def step(question, tries, body):
        return gone if "failed" in reason and sum(running.answered.values()) >= 9 else Step()

    with FaultServer(step) as running:
        extra = [
            *("--teacher", "openai:m", "--student", str(tiny_teacher), *endpoint(running)),
            *("--prompts", write_rows(tmp_path / "prompts.jsonl", 24)),
        ]
        run = arguments(tiny_teacher, tmp_path / "run", *extra)
        if "budget" in reason:
            limited = ["--token-budget", "80", "--concurrency", "1"]
        else:
            limited = ["--concurrency", "4"]
        assert main([*run, *limited]) == 2
        error = capsys.readouterr().err
        had = len((tmp_path / "run" / "answers" / "teacher.jsonl").read_text().splitlines()) - 1
        assert 8 <= had < 14
        assert f"has answered {had} of 24 prompts and is asked no more: " in error
        assert reason in error
        assert (
            "teacher's answers"
            not in json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
        )
        running.step = lambda *_: Step()
        before = sum(running.answered.values())
        assert main(run) == 2
        assert "fine-tuning is reached" in capsys.readouterr().err
        assert sum(running.answered.values()) - before == 24 - had


def test_the_recipe_with_answers_that_exist(tiny_teacher, tmp_path):
    folder = tmp_path / "run"
    extra = [
        *("--teacher", "column:answer", "--student", str(tiny_teacher)),
        *("--prompts", write_rows(tmp_path / "prompts.jsonl", 24)),
    ]
    assert main(arguments(tiny_teacher, folder, *extra)) == 0
    pairs = [json.loads(line) for line in (folder / "pairs" / "train.jsonl").open()]
    assert all(row["chosen"][-1]["content"].startswith("It is") for row in pairs)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--teacher", "openai:m"], "give a model to start from with --student"),
        (
            ["--teacher", "openai:m", "--student", "s", "--api-key-env", "NO_KEY"],
            "NO_KEY is not set",
        ),
        (["--teacher", "opnai:m"], "unknown kind of teacher"),
        (["--teacher", "column:reply", "--student", "s"], "has no column 'reply'"),
        (["--prompt-template", "{q}"], "--prompt-template is about data of yours, not about"),
        (["--reference-column", "a"], "give a file with --prompts"),
        (["--split", "test"], "--split is about data of yours"),
        (["--scorer", "rougeL"], "reference"),
        (["--scorer", "rogue"], "unknown scorer"),
        (["--scorer", "likelihood:nowhere"], "'nowhere'"),
        (["--eval-scorer", "reward:nowhere"], "'nowhere'"),
        (["--select", "ranked"], "needs scores"),
        (["--select", "best"], "unknown selection"),
        (["--loss", "plad_margin"], "choose a --scorer"),
        (["--teacher-samples", "2", "--teacher-temperature", "0"], "raise it"),
        (["--student-samples", "2", "--student-temperature", "0"], "raise it"),
        (["--min-gap", "1"], "needs scores"),
        (["--max-length-ratio", "0.5"], "max_length_ratio"),
        (["--reasoning-tokens", "-1"], "--reasoning-tokens must be at least 0, got -1"),
        (
            ["--reasoning", "keep", "--reasoning-tokens", "964"],
            "must exceed --max-new-tokens 60 and --reasoning-tokens 964 together, got 1024",
        ),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--calibration-samples", "1"], "at least 2"),
        (["--calibration-samples", "2", "--student-temperature", "0"], "raise it"),
        (["--eval-scorer", "rogue"], "unknown scorer"),
        (["--eval-scorer", "rougeL"], "reference"),
        (
            ["--scorer", "likelihood:a/m", "--eval-scorer", "likelihood:b/m"],
            "models of one name",
        ),
        (
            ["--scorer", "judge:openai:a", "--eval-scorer", "judge:openai:b"],
            "are two judges",
        ),
        (["--price-in", "1"], "belong together"),
        (["--drop-contradicted", "maybe"], "true or false"),
        (["--loss-args", "gamma=1"], "JSON object"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_work(extra, message, tiny_teacher, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(arguments(tiny_teacher, folder, *extra)) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "student").exists()
