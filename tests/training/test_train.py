"""A training goes on from a whole checkpoint or from none, and a damaged model is not "done".

What is damaged comes from the lists of files that a real training wrote.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from plad_fast import PLaDConfig, PLaDTrainer, UsageError, losses
from plad_fast.cli import main
from plad_fast.models.loading import load_model, load_tokenizer
from plad_fast.training import train as training
from plad_fast.training import trained_folders
from tests.support.launched import Started
from tests.support.loss_options import REQUIRED
from tests.support.recipe_runs import write_pairs
from tests.support.saved_trainings import FAULTS, ROWS, damaged, files, steps_of, stop, train
from tests.support.trainings import PAIRS


def test_a_training_with_a_damaged_checkpoint_ends_with_the_same_weights(
    killed, finished, tiny_teacher, tmp_path
):
    """The checkpoint before takes its place."""
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    damaged(folder / "checkpoint-6" / "optimizer.pt", "cut", folder / "checkpoint-4")
    output = tmp_path / "out"
    assert train(tiny_teacher, output) == (finished / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_a_whole_checkpoint_a_training_starts_anew(
    killed, finished, tiny_teacher, tmp_path, caplog
):
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    for step in (4, 6):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert train(tiny_teacher, tmp_path / "out") == (finished / "model.safetensors").read_bytes()
    for words in ("checkpoint-6 (optimizer.pt is", "checkpoint-4 (optimizer.pt is", "its start"):
        assert words in steps_of(caplog)


def test_a_training_killed_after_its_last_step_takes_no_other(tiny_teacher, tmp_path, monkeypatch):
    """In the middle of an epoch the Trainer would; what is logged last is printed."""
    train(tiny_teacher, tmp_path / "straight", epochs=1.5)
    with monkeypatch.context() as patch:
        patch.setattr(trained_folders, "publish_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_teacher, tmp_path / "out", epochs=1.5)
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_model", stop)
        weights = train(tiny_teacher, tmp_path / "out", epochs=1.5)
    assert weights == (tmp_path / "straight" / "model.safetensors").read_bytes()
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    logs = [trained_folders.log_history(tmp_path / name) for name in ("out", "straight")]
    for log in logs:
        assert log[-1]["step"] == 9
        for entry in log:
            del entry["tokens_per_second"]
    assert logs[0] == logs[1]


def test_a_training_says_from_which_step_it_goes_on(killed, tiny_teacher, tmp_path, capsys):
    """And nothing where it begins, or where none of its steps is left."""
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    shutil.copytree(folder, tmp_path / "ended.checkpoints")
    shutil.rmtree(folder / "checkpoint-6")
    train(tiny_teacher, tmp_path / "out")
    assert capsys.readouterr().out.count("continues from step 4 of 6\n") == 1
    for name in ("ended", "new"):
        train(tiny_teacher, tmp_path / name)
        assert "continues" not in capsys.readouterr().out


def test_a_run_that_a_training_began_at_a_logger_ends_with_it(tiny_teacher, tmp_path, monkeypatch):
    """One that was open before is the caller's, and stays open."""
    wandb = SimpleNamespace(run=None, ended=0)
    swanlab = SimpleNamespace(get_run=lambda: "of the caller", finish=stop)

    def begin(*_, **__):
        wandb.run = "of the training"

    def finish():
        wandb.run, wandb.ended = None, wandb.ended + 1

    wandb.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    monkeypatch.setattr(training._Progress, "on_log", begin)
    train(tiny_teacher, tmp_path / "out")
    assert wandb.ended == 1


def test_what_was_trained_on_other_rows_is_refused(
    killed, finished, tiny_teacher, tmp_path, monkeypatch
):
    """As many as before, one of them edited: neither checkpoints nor a model are of these."""
    edited = [*ROWS[:-1], {**ROWS[-1], "chosen": " maybe"}]
    monkeypatch.setattr("tests.support.saved_trainings.ROWS", edited)
    shutil.copytree(killed, tmp_path / "killed.checkpoints")
    shutil.copytree(finished, tmp_path / "finished")
    for name in ("killed", "finished"):
        with pytest.raises(UsageError, match=r"rows was '12 rows, .* and is '12 rows, "):
            train(tiny_teacher, tmp_path / name)


