"""A run folder: what it holds is complete, its own, and of one process; the rest is left alone."""

from __future__ import annotations

import errno
import json
import shutil

import pytest

from plad_fast import UsageError
from plad_fast.run_folder import RunFolder, Stage


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})

    def fail(path):
        (path / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        folder.make_folder("model", fail)
    assert not (folder / "model").exists()
    made = folder.make_folder("model", lambda path: (path / "whole").write_text("x") and None)
    assert [p.name for p in made.iterdir()] == ["whole"]


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    first = RunFolder(tmp_path / "run", {})
    with pytest.raises(UsageError, match="another process"):
        RunFolder(tmp_path / "run", {})
    first.close()
    RunFolder(tmp_path / "run", {}).close()


@pytest.mark.parametrize(
    "record",
    [
        "not JSON",
        '{"settings": {}, "stages": {}}',
        '{"format": "another", "version": 1, "settings": {}, "stages": {}}',
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_program_is_left_alone(tmp_path, record, overwrite):
    """`run.json` is a common name; it takes our format in it to delete what lies beside it."""
    (tmp_path / "run.json").write_text(record)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not the record of a run, or is damaged"):
        RunFolder(tmp_path, {}, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "run.json").read_text() == record


@pytest.mark.parametrize("name", ["thesis.txt", ".git"])
def test_a_folder_without_a_record_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match="not the folder of a run"):
        RunFolder(tmp_path, {}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_overwriting_removes_links_and_not_what_they_lead_to(tmp_path):
    RunFolder(tmp_path / "run", {"a": 1}).close()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model").write_text("x")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "sft").mkdir()
    RunFolder(tmp_path / "run", {"a": 2}, overwrite=True).close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert (tmp_path / "elsewhere" / "model").exists()


def test_a_kill_during_overwriting_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    """With or without --overwrite, the next run finishes the emptying and starts at the start."""
    folder = RunFolder(tmp_path / "run", {"a": 1})
    folder.stage(Stage("student", lambda: "made"))
    folder.close()
    for name in ("student", "sft"):
        (tmp_path / "run" / name).mkdir()

    def killed(path):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(RuntimeError):
            RunFolder(tmp_path / "run", {"a": 2}, overwrite=True)
    folder = RunFolder(tmp_path / "run", {"a": 2})
    assert folder.stages == {}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"] == {"a": 2}
    folder.close()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    RunFolder(tmp_path / "run", {}).close()
    assert "has no locks" in caplog.text
