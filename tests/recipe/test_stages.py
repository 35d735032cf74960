"""`plad-fast pairs` and `train`: their settings, and the results that are recognised, made anew or
refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from plad_fast.cli import main
from plad_fast.data.locks import locked
from plad_fast.recipe.fields import flag
from plad_fast.recipe.run_folder import RunFolder
from plad_fast.recipe.settings import DistillConfig, TrainConfig
from plad_fast.training.train import train_model
from tests.support.recipe_runs import (
    changed_copy,
    content,
    evaluate,
    kill_at,
    pair,
    train,
    write_pairs,
)
from tests.support.saved_trainings import interrupted

# Of what the weights depend on; --epochs and --learning-rate are the command's own.
RECORDED = ("batch_size", "max_length", "precision", "seed")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 6)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2 and say these words; returns all that it said."""

    def run(command, *words: str) -> str:
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        for said in words:
            assert said in error
        return error

    return run


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


@pytest.mark.parametrize("more", [(), ("--tokens-on-disk",)])
def test_the_first_row_is_checked_before_the_model_is_loaded(
    more, pairs, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejceted": "b"}\n')
    said = "p.jsonl has no column rejected (it has prompt, chosen, rejceted; rename rejceted)"
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")  # and no weights
    refused(train("model", "p.jsonl", tmp_path / "out", *more), said)
    wrong = ("--eval-pairs", "p.jsonl", *more)
    refused(train("model", pairs, tmp_path / "out", *wrong), said)
    Path("p.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}\n')
    said = "rows of --pairs have 2 responses each, those of --eval-pairs 3"
    refused(train("model", pairs, tmp_path / "out", *wrong), said)


@pytest.mark.parametrize("more", [(), ("--tokens-on-disk",)])
def test_pairs_come_from_the_named_split(more, tiny_teacher, tmp_path, refused, monkeypatch):
    """A folder of files has splits as a data set of the hub has."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for name, count in (("train", 2), ("test", 3), ("validation", 4)):
        write_pairs(tmp_path / "data" / f"{name}.jsonl", count)
    of_data = tmp_path / "data"
    splits = ("--split", "test", "--eval-pairs", str(of_data), "--eval-split", "validation")
    record = recorded(tiny_teacher, of_data, tmp_path / "out", *splits, *more)
    assert (record["rows"][:6], record["eval_pairs"][:6]) == ("3 rows", "4 rows")
    assert "split: test" in (tmp_path / "out" / "README.md").read_text()
    command = train(tiny_teacher, of_data, tmp_path / "other", *more)
    refused([*command, "--split", "dev"], "'train', 'validation', 'test'")
    refused([*command, "--eval-split", "test"], "--eval-split does nothing without --eval-pairs")


def test_fine_tuning_has_no_weights_of_preferences(tiny_teacher, pairs, tmp_path):
    record = recorded(tiny_teacher, pairs, tmp_path / "out", "--loss", "sft")
    assert (record["sft_weight"], record["length_normalization"]) == (0.0, 0.0)


def test_the_function_has_the_defaults_of_the_settings():
    fields = (*dataclasses.fields(DistillConfig), *dataclasses.fields(TrainConfig))
    of_settings = {field.name: field.default for field in fields}
    of_settings["saves"] = of_settings["saves_per_stage"]
    parameters = inspect.signature(train_model).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    # None stands for those of the loss.
    assert defaults.pop("replace") is False  # of the recipe's own calls
    assert defaults.pop("eval_rows") is None  # those in --eval-pairs
    assert defaults.pop("validation") is defaults.pop("base") is None
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
    tiny_teacher, pairs, tmp_path, refused
):
    recorded(tiny_teacher, pairs, tmp_path / "out")
    mistyped = train("nobody/nothing", pairs, tmp_path / "out", "--overwrite")
    refused(mistyped, "nobody/nothing")
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_a_folder_of_ours_is_no_file_of_pairs(tiny_teacher, tmp_path, refused):
    """It also holds answers, and what was dropped."""
    for folder, record, name in (
        (tmp_path / "pairs", "run.json", "pairs.jsonl"),
        (tmp_path / "run" / "pairs", "../run.json", "train.jsonl"),
    ):
        folder.mkdir(parents=True)
        (folder / record).write_text("{}")
        write_pairs(folder / name, 4)
        command = train(tiny_teacher, folder, tmp_path / "out")
        refused(command, f"give the file {folder / name}")
    (folder / "held-out.jsonl").touch()
    refused(command, f"give the file {folder / name}, or to evaluate {folder / 'held-out.jsonl'}")


def test_a_finished_training_is_recognised_and_another_refused(
    tiny_teacher, pairs, tmp_path, capsys, refused
):
    output = tmp_path / "out"
    assert main(train(tiny_teacher, pairs, output)) == 0
    assert "done before" not in capsys.readouterr().out
    weights = (output / "model.safetensors").read_bytes()
    # Micro-batches and checkpoints change memory and safety, not the model.
    same = train(tiny_teacher, pairs, output, "--micro-batch-size", "1", "--saves-per-stage", "1")
    assert main(same) == 0
    assert "done before" in capsys.readouterr().out

    more = write_pairs(tmp_path / "more.jsonl", 7)
    retrained = changed_copy(tiny_teacher, tmp_path / "retrained")
    others = {
        "beta was None and is 3.0": train(tiny_teacher, pairs, output, "--beta", "3"),
        "rows was '6 rows, .* and is '7 rows, ": train(tiny_teacher, more, output),
        "source was ": train(retrained, pairs, output),
    }
    for message, command in others.items():
        error = refused(command, "choose another --output-dir, or pass --overwrite")
        assert re.search(message, error)
    assert (output / "model.safetensors").read_bytes() == weights
    assert main([*train(tiny_teacher, pairs, output, "--beta", "3"), "--overwrite"]) == 0
    assert json.loads((output / "training.json").read_text())["beta"] == 3.0


def test_checkpoints_of_another_training_are_not_resumed(tiny_teacher, pairs, tmp_path, refused):
    output = tmp_path / "out"
    loss = "training.trainer.fused_linear_preference_loss"
    kill_at(loss, 3, train(tiny_teacher, pairs, output))
    assert list(output.with_name("out.checkpoints").glob("checkpoint-*"))
    refused(train(tiny_teacher, pairs, output, "--epochs", "2"), "epochs was 1.0 and is 2.0")
    (tmp_path / "out.checkpoints" / "training.json").unlink()
    without = "out.checkpoints is there already and has no record"
    refused(train(tiny_teacher, pairs, output), without)
    assert not output.exists()


def test_a_training_that_was_refused_keeps_nobody_from_another(
    tiny_teacher, pairs, tmp_path, refused
):
    output = tmp_path / "out"
    broken = changed_copy(tiny_teacher, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 1000)
    refused(train(broken, pairs, output), "cannot load")
    assert main(train(tiny_teacher, pairs, output)) == 0


def test_two_trainings_cannot_share_a_folder(tiny_teacher, pairs, tmp_path, refused):
    (tmp_path / "out.checkpoints").mkdir()
    with locked(tmp_path / "out.checkpoints"):
        refused(train(tiny_teacher, pairs, tmp_path / "out"), "being filled by another process")


def test_only_a_model_that_was_trained_here_is_overwritten(tiny_teacher, pairs, tmp_path, refused):
    """Nobody is advised to delete what is not ours, and nothing of it is removed."""
    foreign, mixed = tmp_path / "foreign", tmp_path / "mixed"
    shutil.copytree(tiny_teacher, foreign)
    assert main(train(tiny_teacher, pairs, mixed)) == 0
    (mixed / "notes.txt").write_text("of somebody")
    before = content(tmp_path)
    for folder, what in ((foreign, "training.json"), (mixed, "notes.txt")):
        for extra in (["--epochs", "2"], ["--epochs", "2", "--overwrite"]):
            error = refused(train(tiny_teacher, pairs, folder, *extra))
            assert "delete" not in error
        assert what in error
    command = train(foreign, pairs, foreign, "--overwrite")
    refused(command, "--model and --output-dir are both")
    assert content(tmp_path) == before


def test_pairs_of_a_retrained_student_are_made_anew(tiny_teacher, pairs, tmp_path, capsys, refused):
    """Those of the student before stay beside its samples; another teacher is refused."""
    student, output = changed_copy(tiny_teacher, tmp_path / "student"), tmp_path / "p"
    command = pair(tiny_teacher, student, pairs, output)
    assert main(command) == 0
    first = (output / "student.jsonl").read_bytes()
    shutil.rmtree(student)
    shutil.copytree(tiny_teacher, student)
    capsys.readouterr()
    assert main(command) == 0
    assert "== pairs: anew, student.jsonl is another" in capsys.readouterr().out
    assert [path.read_bytes() for path in output.glob("student.*.jsonl")] == [first]
    changed = "precision was 'float32' and is 'bfloat16'"
    refused([*command, "--precision", "bfloat16"], changed)
    assert main([*command, "--precision", "bfloat16", "--overwrite"]) == 0
    assert len(list(output.glob("student*.jsonl"))) == 1


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_the_folder_of_a_run_or_a_model_is_no_place_for_other_results(
    overwrite, tiny_teacher, pairs, tmp_path, refused
):
    """Its metrics.json, report.html and plots have the names of an evaluation's."""
    run, model = tmp_path / "run", tmp_path / "model"
    RunFolder(run, {}).close()
    model.mkdir()
    (model / "training.json").write_text("{}")
    (run / "metrics.json").write_text("of the run")
    before = content(tmp_path)
    for folder, what in ((run, "holds the results of `plad-fast distill`"), (model, "no run.json")):
        for command in (
            evaluate(tiny_teacher, pairs, folder),
            pair(tiny_teacher, tiny_teacher, pairs, folder),
        ):
            refused([*command, *overwrite], what)
    assert content(tmp_path) == before


def test_pairs_of_other_prompts_are_made_of_the_answers_that_are_there(
    tiny_teacher, pairs, tmp_path, refused, monkeypatch
):
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    # Nothing came of these settings, and the message advises others.
    refused([*command, "--scorer", "length", "--min-gap", "9999"], "no pair is left")
    assert main(command) == 0
    before = content(output)
    first = (output / "pairs.jsonl").read_text().splitlines()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(pairs.read_text().splitlines(keepends=True)[:0:-1]))
    with monkeypatch.context() as patch:
        patch.setattr("plad_fast.models.loading.load_model", None)
        assert main(command) == 0
        assert content(output) == before
        assert main([*command, "--prompts", str(fewer)]) == 0
        rows = (output / "pairs.jsonl").read_text().splitlines()
        assert rows == [row for row in reversed(first) if "Say 0." not in row]
        changed = "teacher_temperature was 1.0 and is 0.5"
        refused([*command, "--teacher-temperature", "0.5"], changed)
    assert main([*command, "--prompts", str(write_pairs(tmp_path / "more.jsonl", 7))]) == 0
    assert (output / "teacher.jsonl").read_bytes().startswith(before[output / "teacher.jsonl"])
    assert set((output / "pairs.jsonl").read_text().splitlines()) >= set(first)


def test_other_pairs_are_made_of_the_answers_that_are_there(
    tiny_teacher, pairs, tmp_path, capsys, monkeypatch
):
    """How pairs are chosen has no part in the answers, which may have been paid for."""
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    assert main(command) == 0
    first = (output / "pairs.jsonl").read_bytes()
    monkeypatch.setattr("plad_fast.models.loading.load_model", None)
    for scorer in ("length", "brevity", "length"):
        assert main([*command, "--scorer", scorer, "--select", "best-worst-pooled"]) == 0
    assert "select was 'teacher' and is 'best-worst-pooled'" in capsys.readouterr().out
    assert (output / "pairs.jsonl").read_bytes() != first
    assert main(command) == 0
    assert (output / "pairs.jsonl").read_bytes() == first
    # Scores of the other scorer are kept, and taken back with it.
    assert len(list(output.glob("scores.*.jsonl"))) == 1


def test_pairs_that_were_cut_off_or_edited(tiny_teacher, pairs, tmp_path, refused):
    output = tmp_path / "p"
    command = pair(tiny_teacher, tiny_teacher, pairs, output)
    assert main(command) == 0
    file = output / "pairs.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    # What reads as whole rows is no whole file: nobody trains on half.
    for half in (b"".join(lines[:2]), whole[: len(whole) // 2], b""):
        file.write_bytes(half)
        for trained in (
            train(tiny_teacher, file, tmp_path / "t"),
            evaluate(tiny_teacher, file, tmp_path / "e"),
        ):
            error = refused(trained)
            whole_rows = f"pairs.jsonl has 2 of its {len(lines)} rows"
            assert whole_rows in error or not half.endswith(b"\n")
        assert main(command) == 0
        assert file.read_bytes() == whole
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "e").exists()
    # Elsewhere it is a file like any other.
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:2]))
    assert main(train(tiny_teacher, tmp_path / "part.jsonl", tmp_path / "t")) == 0
    # Edited rows are kept.
    file.write_bytes(b"".join(lines[1:]))
    assert main(command) == 0
    refused([*command, "--scorer", "length"], "pairs.jsonl was edited")
    assert file.read_bytes() == b"".join(lines[1:])


