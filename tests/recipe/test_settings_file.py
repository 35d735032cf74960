"""Files of settings: what is read of them, and what they may not hold."""

from __future__ import annotations

import re

import pytest
import yaml

from plad_fast import UsageError
from plad_fast.recipe.inputs import load_recipe_prompts
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.settings_file import load_settings


def test_the_defaults_are_valid_and_round_trip_through_yaml(tmp_path):
    config = DistillConfig(student_layers=(0, 1, 5), limit=7)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert DistillConfig(**load_settings(path)) == config


def test_a_null_of_yaml_is_the_default(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sft_weight: null\nloss: dpo\n")
    config = DistillConfig(**load_settings(tmp_path / "recipe.yaml"))
    assert config.results_settings()["sft_weight"] == 0


def test_yaml_that_is_not_utf8(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("prompt_template: é {x}\n".encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        load_settings(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: " + "[" * 5000 + "]" * 5000, "a value that YAML cannot read"),
        ("beta: [" + "[" * 50 + "]" * 50 + "]", "beta must be a finite number, got a list of 1"),
        ("seed: " + "7" * 5000, "a value that YAML cannot read"),
        ("seed: 0x" + "f" * 5000, "whole number, got a number of more than 200 digits"),
        ("training: &a {x: *a}", "*a is an alias"),
        ("a: &a {x: 1}\nb: {<<: *a}", "*a is an alias"),
        ("beta: .nan", "beta must be a finite number, got nan"),
        ("beta: 2024-02-30", "a value that YAML cannot read"),
        ("beta: 2024-02-03", "beta must be a finite number, got a date"),
        ("output_dir: 2024-02-03", "output_dir must be text, got a date; put it in quotes"),
        ("prompt_column: on", "prompt_column must be text, got True; put it in quotes"),
        ("split: 007", "split must be text, got 7; put it in quotes"),
        (
            "eval_pairs: [a, b]",
            "eval_pairs takes one file, got ['a', 'b']; join several into one first",
        ),
        ("loss: [dpo, sft]", "loss must be text, got ['dpo', 'sft']; it takes one"),
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
        ("beta: 1\nseed 1\nloss: dpo", "line 2, is not YAML"),
        ('prompts: "a\n  b\n  \\q"', "line 3, is not YAML: found unknown escape character 'q'"),
        ("beta: 'x" + "y" * 10_000 + "'", "beta must be a finite number, got 'xyyy"),
    ],
    ids=range(29),
)
def test_what_a_settings_file_may_not_hold(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_settings(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_setting_of_the_trainer_that_another_one_sets(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {optim: sgd, fp16: null, save-steps: 5}")
    with pytest.raises(UsageError, match=r"c.yaml: training.save-steps: set saves_per_stage$"):
        load_settings(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("training: {deepspeed: ds.json}")
    with pytest.raises(UsageError, match=r"training.deepspeed: start .* `accelerate launch --conf"):
        load_settings(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("training: {optim: sgd, fp16: null}")
    assert load_settings(tmp_path / "c.yaml")["training"]["optim"] == "sgd"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("lr: 1", "unknown setting 'lr' of distill; did you mean learning_rate?"),
        ("gradient_accumulation_steps: 2", "did you mean batch_size and micro_batch_size?"),
        ("base_model: m", "did you mean student?"),
        ("optim: sgd", "did you mean training.optim?"),
        ("bta: 1", "did you mean beta?"),
    ],
)
def test_names_of_other_programs_are_answered_with_ours(text, meant, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(meant)):
        load_settings(tmp_path / "c.yaml", [*DistillConfig.__dataclass_fields__])


def test_a_settings_file_that_is_none(tmp_path):
    (tmp_path / "c.yaml").mkdir()
    with pytest.raises(UsageError, match="is no file; give a YAML file"):
        load_settings(tmp_path / "c.yaml")
    with pytest.raises(UsageError, match=r"no file .*d\.yaml'; did you mean '.*c\.yaml'"):
        load_settings(tmp_path / "d.yaml")


def test_a_backslash_from_yaml_stays_one(tmp_path):
    r"""Only a flag has to spell a line break as \n; TeX in a file is left alone."""
    (tmp_path / "rows.jsonl").write_text('{"x": "f"}\n')
    (tmp_path / "recipe.yaml").write_text(r"prompt_template: 'Compute $\nabla$ of {x}.'")
    settings = load_settings(tmp_path / "recipe.yaml")
    config = DistillConfig(**settings, prompts=str(tmp_path / "rows.jsonl"))
    assert load_recipe_prompts(config)[0].content == r"Compute $\nabla$ of f."
