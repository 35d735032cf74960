"""The programs in examples/, run as a user runs them: they all train the same student."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.support.launched import Started, python

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


def ending_the_group(typed):
    """As `python`. A wrapper that is freed after its group was destroyed waits for gloo's threads
    with Python's lock held, which they may wait for in turn."""
    destroy = dist.destroy_process_group

    def destroyed(*args):
        destroy(*args)
        names = []
        for file in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # a thread may have ended meanwhile
                names.append(file.read_text())
        assert not any("gloo" in name for name in names), "the group is still held"

    dist.destroy_process_group = destroyed
    return python(typed)


def test_two_processes_train_it_too(trained, arguments, tmp_path):
    """Half of each batch in each of them; a mean per process would weigh tokens by process."""
    command = [str(EXAMPLES / "accelerate_loop.py"), *arguments("two"), "--batch-size", "2"]
    logs = tmp_path / "logs"
    started = Started(2, command, logs, program=ending_the_group, ACCELERATE_USE_CPU="true")
    assert started.statuses() == [0, 0], started.said()
    assert len(re.findall("^loss ", started.said(), flags=re.MULTILINE)) == 2, "steps"
    # AdamW's first steps have the size of the learning rate, whatever the gradient's rounding.
    torch.testing.assert_close(weights(arguments, "two"), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_the_loops_are_short(path):
    """Whoever brings a loop of their own wants to read one on a screen."""
    assert len(path.read_text().splitlines()) <= 65
