"""What became of the prompts, or of the pairs that they could have given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plad_fast.errors import UsageError

_ADVICE = {
    "missing": "let both models answer the same prompts",
    "empty": "check that the prompts fit the models' chat template",
    "truncated": "raise max_new_tokens",
    "identical": "give the student another seed or a higher temperature, or take a smaller student",
    "unscored": "score all answers that are neither blank nor cut off",
    "contradicted": "take a better teacher or another scorer, or keep such pairs",
    "close": "lower min_gap, or take more samples and the best and worst of them",
    "uneven": "raise max_length_ratio",
    "repetitive": "raise max_repetition, or sample the teacher at another temperature",
    "similar": "raise max_overlap, or sample the student at a higher temperature",
    "few": "lower list_size, or take more samples",
}
_STEPS = {
    "answered": ("missing", "empty"),
    "finished": ("truncated",),
    "paired": ("identical", "few", "unscored"),
    "kept": ("contradicted", "close", "uneven", "repetitive", "similar"),
}


class NoPairsError(UsageError):
    """No row is left; `report` says why."""

    def __init__(self, report: PairReport) -> None:
        super().__init__(f"no pair is left: {report}; {_advice(report)}")
        self.report = report


@dataclass(frozen=True)
class PairReport:
    """How many prompts gave a row, and why the others did not. `str()` gives one line.

    Where a prompt may give several pairs, each of them counts.
    """

    total: int
    identical: int = 0
    empty: int = 0
    truncated: int = 0
    missing: int = 0
    unscored: int = 0
    contradicted: int = 0
    close: int = 0
    uneven: int = 0
    repetitive: int = 0
    similar: int = 0
    few: int = 0
    unit: str = "prompts"
    drops: Sequence[Mapping[str, Any]] = field(default=(), repr=False, compare=False)
    """What was dropped, a record each: `id`, `prompt`, the answers of `teacher` and `student` (a
    text, null where there is none, or a list of several), `reason`, and `of`, whose answer it was
    that was missing, empty or truncated."""

    @classmethod
    def of_rows(
        cls, kept: int, drops: Sequence[Mapping[str, Any]], *, unit: str = "prompts"
    ) -> PairReport:
        """The report of so many rows and of the records of what was dropped.

        Reasons that this version does not know are left out.
        """
        counts = Counter(str(drop.get("reason")) for drop in drops)
        known = {name: n for name, n in counts.items() if name in cls(0).dropped}
        return cls(kept + sum(known.values()), **known, unit=unit, drops=drops)

    @property
    def kept(self) -> int:
        """Prompts with a row, or pairs."""
        return self.total - sum(self.dropped.values())

    @property
    def dropped(self) -> dict[str, int]:
        """Prompts without a row, or pairs that are none, by reason.

        The reasons are those of `filters.drop_reason` and `PairFilters.reason`, and `unscored` (an
        answer has no score) and `few` (too few different answers for a list).
        """
        counts = dict(vars(self))
        del counts["total"], counts["unit"], counts["drops"]
        return counts

    def funnel(self) -> list[tuple[str, int, dict[str, int]]]:
        """(Step, what is left of `total` after it, what it dropped by reason), from first to last.

        Answered by both, finished by both, different enough for a pair or list, kept by the
        filters.
        """
        left = self.total
        steps: list[tuple[str, int, dict[str, int]]] = [(self.unit, left, {})]
        dropped = self.dropped
        for step, reasons in _STEPS.items():
            lost = {reason: dropped[reason] for reason in reasons if dropped[reason]}
            left -= sum(lost.values())
            steps.append((step, left, lost))
        return steps

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items() if n)
        return f"kept {self.kept} of {self.total} {self.unit}" + (f": {reasons}" if reasons else "")


def _advice(report: PairReport) -> str:
    if not report.total:
        return "give at least one prompt"
    reason, _ = max(report.dropped.items(), key=lambda item: item[1])
    return _ADVICE[reason]
