"""What launchers ask for; tests/system/test_processes.py has the refusals as a user meets them."""

from __future__ import annotations

import json

import pytest
import torch

from plad_fast.errors import UsageError
from plad_fast.recipe.settings import DistillConfig
from plad_fast.training.launch import check_launch, require_own_kind


def test_transformers_4_keeps_the_rows_at_once_of_a_checkpoint(tmp_path, monkeypatch):
    """Another number of processes would change the batch without a word."""
    (tmp_path / "trainer_state.json").write_text(json.dumps({"train_batch_size": 4}))
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    require_own_kind(tmp_path, 4)
    with pytest.raises(UsageError, match=r"saved with 4 rows at once .* 4\.57\.1 .* there are 2"):
        require_own_kind(tmp_path, 2)
    monkeypatch.setattr("transformers.__version__", "5.0.0")
    require_own_kind(tmp_path, 2)


def test_a_single_process_takes_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UsageError, match=r"4 GPUs are visible.*torchrun --nproc-per-node 4"):
        check_launch({"--batch-size": 4}, vars(DistillConfig(loss="sft")))
