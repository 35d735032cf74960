"""What the stages of a run share."""

from __future__ import annotations

import pytest

from plad_fast.recipe.run import named_run
from plad_fast.recipe.settings import DistillConfig


@pytest.mark.parametrize(
    ("training", "named"),
    [
        (None, {}),
        # Nothing is logged.
        ({"run_name": "mine"}, {"run_name": "mine"}),
        ({"report_to": "none"}, {"report_to": "none"}),
        (
            {"report_to": "wandb", "run_name": "mine"},
            {"report_to": "wandb", "run_name": "mine-sft"},
        ),
        ({"report_to": ["trackio"]}, {"report_to": ["trackio"], "run_name": "calendar-sft"}),
    ],
)
def test_what_a_stage_logs_has_a_name_of_its_own(training, named):
    """By the run's own, or that of its folder."""
    config = DistillConfig(output_dir="runs/calendar", training=training)
    assert named_run(config, "sft") == named
    assert config.training == training
