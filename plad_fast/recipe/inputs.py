"""The recipe's data: its prompts, their division, and rows as files."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.data.files import write_atomically
from plad_fast.data.places import BUILTIN
from plad_fast.data.plain_rows import without_nulls
from plad_fast.data.prompts import Prompt, builtin_file, builtin_prompts, load_prompts, wording
from plad_fast.data.records import digest
from plad_fast.data.rows import require_columns
from plad_fast.data.streams import StreamedRows, stream_rows
from plad_fast.data.tables import read_table, refuse_written_lists
from plad_fast.data.unicode import mend
from plad_fast.errors import UsageError
from plad_fast.pairs.build import PairReport
from plad_fast.pairs.generation.given import column_answers
from plad_fast.recipe.data_checks import (
    Finding,
    check_answers,
    check_rows,
    require_learnable,
    show_findings,
)
from plad_fast.recipe.fields import flag
from plad_fast.recipe.run_folder import require_whole
from plad_fast.recipe.settings import DistillConfig

if TYPE_CHECKING:
    from plad_fast.evaluation.students import StudentOutputs

_FEWEST = 2
_OF_COLUMNS = ("prompt_column", "prompt_template", "split")


def load_recipe_prompts(config: DistillConfig) -> list[Prompt]:
    """The prompts that the settings name, checked. UsageError from reading them, and where columns
    are named of the built-in prompts, which have none."""
    options = {name: getattr(config, name) for name in (*_OF_COLUMNS, "reference_column")}
    if config.prompts not in BUILTIN:
        return load_prompts(config.prompts, limit=config.limit, **options)
    for name, value in options.items():
        if value != getattr(DistillConfig, name):
            raise UsageError(
                f"{flag(name)} is about data of yours, not about built-in prompts; give a file "
                "with --prompts"
            )
    return builtin_prompts(config.prompts)[: config.limit]


def answer_columns(config: DistillConfig) -> Callable[[str], Mapping[str, str | None]]:
    """Where a teacher of `column:NAME` finds its texts: in the data that the prompts are from."""

    @functools.cache
    def read(column: str) -> dict[str, str | None]:
        if config.prompts in BUILTIN:
            with builtin_file(config.prompts) as path:
                return column_answers(str(path), column)
        options = {name: getattr(config, name) for name in _OF_COLUMNS}
        return column_answers(config.prompts, column, **options)

    return read


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """What a run records of its prompts, to notice that a file has changed since."""
    known = [[p.id, p.content, p.reference, *([p.tools] if p.tools else [])] for p in prompts]
    return f"{len(prompts)} prompts, {digest(known)}"


def split_prompts(
    prompts: Sequence[Prompt], held_out: float, seed: int, validation: float = 0
) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Shuffled by the seed: those to train on, those held out, a share of the different prompts
    below 1 or a number of them, and of the rest those to validate on, likewise.

    Prompts that differ in white space only are copies and stay together: a student must not be
    measured on what it was trained on. Raises UsageError where fewer than two different prompts
    would be left on a side.
    """
    for name, share in (("--held-out", held_out), ("--validation", validation)):
        if share > 1 and not float(share).is_integer():
            raise UsageError(f"{name} {share:g} is neither a share below 1 nor a number of prompts")
    copies: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        copies.setdefault(wording(prompt.content), []).append(prompt)
    groups = list(copies.values())
    count = round(held_out * len(groups)) if held_out < 1 else int(held_out)
    if min(count, len(groups) - count) < _FEWEST:
        raise UsageError(
            f"{len(groups)} different prompts with --held-out {held_out:g} leave "
            f"{len(groups) - count} to train on and {count} to evaluate; each needs at least "
            f"{_FEWEST}"
        )
    rest = len(groups) - count
    validated = round(validation * rest) if validation < 1 else int(validation)
    if rest - validated < _FEWEST:
        raise UsageError(
            f"--validation {validation:g} of {rest} prompts leaves {rest - validated} to train on; "
            f"give a smaller number, so that {_FEWEST} are left"
        )
    random.Random(seed).shuffle(groups)
    ends = count, count + validated
    return (
        [*chain(*groups[ends[1] :])],
        [*chain(*groups[:count])],
        [*chain(*groups[count : ends[1]])],
    )


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of a run, by what they are for."""

    all: list[Prompt]
    train: list[Prompt]
    held_out: list[Prompt]
    validation: list[Prompt]
    """Of none of the others: the checkpoint is chosen by them."""
    sft: list[Prompt]
    pairs: list[Prompt]

    @classmethod
    def of(cls, config: DistillConfig) -> RunPrompts:
        """Raises UsageError as `load_recipe_prompts` and `split_prompts`."""
        prompts = load_recipe_prompts(config)
        train, held_out, validation = split_prompts(
            prompts, config.held_out, config.seed, config.validation
        )
        sft = train[: max(1, round(len(train) * config.sft_share))]
        # Samples for prompts that fine-tuning has seen come out too close to the teacher's answers.
        return cls(prompts, train, held_out, validation, sft, train[len(sft) :] or train)


def read_pairs(
    path: str, split: str = "train", *, with_scores: bool = False
) -> list[dict[str, Any]]:
    """Rows of a pairs file, or of the split of a hub data set. Chat messages in CSV or JSON text
    are not unpacked, but refused, and so is a file that is damaged, empty, without the columns that
    rows need, those of scores included if asked for, or was cut off since `plad-fast pairs` or a
    run made it (UsageError)."""
    require_whole(Path(path).expanduser())
    table = read_table(path, split)
    require_columns(table.columns, with_scores=with_scores, name=path)
    rows = table.rows
    if not isinstance(rows, list):  # of the hub, by way of Arrow
        rows = [without_nulls(row) for row in rows]
    return [_checked(row, number, path) for number, row in enumerate(rows, start=1)]


def stream_pairs(path: str, split: str = "train", *, with_scores: bool = False) -> StreamedRows:
    """As `read_pairs`, with a row in memory at a time."""
    require_whole(Path(path).expanduser())
    rows = StreamedRows(functools.partial(_stream, path, split), path)
    require_columns(rows.columns, with_scores=with_scores, name=path)
    return rows


def _stream(path: str, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(stream_rows(path, split), start=1):
        yield _checked(row, number, path)


def _checked(row: Mapping[str, Any], number: int, path: str) -> dict[str, Any]:
    for name in ("prompt", "chosen", "rejected"):
        refuse_written_lists(row.get(name), f"{path}, row {number}, column {name!r}")
    return dict(row)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows that `write_jsonl` wrote."""
    # Not splitlines(): a JSON string may hold U+2028 and the like as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [mend(json.loads(line)) for line in lines if line]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a line; the file is complete or not there."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def dropped_file(pairs: Path) -> Path:
    """Where the records lie of what is missing from a file of pairs: dropped.jsonl beside it."""
    rest = pairs.name.removeprefix("pairs").removeprefix("train")
    return pairs.with_name(f"dropped{'' if rest.startswith(('.', '-')) else '-'}{rest}")


