"""`plad-fast train`: what its help says is what it trains with."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from plad_fast import PLaDConfig, PLaDTrainer, losses
from plad_fast.cli import main
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.recipe.settings import DistillConfig, flag
from plad_fast.training.train import train_model
from tests.support.loss_options import REQUIRED
from tests.support.recipe_runs import write_pairs
from tests.support.trainings import PAIRS

# Of what the weights depend on; --epochs and --learning-rate are the command's own.
RECORDED = ("batch_size", "max_length", "precision", "seed")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 4)


def recorded(model, pairs, output, *extra: str) -> dict:
    command = ["train", "--model", str(model), "--pairs", str(pairs), "--output-dir", str(output)]
    assert main([*command, *extra]) == 0
    return json.loads((output / "training.json").read_text())


def test_the_defaults_of_the_help_are_those_of_the_training(
    tiny_teacher, pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    record = recorded(tiny_teacher, pairs, tmp_path / "out")
    for name in RECORDED:
        option = rf"^  {flag(name)} [A-Z]+ .*?\(default: (.*?)\)"
        [shown] = re.findall(option, text, re.DOTALL | re.MULTILINE)
        assert str(record[name]) == shown, name
    assert (record["epochs"], record["learning_rate"]) == (1.0, 2e-5)
    assert (record["sft_weight"], record["length_normalization"]) == (1.0, 1.0)
    spelt_out = [part for name in RECORDED for part in (flag(name), str(record[name]))]
    assert recorded(tiny_teacher, pairs, tmp_path / "out", *spelt_out) == record


def test_fine_tuning_has_no_weights_of_preferences(tiny_teacher, pairs, tmp_path):
    record = recorded(tiny_teacher, pairs, tmp_path / "out", "--loss", "sft")
    assert (record["sft_weight"], record["length_normalization"]) == (0.0, 0.0)


@pytest.mark.parametrize("loss", losses.available())
def test_the_command_and_the_trainer_have_one_objective(loss, tiny_teacher, tmp_path):
    """The loss of the first step on the same pairs, with nothing set but the loss's name."""
    rows = [{**row, "chosen_score": 0.5, "rejected_score": 0.25} for row in PAIRS[:4]]
    loss_args = json.dumps(REQUIRED.get(loss, {}))
    common = {"loss": loss, "learning_rate": 1e-3}
    log = train_model(
        *(tiny_teacher, rows, tmp_path / "out"),
        **common,
        loss_args=loss_args,
        epochs=1.0,
        precision="float32",
    )
    trainer = PLaDTrainer(
        load_model(tiny_teacher, dtype=torch.float32),
        PLaDConfig(
            str(tmp_path / "run"),
            **common,
            loss_args=loss_args,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=load_tokenizer(tiny_teacher),
    )
    trainer.train()
    ours, theirs = trainer.state.log_history[0], log[0]
    for name in ("loss", "nll", "logps/chosen"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_the_function_has_the_defaults_of_the_settings():
    of_settings = {f.name: f.default for f in dataclasses.fields(DistillConfig)}
    of_settings["saves"] = of_settings["saves_per_stage"]
    parameters = inspect.signature(train_model).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    # None stands for those of the loss.
    assert defaults.pop("replace") is False  # of the recipe's own calls
    assert defaults.pop("sft_weight") is defaults.pop("length_normalization") is None
    assert defaults.keys() > {"batch_size", "max_tokens_per_batch", "max_length"}
    assert defaults == {name: of_settings[name] for name in defaults}


def test_gradient_checkpointing_is_a_matter_of_memory(tiny_teacher, pairs, tmp_path, monkeypatch):
    """It is switched on in the model, changes no weight, and is no other training."""
    enabled = []
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    name = new if hasattr(PreTrainedModel, new) else old
    real = getattr(PreTrainedModel, name)
    monkeypatch.setattr(
        PreTrainedModel,
        name,
        lambda model, *args, **kwargs: (enabled.append(model), real(model, *args, **kwargs)),
    )
    options = ("--precision", "float32")
    recorded(tiny_teacher, pairs, tmp_path / "plain", *options)
    assert not enabled
    recorded(tiny_teacher, pairs, tmp_path / "out", *options, "--gradient-checkpointing")
    assert enabled
    assert recorded(tiny_teacher, pairs, tmp_path / "out", *options)
    plain, ours = (load_file(tmp_path / x / "model.safetensors") for x in ("plain", "out"))
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight)


def test_a_mistyped_model_costs_nobody_the_model_that_is_there(
    tiny_teacher, pairs, tmp_path, capsys
):
    recorded(tiny_teacher, pairs, tmp_path / "out")
    command = ["train", "--model", "nobody/nothing", "--pairs", str(pairs), "--overwrite"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert "nobody/nothing" in capsys.readouterr().err
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_a_folder_of_ours_is_no_file_of_pairs(tiny_teacher, tmp_path, capsys):
    """It also holds answers, and what was dropped."""
    for folder, record, name in (
        (tmp_path / "pairs", "stage.json", "pairs.jsonl"),
        (tmp_path / "run" / "pairs", "../run.json", "train.jsonl"),
    ):
        folder.mkdir(parents=True)
        (folder / record).write_text("{}")
        write_pairs(folder / name, 4)
        command = ["train", "--model", str(tiny_teacher), "--pairs", str(folder)]
        assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
        assert f"give the file {folder / name}" in capsys.readouterr().err
