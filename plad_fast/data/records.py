"""Records of what results were made from, by which stale ones are told from current ones."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from plad_fast.data.files import write_atomically
from plad_fast.data.places import from_folder
from plad_fast.errors import UsageError

_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_TRAINER_SETTINGS = "training_args.bin"  # paths and times among them
# What else answers depend on: architecture, tokenizer, chat template, end tokens.
_BESIDE = (
    "config.json",
    _ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "*.jinja",
)
_BLOCK = 2**20  # bytes read at once


ELSEWHERE = "choose another --output-dir"
OR_ANEW = f"{ELSEWHERE}, or pass --overwrite to start anew"
"""What to do about a folder that something else has made."""


class Found(NamedTuple):
    """What `RecordFormat.read` met."""

    fields: dict[str, Any]
    """Of a record that can be read, also one of another version."""
    problem: Literal["", "missing", "damaged", "foreign", "version"]
    """Nothing is wrong; there is no file; it cannot be read, or lacks a field; it says that it is
    something else; or the version is another one."""


class RecordFormat(NamedTuple):
    """JSON files of one kind: objects that begin with "format" and "version"."""

    name: str
    version: int

    @property
    def header(self) -> dict[str, Any]:
        """What comes first in a file."""
        return {"format": self.name, "version": self.version}

    def write(self, path: Path, **fields: Any) -> None:
        """Replace the file at `path`, durably; raises OSError."""
        write_atomically(path, json.dumps({**self.header, **fields, **self.header}, indent=2))

    def read(self, path: Path, **fields: type) -> Found:
        """The record at `path`, if it has these fields, each of its type; raises OSError where a
        file is there and cannot be read."""
        try:
            record = json.loads(path.read_bytes())
            if record["format"] != self.name:
                return Found({}, "foreign")
            if not all(isinstance(record[name], kind) for name, kind in fields.items()):
                return Found({}, "damaged")
            return Found(record, "" if record["version"] == self.version else "version")
        except (FileNotFoundError, NotADirectoryError):
            return Found({}, "missing")
        except (ValueError, KeyError, TypeError, RecursionError):
            return Found({}, "damaged")

    def begins(self, content: bytes) -> bool:
        """Whether content is of a file of this kind, or is what a power cut may leave of one.

        That is its beginning, nothing at all, or zeros.
        """
        head = content.rstrip(b"\0")
        form = {"format": self.name}
        starts = (json.dumps(form)[:-1], json.dumps(form, indent=2)[:-2])
        return any(head.startswith(s) or s.startswith(head) for s in map(str.encode, starts))


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of a JSON value; what JSON does not know counts as its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_list(values: Iterable[Any]) -> str:
    """`digest` of a list of JSON values, of which one is held at a time."""
    hashed, between = hashlib.sha256(b"["), ""
    for value in values:
        hashed.update(f"{between}{json.dumps(value, sort_keys=True, default=str)}".encode())
        between = ", "
    hashed.update(b"]")
    return hashed.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content; computed once for a size and time of it."""
    state = path.stat()
    return _file_digest(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def model_digest(source: str | os.PathLike[str], seen: frozenset[Path] = frozenset()) -> str:
    """Identifies a saved model by its weights, config and tokenizer, wherever it lies: a folder or
    a file; a hub id stands for itself. `seen` are folders of adapters that are on this one."""
    path = Path(source).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [
            file
            for pattern in (*_WEIGHTS, *_BESIDE)
            for file in sorted(path.glob(pattern))
            if file.name != _TRAINER_SETTINGS
        ]
    else:
        return os.fspath(source)
    parts = [(file.name, file_digest(file)) for file in files]
    base = _base_of_adapters(path)
    seen = seen | {path.resolve()}
    if base and Path(base).expanduser().resolve() not in seen:
        parts.append(("base", model_digest(base, seen)))
    return digest(parts)


def _base_of_adapters(folder: Path) -> str | None:
    """What the adapters that PEFT saved in a folder are for; None where there are none."""
    try:
        settings = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return from_folder(settings["base_model_name_or_path"] or "", folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a file: with lists for tuples, say."""
    return json.loads(json.dumps(dict(settings)))


def require_equal(
    found: Mapping[str, Any], now: Mapping[str, Any], path: Path, advice: str = OR_ANEW
) -> None:
    """Raise a UsageError that names what differs in the settings that made a file or folder."""
    if changed := changed_settings(found, now):
        raise UsageError(f"{path} was made with other settings: {'; '.join(changed)}; {advice}")


def changed_settings(found: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, setting by setting; see `flattened`."""
    before, after = flattened(found), flattened(now)
    return [
        f"{name} was {before.get(name, 'not set')!r} and is {after.get(name, 'not set')!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, ...) != after.get(name, ...)
    ]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """With the settings in a mapping by the names of both, with a dot."""
    flat = {}
    for name, value in settings.items():
        inner = flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {}
        flat.update(inner or {f"{prefix}{name}": value})
    return flat


_SCORES = RecordFormat("plad-fast scores", 3)


def recorded_scores(
    file: Path,
    fingerprint: Mapping[str, Any],
    compute: Callable[[], dict[str, Any]],
    *,
    replace: bool = False,
) -> dict[str, Any]:
    """The scores in a file (JSON values), computed and written first where it is not there; see
    `found_scores`."""
    scores = found_scores(file, fingerprint, replace=replace)
    if scores is None:
        scores = compute()
        fields = {"fingerprint": as_json(fingerprint), "digest": digest(scores), "scores": scores}
        _SCORES.write(file, **fields)
    return scores


def found_scores(
    file: Path, fingerprint: Mapping[str, Any], *, replace: bool = False
) -> dict[str, Any] | None:
    """The scores in a file, None where there are none.

    What is left of such a file after a power cut, or is not what was written, counts for nothing.
    One that is not of scores is refused (UsageError), and so is one made with another fingerprint
    unless `replace` is to have them made anew.
    """
    settings = as_json(fingerprint)
    if file.is_file() and not _SCORES.begins(file.read_bytes()):
        raise UsageError(f"{file} does not hold scores; {ELSEWHERE}")
    record, problem = _SCORES.read(file, fingerprint=dict, digest=str, scores=dict)
    if problem or record["digest"] != digest(record["scores"]):
        return None
    if not replace:
        require_equal(record["fingerprint"], settings, file)
    return record["scores"] if record["fingerprint"] == settings else None
