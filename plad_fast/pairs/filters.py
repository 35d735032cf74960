"""Which pairs of answers teach nothing, or the wrong thing."""

from __future__ import annotations

from typing import Literal

from plad_fast.pairs.teachers import Answer

DropReason = Literal["missing", "empty", "truncated", "identical"]


def drop_reason(teacher: Answer | None, student: Answer | None) -> DropReason | None:
    """Why two answers to a prompt make no pair, or None if they make one.

    * `missing`: one of them is not there;
    * `empty`: one of them is blank;
    * `truncated`: one of them was cut off, so its end says nothing about its author;
    * `identical`: they are equal up to white space.

    The first reason that applies is given, in this order.
    """
    if teacher is None or student is None:
        return "missing"
    texts = normalize_whitespace(teacher.text), normalize_whitespace(student.text)
    if not all(texts):
        return "empty"
    if "length" in (teacher.finish_reason, student.finish_reason):
        return "truncated"
    if texts[0] == texts[1]:
        return "identical"
    return None


def normalize_whitespace(text: str) -> str:
    """Every run of white space as one space, none at the ends."""
    return " ".join(text.split())
