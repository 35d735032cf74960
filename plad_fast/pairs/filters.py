"""Filters of pairs that teach nothing, or the wrong thing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from plad_fast.data.chat import is_blank
from plad_fast.errors import UsageError
from plad_fast.pairs import text_metrics
from plad_fast.pairs.generation.text_model import Answer


@dataclass(frozen=True)
class PairFilters:
    """Which pairs to leave out, beyond those that are none; nothing by default.

    Words and n-grams are those of `plad_fast.pairs.text_metrics`. Raises UsageError for values
    out of range.
    """

    contradicted: bool = False
    """Drop a pair whose rejected answer scores higher than the chosen one."""

    min_gap: float | None = None
    """Drop a pair whose chosen answer does not score at least so much higher."""

    max_length_ratio: float | None = None
    """Drop a pair one of whose answers has more than so many times the words of the other."""

    max_repetition: float | None = None
    """Drop a pair with more than this share of repeated 4-grams in its chosen answer. The rejected
    one may be caught in a loop, which is a fault that the student should unlearn."""

    max_overlap: float | None = None
    """Drop a pair whose answers have more than this share of their words in common (F-measure,
    regardless of order)."""

    def __post_init__(self) -> None:
        ranges = {
            "min_gap": (0, math.inf),
            "max_length_ratio": (1, math.inf),
            "max_repetition": (0, 1),
            "max_overlap": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and low <= value <= high
            if value is not None and not fits:
                raise UsageError(f"{name} must be from {low} to {high}, not {value!r}")

    @property
    def needs_scores(self) -> bool:
        """Whether there is nothing to say of a pair without scores."""
        return self.contradicted or self.min_gap is not None

    def reason(self, chosen: str, rejected: str, gap: float | None = None) -> str | None:
        """Why to drop a pair, or None; the first that applies, in the order of the fields.

        They are `contradicted`, `close` (the scores), `uneven` (the lengths), `repetitive` (the
        chosen answer) and `similar` (the answers).

        Args:
            chosen, rejected: the texts.
            gap: how much higher the chosen one scores; None only if not `needs_scores`.
        """
        if self.needs_scores:
            assert gap is not None
            if self.contradicted and gap < 0:
                return "contradicted"
            if self.min_gap is not None and gap < self.min_gap:
                return "close"
        words = text_metrics.words(chosen), text_metrics.words(rejected)
        if self.max_length_ratio is not None:
            shorter, longer = sorted(map(len, words))
            if longer > self.max_length_ratio * shorter:
                return "uneven"
        repeated = text_metrics.repetition_shares([chosen])[0]
        if self.max_repetition is not None and repeated > self.max_repetition:
            return "repetitive"
        if self.max_overlap is not None:
            common = (Counter(words[0]) & Counter(words[1])).total()
            total = len(words[0]) + len(words[1])
            if (2 * common / total if total else 1.0) > self.max_overlap:
                return "similar"
        return None


KEEP_ALL = PairFilters()


def drop_reason(teacher: Answer | None, student: Answer | None) -> str | None:
    """Why two answers to a prompt make no pair, or None if they make one.

    The first reason that applies: one is not there (`missing`), is blank (`empty`) or was cut off,
    so that its end says nothing about its author (`truncated`), or both are equal up to white space
    (`identical`).
    """
    if teacher is None or student is None:
        return "missing"
    if is_blank(teacher.text) or is_blank(student.text):
        return "empty"
    if "length" in (teacher.finish_reason, student.finish_reason):
        return "truncated"
    if normalize_whitespace(teacher.text) == normalize_whitespace(student.text):
        return "identical"
    return None


def is_usable(answer: Answer) -> bool:
    """Whether an answer can stand in a pair: it is neither blank nor cut off."""
    return not is_blank(answer.text) and answer.finish_reason != "length"


def normalize_whitespace(text: str) -> str:
    """Every run of white space as one space, none at the ends."""
    return " ".join(text.split())
