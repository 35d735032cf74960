"""Plots: small PNG files, also of a single example, and none where there is nothing to draw."""

from __future__ import annotations

import pytest

from plad_fast.evaluation.calibration import ScoredSamples
from plad_fast.evaluation.report import plots
from plad_fast.evaluation.students import StudentOutputs
from tests.support.evaluations import PLAD, SFT, calibration, evaluate, samples, student

HISTORY = [{"step": s, "loss": 2.0 / s, "active_pairs": 1.0 / s, "epoch": 1.0} for s in (1, 2, 3)]
LONG = [{"step": s, "loss": 2.0 + (-1) ** s} for s in range(1, 101)]


def test_plots_are_small_png_files(tmp_path):
    stages = {"SFT": [*HISTORY, {"step": 3, "eval_loss": 1.0}], "Calibration": LONG}
    both = calibration(samples("SFT student", -1), samples("PLaD student", 1))
    folder = tmp_path / "new"
    for path in (
        plots.plot_training(stages, folder / "training.png"),
        plots.plot_margins([SFT, PLAD], folder / "margins.png"),
        plots.plot_comparison(evaluate(SFT, PLAD), folder / "comparison.png"),
        plots.plot_reliability(both, folder / "reliability.png"),
    ):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 2_000 < len(data) < 100_000


def test_long_curves_are_smoothed_without_shifting_them():
    assert plots._smoothed([float(i) for i in range(100)]) == pytest.approx(list(range(100)))
    noisy = plots._smoothed([entry["loss"] for entry in LONG])
    assert noisy[0] == 1.0
    assert noisy[50] == pytest.approx(2.0, abs=0.1)


def test_plots_of_one_example_and_of_ties(tmp_path):
    """No spread, no width: the axes still need one."""
    single = student("only", lead=1.0, kept=3, n=1)
    tied = StudentOutputs("tied", {}, [-1.0, -1.0], [-1.0, -1.0], ["a", "b"])
    for index, students in enumerate(([single], [tied])):
        assert plots.plot_margins(students, tmp_path / f"{index}.png").exists()
    assert plots.plot_comparison(evaluate(single), tmp_path / "comparison.png").exists()
    tie = ScoredSamples("one", ["a"], [[-1.0, -1.0]], [[0.5, 0.5]])
    assert plots.plot_reliability(calibration(tie), tmp_path / "reliability.png").exists()


def test_nothing_to_plot(tmp_path):
    texts_only = StudentOutputs("SFT", {"p": "a"})
    alone = calibration(ScoredSamples("one", ["a"], [[-1.0]], [[0.5]]))
    assert plots.plot_reliability(alone, tmp_path / "a.png") is None
    logs = {"SFT": [{"step": 1, "train_runtime": 1.0}]}
    assert plots.plot_training(logs, tmp_path / "a.png") is None
    assert plots.plot_margins([texts_only], tmp_path / "a.png") is None
    assert list(tmp_path.iterdir()) == []
