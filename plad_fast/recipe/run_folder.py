"""A folder that a recipe fills stage by stage, and goes on in after it was killed.

What a stage leaves is complete or not there: folders are made under a temporary name and renamed,
answers are appended line by line, and `run.json` records a stage after all of it is on the disk,
with the settings it depends on and the digests of what it read and made. A stage is done while all
of these are as they were recorded.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plad_fast.checks import listed
from plad_fast.data.file_states import Change, changes, state_of
from plad_fast.data.files import publish_folder
from plad_fast.data.locks import cannot_write, held_folder, locked
from plad_fast.data.records import (
    ELSEWHERE,
    OR_ANEW,
    RecordFormat,
    as_json,
    changed_settings,
    digest,
    require_equal,
)
from plad_fast.errors import UsageError

_RECORD = "run.json"
_FORMAT = RecordFormat("plad-fast run", 2)
_KEEP_FREE = 2**26  # bytes: less than this and not even a report would fit


@dataclass(frozen=True)
class Stage:
    """A part of a run that is done once for the same settings and files."""

    name: str
    run: Callable[[], str]
    """Returns a one-line summary of what came out. What an earlier run of it left, killed or with
    other settings, is its own to take up or to replace."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What its outcome depends on, as JSON values, by names that a user knows."""
    reads: Sequence[str] = ()
    """Files and folders in the run folder."""
    makes: Sequence[str] = ()
    checks_itself: bool = False
    """Whatever became of what it made, it can run again: all of that says of itself what it is of,
    and what cannot be used is made anew or refused. Other stages may make the same files."""
    share: float = 0.0
    """Of the time of all stages, as far as it is known; 0 if not."""


