"""`plad-fast pairs --part-size`: few prompts in memory, the pairs of all of them."""

from __future__ import annotations

import json

import pytest

from plad_fast.cli import main
from plad_fast.recipe import stages
from tests.support.recipe_runs import content, kill_at, pair


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": f"Say {i}.", "id": f"p{i}", "answer": f"It is {i}"} for i in range(23)]
    rows[11]["answer"] = rows[12]["answer"] = ""  # the teacher has none
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(student, prompts, output, *extra):
    return [*pair("column:answer", student, prompts, output), "--prompt-column", "question", *extra]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pairs_are_those_of_the_whole_and_few_prompts_are_held(
    tiny_teacher, prompts, tmp_path, capsys, monkeypatch
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(tiny_teacher, prompts, whole)) == 0
    told = capsys.readouterr().out
    held = []
    real = stages.RecipeTexts
    monkeypatch.setattr(
        stages,
        "RecipeTexts",
        lambda config, p, **more: held.append(len(p)) or real(config, p, **more),
    )
    in_parts = command(tiny_teacher, prompts, out, "--part-size", "5")
    assert main(in_parts) == 0
    assert held == [5, 5, 5, 5, 3]
    for name in ("pairs.jsonl", "dropped.jsonl"):
        assert rows(out / name) == rows(whole / name)
    said = capsys.readouterr().out
    kept, total = len(rows(out / "pairs.jsonl")), 23
    assert f"kept {kept} of {total} prompts in 5 parts: 2 missing" in said
    assert f"kept {kept} of {total} prompts: 2 missing" in told
    before = content(out)
    assert main(in_parts) == 0
    assert content(out) == before


def test_killed_extended_and_refused(tiny_teacher, prompts, tmp_path, capsys):
    """What is stored of a part is not made again; parts of another size are not mixed."""
    out = tmp_path / "out"
    first = command(tiny_teacher, prompts, out, "--part-size", "8", "--limit", "16")
    kill_at("data.store._line", 24, first)
    assert not (out / "pairs.jsonl").exists()
    stored = (out / "parts" / "00001" / "student.jsonl").read_bytes()
    assert main(first) == 0
    assert (out / "parts" / "00001" / "student.jsonl").read_bytes() == stored
    assert main(command(tiny_teacher, prompts, out, "--part-size", "8")) == 0
    assert "in 3 parts" in capsys.readouterr().out
    assert main(command(tiny_teacher, prompts, tmp_path / "whole")) == 0
    assert rows(out / "pairs.jsonl") == rows(tmp_path / "whole" / "pairs.jsonl")
    capsys.readouterr()
    for extra, message in (
        (["--part-size", "6"], "part_size was 8 and is 6"),
        ([], "part_size was 8 and is 'not set'"),
        (
            ["--part-size", "8", "--teacher-temperature", "0.5"],
            "teacher_temperature was 1.0 and is",
        ),
        (["--part-size", "8", "--scorer", "length", "--select", "ranked"], "needs a --list-size"),
    ):
        assert main(command(tiny_teacher, prompts, out, *extra)) == 2
        assert message in capsys.readouterr().err
    for name in ("pairs", "dropped"):  # as a kill leaves them while parts are joined
        (out / f".{name}.jsonl.1.tmp").write_text("{}")
    other = ("--top-p", "0.5")  # of the student's alone
    kill_at(
        "recipe.texts.build_pairs",
        2,
        command(tiny_teacher, prompts, out, "--part-size", "8", *other),
    )
    assert rows(out / "pairs.jsonl") == rows(tmp_path / "whole" / "pairs.jsonl")
    assert main(command(tiny_teacher, prompts, out, "--part-size", "8", *other)) == 0
    assert main(command(tiny_teacher, prompts, tmp_path / "whole", *other)) == 0
    assert rows(out / "pairs.jsonl") == rows(tmp_path / "whole" / "pairs.jsonl")
    assert not list(out.glob(".*.tmp"))
    anew = command(tiny_teacher, prompts, out, "--part-size", "12", "--overwrite")
    assert main(anew) == 0
    assert sorted(place.stem for place in (out / "parts").glob("*.jsonl")) == ["00001", "00002"]


@pytest.mark.parametrize("start", [0, 5])
def test_a_part_may_lack_a_column_and_all_answers(start, tiny_teacher, prompts, tmp_path):
    """As a whole file may for some of its rows; the first part too."""
    found = rows(prompts)
    for row in found[start : start + 5]:
        del row["answer"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in found))
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(tiny_teacher, prompts, whole)) == 0
    assert main(command(tiny_teacher, prompts, out, "--part-size", "5")) == 0
    assert rows(out / "pairs.jsonl") == rows(whole / "pairs.jsonl")


def test_an_id_in_two_parts_is_refused(tiny_teacher, prompts, tmp_path, capsys):
    found = rows(prompts)
    found[20]["id"] = found[1]["id"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in found))
    assert main(command(tiny_teacher, prompts, tmp_path / "out", "--part-size", "5")) == 2
    assert "the id 'p1'" in capsys.readouterr().err


def test_a_budget_is_of_all_parts(tiny_teacher, tmp_path, capsys):
    pytest.importorskip("openai")
    from tests.support.fault_server import FaultServer, Step, said

    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(12)))
    with FaultServer(lambda question, *_: Step(choices=[said(f"It is {question}")])) as server:
        asked = [*pair("openai:m", tiny_teacher, path, out), "--base-url", server.url]
        asked += ["--part-size", "3", "--concurrency", "1"]
        assert main([*asked, "--token-budget", "100"]) == 2
        assert "the token budget of 100 is spent" in capsys.readouterr().err
        assert 0 < sum(server.asked.values()) - server.asked["Say yes."] < 12
        assert main(asked) == 0
    assert len(rows(out / "pairs.jsonl")) + len(rows(out / "dropped.jsonl")) == 12
