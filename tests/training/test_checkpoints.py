"""A training goes on from a whole checkpoint or from none, and a damaged model is not "done".

What is damaged comes from the lists of files that a real training wrote.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plad_fast import UsageError
from plad_fast.cli import main
from plad_fast.data.manifest import damage
from plad_fast.training import train as training
from plad_fast.training import trained_folders
from plad_fast.training.checkpoints import Checkpoints, newest_checkpoint
from plad_fast.training.signals import Asked
from plad_fast.training.train import train_model
from tests.support.recipe_runs import write_pairs

ROWS = [{"prompt": f"Say {i}.", "chosen": f" yes {i}", "rejected": " no"} for i in range(12)]
FAULTS = ("cut", "empty", "missing", "stale")


def train(source, output: Path, **options) -> bytes:
    """Six steps with checkpoints at 2, 4 and 6; returns the weights."""
    train_model(
        source,
        ROWS,
        output,
        **{
            "loss": "plad_ranking",
            "epochs": 1,
            "learning_rate": 1e-3,
            "batch_size": 2,
            "saves": 3,
            "precision": "float32",
            **options,
        },
    )
    return (output / "model.safetensors").read_bytes()


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tiny_teacher, tmp_path_factory) -> Path:
    """The model of a training that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    train(tiny_teacher, output)
    return output


@pytest.fixture(scope="module")
def killed(tiny_teacher, tmp_path_factory) -> Path:
    """The checkpoints of one that was killed before the model had its name."""
    output = tmp_path_factory.mktemp("killed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_folders, "publish_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_teacher, output)
    return output.with_name("out.checkpoints")


def damaged(path: Path, fault: str, older: Path) -> bool:
    """Damages a file; False where the older one, or what would be left, is the same."""
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
        return True
    left = {"cut": content[: len(content) // 2], "empty": b""}.get(fault)
    if left is None:
        left = older.read_bytes() if older.is_file() else content
    path.write_bytes(left)
    return left != content


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def steps_of(caplog) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.name == "plad_fast")


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


def test_a_checkpoint_of_another_training_or_step_is_not_gone_on_from(killed, tmp_path, caplog):
    record = json.loads((killed / "checkpoint-6" / "files.json").read_text())["training"]
    folder = shutil.copytree(killed, tmp_path / "out.checkpoints")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-999")
    assert newest_checkpoint(folder, record).name == "checkpoint-6"
    assert "checkpoint-999 (files.json is of another" in steps_of(caplog)
    assert newest_checkpoint(folder, "another") is None


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
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        f"from plad_fast.cli import main; sys.exit(main({command!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "what was finished is kept: make room and run the same command" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out.checkpoints" / "checkpoint-2" / "model.safetensors").is_file()
    assert main(command) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == (finished / "model.safetensors").read_bytes()