def test_a_damaged_record_is_replaced_where_that_is_asked_for(
    tiny_teacher, pairs, tmp_path, refused
):
    made, model = tmp_path / "p", tmp_path / "m"
    commands = [
        (made / "run.json", pair(tiny_teacher, tiny_teacher, pairs, made)),
        (model / "training.json", train(tiny_teacher, pairs, model)),
    ]
    for record, command in commands:
        assert main(command) == 0
        for damage in (b"", b"\0" * 40):
            results = content(record.parent)
            record.write_bytes(damage)
            refused(command, record.name, "damaged", "--overwrite")
            assert content(record.parent) == {**results, record: damage}
            assert main([*command, "--overwrite"]) == 0
            assert main(command) == 0


def test_tokens_on_disk_change_no_weight(tiny_teacher, pairs, tmp_path, monkeypatch, capsys):
    """Nor what the training is known by: what was begun without them goes on with them. The loss
    has a reference, and pairs that it is done with."""
    options = ("--loss", "dpo_hinge", "--epochs", "2", "--saves-per-stage", "6",
               "--learning-rate", "1e-3")  # fmt: skip
    assert main(train(tiny_teacher, pairs, tmp_path / "held", *options)) == 0
    held = load_file(tmp_path / "held" / "model.safetensors")
    on_disk = ("--tokens-on-disk",)
    command = train(tiny_teacher, pairs, tmp_path / "out", *options)
    interrupted([*command, *on_disk], monkeypatch, checkpoint=2)
    [tokens] = (tmp_path / "out.checkpoints").glob(".tokens-*.arrow")
    assert tokens.stat().st_size
    monkeypatch.setattr("plad_fast.recipe.stages.LOOKED_AT", 4)
    capsys.readouterr()
    assert main([*command, *on_disk]) == 0
    assert "the number of first 4 pairs is 4" in capsys.readouterr().out
    assert not (tmp_path / "out.checkpoints").exists()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in held.items())
    assert main(command) == 0
    assert "done before" in capsys.readouterr().out
