"""Commands of the recipe on tiny models, and how to kill one at a chosen moment."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from pathlib import Path

import torch

from plad_fast.models.loading import load_model
from tests.support.launched import Started


def arguments(teacher, output, *extra: str) -> list[str]:
    return [
        "distill", *(() if "--teacher" in extra else ("--teacher", str(teacher))),
        "--student-layers", "1", "--limit", "24",
        "--held-out", "8", "--teacher-temperature", "1", "--student-temperature", "1",
        "--max-new-tokens", "60", "--batch-size", "2", "--sft-batch-size", "2",
        "--sft-share", "0.5", "--precision", "float32", "--saves-per-stage", "2",
        "--validation", "0", "--output-dir", str(output), *extra,
    ]  # fmt: skip


def write_pairs(path: Path, count: int) -> Path:
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}", "rejected": " x"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(model, pairs, output, *extra: str) -> list[str]:
    return ["train", "--model", str(model), "--pairs", str(pairs), "--output-dir", str(output),
            "--batch-size", "2", "--precision", "float32", *extra]  # fmt: skip


def evaluate(student, pairs, output, *extra: str) -> list[str]:
    return ["evaluate", "--student", f"A={student}", "--pairs", str(pairs), "--output-dir",
            str(output), "--max-new-tokens", "20", "--precision", "float32", *extra]  # fmt: skip


def pair(teacher, student, prompts, output, *extra: str) -> list[str]:
    return ["pairs", "--teacher", str(teacher), "--student", str(student), "--prompts",
            str(prompts), "--output-dir", str(output), "--max-new-tokens", "60", "--precision",
            "float32", "--teacher-temperature", "1", *extra]  # fmt: skip


def changed_copy(model_folder, copy):
    """The same model in every size, with one other number."""
    shutil.copytree(model_folder, copy)
    model = load_model(copy)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(copy)
    return copy


def content(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_at(function: str, at: int, arguments: list[str]) -> None:
    """Run a command and kill -9 it at the given call of a function of `plad_fast`."""
    with tempfile.TemporaryDirectory() as folder:
        started = Started(1, arguments, Path(folder), f"{function} {at} hold")
        started.wait_for("REACHED")
        started.send(signal.SIGKILL)
        assert started.statuses() == [-signal.SIGKILL]
