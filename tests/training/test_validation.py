"""The best checkpoint is kept, the model before the training among them, also after a kill."""

from __future__ import annotations

import shutil

import pytest
import torch

from plad_fast import UsageError
from plad_fast.models.loading import load_model
from plad_fast.training import trained_folders
from plad_fast.training.trained_folders import log_history
from plad_fast.training.validation import Validation, best_check, checks, has_stalled
from tests.support.saved_trainings import stop, train


class Scripted:
    """Gives scores in order, and keeps the weights that it was asked about."""

    def __init__(self, *scores: float, patience: int = 2) -> None:
        self._scores = iter(scores)
        self._patience = patience
        self.seen: list[torch.Tensor] = []

    def validation(self) -> Validation:
        return Validation(self.measure, {"prompts": "some"}, self._patience)

    def measure(self, model) -> dict[str, float]:
        self.seen.append(model.lm_head.weight.detach().clone())
        return {"score": next(self._scores), "words": 3.0}


def kept(output) -> torch.Tensor:
    return load_model(output).lm_head.weight


@pytest.mark.parametrize(
    ("scores", "best", "ended"),
    [
        ((0.1, 0.5, 0.3, 0.4), 1, 6),
        ((0.1, 0.2, 0.3, 0.3), 2, 6),  # of two that are equal the first
        ((0.1, 0.3, 0.2, 0.4), 3, 6),
        ((0.5, 0.4, 0.3), 0, 4),  # it only gets worse
        ((0.5, 0.4, 0.6, 0.3), 2, 6),  # patience begins anew
    ],
    ids=["middle", "equal", "last", "start", "late"],
)
def test_the_best_is_kept_and_what_gets_worse_ends(scores, best, ended, tiny_teacher, tmp_path):
    script = Scripted(*scores)
    train(tiny_teacher, tmp_path / "out", validation=script.validation())
    log = log_history(tmp_path / "out")
    assert [entry["validation/score"] for entry in checks(log)] == list(scores)
    assert [entry["step"] for entry in checks(log)] == [0, 2, 4, 6][: len(scores)]
    assert [entry["step"] for entry in log if "loss" in entry] == [*range(1, ended + 1)]
    assert torch.equal(kept(tmp_path / "out"), script.seen[best])
    others = [seen for place, seen in enumerate(script.seen) if place != best]
    assert not any(torch.equal(kept(tmp_path / "out"), seen) for seen in others)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_measuring_changes_no_weight(tiny_teacher, tmp_path):
    def measure(model) -> dict[str, float]:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
        return {"score": float(next(scores))}

    scores = iter(range(9))
    weights = train(tiny_teacher, tmp_path / "out", validation=Validation(measure, {}))
    assert weights == train(tiny_teacher, tmp_path / "plain")


def test_a_kill_costs_no_check_that_was_saved(tiny_teacher, tmp_path, monkeypatch):
    """Of the best checkpoint, which is older than the newest two, too."""
    whole = Scripted(0.1, 0.9, 0.3, 0.2, 0.2, 0.1, 0.1, patience=9)
    options = {"saves": 6}
    expected = train(tiny_teacher, tmp_path / "whole", validation=whole.validation(), **options)
    with monkeypatch.context() as patch:
        patch.setattr(trained_folders, "publish_folder", stop)
        first = Scripted(0.1, 0.9, 0.3, 0.2, 0.2, 0.1, 0.1, patience=9)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_teacher, tmp_path / "out", validation=first.validation(), **options)
    checkpoints = tmp_path / "out.checkpoints"
    found = sorted(path.name for path in checkpoints.glob("checkpoint-*"))
    assert found == ["checkpoint-1", "checkpoint-5", "checkpoint-6"]
    shutil.rmtree(checkpoints / "checkpoint-6")
    rest = Scripted(0.1, patience=9)
    assert (
        train(tiny_teacher, tmp_path / "out", validation=rest.validation(), **options) == expected
    )
    assert len(rest.seen) == 1
    assert not checkpoints.exists()


def test_a_training_that_was_ended_early_takes_no_other_step(tiny_teacher, tmp_path, monkeypatch):
    script = Scripted(0.5, 0.4, 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(trained_folders, "publish_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_teacher, tmp_path / "out", validation=script.validation())
    train(tiny_teacher, tmp_path / "out", validation=Scripted().validation())
    assert torch.equal(kept(tmp_path / "out"), script.seen[0])


def test_a_damaged_best_checkpoint_is_trained_again(tiny_teacher, tmp_path, monkeypatch, caplog):
    scores = (0.1, 0.9, 0.3, 0.2)
    expected = train(tiny_teacher, tmp_path / "whole", validation=Scripted(*scores).validation())
    with monkeypatch.context() as patch:
        patch.setattr(trained_folders, "publish_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_teacher, tmp_path / "out", validation=Scripted(*scores).validation())
    (tmp_path / "out.checkpoints" / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    again = Scripted(*scores)
    assert train(tiny_teacher, tmp_path / "out", validation=again.validation()) == expected
    assert len(again.seen) == 4
    assert "of checkpoint-2, the best until then, model.safetensors has 0 by" in caplog.text


def test_another_validation_is_another_training(tiny_teacher, tmp_path):
    train(tiny_teacher, tmp_path / "out", validation=Scripted(0.1, 0.2, 0.3, 0.4).validation())
    with pytest.raises(UsageError, match="validation"):
        train(tiny_teacher, tmp_path / "out", validation=Scripted(patience=3).validation())


def test_patience_counts_from_the_best():
    log = [{"validation/score": s, "step": n} for n, s in enumerate((0.1, 0.4, 0.3, 0.2))]
    assert best_check([{"loss": 1.0, "step": 1}]) is None
    assert best_check(log)["step"] == 1
    assert has_stalled(log, 2)
    assert not has_stalled(log, 3)
    assert not has_stalled([], 1)
