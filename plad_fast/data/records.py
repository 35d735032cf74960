"""Records of what a result was made from, by which a stale one is told from a current one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plad_fast.data.files import file_digest, write_atomically
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


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of a JSON value; what JSON does not know counts as its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def model_digest(source: str | os.PathLike[str], seen: frozenset[Path] = frozenset()) -> str:
    """Identifies a saved model by its weights, config and tokenizer, wherever it lies.

    Args:
        source: a folder or a file; a hub id stands for itself.
        seen: folders of adapters that are on this one.
    """
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
    parts = []
    for file in files:
        state = file.stat()
        parts.append((file.name, _file_digest(file, state.st_size, state.st_mtime_ns)))
    base = _base_of_adapters(path)
    seen = seen | {path.resolve()}
    if base and Path(base).expanduser().resolve() not in seen:
        parts.append(("base", model_digest(base, seen)))
    return digest(parts)


def _base_of_adapters(folder: Path) -> str | None:
    """What the adapters that PEFT saved in a folder are for; None where there are none."""
    try:
        settings = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Of the whole content; size and time are there to notice that a cached digest is old."""
    return file_digest(path)


def require_equal(
    found: Mapping[str, Any], now: Mapping[str, Any], path: Path, advice: str
) -> None:
    """Compares the settings that made a file or folder with those of now.

    Raises:
        UsageError: some differ; it names them, and ends in the advice.
    """
    if changed := changed_settings(found, now):
        raise UsageError(f"{path} was made with other settings: {'; '.join(changed)}; {advice}")


def changed_settings(found: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, setting by setting."""
    return [
        f"{name} was {found.get(name, 'not set')!r} and is {now.get(name, 'not set')!r}"
        for name in sorted(found.keys() | now.keys())
        if found.get(name, ...) != now.get(name, ...)
    ]


_FORMAT = {"format": "plad-fast scores", "version": 2}


def stored_scores(
    file: Path,
    fingerprint: Mapping[str, Any],
    compute: Callable[[], dict[str, Any]],
    *,
    replace: bool = False,
) -> dict[str, Any]:
    """The scores in a file, which is computed and written first where it is not there.

    What is left of such a file after a power cut, or is not what was written, counts for nothing.

    Args:
        file: of one set of scores.
        fingerprint: what they depend on.
        compute: gives the scores as JSON values; not called if the file is there.
        replace: compute them anew where the file has those of another fingerprint.

    Raises:
        UsageError: the file is not one of scores, or was made with another fingerprint.
    """
    settings = json.loads(json.dumps(fingerprint))
    scores = _read(file, settings, replace) if file.is_file() else None
    if scores is None:
        scores = compute()
        record = {**_FORMAT, "fingerprint": settings, "digest": digest(scores), "scores": scores}
        write_atomically(file, json.dumps(record))
    return scores


def _read(file: Path, settings: dict[str, Any], replace: bool) -> dict[str, Any] | None:
    """None where they are to be computed."""
    content = file.read_bytes().rstrip(b"\0")
    start = json.dumps({"format": _FORMAT["format"]}).encode()[:-1]
    if not content.startswith(start) and not start.startswith(content):
        raise UsageError(f"{file} does not hold scores; choose another --output-dir")
    try:
        record = json.loads(content)
        version, found, scores = record["version"], record["fingerprint"], record["scores"]
        is_whole = version == _FORMAT["version"] and record["digest"] == digest(scores)
    except (ValueError, KeyError, TypeError):
        return None
    if not is_whole:
        return None
    if found != settings and not replace:
        advice = "choose another --output-dir, or pass --overwrite to start anew"
        require_equal(found, settings, file, advice)
    return scores if found == settings else None
