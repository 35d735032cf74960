"""The recipe's data: its prompts, their division, and rows as files."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast._files import write_atomically
from plad_fast._records import digest
from plad_fast.chat import Content
from plad_fast.errors import UsageError
from plad_fast.pairs import Prompt, builtin_prompts, column_answers, load_prompts
from plad_fast.pairs.tables import read_table, refuse_written_lists
from plad_fast.recipe import BUILTIN_PROMPTS, DistillConfig, flag
from plad_fast.stage_folder import require_whole

_FEWEST = 2
_LONGEST_LIST = 300  # characters of a list in a message


def load_recipe_prompts(config: DistillConfig) -> list[Prompt]:
    """The prompts that the settings name, checked.

    Raises:
        UsageError: from reading them, and where columns are named of the built-in prompts, which
            have none.
    """
    if config.prompts == BUILTIN_PROMPTS:
        for name in ("prompt_column", "prompt_template", "reference_column", "split"):
            if getattr(config, name) != getattr(DistillConfig, name):
                raise UsageError(
                    f"{flag(name)} is about data of yours, and without --prompts the built-in "
                    "prompts are used; give --prompts"
                )
        prompts = builtin_prompts()
        return prompts if config.limit is None else prompts[: config.limit]
    return load_prompts(
        config.prompts,
        prompt_column=config.prompt_column,
        prompt_template=config.prompt_template,
        reference_column=config.reference_column,
        limit=config.limit,
        split=config.split,
    )


def answer_columns(config: DistillConfig) -> Callable[[str], Mapping[str, str | None]]:
    """Where a teacher of `column:NAME` finds its texts: in the data that the prompts are from."""

    @functools.cache
    def read(column: str) -> dict[str, str | None]:
        if config.prompts == BUILTIN_PROMPTS:
            raise UsageError(
                f"column:{column} takes answers from the data of the prompts, and the built-in "
                "prompts have none; give --prompts"
            )
        return column_answers(
            config.prompts,
            column,
            prompt_column=config.prompt_column,
            prompt_template=config.prompt_template,
            split=config.split,
        )

    return read


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """What a run records of its prompts, to notice that a file has changed since."""
    return f"{len(prompts)} prompts, {digest([[p.id, p.content, p.reference] for p in prompts])}"


def split_prompts(
    prompts: Sequence[Prompt], held_out: float, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Shuffled by the seed: those to train on, and those held out.

    Prompts that differ in white space only are copies and stay together: a student must not be
    measured on what it was trained on.

    Args:
        prompts: all of them.
        held_out: a share of the different prompts below 1, or a number of them.
        seed: of the shuffling.

    Raises:
        UsageError: fewer than two different prompts would be left on a side.
    """
    copies: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        copies.setdefault(_normalized(prompt.content), []).append(prompt)
    groups = list(copies.values())
    count = round(held_out * len(groups)) if held_out < 1 else int(held_out)
    if min(count, len(groups) - count) < _FEWEST:
        raise UsageError(
            f"{len(groups)} different prompts with --held-out {held_out:g} leave "
            f"{len(groups) - count} to train on and {count} to evaluate; each needs at least "
            f"{_FEWEST}"
        )
    random.Random(seed).shuffle(groups)
    return _flat(groups[count:]), _flat(groups[:count])


def read_pairs(path: str) -> list[dict[str, Any]]:
    """Rows of a pairs file. Chat messages in CSV or JSON text are not unpacked, but refused.

    Raises:
        UsageError: no such file, damaged, empty, cut off since `plad-fast pairs` or a run made it,
            or without the columns that rows need.
    """
    require_whole(Path(path).expanduser())
    table = read_table(path, "train")
    columns = set(table.columns)
    # Of messages and texts that begin with their prompt, both responses tell what it is.
    if not columns >= {"chosen", "rejected"} and not (
        "prompt" in columns and columns & {"chosen", "completion", "responses"}
    ):
        listed = ", ".join(map(str, table.columns))[:_LONGEST_LIST]
        raise UsageError(
            f"{path} has the columns {listed}: pairs have prompt, chosen and rejected, and lists "
            "have prompt and responses"
        )
    rows = [dict(row) for row in table.rows]
    for number, row in enumerate(rows, start=1):
        for name in ("prompt", "chosen", "rejected"):
            refuse_written_lists(row.get(name), f"{path}, row {number}, column {name!r}")
    return rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows that `write_jsonl` wrote."""
    # Not splitlines(): a JSON string may hold U+2028 and the like as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a line; the file is complete or not there."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _normalized(content: Content) -> str:
    """Equal for prompts that a model is asked in the same words."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    words = [[message["role"], " ".join(message["content"].split())] for message in messages]
    return json.dumps(words)


def _flat(groups: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    return [prompt for group in groups for prompt in group]
