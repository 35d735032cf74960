"""Settings of the recipe and its data: types, the split, rows as files."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from plad_fast import UsageError
from plad_fast.cli import main
from plad_fast.data.prompts import Prompt
from plad_fast.recipe.arguments import COMMANDS
from plad_fast.recipe.fields import flag
from plad_fast.recipe.inputs import load_recipe_prompts, read_jsonl, split_prompts, write_jsonl
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.settings_file import coerce, load_settings


def test_split_is_disjoint_complete_and_seeded():
    prompts = [Prompt(str(i), f"p{i}") for i in range(20)]
    train, held_out = split_prompts(prompts, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert {p.id for p in train} | {p.id for p in held_out} == {str(i) for i in range(20)}
    assert split_prompts(prompts, 0.25, seed=3) == (train, held_out)
    assert split_prompts(prompts, 0.25, seed=4) != (train, held_out)
    assert len(split_prompts(prompts, 6, seed=3)[1]) == 6
    with pytest.raises(UsageError, match="each needs at least"):
        split_prompts(prompts, 19.0, seed=0)


def test_copies_of_a_prompt_stay_on_one_side():
    """24 rows of 4 prompts: as text, with other white space, and as a chat of the same words."""
    forms = [
        lambda i: f"Name {i} things.",
        lambda i: f" Name  {i}\nthings. ",
        lambda i: [{"role": "user", "content": f"Name {i} things."}],
    ]
    prompts = [Prompt(str(n), forms[n % 3](n % 4)) for n in range(24)]
    train, held_out = split_prompts(prompts, 0.5, seed=0)
    assert (len(train), len(held_out)) == (12, 12)
    kinds = [{int(p.id) % 4 for p in side} for side in (train, held_out)]
    assert kinds[0].isdisjoint(kinds[1])
    with pytest.raises(UsageError, match="4 different prompts with --held-out 8"):
        split_prompts(prompts, 8.0, seed=0)


def test_rows_may_hold_any_line_separator(tmp_path):
    rows = [{"prompt": "a\u2028b\u2029c\x85d\ne\x0bf"}, {"prompt": "g"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_the_defaults_are_valid_and_round_trip_through_yaml(tmp_path):
    config = DistillConfig(student_layers=(0, 1, 5), limit=7)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert DistillConfig(**load_settings(path)) == config


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
        ("prompts", ["a.jsonl", "b.jsonl"], "must be text"),
        ("teacher", {"name": "x"}, "must be text"),
    ],
)
def test_values_that_are_not_of_the_type_of_their_setting(name, value, message):
    with pytest.raises(UsageError, match=message):
        coerce(name, value, "here")
    if not isinstance(value, str):  # what a flag gives is text; a caller may give anything
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


def test_a_null_of_yaml_is_the_default(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sft_weight: null\nloss: dpo\n")
    config = DistillConfig(**load_settings(tmp_path / "recipe.yaml"))
    assert config.results_settings()["sft_weight"] == 0


@pytest.mark.parametrize(
    "command", [name for name, command in COMMANDS.items() if command.settings]
)
def test_every_setting_is_in_the_help_once(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
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


def test_yaml_that_is_not_utf8(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("prompt_template: é {x}\n".encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        load_settings(path)


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "is an alias"),
        ("a: &a {x: 1}\nb: {<<: *a}", "is an alias"),
        ("beta: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("beta: [" + "[" * 50 + "]" * 50 + "]", "beta must be a finite number, got a list of 1"),
        ("seed: " + "7" * 5000, "a value that YAML cannot read"),
        ("seed: 0x" + "f" * 5000, "whole number, got a number of more than 200 digits"),
        ("beta: .nan", "beta must be a finite number, got nan"),
        ("beta: 2024-02-30", "a value that YAML cannot read"),
        ("beta: 2024-02-03", "beta must be a finite number, got a date"),
        ("output_dir: 2024-02-03", "output_dir must be text, got a date; put it in quotes"),
        ("prompt_column: on", "prompt_column must be text, got True; put it in quotes"),
        ("split: 007", "split must be text, got 7; put it in quotes"),
        ("prompts: !!set {a, b}", "prompts must be text, got a set of 2"),
        ("prompts: !!binary aGVsbG8=", "prompts must be text, got a bytes"),
        ("prompts: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("beta: 1\nbeta: 2", "sets 'beta' twice"),
        ("batch-size: 1\nbatch_size: 2", "sets 'batch_size' twice"),
        ("1: 2", "1 is no name of a setting"),
        ("? [a, b]\n: 2", "is not YAML"),
        ("beta: 1\n---\nbeta: 2", "is not YAML"),
        ("beta: 1\x00", "is not YAML"),
        ("just words", "must hold `name: value` lines; not 'just words'"),
        ("# beta: 1", "must hold `name: value` lines; it is empty"),
        ("beta: 1\nseed: [1", "line 2, is not YAML"),
        ("beta: 'x" + "y" * 10_000 + "'", "beta must be a finite number, got 'xyyy"),
        ("# " + "x" * 2_000_000, "settings are a few lines"),
    ],
    ids=range(26),
)
def test_what_a_settings_file_may_not_hold(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_settings(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_settings_file_that_is_none(tmp_path):
    (tmp_path / "c.yaml").mkdir()
    with pytest.raises(UsageError, match="is no file; give a YAML file"):
        load_settings(tmp_path / "c.yaml")
    with pytest.raises(UsageError, match=r"no file .*d\.yaml'; did you mean '.*c\.yaml'"):
        load_settings(tmp_path / "d.yaml")


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


def test_a_backslash_from_yaml_stays_one(tmp_path):
    r"""Only a flag has to spell a line break as \n; TeX in a file is left alone."""
    (tmp_path / "rows.jsonl").write_text('{"x": "f"}\n')
    (tmp_path / "recipe.yaml").write_text(r"prompt_template: 'Compute $\nabla$ of {x}.'")
    settings = load_settings(tmp_path / "recipe.yaml")
    config = DistillConfig(**settings, prompts=str(tmp_path / "rows.jsonl"))
    assert load_recipe_prompts(config)[0].content == r"Compute $\nabla$ of f."
