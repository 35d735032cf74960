"""The programs in examples/, run as a user runs them: they all train the same student."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["red", "a cat", "eleven", "tea", "the sea", "no", "north", "it rains"]


@pytest.fixture
def arguments(tiny_teacher, tmp_path, monkeypatch):
    """What every example takes."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # accelerate keeps the precision of a process's first trainer for all that follow.
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    rows = [{"prompt": f"Say {w}.", "chosen": w, "rejected": w[::-1] + "!"} for w in WORDS]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["--model", str(tiny_teacher), "--pairs", str(pairs), "--learning-rate", "1e-3"]
    yield lambda name: [*shared, "--output-dir", str(tmp_path / name)]
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(arguments, name):
    return load_file(Path(arguments(name)[-1]) / "model.safetensors")


@pytest.fixture
def trained(arguments, tiny_teacher):
    """Of the plain loop, which has taught the student something."""
    importlib.import_module("plain_pytorch").main(arguments("plain"))
    found = weights(arguments, "plain")
    start = load_file(tiny_teacher / "model.safetensors")
    assert any(not torch.equal(found[name], start[name]) for name in found)
    return found


def test_all_loops_train_the_same_student(trained, arguments):
    pytest.importorskip("lightning")
    for name in ("accelerate_loop", "lightning_module"):
        importlib.import_module(name).main(arguments(name))
        torch.testing.assert_close(weights(arguments, name), trained, rtol=1e-5, atol=1e-6)


def test_two_processes_train_it_too(trained, arguments):
    """Half of each batch in each of them; a mean per process would weigh tokens by process."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(EXAMPLES / "accelerate_loop.py"), *arguments("two"), "--batch-size", "2"),
    ]
    cpu = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | cpu
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall("^loss ", done.stdout, flags=re.MULTILINE)) == 2, "steps"
    # AdamW's first steps have the size of the learning rate, whatever the gradient's rounding.
    torch.testing.assert_close(weights(arguments, "two"), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_the_loops_are_short(path):
    """Whoever brings a loop of their own wants to read one on a screen."""
    assert len(path.read_text().splitlines()) <= 65
