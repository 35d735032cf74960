"""A folder that `plad-fast pairs` or `plad-fast evaluate` fills: of one set of settings and data.

`stage.json` records which, so that results are told from those of another command, and never
replaced by others; and of rows that were written what they were, to tell a file that was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from plad_fast.data.file_states import changes, state_of
from plad_fast.data.locks import cannot_write
from plad_fast.data.records import (
    ELSEWHERE,
    OR_ANEW,
    RecordFormat,
    as_json,
    changed_settings,
    require_equal,
)
from plad_fast.errors import UsageError

_RECORD = "stage.json"
_FORMAT = RecordFormat("plad-fast stage", 1)
_RUN = "run.json"
_OTHER_FOLDER = (
    "choose another --output-dir (copies of its stored answers, *.jsonl but for pairs, spare "
    "making the same ones again), or pass --overwrite to start anew"
)
_OF_OTHERS = {_RUN: "a run of `plad-fast distill`", "training.json": "a trained model"}


def claim_folder(
    folder: Path,
    command: str,
    settings: Mapping[str, Any],
    *,
    results: Sequence[str],
    overwrite: bool,
    discard: Callable[[Mapping[str, Any]], None],
    extends: Callable[[Mapping[str, Any]], bool] = lambda found: False,
    of_results: Sequence[str] = (),
) -> None:
    """Makes the folder of a command, or finds that these very settings have made its results.

    Where there are none yet, other settings may go on: what is stored of answers and scores has
    records of its own. The folder is held by the caller (`held_folder`).

    Args:
        folder: of the command's results.
        command: that fills it.
        settings: what the results depend on, as JSON values.
        results: files that the command will replace, the one that is made last first.
        overwrite: remove these and what `discard` removes, whatever made them. The folder of
            another command is refused all the same.
        discard: removes what else is stored there; gets the settings that made it, if known.
        extends: whether results of other settings, which it gets, are a part of those to come.
        of_results: settings on which the results depend and nothing that is stored: these may
            change, which makes the results anew.

    Raises:
        UsageError: the folder is that of another command, other settings made it, it holds such
            results without a record or results that were edited, or it cannot be written.
    """
    settings = as_json(settings)
    try:
        record = _recorded(folder, command, overwrite)
        there = [name for name in results if (folder / name).exists()]
        if overwrite:
            discard({} if record is None else record["settings"])  # may be refused: results go last
            for name in there:
                (folder / name).unlink()
        elif there and record is None:
            raise UsageError(f"{folder} holds {there[0]} but no {_RECORD}; {OR_ANEW}")
        # The first is made last: without it the others are of a try that came to nothing.
        elif record is not None and results[0] in there:
            found = record["settings"]
            if not extends(found):
                before, now = (
                    {name: value for name, value in given.items() if name not in of_results}
                    for given in (found, settings)
                )
                require_equal(before, now, folder, _OTHER_FOLDER)
                for difference in changed_settings(found, settings):
                    print(f"{difference}: {results[0]} is made anew of what is stored", flush=True)
            _require_no_edits(folder, record["made"])
        _FORMAT.write(folder / _RECORD, command=command, settings=settings, made={})
    except OSError as error:
        raise cannot_write(folder, error) from error


def record_rows(folder: Path, name: str) -> None:
    """Adds to the record of a folder what rows a file was written with."""
    record = _FORMAT.read(folder / _RECORD).fields
    _FORMAT.write(folder / _RECORD, **record | {"made": {name: state_of(folder / name)}})


def require_whole(rows: Path) -> None:
    """Refuses (UsageError) a file of pairs of `plad-fast pairs` or a run that has the first of its
    rows and no more, and the folder that holds such a file."""
    if any(record.is_file() for record in (rows / _RECORD, rows / _RUN, rows.parent / _RUN)):
        for name in ("pairs.jsonl", "train.jsonl", "pairs/train.jsonl"):
            if (rows / name).is_file():
                raise UsageError(f"{rows} is a folder of plad-fast; give the file {rows / name}")
    made: dict[str, Any] = {}
    with suppress(OSError):
        made |= _FORMAT.read(rows.parent / _RECORD, made=dict).fields.get("made", {})
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        stages = json.loads((rows.parent.parent / _RUN).read_text(encoding="utf-8"))["stages"]
        for stage in stages.values():
            made |= {name.partition("/")[2]: state for name, state in stage["made"].items()}
    found = changes(str(rows), rows, made[rows.name], grown=False) if rows.name in made else []
    if cut := next((change.text for change in found if change.kind == "cut"), None):
        raise UsageError(
            f"{cut}, so it was cut off: run the command that made it again, or copy the file "
            "elsewhere if this part of it is meant"
        )


def _require_no_edits(folder: Path, made: Mapping[str, Any]) -> None:
    for name, state in made.items():
        for change in changes(name, folder / name, state, grown=False):
            if change.kind not in ("missing", "cut"):
                raise UsageError(
                    f"{folder / name} was edited since it was made ({change.text}), and would be "
                    "made anew; move it elsewhere, or pass --overwrite to start anew"
                )
            print(f"{change.text}: it is made again", flush=True)


def _recorded(folder: Path, command: str, overwrite: bool) -> dict[str, Any] | None:
    """The record of the folder, if the command has been there before; with `overwrite` a damaged
    one is none."""
    for name, what in _OF_OTHERS.items():
        if (folder / name).exists():
            raise UsageError(f"{folder} holds {name}, so it is the folder of {what}; {ELSEWHERE}")
    record, problem = _FORMAT.read(folder / _RECORD, command=str, settings=dict, made=dict)
    if problem == "missing" or (overwrite and problem in ("damaged", "version")):
        return None
    if problem:
        advice = ELSEWHERE if problem == "foreign" else OR_ANEW
        what = "is damaged, or no record of this version of plad_fast"
        raise UsageError(f"{folder / _RECORD} {what}; {advice}")
    if record["command"] != command:
        made = f"the results of `plad-fast {record['command']}`"
        raise UsageError(f"{folder} holds {made}; {ELSEWHERE}")
    return record
