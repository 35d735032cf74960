"""Pairs of prompts that do not fit into memory: read, answered and paired part by part."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.file_states import state_of
from plad_fast.data.files import replacing, write_atomically
from plad_fast.data.locks import cannot_write
from plad_fast.data.places import BUILTIN, expanded
from plad_fast.data.records import digest_of_list
from plad_fast.data.streams import stream_rows
from plad_fast.errors import UsageError
from plad_fast.pairs.build import NoPairsError, PairReport
from plad_fast.pairs.generation.answer_rows import NoAnswersError
from plad_fast.recipe.data_checks import check_rows, show_findings
from plad_fast.recipe.dependencies import bound_settings
from plad_fast.recipe.run_folder import RunFolder, Stage
from plad_fast.recipe.setting_checks import require_outside
from plad_fast.recipe.settings import DistillConfig
from plad_fast.recipe.stages import LOOKED_AT, MADE_BY_PAIRS, has_answers, pair_folder

if TYPE_CHECKING:
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint

_RESULTS = ("pairs.jsonl", "dropped.jsonl")


def pair_in_parts(config: DistillConfig, size: int, *, overwrite: bool = False) -> Path:
    """As `plad_fast.recipe.stages.pair_models`, with at most `size` prompts in memory at once.

    Each part has a folder, `parts/00001` and so on, as `pair_models` makes one, with its prompts
    beside it; what they have made is joined once the last one is done. Budgets are those of all,
    and so are columns: a file is read once before, to know those that some rows lack.

    Raises:
        UsageError: as `pair_models`; prompts that are not read from a file or data set; ranked
            lists without a size; and where teacher or judge are asked no more in this run.
    """
    if config.prompts in BUILTIN:
        raise UsageError("--part-size is for data of yours; give --prompts")
    if config.select == "ranked" and config.list_size is None:
        raise UsageError(
            "--select ranked with --part-size needs a --list-size: each part would choose its own, "
            "and a training wants one"
        )
    path = Path(config.output_dir)
    if overwrite:
        require_outside(path, config)
    places: list[Path] = []
    columns = _columns_of_file(config)
    ids: set[int] = set()
    kept, dropped, unit = 0, Counter[str](), ""
    endpoints: dict[str, Endpoint] = {}
    folder = RunFolder(
        path,
        {**bound_settings(config, {"teacher": config.teacher}), "part_size": size},
        command="pairs",
        overwrite=overwrite,
        is_bound=lambda: has_answers(path),
        made=MADE_BY_PAIRS,
    )
    with closing(folder):
        rows = itertools.islice(stream_rows(config.prompts, config.split), config.limit)
        while some := [*itertools.islice(rows, size)]:
            place = folder / f"parts/{len(places) + 1:05}"
            places.append(place)
            print(f"part {len(places)}", flush=True)
            columns |= dict.fromkeys(name for row in some for name in row)
            _require_new(ids, some, config.prompts)
            # A column of some parts is one of all, as where the rows are read at once.
            known = dict.fromkeys(columns)
            lines = (json.dumps({**known, **row}, default=str) + "\n" for row in some)
            prompts = write_atomically(place.with_suffix(".jsonl"), "".join(lines))
            of_part = replace(config, prompts=str(prompts), output_dir=str(place), limit=None)
            try:
                _, _, report = pair_folder(of_part, endpoints)
            except NoPairsError as error:
                report = error.report
                print(f"   {report}", flush=True)
            except NoAnswersError as error:
                is_given = all(teacher.startswith("column:") for teacher in config.teachers)
                # After the first part: a model would answer no other part either.
                if not (kept or dropped or is_given):
                    raise
                report = PairReport(0, [{"reason": "missing"}] * len(some))
                print(f"   {error}", flush=True)
            kept, dropped, unit = kept + report.kept, dropped + Counter(report.dropped), report.unit
            halted = (f"{spec}: {each.stopped}" for spec, each in endpoints.items() if each.stopped)
            if stopped := next(halted, ""):
                raise UsageError(
                    f"nothing more is asked after part {len(places)}: {stopped}; what has come "
                    "is kept: run the same command again to go on"
                )
        if not kept:
            for name in _RESULTS:
                (folder / name).unlink(missing_ok=True)
            raise UsageError(f"no pair is left of {config.prompts}; see {folder / 'parts'}")

        def join() -> str:
            for name in reversed(_RESULTS):
                _join([place / name for place in places], folder / name)
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            summary = f"kept {kept} of {kept + dropped.total()} {unit} in {len(places)} parts"
            return f"{summary}: {reasons}" if reasons else summary

        states = (state_of(place / name) for place in places for name in _RESULTS)
        of_all = {"parts": f"{len(places)}, {digest_of_list(states)}"}
        folder.stage(Stage("pairs of all parts", join, of_all, makes=_RESULTS))
    file = folder / _RESULTS[0]
    with file.open(encoding="utf-8") as lines_of_pairs:
        first = [*map(json.loads, itertools.islice(lines_of_pairs, LOOKED_AT))]
    show_findings(check_rows(first, f"first {len(first)} pairs", for_training=False))
    spent = "".join(f"{spec}: {endpoint.usage}\n" for spec, endpoint in endpoints.items())
    print(f"{spent}pairs: {file}", flush=True)
    return file


def _columns_of_file(config: DistillConfig) -> dict[str, None]:
    """The columns of all rows of a file, in order. Rows of the hub have the same ones, and may be
    slow to read twice."""
    if not expanded(config.prompts).is_file():
        return {}
    rows = itertools.islice(stream_rows(config.prompts, config.split), config.limit)
    return dict.fromkeys(name for row in rows for name in row)


def _require_new(ids: set[int], rows: Sequence[Mapping[str, Any]], source: str) -> None:
    """Takes the ids of a part to those of the parts before it, which must not have them."""
    given = {str(row["id"]) for row in rows if row.get("id") is not None}
    for name in given:
        if hash(name) in ids:
            raise UsageError(
                f"the id {name!r} of {source} stands in two parts; make ids unique, or rename the "
                "column to have ids made of the prompts"
            )
    ids |= set(map(hash, given))


def _join(parts: Sequence[Path], whole: Path) -> None:
    """One file of all that are there, whole or as it was before."""
    try:
        for left in whole.parent.glob(f".{whole.name}.*.tmp"):  # by a kill, and as large
            left.unlink()
        with replacing(whole) as file:
            for part in filter(Path.exists, parts):
                with part.open("rb") as rows:
                    shutil.copyfileobj(rows, file)
    except OSError as error:
        raise cannot_write(whole.parent, error) from error