class RunFolder:
    """Opens or makes the folder of a run, and holds it: no other process can.

    Args:
        path: of the folder.
        settings: of what is never made anew by itself; a folder made with others is refused.
        overwrite: empty a folder of an earlier run first. A folder that is not a run is refused.
        command: whose folder it is; that of another one is refused.
        is_bound: whether anything was made yet with the settings that the folder has; until then
            it takes others. Default: whether a stage is done.
        made: pattern of the names in the folder that runs make; where there is another,
            `overwrite` is refused.
        check: called once the folder is held, before anything in it is written or deleted; may
            raise.

    Raises:
        UsageError: not writable, no space, not a run folder, made with other settings, or another
            process is at work in it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        command: str = "distill",
        overwrite: bool = False,
        is_bound: Callable[[], bool] | None = None,
        made: str = ".*",
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = Path(path).expanduser()
        self._command = command
        self._record: dict[str, Any] = {"settings": as_json(settings), "stages": {}}
        self._plan: list[Stage] = []
        self._held = ExitStack()
        self._held.enter_context(held_folder(self.path))
        try:
            found = self._read(overwrite)
            self._record = found or self._record
            # A run that was killed while it emptied the folder left "emptying" and a remainder.
            anew = overwrite or bool(self._record.get("emptying"))
            if not anew and (bool(self.stages) if is_bound is None else is_bound()):
                require_equal(self._record["settings"], as_json(settings), self.path)
            self._require_room(made if anew else ".*")
            check()
            if anew and found is not None:
                self._empty()
            stages = {} if anew else self.stages
            self._record = {"settings": as_json(settings), "stages": stages}
            self._write()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise cannot_write(self.path, error) from error
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        self._held.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What finished so far, in order: name -> "seconds", "summary", the "settings", and the
        states (`state_of`) of what it "read" and "made"; "edited" names what was since, and
        "earlier" has digests of states that it made before these."""
        return self._record["stages"]

    def announce(self, stages: Sequence[Stage]) -> None:
        """Say which of these stages, in their order, will run anew, and why; refuses (UsageError)
        as `stage`, before any of them runs."""
        self._plan = list(stages)
        anew: dict[str, list[str]] = {}  # reason -> names of stages
        causes: dict[str, list[str]] = {}  # file -> why it will be another
        for stage in stages:
            if stage.name not in self.stages:
                # It was not reached: what follows has no record either, or one that will tell.
                continue
            reasons, edits = self._differences(stage, inputs=False)
            because = dict.fromkeys(why for name in stage.reads for why in causes.get(name, ()))
            self._require_no_edits(stage, [*reasons, *because], edits)
            for reason in dict.fromkeys([*because, *reasons]):
                anew.setdefault(reason, []).append(stage.name)
            # What is remade of damage is expected to come out the same.
            certain = [*because, *self._changed_settings(stage)]
            for name in stage.makes:
                causes.setdefault(name, []).extend(certain)
            for change in edits:
                anew.setdefault(f"{change.text}, and is kept as edited", [])
                causes.setdefault(change.name, []).append(f"{change.text}, and is kept as edited")
        for reason, names in anew.items():
            run = f": {listed(names)} {'run' if names[1:] else 'runs'} anew" if names else ""
            print(f"{reason}{run}", flush=True)

    def stage(self, stage: Stage) -> None:
        """Run a stage unless it is done.

        It runs anew where its settings or what it reads have changed, or where a part of what it
        made is missing or cut off. Rows that were edited since are kept, as what it made. What is
        damaged, or was edited and would have to be made anew, is refused (UsageError). The seconds
        of a stage that was interrupted count its last attempt only.
        """
        done = self.stages.get(stage.name)
        why, earlier = "", set()
        if done is not None:
            reasons, edits = self._differences(stage)
            self._require_no_edits(stage, reasons, edits)
            if edits:
                done["made"] = self._states(stage.makes)
                done["edited"] = sorted({*done.get("edited", ()), *(c.name for c in edits)})
                self._write()
            if not reasons:
                print(f"== {stage.name}: done before ({done['summary']})", flush=True)
                return
            why = f": anew, {'; '.join(reasons)}"
            earlier = {*done.get("earlier", ()), *map(digest, done["made"].values())}
            # Killed in the middle, it must not pass for what it was.
            del self.stages[stage.name]
            self._write()
        print(f"== {stage.name}{why}{self._time_left(stage)}", flush=True)
        read = self._states(stage.reads)
        start = time.monotonic()
        summary = stage.run()
        seconds = time.monotonic() - start
        self.stages[stage.name] = {
            "seconds": round(seconds, 1),
            "summary": summary,
            "settings": as_json(stage.settings),
            "read": read,
            "made": self._states(stage.makes),
            "earlier": sorted(earlier),
        }
        self._write()
        print(f"   {summary} ({seconds:.0f} s)", flush=True)

    def _time_left(self, stage: Stage) -> str:
        """By the time that the stages before it took, and their shares."""
        before = [*itertools.takewhile(lambda other: other.name != stage.name, self._plan)]
        known = sum(other.share for other in before)
        if not (known and stage.share):
            return ""
        seconds = sum(self.stages[other.name]["seconds"] for other in before)
        left = seconds / known * (sum(other.share for other in self._plan) - known)
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"

    def make_folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        """A subfolder that is there whole, or not at all; one of that name gives way to it."""
        final = self.path / name
        partial = self.path / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        if final.exists():
            shutil.rmtree(final)
        return publish_folder(partial, final)

    def _differences(self, stage: Stage, *, inputs: bool = True) -> tuple[list[str], list[Change]]:
        """Why a stage that was done is to run anew, and which of its rows were edited since;
        UsageError for what can neither be used nor be told to be rubbish."""
        done = self.stages[stage.name]
        reasons = self._changed_settings(stage)
        for name in stage.reads if inputs else ():
            recorded = done["read"].get(name)
            if recorded is None:
                reasons.append(f"{name} is new")
            elif changes(name, self.path / name, recorded, grown=False):
                reasons.append(f"{name} is another")
        edits = []
        for name in stage.makes:
            recorded = done["made"].get(name)
            if recorded is None:
                reasons.append(f"{name} is missing")
                continue
            for change in changes(name, self.path / name, recorded, grown=True):
                # What is cut off can be made again, unless it was edited; a store is filled up.
                was_edited = change.name in done.get("edited", ())
                if stage.checks_itself:
                    is_less = change.kind in ("missing", "cut")
                    reasons.append(change.text if is_less else f"{change.name} is another")
                elif change.kind == "edited":
                    if digest(state_of(self.path / change.name)) in done.get("earlier", ()):
                        reasons.append(f"{change.name} is an earlier one")
                    else:
                        edits.append(change)
                elif change.kind in ("missing", "other") or (
                    change.kind == "cut" and not was_edited
                ):
                    reasons.append(change.text)
                else:
                    advice = "put it right"
                    if change.kind == "foreign":
                        advice = "it may be of another run: train on it with `plad-fast train`"
                    raise UsageError(
                        f"{self.path}: {change.text}; {advice}, or delete {self.path / name}, "
                        f"which {stage.name!r} made, to have it made again"
                    )
        return reasons, edits

    def _changed_settings(self, stage: Stage) -> list[str]:
        return changed_settings(self.stages[stage.name]["settings"], as_json(stage.settings))

    def _require_no_edits(
        self, stage: Stage, reasons: Sequence[str], edits: Sequence[Change]
    ) -> None:
        names = {change.name for change in edits} | set(self.stages[stage.name].get("edited", ()))
        there = sorted(name for name in names if (self.path / name).exists())
        if reasons and there:
            raise UsageError(
                f"{self.path / there[0]} was edited, and {stage.name!r} would make it anew: "
                f"{'; '.join(reasons)}; move the file elsewhere first, or {ELSEWHERE}"
            )

    def _states(self, names: Sequence[str]) -> dict[str, Any]:
        states = {name: state_of(self.path / name) for name in names}
        return {name: state for name, state in states.items() if state is not None}

    def _require_room(self, made: str) -> None:
        """Raises UsageError where the disk is full, or something lies there that is not ours."""
        free = shutil.disk_usage(self.path).free
        if free < _KEEP_FREE:
            raise UsageError(f"only {free >> 20} MiB are free for {self.path}; make room")
        names = sorted(entry.name for entry in self.path.iterdir() if entry.name != _RECORD)
        if others := [name for name in names if not re.fullmatch(made, name, re.DOTALL)]:
            raise UsageError(
                f"{self.path} also holds {others[0]}, which no run made, so it is not emptied; "
                f"move that elsewhere, or {ELSEWHERE}"
            )

    def _empty(self) -> None:
        """The record stays until it is replaced, or a kill would leave a folder of nobody."""
        with ExitStack() as held:
            # Other programs may have its stores open, or train beside its models.
            for part in (*self.path.rglob("*.jsonl"), *self.path.rglob("*.checkpoints")):
                held.enter_context(locked(part))
            self._record = {**self._record, "stages": {}, "emptying": True}
            self._write()
            for entry in [entry for entry in self.path.iterdir() if entry.name != _RECORD]:
                # A link is removed, and what it leads to is left alone.
                is_tree = entry.is_dir() and not entry.is_symlink()
                shutil.rmtree(entry) if is_tree else entry.unlink()

    def _write(self) -> None:
        _FORMAT.write(self.path / _RECORD, **self._record | {"command": self._command})

    def _read(self, overwrite: bool) -> dict[str, Any] | None:
        """The record that is there; None in a folder with nothing in it. UsageError where the
        folder is not ours, or its record cannot be used."""
        path = self.path / _RECORD
        if not path.is_file():
            # A run killed in its first moment leaves a temporary file of the record.
            if any(not entry.name.startswith(f".{_RECORD}.") for entry in self.path.iterdir()):
                raise UsageError(
                    f"{self.path} holds no {_RECORD}, so it is not the folder of a run; {ELSEWHERE}"
                )
            return None
        record, problem = _FORMAT.read(path, settings=dict, stages=dict)
        if problem:
            # What a power cut leaves of a record, with nothing beside it but what runs make.
            is_ours = problem == "version" or _FORMAT.begins(path.read_bytes())
            if overwrite and is_ours:
                return {"settings": {}, "stages": {}, "emptying": True}
            what = "is not the record of a run, or is damaged"
            if problem == "version":
                what = f"has version {record['version']}, this plad_fast writes {_FORMAT.version}"
            advice = OR_ANEW if is_ours else ELSEWHERE
            raise UsageError(f"{path} {what}, so {self.path} is left alone; {advice}")
        if (made_by := record.get("command", self._command)) != self._command:
            raise UsageError(f"{self.path} holds the results of `plad-fast {made_by}`; {ELSEWHERE}")
        return record


def require_whole(rows: Path) -> None:
    """Refuses (UsageError) a file of pairs that a run made and that has the first of its rows and
    no more, and the folder that holds such a file."""
    if any((folder / _RECORD).is_file() for folder in (rows, rows.parent)):
        for name in ("pairs.jsonl", "train.jsonl", "pairs/train.jsonl"):
            if (file := rows / name).is_file():
                others = file.with_name("held-out.jsonl")
                apart = f", or to evaluate {others}" if others.is_file() else ""
                raise UsageError(f"{rows} is a folder of plad-fast; give the file {file}{apart}")
    made: dict[Path, Any] = {}
    for folder in (rows.parent, rows.parent.parent):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stages = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["stages"]
            for stage in stages.values():
                made |= {folder / name: state for name, state in stage["made"].items()}
    found = changes(str(rows), rows, made[rows], grown=False) if rows in made else []
    if cut := next((change.text for change in found if change.kind == "cut"), None):
        raise UsageError(
            f"{cut}, so it was cut off: run the command that made it again, or copy the file "
            "elsewhere if this part of it is meant"
        )
