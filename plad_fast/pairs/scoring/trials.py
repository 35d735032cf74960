"""Trial requests to endpoints before long work, so that what they refuse is found out at once."""

from __future__ import annotations

from pathlib import Path

from plad_fast.data.store import has_rows
from plad_fast.pairs.generation.endpoint.model import EndpointModel
from plad_fast.pairs.generation.ranks import joined
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.scoring.judge import Judge


def try_endpoints(
    *,
    teacher: object = None,
    sampling: Sampling | None = None,
    answers: Path | None = None,
    judge: object = None,
    overwrite: bool = False,
) -> None:
    """Makes one request each to teacher and judge, where they are behind endpoints.

    An endpoint that has answered before is not asked again. In a run of several processes all are
    to call this, and the first one asks.

    Args:
        teacher: with an `EndpointModel` come `sampling` and the store of `answers`.
        judge: any scorer.
        overwrite: the stores are about to be discarded.

    Raises:
        UsageError: as `EndpointModel.try_out` and `Judge.try_out`.
    """
    if not isinstance(teacher, EndpointModel) and not isinstance(judge, Judge):
        return

    def ask() -> None:
        if isinstance(teacher, EndpointModel):
            assert sampling is not None
            assert answers is not None
            teacher.has_answered = has_rows(answers) and not overwrite
            if not teacher.has_answered:
                teacher.try_out(sampling)
        if isinstance(judge, Judge):
            judge.try_out(overwrite=overwrite)

    with joined() as ranks:
        ranks.from_first(ask)
