"""Texts of a run: answers that were paid for are not made again behind anybody's back."""

from __future__ import annotations

import json

import pytest

from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.recipe.inputs import load_recipe_prompts
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.texts import RecipeTexts


def test_answers_of_another_teacher_are_refused_and_left_alone(tmp_path):
    data, answers = tmp_path / "data.jsonl", tmp_path / "answers"
    rows = [{"prompt": f"question {i}", "gold": f"answer {i}"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DistillConfig(teacher="column:gold", prompts=str(data), student="s")
    texts = RecipeTexts(config, load_recipe_prompts(config), answers=answers, pairs=tmp_path)
    (store_file,) = texts.teachers.stores
    with RowStore.open(store_file, {"teacher": "openai:m"}) as store:
        store.append([{"id": "0", "prompt": "p", "text": "t"}])
    before = store_file.read_bytes()
    with pytest.raises(UsageError, match="teacher was 'openai:m' and is 'column:gold'"):
        texts.teachers.ask(renew=True)
    assert [path.name for path in answers.iterdir()] == ["teacher.jsonl"]
    assert store_file.read_bytes() == before
