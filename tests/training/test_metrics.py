"""A metric to choose the best model by is one that an evaluation has."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from plad_fast.errors import UsageError
from tests.support.trainings import PAIRS

BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("wanted", "several", "known"),
    [
        ("eval_margin", False, True),
        ("nll", False, True),
        ("loss", False, True),
        ("rewards/accuracies", False, False),
        ("b_margin", True, True),
        ("loss", True, False),
        (None, True, False),  # with load_best_model_at_end it is the loss
    ],
)
def test_a_best_metric_that_no_evaluation_has_is_refused_at_once(make, wanted, several, known):
    rows = {"a": PAIRS, "b": PAIRS[:2]} if several else PAIRS
    options = {**BEST, "metric_for_best_model": wanted, "load_best_model_at_end": True}
    if not known:
        with pytest.raises(UsageError, match=r"metric_for_best_model is .*: .*margin"):
            make(eval_rows=rows, **options)
        return
    found = make(eval_rows=rows, **options).evaluate()
    assert f"eval_{wanted.removeprefix('eval_')}" in found


def test_callbacks_may_bring_the_best_metric(make):
    class Own(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_own"] = state.global_step

    options = {**BEST, "metric_for_best_model": "own", "load_best_model_at_end": True}
    trainer = make(eval_rows=PAIRS, callbacks=[Own()], max_steps=2, **options)
    trainer.train()
    assert trainer.state.best_metric == 2
