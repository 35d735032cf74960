"""Trainings of a saved model on a few rows, and damage to what they write."""

from __future__ import annotations

from pathlib import Path

from plad_fast.cli import main
from plad_fast.training import checkpoints
from plad_fast.training.train import train_model

ROWS = [{"prompt": f"Say {i}.", "chosen": f" yes {i}", "rejected": " no"} for i in range(12)]
FAULTS = ("cut", "empty", "missing", "stale")


def train(source, output: Path, **options) -> bytes:
    """Six steps with checkpoints at 2, 4 and 6; returns the weights."""
    train_model(
        source,
        ROWS,
        output,
        **{
            "loss": "plad_ranking",
            "epochs": 1,
            "learning_rate": 1e-3,
            "batch_size": 2,
            "saves": 3,
            "precision": "float32",
            **options,
        },
    )
    return (output / "model.safetensors").read_bytes()


def stop(*_, **__):
    raise KeyboardInterrupt


def interrupted(command, monkeypatch, *, checkpoint: int) -> None:
    """Killed before that checkpoint counts."""
    saved = []

    def write(*given, **about):
        saved.append(given)
        return stop() if len(saved) == checkpoint else real(*given, **about)

    with monkeypatch.context() as patch:
        real = checkpoints.write_manifest
        patch.setattr(checkpoints, "write_manifest", write)
        assert main(command) == 130


def damaged(path: Path, fault: str, older: Path) -> bool:
    """Damages a file; False where the older one, or what would be left, is the same."""
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
        return True
    left = {"cut": content[: len(content) // 2], "empty": b""}.get(fault)
    if left is None:
        left = older.read_bytes() if older.is_file() else content
    path.write_bytes(left)
    return left != content


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def steps_of(caplog) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.name == "plad_fast")
