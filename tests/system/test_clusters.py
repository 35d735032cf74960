"""Configurations in examples/clusters: they are read, and what can be run here is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from plad_fast.cli import main
from tests.support.launched import environment
from tests.support.recipe_runs import train, write_pairs

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "examples" / "clusters"
ACCELERATE = ("ddp.yaml", "deepspeed.yaml", "fsdp2.yaml", "multi_node.yaml")


def test_every_file_is_in_the_table():
    table = (CLUSTERS / "README.md").read_text()
    linked = set(re.findall(r"^\| \[([\w.]+)\]\(\1\)", table, flags=re.MULTILINE))
    assert linked == {path.name for path in CLUSTERS.iterdir()} - {"README.md"}


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_files(name):
    config = load_config_from_file(str(CLUSTERS / name))
    assert config.num_processes == 8 * config.num_machines
    assert config.mixed_precision == "no"
    if name == "fsdp2.yaml":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name == "deepspeed.yaml":
        assert config.deepspeed_config["zero_stage"] == 3
        assert config.deepspeed_config["zero3_save_16bit_model"]


def test_skypilot_starts_every_process():
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert {"resources", "setup", "run", "file_mounts"} <= task.keys()
    (folder,) = task["file_mounts"]
    assert f"--output-dir {folder}/" in task["run"]
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)


def test_docker_copies_what_there_is():
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"setup.py", "plad_fast", "kernels"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert sum(line.startswith("ARG ") for line in lines) == 2


STANDINS = {
    "srun": 'shift; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node0; else echo "$@" >> "$HERE/requeued"; fi',
    "accelerate": 'echo "$@" > "$HERE/launched"; sleep "$LASTS" & wait; exit "$STATUS"',
}


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("sent", "status", "requeued"), [(True, 1, True), (False, 75, True), (False, 2, False)]
)
def test_a_slurm_job_goes_back_into_the_queue(sent, status, requeued, tmp_path):
    """After SIGTERM, which launchers answer with 1, and after the status that asks for it."""
    for name, code in STANDINS.items():
        file = tmp_path / name
        trap = f'trap "exit {status}" TERM\n' if name == "accelerate" else ""
        file.write_text(f"#!/bin/bash\n{trap}{code}\n")
        file.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node0",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "8",
    }
    own = {"HERE": str(tmp_path), "STATUS": str(status), "LASTS": "20" if sent else "0"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(CLUSTERS / "slurm.sbatch"), "distill", "--config", "a run.yaml"]
    with subprocess.Popen(command, env=environment(**slurm, **own, **path)) as job:
        while not (tmp_path / "launched").exists():
            time.sleep(0.02)
        if sent:
            job.send_signal(signal.SIGTERM)
        assert job.wait(15) == status
    assert (tmp_path / "requeued").exists() == requeued
    launched = (tmp_path / "launched").read_text()
    assert "--num_machines 2 --num_processes 16 --machine_rank 1" in launched
    assert launched.endswith("-m plad_fast distill --config a run.yaml\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp.yaml", "deepspeed.yaml", "fsdp2.yaml"])
def test_accelerate_launch_trains_as_one_process(name, tiny_teacher, tmp_path):
    # Adam divides gradients by their size, however small, and their rounding with them: weights
    # differ by a share of the learning rate (5e-4 and 1.2e-3 on two kinds of CPU), which says
    # nothing of the processes. At this rate, five times the default, 1e-6 is a hundredth of it.
    more = ["--learning-rate", "1e-4"]
    if name == "deepspeed.yaml":
        pytest.importorskip("deepspeed")
        more += ["--max-tokens-per-batch", "none", "--micro-batch-size", "1"]
    pairs = write_pairs(tmp_path / "pairs.jsonl", 5)
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    assert main(train(teacher, pairs, tmp_path / "one", *more)) == 0
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"),
        *("--config_file", str(CLUSTERS / name), "-m", "tests.support.launched"),
        *train(teacher, pairs, tmp_path / "two", *more),
    ]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("two", "one"))
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, rtol=0, atol=1e-6)
    # Which a factor on all gradients would leave as they are.
    logs = (json.loads((tmp_path / n / "log_history.json").read_text()) for n in ("two", "one"))
    for ours, theirs in zip(*logs, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
