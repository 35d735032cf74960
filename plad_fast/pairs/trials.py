"""A word with endpoints before long work, so that what they refuse is found out at once."""

from __future__ import annotations

import itertools
from pathlib import Path

from plad_fast.pairs.endpoint_model import EndpointModel
from plad_fast.pairs.judge import Judge
from plad_fast.pairs.sampling import Sampling
from plad_fast.pairs.sharding import joined


def try_endpoints(
    *,
    teacher: object = None,
    sampling: Sampling | None = None,
    answers: Path | None = None,
    judge: object = None,
    overwrite: bool = False,
) -> None:
    """Asks teacher and judge one thing each, where they are behind endpoints.

    Whoever has answered before is not asked: it worked, and may have nothing left to do. In
    a run of several processes all are to call this, and the first one asks.

    Args:
        teacher: with an `EndpointModel` come `sampling` and the store of `answers`.
        judge: any scorer.
        overwrite: the teacher's store is about to be discarded.

    Raises:
        UsageError: as `EndpointModel.try_out` and `Judge.try_out`.
    """
    if not isinstance(teacher, EndpointModel) and not isinstance(judge, Judge):
        return

    def ask() -> None:
        if isinstance(teacher, EndpointModel):
            assert sampling is not None
            assert answers is not None
            if overwrite or not _has_rows(answers.expanduser()):
                teacher.try_out(sampling)
        if isinstance(judge, Judge):
            judge.try_out()

    with joined() as ranks:
        ranks.from_first(ask)


def _has_rows(store: Path) -> bool:
    """Whether there is anything after the header."""
    if not store.exists():
        return False
    with store.open("rb") as file:
        return sum(1 for _ in itertools.islice(file, 2)) == 2