def write_pairs(path: Path, rows: Sequence[Mapping[str, Any]], report: PairReport) -> None:
    """The rows, and beside them what was dropped and why; no file where there are no rows."""
    write_jsonl(dropped_file(path), report.drops)
    if rows:
        write_jsonl(path, rows)
    else:
        path.unlink(missing_ok=True)


def show_pairs(
    rows: Sequence[Mapping[str, Any]],
    report: PairReport,
    file: Path,
    what: str = "pairs",
    *,
    for_training: bool = True,
) -> None:
    """Prints the funnel of what `build_pairs` gave, where to see what was dropped, and what to look
    at; see `check_rows`. UsageError where nothing can be learned from the rows."""
    steps = []  # such as "9 prompts > 8 answered (1 missing)"
    for name, left, lost in report.funnel():
        why = f" ({', '.join(f'{count} {reason}' for reason, count in lost.items())})"
        steps.append(f"{left} {name}{why if lost else ''}")
    where = f"; {dropped_file(file)} has what was dropped" if report.drops else ""
    name = "" if what == "pairs" else f"{what}: "
    print(f"   {name}{' > '.join(steps)}{where}", flush=True)
    findings = check_rows(rows, what, for_training=for_training)
    show_findings(findings)
    require_learnable(findings, "give more or other prompts, or another teacher")


def check_students(students: Sequence[StudentOutputs]) -> list[Finding]:
    """Findings on what students answered to the held-out prompts."""
    found = (check_answers([*s.answers.values()], f"answers of {s.name}") for s in students)
    return [*chain(*found)]


def data_of_run(
    files: Mapping[str, Path],
    *,
    unit: str,
    teacher: Sequence[str],
    students: Sequence[StudentOutputs],
) -> dict[str, Any]:
    """For the report, from what a run has stored: `funnels` by name, and `findings` as text.

    A file of pairs without a record of what was dropped has no funnel; `unit` is that of
    `PairReport`, and `teacher` has its finished answers.
    """
    findings = check_answers(teacher, "teacher's answers")
    funnels = {}
    for name, file in files.items():
        rows, dropped = read_jsonl(file), dropped_file(file)
        if dropped.exists():
            # Held-out pairs are one of each prompt, whatever is trained on.
            kind = "prompts" if file.stem == "held-out" else unit
            funnels[name] = PairReport(len(rows), read_jsonl(dropped), kind).funnel()
        findings += check_rows(rows, name)
    findings += check_students(students)
    return {"funnels": funnels, "findings": list(dict.fromkeys(map(str, findings)))}
