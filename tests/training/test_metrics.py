"""Means over groups and tokens; a metric to choose the best model by is one of an evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import TrainerCallback

from plad_fast.errors import UsageError
from plad_fast.training.metrics import PreferenceMeter
from tests.support.trainings import PAIRS, RANKED

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


def test_rewards_are_a_best_metric_of_losses_on_a_reference(make):
    """Without a beta they are gains in nats, and with several rejected responses means."""
    options = {**BEST, "metric_for_best_model": "rewards/accuracies"}
    options |= {"load_best_model_at_end": True, "max_steps": 2}
    trainer = make(
        RANKED, eval_rows=RANKED, loss="mixture", loss_args={"parts": {"dpo": {}}}, **options
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == max(log["eval_rewards/accuracies"] for log in logs)
    last = logs[-1]
    gain = last["eval_rewards/chosen"] - last["eval_rewards/rejected"]
    assert last["eval_rewards/margins"] == pytest.approx(gain, 1e-4)
    before = make(RANKED, eval_rows=RANKED, loss="plad_ranking").evaluate()
    gained = last["eval_logps/chosen"] - before["eval_logps/chosen"]
    assert last["eval_rewards/chosen"] == pytest.approx(gained, 1e-4)


def test_callbacks_may_bring_the_best_metric(make):
    class Own(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_own"] = state.global_step

    options = {**BEST, "metric_for_best_model": "own", "load_best_model_at_end": True}
    trainer = make(eval_rows=PAIRS, callbacks=[Own()], max_steps=2, **options)
    trainer.train()
    assert trainer.state.best_metric == 2


def test_nll_is_that_of_tokens_and_time_left_out_is_none():
    """One pair of 3 and 4 tokens, its log-probabilities divided by these numbers."""
    spec = SimpleNamespace(is_likelihood=False)
    objective = SimpleNamespace(
        group_size=2, length_normalization=1.0, sft_weight=0.5, spec=spec, needs_reference=False
    )
    out = SimpleNamespace(
        sums=torch.tensor([-1.0, -2.0]),
        counts=torch.tensor([3, 4]),
        group_losses=torch.tensor([0.25]),
        active=torch.tensor([True]),
    )
    with mock.patch("plad_fast.training.metrics.time.perf_counter", side_effect=[0.0, 10.0]):
        meter = PreferenceMeter(objective)
        meter.start()
        meter.skip(8.0)
        meter.add(meter.rows(out, torch.tensor([[7, 10]])))
        found = meter.summary()
    assert found == {
        "loss": 0.75, "nll": 1.0, "logps/chosen": -1.0, "logps/rejected": -2.0, "margin": 1.0,
        "ranking_accuracy": 1.0, "active_pairs": 1.0, "saved_tokens": 0.3, "tokens_per_second": 3.5,
    }  # fmt: skip
