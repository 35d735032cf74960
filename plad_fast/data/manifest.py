"""The list of a folder's files, by which it is later told whole from damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from plad_fast.data.files import file_digest, write_atomically
from plad_fast.errors import UsageError

NAME = "files.json"

_FORMAT = {"format": "plad-fast files", "version": 1}


def write_manifest(folder: Path, **about: Any) -> None:
    """Write `files.json`: names, sizes and digests of all files in the folder, at any depth.

    Args:
        folder: that nobody writes to any more; `sync_tree` or `publish_folder` make it durable.
        about: what else to record, as JSON values.
    """
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": file_digest(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }
    write_atomically(folder / NAME, json.dumps({**_FORMAT, **about, "files": files}, indent=1))


def damage(folder: Path, **about: Any) -> str | None:
    """What a folder lacks of its list, in words; None if all of it is as it was written.

    Files that are not listed do not count.

    Args:
        folder: with the list.
        about: what the list has to have recorded.

    Raises:
        OSError: a file is there and cannot be read.
    """
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        header = {name: manifest[name] for name in _FORMAT}
        recorded = {name: manifest[name] for name in about}
        files = {
            name: (entry["bytes"], entry["blake2b"]) for name, entry in manifest["files"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return f"{NAME} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError):
        return f"{NAME} is damaged"
    if header != _FORMAT:
        return f"{NAME} is of another version"
    if recorded != about:
        return f"{NAME} is of another folder"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes in place of {size}"
        if file_digest(path) != digest:
            return f"{name} is not as it was written"
    return None


def require_whole(folder: Path, advice: str) -> None:
    """That a model's folder is as it was written.

    One without a list, which earlier versions wrote, has to hold weights that can be opened.

    Args:
        folder: of the model.
        advice: what else to do than to put the file back.

    Raises:
        UsageError: it is not; names the file.
        OSError: a file cannot be read.
    """
    reason = damage(folder) if (folder / NAME).exists() else _unreadable(folder)
    if reason is not None:
        raise UsageError(f"{folder} is damaged: {reason}; put that file back, or {advice}")


def _unreadable(folder: Path) -> str | None:
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "config.json is missing"
    except ValueError:
        return "config.json is damaged"
    wanted = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            wanted.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
    for name in sorted(wanted) or ["model.safetensors"]:
        try:
            with safe_open(folder / name, "pt"):  # which compares its header with its size
                pass
        except FileNotFoundError:
            return f"{name} is missing"
        except SafetensorError as error:
            return f"{name} cannot be read ({error})"
    return None
