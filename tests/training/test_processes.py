"""Two processes end with the weights and metrics of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.trainings import PAIRS, assert_same_weights, last_log, weights
from tests.training.test_trainer import near


def run_two_processes(folder, options):
    """Both ranks of `two_processes.py`; if one fails, the other is not waited for."""
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    workers = []
    for rank, log in enumerate(logs):
        environment = {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "PLAD_TEST_OPTIONS": json.dumps(options),
        }
        with log.open("w") as output:
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.two_processes", str(folder)],
                    env={**os.environ, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + 300
    try:
        while (codes := [worker.poll() for worker in workers]) != [0, 0]:
            if any(codes) or time.monotonic() > deadline:
                said = "\n".join(log.read_text()[-3000:] for log in logs)
                pytest.fail(f"the ranks ended with {codes}:\n{said}")
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.parametrize(
    "options",
    [
        # Some pairs are satisfied, in one process or in both; some micro-batches have no gradient;
        # each process has scored its share of the rows under the reference.
        {"loss": "dpo_hinge", "beta": 0.2, "max_steps": 4, "max_tokens_per_batch": 40,
         "optim": "adamw_torch", "learning_rate": 3e-3, "per_device_train_batch_size": 4},
        pytest.param(
            {"sft_weight": 0.5, "max_steps": 2, "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["hinge-on-reference", "regulariser"],
)  # fmt: skip
def test_two_processes_equal_one(options, make, tiny_model, tiny_tokenizer, tmp_path):
    """Denominators are summed over processes, and DDP's average of gradients is made up for."""
    options = {"per_device_train_batch_size": 1, **options}
    both = {**options, "per_device_train_batch_size": 2 * options["per_device_train_batch_size"]}
    single = make(PAIRS, eval_rows=PAIRS[:7], **both)
    single.train()
    expected = single.evaluate()

    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    run_two_processes(tmp_path, options)
    result = torch.load(tmp_path / "result.pt")
    assert_same_weights(result["weights"], weights(single), rtol=1e-4, atol=1e-5)
    for key in ("loss", "margin", "nll"):
        assert result["logged"][key] == near(last_log(single)[key])
        assert result["evaluated"][f"eval_{key}"] == pytest.approx(
            expected[f"eval_{key}"], rel=1e-4
        )
    if "optim" in options:
        assert result["logged"]["skipped_backwards"] > 0
