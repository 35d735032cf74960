"""Outputs of students on held-out data, and the protocols of what rates them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from plad_fast.errors import UsageError
from plad_fast.evaluation.metrics import FloatArray, vector

if TYPE_CHECKING:
    from plad_fast.data.prompts import Prompt


class Scorer(Protocol):
    """The part of `pairs.scoring.Scorer` that evaluation calls."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> Sequence[float]:
        """A number for each text, larger is better; NaN for one that could not be rated.

        All systems' answers come in one call, so a text may also be rated by those it competes
        with."""
        ...


class Judge(Protocol):
    """Compares texts two by two, such as `pairs.judge.Judge`."""

    name: str

    def compare(self, items: Sequence[tuple[Prompt, str, str]]) -> Sequence[float]:
        """1 where the first text is better, 0 where the second is, 0.5 for a tie; NaN where the
        judge gave no verdict. Whether the order of the texts matters is up to the judge to find
        out: each couple is asked once."""
        ...


@dataclass(frozen=True, eq=False)
class StudentOutputs:
    """Answers and log-probabilities of one student on the held-out data; arrays become float64.

    P is the number of held-out pairs. A student without pairs has no ranking metrics, one without
    answers no text metrics.

    Raises:
        UsageError: an array whose length is not that of `pair_ids`.
    """

    name: str
    answers: Mapping[str, str]
    """Prompt id -> the student's answer."""
    chosen_logps: FloatArray = field(default_factory=lambda: np.empty(0))
    """(P,) log-probability of the teacher's answer, in nats, normalised as in training."""
    rejected_logps: FloatArray = field(default_factory=lambda: np.empty(0))
    """(P,) log-probability of the pair's rejected answer, its end token included."""
    pair_ids: Sequence[str] = ()
    """(P,) the pair that each log-probability belongs to."""
    own_rejected_logps: FloatArray | None = None
    """(P,) log-probability of this student's own present answer; NaN where it gave none to score,
    for a cut-off one, say. Those pairs are left out of `own_ranking_accuracy`."""
    pair_prompts: Sequence[str] = ()
    """(P,) the prompt of each pair: pairs of one prompt are no independent evidence, and intervals
    are drawn by prompt. Left out, every pair has a prompt of its own."""
    cut_off: Collection[str] = ()
    """Ids of the prompts whose answer was cut off, by the length limit for example."""

    def __post_init__(self) -> None:
        count = len(self.pair_ids)
        for name in ("chosen_logps", "rejected_logps", "own_rejected_logps"):
            if (values := getattr(self, name)) is not None:
                where = f"{name} of {self.name}"
                object.__setattr__(self, name, vector(values, where, count, may_lack=True))
        prompts = self.pair_prompts or list(map(str, range(count)))
        if len(prompts) != count:
            raise UsageError(
                f"pair_prompts of {self.name} has {len(prompts)} entries, but there are {count} "
                "pair_ids; give the prompt of each pair"
            )
        object.__setattr__(self, "pair_prompts", prompts)


def check_students(students: Sequence[StudentOutputs], teacher_answers: Mapping[str, str]) -> None:
    """Raises UsageError for students that cannot be compared on these prompts."""
    if not teacher_answers:
        raise UsageError("teacher_answers is empty; generate the teacher's held-out answers first")
    require_names([student.name for student in students])
    pairs = None
    for student in students:
        missing = [key for key in teacher_answers if key not in student.answers]
        if student.answers and missing:
            raise UsageError(
                f"{student.name} has no answer to {len(missing)} of {len(teacher_answers)} "
                f"prompts, the first is {missing[0]}; generate the missing answers, or leave those "
                "prompts out of teacher_answers"
            )
        if len(student.pair_ids):
            these = [*student.pair_ids, *student.pair_prompts]
            if pairs is not None and these != pairs:
                raise UsageError(
                    f"{student.name} was scored on other pairs than the students before it; score "
                    "every student on the same pairs, in the same order"
                )
            pairs = these


def require_names(names: Sequence[str]) -> None:
    """Raises UsageError where there is no student, or two have one name."""
    if not names:
        raise UsageError("there is no student to evaluate; pass at least one")
    if len(set(names)) < len(names):
        raise UsageError(f"students need different names, not {names}")


def couples(count: int) -> list[tuple[int, int]]:
    """Every two of so many students, candidate and baseline, last against first before all."""
    return [(j, i) for j in range(count - 1, 0, -1) for i in range(j)]
