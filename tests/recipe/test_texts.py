"""Texts of a run: answers that were paid for are not made again behind anybody's back."""

from __future__ import annotations

import json

import pytest

from plad_fast.cli import main
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.recipe.inputs import load_recipe_prompts
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.texts import RecipeTexts
from tests.support.recipe_runs import pair


def test_answers_of_another_teacher_are_refused_and_left_alone(tmp_path):
    data, answers = tmp_path / "data.jsonl", tmp_path / "answers"
    rows = [{"prompt": f"question {i}", "gold": f"answer {i}"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DistillConfig(teacher="column:gold", prompts=str(data), student="s")
    texts = RecipeTexts(config, load_recipe_prompts(config), answers=answers, pairs=tmp_path)
    with RowStore.open(texts.teacher_file, {"teacher": "openai:m"}) as store:
        store.append([{"id": "0", "prompt": "p", "text": "t"}])
    before = texts.teacher_file.read_bytes()
    with pytest.raises(UsageError, match="teacher was 'openai:m' and is 'column:gold'"):
        texts.ask_teacher(renew=True)
    assert [path.name for path in answers.iterdir()] == ["teacher.jsonl"]
    assert texts.teacher_file.read_bytes() == before


def test_parts_of_a_file_give_the_pairs_of_the_whole(tiny_teacher, tmp_path):
    """So that prompts which do not fit into memory can be paired part by part."""
    rows = [json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(30)]
    found = {}
    for name, part in {"whole": rows, "first": rows[:15], "second": rows[15:]}.items():
        prompts, out = tmp_path / f"{name}.jsonl", tmp_path / name
        prompts.write_text("".join(part))
        assert main(pair(tiny_teacher, tiny_teacher, prompts, out)) == 0
        found[name] = (out / "pairs.jsonl").read_text()
    assert found["first"]
    assert found["second"]
    assert found["whole"] == found["first"] + found["second"]
