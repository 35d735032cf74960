"""Checkpoints count when they are whole and of this training."""

from __future__ import annotations

import itertools
import json
import os
import shutil

import pytest

from plad_fast.data.file_states import damage
from plad_fast.training.checkpoints import Checkpoints, has_ended, newest_checkpoint
from plad_fast.training.signals import Asked
from tests.support.saved_trainings import FAULTS, damaged, files, steps_of, stop, train


def test_the_newest_two_checkpoints_are_kept_and_listed_whole(killed):
    names = [f"checkpoint-{step}" for step in (4, 6)]
    assert sorted(path.name for path in killed.iterdir()) == [*names, "training.json"]
    listed = json.loads((killed / names[1] / "files.json").read_text())["files"]
    assert sorted([*listed, "files.json"]) == files(killed / names[1])
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < set(listed)


def test_any_damage_to_the_newest_checkpoint_leads_to_the_one_before(killed, tmp_path, caplog):
    record = json.loads((killed / "checkpoint-6" / "files.json").read_text())["training"]
    stale = []
    for name, fault in itertools.product(files(killed / "checkpoint-6"), FAULTS):
        folder = shutil.copytree(killed, tmp_path / f"{name}-{fault}")
        assert newest_checkpoint(folder, record).name == "checkpoint-6"
        path = folder / "checkpoint-6" / name
        if not damaged(path, fault, folder / "checkpoint-4" / name):
            continue
        stale += [name] * (fault == "stale")
        caplog.clear()
        assert newest_checkpoint(folder, record).name == "checkpoint-4", (name, fault)
        assert f"checkpoint-6 ({name} " in steps_of(caplog)
        assert "goes on from checkpoint-4" in steps_of(caplog)
        assert not path.parent.exists()
        shutil.rmtree(folder)
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "files.json"} <= set(stale)


def test_a_checkpoint_of_another_training_or_step_is_not_gone_on_from(killed, tmp_path, caplog):
    record = json.loads((killed / "checkpoint-6" / "files.json").read_text())["training"]
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-999")
    assert newest_checkpoint(folder, record).name == "checkpoint-6"
    assert "checkpoint-999 (files.json is of another" in steps_of(caplog)
    assert newest_checkpoint(folder, "another") is None


def test_clocks_that_are_wrong_do_not_make_new_checkpoints_go(killed, tmp_path):
    """A checkpoint of tomorrow is older than the step after it."""
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    for number, step in enumerate((8, 10, 12)):
        shutil.copytree(killed / "checkpoint-6", folder / f"checkpoint-{step}")
        for path in folder.glob("checkpoint-*"):
            os.utime(path, (4e9 - number, 4e9 - number))
        os.utime(folder / f"checkpoint-{step}", (1e9, 1e9))
        callback = Checkpoints(folder, "training", Asked())
        callback.on_train_begin(None, None, None)
        callback.on_save(None, _State(step), None)
        assert sorted(int(p.name[11:]) for p in folder.glob("checkpoint-*")) == [
            *(step - 2, step),
        ]
        assert damage(folder / f"checkpoint-{step}", step=step, training="training") is None


class _State:
    def __init__(self, step: int) -> None:
        self.global_step = step
        self.log_history = []


@pytest.mark.parametrize("fault", ["unlisted", "unsynced"])
def test_a_checkpoint_counts_and_another_goes_only_when_it_is_on_the_disk(
    fault, killed, tmp_path, monkeypatch
):
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    shutil.copytree(killed / "checkpoint-6", folder / "checkpoint-8")
    (folder / "checkpoint-8" / "files.json").unlink()
    step = {"unlisted": "write_manifest", "unsynced": "sync_tree"}[fault]
    monkeypatch.setattr(f"plad_fast.training.checkpoints.{step}", stop)
    callback = Checkpoints(folder, "training", Asked())
    callback.on_train_begin(None, None, None)
    with pytest.raises(KeyboardInterrupt):
        callback.on_save(None, _State(8), None)
    assert damage(folder / "checkpoint-8") == "files.json is missing"
    assert (folder / "checkpoint-4").is_dir()


def test_a_checkpoint_is_made_by_the_clock(finished, tiny_teacher, tmp_path, monkeypatch):
    """Also where the steps alone would make none for long, and without an effect on the weights."""
    made = []
    real = Checkpoints.on_save

    def on_save(callback, args, state, control, **kwargs):
        made.append(state.global_step)
        real(callback, args, state, control, **kwargs)

    monkeypatch.setattr(Checkpoints, "on_save", on_save)
    now = itertools.count()
    monkeypatch.setattr("plad_fast.training.checkpoints.time.monotonic", lambda: next(now))
    # One call at the start, one a step, one after saving: three tick by between two checks.
    monkeypatch.setattr("plad_fast.training.checkpoints._SECONDS", 2)
    monkeypatch.setattr("plad_fast.training.checkpoints._SHARE", 1)
    weights = train(tiny_teacher, tmp_path / "often", saves=1)
    assert made == [2, 4, 6]
    assert weights == (finished / "model.safetensors").read_bytes()
    made.clear()
    # Saving takes one tick: it has to be worth it.
    monkeypatch.setattr("plad_fast.training.checkpoints._SHARE", 1 / 3)
    train(tiny_teacher, tmp_path / "costly", saves=1)
    assert made == [2, 5, 6]


@pytest.mark.parametrize(("step", "ended"), [(4, False), (5, True)])
def test_a_checkpoint_of_the_last_step_has_ended(step, ended, tmp_path):
    state = {"global_step": step, "max_steps": 5}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert has_ended(tmp_path) is ended
