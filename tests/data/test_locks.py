"""A folder or store is one process's alone, for as long as that process lives."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from plad_fast.data.locks import held_folder, lock, locked
from plad_fast.errors import UsageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")

HOLDS = """
import pathlib, sys
from plad_fast.data.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_killed_process_holds_nothing(tmp_path, is_folder):
    path = tmp_path if is_folder else tmp_path / "rows.jsonl"
    if not is_folder:
        path.touch()
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process") as refused, locked(path):
            pass
        assert str(path) in str(refused.value)
        process.kill()
        process.wait()
    with locked(path):
        assert sorted(tmp_path.iterdir()) == ([] if is_folder else [path])


def test_what_has_given_its_name_away_is_not_taken_for_the_new_one(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        folder.rename(tmp_path / "kept")
        folder.mkdir()
        with pytest.raises(UsageError, match="another process"):
            lock(descriptor, folder)
    finally:
        os.close(descriptor)


def test_a_folder_that_stays_empty_is_left_as_it_was_found(tmp_path):
    there, new = tmp_path / "there", tmp_path / "a" / "new"
    there.mkdir()
    for folder in (there, new):
        with held_folder(folder) as held:
            assert held.is_dir()
            with pytest.raises(UsageError, match="another process"), held_folder(folder):
                pass
    assert there.is_dir()
    assert not new.exists()
    with held_folder(new):
        (new / "result").touch()
    assert (new / "result").exists()


def test_a_folder_beside_a_training_is_refused(tmp_path):
    (tmp_path / "out.checkpoints").mkdir()
    with locked(tmp_path / "out.checkpoints"):
        with pytest.raises(UsageError, match=r"out\.checkpoints"), held_folder(tmp_path / "out"):
            pass
        assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def refused(*_):  # permissions do not bind root, who runs many a CI
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("plad_fast.data.locks.make_folders", refused)
    with pytest.raises(UsageError, match=r"Read-only.*on another disk"), held_folder(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"), held_folder(tmp_path / "file"):
        pass
