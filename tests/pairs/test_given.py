"""Answers from columns and functions."""

from __future__ import annotations

import json

import pytest

from plad_fast.data.prompts import Prompt, load_prompts
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.answering import stored_answers
from plad_fast.pairs.generation.given import CallableModel, ColumnModel, column_answers
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.sources import (
    open_teacher,
)
from plad_fast.pairs.generation.text_model import Answer, Failure

SECRET = "sk-planted-0123456789"
PROMPTS = [Prompt("a", "A"), Prompt("b", "B"), Prompt("c", "C")]


def items(model, prompts=PROMPTS, **sampling):
    found = [item for batch in model.generate(prompts, Sampling(**sampling)) for item in batch]
    return {(item.prompt_id, item.sample): item for item in found}


def test_a_column_answers_the_prompts_of_its_rows(tmp_path):
    """Also where ids are made from prompts that repeat, and only some rows are asked."""
    data = tmp_path / "data.jsonl"
    rows = [("x", " one "), ("x", "two"), ("y", None), ("z", "  ")]
    data.write_text("".join(json.dumps({"q": q, "gold": gold}) + "\n" for q, gold in rows))
    prompts = load_prompts(data, prompt_template="Q: {q}", limit=3)
    teacher = open_teacher(
        "column:gold",
        columns=lambda name: column_answers(str(data), name, prompt_template="Q: {q}"),
    )
    path = tmp_path / "t.jsonl"
    found = stored_answers(lambda: teacher, prompts, path, Sampling(), fingerprint={})
    assert [answer.text for answer in found.first.values()] == ["one", "two"]
    [failure] = found.failures
    assert failure == Failure(prompts[2].id, "column:gold has no answer to it")
    with pytest.raises(UsageError, match=r"no column 'golden'.*'gold'"):
        column_answers(str(data), "golden", prompt_template="Q: {q}")
    with pytest.raises(UsageError, match="one answer to a prompt, and 2"):
        items(teacher, prompts, n=2)


def test_a_function_fails_prompt_by_prompt(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)

    def function(content):
        if content == "B":
            raise LookupError(f"GET https://host/?key={SECRET}\nrefused")
        return {"A": " said "}.get(content)

    found = items(CallableModel(function, "f"), n=2)
    assert found["a", 1] == Answer("a", "said", "stop", 0, 1)
    reason = "LookupError: GET https://host/?key=*** refused"
    assert found["b", 0] == Failure("b", reason)
    assert found["c", 0].reason == "the function returned no text"
    silent = items(CallableModel(lambda content: "\u200b\ufeff", "f"))
    assert silent["a", 0].reason == "the function returned no text"
    silent = items(ColumnModel({"a": "\u2060 "}, "column:gold"), PROMPTS[:1])
    assert silent["a", 0].reason == "column:gold has no answer to it"
    assert "returned a int" in items(CallableModel(len, "f"))["a", 0].reason


def test_ctrl_c_in_a_function_is_no_failure():
    def function(content):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        items(CallableModel(function, "f"))


def test_a_module_that_quotes_a_key_does_not_get_it_into_the_message(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    (tmp_path / "my_leaky_module.py").write_text(
        "import os\nraise RuntimeError('\\x1b[2Jrefused ' + os.environ['OPENAI_API_KEY'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"my_leaky_module.*RuntimeError: .*refused ") as caught:
        open_teacher("python:my_leaky_module.f")
    assert SECRET not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_function_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_teacher_module.py").write_text("def answer(prompt): return prompt * 2\nx = 1\n")
    (tmp_path / "my_broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # restores the path afterwards
    teacher = open_teacher("python:my_teacher_module.answer")
    assert items(teacher)["a", 0].text == "AA"
    for spec, says in [
        ("python:my_teacher_module.nothing", "no function 'nothing'"),
        ("python:my_teacher_module.x", "no function 'x'"),
        ("python:no_such_module.f", "cannot import no_such_module"),
        ("python:my_broken_module.f", "ZeroDivisionError"),
        ("python:f", "names no module"),
    ]:
        with pytest.raises(UsageError, match=says):
            open_teacher(spec)
