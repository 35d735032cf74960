"""Prompts with tools, and answers that call them, through the command line."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("openai")

from plad_fast.cli import main
from plad_fast.models.loading import load_tokenizer
from tests.support.fault_server import FaultServer, Step, said
from tests.support.recipe_runs import arguments, evaluate, pair, train
from tests.support.tools import TEMPLATE, TOOLS

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def student(tiny_teacher, tmp_path):
    """A model whose chat template shows tools, calls and results."""
    folder = tmp_path / "caller"
    shutil.copytree(tiny_teacher, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Every third prompt goes on after a call and its result."""
    path = tmp_path / "prompts.jsonl"

    def messages(number):
        asked = [{"role": "user", "content": f"sum {number}"}]
        if number % 3:
            return asked
        call = {"id": "c1", "function": {"name": "add", "arguments": {"a": number}}}
        called = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", **call}],
        }
        return [*asked, called, {"role": "tool", "tool_call_id": "c1", "content": f"got {number}"}]

    rows = [{"prompt": messages(n), "tools": TOOLS, "answer": f"It is {n}."} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(question, tries, body):
    """Calls the tool, says something, or both."""
    if question == "Say yes.":
        return Step(choices=[said("Yes.")])
    assert body["tools"] == TOOLS
    number = int(question.split()[-1])
    function = {"name": "add", "arguments": json.dumps({"a": number, "b": [1, None]})}
    calls = [{"id": f"call_{tries}", "type": "function", "function": function}]
    return Step(
        choices=[
            [
                said(None, "tool_calls", tool_calls=calls),
                said(f"It is {number}."),
                said("So.", "tool_calls", tool_calls=calls),
                said("", "length", tool_calls=[{"function": {"name": "add", "arguments": "{"}}]),
            ][number % 4]
        ]
    )


def test_tools_are_asked_with_paired_trained_and_evaluated(student, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    with FaultServer(call) as server:
        command = pair("openai:m", student, prompts, out, "--base-url", server.url)
        assert main(command) == 0, capsys.readouterr().err
        asked = sum(server.asked.values())
        assert main(command) == 0
        # What was cut off before any answer is asked for again.
        assert sum(server.asked.values()) == asked + 6
    told = [m for body in server.bodies for m in body["messages"] if m.get("tool_calls")]
    arguments_sent = [m["tool_calls"][0]["function"]["arguments"] for m in told]
    assert arguments_sent
    assert all(isinstance(json.loads(text), dict) for text in arguments_sent)
    rows = [json.loads(line) for line in (out / "pairs.jsonl").open()]
    assert rows
    kinds = set()
    for row in rows:
        assert row["tools"] == TOOLS
        (message,) = row["chosen"]
        number = int(row["prompt"][-1]["content"].split()[-1])
        expected = {"name": "add", "arguments": {"a": number, "b": [1, None]}}
        calls = [{"type": "function", "function": expected}]
        kinds.add(number % 4)
        assert (
            message
            == {"role": "assistant"}
            | [
                {"content": "", "tool_calls": calls},
                {"content": f"It is {number}."},
                {"content": "So.", "tool_calls": calls},
            ][number % 4]
        )
    assert kinds == {0, 1, 2}
    pairs = out / "pairs.jsonl"
    assert main(train(student, pairs, tmp_path / "trained")) == 0
    assert main(evaluate(tmp_path / "trained", pairs, tmp_path / "compared")) == 0
    report = (tmp_path / "compared" / "report.html").read_text()
    assert "&lt;tool_call&gt;" in report
    assert "tools: [" in report


@pytest.mark.slow
def test_the_whole_recipe_with_tools(student, prompts, tmp_path, capsys):
    with FaultServer(call) as server:
        extra = ["--teacher", "openai:m", "--base-url", server.url, "--prompts", str(prompts)]
        run = arguments(student, tmp_path / "run", *extra, "--student", str(student))
        assert main([*run, "--calibration-samples", "2"]) == 0, capsys.readouterr().err


def test_answers_of_a_column_to_prompts_with_tools(student, prompts, tmp_path):
    assert main(pair("column:answer", student, prompts, tmp_path / "out")) == 0
    assert '"tools"' in (tmp_path / "out" / "pairs.jsonl").read_text()


def test_those_who_cannot_call_tools_are_refused_before_any_work(
    student, tiny_teacher, prompts, tmp_path, capsys
):
    out = tmp_path / "out"
    for teacher, asked, extra, says in (
        ("column:answer", tiny_teacher, [], "the prompt has tools, which the chat template of"),
        ("python:os.getcwd", student, [], "a function is given the prompt alone"),
        (tiny_teacher, student, [], "would write its calls in other marks than the student"),
        ("column:answer", student, ["--scorer", f"likelihood:{student}"], "take another scorer"),
    ):
        assert main([*pair(teacher, asked, prompts, out), *extra]) == 2
        assert says in capsys.readouterr().err
        assert not (out / "teacher.jsonl").exists()
    run = arguments(tiny_teacher, out, "--prompts", str(prompts))
    assert main(run) == 2
    assert "does not show: they would be lost" in capsys.readouterr().err


def test_pairs_with_tools_are_refused_to_a_model_that_does_not_see_them(
    tiny_teacher, tmp_path, capsys
):
    answers = {"chosen": "It is 2.", "rejected": "no"}
    asked = [{"role": "user", "content": "sum 1"}]
    function = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    called = [*asked, {"role": "assistant", "content": "", "tool_calls": [function]}]
    told = [*asked, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "1"}]
    for row, says in (
        ({"prompt": asked, "tools": TOOLS}, "the prompt has tools, which"),
        ({"prompt": [*called, *asked]}, "the prompt has tool_calls, which"),
        ({"prompt": asked, "chosen": called[1:]}, "has the key 'tool_calls', which"),
        ({"prompt": told}, ""),  # this template shows every role
    ):
        pairs, last = tmp_path / "pairs.jsonl", {"prompt": told, "chosen": "no", "rejected": "so"}
        lines = [{**answers, **row}, {"prompt": told, **answers}, last]
        pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        status = main(train(tiny_teacher, pairs, tmp_path / "trained"))
        assert says in capsys.readouterr().err
        assert status == (2 if says else 0)
