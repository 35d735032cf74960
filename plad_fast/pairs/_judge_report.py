"""What became of a judge's comparisons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class JudgeReport:
    """What became of the comparisons so far. `str()` gives one line."""

    comparisons: int = 0
    ties: int = 0
    """Comparisons without a winner, for whatever reason."""
    order_dependent: int = 0
    """Those whose verdict changed with the order of the answers; they count as ties."""
    unparsable: int = 0
    """Those with a reply that held no verdict, also when asked again; they count as ties."""
    failed: int = 0
    """Those with a reply that could not be had, was cut off or was withheld."""

    def __str__(self) -> str:
        notes = [
            f"{count} {what}"
            for count, what in (
                (self.order_dependent, "changed with the order"),
                (self.unparsable, "without a verdict"),
                (self.failed, "failed"),
            )
            if count
        ]
        line = f"{self.comparisons} comparisons, {self.ties} ties"
        return f"{line} ({', '.join(notes)})" if notes else line
