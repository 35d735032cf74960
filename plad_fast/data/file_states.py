"""Short states of files that a stage read and made: enough to tell an edited file from a cut one.

Of JSON lines every row has a digest. A file that holds the first of the recorded rows and no more
was cut; one that reads as a whole and holds other rows was edited by somebody, on purpose. The
folder of a model has a list of such states, by which it is later told whole from damaged.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plad_fast.data.records import RecordFormat, digest, file_digest
from plad_fast.errors import UsageError

State = dict[str, Any]
"""JSON values. Of a folder: {"files": {name: state}}, names with slashes. Of JSON lines: {"rows":
their number, "digests": eight hexadecimal digits for each}, and "store": True where the first line
is a header and the order of the rows, which is that in which answers came, says nothing; "torn":
True where the last line has no end and cannot be read; "unread": the number of another such line,
after which nothing is counted. Of any other file: {"bytes": their number, "sha256": of them}."""

CARD = "README.md"
"""What is said of a model, beside it. People edit it; it is no part of a folder's state."""

MANIFEST = "files.json"
"""The list of the states of a folder's files."""

_FORMAT = RecordFormat("plad-fast files", 1)
_DIGITS = 8  # of a row


class Change(NamedTuple):
    """How a file differs from what was recorded of it."""

    name: str
    kind: str
    """missing; cut (some of the recorded rows and nothing else); edited (other rows, some as they
    were); foreign (none as it was); of a store, other (other rows); unread (rows, and a line that
    cannot be read); damaged (no rows, and other bytes)."""
    text: str
    """In words."""


def state_of(path: Path) -> State | None:
    """None where nothing is there. Hidden files of a folder, links and `CARD` are left out."""
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and not file.is_symlink()
            and file.name != CARD
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        return {"files": {file.relative_to(path).as_posix(): _of_file(file) for file in files}}
    return _of_file(path) if path.is_file() else None


def _is_state_of_file(value: Any) -> bool:
    """Whether a value from a record can be the state of a file."""
    if not isinstance(value, dict):
        return False
    if "rows" in value:
        return isinstance(value.get("digests"), str)
    return {"bytes", "sha256"} <= value.keys()


def changes(name: str, path: Path, recorded: Mapping[str, Any], *, grown: bool) -> list[Change]:
    """Differences of a file, or of those files of a folder that were recorded, from its `state_of`
    then; with `grown`, a store that has gained rows since is no other one."""
    if "files" not in recorded:
        change = _compare(name, state_of(path), recorded, grown)
        return [] if change is None else [change]
    if not path.is_dir():
        return [Change(name, "missing", f"{name} is missing")]
    found = (
        _compare(f"{name}/{part}", state_of(path / part), then, grown)
        for part, then in recorded["files"].items()
    )
    return [change for change in found if change is not None]


def write_manifest(folder: Path, **about: Any) -> None:
    """Write `files.json`: the states (`state_of`) of all files in the folder, at any depth, and
    beside them `about`. `sync_tree` or `publish_folder` make it durable."""
    states = state_of(folder)
    assert states is not None
    files = {name: state for name, state in states["files"].items() if name != MANIFEST}
    _FORMAT.write(folder / MANIFEST, **about, files=files)


def listed_files(folder: Path) -> dict[str, State]:
    """Names of files with what is recorded of each; empty where there is no list to be read."""
    try:
        return _FORMAT.read(folder / MANIFEST, files=dict).fields.get("files", {})
    except OSError:
        return {}


def damage(folder: Path, **about: Any) -> str | None:
    """Reason why a folder is not as its list says, in words; None if all of it is as it was
    written.

    Files that are not listed do not count; the list has to have recorded `about`. Raises OSError
    where a file is there and cannot be read.
    """
    kinds = {name: type(value) for name, value in about.items()}
    try:
        record, problem = _FORMAT.read(folder / MANIFEST, files=dict, **kinds)
    except IsADirectoryError:
        return f"{MANIFEST} is damaged"
    if problem:
        what = {"missing": "missing", "damaged": "damaged"}.get(problem, "of another version")
        return f"{MANIFEST} is {what}"
    if not all(map(_is_state_of_file, record["files"].values())):
        return f"{MANIFEST} is damaged"
    if any(record[name] != value for name, value in about.items()):
        return f"{MANIFEST} is of another folder"
    found = (
        change.text
        for name, state in record["files"].items()
        for change in changes(name, folder / name, state, grown=False)
    )
    return next(found, None)


def require_whole(folder: Path, advice: str) -> None:
    """Raise a UsageError that names the file unless a model's folder is as it was written; `advice`
    says what else to do than to put the file back."""
    if reason := damage(folder):
        raise UsageError(f"{folder} is damaged: {reason}; put that file back, or {advice}")


def _compare(name: str, now: State | None, then: Mapping[str, Any], grown: bool) -> Change | None:
    if now == then:
        return None
    if now is None or "files" in now:
        return Change(name, "missing", f"{name} is missing")
    if "rows" not in then or "rows" not in now:
        sizes = now.get("bytes"), then.get("bytes")
        how = "is not as it was written"
        if sizes[0] != sizes[1]:
            how = f"has {sizes[0]} bytes in place of {sizes[1]}"
        return Change(name, "damaged", f"{name} {how}")
    before, rows = _split(then["digests"]), _split(now["digests"])
    if then.get("store"):
        if grown and not Counter(before) - Counter(rows) and "unread" not in now:
            return None
        is_cut = not Counter(rows) - Counter(before)
    else:
        is_cut = before[: len(rows)] == rows
    if is_cut and "unread" not in now and (len(rows) < len(before) or "torn" in now):
        return Change(name, "cut", f"{name} has {len(rows)} of its {len(before)} rows")
    if "unread" in now:
        return Change(name, "unread", f"{name}, line {now['unread']} is no JSON object")
    if "torn" in now:
        return Change(name, "unread", f"the last line of {name} is no JSON object")
    text = f"{name} has other rows ({len(before)} before, {len(rows)} now)"
    if then.get("store"):
        return Change(name, "other", text)
    if not set(rows) & set(before):
        text = f"{name} has none of the {len(before)} rows it was made with"
        return Change(name, "foreign", text)
    return Change(name, "edited", text)


def _split(digests: str) -> list[str]:
    return [digests[i : i + _DIGITS] for i in range(0, len(digests), _DIGITS)]


def _of_file(path: Path) -> State:
    if path.suffix != ".jsonl":
        return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    state = path.stat()
    return dict(_of_rows(path, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _of_rows(path: Path, size: int, mtime_ns: int) -> State:
    """Computed once for a size and time of a file."""
    digests: list[str] = []
    state: State = {"rows": 0, "digests": ""}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                if line.endswith(b"\n"):
                    state["unread"] = number
                else:
                    state["torn"] = True
                break
            if number == 1 and "fingerprint" in row:
                state["store"] = True
                continue
            digests.append(digest(row)[:_DIGITS])
    if state.get("store"):
        digests.sort()
        state.pop("torn", None)  # which whoever opens it cuts off
    return {**state, "rows": len(digests), "digests": "".join(digests)}
