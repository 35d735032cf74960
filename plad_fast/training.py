"""One training of a saved model, which goes on where a killed run stopped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback

from plad_fast.products import cpu_multiplies_bfloat16
from plad_fast.students import load_model, load_tokenizer

_WARMUP_SHARE = 0.1


def train_model(
    source: str | Path,
    rows: Sequence[Mapping[str, Any]],
    output: Path,
    *,
    loss: str,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    micro_batch_size: int | None = None,
    saves: int = 2,
    seed: int = 0,
    precision: str = "auto",
    max_length: int = 1024,
    beta: float | None = None,
    sft_weight: float = 0.0,
    length_normalization: float = 0.0,
) -> list[dict[str, Any]]:
    """Train the model in `source` on preference rows and save it in `output`.

    Checkpoints lie in `<output>.checkpoints` until the model is saved; the newest complete one is
    resumed from. Cosine schedule, a tenth of it warm-up; AdamW without weight decay; gradients
    clipped at norm 1; parameters in float32.

    Args:
        source: folder of the model and its tokenizer, a hub id, or a .gguf file.
        rows: of the standard preference format; `rejected` is not needed for loss "sft".
        output: folder to make; one that is there is a finished training and is left alone.
        loss, beta, sft_weight, length_normalization: see `PLaDConfig`.
        batch_size: rows in an optimizer step.
        micro_batch_size: rows in memory at once; it divides the batch size.
        saves: checkpoints in the course of the training.
        precision: "float32", "bfloat16" autocast, or "auto".

    Returns:
        The trainer's log history.

    Raises:
        UsageError: from loading or from the trainer.
    """
    from plad_fast.trainer import PLaDConfig, PLaDTrainer

    if output.is_dir():  # a run may be killed between this and its own record of it
        return log_history(output)
    micro = micro_batch_size or batch_size
    steps = max(1, math.ceil(math.ceil(len(rows) / batch_size) * epochs))
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    config = PLaDConfig(
        output_dir=str(checkpoints),
        loss=loss,
        beta=beta,
        sft_weight=sft_weight,
        length_normalization=length_normalization,
        max_length=max_length,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(_WARMUP_SHARE * steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch_size // micro,
        bf16=autocast_dtype(precision) == torch.bfloat16,
        use_cpu=best_device() == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=False,
        seed=seed,
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / saves)),
        save_total_limit=1,
        logging_steps=max(1, steps // 20),
    )
    trainer = PLaDTrainer(
        load_model(source, dtype=torch.float32),
        config,
        train_dataset=list(rows),
        processing_class=load_tokenizer(source),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress)
    trainer.train(resume_from_checkpoint=latest_checkpoint(checkpoints))
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.save_model(str(partial))
    (partial / "log_history.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    partial.rename(output)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return trainer.state.log_history


def log_history(model_folder: Path) -> list[dict[str, Any]]:
    """The log of the training that made a folder of `train_model`; empty if there is none."""
    path = model_folder / "log_history.json"
    return json.loads(path.read_text()) if path.is_file() else []


def latest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, or None.

    The trainer's state is the last file of a checkpoint; a killed run may leave none, or half.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def autocast_dtype(precision: str) -> torch.dtype:
    """bfloat16 where the device multiplies it fast, unless the caller decided."""
    if precision == "float32":
        return torch.float32
    if precision == "bfloat16":
        return torch.bfloat16
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def best_device() -> str:
    """Where this process runs its models."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Progress(ProgressCallback):
    """The bar of the Trainer with the latest metrics behind it, instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        shown = (("nll", "nll"), ("ranking_accuracy", "ranked"), ("active_pairs", "active"))
        metrics = {label: f"{logs[name]:.2f}" for name, label in shown if name in logs}
        if metrics:
            self.training_bar.set_postfix(metrics)
