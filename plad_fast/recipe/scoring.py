"""Scorers of the held-out answers, beside ROUGE, which always rates them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.errors import UsageError
from plad_fast.evaluation.run_students import scorer_file
from plad_fast.pairs.scoring.judge import Judge
from plad_fast.recipe.settings import DistillConfig

if TYPE_CHECKING:
    from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
    from plad_fast.pairs.scoring.scorers import Scorer

JUDGE_STORE = "judge.jsonl"
"""In the folder of an evaluation: what the judge said."""

_JUDGE = "judge:"


def held_out_scoring(
    config: DistillConfig, folder: Path, judges: dict[str, Endpoint] | None = None
) -> dict[str, Any]:
    """The options of `evaluate_models` that the settings ask for.

    The scorer that pairs were chosen by stands beside the one that they were not. A judge compares
    students' answers with each other; any other scorer rates every answer by itself.

    Args:
        config: of the run.
        folder: of the evaluation; the judge's verdicts are kept there.
        judges: see `PairSettings.open_scorer`.

    Raises:
        UsageError: a scorer that cannot be made, two judges, or two scorers of one name.
    """
    specs = dict.fromkeys(spec for spec in (config.scorer, config.eval_scorer) if spec)
    if len(specs) > 1 and all(spec.startswith(_JUDGE) for spec in specs):
        raise UsageError(
            f"--scorer and --eval-scorer are two judges, {' and '.join(specs)}, and only one can "
            "say who wins; name another kind of scorer as one of them"
        )
    scorers: dict[str, Scorer] = {}
    judge = None
    for spec in specs:
        scorer = config.open_scorer(spec, verdicts=folder / JUDGE_STORE, judges=judges)
        assert scorer is not None
        if isinstance(scorer, Judge):
            judge = scorer
        else:
            scorers[spec] = scorer
    if len({scorer_file(scorer.name, folder) for scorer in scorers.values()}) < len(scorers):
        raise UsageError(
            f"--scorer and --eval-scorer are models of one name, {' and '.join(scorers)}, after "
            "which their files are named; rename a folder"
        )
    return {
        "scorers": scorers,
        "judge": judge,
        "calibration_samples": config.calibration_samples,
        "calibration_scorer": scorers.get(config.eval_scorer or config.scorer or ""),
    }
