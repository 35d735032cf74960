"""Held-out prompts, answers and pairs, and their reading from the rows of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plad_fast.data.chat import Message, as_conversation, is_blank, written_calls
from plad_fast.data.plain_rows import made_by_arrow, without_nulls
from plad_fast.data.prompts import Prompt, read_reference
from plad_fast.data.rows import read_row, read_tools
from plad_fast.data.unicode import mend
from plad_fast.errors import UsageError, located
from plad_fast.pairs.generation.reasoning import spoken


@dataclass(frozen=True)
class HeldOut:
    """Prompts, the teacher's answers and pairs that students are measured on."""

    prompts: Sequence[Prompt]
    """With a teacher's answer each."""
    teacher_answers: Mapping[str, str]
    """Prompt id -> the teacher's answer."""
    pairs: Sequence[Mapping[str, Any]]
    """Rows of the preference format over some of the prompts: what is ranked."""
    pair_prompts: Sequence[str]
    """The prompt's id of each pair."""


def read_held_out(
    rows: Sequence[Mapping[str, Any]], source: str, *, reasoning: str = "keep"
) -> HeldOut:
    """Prompts, answers and pairs in the rows of a file in the standard preference format, in any of
    the forms that `tokenize_dataset` lists.

    Rows with the same prompt are pairs of one prompt, which has the id of the first of them; so are
    those that a row with several rejected responses stands for, or a list: its best response
    against each of the others. The teacher's answer to a prompt is the first chosen response, with
    its reasoning as `pairs.generation.reasoning.REASONING` has it.

    Raises UsageError with the number of a row that is no pair, or whose reference is no text, or
    that shares its id with one of another prompt.
    """
    prompts: dict[str, Prompt] = {}  # by id, in the order of their first rows
    answers: dict[str, str] = {}
    ids: dict[str, str] = {}  # digest of a prompt -> its id
    first_rows: dict[str, int] = {}
    pairs: list[dict[str, Any]] = []
    pair_prompts: list[str] = []
    from_arrow = made_by_arrow(rows)
    for number, row in enumerate(rows, start=1):
        with located(f"{source}, row {number}"):
            prompt, responses, template = read_row(without_nulls(row) if from_arrow else row)
            reference = read_reference(row.get("reference"), "reference")
            if len(responses) < 2:
                raise UsageError("there is no rejected response, and evaluation ranks pairs")
            # In the form in which its answers are scored: students answer that very one.
            prompt, answered = as_conversation(prompt, responses)
            best = answered[0] if isinstance(answered[0], str) else _said(answered[0])
            best = spoken(best, reasoning)
            if is_blank(best):
                raise UsageError("the best response has no text to compare; leave the row out")
        tools = tuple(read_tools(row, f"{source}, row {number}") if template else ())
        row_id = mend(str(number - 1 if row.get("id") is None else row["id"]))
        prompt_id = ids.setdefault(Prompt("", prompt, tools=tools).digest, row_id)
        first_row = first_rows.setdefault(prompt_id, number)
        known = prompts.get(prompt_id)
        if known is not None and (known.content, known.tools) != (prompt, tools):
            raise UsageError(
                f"{source}, rows {first_row} and {number} have the id {row_id!r} and different "
                "prompts; give every prompt an id of its own, or none"
            )
        if known is None or known.reference is None:
            prompts[prompt_id] = Prompt(prompt_id, prompt, reference, tools)
        answers.setdefault(prompt_id, best.strip())
        for place, rejected in enumerate(responses[1:]):
            pair = {**row, "prompt": prompt, "chosen": responses[0], "rejected": rejected}
            pair.pop("responses", None)
            pairs.append({**pair, "id": f"{row_id}\t{place}" if place else row_id})
            pair_prompts.append(prompt_id)
    return HeldOut([*prompts.values()], answers, pairs, pair_prompts)


def _said(message: Message) -> str:
    """What a message says, and the calls that it makes."""
    calls = written_calls(message.get("tool_calls") or ())
    return "\n".join(filter(None, (message.get("content"), calls)))