def test_what_is_no_checkpoint_is_left_alone(killed, finished, tiny_teacher, tmp_path):
    """Also by the training's end, which removes what it made itself."""
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    strange = ["checkpoint-abc", "checkpoint-6.tmp", "checkpoint-", "checkpoint-٣", "checkpoint-06"]
    for name in strange:
        shutil.copytree(folder / "checkpoint-4", folder / name)
    (folder / "checkpoint-99").write_text("a file")
    (folder / "checkpoint-999999").mkdir()  # what a kill at the start of saving leaves
    assert train(tiny_teacher, tmp_path / "out") == (finished / "model.safetensors").read_bytes()
    assert {path.name for path in folder.iterdir()} == {*strange, "checkpoint-99"}


def test_what_a_kill_left_beside_a_finished_model_is_removed(
    killed, finished, tiny_teacher, tmp_path
):
    output = shutil.copytree(finished, tmp_path / "out")
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    train(tiny_teacher, output)
    assert not folder.exists()
    # Without a record it may be anybody's.
    shutil.copytree(killed, folder)
    (folder / "training.json").unlink()
    train(tiny_teacher, output)
    assert (folder / "checkpoint-6").is_dir()


def test_a_finished_model_that_is_damaged_is_not_done(finished, killed, tiny_teacher, tmp_path):
    """Either the call is refused, naming the file, or the model is what it was."""
    names = files(finished)
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.json"} < set(names)
    refused = []
    for name, fault in itertools.product(names, FAULTS):
        output = shutil.copytree(finished, tmp_path / f"{name}-{fault}" / "out")
        if not damaged(output / name, fault, killed / "checkpoint-4" / name):
            continue
        with pytest.raises(UsageError, match=name):
            train(tiny_teacher, output)
        refused.append(name)
    assert set(refused) == set(names)


def test_the_command_says_what_is_damaged_in_one_line(tiny_teacher, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    command = ["train", "--model", str(tiny_teacher), "--pairs", str(pairs)]
    command += ["--output-dir", str(tmp_path / "out"), "--precision", "float32"]
    assert main(command) == 0
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.safetensors has 0 bytes in place of" in error
    assert "--overwrite" in error
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by POSIX means")
def test_a_disk_that_fills_up_in_torch_save(killed, finished, tiny_teacher, tmp_path):
    """The size limit on files stands in for it: the weights fit, the optimizer's state does not."""
    sizes = [(killed / "checkpoint-6" / name).stat().st_size
             for name in ("model.safetensors", "optimizer.pt")]  # fmt: skip
    limit = sum(sizes) // 2
    assert sizes[0] < limit < sizes[1]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["train", "--model", str(tiny_teacher), "--pairs", str(pairs), "--batch-size", "2",
               "--learning-rate", "1e-3", "--saves-per-stage", "3", "--precision", "float32",
               "--output-dir", str(tmp_path / "out")]  # fmt: skip
    started = Started(1, command, tmp_path / "logs", largest_file=limit)
    assert started.statuses() == [2], started.said()
    assert "what was finished is kept: make room and run the same command" in started.said()
    assert "Traceback" not in started.said()
    assert (tmp_path / "out.checkpoints" / "checkpoint-2" / "model.safetensors").is_file()
    assert main(command) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == (finished / "model.safetensors").read_bytes()


# One of each kind: none, by margin, by scores, with a reference, without pairs.
ONE_OF_A_KIND = ("sft", "plad_ranking", "plad_listwise", "dpo", "kto")


@pytest.mark.parametrize(
    "loss",
    [
        loss if loss in ONE_OF_A_KIND else pytest.param(loss, marks=pytest.mark.slow)
        for loss in losses.available()
    ],
)
def test_the_command_and_the_trainer_have_one_objective(loss, tiny_teacher, tmp_path):
    """The loss of the first step on the same pairs, with the defaults of the command."""
    rows = [{**row, "chosen_score": 0.5, "rejected_score": 0.25} for row in PAIRS[:4]]
    loss_args = json.dumps(REQUIRED.get(loss, {}))
    common = {"loss": loss, "learning_rate": 1e-3}
    log = training.train_model(
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
            rank_end_token=False,  # the command's own default
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
