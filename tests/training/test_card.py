"""Cards of models, without what is of one machine."""

from __future__ import annotations

import pytest
import yaml

from plad_fast.training.card import without_folders, write_card


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/me/teacher", "teacher"),
        ("vllm:/home/me/teacher", "vllm:teacher"),
        ("likelihood:/home/me/model", "likelihood:model"),
        ("reward:/home/me/model#2", "reward:model#2"),
        ("openai:org/model@https://some.org/v1", "openai:org/model@https://some.org/v1"),
        ("column:a/b/c", "column:a/b/c"),
        ("someone/model", "someone/model"),
        ("offline", "offline"),
    ],
)
def test_a_path_is_told_by_its_name(text, told):
    assert without_folders(text) == told


def test_settings_are_told_as_the_command_takes_them(tmp_path):
    """Paths of several teachers too; and what has slashes for other reasons stays whole."""
    settings = {
        "teacher": ["column:answer", str(tmp_path / "teacher")],
        "student": str(tmp_path / "student"),
        "base_url": "https://some.org/v1",
        "prompt_template": "Yes/no/maybe: {question}",
    }
    write_card(
        tmp_path,
        base_model="someone/model",
        facts={"loss": "dpo"},
        command="plad-fast distill",
        settings=settings,
        versions={"torch": "2"},
    )
    card = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in card
    told = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    names = {"teacher": ["column:answer", "teacher"], "student": "student"}
    assert told == {**settings, **names}
