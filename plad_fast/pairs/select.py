"""Selection of a prompt's answers for a pair, or a ranked list, and filters of what was selected.

Whatever scores cannot decide, the order of the answers does: the teacher's come first, as the
better ones, and of one model's answers the one with the lower sample number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from plad_fast.data.chat import is_blank
from plad_fast.errors import UsageError
from plad_fast.pairs import text_metrics
from plad_fast.pairs.generation.text_model import Answer

SELECTIONS = {
    "teacher": "teacher > student",  # the teacher's first answer, the student's first sample
    "all": "teacher > student",  # the teacher's first answer, every sample: a pair each
    "best-worst": "best of teacher > worst of student",
    "best-worst-pooled": "best > worst",  # of both models' answers
    "best-worst-student": "best of student > worst of student",
    "ranked": "ranked",  # a list of both models' answers
}
"""What can be selected, and what a row says was preferred to what."""

NEED_SCORES = SELECTIONS.keys() - {"teacher", "all"}

Scores: TypeAlias = Mapping[tuple[str, str], float]
"""(Prompt id, text of the answer) -> score; larger is better. NaN is as good as missing."""


class Candidate(NamedTuple):
    """An answer and what it is worth; NaN where it has no score."""

    answer: Answer
    score: float


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

    def reason(self, chosen: str, rejected: str, gap: float = math.nan) -> str | None:
        """Why to drop a pair, or None; the first that applies, in the order of the fields.

        They are `contradicted`, `close` (the scores), `uneven` (the lengths), `repetitive` (the
        chosen answer) and `similar` (the answers).

        Args:
            chosen, rejected: the texts.
            gap: how much higher the chosen one scores; NaN only if not `needs_scores`.
        """
        if self.contradicted and gap < 0:
            return "contradicted"
        if self.min_gap is not None and gap < self.min_gap:
            return "close"
        words = text_metrics.words(chosen), text_metrics.words(rejected)
        if self.max_length_ratio is not None:
            shorter, longer = sorted(map(len, words))
            if longer > self.max_length_ratio * shorter:
                return "uneven"
        most = self.max_repetition
        if most is not None and text_metrics.repetition_shares([chosen])[0] > most:
            return "repetitive"
        if self.max_overlap is not None:
            common = (Counter(words[0]) & Counter(words[1])).total()
            total = len(words[0]) + len(words[1])
            if (2 * common / total if total else 1.0) > self.max_overlap:
                return "similar"
        return None


KEEP_ALL = PairFilters()


def drop_reason(teacher: Answer, student: Answer) -> str | None:
    """Why two answers to a prompt make no pair, or None if they make one.

    The first reason that applies: one is blank (`empty`) or was cut off, so that its end says
    nothing about its author (`truncated`), or both are equal up to white space (`identical`).
    """
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


def pairs_of(
    teacher: Sequence[Answer],
    student: Sequence[Answer],
    scores: Scores | None,
    select: str,
    filters: PairFilters,
) -> list[list[Candidate] | str]:
    """The pairs of a prompt, the better one first, or in their place why they are none.

    Answers come by sample number, `select` is any but "ranked", and the filters are applied to what
    was selected: nothing is selected instead.
    """
    first, rival = next(iter(teacher), None), next(iter(student), None)
    if select == "all" and student:
        return [_pair(first, other, scores, filters) for other in student]
    if select.startswith("best-worst"):
        both = [*teacher, *student]
        pools = {"best-worst-pooled": (both, both), "best-worst-student": (student, student)}
        best, worst = (_rank(a, scores) for a in pools.get(select, (teacher, student)))
        if any(math.isnan(candidate.score) for candidate in [*best, *worst]):
            return ["unscored"]
        # Where no answer is usable an unusable one takes its place, to say why there is no pair.
        first = best[0].answer if best else first
        rival = worst[-1].answer if worst else rival
    return [_pair(first, rival, scores, filters)]


class RankedAnswers(NamedTuple):
    """Different answers to a prompt by falling score, and why there are not more."""

    candidates: list[Candidate]
    reason: str

    def of_size(self, size: int) -> list[Candidate] | str:
        """The best, the worst, and evenly spaced ones between, or why there are not so many."""
        kept = self.candidates
        if len(kept) < size:
            return self.reason
        return [kept[round(i * (len(kept) - 1) / (size - 1))] for i in range(size)]


def rank_answers(
    teacher: Sequence[Answer], student: Sequence[Answer], scores: Scores, filters: PairFilters
) -> RankedAnswers:
    """All answers to a prompt that may stand in a list.

    An answer that may not stand as the rejected one of a pair with its predecessor in the list is
    left out. Equal scores therefore stay, in the order of the module, unless the filters ask for a
    gap.
    """
    answers = [*teacher, *student]
    if not answers:
        return RankedAnswers([], "missing")
    ranked = _rank(answers, scores)
    if any(math.isnan(candidate.score) for candidate in ranked):
        return RankedAnswers([], "unscored")
    kept: list[Candidate] = []
    reason = "few"
    for candidate in ranked:
        if kept and (why := _reason(kept[-1], candidate, filters)):
            reason = why
        else:
            kept.append(candidate)
    return RankedAnswers(kept, reason)


def common_list_size(lists: Sequence[RankedAnswers]) -> int:
    """The size at which lists of one size, as a training needs them, hold the most answers.

    One repeated answer does not cost its prompt, as the largest size would have it, nor does one
    prompt of few answers shorten all lists. Of sizes that hold as many the larger one.
    """
    lengths = [len(ranked.candidates) for ranked in lists]
    sizes = range(2, max(lengths, default=2) + 1)
    return max(sizes, key=lambda size: (size * sum(n >= size for n in lengths), size), default=2)


def _rank(answers: Sequence[Answer], scores: Scores | None) -> list[Candidate]:
    """The usable and different ones, best first; those without a score behind them."""
    different: dict[str, Answer] = {}
    for answer in answers:
        if is_usable(answer):
            different.setdefault(normalize_whitespace(answer.text), answer)
    candidates = [_candidate(answer, scores) for answer in different.values()]
    return sorted(candidates, key=lambda c: math.inf if math.isnan(c.score) else -c.score)


def _pair(
    teacher: Answer | None, student: Answer | None, scores: Scores | None, filters: PairFilters
) -> list[Candidate] | str:
    if teacher is None or student is None:
        return "missing"
    if reason := drop_reason(teacher, student):
        return reason
    chosen, rejected = _candidate(teacher, scores), _candidate(student, scores)
    if scores is not None and math.isnan(chosen.score - rejected.score):
        return "unscored"
    return _reason(chosen, rejected, filters) or [chosen, rejected]


def _reason(chosen: Candidate, rejected: Candidate, filters: PairFilters) -> str | None:
    gap = chosen.score - rejected.score
    return filters.reason(chosen.answer.text, rejected.answer.text, gap)


def _candidate(answer: Answer, scores: Scores | None) -> Candidate:
    return Candidate(answer, (scores or {}).get((answer.prompt_id, answer.text), math.nan))
