"""Settings of the recipe: their types, ranges and defaults."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from plad_fast import UsageError
from plad_fast.cli import main
from plad_fast.recipe.arguments import COMMANDS
from plad_fast.recipe.dependencies import stage_settings
from plad_fast.recipe.fields import flag
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.settings_file import coerce
from plad_fast.recipe.sources import student_sampling


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", "nan", "finite number, got 'nan'"),
        ("learning_rate", "inf", "finite number"),
        ("beta", True, "finite number, got True"),
        ("beta", 10**400, "finite number"),  # no float is that large
        ("seed", "1e999", "whole number"),
        ("seed", 1.5, "whole number, got 1.5"),
        ("student_layers", 1.9, "whole number"),
        ("student_layers", [0, 1.9], "whole number"),
        ("student_layers", True, "whole number"),
        ("prompts", ["a.jsonl", "b.jsonl"], "takes one file"),
        ("teacher", {"name": "x"}, "must be text"),
    ],
)
def test_values_that_are_not_of_the_type_of_their_setting(name, value, message):
    with pytest.raises(UsageError, match=message):
        coerce(name, value, "here")
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be"):
        DistillConfig(**{name: value})


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        ("plad_ranking", (1, 1)),
        ("plad_listwise", (1, 1)),
        ("slic", (1, 0)),
        ("cpo", (1, 0)),
        ("orpo", (1, 1)),  # of means, whatever alpha is
        ("simpo", (0, 1)),
        ("dpo", (0, 0)),
        ("mixture", (0, 0)),
    ],
)
def test_losses_have_the_terms_of_their_papers(loss, terms):
    parts = '{"parts": {"dpo": {}}}' if loss == "mixture" else None
    config = replace(DistillConfig(), loss=loss, loss_args=parts)
    for settings, expected in (
        (config, terms),
        (replace(config, sft_weight=0.5, length_normalization=0.25), (0.5, 0.25)),
    ):
        found = settings.results_settings()
        assert (found["sft_weight"], found["length_normalization"]) == expected
        assert settings.alpha == expected[1]


@pytest.mark.parametrize(
    "command", [name for name, command in COMMANDS.items() if command.settings]
)
def test_every_setting_is_in_the_help_once(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    names = {*COMMANDS[command].needs, *COMMANDS[command].settings}
    assert {flag(name) for name in names} <= set(shown)
    assert len(shown) == len(set(shown))


@pytest.mark.parametrize("bad", [{"seed": -1}, {"beta": float("nan")}, {"epochs": float("inf")}])
def test_values_out_of_range(bad):
    with pytest.raises(UsageError, match=f"--{next(iter(bad))} must be"):
        DistillConfig(**bad)


def test_large_whole_numbers_stay_exact():
    assert coerce("limit", 2**53 + 1, "here") == 2**53 + 1
    assert coerce("limit", "1e3", "here") == 1000


def test_calls_from_python_are_read_as_files_are():
    config = DistillConfig(seed="5", epochs=2, student_layers="0,2")
    assert (config.seed, config.epochs, config.student_layers) == (5, 2.0, (0, 2))
    assert type(config.seed) is int
    assert type(config.epochs) is float


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_args": '{"gamma": ' + "[" * 200_000 + "]" * 200_000 + "}"},
            "must be a JSON object",
        ),
        ({"loss_args": '{"gamma": ' + "7" * 5000 + "}"}, "must be a JSON object"),
        ({"loss_args": '{"gamma": ' + "[" * 200 + "]" * 200 + "}"}, "must be a number, got a list"),
        ({"output_dir": "a\0b"}, "--output-dir 'a\\\\x00b' holds a NUL"),
        ({"output_dir": " "}, "--output-dir is empty"),
        ({"teacher": "./nope"}, "--teacher: there is nothing at './nope'"),
        ({"teacher": "runs/nope"}, "--teacher: there is nothing at 'runs/nope'"),
        ({"teacher": "nope.gguf"}, "--teacher: there is no file 'nope.gguf'"),
        ({"teacher": "vllm:/nope/x"}, "--teacher: there is nothing at '/nope/x'"),
    ],
)
def test_settings_that_nothing_can_come_of_are_told_in_a_line(options, message):
    loss = {"loss": "simpo"} if "loss_args" in options else {}
    with pytest.raises(UsageError, match=message) as caught:
        DistillConfig(**loss, **options)
    assert len(str(caught.value)) < 500


def test_students_have_room_for_the_reasoning_that_they_are_trained_on():
    given = {"teacher": "openai:m", "reasoning_tokens": 100, "max_new_tokens": 40}
    for reasoning, tokens in (("drop", 40), ("column", 40), ("keep", 140)):
        config = DistillConfig(**given, reasoning=reasoning)
        assert student_sampling(config).max_new_tokens == tokens
        assert stage_settings(config, "evaluation")["max_new_tokens"] == tokens
    with pytest.raises(UsageError, match="--max-new-tokens 40 and --reasoning-tokens 100 together"):
        DistillConfig(**given, reasoning="keep", max_length=140).require_room()


def test_every_round_and_turn_of_a_student_has_a_seed_of_its_own():
    """None of them the teacher's: equal models would give equal answers."""
    config = DistillConfig(seed=5, student_temperature="0,1")
    drawn = [student_sampling(config, turn, number) for turn in range(4) for number in range(1, 9)]
    assert len({config.seed, *(sampling.seed for sampling in drawn)}) == 33
