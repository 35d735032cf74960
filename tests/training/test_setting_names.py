"""What settings of other programs are called here."""

from __future__ import annotations

from dataclasses import fields

import pytest

from plad_fast.recipe.arguments import COMMANDS
from plad_fast.recipe.fields import flag
from plad_fast.training import setting_names
from plad_fast.training.config import PLaDConfig
from plad_fast.training.setting_names import advice, spellings


def test_what_is_given_as_a_setting_of_the_trainer_is_one():
    known = {field.name for field in fields(PLaDConfig)}
    for name in setting_names._FREE:
        assert name in known
        assert advice(name) is None
        assert spellings(name) == [f"--training {name}=..."]


def test_what_is_named_in_place_of_a_setting_is_a_flag():
    every = {flag(name) for one in COMMANDS.values() for name in (*one.needs, *one.settings)}
    for name in ("lr", *setting_names._ELSEWHERE, *setting_names._TAKEN):
        for text in spellings(name):
            assert text.split()[0] in every


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("max_steps", "use --epochs"),
        ("bf16", "use --precision"),
        ("save_only_model", "the command decides it itself"),
        ("fsdp_config", "start the command with `accelerate launch --config_file FILE"),
    ],
)
def test_what_to_do_in_place_of_a_setting(name, said):
    assert advice(name).startswith(said)
