"""Files that bear their names are on the disk: the order of syncing and renaming."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from plad_fast.data.files import publish_folder, sync_folder, sync_tree, write_atomically

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="tells descriptors apart by /proc"
)


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the system: ("sync", its path at that time) and ("rename", to)."""
    made = []

    def fsync(descriptor):
        made.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve()))

    def recorded(real):
        def rename(source, target, **options):
            made.append(("rename", Path(target)))
            return real(source, target, **options)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    return made


def test_a_text_is_synced_before_it_has_its_name_and_the_name_after(tmp_path, calls):
    path = tmp_path / "made" / "here" / "run.json"
    assert write_atomically(path, "text") == path
    assert path.read_text() == "text"
    assert list(path.parent.iterdir()) == [path]
    # Both folders are new, so that their names have to be kept as well.
    assert {("sync", tmp_path), ("sync", tmp_path / "made")} <= set(calls[:2])
    (what, temporary), *rest = calls[2:]
    assert what == "sync"
    assert temporary.parent == path.parent
    assert rest == [("rename", path), ("sync", path.parent)]


def test_a_folder_is_synced_with_all_that_is_in_it_before_it_has_its_name(tmp_path, calls):
    partial, final = tmp_path / ".model.partial", tmp_path / "model"
    (partial / "deep" / "down").mkdir(parents=True)
    files = [partial / "weights", partial / "deep" / "down" / "x"]
    for file in files:
        file.write_text("x")
    (partial / "nowhere").symlink_to(tmp_path / "missing")
    final.mkdir()  # empty
    publish_folder(partial, final)
    at = calls.index(("rename", final))
    folders = [partial, partial / "deep", partial / "deep" / "down"]
    assert {path for _, path in calls[:at]} == {*files, *folders}
    assert calls[at + 1 :] == [("sync", tmp_path)]
    assert (final / "deep" / "down" / "x").read_text() == "x"


def test_nothing_is_published_over_a_filled_folder(tmp_path):
    partial, final = tmp_path / ".model.partial", tmp_path / "model"
    for folder in (partial, final):
        folder.mkdir()
        (folder / "x").write_text(folder.name)
    with pytest.raises(OSError, match="not empty"):
        publish_folder(partial, final)
    assert (final / "x").read_text() == "model"


def test_what_cannot_be_synced_is_not_renamed(tmp_path, monkeypatch):
    """Some disks notice that they are full when they are asked to write through."""
    path = write_atomically(tmp_path / "run.json", "before")
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "weights").write_text("x")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "after")
    with pytest.raises(OSError, match="No space"):
        publish_folder(partial, tmp_path / "model")
    assert path.read_text() == "before"
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", ".model.partial"}


def test_a_file_system_whose_folders_cannot_be_synced_is_used_all_the_same(tmp_path, monkeypatch):
    real = os.fsync

    def files_only(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    sync_tree(tmp_path)
    assert write_atomically(tmp_path / "x", "text").read_text() == "text"

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)
