"""What launchers ask for; tests/system/test_processes.py has the refusals as a user meets them."""

from __future__ import annotations

import json
from contextlib import nullcontext

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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"gradient_clipping": None}, "gradient_clipping is not set .* max_grad_norm=... decides"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0\.5 for DeepSpeed"),
        ({"train_micro_batch_size_per_gpu": 4}, "is 4 for DeepSpeed, and --micro-batch-size"),
        ({"bf16": {"enabled": True}}, r"decides bf16\.enabled, and --precision is no here"),
        ({"fp16": {"enabled": True}}, r"decides fp16\.enabled"),
        ({"fp16": {"enabled": False}}, None),
    ],
)
def test_a_file_of_deepspeed_leaves_to_the_command_what_it_decides(
    change, said, tmp_path, monkeypatch
):
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    asked = {"zero_optimization": {"stage": 2}, **dict.fromkeys(names, "auto"), **change}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({name: v for name, v in asked.items() if v is not None}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    config = DistillConfig(loss="sft", precision="float32", max_tokens_per_batch=None)
    with nullcontext() if said is None else pytest.raises(UsageError, match=said):
        check_launch({"--batch-size": 4}, vars(config))
