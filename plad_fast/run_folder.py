"""A folder that a recipe fills stage by stage, and goes on in after it was killed.

What a stage leaves is complete or not there: folders are made under a temporary name and renamed,
answers are appended line by line, and `run.json` records a stage after all of it is on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plad_fast._files import write_atomically
from plad_fast._records import require_equal
from plad_fast.errors import UsageError

logger = logging.getLogger("plad_fast")

try:
    import fcntl
except ImportError:  # not a POSIX system; two runs in one folder are then not told apart
    fcntl = None  # type: ignore[assignment]

_RECORD = "run.json"
_FORMAT = {"format": "plad-fast run", "version": 1}
_KEEP_FREE = 2**26  # bytes: less than this and not even a report would fit


class RunFolder:
    """Opens or makes the folder of a run.

    Args:
        path: of the folder.
        settings: what its results depend on; a folder made with others is refused.
        overwrite: empty a folder of an earlier run first. A folder that is not a run is refused.

    Raises:
        UsageError: not writable, no space, not a run folder, or made with other settings.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = Path(path).expanduser()
        self._lock: int | None = None
        try:
            self._record = self._open(json.loads(json.dumps(settings)), overwrite)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise UsageError(
                    f"cannot write to {self.path}: {error.strerror or error}; choose another "
                    "--output-dir"
                ) from error
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What finished so far: name -> {"seconds", "summary"}, in order."""
        return self._record["stages"]

    def stage(self, name: str, run: Callable[[], str]) -> None:
        """Run a stage unless it is done; `run` returns a one-line summary of what came out.

        The seconds of a stage that was interrupted count its last attempt only.
        """
        done = self.stages.get(name)
        if done is not None:
            print(f"== {name}: done before ({done['summary']})", flush=True)
            return
        print(f"== {name}", flush=True)
        start = time.monotonic()
        summary = run()
        seconds = time.monotonic() - start
        self.stages[name] = {"seconds": round(seconds, 1), "summary": summary}
        self._write(self._record)
        print(f"   {summary} ({seconds:.0f} s)", flush=True)

    def make_folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        """A subfolder that is there whole, or not at all."""
        final = self.path / name
        if final.exists():
            return final
        partial = self.path / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(final)
        return final

    def _open(self, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output-dir {self.path} is a file; choose a folder")
        self._require_ours()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.path)
        record = self._read()
        # A run killed while it emptied the folder left "emptying": what is there is a remainder.
        if record is not None and (overwrite or record.get("emptying")):
            self._empty(record)
            record = None
        if record is None:
            record = {**_FORMAT, "settings": settings, "stages": {}}
            self._write(record)
        require_equal(
            record["settings"],
            settings,
            self.path,
            "choose another --output-dir, or pass --overwrite to start anew",
        )
        free = shutil.disk_usage(self.path).free
        if free < _KEEP_FREE:
            raise UsageError(
                f"only {free >> 20} MiB are free for {self.path}; make room or choose another "
                "--output-dir"
            )
        return record

    def _require_ours(self) -> None:
        """Nothing is written into, or deleted from, a folder that other things lie in."""
        if not self.path.is_dir() or (self.path / _RECORD).is_file():
            return
        # A run killed in its first moment leaves a temporary file of the record.
        if any(not entry.name.startswith(f".{_RECORD}.") for entry in self.path.iterdir()):
            raise UsageError(
                f"{self.path} holds files but no {_RECORD}, so it is not the folder of a run; "
                "choose another --output-dir"
            )

    def _empty(self, record: dict[str, Any]) -> None:
        """The record stays until it is replaced, or a kill would leave a folder of nobody."""
        self._write({**record, "stages": {}, "emptying": True})
        for entry in self.path.iterdir():
            if entry.name == _RECORD:
                continue
            # A link is removed, and what it leads to is left alone.
            is_tree = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if is_tree else entry.unlink()

    def _read(self) -> dict[str, Any] | None:
        path = self.path / _RECORD
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            ours = record["format"] == _FORMAT["format"]
            version = record["version"]
            record["settings"], record["stages"]
        except (ValueError, KeyError, TypeError):
            ours, version = False, None
        if not ours:
            raise UsageError(
                f"{path} is not the record of a run, or is damaged, so {self.path} is left alone; "
                "choose another --output-dir"
            )
        if version != _FORMAT["version"]:
            raise UsageError(
                f"{path} has version {version}, this plad_fast writes version "
                f"{_FORMAT['version']}; choose another --output-dir"
            )
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        write_atomically(self.path / _RECORD, json.dumps(record, indent=2))


def lock_folder(path: Path) -> int | None:
    """Held as long as this process; the system drops it however that ends.

    Returns:
        The descriptor to close when done, or None where the file system has no locks.

    Raises:
        UsageError: another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"{path} is being filled by another process; wait for it to end, or choose another "
            "--output-dir"
        ) from None
    except OSError as error:
        os.close(descriptor)
        logger.warning("%s: this file system has no locks (%s)", path, error)
        return None
    return descriptor
