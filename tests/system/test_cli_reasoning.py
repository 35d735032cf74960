"""Teachers and students that reason before they answer, through the command line."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("openai")

from plad_fast.cli import main
from plad_fast.models.loading import load_tokenizer
from tests.conftest import CHAT_TEMPLATE
from tests.support.fault_server import FaultServer, Step, said
from tests.support.recipe_runs import arguments, evaluate, pair

pytestmark = pytest.mark.usefixtures("no_plots")


def write_prompts(path, count=8):
    path.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(count)))
    return path


def think(question, tries, body):
    """As servers with a reasoning parser do, and without one; the prompt may open the thought."""
    number = int(question[-1]) if question[-1].isdigit() else 6
    thought, answer = f"Thought {number}.", f"It is {number}."
    return Step(
        choices=[
            [
                said(answer, reasoning_content=thought),
                said(answer, reasoning=thought, reasoning_content=thought),
                said(f"<think>\n{thought}\n</think>\n\n{answer}"),
                said(f"{thought}\n</think>\n\n{answer}"),
                said([{"type": "thinking", "thinking": thought}, {"type": "text", "text": answer}]),
                said(f"<think>\n{thought}", "length"),
                said(f"{answer}"),
                said(f"<think>\n{thought}\n</think>\n\nIt", "length"),
            ][number % 8]
        ]
    )


@pytest.fixture
def opening_teacher(tiny_teacher, tmp_path):
    """A model whose chat template opens a thought."""
    folder = tmp_path / "opening"
    shutil.copytree(tiny_teacher, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "%}<|assistant|>{%", "%}<|assistant|><think>\n{%"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_reasoning_is_dropped_kept_or_put_beside_the_answers(tiny_teacher, tmp_path, capsys):
    """Of whatever form it came in; a change of mind asks the teacher nothing."""
    prompts, out = write_prompts(tmp_path / "p.jsonl"), tmp_path / "out"
    with FaultServer(think) as server:
        command = pair("openai:m", tiny_teacher, prompts, out, "--base-url", server.url)

        def rows(*extra):
            assert main([*command, *extra]) == 0, capsys.readouterr().err
            found = [json.loads(line) for line in (out / "pairs.jsonl").open()]
            return {row["prompt"][0]["content"]: row for row in found}

        dropped = rows()
        asked = sum(server.asked.values())
        beside, kept = rows("--reasoning", "column"), rows("--reasoning", "keep")
        # What was spent before any answer is no answer, and is asked for by each run.
        assert sum(server.asked.values()) == asked + 2
    assert dropped
    assert {key[-1] for key in dropped} <= set("012346")
    for prompt, row in dropped.items():
        answer = f"It is {prompt[-1]}."
        assert row["chosen"][0]["content"] == answer == beside[prompt]["chosen"][0]["content"]
        assert "chosen_reasoning" not in row
        thought = "" if prompt[-1] == "6" else f"Thought {prompt[-1]}."
        assert beside[prompt]["chosen_reasoning"] == thought
        assert beside[prompt]["rejected_reasoning"] == ""
        whole = kept[prompt]["chosen"][0]["content"]
        assert whole.endswith(answer)
        assert thought in whole
        assert ("</think>" in whole) == bool(thought)
    train = ["train", "--model", str(tiny_teacher), "--pairs", str(out / "pairs.jsonl")]
    assert main([*train, "--output-dir", str(tmp_path / "t"), "--precision", "float32"]) == 0


def test_a_thought_that_the_template_opens_belongs_to_the_answer(opening_teacher, tmp_path, capsys):
    """A teacher that never closes it has finished nothing; a student that is to answer without one
    is asked without the mark."""
    prompts, out = write_prompts(tmp_path / "p.jsonl"), tmp_path / "out"
    assert main(pair(opening_teacher, opening_teacher, prompts, out)) == 2
    assert "no pair is left" in capsys.readouterr().err
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").open()]
    for row in dropped:  # a random model may end at once
        assert row["reason"] == ("truncated" if row["teacher"] and row["student"] else "empty")
    assert "truncated" in {row["reason"] for row in dropped}
    stored = [json.loads(line) for line in (out / "teacher.jsonl").open()][1:]
    texts = [row["text"] for row in stored if row["text"]]
    assert texts
    assert all(text.startswith("<think>\n") for text in texts)
    sampled = [json.loads(line) for line in (out / "student.jsonl").open()][1:]
    assert not any(row["text"].startswith("<think>") for row in sampled)
    assert main([*pair(opening_teacher, opening_teacher, prompts, out), "--reasoning", "keep"]) == 2
    assert "no pair is left" in capsys.readouterr().err
    kept = [json.loads(line) for line in (out / "student.jsonl").open()][1:]
    assert any(row["text"].startswith("<think>") for row in kept)  # made anew


@pytest.mark.slow
def test_the_recipe_on_reasoning(tiny_teacher, tmp_path, capsys):
    """`keep` trains on it, and compares it; the other ways leave it out of everything."""
    for reasoning, found in (("keep", True), ("drop", False)):
        folder = tmp_path / reasoning
        with FaultServer(
            lambda question, *_: Step(choices=[said(f"It: {question[-16:]}", reasoning="Hmm, so.")])
        ) as server:
            extra = ["--teacher", "openai:m", "--base-url", server.url, "--reasoning", reasoning]
            run = arguments(tiny_teacher, folder, *extra, "--student", str(tiny_teacher))
            assert main(run) == 0, capsys.readouterr().err
        pairs = folder / "pairs" / "held-out.jsonl"
        assert ("Hmm, so." in pairs.read_text()) == found
        assert ("Hmm, so." in (folder / "report.html").read_text()) == found
    compare = evaluate(tmp_path / "keep" / "plad", tmp_path / "keep" / "pairs" / "held-out.jsonl",
                       tmp_path / "e")  # fmt: skip
    assert main(compare) == 0
    assert "Hmm, so." not in (tmp_path / "e" / "report.html").read_text()
