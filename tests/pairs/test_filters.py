"""Pairs of answers that are none."""

from __future__ import annotations

import pytest

from plad_fast.pairs.filters import drop_reason
from plad_fast.pairs.generation.text_model import Answer


def answer(prompt_id, text, finish_reason="stop"):
    return Answer(prompt_id, text, finish_reason, 3)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (answer("p", "a"), answer("p", "b"), None),
        (answer("p", "a"), answer("p", "A"), None),
        (answer("p", "a  b\n"), answer("p", " a b"), "identical"),
        (answer("p", " \n"), answer("p", "b"), "empty"),
        (answer("p", "a"), answer("p", "\u200b \ufeff\u2060"), "empty"),  # nothing to be seen
        (answer("p", "a"), answer("p", "", "length"), "empty"),
        (answer("p", "a", "length"), answer("p", "b"), "truncated"),
        (answer("p", "a"), answer("p", "b", "length"), "truncated"),
        (answer("p", "a"), None, "missing"),
        (None, answer("p", "b"), "missing"),
    ],
)
def test_drop_reason(teacher, student, expected):
    assert drop_reason(teacher, student) == expected
