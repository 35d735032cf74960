"""Who rates held-out answers, beside ROUGE, which always does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plad_fast.recipe import DistillConfig

_JUDGE = "judge:"


def held_out_scoring(config: DistillConfig, folder: Path) -> dict[str, Any]:
    """The options of `held_out.evaluate_models` that the settings ask for.

    The scorer that pairs were chosen by stands beside the one that they were not. A judge compares
    students' answers with each other; any other scorer rates every answer by itself.

    Args:
        config: of the run.
        folder: of the evaluation; the judge's verdicts are kept there.

    Raises:
        UsageError: a scorer that cannot be made.
    """
    names = dict.fromkeys(name for name in (config.scorer, config.eval_scorer) if name)
    scorers = {}
    judge = None
    for name in names:
        scorer = config.open_scorer(name, verdicts=folder / "judge.jsonl")
        if name.startswith(_JUDGE):
            judge = scorer
        else:
            scorers[name] = scorer
    return {
        "scorers": scorers,
        "judge": judge,
        "calibration_samples": config.calibration_samples,
        "calibration_scorer": scorers.get(config.eval_scorer or config.scorer or ""),
    }
