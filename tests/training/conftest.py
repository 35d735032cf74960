"""Trainings of a few steps, finished and killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_fast.training import trained_folders
from tests.support.saved_trainings import stop, train


@pytest.fixture(scope="session")
def finished(tiny_teacher, tmp_path_factory) -> Path:
    """The model of a training that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    train(tiny_teacher, output)
    return output


@pytest.fixture(scope="session")
def killed(tiny_teacher, tmp_path_factory) -> Path:
    """The checkpoints of one that was killed before the model had its name."""
    output = tmp_path_factory.mktemp("killed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_folders, "publish_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_teacher, output)
    return output.with_name("out.checkpoints")
